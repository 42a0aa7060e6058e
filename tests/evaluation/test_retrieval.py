"""Recall compared with a numpy loop; equal captions, ties and the last batch."""

import functools
import pathlib
import threading

import jax
import numpy as np
import pytest

from m3i_jax import parallel
from m3i_jax.data import decode, tokenizer
from m3i_jax.data.sources import base
from m3i_jax.data.sources.folder import FolderSource
from m3i_jax.errors import UnreadableError
from m3i_jax.evaluation import feature_extraction, retrieval
from m3i_jax.evaluation.text_embedder import TextEmbedder
from m3i_jax.models import m3i
from m3i_jax.models import text as text_tower
from m3i_jax.training import plan
from tests import toy

CAPTIONS = [
    "a red cat",
    "a dog",
    "A red  cat",
    None,
    "two birds",
    "",
    "a cat that sits on a very long and very red mat",
    "a dog",
]


def embeddings(images: int, captions: int, width: int = 5, seed: int = 0):
    r = np.random.default_rng(seed)
    owner = np.concatenate([r.permutation(captions), r.integers(0, captions, images - captions)])
    texts = r.normal(size=(captions, width))
    images = texts[owner] + 1.2 * r.normal(size=(images, width))
    unit = lambda x: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return unit(images), unit(texts), np.stack([np.arange(len(owner)), owner], 1)


def brute(images: np.ndarray, texts: np.ndarray, pairs: np.ndarray) -> dict[str, float]:
    """Every image is a query for any of its captions among the distinct ones, and every caption of
    every image is a query for an image with it."""
    hits: dict[str, list[bool]] = {}
    similarity = images.astype(np.float64) @ texts.astype(np.float64).T
    known = {tuple(pair) for pair in pairs.tolist()}
    for i in range(len(images)):
        order = np.argsort(-similarity[i]).tolist()
        for k in (1, 5, 10):
            found = any((i, text) in known for text in order[:k])
            hits.setdefault(f"image_to_text/r{k}", []).append(found)
    for _, text in pairs.tolist():
        asked = np.argsort(-similarity[:, text]).tolist()
        for k in (1, 5, 10):
            found = any((i, text) in known for i in asked[:k])
            hits.setdefault(f"text_to_image/r{k}", []).append(found)
    return {name: float(np.mean(found)) for name, found in hits.items()}


@pytest.mark.parametrize(
    ("images", "captions", "chunk"), [(40, 40, 1024), (43, 17, 10), (30, 1, 7), (12, 9, 12)]
)
def test_recall_equals_a_numpy_loop(images: int, captions: int, chunk: int) -> None:
    made = embeddings(images, captions)
    got = dict(retrieval.recall_at(*made, chunk=chunk))
    assert got == pytest.approx(brute(*made)) and len(got) == 6
    if captions == 40:
        assert 0 < got["text_to_image/r1"] < got["text_to_image/r5"] < got["text_to_image/r10"] < 1


def test_several_captions_of_an_image_are_evaluated_as_published() -> None:
    """Five captions an image, as in COCO, against a loop and CLIP_benchmark's own words: a share of
    the captions that find their image, and of the images that find any of their captions."""
    r = np.random.default_rng(3)
    owner = np.repeat(np.arange(30), 5)
    images = r.normal(size=(30, 6))
    texts = images[owner] + 1.5 * r.normal(size=(150, 6))
    images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts))
    got = dict(
        retrieval.recall_at(
            np.float32(images), np.float32(texts), np.stack([owner, np.arange(150)], 1), chunk=7
        )
    )
    for k in (1, 5, 10):
        first = np.argsort(-(texts @ images.T), 1)[:, :k]
        assert got[f"text_to_image/r{k}"] == pytest.approx((first == owner[:, None]).any(1).mean())
        first = owner[np.argsort(-(images @ texts.T), 1)[:, :k]]
        expected = (first == np.arange(30)[:, None]).any(1).mean()
        assert got[f"image_to_text/r{k}"] == pytest.approx(expected)
    assert 0 < got["text_to_image/r1"] < 1 > got["image_to_text/r1"] > 0


def test_a_collapsed_model_has_no_recall() -> None:
    same, every = np.full((20, 4), 0.5, np.float32), np.arange(20)
    pairs = np.stack([every, every % 18], 1)
    for value in (1, np.nan):  # the last of a run that diverged
        found = dict(retrieval.recall_at(value * same, value * same[:18], pairs))
        assert set(found.values()) == {0.0}


def test_every_image_with_an_equal_caption_is_right() -> None:
    """Caption 0 has two images; the nearer one is a hit for both of its queries."""
    images = np.array([[0, 1], [1, 0], [0.8, 0.6]], np.float32)
    texts = np.array([[1, 0], [0.6, 0.8]], np.float32)
    got = dict(retrieval.recall_at(images, texts, np.array([[0, 0], [1, 0], [2, 1]])))
    assert got["text_to_image/r1"] == 1.0
    assert got["image_to_text/r1"] == pytest.approx(2 / 3)  # image 0 points at caption 1


def test_polls_come_between_chunks() -> None:
    polls = []
    list(retrieval.recall_at(*embeddings(25, 13), chunk=10, poll=lambda: polls.append(1)))
    assert len(polls) == 2 + 3


@functools.cache
def words() -> tokenizer.Tokenizer:
    return tokenizer.train_tokenizer([c for c in CAPTIONS if c], 300, toy.CAPTION)


class Source(list):
    """A source whose records are in a list."""

    read: list[int] = []

    def caption(self, index: int) -> str | bytes | None:
        self.read.append(index)
        return self[index].caption


def test_the_metric_embeds_images_and_captions_with_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shuffled records, two of them without a caption, two pairs of equal captions; the number of
    captions is no multiple of the batch of four."""
    config = toy.settings(objective__forms="clip")
    params = jax.jit(
        lambda: m3i.init(
            config, jax.random.key(1), plan.terms_named("clip"), classes=0, vocabulary=300
        )
    )()
    source = Source(base.Record(str(i), b"", caption=caption) for i, caption in enumerate(CAPTIONS))
    order = np.array([6, 3, 0, 1, 5, 2, 7, 4])
    vectors = np.random.default_rng(0).normal(size=(8, config.model.pool.width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = feature_extraction.ImageFeatures(vectors, np.full(8, -1, np.int32), order)
    mesh = parallel.make_mesh((2, 2, 1), jax.devices()[:4])
    measure = retrieval.measure(
        mesh, source, TextEmbedder(config, mesh, words(), 4), image_set="images"
    )
    context = feature_extraction.EvalContext(
        {"images": lambda params, poll: (found, {})},
        jax.device_put(params, parallel.replicated(mesh)),
        lambda: None,
    )
    passed = []
    inner = retrieval.recall_at
    monkeypatch.setattr(
        retrieval, "recall_at", lambda *a, **k: (passed.append(a), inner(*a, **k))[1]
    )
    got = dict(measure(context))

    kept = [i for i in range(8) if CAPTIONS[order[i]]]
    # as they come
    distinct = [
        "a cat that sits on a very long and very red mat",
        "a red cat",
        "a dog",
        "two birds",
    ]
    ids, lengths = (
        np.stack(x) for x in zip(*(words().encode(text) for text in distinct), strict=True)
    )
    assert lengths.max() == toy.CAPTION  # one caption is truncated
    texts = np.asarray(text_tower.apply(config.model, params["text"], ids, lengths))
    images = np.asarray(m3i.image_embedding(config, params, 3.0 * vectors[kept]))
    texts, images = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (texts, images))
    pairs = np.stack([np.arange(6), [0, 1, 2, 1, 2, 3]], 1)
    for actual, expected in zip(passed[0], (images, texts, pairs), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert got == {f"eval/retrieval/{name}": value for name, value in inner(images, texts, pairs)}

    before = len(source.read)
    assert (
        dict(measure(context)) == got and len(source.read) == before
    )  # captions are read once a run


@pytest.mark.parametrize("lines", [False, True])
def test_all_captions_of_a_record_are_read(lines: bool) -> None:
    """Of a list, and with `lines`, of the lines of a text; empty ones do not count."""
    records = [
        base.Record("a", b"", caption="a dog", other_captions=("two birds", " ")),
        base.Record("b", b""),
        base.Record("c", b"", caption="a red cat\n\na cat"),
    ]
    mesh = parallel.make_mesh((1, 1, 1), jax.devices()[:1])
    captions = retrieval._Captions(records, words(), mesh, "stop", lines)
    ids = lambda *texts: tuple(
        tuple(tokens[:length].tolist()) for tokens, length in map(words().encode, texts)
    )
    last = ids("a red cat", "a cat") if lines else ids("a red cat a cat")
    assert captions([2, 0, 1, 2]) == [last, ids("a dog", "two birds"), (), last]


def test_captions_are_read_at_once_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read waits until eight are under way; a poll comes before each chunk of them."""
    monkeypatch.setattr(decode, "CAPTION_CHUNK", 8)
    together, polls = threading.Barrier(8), []

    class Slow(list):
        def caption(self, index: int) -> str:
            together.wait(10)
            return self[index].caption

    texts = ("a dog", "two birds", "a red cat", "a cat")
    source = Slow(base.Record(str(i), b"", caption=texts[i % 4]) for i in range(16))
    mesh, order = parallel.make_mesh((1, 1, 1), jax.devices()[:1]), [*range(5, 16), *range(5)]
    captions = retrieval._Captions(source, words(), mesh, "stop", False)
    ids = [tuple(tokens[:length].tolist()) for tokens, length in map(words().encode, texts)]
    assert captions(order, lambda: polls.append(1)) == [(ids[i % 4],) for i in order]
    assert len(polls) == 2


def test_without_captions_there_is_no_retrieval() -> None:
    source = [base.Record("a", b"", caption=None)] * 3
    mesh = parallel.make_mesh((1, 1, 1), jax.devices()[:1])
    measure = retrieval.measure(
        mesh, source, TextEmbedder(toy.settings(objective__forms="clip"), mesh, words(), 4)
    )
    found = feature_extraction.ImageFeatures(
        np.ones((3, 4), np.float32), np.zeros(3, np.int32), np.arange(3)
    )
    assert (
        list(
            measure(
                feature_extraction.EvalContext(
                    {"queries": lambda params, poll: (found, {})}, {}, lambda: None
                )
            )
        )
        == []
    )


def test_a_missing_caption_counts_as_none_with_data_missing_replace(tmp_path: pathlib.Path) -> None:
    """The file of a caption is removed after the source is opened: its image counts as one without
    a caption, and is counted as skipped."""
    config = toy.settings(objective__forms="clip")
    params = jax.jit(
        lambda: m3i.init(
            config, jax.random.key(1), plan.terms_named("clip"), classes=0, vocabulary=300
        )
    )()
    mesh = parallel.make_mesh((1, 1, 1), jax.devices()[:1])
    vectors = np.random.default_rng(0).normal(size=(4, config.model.pool.width)).astype(np.float32)
    found = feature_extraction.ImageFeatures(
        vectors, np.full(4, -1, np.int32), np.array([3, 0, 2, 1])
    )
    for name, caption in zip("abcd", ("a dog", "two birds", "a red cat", "a cat"), strict=True):
        (tmp_path / f"{name}.png").touch()
        (tmp_path / f"{name}.txt").write_text(caption)

    def measured(
        source: base.DataSource, **missing: str
    ) -> tuple[dict[str, float], dict[str, int]]:
        context = feature_extraction.EvalContext(
            {"queries": lambda params, poll: (found, {})},
            jax.device_put(params, parallel.replicated(mesh)),
            lambda: None,
        )
        measure = retrieval.measure(mesh, source, TextEmbedder(config, mesh, words(), 4), **missing)
        again = feature_extraction.EvalContext(
            {"queries": lambda params, poll: (found, {})}, context.params, lambda: None
        )
        # of each evaluation, though read once
        assert dict(measure(context)) == dict(measure(again)) and context.skipped == again.skipped
        return dict(measure(context)), dict(again.skipped)

    source = FolderSource(str(tmp_path))
    (tmp_path / "b.txt").unlink()
    with pytest.raises(UnreadableError, match="b.txt' cannot be read"):
        measured(source)
    without = [base.Record("", b"", caption=text) for text in ("a dog", None, "a red cat", "a cat")]
    got, skipped = measured(source, missing="replace")
    assert skipped == {"unreadable": 1} and got == measured(without)[0] and len(got) == 6
