"""Masks and detections of images: pasted masks against loops over pixels, annotations of all forms,
single images against pycocotools, and counted confusions."""

import dataclasses

import numpy as np
import pytest

from m3i_jax.data.sources import objects, segmentations
from m3i_jax.evaluation import detection_errors, detection_eval, detection_results
from m3i_jax.evaluation.detection_results import DetectionResult, ImageDetections, ImageTruth
from tests.evaluation.test_detection_scores import TABLE, needs_pycocotools, world


def grid_sample(mask: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask sampled at each pixel centre, in loops."""
    cells, out = len(mask), np.zeros(size)
    for y in range(size[0]):
        for x in range(size[1]):
            v = (y + 0.5 - box[1]) / (box[3] - box[1]) * cells - 0.5
            u = (x + 0.5 - box[0]) / (box[2] - box[0]) * cells - 0.5
            for i in (int(np.floor(v)), int(np.floor(v)) + 1):
                for j in (int(np.floor(u)), int(np.floor(u)) + 1):
                    if 0 <= i < cells and 0 <= j < cells:
                        out[y, x] += (1 - abs(v - i)) * (1 - abs(u - j)) * mask[i, j]
    return out


@pytest.mark.parametrize(
    "box",
    [
        (3.2, 4.7, 20.1, 11.3),
        (-5.5, -3, 12, 40),
        (0, 0, 24, 18),
        (7.4, 2.6, 7.9, 3.2),
        (5.5, 6.5, 6.5, 7.5),
        (-4, 2, -1, 8),
    ],
)
def test_pasted_masks_are_sampled_at_pixel_centres(box: tuple[float, ...]) -> None:
    r = np.random.default_rng(0)
    for _ in range(3):
        mask = r.random((28, 28)).astype(np.float32)
        value = grid_sample(mask, np.array(box), (18, 24))
        got = detection_results.paste_mask(mask, np.array(box), (18, 24))
        clear = np.abs(value - 0.5) > 1e-5
        assert clear.mean() > 0.99
        np.testing.assert_array_equal(got[clear], value[clear] >= 0.5)
        whole = detection_results.paste_mask(np.ones((28, 28)), np.array(box), (18, 24))
        np.testing.assert_array_equal(
            whole, grid_sample(np.ones((28, 28)), np.array(box), (18, 24)) >= 0.5
        )


@needs_pycocotools
def test_outputs_of_a_model_become_detections_of_the_original_image() -> None:
    """Scaled by both ratios, clipped, without invalid and empty ones, masks as large as the
    image."""
    outputs = {
        "boxes": np.array([[1, 2, 5, 6], [0, 0, 3, 3], [9, 9, 12, 12], [-2, 4, 40, 8]], np.float32),
        "scores": np.array([0.9, 0.8, 0.7, 0.6], np.float32),
        "classes": np.array([3, 2, 1, 0]),
        "valid": np.array([True, False, True, True]),
        "masks": np.ones((4, 28, 28), np.float32),
    }
    found = detection_results.original_detections(outputs, content=(8, 9), size=(16, 27))
    np.testing.assert_allclose(found.boxes, [[3, 4, 15, 12], [0, 8, 27, 16]])
    np.testing.assert_allclose(found.scores, [0.9, 0.6])
    assert found.classes.tolist() == [3, 0] and found.masks is not None
    masks = [detection_results.rle_to_mask(rle) for rle in found.masks]
    assert [mask.shape for mask in masks] == [(16, 27)] * 2
    assert [int(mask.sum()) for mask in masks] == [12 * 8, 27 * 8]
    del outputs["masks"], outputs["valid"]
    found = detection_results.original_detections(outputs, content=(8, 9), size=(16, 27))
    assert found.masks is None and found.classes.tolist() == [3, 2, 0]


@needs_pycocotools
def test_segmentations_of_every_form() -> None:
    square = np.zeros((6, 7), np.uint8)
    square[1:4, 2:5] = 1
    counts = np.diff(
        np.concatenate([[0], np.flatnonzero(np.diff(square.T.reshape(-1))) + 1, [42]])
    ).tolist()
    forms = [
        [[2, 1, 5, 1, 5, 4, 2, 4]],
        {"size": [6, 7], "counts": counts},
        detection_results.mask_to_rle(square),
        detection_results.mask_tools().encode(np.asfortranarray(square)),
    ]
    for form in forms:
        rle = detection_results.segmentation_to_rle(form, (6, 7))
        assert rle is not None and isinstance(rle["counts"], str)
        np.testing.assert_array_equal(detection_results.rle_to_mask(rle), square)
    two = detection_results.segmentation_to_rle([forms[0][0], [0, 0, 1, 0, 1, 1, 0, 1]], (6, 7))
    assert two is not None and int(detection_results.rle_to_mask(two).sum()) == 10
    assert detection_results.segmentation_to_rle(None, (6, 7)) is None


@needs_pycocotools
def test_objects_of_records_become_ground_truth() -> None:
    r = np.random.default_rng(0)
    mask = r.random((6, 7)) < 0.5
    square = np.array([[2, 1], [5, 1], [5, 4], [2, 4]], np.float64)
    given = objects.Objects(
        boxes=np.array([[2, 1, 5, 4], [0, 0, 7, 6], [1, 1, 3, 3]], np.float32),
        classes=np.array([4, 0, 1], np.int32),
        crowd=np.array([False, True, False]),
        segmentations=(segmentations.Polygons((square,)), segmentations.encode_mask(mask), None),
        areas=np.array([9.0, 20.0, 4.0]),
        ids=np.array([7, 8, 9]),
        size=(6, 7),
        image=139,
        negative=np.array([2], np.int32),
    )
    truth = detection_results.image_truth(given, record=3, size=(6, 7))
    assert (truth.image, truth.record, truth.negative) == (139, 3, (2,))
    first, second, third = truth.masks
    assert first is not None and second is not None and third is None
    drawn = segmentations.rasterize([square], 6, 7)
    np.testing.assert_array_equal(detection_results.rle_to_mask(first), drawn)
    np.testing.assert_array_equal(detection_results.rle_to_mask(second), mask)
    assert truth.area.tolist() == [9, 20, 4] and truth.crowd.tolist() == [False, True, False]
    nothing = detection_results.image_truth(None, record=3, size=(6, 7))
    assert nothing.boxes.shape == (0, 4) and nothing.masks == [] and nothing.image == 3


@needs_pycocotools
def test_the_precision_of_one_image_is_pycocotools() -> None:
    """Of images with one class, at an IoU of 0.5, crowds included."""
    checked = 0
    for result in world(9, 40, masks=False):
        truth = dataclasses.replace(result.truth, classes=np.zeros_like(result.truth.classes))
        found = dataclasses.replace(result.found, classes=np.zeros_like(result.found.classes))
        one = [DetectionResult(truth, found)]
        metrics = detection_eval.detection_scores(one, TABLE, kind="bbox").metrics
        own = dict(detection_errors.image_precisions(one))
        assert ("AP50" in metrics) == (truth.image in own)
        if own:
            checked += 1
            assert own[truth.image] == pytest.approx(metrics["AP50"], abs=1e-9)
    assert checked > 20


def test_confused_classes_are_counted() -> None:
    boxes = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 90, 10.0]])
    truth = ImageTruth(
        image=1,
        size=(20, 100),
        boxes=boxes,
        classes=np.array([0, 1, 2, 0]),
        crowd=np.array([False, False, False, True]),
        area=np.full(4, 100.0),
        masks=[None] * 4,
    )
    found = ImageDetections(
        # right, wrong class, low score, empty place, in the crowd, a second one of the first
        boxes=np.array([boxes[0], boxes[1], boxes[2], [0, 10, 9, 19], [62, 0, 70, 10], boxes[0]]),
        scores=np.array([0.9, 0.8, 0.3, 0.7, 0.9, 0.6]),
        classes=np.array([0, 2, 2, 1, 0, 1]),
    )
    true, guess = detection_errors.confused_classes([DetectionResult(truth, found)], 3)
    assert sorted(zip(true.tolist(), guess.tolist(), strict=True)) == [
        (0, 0),
        (1, 2),
        (2, 3),
        (3, 1),
        (3, 1),
    ]


def test_errors_are_those_that_lvis_judges() -> None:
    """Classes that are neither annotated nor verified to be absent, and classes of which not all
    objects are annotated, have no wrong detections."""
    box = np.array([[0, 0, 10, 10.0]])
    truth = ImageTruth(
        image=1,
        size=(20, 100),
        boxes=box,
        classes=np.array([0]),
        crowd=np.array([False]),
        area=np.array([100.0]),
        masks=[None],
        negative=(1,),
        not_exhaustive=(0,),
    )
    # elsewhere: of a class that is not judged, absent, not exhaustive; then the object
    found = ImageDetections(
        boxes=np.concatenate([np.repeat(box + 40, 3, 0), box]),
        scores=np.array([0.9, 0.8, 0.7, 0.6]),
        classes=np.array([2, 1, 0, 0]),
    )
    judged = detection_eval.judged_results([DetectionResult(truth, found)])
    true, guess = detection_errors.confused_classes(judged, 3)
    assert sorted(zip(true.tolist(), guess.tolist(), strict=True)) == [(0, 0), (3, 1)]
    # the absent class comes first
    assert detection_errors.image_precisions(judged) == [(1, pytest.approx(1 / 2))]
