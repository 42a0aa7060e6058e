"""Evaluation of segmentation on the held-out images: sliding windows, mIoU, mAcc, aAcc."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from m3i_jax.data import annotated_eval
from m3i_jax.evaluation import annotated_inputs, sliding_windows
from m3i_jax.evaluation.feature_extraction import gather_from_hosts
from m3i_jax.evaluation.registry import EvalContext, EvalInputs, Evaluator, Metric, register_builtin
from m3i_jax.evaluation.segmentation_eval import SegmentationCounts, SegmentationScores


@dataclasses.dataclass(frozen=True)
class SegmentedImage:
    """A held-out image, its map and the predicted one, at full size."""

    shown: annotated_eval.MappedImage
    prediction: np.ndarray


def segmented_images(
    inputs: EvalInputs,
    context: EvalContext,
    records: list[int],
    skipped: dict[str, int],
    *,
    at_host0: bool = False,
) -> Iterator[SegmentedImage]:
    """This host's share of the class maps of some held-out images; all hosts must call it.

    Args:
      inputs: of the run.
      context: of the evaluation.
      records: numbers of the records, the same on all hosts.
      skipped: receives {reason: images of this host that could not be read}.
      at_host0: the first host's share is all of them.
    """
    if at_host0 and jax.process_index():
        records = []
    config, predict = inputs.config, annotated_inputs.predictor(inputs)
    settings = sliding_windows.sliding_settings(
        config, classes=len(inputs.classes), batch=inputs.batch_size // jax.process_count()
    )
    size_of, resize = sliding_windows.resize_rule(config)
    images = annotated_eval.segmentation_eval_images(
        inputs.held_out,
        records,
        background=config.data.background,
        threads=max(1, config.data.threads),
        missing=config.data.missing,
        host=0 if at_host0 else jax.process_index(),
        hosts=1 if at_host0 else jax.process_count(),
    )
    waiting: dict[int, annotated_eval.MappedImage] = {}

    def pixels() -> Iterator[tuple[Any, np.ndarray]]:
        for image in images:
            waiting[image.index] = image
            yield image.index, image.image

    found = sliding_windows.class_maps(
        lambda image, size: predict(context.params, image, size)["logits"],
        pixels(),
        settings,
        size_of=size_of,
        resize=resize,
        poll=context.poll,
    )
    for index, prediction in found:
        yield SegmentedImage(waiting.pop(index), prediction)
    skipped.update({reason: n for reason, n in images.skipped.items() if n})


def pixel_scores(inputs: EvalInputs, context: EvalContext) -> SegmentationScores:
    """The scores of an evaluation, computed once; a collective."""
    return context.once("pixels", lambda: _measure(inputs, context))


def _measure(inputs: EvalInputs, context: EvalContext) -> SegmentationScores:
    counts, skipped = SegmentationCounts(inputs.classes), dict[str, int]()
    for image in segmented_images(inputs, context, annotated_inputs.queries(inputs), skipped):
        counts.add(image.shown.index, image.prediction, image.shown.map)
    context.skipped.update(gather_from_hosts(skipped))
    return counts.scores()


def _build(inputs: EvalInputs) -> Metric:
    def measure(context: EvalContext) -> Iterator[tuple[str, float]]:
        for name, value in pixel_scores(inputs, context).metrics.items():
            yield f"eval/segmentation/{name}", value

    return measure


register_builtin(
    Evaluator(name="segmentation", setting="segmentation", build=_build, tasks=("segment",))
)
