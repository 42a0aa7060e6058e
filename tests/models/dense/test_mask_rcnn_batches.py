"""What detectron2's values do not show of Mask R-CNN: batches cut into microbatches and devices,
images without objects, padding, precision, the federated loss, saturation, sizes and costs."""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import parallel, schema
from m3i_jax.models.dense import mask_rcnn, proposals, regions
from m3i_jax.profiling import flops

SETTINGS = schema.Detect(
    strides=(4, 8, 16),
    anchor_sizes=(8, 16, 32),
    anchor_ratios=(1.0,),
    width=8,
    rpn_convs=1,
    rpn_samples=32,
    proposals=(20, 24),
    test_proposals=(20, 16),
    rois=16,
    box_convs=1,
    box_hidden=16,
    mask_convs=1,
    score_threshold=0.1,
    candidates=40,
    detections=6,
    canonical=(16, 8),
)
SIDE, CLASSES, IMAGES, OBJECTS = 32, 3, 8, 3
TARGETS = ("size", "boxes", "classes", "masks")


@functools.cache
def example() -> dict[str, Any]:
    """A batch whose second image has no object, and whose first is not of full size. First called
    outside a mesh, whose axes the keys would have."""
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 20, (IMAGES, OBJECTS, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(6, 12, corner.shape)], -1)
    classes = rng.integers(0, CLASSES, (IMAGES, OBJECTS)).astype(np.int32)
    classes[1], classes[2:, 2] = -1, -1
    size = np.full((IMAGES, 2), SIDE, np.int32)
    size[0] = 24, 30
    return {
        "pyramid": {
            stride: rng.normal(size=(IMAGES, SIDE // stride, SIDE // stride, 8)).astype(np.float32)
            for stride in SETTINGS.strides
        },
        "size": size,
        "boxes": np.where(classes[..., None] >= 0, boxes, 0).astype(np.float32),
        "classes": classes,
        "masks": rng.integers(0, 2, (IMAGES, OBJECTS, 14, 14)).astype(np.uint8),
        "keys": jax.random.split(jax.random.key(1), IMAGES),
    }


@functools.cache
def params(settings: schema.Detect = SETTINGS) -> Any:
    channels = dict.fromkeys(settings.strides, 8)
    tree = jax.jit(lambda key: mask_rcnn.init(settings, channels, CLASSES, key))(jax.random.key(0))
    # logits that differ: at the start all are nearly equal
    return jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim == 2 else leaf, tree)


def values(settings: schema.Detect, params: Any, batch: Any, **more: Any) -> Any:
    return mask_rcnn.losses(
        settings,
        params,
        batch["pyramid"],
        *(batch[name] for name in TARGETS),
        batch["keys"],
        **more,
    )


def total(params: Any, batch: Any) -> tuple[jax.Array, Any]:
    """Sum over images, and all values."""
    losses, counts = values(SETTINGS, params, batch)
    return sum(loss for loss, _ in losses.values()), losses | counts


GRADIENTS = jax.value_and_grad(total, has_aux=True)


@functools.cache
def whole() -> Any:
    return jax.jit(GRADIENTS)(params(), example())


def test_a_batch_is_the_sum_of_its_images() -> None:
    call = jax.jit(GRADIENTS)
    parts = [
        call(params(), jax.tree.map(lambda leaf: leaf[i : i + 2], example()))  # noqa: B023
        for i in range(0, IMAGES, 2)
    ]
    summed = functools.reduce(functools.partial(jax.tree.map, jnp.add), parts)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), summed, whole()
    )
    assert whole()[0][1]["cls"][1] == IMAGES


def test_devices_do_not_talk_about_images() -> None:
    """On eight devices the values are those of one, and nothing but sums crosses devices."""
    mesh = parallel.make_mesh((4, 2, 1))
    params(), example()
    with jax.set_mesh(mesh):
        everywhere, rows = parallel.replicated(mesh), parallel.data_sharding(mesh)
        compiled = (
            jax.jit(GRADIENTS, in_shardings=(everywhere, rows)).lower(params(), example()).compile()
        )
        placed = jax.device_put(example(), rows)
        got = compiled(jax.device_put(params(), everywhere), placed)
        detect = (
            jax.jit(
                lambda params, batch: mask_rcnn.detect(
                    SETTINGS, params, batch["pyramid"], batch["size"]
                ),
                in_shardings=(everywhere, rows),
            )
            .lower(params(), example())
            .compile()
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, whole())
    moving = r"\b(all-gather|all-to-all|collective-permute|collective-broadcast"
    assert not re.findall(moving + r")[-(]", compiled.as_text())
    assert not re.findall(moving + r"|all-reduce|reduce-scatter)[-(]", detect.as_text())
    largest = 0
    for shapes in re.findall(r"= (.*) all-reduce(?:-start)?\(", compiled.as_text()):
        for dims in re.findall(r"\[([\d,]*)\]", shapes):
            largest = max(largest, math.prod(int(n) for n in dims.split(",") if n))
    assert 0 < largest <= max(leaf.size for leaf in jax.tree.leaves(params()))


def test_images_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the arrays of two images would be too large."""
    monkeypatch.setattr(mask_rcnn, "_AT_ONCE", 1)
    params(), example()
    with jax.set_mesh(parallel.make_mesh((1, 1, 1), jax.devices()[:1])):
        compiled = jax.jit(lambda params, batch: GRADIENTS(params, batch))
        lowered = compiled.lower(params(), example())
        assert lowered.as_text().count("stablehlo.while") > 8
        got = lowered.compile()(params(), example())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, whole())


def test_an_image_without_objects_has_background_alone() -> None:
    empty = jax.tree.map(lambda leaf: leaf[1:3], example())
    empty = empty | {"classes": np.full_like(empty["classes"], -1), "boxes": 0 * empty["boxes"]}
    (_, got), gradients = jax.jit(GRADIENTS)(params(), empty)
    for name in ("rpn_loc", "box_reg", "mask", "foreground_anchors", "foreground_regions"):
        assert got[name][0] == 0, name
    assert got["rpn_cls"][0] > 0 and got["cls"][0] > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert not np.any(gradients["mask"]["masks"]["kernel"])


def test_what_pads_an_image_does_not_matter() -> None:
    """Slots without objects may hold anything; more of them change nothing."""
    batch = jax.tree.map(lambda leaf: leaf[2:4], example())
    anchors, found = 84, SETTINGS.proposals[1]
    draws = mask_rcnn.draw_uniforms(SETTINGS, anchors, OBJECTS, CLASSES, batch["keys"])

    @jax.jit
    def call(params, batch, draws):
        return mask_rcnn.losses_from_draws(
            SETTINGS, params, batch["pyramid"], *(batch[name] for name in TARGETS), draws
        )

    other = dict(batch)
    for name, value in (("boxes", 17.5), ("classes", -1), ("masks", 1)):
        more = [(0, 0), (0, 2)] + [(0, 0)] * (batch[name].ndim - 2)
        other[name] = np.pad(batch[name], more, constant_values=value)
    other["boxes"][:, 2] = 3.0
    more_draws = draws | {"regions": jnp.pad(draws["regions"], ((0, 0), (0, 2)))}
    assert draws["regions"].shape == (2, found + OBJECTS)
    wanted, got = call(params(), batch, draws), call(params(), other, more_draws)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, wanted)


def test_boxes_stay_wide_in_bfloat16() -> None:
    maps = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), example()["pyramid"])
    (_, got), gradients = jax.jit(GRADIENTS)(params(), example() | {"pyramid": maps})
    for name, (value, _) in got.items():
        np.testing.assert_allclose(value, whole()[0][1][name][0], rtol=0.1, atol=0.1, err_msg=name)
        assert value.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    shapes = jax.eval_shape(
        lambda maps: mask_rcnn.detect(SETTINGS, params(), maps, example()["size"]), maps
    )
    wanted = {"boxes": "float32", "scores": "float32", "masks": "float32", "classes": "int32"}
    assert {name: str(shapes[name].dtype) for name in wanted} == wanted


def test_detections_beyond_the_candidates_are_counted() -> None:
    batch = jax.tree.map(lambda leaf: leaf[:2], example())

    def cut(candidates: int) -> Any:
        settings = dataclasses.replace(SETTINGS, candidates=candidates)
        return jax.jit(
            lambda params: mask_rcnn.detect(settings, params, batch["pyramid"], batch["size"])
        )(params())

    few, many = cut(6), cut(1000)
    assert (many["cut"] == 0).all() and (few["cut"] > 0).any()
    assert many["scores"].shape == (2, 6) and many["boxes"].dtype == jnp.float32
    for row, score in enumerate(np.asarray(many["scores"])):
        assert (np.diff(score) <= 0).all()
        height, width = batch["size"][row]
        assert (np.asarray(many["boxes"][row]) <= [width, height, width, height]).all()


def test_the_federated_loss_leaves_most_categories_alone() -> None:
    """With one category to keep, an image trains those that it has; with all, the others, too."""
    settings = dataclasses.replace(SETTINGS, loss="federated", federated_classes=1, masks=False)
    batch = jax.tree.map(lambda leaf: leaf[2:3], example())

    def gradient(kept: int, frequency: Any) -> np.ndarray:
        def loss(params: Any) -> jax.Array:
            chosen = dataclasses.replace(settings, federated_classes=kept)
            return values(chosen, params, batch, frequency_K=frequency)[0]["cls"][0]

        return np.asarray(jax.jit(jax.grad(loss))(params(settings))["box"]["classes"]["bias"])

    present = {*batch["classes"].ravel().tolist()} - {-1}
    assert 0 < len(present) < CLASSES
    assert set(np.flatnonzero(gradient(1, None))) == present
    frequency = np.ones(CLASSES)
    everything = gradient(CLASSES + 1, frequency)
    assert np.flatnonzero(everything).tolist() == [*range(CLASSES)]  # background has no column
    frequency[[k for k in range(CLASSES) if k not in present]] = 0
    assert set(np.flatnonzero(gradient(CLASSES + 1, frequency))) == present


def test_sizes_and_first_values() -> None:
    settings = schema.Detect()
    channels = dict.fromkeys(settings.strides, 256)
    shapes = jax.eval_shape(
        lambda key: mask_rcnn.init(settings, channels, 80, key), jax.random.key(0)
    )
    sizes = {
        part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in shapes.items()
    }
    assert sizes["rpn"] == 1_184_015
    assert sizes["box"] + sizes["mask"] == 18_262_753
    small = schema.Detect(width=64, box_hidden=128)
    channels = dict.fromkeys(small.strides, 64)
    tree = jax.jit(lambda key: mask_rcnn.init(small, channels, 5, key))(jax.random.key(0))
    for part, layer, std in (
        ("rpn", "conv_1", 0.01),
        ("rpn", "deltas", 0.01),
        ("box", "conv_0", math.sqrt(2 / (64 * 9))),
        ("box", "hidden", math.sqrt(1 / (64 * 49))),
        ("box", "classes", 0.01),
        ("box", "deltas", 0.001),
        ("mask", "conv_3", math.sqrt(2 / (64 * 9))),
        ("mask", "deconv", math.sqrt(2 / (64 * 4))),
        ("mask", "masks", 0.001),
    ):
        np.testing.assert_allclose(np.std(tree[part][layer]["kernel"]), std, rtol=0.15)
        assert not np.any(tree[part][layer].get("bias", 0))
    assert (tree["box"]["norm_0"]["scale"] == 1).all()


def test_costs_of_the_heads_at_1024_pixels() -> None:
    """GFLOP, forward, of a count on detectron2: 207, 132 and 136. Two things it has are not counted
    here: products with the padding of 3 x 3 convolutions, and 4.06 of masks of categories that
    nothing reads."""
    settings = schema.Detect()
    channels = dict.fromkeys(settings.strides, 256)
    shapes = jax.eval_shape(
        lambda key: mask_rcnn.init(settings, channels, 80, key), jax.random.key(0)
    )
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    maps = {stride: array(1, 1024 // stride, 1024 // stride, 256) for stride in settings.strides}
    rpn = functools.partial(proposals.apply_rpn, settings)
    box = functools.partial(regions.apply_box, settings)
    mask = functools.partial(regions.apply_mask, settings)
    category = jax.ShapeDtypeStruct((128,), jnp.int32)
    for call, arguments, sides, wanted in (
        (rpn, (shapes["rpn"], maps), [256, 128, 64, 32, 16], 206.7),
        (box, (shapes["box"], array(512, 7, 7, 256)), [7], 132.0),
        (mask, (shapes["mask"], array(128, 14, 14, 256), category), [14], 135.7 - 4.06),
    ):
        count = flops.count_flops(call, *arguments)
        padded = sum(side**2 for side in sides) / sum((side - 2 / 3) ** 2 for side in sides)
        np.testing.assert_allclose((count.dot + count.conv * padded) / 1e9, wanted, rtol=0.01)


def test_more_is_asked_for_than_there_is() -> None:
    """Fewer anchors than samples, candidates, proposals, regions and detections."""
    settings = dataclasses.replace(
        SETTINGS,
        rpn_samples=400,
        proposals=(200, 300),
        test_proposals=(200, 300),
        rois=2000,
        candidates=3000,
        detections=1000,
        masks=False,
    )
    batch = jax.tree.map(lambda leaf: leaf[:2], example())

    @jax.jit
    def call(params: Any) -> Any:
        found = mask_rcnn.detect(settings, params, batch["pyramid"], batch["size"])
        return values(settings, params, batch), found

    (losses, counts), found = call(params(settings))
    assert counts["proposals"][0] <= 2 * 84
    assert all(np.isfinite(total) for total, _ in losses.values())
    assert found["valid"].sum() <= 2 * 84 * CLASSES and not found["cut"].any()


def test_levels_are_those_of_the_settings() -> None:
    with pytest.raises(ValueError, match="strides"):
        mask_rcnn.init(SETTINGS, {4: 8, 8: 8}, 3, jax.random.key(0))
