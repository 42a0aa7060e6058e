"""Mask2Former for instances: true masks in the frames of boxes against maps, the whole loss against
class maps, and detections against a plain rendering of its authors' formula and, where torch is
installed, against transformers."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.evaluation.detection_results import original_detections, rle_to_mask
from m3i_jax.models.dense import mask2former, mask2former_instances
from m3i_jax.models.dense.map_sampling import sample_points
from m3i_jax.models.dense.mask2former_losses import (
    BoxMasks,
    ClassMasks,
    mask2former_losses,
)
from m3i_jax.models.dense.task_heads import detection_head

OWN = schema.Mask2Former(
    queries=6, heads=2, encoder_depth=1, depth=2, hidden=8, encoder_hidden=8, points=50
)
SETTINGS = schema.Detect(
    head="mask2former",
    strides=(4, 8, 16),
    width=16,
    detections=9,
    score_threshold=0.0,
    mask2former=OWN,
)


def test_masks_of_boxes_are_their_maps_at_points() -> None:
    """A box on whole pixels whose mask has a cell a pixel: inside, half a pixel from its border,
    the values are those of the mask as a map."""
    r = np.random.default_rng(0)
    masks = (r.random((2, 8, 8)) < 0.5).astype("f4")
    corners = np.array([[3, 5], [20, 1]])
    boxes = np.concatenate([corners, corners + 8], 1)
    maps = np.zeros((2, 32, 40), "f4")
    for (x, y), mask, map_ in zip(corners, masks, maps, strict=True):
        map_[y : y + 8, x : x + 8] = mask
    truth = BoxMasks(jnp.zeros(2, int), boxes / np.array([40, 32] * 2), masks)
    places = r.random((400, 2)).astype("f4")
    wanted = sample_points(maps.transpose(1, 2, 0), places)
    got = truth.shared(places)
    for m, (x, y) in enumerate(corners):
        at = places * [40, 32] - [x, y]
        middle = ((at > 0.5) & (at < 7.5)).all(1)
        outside = ((at < -0.5) | (at > 8.5)).any(1)
        assert middle.sum() > 5 and outside.sum() > 200
        np.testing.assert_allclose(got[middle, m], wanted[middle, m], atol=2e-5)
        assert not np.any(got[outside, m])
    each = truth.each(jnp.stack([places, places[::-1]]))
    np.testing.assert_allclose(each[0], got[:, 0], atol=1e-6)
    np.testing.assert_allclose(each[1], got[::-1, 1], atol=1e-6)


def test_objects_that_fill_boxes_are_the_class_maps_that_they_paint() -> None:
    """Rectangles of different categories: the same assignment and loss as for their class map, up
    to the half pixel at borders, for predictions that are far from both."""
    r = np.random.default_rng(1)
    labels = np.full((1, 64, 64), 255)
    labels[0, 4:28, 8:60], labels[0, 32:60, 4:30] = 2, 0
    boxes = np.array([[[8, 4, 60, 28], [4, 32, 30, 60], [0, 0, 0, 0]]]) / 64
    classes = jnp.array([[2, 0, -1]])
    made = mask2former.QueryPredictions(
        jnp.asarray(r.normal(size=(2, 1, 6, 4)), jnp.float32),
        jnp.asarray(r.normal(size=(2, 1, 16, 16, 6)) * 3, jnp.float32),
    )
    own = schema.Mask2Former(queries=6, points=4000)
    settings, keys = schema.Detect(mask2former=own), jax.random.split(jax.random.key(0), 1)
    run = jax.jit(functools.partial(mask2former_losses, settings))
    sums, query = run(made, BoxMasks(classes, boxes, jnp.ones((1, 3, 14, 14))), keys)
    wanted, same = run(made, ClassMasks(classes, jnp.asarray(labels)), keys)
    np.testing.assert_array_equal(query, same)
    np.testing.assert_allclose(sums, wanted, rtol=0.03)
    np.testing.assert_allclose(sums[:, 0], wanted[:, 0], rtol=1e-6)


def resized(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear resizing [h, w], pixel by pixel."""
    out = np.zeros(size)
    for i in range(size[0]):
        for j in range(size[1]):
            y, at = (
                np.clip((k + 0.5) * x.shape[a] / size[a] - 0.5, 0, x.shape[a] - 1)
                for a, k in ((0, i), (1, j))
            )
            y0, x0 = int(y), int(at)
            y1, x1 = min(y0 + 1, x.shape[0] - 1), min(x0 + 1, x.shape[1] - 1)
            top = x[y0, x0] * (1 - at + x0) + x[y0, x1] * (at - x0)
            low = x[y1, x0] * (1 - at + x0) + x[y1, x1] * (at - x0)
            out[i, j] = top * (1 - y + y0) + low * (y - y0)
    return out


def predictions() -> tuple[np.ndarray, np.ndarray]:
    r = np.random.default_rng(2)
    return r.normal(size=(6, 4)).astype("f4"), r.normal(size=(8, 10, 6)).astype("f4")


def test_instances_are_those_of_the_formula() -> None:
    logits, masks = predictions()
    content, canvas, original = (28, 36), (32, 40), (21, 54)
    call = functools.partial(mask2former_instances.instances, SETTINGS, canvas=canvas)
    found = jax.device_get(jax.jit(call)(logits, masks, jnp.array(content)))
    share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    pairs = sorted(
        ((share[q, k], q, k) for q in range(6) for k in range(3)), key=lambda pair: -pair[0]
    )[:9]
    wanted = []
    for p, q, k in pairs:
        full = resized(masks[..., q], canvas)[: content[0], : content[1]]
        rows, columns = np.nonzero(full > 0)
        score = p * (1 / (1 + np.exp(-full[full > 0]))).mean()
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        wanted.append((score, k, box, resized(full, original) > 0))
    wanted.sort(key=lambda each: -each[0])
    np.testing.assert_allclose(found["scores"], [each[0] for each in wanted], rtol=1e-5)
    assert found["classes"].tolist() == [each[1] for each in wanted] and found["valid"].all()
    np.testing.assert_array_equal(found["boxes"], [each[2] for each in wanted])
    some = dataclasses.replace(SETTINGS, score_threshold=float(found["scores"][3:5].mean()))
    few = jax.jit(functools.partial(mask2former_instances.instances, some, canvas=canvas))
    assert few(logits, masks, jnp.array(content))["valid"].tolist() == [True] * 4 + [False] * 5
    outputs = {**found, "mask_stride": np.int32(4)}
    at_original = original_detections(outputs, content=content, size=original)
    assert at_original.masks is not None and len(at_original.masks) == 9
    for rle, box, (*_, mask) in zip(at_original.masks, at_original.boxes, wanted, strict=True):
        assert (rle_to_mask(rle) != mask).mean() < 1e-3
        rows, columns = np.nonzero(mask)
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_instances_are_those_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.models.mask2former.image_processing_mask2former")
    outputs_of = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    r = np.random.default_rng(3)
    logits, masks = r.normal(size=(6, 5)).astype("f4"), r.normal(size=(96, 96, 6)).astype("f4")
    settings = schema.Detect(detections=6, score_threshold=0.0)
    call = functools.partial(mask2former_instances.instances, settings, canvas=(384, 384))
    found = jax.device_get(jax.jit(call)(logits, masks, jnp.array([384, 384])))
    outputs = outputs_of.Mask2FormerForUniversalSegmentationOutput(
        class_queries_logits=torch.from_numpy(logits)[None],
        masks_queries_logits=torch.from_numpy(masks.transpose(2, 0, 1).copy())[None],
    )
    made = processors.Mask2FormerImageProcessor().post_process_instance_segmentation(
        outputs, threshold=0.0, return_binary_maps=True
    )[0]
    order = np.argsort([-each["score"] for each in made["segments_info"]])
    segments = [made["segments_info"][i] for i in order]
    np.testing.assert_allclose(found["scores"], [each["score"] for each in segments], atol=2e-6)
    assert found["classes"].tolist() == [each["label_id"] for each in segments]
    size = (384, 384)
    ours = original_detections({**found, "mask_stride": np.int32(4)}, content=size, size=size)
    assert ours.masks is not None
    for rle, theirs in zip(ours.masks, made["segmentation"].numpy()[order], strict=True):
        assert (rle_to_mask(rle) != (theirs > 0)).mean() < 1e-5


def test_detections_of_the_head_are_its_instances() -> None:
    channels = {4: 3, 8: 5, 16: 6}
    params = mask2former_instances.init(SETTINGS, channels, 3, jax.random.key(0))
    r = np.random.default_rng(4)
    maps = {s: r.normal(size=(2, 64 // s, 32 // s, c)).astype("f4") for s, c in channels.items()}
    sizes = np.array([[64, 32], [40, 20]], np.int32)

    def both(params: Any) -> Any:
        made = mask2former.apply(SETTINGS, params, maps)
        one = mask2former_instances.instances(
            SETTINGS, made[0][-1, 1], made[1][-1, 1], sizes[1], canvas=(64, 32)
        )
        return mask2former_instances.detect(SETTINGS, params, maps, sizes), one

    found, one = jax.jit(both)(params)
    assert found["mask_logits"].shape == (2, 9, 16, 8) and found["mask_stride"].tolist() == [4, 4]
    for name, array in one.items():
        np.testing.assert_allclose(found[name][1], array, atol=1e-5, err_msg=name)
    assert found["boxes"][1].max() <= 40 and (found["boxes"][1, :, 2] <= 20).all()


def test_what_the_head_cannot_do_is_refused() -> None:
    with pytest.raises(UserError, match=r"dense\.detect\.masks: the head mask2former learns"):
        detection_head(schema.Detect(head="mask2former", masks=False))
    with pytest.raises(UserError, match="6 queries cannot be matched with 7 objects"):
        mask2former_instances.losses(
            SETTINGS, {}, {}, jnp.ones((1, 2), int), jnp.zeros((1, 7, 4)), jnp.zeros((1, 7), int),
            jnp.zeros((1, 7, 2, 2)), jax.random.split(jax.random.key(0), 1),
        )  # fmt: skip
    with pytest.raises(UserError, match="config.dense.detect: the head mask2former cannot be made"):
        wrong = schema.Detect(strides=(4,), width=16, mask2former=OWN)
        mask2former_instances.init(wrong, {4: 3}, 3, jax.random.key(0))
    with pytest.raises(UserError, match=r"dense\.detect\.loss: 'federated' has no effect"):
        wrong = schema.Detect(strides=(4, 8), width=16, loss="federated", mask2former=OWN)
        mask2former_instances.init(wrong, {4: 3, 8: 3}, 3, jax.random.key(0))
