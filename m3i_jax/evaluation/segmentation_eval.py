"""Evaluation of segmentation on the held-out images by sliding windows: mIoU, mAcc, aAcc and the
numbers of each class, from pixel counts that all hosts add up."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from m3i_jax import parallel
from m3i_jax.data import annotated_eval
from m3i_jax.evaluation import annotated_inputs, sliding_windows
from m3i_jax.evaluation.feature_extraction import gather_from_hosts
from m3i_jax.evaluation.registry import (
    EvalContext,
    EvalInputs,
    Evaluator,
    Metric,
    register_evaluator,
)
from m3i_jax.objective.segmentation_scores import miou


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationScores:
    """Scores of all images.

    Attributes:
      metrics: mIoU and mAcc (means over classes), aAcc (share of right pixels); 0..1.
      names: of the K classes.
      iou, accuracy: float [K]; NaN for a class that is neither labelled nor predicted (IoU), or not
        labelled (accuracy). A class that is only predicted has an IoU of 0.
      pixels: int [K], labelled with the class.
      confusion: int [K, K], pixels by label (row) and prediction.
      images: (image, mean IoU of the classes that are labelled or predicted in it), sorted by key.
    """

    metrics: dict[str, float]
    names: tuple[str, ...]
    iou: np.ndarray
    accuracy: np.ndarray
    pixels: np.ndarray
    confusion: np.ndarray
    images: list[tuple[Any, float]]


def pixel_confusion(prediction: np.ndarray, label: np.ndarray, classes: int) -> np.ndarray:
    """Pixels by label (row) and prediction (column), int64 [K, K]; pixels of label 255 and of other
    unknown labels do not count. In numpy: images of a data set differ in size, and
    `objective.segmentation_scores.confusion_matrix` would be compiled for each.

    >>> pixel_confusion(np.array([[0, 1, 1]]), np.array([[0, 0, 255]]), 2).tolist()
    [[1, 1], [0, 0]]
    """
    counts = label < classes
    pairs = label[counts].astype(np.int64) * classes + prediction[counts]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


class SegmentationCounts:
    """Adds up the pixels of the images of this host.

    Args:
      names: of the K classes.

    >>> counts = SegmentationCounts(("sky", "sea"))
    >>> counts.add("a", np.array([[0, 1, 1]]), np.array([[0, 1, 0]]))
    >>> scores = counts.scores()
    >>> scores.metrics["mIoU"], scores.images
    (0.5, [('a', 0.5)])
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._confusion_KxK = np.zeros((len(self.names),) * 2, np.int64)
        self._images: list[tuple[Any, float]] = []

    def add(self, image: Any, prediction_HxW: np.ndarray, label_HxW: np.ndarray) -> None:
        """Counts one image.

        Args:
          image: its key, a number or text.
          prediction_HxW: class of each pixel.
          label_HxW: of the same size; 255 where unknown.

        Raises:
          ValueError: the sizes differ.
        """
        if prediction_HxW.shape != label_HxW.shape:
            raise ValueError(
                f"image {image!r}: the prediction has shape {prediction_HxW.shape}, its map"
                f" {label_HxW.shape}"
            )
        matrix_KxK = pixel_confusion(prediction_HxW, label_HxW, len(self.names))
        self._confusion_KxK += matrix_KxK
        mean = miou(matrix_KxK)["miou"]
        if not np.isnan(mean):
            self._images.append((image, mean))

    def scores(self) -> SegmentationScores:
        """Returns the scores of the images of all hosts, on every host; a collective.

        Raises:
          ValueError: an image was counted twice.
        """
        rows, columns = np.nonzero(self._confusion_KxK)
        own = {
            "pixels": [
                rows.tolist(),
                columns.tolist(),
                self._confusion_KxK[rows, columns].tolist(),
            ],
            "images": self._images,
        }
        matrix_KxK, images = np.zeros_like(self._confusion_KxK), []
        for content in parallel.gather_bytes("segmentation", json.dumps(own).encode()):
            host = json.loads(content)
            row, column, count = (np.array(each, np.int64) for each in host["pixels"])
            np.add.at(matrix_KxK, (row, column), count)
            images += [(key, value) for key, value in host["images"]]
        return segmentation_scores(matrix_KxK, self.names, _sorted_once(images))


def _sorted_once(images: Iterable[tuple[Any, float]]) -> list[tuple[Any, float]]:
    rows = sorted(images, key=lambda row: (isinstance(row[0], str), row[0]))
    for (a, _), (b, _) in zip(rows, rows[1:], strict=False):
        if a == b:
            raise ValueError(f"image {a!r} was evaluated twice")
    return rows


def segmentation_scores(
    confusion_KxK: np.ndarray, names: Sequence[str], images: Sequence[tuple[Any, float]] = ()
) -> SegmentationScores:
    """Returns the scores of pixel counts.

    Args:
      confusion_KxK: of `pixel_confusion`, summed over the images.
      names: of the classes.
      images: (image, mean IoU) rows to keep with them.
    """
    found = miou(confusion_KxK)
    names_of = {"mIoU": "miou", "mAcc": "mean_accuracy", "aAcc": "pixel_accuracy"}
    metrics = {name: found[key] for name, key in names_of.items() if not np.isnan(found[key])}
    return SegmentationScores(
        metrics=metrics,
        names=tuple(names),
        iou=found["iou"],
        accuracy=found["accuracy"],
        pixels=confusion_KxK.sum(1),
        confusion=confusion_KxK,
        images=list(images),
    )


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
    """Returns this host's share of the class maps of some held-out images; all hosts must call it.

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
    """Returns the scores of an evaluation, computed once; a collective."""
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


register_evaluator(
    Evaluator(name="segmentation", setting="segmentation", build=_build, tasks=("segment",))
)
