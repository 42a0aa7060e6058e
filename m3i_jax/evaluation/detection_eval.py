"""Evaluation of detection on the held-out images: average precision of boxes and masks, by COCO's
protocol, or by LVIS's where the categories have frequencies. pycocotools (COCO) and
faster-coco-eval (LVIS) are imported when they are needed (extra `dense`).

Classes and images are numbered from 1 inside the evaluation, in the order of the classes and of the
sorted image ids, and annotations from 1: pycocotools takes an annotation of id 0 for no match."""

import contextlib
import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from m3i_jax.errors import UserError
from m3i_jax.evaluation import annotated_inputs, detection_results
from m3i_jax.evaluation.detection_results import (
    CategoryTable,
    DetectionResult,
    ImageDetections,
    ImageTruth,
    json_detections,
    mask_to_rle,
    mask_tools,
    sort_results,
    to_xywh,
)
from m3i_jax.evaluation.feature_extraction import gather_from_hosts
from m3i_jax.evaluation.registry import (
    EvalContext,
    EvalInputs,
    Evaluator,
    Metric,
    register_evaluator,
)

PROTOCOLS = ("coco", "lvis")
MOST = {"coco": 100, "lvis": 300}  # detections: per image and class; per image
AREAS = ("all", "small", "medium", "large")  # limits at 32^2 and 96^2 pixels
KINDS = {"bbox": "box", "segm": "mask"}
_BEYOND = "boxes beyond dense.detect.candidates"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionScores:
    """Average precisions of one kind, boxes or masks.

    Attributes:
      metrics: AP, AP50, AP75, APs, APm, APl, AR100 (of at most so many detections; LVIS: AR300),
        ARs, ARm, ARl, AP50_agnostic (COCO: of objects of any class) and, with frequencies, APr,
        APc, APf; 0..1. What has no objects is left out.
      names: of the K classes.
      objects: int [K], objects of a class; crowds are not counted.
      ap, ap50, recall: float [K], of each class, the last the mean recall over IoU thresholds; NaN
        without objects.
      curves: float [K, 101], precision at IoU 0.5 at the recalls 0, 0.01 .. 1; NaN without objects.
      thresholds: float [K, 101], the score at which a recall is reached; 0 where it is not.
    """

    metrics: dict[str, float]
    names: tuple[str, ...]
    objects: np.ndarray
    ap: np.ndarray
    ap50: np.ndarray
    recall: np.ndarray
    curves: np.ndarray
    thresholds: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Tables:
    """What both libraries accumulate, -1 where there are no objects: precision and scores
    [T, 101, K, areas], recall [T, K, areas]; T IoU thresholds 0.5, 0.55 .. 0.95."""

    precision: np.ndarray
    recall: np.ndarray
    scores: np.ndarray


def best_detections(found: ImageDetections, most: int) -> ImageDetections:
    """Returns the `most` detections of the largest scores, in their order; of equal scores, the
    first.

    >>> found = ImageDetections(boxes=np.zeros((3, 4)), scores=np.array([.1, .3, .2]),
    ...                         classes=np.arange(3))
    >>> best_detections(found, 2).classes.tolist()
    [1, 2]
    """
    return _rows(found, np.sort(np.argsort(-found.scores, kind="stable")[:most]))


def _rows(found: ImageDetections, rows: np.ndarray) -> ImageDetections:
    return ImageDetections(
        boxes=found.boxes[rows],
        scores=found.scores[rows],
        classes=found.classes[rows],
        masks=None if found.masks is None else [found.masks[row] for row in rows.tolist()],
    )


def _lvis_detections(truth: ImageTruth, found: ImageDetections) -> ImageDetections:
    """See `judged_results`. faster-coco-eval drops them too, but fails on an image of which nothing
    is left."""
    best = best_detections(found, MOST["lvis"])
    judged = np.isin(best.classes, [*truth.classes.tolist(), *truth.negative])
    return _rows(best, np.flatnonzero(judged))


def judged_results(results: Sequence[DetectionResult]) -> list[DetectionResult]:
    """Returns the results with the detections that LVIS judges: the best 300 of an image, without
    those whose class is neither annotated nor verified to be absent."""
    return [
        DetectionResult(result.truth, _lvis_detections(result.truth, result.found))
        for result in results
    ]


def truth_json(truths: Sequence[ImageTruth], categories: CategoryTable) -> dict[str, Any]:
    """Returns the ground truth in the form of a COCO or LVIS file, with the ids of the annotation
    file, for sources that are no such file. Objects without a mask have an empty segmentation.

    >>> truth_json([], CategoryTable(names=("cat",)))["categories"]
    [{'id': 1, 'name': 'cat'}]
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for truth in truths:
        image: dict[str, Any] = {
            "id": truth.image,
            "height": truth.size[0],
            "width": truth.size[1],
        }
        if categories.frequency:
            image["neg_category_ids"] = [categories.original(k) for k in truth.negative]
            image["not_exhaustive_category_ids"] = [
                categories.original(k) for k in truth.not_exhaustive
            ]
        images.append(image)
        for box, label, crowd, area, mask in zip(
            to_xywh(truth.boxes),
            truth.classes.tolist(),
            truth.crowd.tolist(),
            truth.area.tolist(),
            truth.masks,
            strict=True,
        ):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": truth.image,
                    "category_id": categories.original(label),
                    "bbox": box,
                    "area": area,
                    "iscrowd": int(crowd),
                    "segmentation": mask if mask is not None else [],
                }
            )
    rows = [
        {"id": categories.original(label), "name": name}
        | ({"frequency": categories.frequency[label]} if categories.frequency else {})
        for label, name in enumerate(categories.names)
    ]
    return {"images": images, "annotations": annotations, "categories": rows}


def detection_scores(
    results: Sequence[DetectionResult],
    categories: CategoryTable,
    *,
    kind: str,
    protocol: str = "coco",
) -> DetectionScores:
    """Average precisions of all images.

    COCO: at most 100 detections per image and class count; crowds are ignored. LVIS: the best 300
    detections of an image over all classes; detections of classes that are neither annotated nor
    verified to be absent in an image are ignored, as are unmatched ones of classes that are not
    annotated exhaustively. An object without a mask is ignored where its box is, as a crowd, if
    `kind` is segm.

    Args:
      results: of every image that was evaluated, in any order.
      categories: of the data set; LVIS needs `frequency` for APr, APc and APf.
      kind: "bbox" or "segm".
      protocol: "coco" or "lvis".

    Raises:
      UserError: pycocotools or faster-coco-eval is not installed.
      ValueError: an image occurs twice, or an unknown kind or protocol.
    """
    if kind not in KINDS or protocol not in PROTOCOLS:
        raise ValueError(f"kind must be of {', '.join(KINDS)}, protocol of {', '.join(PROTOCOLS)}")
    if protocol == "lvis":
        results = judged_results(results)
    results = sort_results(results)
    count = len(categories.names)
    inner = CategoryTable(names=categories.names, frequency=categories.frequency or ("f",) * count)
    numbered = [
        DetectionResult(dataclasses.replace(result.truth, image=number), result.found)
        for number, result in enumerate(results, 1)
    ]
    truth = truth_json([_with_masks(result.truth, kind) for result in numbered], inner)
    found = json_detections(numbered, inner, kind)
    evaluate = _lvis_tables if protocol == "lvis" else _coco_tables
    tables = evaluate(truth, found, kind)
    metrics = dict(_metrics(tables, categories.frequency, MOST[protocol]))
    if protocol == "coco":
        agnostic = _coco_tables(truth, found, kind, classes=False).precision[0, :, :, 0]
        if (agnostic > -1).any():
            metrics["AP50_agnostic"] = float(agnostic[agnostic > -1].mean())
    objects_K = np.zeros(count, np.int64)
    for result in results:
        np.add.at(objects_K, result.truth.classes[~result.truth.crowd], 1)
    precision_TxRxK = np.where(tables.precision > -1, tables.precision, np.nan)[..., 0]
    recall_TxK = np.where(tables.recall > -1, tables.recall, np.nan)[..., 0]
    return DetectionScores(
        metrics=metrics,
        names=categories.names,
        objects=objects_K,
        ap=precision_TxRxK.mean((0, 1)),
        ap50=precision_TxRxK[0].mean(0),
        recall=recall_TxK.mean(0),
        curves=precision_TxRxK[0].T,
        thresholds=np.where(tables.scores > -1, tables.scores, 0)[0, ..., 0].T,
    )


def _with_masks(truth: ImageTruth, kind: str) -> ImageTruth:
    """For masks: objects without one as crowds that fill their boxes."""
    absent = [mask is None for mask in truth.masks]
    if kind == "bbox" or not any(absent):
        return truth
    masks = list(truth.masks)
    for row in np.flatnonzero(absent):
        # a box may begin left of the image or above it
        x0, y0, x1, y1 = np.maximum(truth.boxes[row], 0).tolist()
        filled = np.zeros(truth.size, np.uint8)
        filled[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = 1
        masks[row] = mask_to_rle(filled)
    return dataclasses.replace(truth, crowd=truth.crowd | np.array(absent), masks=masks)


def _coco_tables(
    truth: dict[str, Any], found: list[dict[str, Any]], kind: str, *, classes: bool = True
) -> _Tables:
    mask_tools()  # refuses where it is not installed
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = _copied(truth)
        known.createIndex()
        if found:
            loaded = known.loadRes([dict(row) for row in found])
        else:  # loadRes needs one detection
            loaded = COCO()
            loaded.dataset = _copied(truth) | {"annotations": []}
            loaded.createIndex()
        run = COCOeval(known, loaded, kind)
        if not classes:
            run.params.useCats = 0
            run.params.areaRng, run.params.areaRngLbl = run.params.areaRng[:1], ["all"]
        run.params.maxDets = [MOST["coco"]]
        run.evaluate()
        run.accumulate()
    return _tables(run.eval)


def _lvis_library() -> Any:
    try:
        import faster_coco_eval
    except ImportError:
        raise UserError(
            "evaluating LVIS needs faster-coco-eval, which is not installed: pip install"
            " 'm3i-jax[dense]'"
        ) from None
    return faster_coco_eval


def _lvis_tables(truth: dict[str, Any], found: list[dict[str, Any]], kind: str) -> _Tables:
    library = _lvis_library()
    with contextlib.redirect_stdout(io.StringIO()):
        known = library.COCO(_copied(truth))
        loaded = known.loadRes([dict(row) for row in found])
        run = library.COCOeval_faster(
            known, loaded, kind, lvis_style=True, print_function=lambda *_: None
        )
        run.params.maxDets = [MOST["lvis"]]
        run.evaluate()
        run.accumulate()
    return _tables(run.eval)


def _copied(truth: dict[str, Any]) -> dict[str, Any]:
    """A copy whose entries the libraries may change."""
    return {name: [dict(row) for row in rows] for name, rows in truth.items()}


def _tables(accumulated: Any) -> _Tables:
    """The arrays of a run with one limit of detections."""
    counts = tuple(int(n) for n in accumulated["counts"])  # T, recalls, K, areas, limits
    thresholds, recalls, classes, areas, _ = counts

    def array(name: str, *shape: int) -> np.ndarray:
        return np.asarray(accumulated[name], np.float64).reshape(*shape, 1)[..., 0]

    return _Tables(
        precision=array("precision", thresholds, recalls, classes, areas),
        recall=array("recall", thresholds, classes, areas),
        scores=array("scores", thresholds, recalls, classes, areas),
    )


def _metrics(tables: _Tables, frequency: Sequence[str], most: int) -> Iterator[tuple[str, float]]:
    """(name, mean over what has objects)."""
    precision, recall = tables.precision, tables.recall
    parts = [
        ("AP", precision[..., 0]),
        ("AP50", precision[0, ..., 0]),
        ("AP75", precision[5, ..., 0]),
        *((f"AP{AREAS[area][0]}", precision[..., area]) for area in (1, 2, 3)),
        (f"AR{most}", recall[..., 0]),
        *((f"AR{AREAS[area][0]}", recall[..., area]) for area in (1, 2, 3)),
    ]
    parts += [
        (f"AP{group}", precision[..., np.array(frequency) == group, 0])
        for group in ("r", "c", "f")
        if frequency
    ]
    for name, part in parts:
        if (part > -1).any():
            yield name, float(part[part > -1].mean())


@dataclasses.dataclass(frozen=True)
class DetectionEvaluation:
    """Detections of all held-out images, on every host, and their scores by kind, box and mask;
    beyond: scored boxes of all images that were more than `dense.detect.candidates`."""

    categories: CategoryTable
    results: list[DetectionResult]
    scores: dict[str, DetectionScores]
    beyond: int = 0


def detections(inputs: EvalInputs, context: EvalContext) -> DetectionEvaluation:
    """Returns the detections of an evaluation and their scores, computed once; a collective."""
    return context.once("detections", lambda: _detect(inputs, context))


def _detect(inputs: EvalInputs, context: EvalContext) -> DetectionEvaluation:
    skipped: dict[str, int] = {}
    beyond = 0
    own, known = [], np.arange(len(inputs.held_out.classes))
    known[len(inputs.classes) :] = -1  # classes that the run does not predict
    predicted = annotated_inputs.predicted_images(
        inputs, context.params, annotated_inputs.queries(inputs), context.poll, skipped
    )
    for image in predicted:
        fitted, objects = image.fitted, image.fitted.objects
        truth = detection_results.image_truth(
            None if objects is None else objects.relabel(known),
            record=image.index,
            size=fitted.original,
        )
        found = detection_results.original_detections(
            image.outputs, content=fitted.size, size=fitted.original
        )
        own.append(DetectionResult(truth, found))
        beyond += int(image.outputs.get("cut", 0))
    counts = gather_from_hosts({**skipped, _BEYOND: beyond})
    beyond = counts.pop(_BEYOND)
    context.skipped.update(counts)
    results = detection_results.gather_results(own)
    categories = detection_results.category_table(inputs.held_out, inputs.classes)
    protocol = "lvis" if categories.frequency else "coco"
    kinds = ("bbox", "segm") if inputs.config.dense.detect.masks else ("bbox",)
    scores = {
        KINDS[kind]: detection_scores(results, categories, kind=kind, protocol=protocol)
        for kind in kinds
    }
    return DetectionEvaluation(categories, results, scores, beyond)


def _build(inputs: EvalInputs) -> Metric:
    # what the scores need is refused before the images are predicted
    if detection_results.category_table(inputs.held_out, inputs.classes).frequency:
        _lvis_library()
    mask_tools()

    def measure(context: EvalContext) -> Iterator[tuple[str, float]]:
        found = detections(inputs, context)
        for kind, scores in found.scores.items():
            for name, value in scores.metrics.items():
                yield f"eval/{kind}/{name}", value
        if found.beyond:
            yield "eval/box/beyond_candidates", float(found.beyond)

    return measure


register_evaluator(
    Evaluator(name="detection", setting="detection", build=_build, tasks=("detect",))
)
