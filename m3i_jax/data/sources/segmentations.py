"""Masks of objects as annotation files store them: polygons, and run lengths in COCO's two forms.

Run lengths go down the columns, the first run is of zeros. The compressed form is a string of
base-32 digits, in which a run is the difference to the run two before it. numpy alone reads and
writes them, so nothing here needs pycocotools; tests compare the two.

A polygon covers a pixel if the centre of the pixel is inside it. pycocotools walks along the
outline on a grid of fifths of a pixel instead, so single pixels on the outline may differ."""

import dataclasses
from collections.abc import Sequence

import numpy as np

_DIGITS = 48  # the first character of a base-32 digit
_MORE, _SIGN = (
    0x20,
    0x10,
)  # bits of a digit: another follows; in the last digit, the run is negative


@dataclasses.dataclass(frozen=True, slots=True)
class Polygons:
    """The parts of an object, each float64 [points, 2], x and y in pixels of the image."""

    parts: tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class RunLengths:
    """A mask of a whole image. counts: the compressed string. size: (height, width)."""

    counts: bytes
    size: tuple[int, int]


Segmentation = Polygons | RunLengths


def decode_counts(counts: bytes) -> np.ndarray:
    """Returns the run lengths of a compressed string, int64.

    Raises:
        ValueError: the string has another character, ends inside a run, or has a negative run.

    >>> decode_counts(b"52203").tolist()
    [5, 2, 2, 2, 5]
    """
    digits = np.frombuffer(counts, np.uint8).astype(np.int64) - _DIGITS
    if not digits.size:
        return digits
    if digits.min() < 0 or digits.max() > 63 or digits[-1] & _MORE:
        raise ValueError("no run lengths")
    last = np.flatnonzero(digits & _MORE == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    place = np.arange(len(digits)) - np.repeat(first, last - first + 1)
    if place.max() > 6:  # 35 bits; no image has longer runs
        raise ValueError("no run lengths")
    runs = np.add.reduceat((digits & 31) << 5 * place, first)
    runs -= np.where(digits[last] & _SIGN, 1 << 5 * (place[last] + 1), 0)
    # the first three are stored as they are
    runs[1::2], runs[2::2] = runs[1::2].cumsum(), runs[2::2].cumsum()
    if runs.min() < 0:
        raise ValueError("no run lengths")
    return runs


def encode_counts(runs: np.ndarray) -> bytes:
    """Returns the compressed string of run lengths.

    >>> encode_counts(np.array([5, 2, 2, 2, 5]))
    b'52203'
    """
    rest = np.asarray(runs, np.int64).copy()
    rest[3:] -= np.asarray(runs, np.int64)[1:-2]
    digits, more = [], np.ones(len(rest), bool)
    while more.any():
        low = rest & 31
        rest = rest >> 5
        end = np.where(low & _SIGN, rest == -1, rest == 0)
        digits.append(np.where(more, low + np.where(end, 0, _MORE) + _DIGITS, 0))
        more = more & ~end
    if not digits:
        return b""
    text = np.stack(digits, 1).ravel()
    return text[text > 0].astype(np.uint8).tobytes()


def mask_of_runs(runs: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns the mask of run lengths, bool [height, width].

    Raises:
        ValueError: the runs are not those of height x width pixels.

    >>> mask_of_runs(np.array([1, 2, 1]), 2, 2).astype(int).tolist()
    [[0, 1], [1, 0]]
    """
    if runs.min(initial=0) < 0 or int(runs.sum()) != height * width:
        raise ValueError(f"runs of {int(runs.sum())} pixels, the image has {height} x {width}")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def runs_of_mask(mask_HxW: np.ndarray) -> np.ndarray:
    """Returns the run lengths of a mask, int64.

    >>> runs_of_mask(np.array([[False, True], [True, False]])).tolist()
    [1, 2, 1]
    """
    flat = np.asarray(mask_HxW, bool).T.ravel()
    changes = np.flatnonzero(np.diff(flat)) + 1
    ends = np.concatenate([[0], changes, [flat.size]]) if flat.size else np.zeros(1, np.int64)
    runs = np.diff(ends)
    return np.concatenate([[0], runs]) if flat.size and flat[0] else runs


def encode_mask(mask_HxW: np.ndarray) -> RunLengths:
    """Returns the compressed run lengths of a mask.

    >>> mask = np.eye(3, dtype=bool)
    >>> bool((decode_mask(encode_mask(mask), 3, 3) == mask).all())
    True
    """
    height, width = mask_HxW.shape
    return RunLengths(encode_counts(runs_of_mask(mask_HxW)), (height, width))


def decode_mask(segmentation: Segmentation, height: int, width: int) -> np.ndarray:
    """Returns the mask of an object in an image, bool [height, width].

    Raises:
        ValueError: run lengths are damaged, or those of an image of another size.

    >>> square = Polygons((np.array([[1, 0], [3, 0], [3, 2], [1, 2]], float),))
    >>> decode_mask(square, 2, 4).astype(int).tolist()
    [[0, 1, 1, 0], [0, 1, 1, 0]]
    """
    if isinstance(segmentation, Polygons):
        return rasterize(segmentation.parts, height, width)
    if segmentation.size != (height, width):
        raise ValueError(f"run lengths of {segmentation.size}, the image has {height} x {width}")
    return mask_of_runs(decode_counts(segmentation.counts), height, width)


def rasterize(parts: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """Returns the union of polygons as a mask: pixels whose centre is inside, by the even-odd rule
    within a polygon.

    Args:
        parts: polygons, [points, 2] each, x and y in pixels; they may reach out of the mask.
        height, width: of the mask.

    Returns:
        bool [height, width].

    >>> rasterize([np.array([[0, 0], [4, 0], [0, 4.0]])], 4, 4).astype(int).tolist()
    [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    """
    mask = np.zeros((height, width), bool)
    for part in parts:
        x, y = np.asarray(part, np.float64).T
        x1, y1 = np.roll(x, -1), np.roll(y, -1)
        # the columns whose centres an edge crosses; half open, so that a vertex counts once
        low, high = (
            np.clip(np.ceil(side - 0.5), 0, width).astype(np.int64)
            for side in (np.minimum(x, x1), np.maximum(x, x1))
        )
        count = high - low
        edge = np.repeat(np.arange(len(x)), count)
        column = np.arange(len(edge)) - np.repeat(count.cumsum() - count, count) + low[edge]
        slope = (y1 - y)[edge] / (x1 - x)[edge]
        crossing = y[edge] + (column + 0.5 - x[edge]) * slope
        row = np.clip(np.ceil(crossing - 0.5), 0, height).astype(np.int64)
        if not len(edge):
            continue
        # the box of the part alone: every column has an even number of crossings, the last of
        # them at `bottom` or above
        left, right, top, bottom = column.min(), column.max() + 1, row.min(), row.max()
        rows = bottom - top + 1
        cell = (column - left) * rows + row - top
        toggles = np.bincount(cell, minlength=(right - left) * rows).reshape(-1, rows)
        mask[top:bottom, left:right] |= (toggles[:, :-1].cumsum(1) % 2 == 1).T
    return mask


def tight_box(mask_HxW: np.ndarray) -> tuple[float, float, float, float]:
    """Returns the box around the pixels of a mask, x0 y0 x1 y1; zeros for an empty one.

    >>> tight_box(np.eye(5, dtype=bool)[1:3])
    (1.0, 0.0, 3.0, 2.0)
    """
    rows, columns = np.flatnonzero(mask_HxW.any(1)), np.flatnonzero(mask_HxW.any(0))
    if not len(rows):
        return 0.0, 0.0, 0.0, 0.0
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def outline(mask_HxW: np.ndarray) -> list[np.ndarray] | None:
    """Returns the polygons around a mask, along the borders of its pixels, or None if it has a
    hole, which polygons cannot express.

    Returns:
        float64 [points, 2] each, corners only; `rasterize` of them gives the mask.

    >>> outline(np.array([[0, 1], [1, 1]], bool))[0].tolist()
    [[1.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0], [0.0, 1.0], [1.0, 1.0]]
    >>> outline(np.pad(np.zeros((1, 1), bool), 1, constant_values=True)) is None
    True
    """
    padded = np.pad(np.asarray(mask_HxW, bool), 1)
    steps: dict[tuple[int, int], list[tuple[int, int]]] = {}
    # the border goes clockwise around the pixels: right along the top, down on the right, ...
    for dy, dx, start, step in (
        (-1, 0, (0, 0), (1, 0)),
        (0, 1, (1, 0), (0, 1)),
        (1, 0, (1, 1), (-1, 0)),
        (0, -1, (0, 1), (0, -1)),
    ):
        border = padded & ~np.roll(padded, (-dy, -dx), (0, 1))
        for y, x in np.argwhere(border).tolist():
            steps.setdefault((x - 1 + start[0], y - 1 + start[1]), []).append(step)
    polygons = []
    while steps:
        point = first = min(steps, key=lambda p: (p[1], p[0]))
        corners, before = [], (0, 0)
        while True:
            ways = steps[point]
            # where two pixels touch at a corner, turn right: they are parts of their own
            step = (
                ways[0]
                if len(ways) == 1
                else next(way for way in ways if way == (-before[1], before[0]))
            )
            ways.remove(step)
            if not ways:
                del steps[point]
            if step != before:
                corners.append(point)
            point, before = (point[0] + step[0], point[1] + step[1]), step
            if point == first:
                break
        polygon = np.array(corners, np.float64)
        x, y = polygon.T
        if (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() < 0:
            return None
        polygons.append(polygon)
    return polygons
