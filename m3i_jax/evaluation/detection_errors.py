"""Errors of a detector, image by image: which detection finds which object, the average precision
of single images, and which classes are confused. Only boxes are compared; without pycocotools.

With LVIS's annotations, give the results that `detection_eval.judged_results` returns."""

from collections.abc import Iterable, Sequence

import numpy as np

from m3i_jax.evaluation.detection_results import DetectionResult, ImageDetections, ImageTruth

MISSED, IGNORED = -1, -2
RECALLS = np.linspace(0, 1, 101)


def match_detections(
    truth: ImageTruth, found: ImageDetections, *, iou: float = 0.5, by_class: bool = True
) -> np.ndarray:
    """Returns the object that each detection finds: int [D], an index of `truth`, MISSED (-1) for
    none, IGNORED (-2) for a detection that may be right or not.

    In the order of the scores, a detection takes the free object of the largest IoU, at least
    `iou`; else it is ignored if a crowd covers that share of it, or if not all objects of its class
    are annotated (LVIS).

    Args:
      truth, found: of one image.
      iou: least IoU of boxes.
      by_class: only objects of the detection's class count.

    >>> boxes = np.array([[0., 0, 10, 10]])
    >>> truth = ImageTruth(image=1, size=(20, 20), boxes=boxes, classes=np.array([3]), masks=[None],
    ...                    crowd=np.array([False]), area=np.array([100.]))
    >>> found = ImageDetections(boxes=np.repeat(boxes, 3, 0), scores=np.array([.2, .9, .8]),
    ...                         classes=np.array([3, 1, 3]))
    >>> match_detections(truth, found).tolist()
    [-1, -1, 0]
    >>> match_detections(truth, found, by_class=False).tolist()
    [-1, 0, -1]
    """
    objects = np.full(len(found.scores), MISSED)
    overlap_DxM, inside_DxM = _overlaps(found.boxes, truth.boxes)
    free_M = ~truth.crowd
    for row in np.argsort(-found.scores, kind="stable"):
        fits_M = truth.classes == found.classes[row] if by_class else np.ones_like(free_M)
        candidates = np.where(free_M & fits_M, overlap_DxM[row], -1.0)
        if len(candidates) and candidates.max() >= iou:
            objects[row] = candidates.argmax()
            free_M = free_M & (np.arange(len(free_M)) != objects[row])
        elif (truth.crowd & fits_M & (inside_DxM[row] >= iou)).any() or found.classes[
            row
        ] in truth.not_exhaustive:
            objects[row] = IGNORED
    return objects


def _overlaps(a_Dx4: np.ndarray, b_Mx4: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(IoU, share of a that is inside b), both [D, M]."""
    a, b = np.asarray(a_Dx4, np.float64), np.asarray(b_Mx4, np.float64)
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(-1)
    area_a, area_b = (a[:, 2:] - a[:, :2]).prod(-1), (b[:, 2:] - b[:, :2]).prod(-1)
    union = area_a[:, None] + area_b[None] - both
    return both / np.maximum(union, 1e-12), both / np.maximum(area_a[:, None], 1e-12)


def average_precision(scores_D: np.ndarray, right_D: np.ndarray, objects: int) -> float:
    """Returns the area under the precision-recall curve at 101 recalls, precision made
    non-increasing (COCO's).

    Args:
      scores_D: of the detections that count.
      right_D: whether each finds an object; none is found twice.
      objects: number of objects, at least 1.

    >>> average_precision(np.array([.9, .8, .7]), np.array([True, False, True]), 2)
    0.8350
    """
    right = right_D[np.argsort(-scores_D, kind="stable")]
    if not len(right):
        return 0.0
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(right) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(hits / objects, RECALLS, side="left")
    return float(np.where(at < len(right), precision[np.minimum(at, len(right) - 1)], 0).mean())


def image_precisions(
    results: Iterable[DetectionResult], *, iou: float = 0.5
) -> list[tuple[int | str, float]]:
    """Returns (image, AP at an IoU) of every image with objects, its classes in one curve: a
    detection is right if class and box are. Sorts images from worst to best if sorted by the
    second."""
    rows = []
    for result in results:
        objects = int((~result.truth.crowd).sum())
        if not objects:
            continue
        match_D = match_detections(result.truth, result.found, iou=iou)
        counts = match_D != IGNORED
        value = average_precision(result.found.scores[counts], match_D[counts] >= 0, objects)
        rows.append((result.image, value))
    return rows


def confused_classes(
    results: Sequence[DetectionResult], classes: int, *, iou: float = 0.5, score: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (true class, predicted class), each int [P]: one pair for each object, with `classes`
    as prediction if no detection finds it, and one for each detection that finds no object, with
    `classes` as true class.

    Args:
      results: of all images.
      classes: their number K.
      iou: least IoU of boxes; any class may find an object.
      score: least score of a detection that counts.
    """
    pairs = []
    for result in results:
        keep = result.found.scores >= score
        found = ImageDetections(
            boxes=result.found.boxes[keep],
            scores=result.found.scores[keep],
            classes=result.found.classes[keep],
        )
        match_D = match_detections(result.truth, found, iou=iou, by_class=False)
        guess_M = np.full(len(result.truth.classes), classes)
        guess_M[match_D[match_D >= 0]] = found.classes[match_D >= 0]
        real = ~result.truth.crowd
        pairs.append(np.stack([result.truth.classes[real], guess_M[real]]))
        extra = found.classes[match_D == MISSED]
        pairs.append(np.stack([np.full(len(extra), classes), extra]))
    true, guess = np.concatenate([np.zeros((2, 0), np.int64), *pairs], 1).astype(np.int64)
    return true, guess
