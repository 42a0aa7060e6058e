"""Scores of semantic segmentation: the confusion matrix of pixels, counted on the device, and the
mean IoU of a data set from the sum of its matrices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from m3i_jax.objective.numerics import assert_equal_shape, ignored_label


def confusion_matrix(
    prediction: ArrayLike, labels: ArrayLike, classes: int, ignore: int | None = None
) -> jax.Array:
    """Counts the pixels of every pair of label and prediction.

    Args:
      prediction: integers 0..classes-1, any shape.
      labels: integers of the same shape, 0..classes-1 or `ignore`.
      classes: number of categories.
      ignore: label of pixels that do not count; None: 255. Labels outside 0..classes-1 do not
        count, either.

    Returns:
      int32 [classes, classes]: rows are labels, columns predictions. Add up matrices of a data set
      in int64, on the host: 2^31 pixels are 2,000 images of 1024 x 1024.

    Raises:
      ValueError: different shapes, or more than 255 classes without `ignore`.

    >>> confusion_matrix([[0, 1, 1]], [[0, 0, 255]], classes=2).tolist()
    [[1, 1], [0, 0]]
    """
    guess, truth = jnp.asarray(prediction).ravel(), jnp.asarray(labels).ravel()
    assert_equal_shape([guess, truth], custom_message="prediction and labels")
    guess, truth = guess.astype(jnp.int32), truth.astype(jnp.int32)
    counts = (truth != ignored_label(ignore, classes)) & (truth >= 0) & (truth < classes)
    counts &= (guess >= 0) & (guess < classes)
    cell = jnp.where(counts, truth * classes + guess, classes * classes)  # the last one is dropped
    return jnp.bincount(cell, length=classes * classes + 1)[:-1].reshape(classes, classes)


def miou(matrix: ArrayLike) -> dict[str, Any]:
    """Returns mean IoU, mean accuracy and accuracy of pixels, from the confusion matrix of a data
    set.

    A category that no pixel has and none was predicted as has no IoU (NaN) and does not count in
    the mean; one that was predicted but never occurs has IoU 0 and no accuracy. This is
    mmsegmentation's rule. Numpy, in float64: it belongs at the end of an evaluation.

    Args:
      matrix: [K, K] counts, rows are labels, columns predictions: sums of `confusion_matrix`.

    Returns:
      {"miou", "mean_accuracy", "pixel_accuracy"}, floats in 0..1 (NaN without any pixel), and
      {"iou", "accuracy"}, float64 [K].

    Raises:
      ValueError: the matrix is not square.

    >>> scores = miou([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    >>> scores["iou"].round(3).tolist(), round(scores["miou"], 3), scores["pixel_accuracy"]
    ([0.75, 0.8, nan], 0.775, 0.875)
    """
    counts = np.asarray(matrix, np.float64)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"a confusion matrix is square; this one is {list(counts.shape)}")
    hit, label, guess = counts.diagonal(), counts.sum(1), counts.sum(0)
    iou, accuracy = _ratio(hit, label + guess - hit), _ratio(hit, label)
    return {
        "miou": _mean(iou),
        "mean_accuracy": _mean(accuracy),
        "pixel_accuracy": _mean(_ratio(hit.sum(keepdims=True), label.sum(keepdims=True))),
        "iou": iou,
        "accuracy": accuracy,
    }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    undefined = np.full(part.shape, np.nan)
    return np.asarray(np.divide(part, whole, out=undefined, where=whole > 0))


def _mean(values: np.ndarray) -> float:
    """The mean of the numbers among the values; NaN if there is none."""
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if len(numbers) else float("nan")
