"""Figures and result files of detection and segmentation: precision-recall curves, tables of the
classes, confusion, the worst images, and the detections as JSON for COCO's and LVIS's own tools.

They run at the last step of a training and in --mode=eval, on the predictions that the scores are
computed from."""

import json
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from m3i_jax.data import annotated_eval
from m3i_jax.evaluation import (
    detection_errors,
    detection_eval,
    detection_results,
    registry,
    segmentation_eval,
)
from m3i_jax.evaluation.detection_results import CategoryTable, DetectionResult, Rle
from m3i_jax.evaluation.feature_extraction import EvalContext, Metric
from m3i_jax.modes.figure_evaluators import FigureWriter
from m3i_jax.reporting import dense_figures, figures
from m3i_jax.reporting.dense_panels import DrawnObjects
from m3i_jax.run_files import atomic_file

WORST = 6  # images of the figure of the worst ones


def _write(writer: FigureWriter, kind: str, figure: figures.Figure) -> None:
    """Write a figure, unless it shows nothing: images without an object have no errors to draw."""
    if figure.rows:
        writer.write(kind, figure.title, figure.note, figure.rows)


def drawn_objects(result: DetectionResult, *, found: bool, with_masks: bool = True) -> DrawnObjects:
    """Returns the objects of an image, or its detections, for a figure; beside detections without
    masks, objects have none either."""

    def pixels(masks: Sequence[Rle | None]) -> list[np.ndarray | None]:
        return [m if m is None else detection_results.rle_to_mask(m).astype(bool) for m in masks]

    if found:
        part = result.found
        masks = None if part.masks is None else pixels(part.masks)
        return DrawnObjects(boxes=part.boxes, classes=part.classes, scores=part.scores, masks=masks)
    truth = result.truth
    return DrawnObjects(
        boxes=truth.boxes,
        classes=truth.classes,
        masks=pixels(truth.masks) if with_masks else None,
        crowd=truth.crowd,
    )


def write_results(
    directory: pathlib.Path, results: list[DetectionResult], categories: CategoryTable, masks: bool
) -> None:
    """Write DIRECTORY/detections-bbox.json and, with masks, detections-segm.json.

    They hold numbers and run lengths alone, and are not redacted as texts are: run lengths can look
    like a key of a cloud, and the files have up to hundreds of megabytes.
    """
    for kind in ("bbox", "segm") if masks else ("bbox",):
        rows = detection_results.json_detections(results, categories, kind)
        with atomic_file(directory / f"detections-{kind}.json") as temporary:
            temporary.write_text(json.dumps(rows), "ascii")


def _draw_detections(
    inputs: registry.EvalInputs, evaluation: detection_eval.DetectionEvaluation
) -> None:
    writer, names, results = inputs.figures, evaluation.categories.names, evaluation.results
    judged = detection_eval.judged_results(results) if evaluation.categories.frequency else results
    for kind, scores in evaluation.scores.items():
        of = {"box": "boxes", "mask": "masks"}[kind]
        title = f"Precision and recall of {of}"
        _write(writer, f"curves-{kind}", dense_figures.curves_figure(title, names, scores.curves))
    boxes = evaluation.scores["box"]
    columns = [boxes.ap, boxes.ap50, boxes.recall]
    headers = ["objects", "box AP", "box AP50", "recall"]
    if masks := evaluation.scores.get("mask"):
        columns.append(masks.ap)
        headers.append("mask AP")
    table = dense_figures.class_table_figure(
        "Classes", headers, names, boxes.objects, np.stack(columns, 1)
    )
    _write(writer, "classes", table)
    true, guessed = detection_errors.confused_classes(judged, len(names))
    count = np.zeros((len(names) + 1,) * 2, np.int64)
    np.add.at(count, (true, guessed), 1)
    confusion = dense_figures.class_confusion_figure(
        "Confusion of classes",
        dense_figures.confusion_of_matrix(count),
        names,
        note="objects, found at an IoU of 0.5 by a detection of a score of at least 0.5",
    )
    _write(writer, "confusion", confusion)
    write_results(
        writer.setup.workdir, results, evaluation.categories, inputs.config.dense.detect.masks
    )
    by_image = {result.image: result for result in judged}
    precisions = dict(detection_errors.image_precisions(judged))
    worst = dense_figures.worst_first(list(precisions.items()), WORST)
    images = [_original_image(inputs, by_image[key].truth.record) for key in worst]
    figure = dense_figures.worst_detections_figure(
        "The worst images",
        images,
        [
            drawn_objects(by_image[key], found=False, with_masks=inputs.config.dense.detect.masks)
            for key in worst
        ],
        [drawn_objects(by_image[key], found=True) for key in worst],
        names,
        [str(key) for key in worst],
        [precisions[key] for key in worst],
    )
    _write(writer, "worst", figure)


def _original_image(inputs: registry.EvalInputs, number: int) -> np.ndarray:
    """The image of a record as it was evaluated, in the orientation of its annotations."""
    record = inputs.held_out[number]
    stated = record.objects.size if record.objects is not None else (0, 0)
    opened, _ = annotated_eval.open_annotated(record, stated)
    return np.asarray(opened.rgb(background=inputs.config.data.background))


def _draw_maps(
    inputs: registry.EvalInputs,
    scores: segmentation_eval.SegmentationScores,
    worst: list[segmentation_eval.SegmentedImage],
) -> None:
    writer, names = inputs.figures, scores.names
    table = dense_figures.class_table_figure(
        "Classes",
        ["pixels", "IoU", "accuracy"],
        names,
        scores.pixels,
        np.stack([scores.iou, scores.accuracy], 1),
    )
    _write(writer, "classes", table)
    confusion = dense_figures.class_confusion_figure(
        "Confusion of classes",
        dense_figures.confusion_of_matrix(scores.confusion),
        names,
        note="pixels",
    )
    _write(writer, "confusion", confusion)
    values = dict(scores.images)
    figure = dense_figures.worst_maps_figure(
        "The worst images",
        [image.shown.image for image in worst],
        [image.shown.map for image in worst],
        [image.prediction for image in worst],
        names,
        [image.shown.key for image in worst],
        [values.get(image.shown.index, 0.0) for image in worst],
    )
    _write(writer, "worst", figure)


def _build_detection(inputs: registry.EvalInputs) -> Metric:
    def draw(context: EvalContext) -> Iterator[tuple[str, float]]:
        evaluation = detection_eval.detections(inputs, context)
        inputs.figures.draw(lambda: _draw_detections(inputs, evaluation))
        yield from ()

    return draw


def _build_segmentation(inputs: registry.EvalInputs) -> Metric:
    def draw(context: EvalContext) -> Iterator[tuple[str, float]]:
        scores = segmentation_eval.pixel_scores(inputs, context)
        records = [int(key) for key in dense_figures.worst_first(scores.images, WORST)]
        worst = list(
            segmentation_eval.segmented_images(inputs, context, records, {}, at_host0=True)
        )
        inputs.figures.draw(lambda: _draw_maps(inputs, scores, worst))
        yield from ()

    return draw


for _name, _task, _build in (
    ("detection_figures", "detect", _build_detection),
    ("segmentation_figures", "segment", _build_segmentation),
):
    registry.register_evaluator(
        registry.Evaluator(name=_name, setting=_name, build=_build, tasks=(_task,), last_only=True)
    )
