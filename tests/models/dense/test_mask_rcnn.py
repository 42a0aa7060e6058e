"""Mask R-CNN against detectron2 (tests/data/make_detectron2.py): choices, losses, gradients and
detections of a tiny ViTDet, from the stored output of its backbone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.interop import dense_weights
from m3i_jax.models.dense import mask_rcnn, proposals, regions
from m3i_jax.models.dense.map_sampling import mask_targets
from m3i_jax.objective.assignment import match_boxes
from m3i_jax.objective.boxes import box_iou
from tests.models.dense import vitdet


@functools.cache
def params() -> dict[str, Any]:
    return dense_weights.load_mask_rcnn(vitdet.state("state/"))


@pytest.mark.parametrize("name", vitdet.SETS)
def test_choices_are_those_of_detectron2(name: str) -> None:
    """Labels, sampled anchors, proposals, sampled RoIs with their categories, mask targets."""
    settings, wanted = vitdet.SETS[name], vitdet.state(f"{name}/", "vitdet_values")
    size, boxes, classes, masks = vitdet.batch()
    stored = vitdet.arrays("vitdet_maps")
    draws = vitdet.draws()

    @jax.jit
    @jax.vmap
    def choose(logits, deltas, size, boxes, classes, masks, anchor_draw, region_draw):
        levels = proposals.pyramid_anchors(settings, {s: (128 // s,) * 2 for s in vitdet.STRIDES})
        anchors, valid = jnp.concatenate(levels), classes >= 0
        label, _ = match_boxes(box_iou(boxes, anchors), valid, low=0.3, high=0.7, keep_best=True)
        sampled = proposals.sample_anchors(settings, anchors, boxes, valid, anchor_draw)
        found = proposals.select_proposals(
            settings, logits, deltas, levels, size, settings.proposals
        )
        rois, chosen = regions.sample_regions(settings, found, boxes, valid, region_draw)
        some = slice(0, regions.foreground_regions(settings))
        target = mask_targets(
            masks[chosen.object_S[some]], boxes[chosen.object_S[some]], rois[some]
        )
        return anchors, label, sampled, found, rois, chosen, target

    anchors, label, sampled, found, rois, chosen, target = choose(
        stored["rpn_logits"], stored["rpn_deltas"], size, boxes, classes, masks, *draws.values()
    )
    np.testing.assert_array_equal(anchors[0], stored["anchors"])
    np.testing.assert_array_equal(label, wanted["rpn_labels"])
    if name == "few":
        index = np.where(sampled.weight_S > 0, sampled.index_S, -1)
        np.testing.assert_array_equal(index, wanted["rpn_sampled"])
        np.testing.assert_array_equal(
            sampled.foreground_S, np.take_along_axis(wanted["rpn_labels"], index, 1) == 1
        )
    np.testing.assert_allclose(found.boxes_Px4, wanted["proposals"], atol=1e-4)
    np.testing.assert_allclose(
        np.where(found.valid_P, found.score_P, -np.inf), wanted["proposal_logits"], atol=1e-5
    )
    drawn = np.asarray(chosen.weight_S) > 0
    category = np.take_along_axis(classes, np.asarray(chosen.object_S), 1)
    category = np.where(chosen.foreground_S, category, 3)
    got = np.where(drawn, chosen.index_S, -1), np.where(drawn, category, -1)
    if name == "all":  # everything is taken; detectron2 keeps no order then
        orders = [
            np.argsort(np.where(slots < 0, 99, slots), 1) for slots in (got[0], wanted["roi_slots"])
        ]
    else:
        orders = [np.tile(np.arange(settings.rois), (3, 1))] * 2
    for mine, theirs in (
        (got[0], wanted["roi_slots"]),
        (got[1], wanted["roi_classes"]),
    ):
        np.testing.assert_array_equal(
            np.take_along_axis(mine, orders[0], 1), np.take_along_axis(theirs, orders[1], 1)
        )
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(rois), orders[0][..., None], 1),
        np.take_along_axis(wanted["roi_boxes"], orders[1][..., None], 1),
        atol=1e-4,
    )
    for i in range(2):
        bits = np.unpackbits(wanted[f"mask_targets/{i}"], -1)[..., :28]
        assert len(bits) == chosen.foreground_S[i].sum()
        np.testing.assert_array_equal(target[i][: len(bits)], bits)


def objective(settings: schema.Detect, params: Any, backbone: Any, arguments: Any, draws: Any):
    losses, counts = mask_rcnn.losses_from_draws(
        settings, params["head"], vitdet.maps_of(params, backbone), *arguments, draws
    )
    return sum(total / count for total, count in losses.values()), (losses, counts)


# what is chosen among too few is compared in the test of choices
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n == "few" else ()) for n in vitdet.SETS],
)
def test_losses_and_gradients_are_those_of_detectron2(name: str) -> None:
    """Image by image; the gradient of a batch is the mean of the images'."""
    settings, wanted = vitdet.SETS[name], vitdet.state(f"{name}/", "vitdet_values")
    call = jax.jit(jax.value_and_grad(functools.partial(objective, settings), has_aux=True))
    rows = {"all": [slice(i, i + 1) for i in range(3)], "few": [slice(0, 3)]}[name]
    gradients = []
    for row in rows:
        given = jax.tree.map(lambda leaf: leaf[row], (vitdet.batch(), vitdet.draws()))  # noqa: B023
        (_, (losses, counts)), gradient = call(params(), vitdet.stored_backbone()[row], *given)
        got = [float(losses[key][0] / losses[key][1]) for key in vitdet.LOSSES]
        np.testing.assert_allclose(got, wanted["losses"][row].mean(0), rtol=1e-5, atol=1e-6)
        foreground = (wanted["rpn_labels"][row] == 1).sum(1)
        foreground = np.minimum(foreground, settings.rpn_samples // 2).sum()
        assert counts["foreground_anchors"][0] == foreground
        gradients.append(dense_weights.store_mask_rcnn(gradient))
    norms = {
        key: value
        for key, value in vitdet.state(f"{name}/gradient_norm/", "vitdet_values").items()
        if not key.startswith("backbone.net.")
    }
    assert norms.keys() == gradients[0].keys()
    for key, norm in norms.items():
        gradient = np.mean([some[key] for some in gradients], 0)
        np.testing.assert_allclose(np.linalg.norm(gradient), norm, rtol=1e-4, err_msg=key)
        if (whole := wanted.get(f"gradient/{key}")) is not None:
            vitdet.close(gradient, whole, 1e-4, key)


def test_detections_are_those_of_detectron2() -> None:
    settings, wanted = vitdet.SETS["all"], vitdet.state("detect/", "vitdet_values")
    size = vitdet.arrays("vitdet")["size"]
    found = jax.jit(
        lambda params, backbone: mask_rcnn.detect(
            settings, params["head"], vitdet.maps_of(params, backbone), size
        )
    )(params(), vitdet.stored_backbone())
    valid = np.asarray(found["valid"])
    np.testing.assert_array_equal(np.where(valid, found["classes"], -1), wanted["classes"])
    np.testing.assert_allclose(found["scores"], wanted["scores"], atol=1e-5)
    np.testing.assert_allclose(found["boxes"][valid], wanted["boxes"][valid], atol=2e-4)
    np.testing.assert_allclose(found["masks"][valid], wanted["masks"][valid], atol=2e-5)
    assert not valid.all() and not found["cut"].any()
