"""Reading maps at continuous places.

There are two forms. Separable: the places are a grid of rows and columns, and the result is the
product of the map with one small matrix for each axis (RoIAlign, pasted masks, resizing, adaptive
means). Scattered: every place is read by itself, by a gather of the four cells around it.

Everywhere the value of a cell belongs to its centre: along an axis of `size` cells, place p is at
the centre of cell p, and a map that spans 0..1 has the place u * size - 0.5 at u (align_corners
False). What a place outside of the map reads is the argument `outside`. Boxes are x0 y0 x1 y1 in
continuous pixels, float32.

H W size of a map, C channels, R boxes, M side of a mask, T places along an axis, P points.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import parallel
from m3i_jax.models.dcnv3_dense import hat, widen
from m3i_jax.models.dense import roi_align_cpu
from m3i_jax.objective.manual_axes import custom_vjp

# Samples of a bin that can reach one cell: those of a bin with five or more are at least 0.8 cells
# apart, and a cell is reached from two.
_NEAR = 4
# Numbers that boxes read by row may be, in the products of whole maps with the weights of boxes.
_AT_ONCE = 2**26


def _product(terms: str, a: jax.Array, b: Any) -> jax.Array:
    """einsum in the type of `a`, sums in float32. float32 is not rounded to bfloat16, the default
    of TPUs."""
    precision = None if a.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    y = jnp.einsum(
        terms,
        a,
        jnp.asarray(b, a.dtype),
        precision=precision,
        preferred_element_type=widen(a.dtype),
    )
    return y.astype(a.dtype)


def _weight(place: jax.Array, cell: np.ndarray, size: int, outside: str) -> jax.Array:
    """Weight of a cell at a place; arguments as of `interpolation_matrix`."""
    if outside == "zero":
        return hat(place - cell)
    weight = hat(jnp.clip(place, 0, size - 1) - cell)
    if outside == "border":
        return weight
    if outside != "zero beyond a cell":
        raise ValueError(f"outside is {outside!r}; it must be zero, border or zero beyond a cell")
    return jnp.where((place >= -1) & (place <= size), weight, 0)


def interpolation_matrix(place_xT: jax.Array, size: int, *, outside: str) -> jax.Array:
    """Returns the matrix that reads an axis of a map at places by linear interpolation: [..., T,
    size] float32.

    Args:
      place_xT: [..., T], in cells; 0 is the centre of the first.
      size: cells of the axis.
      outside: zero: the map goes on with zeros; border: with the value of its last cell; zero
        beyond a cell: border as far as one cell from the last centre, then zero (RoIAlign).

    Raises:
      ValueError: another `outside`.

    >>> print(interpolation_matrix(jnp.array([0.25, -0.5]), 3, outside="zero"))
    [[0.75 0.25 0.  ]
     [0.5  0.   0.  ]]
    >>> print(interpolation_matrix(jnp.array([2.5, -0.5]), 3, outside="border"))
    [[0. 0. 1.]
     [1. 0. 0.]]
    """
    place_xTx1 = jnp.asarray(place_xT, jnp.float32)[..., None]
    return _weight(place_xTx1, np.arange(size, dtype=np.float32), size, outside)


def _roi_matrix(low_R: jax.Array, high_R: jax.Array, out: int, size: int) -> jax.Array:
    """Matrix [R, out, size] whose rows are the means over the samples of a bin of RoIAlign.

    A bin of b cells has ceil(b) samples. Only those near a cell are looked at, so the work does not
    grow with the size of the box.
    """
    bin_R = (high_R - low_R) / out
    # A compiler that multiplies by 1 / out can turn a whole number into a little more than it.
    samples_R = jnp.ceil(bin_R)
    samples_R -= (samples_R - 1) * out >= high_R - low_R
    distance = (bin_R / jnp.maximum(samples_R, 1))[:, None, None]
    cell = np.arange(size, dtype=np.float32)
    start = (low_R[:, None] + np.arange(out) * bin_R[:, None])[..., None]
    samples = samples_R[:, None, None]
    first = jnp.floor((cell - 1 - start) / jnp.where(distance > 0, distance, 1) - 0.5)
    first = jnp.clip(first, 0, jnp.maximum(samples - _NEAR, 0))
    total = jnp.zeros((), jnp.float32)
    for i in range(_NEAR):
        place = start + (first + i + 0.5) * distance
        weight = _weight(place, cell, size, "zero beyond a cell")
        total += jnp.where(first + i < samples, weight, 0)
    return total / jnp.maximum(samples, 1)


def level_shares(
    boxes_Rx4: jax.Array, strides: tuple[int, ...], canonical: tuple[int, int] = (224, 16)
) -> jax.Array:
    """Returns which map each box is read from: one-hot [R, levels] float32, by the square root of
    its area.

    A box of the canonical side is read at the canonical stride, one of half the side at half the
    stride, and so on within the strides that there are (FPN, detectron2).

    Args:
      boxes_Rx4: x0 y0 x1 y1 in pixels.
      strides: rising, each twice the one before.
      canonical: (side, stride) in pixels.

    >>> boxes = jnp.array([[0, 0, 224.0, 224], [0, 0, 223, 224], [0, 0, 9, 9]])
    >>> print(level_shares(boxes, (4, 8, 16, 32)))
    [[0. 0. 1. 0.]
     [0. 1. 0. 0.]
     [1. 0. 0. 0.]]
    """
    width, height = boxes_Rx4[:, 2] - boxes_Rx4[:, 0], boxes_Rx4[:, 3] - boxes_Rx4[:, 1]
    # Comparisons instead of a logarithm, whose last digit differs between machines.
    side_R = jnp.sqrt(jnp.maximum(width * height, 0)) / canonical[0] + 1e-8
    least = np.array(strides[1:], np.float32) / canonical[1]
    level_R = (side_R[:, None] >= least).sum(1)
    return jax.nn.one_hot(level_R, len(strides), dtype=jnp.float32)


class _Alignment(NamedTuple):
    """Static arguments of RoIAlign: bins along each axis, strides and (height, width) of the maps,
    and the canonical (side, stride) of boxes."""

    out: int
    strides: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    canonical: tuple[int, int]


def _roi_weights(call: _Alignment, boxes_Nx4: jax.Array) -> list[tuple[jax.Array, ...]]:
    """For every map: rows [N, T, H], columns [N, T, W], the first and the last cell [N, 2] that a
    box can reach, and which boxes are read from it [N]."""
    boxes_Nx4 = boxes_Nx4.astype(jnp.float32)
    here_NxL = level_shares(boxes_Nx4, call.strides, call.canonical) > 0
    levels: list[tuple[jax.Array, ...]] = []
    for level, (stride, size) in enumerate(zip(call.strides, call.sizes, strict=True)):
        places_Nx4 = boxes_Nx4 * np.float32(1 / stride) - 0.5
        x0, y0, x1, y1 = places_Nx4.T
        reach = (places_Nx4[:, 1::-1], places_Nx4[:, :1:-1] + 1)
        first, last = (
            jnp.clip(jnp.floor(end), 0, np.array(size) - 1).astype(jnp.int32) for end in reach
        )
        matrices = _roi_matrix(y0, y1, call.out, size[0]), _roi_matrix(x0, x1, call.out, size[1])
        levels.append((*matrices, first, last, here_NxL[:, level]))
    return levels


def _by_windows(
    call: _Alignment, boxes_BxRx4: jax.Array
) -> Iterator[tuple[int, roi_align_cpu.Weights]]:
    image_Bx1 = jnp.arange(boxes_BxRx4.shape[0], dtype=jnp.int32)[:, None]
    image_N = jnp.broadcast_to(image_Bx1, boxes_BxRx4.shape[:2]).ravel()
    for level, weights in enumerate(_roi_weights(call, boxes_BxRx4.reshape(-1, 4))):
        yield level, roi_align_cpu.Weights(image_N, *weights)


def _windows_value(
    call: _Alignment, maps: tuple[jax.Array, ...], boxes_BxRx4: jax.Array
) -> jax.Array:
    shape = (*boxes_BxRx4.shape[:2], call.out, call.out, maps[0].shape[-1])
    y = jnp.zeros((shape[0] * shape[1], *shape[2:]), jnp.float32)
    for level, weights in _by_windows(call, boxes_BxRx4):
        y = roi_align_cpu.read_windows(y, maps[level], weights)
    return y.reshape(shape).astype(maps[0].dtype)


def _windows_gradient(
    call: _Alignment, grad_BxRxTxTxC: jax.Array, boxes_BxRx4: jax.Array
) -> tuple[jax.Array, ...]:
    b, grad = boxes_BxRx4.shape[0], grad_BxRxTxTxC.reshape(-1, *grad_BxRxTxTxC.shape[2:])
    return tuple(
        roi_align_cpu.add_windows(grad, (b, *call.sizes[level]), weights).astype(grad.dtype)
        for level, weights in _by_windows(call, boxes_BxRx4)
    )


def _products_value(
    call: _Alignment, maps: tuple[jax.Array, ...], boxes_BxRx4: jax.Array
) -> jax.Array:
    """Sum over the maps, with weights 0 where a box is not read from one; so many boxes at a time
    that what they read by row fits."""
    b, r, _ = boxes_BxRx4.shape
    rows_here = parallel.rows_of_device(b) if isinstance(b, int) else 1
    total: Any = 0
    levels = _roi_weights(call, boxes_BxRx4.reshape(-1, 4))
    for map_BxHxWxC, (rows, columns, *_, here) in zip(maps, levels, strict=True):
        rows = jnp.where(here[:, None, None], rows, 0).reshape(b, r, *rows.shape[1:])
        columns = columns.reshape(b, r, *columns.shape[1:])

        def read(rows: jax.Array, columns: jax.Array, x: jax.Array = map_BxHxWxC) -> jax.Array:
            by_row = _product("bhwc,brth->brtwc", x, rows)
            return _product("brywc,brxw->bryxc", by_row, columns)

        numbers = rows_here * call.out * math.prod(map_BxHxWxC.shape[2:])
        parts = -(-r // max(1, _AT_ONCE // numbers))
        if parts == 1:
            total += read(rows, columns)
            continue
        size = -(-r // parts)

        def split(x: jax.Array, parts: int = parts, size: int = size) -> jax.Array:
            x = jnp.pad(x, [(0, 0), (0, parts * size - r), (0, 0), (0, 0)])
            return jnp.moveaxis(x.reshape(b, parts, size, *x.shape[2:]), 1, 0)

        y = jax.lax.map(lambda some, read=read: read(*some), (split(rows), split(columns)))
        y = jnp.moveaxis(y, 0, 1)
        total += y.reshape(b, parts * size, *y.shape[3:])[:, :r]
    return total


def _products_gradient(
    call: _Alignment, grad_BxRxTxTxC: jax.Array, boxes_BxRx4: jax.Array
) -> tuple[jax.Array, ...]:
    b, c = grad_BxRxTxTxC.shape[0], grad_BxRxTxTxC.shape[-1]
    maps = tuple(jnp.zeros((b, *size, c), grad_BxRxTxTxC.dtype) for size in call.sizes)
    _, back = jax.vjp(lambda maps: _products_value(call, maps, boxes_BxRx4), maps)
    return back(grad_BxRxTxTxC)[0]


def _merged_by_vmap(run: Callable[..., Any]) -> Callable[..., Any]:
    """A function of trees of arrays [B, ...] for which jax.vmap makes one longer axis B."""

    @jax.custom_batching.custom_vmap
    def call(*trees_Bx: Any) -> Any:
        return run(*trees_Bx)

    @call.def_vmap
    def rule(axis: int, is_batched: Any, *trees_Bx: Any) -> Any:
        def merged(x: jax.Array, batched: bool) -> jax.Array:
            x = x if batched else jnp.broadcast_to(x, (axis, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        y = call(*jax.tree.map(merged, trees_Bx, tuple(is_batched)))
        return (
            jax.tree.map(lambda y: y.reshape(axis, -1, *y.shape[1:]), y),
            jax.tree.map(lambda _: True, y),
        )

    return call


def _by_platform(windows: Callable[..., Any], products: Callable[..., Any], *arrays: Any) -> Any:
    """Windows on CPUs, where a program per device can be run; else products, which the partitioner
    splits. Neither counts as work of the model."""

    def run(*arrays_Bx: Any) -> Any:
        with jax.named_scope("flops=0"):
            if not parallel.is_single_device(jax.tree.leaves(arrays_Bx)[0].shape[0]):
                return products(*arrays_Bx)
            each = functools.partial(parallel.per_device, windows)
            return jax.lax.platform_dependent(*arrays_Bx, cpu=each, default=products)

    return _merged_by_vmap(run)(*arrays)


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def _aligned(call: _Alignment, maps: tuple[jax.Array, ...], boxes_BxRx4: jax.Array) -> jax.Array:
    value = (functools.partial(form, call) for form in (_windows_value, _products_value))
    return _by_platform(*value, maps, boxes_BxRx4)


def _aligned_backward(call: _Alignment, boxes_BxRx4: jax.Array, grad: jax.Array) -> Any:
    forms = (functools.partial(form, call) for form in (_windows_gradient, _products_gradient))
    return _by_platform(*forms, grad, boxes_BxRx4), None


_aligned.defvjp(lambda call, maps, boxes: (_aligned(call, maps, boxes), boxes), _aligned_backward)


@functools.partial(jax.jit, static_argnums=(2, 3))
def roi_align(map_HxWxC: jax.Array, boxes_Rx4: jax.Array, out: int, stride: int) -> jax.Array:
    """Returns means of a map over the bins of boxes, [R, out, out, C] in the type of the map.

    Every bin of b x c cells is the mean of ceil(b) x ceil(c) bilinear samples at the centres of as
    many equal parts (aligned, adaptive RoIAlign: torchvision's `aligned=True, sampling_ratio=0`),
    exactly for boxes of any size. A box without width or height reads 0. The map has a gradient,
    boxes have none.

    Args:
      map_HxWxC: the map of one image; jax.vmap for several.
      boxes_Rx4: x0 y0 x1 y1 in pixels of the image.
      out: bins along each axis.
      stride: pixels per cell of the map.

    >>> ramp = jnp.broadcast_to(jnp.arange(8.0)[:, None, None], (8, 8, 1))  # value = row
    >>> print(roi_align(ramp, jnp.array([[4.0, 4.0, 20.0, 12.0]]), 2, 4)[0, :, :, 0])
    [[1. 1.]
     [2. 2.]]
    """
    return multilevel_roi_align({stride: map_HxWxC}, boxes_Rx4, out)


@functools.partial(jax.jit, static_argnums=(2, 3))
def multilevel_roi_align(
    maps: Mapping[int, jax.Array],
    boxes_Rx4: jax.Array,
    out: int,
    canonical: tuple[int, int] = (224, 16),
) -> jax.Array:
    """`roi_align` of each box on the map that `level_shares` names, [R, out, out, C].

    Args:
      maps: {stride in pixels: [H, W, C]} of one image: only those that boxes are read from, without
        the coarsest of the proposals.
      boxes_Rx4, out: as of `roi_align`.
      canonical: as of `level_shares`.

    >>> maps = {4: jnp.ones((8, 8, 1)), 8: 2 * jnp.ones((4, 4, 1))}
    >>> boxes = jnp.array([[0.0, 0, 30, 30], [0, 0, 10, 10]])
    >>> multilevel_roi_align(maps, boxes, 1, (32, 16)).ravel().tolist()
    [2.0, 1.0]
    """
    strides = tuple(sorted(maps))
    sizes = tuple((maps[stride].shape[0], maps[stride].shape[1]) for stride in strides)
    call = _Alignment(out, strides, sizes, canonical)
    images = tuple(maps[stride][None] for stride in strides)
    return _aligned(call, images, boxes_Rx4[None])[0]


def _frame_places(to_Rx2: jax.Array, frame_Rx2: jax.Array, out: int, size: int) -> jax.Array:
    """Centres of `out` equal parts of one span in cells of another, which has `size`: [R, out]."""
    start, end = to_Rx2[:, :1], to_Rx2[:, 1:]
    low, span = frame_Rx2[:, :1], frame_Rx2[:, 1:] - frame_Rx2[:, :1]
    at = start + (np.arange(out, dtype=np.float32) + 0.5) / out * (end - start)
    inside = (at - low) / jnp.where(span > 0, span, 1) * size - 0.5
    return jnp.where(span > 0, inside, -2)  # a box without width shows nothing


@functools.partial(jax.jit, static_argnums=2)
def paste_masks(masks_RxMxM: jax.Array, boxes_Rx4: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Returns masks in the frames of their boxes as masks of the image, [R, height, width] float32
    in 0..1; detectron2 says that values of at least 0.5 belong to the object.

    At the centre of each pixel the mask is interpolated bilinearly, with zeros outside of it.

    Args:
      masks_RxMxM: any type; values 0..1.
      boxes_Rx4: x0 y0 x1 y1 in pixels.
      size: (height, width) of the image.

    >>> mask, box = jnp.ones((1, 2, 2)), jnp.array([[1.0, 0.0, 3.0, 1.0]])
    >>> print(paste_masks(mask, box, (2, 4))[0])
    [[0. 1. 1. 0.]
     [0. 0. 0. 0.]]
    """
    side = masks_RxMxM.shape[-1]
    boxes_Rx4 = boxes_Rx4.astype(jnp.float32)
    matrices = [
        interpolation_matrix(
            _frame_places(jnp.array([[0.0, n]]), boxes_Rx4[:, axis::2], n, side),
            side,
            outside="zero",
        )
        for n, axis in ((size[0], 1), (size[1], 0))
    ]
    read = _product("rij,ryi->ryj", masks_RxMxM.astype(jnp.float32), matrices[0])
    return _product("ryj,rxj->ryx", read, matrices[1])


@functools.partial(jax.jit, static_argnames="out")
def mask_targets(
    masks_RxMxM: jax.Array, gt_boxes_Rx4: jax.Array, proposals_Rx4: jax.Array, out: int = 28
) -> jax.Array:
    """Returns what the mask head should say for proposals: [R, out, out] float32, 0 or 1.

    At the centres of out x out bins of the proposal the mask, which is stored in the frame of its
    own box, is interpolated bilinearly, with zeros outside; 1 is a value of at least 0.5.

    Args:
      masks_RxMxM: 0 or 1, any type; of the object of each proposal.
      gt_boxes_Rx4: the box that each mask spans, in pixels; of the same object.
      proposals_Rx4: x0 y0 x1 y1 in pixels.
      out: bins along each axis.

    >>> mask, box = jnp.array([[[1, 0], [1, 0]]]), jnp.array([[0.0, 0.0, 8.0, 8.0]])
    >>> print(mask_targets(mask, box, jnp.array([[2.0, 4.0, 6.0, 12.0]]), 2)[0])
    [[1. 0.]
     [0. 0.]]
    """
    side = masks_RxMxM.shape[-1]
    rows, columns = (
        interpolation_matrix(
            _frame_places(
                proposals_Rx4[:, axis::2].astype(jnp.float32),
                gt_boxes_Rx4[:, axis::2].astype(jnp.float32),
                out,
                side,
            ),
            side,
            outside="zero",
        )
        for axis in (1, 0)
    )
    read = _product("rij,ryi->ryj", masks_RxMxM.astype(jnp.float32), rows)
    return (_product("ryj,rxj->ryx", read, columns) >= 0.5).astype(jnp.float32)


def _along_axes(x_BxHxWxC: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    read = _product("bhwc,yh->bywc", x_BxHxWxC, rows.astype(np.float32))
    return _product("bywc,xw->byxc", read, columns.astype(np.float32))


def resize_matrix(size: int, out: int) -> np.ndarray:
    """Returns the matrix [out, size] of `resize_bilinear` along one axis, float64.

    >>> resize_matrix(2, 4).tolist()
    [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """
    place = np.clip((np.arange(out) + 0.5) * (size / out) - 0.5, 0, size - 1)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(size)))


def resize_bilinear(x_BxHxWxC: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Maps at another (height, width), bilinear with borders repeated and without antialiasing
    (torch's `interpolate` with align_corners False); the type of x.

    >>> resize_bilinear(jnp.array([0.0, 4.0]).reshape(1, 1, 2, 1), (1, 4)).ravel().tolist()
    [0.0, 1.0, 3.0, 4.0]
    """
    now = x_BxHxWxC.shape[1:3]
    if now == tuple(size):
        return x_BxHxWxC
    return _along_axes(x_BxHxWxC, *(resize_matrix(n, m) for n, m in zip(now, size, strict=True)))


def _mean_matrix(size: int, out: int) -> np.ndarray:
    cell, index = np.arange(size), np.arange(out)[:, None]
    inside = (cell >= index * size // out) & (cell < -(-(index + 1) * size // out))
    return inside / inside.sum(1, keepdims=True)


def adaptive_mean(x_BxHxWxC: jax.Array, out: int) -> jax.Array:
    """Returns means over out x out bins, which overlap where the sides are no multiples of `out`
    (torch's adaptive average pooling): [B, out, out, C].

    >>> adaptive_mean(jnp.array([1.0, 2, 6]).reshape(1, 1, 3, 1), 2)[0, 0].ravel().tolist()
    [1.5, 4.0]
    """
    return _along_axes(x_BxHxWxC, *(_mean_matrix(n, out) for n in x_BxHxWxC.shape[1:3]))


@jax.jit
def sample_points(map_HxWxC: jax.Array, points_Px2: jax.Array) -> jax.Array:
    """Returns a map at single points, [P, C] in the type of the map: bilinear, zeros outside, with
    gradients for the map and the points.

    Args:
      map_HxWxC: the map of one image; jax.vmap for several.
      points_Px2: (x, y); the map spans 0..1 (torch's `grid_sample` at 2 * points - 1 with
        align_corners False).

    >>> corners = jnp.array([[0.0, 1.0], [2.0, 3.0]])[..., None]
    >>> sample_points(corners, jnp.array([[0.5, 0.5], [0.0, 0.25]])).ravel().tolist()
    [1.5, 0.0]
    """
    h, w, c = map_HxWxC.shape
    x, y = (points_Px2.astype(jnp.float32) * np.array([w, h], np.float32) - 0.5).T
    left, top = jnp.floor(x), jnp.floor(y)
    total: Any = 0
    for i in (0, 1):
        for j in (0, 1):
            row, column = top + i, left + j
            weight = (1 - jnp.abs(y - row)) * (1 - jnp.abs(x - column))
            inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
            index = jnp.clip(row, 0, h - 1) * w + jnp.clip(column, 0, w - 1)
            cells = map_HxWxC.reshape(-1, c)[index.astype(jnp.int32)]
            total += jnp.where(inside, weight, 0)[:, None] * cells.astype(jnp.float32)
    return total.astype(map_HxWxC.dtype)
