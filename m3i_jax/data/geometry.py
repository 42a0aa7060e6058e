"""Resizes, crops and mirrors annotated images, with their boxes, masks and maps.

An image is resized to `height` x `width`; a window of it is cut; the window is mirrored. A
`Placement` holds these numbers, and everything that belongs to the image follows it. Three rules
draw it: `jitter` as in ViTDet (large-scale jitter), `range` as in mmsegmentation, and `buckets` for
DINO, where the size of a batch is drawn instead, and of some images a window. Each is a pure
function of WIDTH uniform numbers.

The rules resize differently, as their references do: Pillow's bilinear filter, which is wider when
it reduces, for `jitter` and `buckets`; OpenCV's, which always reads four pixels, for `range`. Maps
take the nearest pixel."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from m3i_jax import schema
from m3i_jax.data.sources.segmentations import Polygons, RunLengths, decode_mask, rasterize
from m3i_jax.errors import UserError

REDRAWS = 10  # of a crop that shows too much of one category
WIDTH = 2 + 2 * (REDRAWS + 1)  # uniform numbers of an image: scale, flip, offsets of the crops
LEAST = 1e-5  # pixels; a box that is not wider and higher shows nothing


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """How the pixels of an image become those of a batch.

    Attributes:
        source: (height, width) of the image.
        height, width: of the resized image.
        top, left, rows, columns: of the window that is cut from it.
        flip: whether the window is mirrored.
        smooth: whether the filter is as wide as a reduction asks for (Pillow's); else it reads four
            pixels (OpenCV's).
    """

    source: tuple[int, int]
    height: int
    width: int
    top: int
    left: int
    rows: int
    columns: int
    flip: bool
    smooth: bool

    def move(self, points: np.ndarray) -> np.ndarray:
        """Returns points [..., 2], x and y in pixels of the image, in pixels of the window.

        >>> placement = Placement((10, 20), 5, 10, 1, 2, 4, 8, True, True)
        >>> placement.move(np.array([[4.0, 2.0], [20.0, 10.0]])).tolist()
        [[8.0, 0.0], [0.0, 4.0]]
        """
        scale = (self.width / self.source[1], self.height / self.source[0])
        moved = np.asarray(points, np.float64) * scale - (self.left, self.top)
        if self.flip:
            moved = moved * (-1, 1) + (self.columns, 0)
        return moved

    def move_boxes(self, boxes_Nx4: np.ndarray) -> np.ndarray:
        """Returns boxes in pixels of the window, clipped to it, float64 [N, 4]."""
        corners = self.move(np.asarray(boxes_Nx4, np.float64).reshape(-1, 2, 2))
        low, high = corners.min(1), corners.max(1)  # a flip swaps left and right
        return np.concatenate([low, high], 1).clip(0, (self.columns, self.rows) * 2)

    def window(self) -> tuple[float, float, float, float]:
        """Returns the window in pixels of the image, x0 y0 x1 y1."""
        x, y = self.source[1] / self.width, self.source[0] / self.height
        left, top = self.left * x, self.top * y
        return left, top, left + self.columns * x, top + self.rows * y


def jitter_placement(
    u: Sequence[float],
    height: int,
    width: int,
    geometry: schema.Geometry,
    size: int,
    *,
    accept: Callable[[Placement], bool] = lambda _: True,
) -> Placement:
    """Draws the placement of rule "jitter": the image is scaled to fit into a square of `size`
    times a uniform factor; where it is larger than `size`, a window of `size` is cut at one uniform
    share of what is left over, the same in both directions of the image as it is mirrored or not
    (detectron2 mirrors before it crops).

    Args:
        u: WIDTH uniform numbers.
        height, width: of the image.
        geometry: scale and flip_p.
        size: side of the largest window.
        accept: whether a window may be used; others are drawn again, up to REDRAWS times.

    >>> jitter_placement([0.5] * WIDTH, 60, 80, schema.Geometry(scale=(1.0, 3.0)), 100)
    Placement(source=(60, 80), height=150, width=200, top=25, left=50, rows=100, columns=100, ...
    """
    factor = _between(geometry.scale, u[0])
    scale = min(size * factor / height, size * factor / width)
    sides = max(round(height * scale), 1), max(round(width * scale), 1)  # half to even
    for draw in range(REDRAWS + 1):
        excess = [max(side - size, 0) for side in sides]
        offset = [round(over * u[2 + 2 * draw]) for over in excess]
        if u[1] < geometry.flip_p:
            offset[1] = excess[1] - offset[1]
        placement = _placement((height, width), sides, offset, size, u[1] < geometry.flip_p, True)
        if draw == REDRAWS or accept(placement):
            break
    return placement


def range_placement(
    u: Sequence[float],
    height: int,
    width: int,
    geometry: schema.Geometry,
    size: int,
    *,
    accept: Callable[[Placement], bool] = lambda _: True,
) -> Placement:
    """Draws the placement of rule "range": the long side becomes at most `geometry.long` times a
    uniform factor and the short side at most `geometry.short` times it; where the image is larger
    than `size`, a window of `size` is cut.

    Args:
        u: WIDTH uniform numbers.
        height, width: of the image.
        geometry: scale, long, short and flip_p.
        size: side of the largest window.
        accept: whether a window may be used; others are drawn again, up to REDRAWS times.

    >>> geometry = schema.Geometry(long=400, short=100, scale=(0.5, 1.5))
    >>> range_placement([0.5] * WIDTH, 60, 80, geometry, 64)
    Placement(source=(60, 80), height=100, width=133, top=18, left=35, rows=64, columns=64, ...
    """
    factor = _between(geometry.scale, u[0])
    sides = range_sides(height, width, int(geometry.long * factor), int(geometry.short * factor))
    for draw in range(REDRAWS + 1):
        offset = [
            int(v * (max(side - size, 0) + 1))
            for v, side in zip(u[2 + 2 * draw : 4 + 2 * draw], sides, strict=True)
        ]
        placement = _placement((height, width), sides, offset, size, u[1] < geometry.flip_p, False)
        if draw == REDRAWS or accept(placement):
            break
    return placement


def bucket_placement(
    u: Sequence[float],
    height: int,
    width: int,
    geometry: schema.Geometry,
    canvas: tuple[int, int],
) -> Placement:
    """The placement of rule "buckets": the image as large as fits into the canvas or, with
    probability `crop_p`, a window of it, also as large as fits.

    For the window, the image is resized to one of the short sides `crop_short`; height and width
    are uniform in `crop_sides` where the image is large enough, as is the place (DETR). What the
    references do in two resizes is one here.

    Args:
        u: WIDTH uniform numbers, of which the second decides on the flip.
        height, width: of the image.
        geometry: flip_p and the settings of the window.
        canvas: (height, width) of the batch.

    >>> bucket_placement([0.9] * WIDTH, 480, 640, schema.Geometry(), (800, 1344))
    Placement(source=(480, 640), height=800, width=1067, top=0, left=0, rows=800, columns=1067, ...
    >>> place = bucket_placement([0.4] * WIDTH, 480, 640, schema.Geometry(crop_p=0.5), (800, 1344))
    >>> place.height, place.width, place.top, place.left, place.rows, place.columns
    (930, 1241, 52, 147, 800, 874)
    """
    sides, window, corner = (height, width), (height, width), (0, 0)
    if u[0] < geometry.crop_p:
        short = geometry.crop_short[int(u[2] * len(geometry.crop_short))]
        sides = range_sides(height, width, 2**31, short)
        low, high = geometry.crop_sides
        tall, wide = (
            min(low, side) + int(v * (min(high, side) - min(low, side) + 1))
            for v, side in zip(u[3:5], sides, strict=True)
        )
        window = tall, wide
        down, over = (
            int(v * (side - cut + 1)) for v, side, cut in zip(u[5:7], sides, window, strict=True)
        )
        corner = down, over
    scale = min(limit / side for limit, side in zip(canvas, window, strict=True))
    rows, columns = (
        min(max(int(side * scale + 0.5), 1), limit)
        for side, limit in zip(window, canvas, strict=True)
    )
    tall, wide = (
        max(int(side * scale + 0.5), least)
        for side, least in zip(sides, (rows, columns), strict=True)
    )
    top, left = (
        min(int(first * scale + 0.5), side - cut)
        for first, side, cut in zip(corner, (tall, wide), (rows, columns), strict=True)
    )
    flip = u[1] < geometry.flip_p
    return Placement((height, width), tall, wide, top, left, rows, columns, flip, True)


def bucket_canvases(geometry: schema.Geometry) -> tuple[tuple[int, int], ...]:
    """(height, width) of the canvases of rule "buckets", in their order; () with another rule.

    Raises:
        UserError: none are given, or a height without a width.

    >>> bucket_canvases(schema.Geometry(rule="buckets", buckets=(480, 800, 800, 1344)))
    ((480, 800), (800, 1344))
    """
    given = geometry.buckets
    if geometry.rule != "buckets":
        return ()
    if not given or len(given) % 2:
        raise UserError(
            f"config.dense.geometry.buckets: {given} has {len(given)} numbers; rule=buckets needs"
            " height and width of every canvas, such as (480,800,800,1344)"
        )
    return tuple(zip(given[::2], given[1::2], strict=True))


def mean_canvas_share(geometry: schema.Geometry) -> float:
    """Returns the pixels of the mean canvas over those of the largest; 1 with one size of images.

    >>> mean_canvas_share(schema.Geometry(rule="buckets", buckets=(64, 64, 64, 128)))
    0.75
    """
    pixels = [height * width for height, width in bucket_canvases(geometry)]
    return sum(pixels) / len(pixels) / max(pixels) if pixels else 1.0


def range_sides(height: int, width: int, long: int, short: int) -> tuple[int, int]:
    """Returns the (height, width) of an image that is scaled until its long side is `long` or its
    short side `short`, whichever is first.

    >>> range_sides(600, 2600, 2048, 512), range_sides(512, 683, 2048, 512)
    ((473, 2048), (512, 683))
    """
    scale = min(max(long, 1) / max(height, width), max(short, 1) / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def whole_placement(source: tuple[int, int], sides: tuple[int, int], *, smooth: bool) -> Placement:
    """Returns the placement of an image that is resized and not cut."""
    return _placement(source, sides, [0, 0], max(sides), False, smooth)


def dominated(map_HxW: np.ndarray, share: float, ignore: int = 255) -> bool:
    """Returns whether one category has `share` or more of the labelled pixels of a map, or is the
    only one.

    >>> dominated(np.array([[0, 0, 0, 1]]), 0.75), dominated(np.array([[0, 0, 1, 255]]), 0.75)
    (True, False)
    """
    counts = np.bincount(map_HxW.ravel(), minlength=ignore + 1)[:ignore]
    labelled = counts.sum()
    return bool((counts > 0).sum() < 2 or counts.max() >= share * labelled)


def cut_image(image: Image.Image, placement: Placement) -> np.ndarray:
    """Returns the window of an RGB image, uint8 [rows, columns, 3].

    >>> image = Image.new("RGB", (20, 10), (1, 2, 3))
    >>> placement = Placement((10, 20), 20, 40, 3, 5, 17, 30, True, True)
    >>> cut_image(image, placement).shape, cut_image(image, placement)[5, 5].tolist()
    ((17, 30, 3), [1, 2, 3])
    """
    p = placement
    # to enlarge, both filters read the same four pixels, and Pillow's is faster
    if p.smooth or (p.height >= p.source[0] and p.width >= p.source[1]):
        box = _inside(p.window(), p.source)
        pixels = np.asarray(
            image.resize((p.columns, p.rows), Image.Resampling.BILINEAR, box=box), np.uint8
        )
    else:
        pixels = _bilinear(np.asarray(image), placement)
    return pixels[:, ::-1] if p.flip else pixels


def cut_map(map_HxW: np.ndarray, placement: Placement) -> np.ndarray:
    """Returns the window of a map, uint8 [rows, columns], whose pixels are the nearest ones.

    >>> placement = Placement((2, 2), 4, 4, 0, 1, 4, 3, False, True)
    >>> cut_map(np.array([[0, 1], [2, 3]], np.uint8), placement)[1].tolist()
    [0, 1, 1]
    """
    p = placement
    y = (np.arange(p.top, p.top + p.rows) + 0.5) * (p.source[0] / p.height)
    x = (np.arange(p.left, p.left + p.columns) + 0.5) * (p.source[1] / p.width)
    y, x = (np.minimum(v.astype(np.int64), s - 1) for v, s in zip((y, x), p.source, strict=True))
    return map_HxW[y[:, None], x[::-1] if p.flip else x]


def cut_polygons(
    polygons: Polygons, placement: Placement, side: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the tight box of the visible part of polygons, float64 [4] in pixels of the window,
    and the mask in the frame of the box, bool [side, side]; None if nothing is visible.

    >>> square = Polygons((np.array([[-5, 0], [5, 0], [5, 10], [-5, 10.0]]),))
    >>> placement = Placement((20, 20), 20, 20, 0, 0, 20, 20, False, True)
    >>> box, mask = cut_polygons(square, placement, 4)
    >>> box.tolist(), bool(mask.all())
    ([0.0, 0.0, 5.0, 10.0], True)
    """
    parts = [placement.move(part) for part in polygons.parts]
    bounds = [
        bound
        for part in parts
        if (bound := _visible_bounds(part, placement.rows, placement.columns)) is not None
    ]
    if not bounds:
        return None
    low, high = np.min([b[:2] for b in bounds], 0), np.max([b[2:] for b in bounds], 0)
    if (high - low).min() <= LEAST:
        return None
    framed = [(part - low) * (side / (high - low)) for part in parts]
    return np.concatenate([low, high]), rasterize(framed, side, side)


def cut_run_lengths(
    runs: RunLengths, placement: Placement, side: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns what `cut_polygons` does, for run lengths.

    Raises:
        ValueError: they are damaged, or those of an image of another size.
    """
    mask = decode_mask(runs, *placement.source)
    left, top, right, bottom = _inside(placement.window(), placement.source)
    # every pixel of which a part is inside the window
    y0, x0 = math.floor(top + LEAST), math.floor(left + LEAST)
    view = mask[y0 : math.ceil(bottom - LEAST), x0 : math.ceil(right - LEAST)]
    rows, columns = np.flatnonzero(view.any(1)), np.flatnonzero(view.any(0))
    if not len(rows):
        return None
    x_low, x_high = max(x0 + columns[0], left), min(x0 + columns[-1] + 1, right)
    y_low, y_high = max(y0 + rows[0], top), min(y0 + rows[-1] + 1, bottom)
    box = placement.move_boxes(np.array([[x_low, y_low, x_high, y_high]]))[0]
    if (box[2:] - box[:2]).min() <= LEAST:
        return None
    pixels = Image.fromarray(view.astype(np.uint8) * 255)
    frame = (x_low - x0, y_low - y0, x_high - x0, y_high - y0)
    framed = pixels.resize(
        (side, side),
        Image.Resampling.BILINEAR,
        box=_inside(frame, view.shape),  # type: ignore[arg-type]
    )
    inside = np.asarray(framed) >= 128
    return box, inside[:, ::-1] if placement.flip else inside


def _visible_bounds(points_Nx2: np.ndarray, rows: int, columns: int) -> np.ndarray | None:
    """Returns the bounds of the part of a polygon that is inside the window 0..columns, 0..rows, x0
    y0 x1 y1; None if no part is. They are spanned by the pieces of its edges inside, and by the
    corners of the window inside the polygon."""
    limit = np.array([columns, rows], np.float64)
    low, high = points_Nx2.min(0), points_Nx2.max(0)
    if (low >= 0).all() and (high <= limit).all():
        return np.concatenate([low, high])
    if (high <= 0).any() or (low >= limit).any():
        return None
    step = np.roll(points_Nx2, -1, 0) - points_Nx2
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second = -points_Nx2 / step, (limit - points_Nx2) / step
    still = step == 0
    outside = still & ((points_Nx2 < 0) | (points_Nx2 > limit))
    enter = np.where(still, 0, np.minimum(first, second)).max(1).clip(0)
    leave = np.where(still, 1, np.maximum(first, second)).min(1).clip(max=1)
    crosses = (enter <= leave) & ~outside.any(1)
    ends = [points_Nx2[crosses] + step[crosses] * t[crosses, None] for t in (enter, leave)]
    corners = np.array([[0, 0], [columns, 0], [0, rows], [columns, rows]], np.float64)
    ends.append(corners[[_contains(points_Nx2, *corner) for corner in corners]])
    spanned = np.concatenate(ends).clip(0, limit)
    return np.concatenate([spanned.min(0), spanned.max(0)]) if len(spanned) else None


def _contains(points_Nx2: np.ndarray, x: float, y: float) -> bool:
    """Returns whether a point is inside a polygon, by the even-odd rule."""
    x0, y0 = points_Nx2.T
    x1, y1 = np.roll(points_Nx2, -1, 0).T
    spans = (y0 > y) != (y1 > y)
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = x0 + (y - y0) * (x1 - x0) / (y1 - y0)
    return bool((spans & (x < crossing)).sum() % 2)


def _bilinear(pixels_HxWx3: np.ndarray, placement: Placement) -> np.ndarray:
    """Resizes by bilinear interpolation of four pixels in fixed-point numbers of 11 bits, which
    gives OpenCV's values, and only inside the window."""
    p = placement
    (y0, y1, wy), (x0, x1, wx) = (
        _taps(first, count, side, size)
        for first, count, side, size in (
            (p.top, p.rows, p.height, p.source[0]),
            (p.left, p.columns, p.width, p.source[1]),
        )
    )
    base = int(y0.min())
    band = pixels_HxWx3[base : int(y1.max()) + 1]
    wx, wy = wx[None, :, None], wy[:, None, None]
    along = np.take(band, x0, 1).astype(np.int32)  # gathered as bytes, which is faster
    difference = np.take(band, x1, 1).astype(np.int32)
    difference -= along
    difference *= wx
    along <<= 11
    along += difference
    along >>= 4
    upper, lower = np.take(along, y0 - base, 0), np.take(along, y1 - base, 0)
    upper *= 2048 - wy
    upper >>= 16
    lower *= wy
    lower >>= 16
    upper += lower
    upper += 2
    upper >>= 2
    return upper.clip(0, 255).astype(np.uint8)


def _taps(
    first: int, count: int, side: int, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the two pixels that each pixel of a resized row reads, and the weight of the second
    in 1/2048."""
    place = (np.arange(first, first + count) + 0.5) * (size / side) - 0.5
    low = np.floor(place).astype(np.int64)
    weight = np.rint((place - low) * 2048).astype(np.int32)
    return low.clip(0, size - 1), (low + 1).clip(0, size - 1), weight


def _placement(
    source: tuple[int, int],
    sides: tuple[int, int],
    offset: Sequence[int],
    size: int,
    flip: bool,
    smooth: bool,
) -> Placement:
    (height, width), (top, left) = sides, offset
    rows, columns = min(height, size), min(width, size)
    return Placement(source, height, width, top, left, rows, columns, flip, smooth)


def _inside(
    box: tuple[float, float, float, float], size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Moves the sides of a box that rounding put outside of an image back to its border."""
    height, width = size
    return max(box[0], 0.0), max(box[1], 0.0), min(box[2], width), min(box[3], height)


def _between(ends: Sequence[float], u: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * u
