"""Frozen features: averaging, normalisation, valid rows, and independence of the number of
devices."""

import functools
import types

import jax
import numpy as np
import pytest

from m3i_jax import parallel
from m3i_jax.augment import photometric
from m3i_jax.errors import UserError
from m3i_jax.evaluation import feature_extraction
from m3i_jax.models import pooling, vit
from tests import toy

SIDE, ROWS = 16, 8


@functools.cache
def settings(cls_token: bool = True):
    return toy.settings(
        data__image_size=SIDE,
        model__encoder__depth=1,
        model__encoder__drop_path=0.5,
        model__encoder__cls_token=cls_token,
    )


@functools.cache
def encoder(cls_token: bool = True):
    return jax.jit(lambda: vit.init(settings(cls_token).model, jax.random.key(3)))()


def batches(count: int = 3) -> list[dict[str, np.ndarray]]:
    r = np.random.default_rng(0)
    out = []
    for k in range(count):
        views = r.integers(0, 256, (ROWS, SIDE, SIDE, 3)).astype(np.uint8)
        out.append(
            {"views": views, "label": np.arange(k * ROWS, (k + 1) * ROWS, dtype=np.int32) - 1}
        )
        out[-1] |= {"index": 7 * out[-1]["label"].astype(np.int64), "valid": np.ones(ROWS, bool)}
    return out


def one_device() -> jax.sharding.Mesh:
    return parallel.make_mesh((1, 1, 1), jax.devices()[:1])


@functools.cache
def everything() -> feature_extraction.ImageFeatures:
    return feature_extraction.Extractor(settings(), one_device())({"encoder": encoder()}, batches())


@pytest.mark.parametrize("cls_token", [True, False])
def test_features_are_the_normalised_mean_of_the_patch_tokens(cls_token: bool) -> None:
    """Pixels are normalised and cut into patches; no augmentation, masks or drop path."""
    config, views = settings(cls_token), batches(1)[0]["views"]
    pixels = (views / 255.0 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    patches = [pixels[:, y : y + 8, x : x + 8].reshape(ROWS, -1) for y in (0, 8) for x in (0, 8)]
    run = jax.jit(lambda p, x: vit.apply(config.model, p, x, grid=2))
    z_BxTxD = np.asarray(
        run(encoder(cls_token), np.stack(patches, 1).astype(np.float32)), np.float64
    )
    assert z_BxTxD.shape[1] == 4 + cls_token
    mean = z_BxTxD[:, -4:].mean(1)
    got, *_ = feature_extraction.Extractor(config, one_device())(
        {"encoder": encoder(cls_token)}, batches(1)
    )
    np.testing.assert_allclose(got, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=2e-5)


def test_features_have_norm_one_and_labels_keep_their_order() -> None:
    got, labels, records, lengths = everything()
    assert got.shape == (3 * ROWS, 32) and got.dtype == np.float32 and labels.dtype == np.int32
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)
    assert (lengths > 0).all() and lengths.std() > 0
    assert labels.tolist() == list(range(-1, 3 * ROWS - 1)) and records.tolist() == [
        7 * label for label in labels
    ]


def test_invalid_rows_are_dropped_and_the_order_is_kept() -> None:
    some, valid = batches(), np.random.default_rng(1).random((3, ROWS)) < 0.6
    valid[1] = False  # a whole batch
    for batch, which in zip(some, valid, strict=True):
        batch["valid"] = which
        batch["views"][~which] = 0
    got, labels, records, _ = feature_extraction.Extractor(settings(), one_device())(
        {"encoder": encoder()}, iter(some)
    )
    np.testing.assert_allclose(got, everything()[0][valid.reshape(-1)], atol=1e-6)
    assert (
        labels.tolist() == everything()[1][valid.reshape(-1)].tolist()
        and 0 < len(labels) < 3 * ROWS
    )
    assert (records == 7 * labels).all()


def test_eight_devices_give_the_features_of_one() -> None:
    mesh = parallel.make_mesh((2, 4, 1))
    seen = []
    extract = feature_extraction.Extractor(settings(), mesh)
    inner = extract._features
    extract._features = lambda params, views: (
        seen.append(views.sharding.shard_shape(views.shape)),
        inner(params, views),
    )[1]
    got, labels, *_ = extract(
        jax.device_put({"encoder": encoder()}, parallel.replicated(mesh)), batches()
    )
    np.testing.assert_allclose(got, everything()[0], atol=1e-6)
    assert labels.tolist() == everything()[1].tolist()
    assert seen == [(1, SIDE, SIDE, 3)] * 3


def test_attention_features_are_the_pooling_of_the_objective() -> None:
    config = settings()
    params = {
        "encoder": encoder(),
        "pool": jax.jit(lambda: pooling.init(config.model, jax.random.key(4)))(),
    }
    found = feature_extraction.Extractor(config, one_device(), pool="attention")(params, batches(1))
    got = found.vectors
    pixels = photometric.normalize(batches(1)[0]["views"] / np.float32(255), config.data.augment)
    z_BxTxD = vit.apply(config.model, params["encoder"], vit.patchify(pixels, 8), grid=2)
    want = np.asarray(pooling.apply(config.model, params["pool"], z_BxTxD[:, 1:]), np.float64)
    np.testing.assert_allclose(got, want / np.linalg.norm(want, axis=1, keepdims=True), atol=2e-5)
    assert got.shape == (ROWS, config.model.pool.width)
    np.testing.assert_allclose(found.raw, want, atol=2e-5 * np.abs(want).max())


def test_no_batches_give_no_features() -> None:
    got, labels, records, _ = feature_extraction.Extractor(settings(), one_device())(
        {"encoder": encoder()}, []
    )
    assert (
        got.shape == (0, 32)
        and labels.shape == records.shape == (0,)
        and (got.dtype, labels.dtype) == (np.float32, np.int32)
    )


def test_a_poll_comes_before_every_batch_and_may_raise() -> None:
    batches_drawn, polls = [], []

    def draw():
        for batch in batches():
            batches_drawn.append(1)
            yield batch

    def poll() -> None:
        polls.append(1)
        if len(polls) == 2:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        feature_extraction.Extractor(settings(), one_device())({"encoder": encoder()}, draw(), poll)
    assert len(polls) == 2 and len(batches_drawn) == 2


def made_of(name: str, label: int = 0) -> feature_extraction.ImageFeatures:
    return feature_extraction.ImageFeatures(
        np.full((2, 3), len(name), np.float32), np.full(2, label, np.int32), np.arange(2)
    )


def test_metrics_share_features_and_no_other_set_is_extracted() -> None:
    asked = []

    def a_set(name: str, skipped: dict[str, int]) -> feature_extraction.ImageSet:
        return lambda params, poll: (
            asked.append((name, params["encoder"])),
            (made_of(name), skipped),
        )[1]

    def measure(name: str) -> feature_extraction.Metric:
        return lambda seen: iter(
            [(f"eval/{name}", float(seen("queries").vectors.sum() + seen("index").vectors.sum()))]
        )

    sets = {
        "index": a_set("index", {"truncated": 2, "empty": 0}),
        "queries": a_set("queries", {"truncated": 1, "empty": 1}),
    }
    run = feature_extraction.make_evaluator(
        settings(),
        sets | {"more": a_set("more", {"small": 9})},
        [measure("one"), measure("two")],
        print,
    )
    state = types.SimpleNamespace(params={"encoder": "online"}, opt={})
    for _ in range(2):  # a second evaluation extracts again
        value = 6.0 * (len("queries") + len("index"))
        skipped = {"data/skipped/evaluation/truncated": 3, "data/skipped/evaluation/empty": 1}
        assert dict(run(state, lambda: None)) == {"eval/one": value, "eval/two": value, **skipped}
    assert asked == 2 * [("queries", "online"), ("index", "online")]


def test_images_that_several_pools_read_are_counted_once() -> None:
    """Those of the queries and of the index; a second reading adds what it alone could not use."""
    counts = {
        "queries": {"truncated": 1, "empty": 0},
        "pooled queries": {"truncated": 1, "unreadable": 1},
        "index": {"truncated": 2},
        "pooled index": {"truncated": 2},
    }
    context = feature_extraction.EvalContext(
        {name: lambda p, poll, name=name: (made_of(name), counts[name]) for name in counts},
        {},
        lambda: None,
    )
    for name in counts:
        context(name)
    assert context.skipped == {"truncated": 3, "unreadable": 1, "empty": 0}
    assert "empty" in context.skipped


def test_the_configured_encoder_is_evaluated() -> None:
    config = toy.settings(evaluate__encoder="ema")
    target = types.SimpleNamespace(params={"encoder": "average"})
    state, asked = (
        types.SimpleNamespace(params={"encoder": "online", "pool": 1}, opt={"target": target}),
        [],
    )
    sets = {"queries": lambda params, poll: (asked.append(params), (made_of("a"), {}))[1]}
    run = feature_extraction.make_evaluator(
        config, sets, [lambda seen: iter([("x", seen("queries").labels[0])])], print
    )
    assert dict(run(state, lambda: None)) == {"x": 0} and asked == [
        {"encoder": "average", "pool": 1}
    ]


def test_an_image_set_reads_fresh_batches_and_counts_skipped_images() -> None:
    class Batches(list):
        skipped = {"small": 1}

    polls, batches_drawn = [], []
    made = feature_extraction.image_sets(
        lambda params, batches, poll, key: (poll(), batches_drawn.append(batches), made_of("a"))[2],  # type: ignore[arg-type]
        lambda: Batches(["b"]),
    )
    for _ in range(2):
        found, skipped = made({}, lambda: polls.append(1))
        assert found.labels.tolist() == [0, 0] and skipped == {"small": 1}
    assert (
        len(polls) == 2
        and batches_drawn == [["b"], ["b"]]
        and batches_drawn[0] is not batches_drawn[1]
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused_by_the_first_image(value: float) -> None:
    """A row that is not valid may hold anything."""
    extract = feature_extraction.Extractor(settings(), one_device())
    inner, some = extract._features, batches()
    some[0]["valid"][2] = False
    extract._features = lambda params, x: np.where(
        np.isin(np.arange(ROWS), (2, 5))[:, None], value, inner(params, x)
    )
    with pytest.raises(UserError, match=r"^record 28: the features .* not finite"):
        extract({"encoder": encoder()}, some)
    made = feature_extraction.image_sets(extract, lambda: some, key="cats/{}.png".format)
    with pytest.raises(UserError, match=r"^cats/28.png: [^\n]*use other weights[^\n]*$"):
        made({"encoder": encoder()}, lambda: None)


def test_a_run_goes_on_after_features_that_are_not_finite() -> None:
    """It logs a line, keeps the metrics before, and evaluates again later."""
    finite, lines = [False], []

    def queries(params, poll):
        feature_extraction.check_finite(np.array([[1.0 if finite[0] else np.nan]]), np.array([3]))
        return made_of("a"), {}

    run = feature_extraction.make_evaluator(
        settings(),
        {"queries": queries},
        [
            lambda seen: iter([("eval/steps", 1.0)]),
            lambda seen: iter([("eval/x", float(len(seen("queries").labels)))]),
        ],
        lines.append,
    )
    state = types.SimpleNamespace(params={"encoder": "online"}, opt={})
    assert dict(run(state, print)) == {"eval/steps": 1.0}
    assert len(lines) == 1 and lines[0].startswith("warning: ") and "record 3: " in lines[0]
    finite[0] = True
    assert dict(run(state, print)) == {"eval/steps": 1.0, "eval/x": 2.0} and len(lines) == 1
