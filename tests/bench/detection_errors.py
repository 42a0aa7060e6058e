"""Average precision of stored detections with one kind of error taken away.

    python -m tests.bench.detection_errors ANNOTATIONS.json RUN [RUN ...]

ANNOTATIONS is the file in COCO's form that the runs were evaluated on; RUN is a working directory,
whose detections-bbox.json is read. Needs pycocotools. Every line is box AP and AP50 in per cent:

  as they are
  no duplicates   without lower detections of the same class at an IoU above 0.7
  true classes    every box once, with the class of the object that it covers by half, and one
                  detection an object
  no background   without detections that touch no object
"""

import contextlib
import io
import json
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

Detection = dict[str, Any]
COVERS, TOUCHES, SAME = 0.5, 0.1, 0.7  # IoU


def _ious(a: Iterable[Detection], b: Iterable[Detection]) -> np.ndarray:
    """IoU [A, B] of boxes x y width height."""
    a, b = (np.array([x["bbox"] for x in part], float).reshape(-1, 4) for part in (a, b))
    low = np.maximum(a[:, None, :2], b[:, :2])
    high = np.minimum((a[:, :2] + a[:, 2:])[:, None], b[:, :2] + b[:, 2:])
    shared = np.maximum(high - low, 0).prod(-1)
    return shared / np.maximum(a[:, 2:].prod(1)[:, None] + b[:, 2:].prod(1) - shared, 1e-9)


def no_duplicates(found: list[Detection], objects: list[Detection]) -> list[Detection]:
    """`found` falls by score.

    >>> box = {"bbox": [0, 0, 4, 4], "category_id": 1}
    >>> len(no_duplicates([box, box, box | {"category_id": 2}], []))
    2
    """
    del objects
    kept: list[int] = []
    iou = _ious(found, found)
    for k, one in enumerate(found):
        same = (j for j in kept if found[j]["category_id"] == one["category_id"])
        if all(iou[k, j] < SAME for j in same):
            kept.append(k)
    return [found[k] for k in kept]


def true_classes(found: list[Detection], objects: list[Detection]) -> list[Detection]:
    """See above.

    >>> box, thing = {"bbox": [0, 0, 4, 4], "category_id": 1}, {"bbox": [0, 0, 4, 5]}
    >>> true_classes([box, box | {"category_id": 2}], [thing | {"category_id": 7}])
    [{'bbox': [0, 0, 4, 4], 'category_id': 7}]
    """
    boxes: dict[tuple[float, ...], Detection] = {}
    for one in found:
        boxes.setdefault(tuple(np.round(one["bbox"], 3)), one)
    out, taken = [], set()
    for one, iou in zip(boxes.values(), _ious(boxes.values(), objects), strict=True):
        covered = [j for j in np.argsort(-iou) if iou[j] >= COVERS]
        free = [j for j in covered if j not in taken]
        if not covered:
            out.append(one)
        elif free:
            taken.add(free[0])
            out.append(one | {"category_id": objects[free[0]]["category_id"]})
    return out


def no_background(found: list[Detection], objects: list[Detection]) -> list[Detection]:
    """See above."""
    touched = (_ious(found, objects) >= TOUCHES).any(1)
    return [one for one, touches in zip(found, touched, strict=True) if touches]


RULES: dict[str, Callable[[list[Detection], list[Detection]], list[Detection]]] = {
    "as they are": lambda found, objects: found,
    "no duplicates": no_duplicates,
    "true classes": true_classes,
    "no background": no_background,
}


def main(annotations: str, *runs: str) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotations)
    for run in runs:
        by_image: dict[int, list[Detection]] = {}
        for one in json.loads((pathlib.Path(run) / "detections-bbox.json").read_text()):
            by_image.setdefault(one["image_id"], []).append(one)
        for name, rule in RULES.items():
            made = []
            for image, found in by_image.items():
                found.sort(key=lambda one: -one["score"])
                made += [dict(one) for one in rule(found, truth.imgToAnns[image])]
            with contextlib.redirect_stdout(io.StringIO()):
                scores = COCOeval(truth, truth.loadRes(made), "bbox")
                scores.evaluate()
                scores.accumulate()
                scores.summarize()
            print(f"{run}: {name}: {100 * scores.stats[0]:.1f}, {100 * scores.stats[1]:.1f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
