"""Evaluation of detection on the held-out images, by COCO's protocol, or by LVIS's where the
categories have frequencies."""

import dataclasses
from collections.abc import Iterator

from m3i_jax.evaluation import annotated_inputs, detection_results, detection_scores
from m3i_jax.evaluation.detection_results import CategoryTable, DetectionResult
from m3i_jax.evaluation.feature_extraction import gather_from_hosts
from m3i_jax.evaluation.registry import EvalContext, EvalInputs, Evaluator, Metric, register_builtin


@dataclasses.dataclass(frozen=True)
class DetectionEvaluation:
    """Detections of all held-out images, on every host, and their scores by kind, box and mask."""

    categories: CategoryTable
    results: list[DetectionResult]
    scores: dict[str, detection_scores.DetectionScores]


def detections(inputs: EvalInputs, context: EvalContext) -> DetectionEvaluation:
    """The detections of an evaluation and their scores, computed once; a collective."""
    return context.once("detections", lambda: _detect(inputs, context))


def _detect(inputs: EvalInputs, context: EvalContext) -> DetectionEvaluation:
    skipped: dict[str, int] = {}
    own = []
    predicted = annotated_inputs.predicted_images(
        inputs, context.params, annotated_inputs.queries(inputs), context.poll, skipped
    )
    for image in predicted:
        fitted = image.fitted
        truth = detection_results.image_truth(
            fitted.objects, record=image.index, size=fitted.original
        )
        found = detection_results.original_detections(
            image.outputs, content=fitted.size, size=fitted.original
        )
        own.append(DetectionResult(truth, found))
    context.skipped.update(gather_from_hosts(skipped))
    results = detection_results.gather_results(own)
    categories = dataclasses.replace(
        detection_results.category_table(inputs.held_out), names=inputs.classes
    )
    protocol = "lvis" if categories.frequency else "coco"
    kinds = ("bbox", "segm") if inputs.config.dense.detect.masks else ("bbox",)
    scores = {
        detection_scores.KINDS[kind]: detection_scores.detection_scores(
            results, categories, kind=kind, protocol=protocol
        )
        for kind in kinds
    }
    return DetectionEvaluation(categories, results, scores)


def _build(inputs: EvalInputs) -> Metric:
    def measure(context: EvalContext) -> Iterator[tuple[str, float]]:
        for kind, scores in detections(inputs, context).scores.items():
            for name, value in scores.metrics.items():
                yield f"eval/{kind}/{name}", value

    return measure


register_builtin(Evaluator(name="detection", setting="detection", build=_build, tasks=("detect",)))
