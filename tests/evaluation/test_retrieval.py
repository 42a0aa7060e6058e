"""Recall compared with a numpy loop; equal captions, ties and the last batch."""

import functools
import pathlib

import jax
import numpy as np
import pytest

from m3i_jax import parallel
from m3i_jax.data import tokenizer
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
    return unit(images), unit(texts), owner


def brute(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> dict[str, float]:
    """Every image is a query for its caption among the distinct ones, and the caption of every
    image is a query for an image with it."""
    hits: dict[str, list[bool]] = {}
    for i, image in enumerate(images.astype(np.float64)):
        order = sorted(range(len(texts)), key=lambda c: -float(image @ texts[c].astype(np.float64)))
        asked = sorted(
            range(len(images)),
            key=lambda n: -float(texts[owner[i]].astype(np.float64) @ images[n].astype(np.float64)),
        )
        for k in (1, 5, 10):
            hits.setdefault(f"image_to_text/r{k}", []).append(owner[i] in order[:k])
            hits.setdefault(f"text_to_image/r{k}", []).append(owner[i] in owner[asked[:k]])
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


def test_a_collapsed_model_has_no_recall() -> None:
    same = np.full((20, 4), 0.5, np.float32)
    assert set(dict(retrieval.recall_at(same, same[:18], np.arange(20) % 18)).values()) == {0.0}


def test_every_image_with_an_equal_caption_is_right() -> None:
    """Caption 0 has two images; the nearer one is a hit for both of its queries."""
    images = np.array([[0, 1], [1, 0], [0.8, 0.6]], np.float32)
    texts = np.array([[1, 0], [0.6, 0.8]], np.float32)
    got = dict(retrieval.recall_at(images, texts, np.array([0, 0, 1])))
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
    owner = np.array([0, 1, 2, 1, 2, 3])
    for actual, expected in zip(passed[0], (images, texts, owner), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert got == {f"eval/retrieval/{name}": value for name, value in inner(images, texts, owner)}

    before = len(source.read)
    assert (
        dict(measure(context)) == got and len(source.read) == before
    )  # captions are read once a run


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
