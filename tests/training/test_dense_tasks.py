"""Detection and segmentation by the one train step: in parts, on other devices, again and again,
against plain automatic differentiation."""

import contextlib
import functools
from typing import Any

import chex
import jax
import numpy as np
import pytest

from m3i_jax import parallel
from m3i_jax.errors import UserError
from m3i_jax.training import step
from m3i_jax.training.dense_task import RunningState
from m3i_jax.training.task import StepGradients, make_task, split_microbatches
from tests import toy
from tests.dense_toy import MASK2FORMER, dense_batch, dense_settings, make_trainer

UPERNET = {"dense__segment__head": "upernet", "dense__segment__divide_by": "all"}
# Without uncertain points, for which the loss jumps: one program for the tests of instances.
INSTANCES = {"dense.detect.mask2former.uncertain": 0.0}
EXACT = [  # in any parts
    ("detect", {}), ("dino", {}), ("instances", INSTANCES), ("segment", {}),
    ("segment", MASK2FORMER),
]  # fmt: skip
HEADS = [*EXACT, ("segment", UPERNET)]
IDS = ["mask_rcnn", "dino", "instances", "linear", "mask2former", "upernet"]
# whose programs compile for ten seconds: microbatches and devices are tried in one of them
LONG = ("mask_rcnn", "dino", "instances", "mask2former")


@functools.cache
def started(task: str, changes: tuple) -> Any:
    """(parameters, optimizer state) at the start, with a head that moves what is below it."""
    state = make_trainer(dense_settings(task, **dict(changes))).init()
    r = np.random.default_rng(1)
    noise = lambda leaf: leaf + 0.05 * r.normal(size=leaf.shape).astype(np.float32)
    return jax.tree.map(noise, jax.device_get(state.params)), jax.device_get(state.opt)


@functools.cache
def compiled(task: str, batch_size: int, microbatches: int, changes: tuple) -> Any:
    config = dense_settings(
        task, train__batch_size=batch_size, train__microbatches=microbatches, **dict(changes)
    )
    return config, jax.jit(make_task(config).gradients)


def gradients(task: str, changes: dict, *, microbatches: int = 1) -> StepGradients:
    config, run = compiled(task, 8, microbatches, tuple(changes.items()))
    return run(*started(task, tuple(changes.items())), dense_batch(config, 3))


def difference(a: Any, b: Any) -> float:
    """Largest difference of two trees, each leaf relative to its largest entry; leaves of pure
    rounding noise, such as the bias of keys, against a floor."""
    a, b = jax.device_get((a, b))  # by numpy: jax would compile every operation for every shape
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(b))
    found = []
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        largest = float(np.abs(y).max())
        floor = 1e-4 * scale if largest > 1e-5 * scale else scale
        found.append(float(np.abs(x - y).max()) / (largest + floor))
    return max(found)


def cases(*names: str, slow: tuple[str, ...] = ("instances",)) -> list[Any]:
    """Heads by name, some of them slow. Instances take the objects of detection and the losses of
    segmentation, which the others have; they are slow ones."""
    return [
        pytest.param(*head, id=name, marks=pytest.mark.slow if name in slow else ())
        for head, name in zip(HEADS, IDS, strict=True)
        if name in names
    ]


@pytest.mark.parametrize(("task", "changes"), cases(*IDS[:5], slow=LONG))
@pytest.mark.row("D6")
def test_microbatches_of_dense_tasks_are_the_whole_batch(task: str, changes: dict) -> None:
    """Where no statistics are of a batch: losses are sums over images, objects, masks or pixels,
    divided by numbers of the whole batch, and sampling, noise and stochastic depth go by the
    position of an image. Row 1 has no object and no labelled pixel."""
    whole = gradients(task, changes)
    parts = gradients(task, changes, microbatches=4)
    assert whole.metrics.keys() == parts.metrics.keys()
    for name, value in whole.metrics.items():
        np.testing.assert_allclose(parts.metrics[name], value, rtol=1e-6, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-6)
    assert difference(parts.grads, whole.grads) < 2e-5
    check_counts(task, whole, dense_batch(dense_settings(task), 3))


def check_counts(task: str, got: StepGradients, batch: dict[str, np.ndarray]) -> None:
    """Regions of all kinds, objects and groups of noised ones are in the metrics."""
    if task == "detect":
        assert min(float(got.metrics[f"detect/foreground_{of}"]) for of in ("anchors", "regions"))
    if task == "dino":
        there = (batch["classes"] >= 0).sum(1)
        np.testing.assert_allclose(float(got.metrics["detect/objects"]), there.mean(), rtol=1e-6)
        groups = np.maximum(6 // np.maximum(there, 1), 1)
        np.testing.assert_allclose(got.metrics["detect/denoising_groups"], groups.mean())


# of DINO, whose program no other quick test has
ONE_LAYER = {
    "model__encoder__depth": 1,
    "dense__maps__global_blocks": "(0,)",
    "dense__detect__dino__depth": 1,
}


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        *cases("mask_rcnn", "instances", "linear", "mask2former"),
        pytest.param("dino", ONE_LAYER, id="dino of one layer"),
        pytest.param("dino", {}, id="dino", marks=pytest.mark.slow),
    ],
)
@pytest.mark.row("C11")
def test_a_batch_without_annotations_has_finite_gradients(task: str, changes: dict) -> None:
    """No image of it has an object or a labelled pixel, and one is of a pixel only."""
    config, run = compiled(task, 8, 1, tuple(changes.items()))
    batch = dense_batch(config, 3)
    empty = {"boxes": 0, "classes": -1, "masks": 0, "map": 255}
    batch |= {name: np.full_like(batch[name], v) for name, v in empty.items() if name in batch}
    batch["size"][2] = 1
    out = run(*started(task, tuple(changes.items())), batch)
    assert np.isfinite(float(out.loss))
    for name, value in out.metrics.items():
        assert np.isfinite(float(value)), name
    chex.assert_tree_all_finite(out.grads)


def test_microbatches_of_a_batch_norm_are_batches_of_their_own() -> None:
    """UperNet: a step of four parts is the mean of four batches, one after another, whose running
    statistics move four times; and not the step of the whole batch."""
    got = gradients("segment", UPERNET, microbatches=4)
    config, run = compiled("segment", 2, 1, tuple(UPERNET.items()))
    params, opt = started("segment", tuple(UPERNET.items()))
    parts = split_microbatches(dense_batch(dense_settings("segment"), 3), 4, 8)
    made = []
    for i in range(4):
        made.append(run(params, opt, jax.tree.map(lambda x: x[i], parts)))  # noqa: B023
        statistics = made[-1].extras["running_statistics"]
        opt["running"] = opt["running"]._replace(statistics=statistics)
    assert difference(got.extras, made[-1].extras) < 1e-5
    mean = jax.tree.map(lambda *all_: sum(all_) / 4, *(jax.device_get(one.grads) for one in made))
    assert difference(got.grads, mean) < 1e-3
    np.testing.assert_allclose(got.loss, np.mean([one.loss for one in made]), rtol=1e-5)
    whole = gradients("segment", UPERNET)
    assert difference(got.grads, whole.grads) > 0.01


@pytest.mark.parametrize(("task", "changes"), cases(*(name for name in IDS if name != "dino")))
def test_gradients_are_those_of_the_printed_loss(task: str, changes: dict) -> None:
    """The loss is the sum of the printed losses, and the gradient is its derivative: along a random
    direction, the loss changes by what the gradient says. (DINO leaves parts of it out, between its
    layers; see tests/models/dense/test_dino.py. The loss of Mask2Former jumps where another
    point is among the uncertain ones, so the step is shorter, and instances have none of these.)"""
    config, run = compiled(task, 8, 1, tuple(changes.items()))
    (params, opt), batch = started(task, tuple(changes.items())), dense_batch(config, 3)
    got = jax.device_get(run(params, opt, batch))  # by numpy from here, for the same reason
    losses = [value for name, value in got.metrics.items() if name.startswith("loss/")]
    np.testing.assert_allclose(got.loss, sum(losses), rtol=1e-6)
    assert all(
        any(np.any(g) for g in jax.tree.leaves(got.grads[part])) for part in ("encoder", "head")
    )
    r = np.random.default_rng(2)
    way = jax.tree.map(lambda g: g * r.uniform(0.5, 1.5, g.shape).astype(np.float32), got.grads)
    size = float(np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(way))))
    wanted = sum(
        float((g * w).sum())
        for g, w in zip(jax.tree.leaves(got.grads), jax.tree.leaves(way), strict=True)
    )
    length = (1e-4 if changes is MASK2FORMER or task == "instances" else 3e-3) / size
    ends = [
        run(
            jax.tree.map(lambda p, w: p + np.float32(sign * length) * w, params, way), opt, batch
        ).loss
        for sign in (1, -1)
    ]
    np.testing.assert_allclose((ends[0] - ends[1]) / (2 * length), wanted, rtol=0.05)


def steps(task: str, changes: dict, devices: int, count: int) -> tuple[list[dict], Any]:
    one = make_trainer(dense_settings(task, **changes), devices)
    state, out = one.init(), []
    for k in range(count):
        batch = parallel.to_global(one.mesh, dense_batch(one.config, k))
        state, metrics = one.step(state, batch)
        out.append({name: float(value) for name, value in jax.device_get(metrics).items()})
    return out, jax.device_get(state)


@pytest.mark.slow  # images add up over parts and devices in models/dense/test_mask_rcnn_batches.py
@pytest.mark.parametrize(("task", "changes"), cases(*LONG, slow=()))
@pytest.mark.row("D6")
def test_microbatches_on_several_devices_are_the_whole_batch_on_one(
    task: str, changes: dict
) -> None:
    """Of the heads whose programs compile slowly: two parts, each on four devices. And another
    batch, with another number of objects, is no other program."""
    config, alone = compiled(task, 8, 1, tuple(changes.items()))
    parts, _ = compiled(task, 8, 2, tuple(changes.items()))
    params, opt = started(task, tuple(changes.items()))
    mesh = parallel.make_mesh((4, 1, 1), jax.devices()[:4])
    run = jax.jit(
        make_task(parts).gradients,
        in_shardings=(*[parallel.replicated(mesh)] * 2, parallel.data_sharding(mesh)),
    )
    for seed in (3, 4):
        batch = dense_batch(config, seed)
        with jax.set_mesh(mesh):
            four = run(params, opt, parallel.to_global(mesh, batch))
        one = alone(params, opt, batch)
        assert one.metrics.keys() == four.metrics.keys()
        for name, value in one.metrics.items():
            np.testing.assert_allclose(
                four.metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name
            )
        assert difference(four.grads, one.grads) < 2e-5
        check_counts(task, one, batch)
    assert run._cache_size() == alone._cache_size() == 1


BRIEF = [
    pytest.param(task, changes, id=name, marks=() if name == "upernet" else pytest.mark.slow)
    for (task, changes), name in zip(HEADS, IDS, strict=True)
]


@pytest.mark.parametrize(("task", "changes"), BRIEF)
@pytest.mark.row("D6")
def test_eight_devices_are_one_device_for_dense_tasks(
    task: str, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statistics of batch norm are of the whole batch, on any number of devices. And 15 batches
    of other images, sizes and numbers of objects are one trace, which would be one compilation."""
    chex.clear_trace_counter()
    monkeypatch.setattr(step, "train_step", chex.assert_max_traces(step.train_step, n=2))
    one, last = steps(task, changes, 1, 15)
    eight, _ = steps(task, changes, 8, 4)
    for wanted, got in zip(one, eight, strict=False):
        for name, value in wanted.items():
            np.testing.assert_allclose(got[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    assert all(np.isfinite(list(metrics.values())).all() for metrics in one)
    assert not any(metrics["skipped/not_finite"] for metrics in one) and int(last.step) == 15
    if changes is UPERNET:
        means = jax.tree.leaves(last.opt["running"].statistics)
        assert all(np.isfinite(mean).all() and mean.any() for mean in means)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "changes"), [*HEADS[:3], *HEADS[4:]], ids=[*IDS[:3], *IDS[4:]])
def test_sharded_parameters_are_one_device_for_dense_tasks(
    task: str, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel.sharding, "SMALL", 1)  # or nothing of a toy would be split
    one, _ = steps(task, changes, 1, 3)
    settings = dense_settings(task, **changes, parallel__mesh="(2,2,2)")
    split = make_trainer(settings)
    split = type(split)(settings, parallel.make_mesh((2, 2, 2)), 0)
    state = split.init()
    for k in range(3):
        state, metrics = split.step(state, parallel.to_global(split.mesh, dense_batch(settings, k)))
        np.testing.assert_allclose(float(metrics["loss"]), one[k]["loss"], rtol=5e-5)
    shards = [x for x in jax.tree.leaves(state) if x.sharding.shard_shape(x.shape) != x.shape]
    assert len(shards) > 30


def test_a_frozen_encoder_stays_and_is_not_decayed() -> None:
    config = dense_settings(
        "segment", model__encoder__freeze=True, optim__weight_decay=0.1, optim__warmup_steps=0
    )
    one = make_trainer(config)
    state = one.init()
    before = jax.device_get(state.params)
    state, _ = one.step(state, dense_batch(config))
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, jax.device_get(state.params))
    assert not any(jax.tree.leaves(moved["encoder"])) and any(jax.tree.leaves(moved["head"]))


@pytest.mark.parametrize("task", ["detect", "dino", "instances", "segment"])
def test_the_shapes_of_a_dense_batch_are_those_that_are_announced(task: str) -> None:
    config = dense_settings(task)
    batch = dense_batch(config)
    announced = make_task(config).batch_shapes()
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in announced.items()
    }


def test_the_linear_head_reads_the_last_of_several_maps() -> None:
    """Of several blocks of a ViT, and of the stages of an InternImage."""
    task = make_task(dense_settings("segment"))
    assert task.pyramid().channels == {8: 16}
    settings = dense_settings(
        "segment", **{**toy.INTERN, "dense__maps__relative": "none", "dense__maps__blocks": "()"}
    )
    task = make_task(settings)
    params = jax.eval_shape(task.init, jax.random.key(0))
    stride, channels = task.sources[-1]
    assert len(task.sources) == 4 and params["head"]["classifier"]["kernel"].shape[0] == channels
    batch = task.batch_shapes()
    out = jax.eval_shape(task.predict, params, task.init_statistics(), batch)
    assert out["logits"].shape == (8, 32, 32, 3) and stride == max(s for s, _ in task.sources)


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        ("detect", {"dense__detect__strides": "(3,6,12)"}, "config.dense.detect.strides"),
        ("dino", {"dense__detect__strides": "(3,6,12)"}, "config.dense.detect.strides"),
        ("detect", {"dense__detect__strides": "(4,8,32)"}, "config.dense.detect.strides"),
        (
            "segment",
            UPERNET | {"dense__segment__strides": "(8,12)"},
            "config.dense.segment.strides",
        ),
    ],
)
def test_strides_that_the_encoder_cannot_give_are_refused(
    task: str, changes: dict, words: str
) -> None:
    with pytest.raises(UserError, match=words) as error:
        make_task(dense_settings(task, **changes)).pyramid()
    assert "\n" not in str(error.value)


def test_every_stride_has_a_size_of_anchors() -> None:
    task = make_task(dense_settings("detect", dense__detect__strides="(4,8)"))
    words = r"anchor_sizes: \(6, 12, 24\) are 3 sizes for the 2 strides \(4, 8\); give one for each"
    with pytest.raises(UserError, match=words):
        jax.eval_shape(task.init, jax.random.key(0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dense__detect__masks": True}, "config.dense.detect.masks: the head dino predicts boxes"),
        ({"dense__detect__dino__queries": 21}, "dino.queries: 21 queries .* at most 20"),
        ({"dense__geometry__max_objects": 9}, "8 queries cannot be matched with 9 objects"),
        ({"dense__detect__dino__heads": 3}, "config.dense.detect.width: 8 must be a multiple"),
    ],
)
def test_settings_that_dino_cannot_have_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        config = dense_settings("dino", **changes)
        task = make_task(config)
        params = jax.eval_shape(task.init, jax.random.key(0))
        opt = {"running": RunningState({"pyramid": {}, "head": {}})}
        jax.eval_shape(task.gradients, params, opt, task.batch_shapes())
    assert "\n" not in str(error.value)


def test_fewer_queries_than_objects_are_refused_before_the_data_are_read() -> None:
    task = make_task(dense_settings("dino", dense__geometry__max_objects=9))
    with pytest.raises(UserError, match="dino.queries: 8 queries cannot be matched with 9 objects"):
        task.batches(None, None, start=0)


def test_dino_reads_the_maps_of_a_convolutional_encoder_as_they_are() -> None:
    settings = dense_settings("dino", **{**toy.INTERN, "dense__maps__relative": "none"})
    task = make_task(settings)
    params = jax.eval_shape(task.init, jax.random.key(0))
    stride, channels = task.sources[2]
    projections = params["head"]["encoder"]["projections"]
    assert stride == 8 and params["pyramid"] == {}
    assert projections["stride_8"]["conv"]["kernel"].shape == (channels, 8)
    assert projections["stride_16"]["conv"]["kernel"].shape == (3, 3, channels, 8)
    out = jax.eval_shape(task.predict, params, task.init_statistics(), task.batch_shapes())
    assert out["boxes"].shape == (8, 5, 4) and "masks" not in out


def test_dino_reads_every_map_of_the_pyramid_of_a_plain_vit() -> None:
    """The last one too: every second cell of the one before (detrex), not a convolution of it."""
    task = make_task(dense_settings("dino"))
    params = jax.eval_shape(task.init, jax.random.key(0))
    projections = params["head"]["encoder"]["projections"]
    kernels = {int(name[7:]): part["conv"]["kernel"].shape for name, part in projections.items()}
    assert kernels == {stride: (8, 8) for stride in task.pyramid().channels} and len(kernels) > 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dense__segment__width": 12, "dense__segment__mask2former__heads": 5}, "5 heads do not"),
        ({"dense__segment__width": 10}, "must be a multiple of 4, not 10"),
        ({"dense__segment__strides": "(8,)"}, "two or more maps"),
    ],
)
def test_a_mask2former_that_cannot_be_made_is_refused(changes: dict, words: str) -> None:
    task = make_task(dense_settings("segment", **(MASK2FORMER | changes)))
    with pytest.raises(UserError, match=words) as error:
        jax.eval_shape(task.init, jax.random.key(0))
    assert "\n" not in str(error.value)


def test_whole_images_at_evaluation_fit_the_coarsest_map() -> None:
    """Refused before training, not by its first evaluation."""
    for whole, fits in ((8, True), (12, False)):
        task = make_task(dense_settings("segment", dense__segment__test_whole=whole))
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="test_whole: 12"):
            assert "map" in task.batch_shapes()
