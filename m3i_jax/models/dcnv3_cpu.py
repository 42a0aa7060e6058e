"""DCNv3 for CPUs: every output adds the four cells around each of its samples in one loop over the
channels of its group.

The forward pass stores no gathered cells; in the backward pass the gradient of the input is a
scatter, point by point. XLA's CPU compiler makes fast code of this if the innermost loop is over
the D contiguous channels of one group: the cells are located once, and the rest is a product and a
sum in vector registers. If it can fuse the reshape [.., G, D] -> [.., C] that follows, it merges
the two inner loops into one, in which every channel locates its cell again. `fusion_barrier`
prevents that.

B batch, Q input cells, O output cells, C channels, G groups, D = C / G, P points, N = B G O
samples, R cells, or rows, of the map with its ring of zeros, W its width."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax.models.cpu_codegen import fusion_barrier
from m3i_jax.models.dcnv3_dense import Samples, sample_gradients, widen
from m3i_jax.objective.manual_axes import vary_like

# contributions of one point to the input gradient that are computed at once; they should stay in a
# CPU's cache
_BYTES = 8 << 20


def _corner(
    y: jax.Array, x: jax.Array, size: tuple[int, int]
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Row and column of every sample's upper left cell on the padded map, and the weights of the
    lower and the right cells.

    One ring of zeros before and two behind: every coordinate in [-1, size] has its four cells, and
    everything beyond is zero."""
    y, x = jnp.clip(y, -1, size[0]), jnp.clip(x, -1, size[1])
    row, column = jnp.floor(y), jnp.floor(x)
    return (row + 1).astype(jnp.int32), (column + 1).astype(jnp.int32), y - row, x - column


def _pad_map(x_BxQxC: jax.Array, size: tuple[int, int], groups: int) -> jax.Array:
    """The padded map: [B, height + 3, width + 3, G, D]."""
    b, _, c = x_BxQxC.shape
    return jnp.pad(
        x_BxQxC.reshape(b, *size, groups, c // groups), ((0, 0), (1, 2), (1, 2), (0, 0), (0, 0))
    )


def _neighbour_offsets(size: tuple[int, int], groups: int) -> tuple[int, int, int, int]:
    """Offsets in rows from a cell to itself, its right, its lower and its lower right neighbour."""
    return 0, groups, (size[1] + 3) * groups, (size[1] + 4) * groups


def _corner_weights(below: jax.Array, right: jax.Array) -> jax.Array:
    """Bilinear weights of the four cells, on a last axis in the order of `_neighbour_offsets`."""
    return jnp.stack(
        [(1 - below) * (1 - right), (1 - below) * right, below * (1 - right), below * right], -1
    )


def _take_rows(rows_BxRxD: jax.Array, index: jax.Array) -> jax.Array:
    """Rows by index, [B, ...] -> [B, ..., D]."""
    where = jax.lax.GatherDimensionNumbers(
        offset_dims=(index.ndim,),
        collapsed_slice_dims=(1,),
        start_index_map=(1,),
        operand_batching_dims=(0,),
        start_indices_batching_dims=(0,),
    )
    return jax.lax.gather(
        rows_BxRxD, index[..., None], where, (1, 1, rows_BxRxD.shape[2]), mode="promise_in_bounds"
    )


def _take_squares(map_RxWxD: jax.Array, at_Nx3: jax.Array, width: int) -> jax.Array:
    """Squares of four cells, [N, 2, 2, width], from (row, column, first channel)."""
    where = jax.lax.GatherDimensionNumbers(
        offset_dims=(1, 2, 3), collapsed_slice_dims=(), start_index_map=(0, 1, 2)
    )
    return jax.lax.gather(map_RxWxD, at_Nx3, where, (2, 2, width), mode="promise_in_bounds")


def _add_squares(map_RxWxD: jax.Array, at_Nx2: jax.Array, more_Nx2x2xD: jax.Array) -> jax.Array:
    """Adds to squares of four cells, from (row, column)."""
    where = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3), inserted_window_dims=(), scatter_dims_to_operand_dims=(0, 1)
    )
    return jax.lax.scatter_add(map_RxWxD, at_Nx2, more_Nx2x2xD, where, mode="promise_in_bounds")


def forward(x_BxQxC: jax.Array, at: Samples, size: tuple[int, int]) -> jax.Array:
    """Modulated sum of samples, [B, O, C] in the type of x.

    Args:
      x_BxQxC: the input, channels of a group side by side.
      at: samples in pixels of the input, [B, O, G, P].
      size: its height and width; Q is their product.

    >>> at = Samples(*(jnp.full((1, 1, 1, 1), value) for value in (0.5, 1.0, 2.0)))
    >>> x = jnp.arange(4.0).reshape(1, 4, 1)
    >>> forward(x, at, (2, 2)).item()  # twice the mean of cells 1 and 3
    4.0
    """
    b, o, groups, points = at.y.shape
    row, column, below, right = _corner(at.y, at.x, size)
    cell = (row * (size[1] + 3) + column) * groups + np.arange(groups, dtype=np.int32)[:, None]
    steps = _neighbour_offsets(size, groups)

    def body(rows_BxRxD: jax.Array, cell: jax.Array, share: jax.Array) -> jax.Array:
        total: Any = 0.0
        for p in range(points):
            for corner, step in enumerate(steps):
                total += share[..., p, corner, None] * _take_rows(rows_BxRxD, cell[..., p] + step)
        return total

    # one row per cell and group
    rows_BxRxD = _pad_map(x_BxQxC, size, groups).reshape(b, -1, x_BxQxC.shape[2] // groups)
    y_BxOxGxD = fusion_barrier(
        body, rows_BxRxD, cell, _corner_weights(below, right) * at.m[..., None]
    )
    return y_BxOxGxD.reshape(b, o, -1).astype(x_BxQxC.dtype)


def backward(
    x_BxQxC: jax.Array, at: Samples, grad_BxOxC: jax.Array, size: tuple[int, int]
) -> tuple[jax.Array, Samples]:
    """Gradients of the input, and of the samples' coordinates and modulation. Arguments as of
    `forward`.

    A coordinate of -1 or less gets no gradient: its sample is outside, as in the published
    operator.

    >>> at = Samples(*(jnp.full((1, 1, 1, 1), value) for value in (0.5, 1.0, 2.0)))
    >>> dx, grad = backward(jnp.arange(4.0).reshape(1, 4, 1), at, jnp.ones((1, 1, 1)), (2, 2))
    >>> dx.ravel().tolist(), grad.y.item(), grad.m.item()
    ([0.0, 1.0, 0.0, 1.0], 4.0, 2.0)
    """
    b, o, c = grad_BxOxC.shape
    fit = max(n for n in range(1, b + 1) if b % n == 0 and (n == 1 or n * o * c * 4 * 4 <= _BYTES))
    # chunks with stride, as in scan_blocks: every device keeps its rows
    split = lambda a: a.reshape(fit, b // fit, *a.shape[1:]).swapaxes(0, 1)
    collect = lambda a: a.swapaxes(0, 1).reshape(b, *a.shape[2:])
    chunks = jax.tree.map(split, (x_BxQxC, at, grad_BxOxC))
    return jax.tree.map(
        collect, jax.lax.map(lambda chunk: _backward(chunk[0], chunk[1], chunk[2], size), chunks)
    )


def _backward(
    x_BxQxC: jax.Array, at: Samples, grad_BxOxC: jax.Array, size: tuple[int, int]
) -> tuple[jax.Array, Samples]:
    (height, width), dtype = size, widen(x_BxQxC.dtype)
    b, o, groups, points = at.y.shape
    d = x_BxQxC.shape[2] // groups
    # The padded maps of all images and groups below one another: [R, W, D]. A sample then reads and
    # adds to a square of four cells, for which XLA's scatter has one inner loop.
    maps = _pad_map(x_BxQxC, size, groups).transpose(0, 3, 1, 2, 4).reshape(-1, width + 3, d)
    grad_NxD = grad_BxOxC.reshape(b, o, groups, d).swapaxes(1, 2).reshape(-1, d).astype(dtype)
    y, x, m = (jnp.transpose(a, (3, 0, 2, 1)) for a in at)
    row, column, below, right = _corner(y, x, size)
    row += (np.arange(b * groups, dtype=np.int32) * (height + 3)).reshape(b, groups, 1)
    one_by_one = jax.lax.optimization_barrier(
        tuple(a.reshape(points, -1) for a in (row, column, below, right, m))
    )
    # The sum over the channels of one sample is short: it is taken over pieces of a vector's width
    # first, then within the vector.
    lanes = math.gcd(d, 8)

    def along(maps: jax.Array, row: jax.Array, column: jax.Array, grad: jax.Array) -> jax.Array:
        total: Any = 0.0
        for channel in range(0, d, lanes):
            cells = _take_squares(
                maps, jnp.stack([row, column, jnp.full_like(row, channel)], -1), lanes
            )
            total += cells * grad[:, None, None, channel : channel + lanes]  # float32, as grad
        return total

    def shares(below: jax.Array, right: jax.Array, m: jax.Array) -> jax.Array:
        return (_corner_weights(below, right) * m[:, None]).reshape(-1, 2, 2)

    def point(dv: jax.Array, one: tuple[jax.Array, ...]) -> tuple[jax.Array, Samples]:
        row, column, below, right, m = one
        summed_Nx2x2 = fusion_barrier(along, maps, row, column, grad_NxD) @ jnp.ones(lanes, dtype)
        a, b_, c, d_ = (summed_Nx2x2[:, i, j] for i in range(2) for j in range(2))
        upper, lower = a + right * (b_ - a), c + right * (d_ - c)
        read = Samples(
            lower - upper,
            (1 - below) * (b_ - a) + below * (d_ - c),
            upper + below * (lower - upper),
        )
        more_Nx2x2xD = fusion_barrier(shares, below, right, m)[..., None] * grad_NxD[:, None, None]
        return _add_squares(dv, jnp.stack([row, column], -1), more_Nx2x2xD), read

    start = vary_like(jnp.zeros(maps.shape, dtype), (maps, one_by_one, grad_NxD))
    dv, read = jax.lax.scan(point, start, one_by_one)
    dx = dv.reshape(b, groups, height + 3, width + 3, d)[
        :, :, 1 : height + 1, 1 : width + 1
    ].transpose(0, 2, 3, 1, 4)
    read = jax.tree.map(lambda a: a.reshape(points, b, groups, o).transpose(1, 3, 2, 0), read)
    return dx.reshape(x_BxQxC.shape).astype(x_BxQxC.dtype), sample_gradients(at, read)
