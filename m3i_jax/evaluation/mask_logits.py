"""Masks of detections whose logits are of the whole input, at the size of the original image.

Logits of stride s are resized to the input, cut to the content, resized to the original image, and
then compared with 0: both steps bilinear, as Mask2Former does it. Both are one product from either
side, of which only the rows and columns are computed that the mask can reach."""

import functools

import numpy as np


@functools.lru_cache(maxsize=64)
def axis_weights(cells: int, stride: int, content: int, size: int) -> np.ndarray:
    """Weights [size, cells] from the cells of an axis to the pixels of the original image.

    >>> axis_weights(2, 1, 2, 4).tolist()
    [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """
    up = _bilinear_weights(cells, cells * stride)[:content]
    weights = (_bilinear_weights(content, size) @ up).astype(np.float32)
    weights.flags.writeable = False
    return weights


def _bilinear_weights(size: int, out: int) -> np.ndarray:
    """Weights [out, size] of bilinear resizing without a wider filter, aligned at the borders."""
    place = np.clip((np.arange(out) + 0.5) * (size / out) - 0.5, 0, size - 1)
    low = np.floor(place).astype(np.int64)
    weights = np.zeros((out, size))
    np.add.at(weights, (np.arange(out), low), 1 - (place - low))
    np.add.at(weights, (np.arange(out), np.minimum(low + 1, size - 1)), place - low)
    return weights


def resized_mask(
    logits_hxw: np.ndarray, stride: int, *, content: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """A mask at the size of the original image, bool [H, W].

    Args:
      logits_hxw: of the padded input, at that stride.
      stride: pixels of the input per cell.
      content: (height, width) of the input without its padding.
      size: (height, width) of the original image.

    >>> resized_mask(np.array([[-1.0, 1.0]]), 1, content=(1, 2), size=(1, 4)).tolist()
    [[False, False, True, True]]
    """
    out = np.zeros(size, bool)
    used = logits_hxw > 0
    if not used.any():
        return out
    pixels, cells, weights = [], [], []
    for axis in (0, 1):
        all_weights = axis_weights(logits_hxw.shape[axis], stride, content[axis], size[axis])
        reached = (all_weights[:, used.any(1 - axis)] > 0).any(1)
        rows = np.flatnonzero(reached)
        if not len(rows):
            return out  # only in the padding
        pixels.append(slice(rows[0], rows[-1] + 1))
        read = np.flatnonzero((all_weights[pixels[axis]] > 0).any(0))
        cells.append(slice(read[0], read[-1] + 1))
        weights.append(all_weights[pixels[axis], cells[axis]])
    values = weights[0] @ logits_hxw[cells[0], cells[1]].astype(np.float32) @ weights[1].T
    out[pixels[0], pixels[1]] = values > 0
    return out
