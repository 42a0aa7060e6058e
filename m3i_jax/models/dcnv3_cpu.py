"""DCNv3 for CPUs: every output adds up the four cells around each of its samples in one loop over
the channels of its group.

Nothing that was looked up is ever stored, forwards; backwards the gradient of the input is a
scatter, point by point. XLA's CPU compiler makes fast code of this where the innermost loop is over
the D channels of one group, which lie side by side: the cells are found once, and what is left is a
product and a sum in vector registers. It loses that where it may fuse the reshape [.., G, D] ->
[.., C] that follows: of the two inner loops it makes one, in which every channel looks its cell up
by itself. So the loops stand `fusion_barrier`.

B batch, Q input cells, O output cells, C channels, G groups, D = C / G, P points, N = B G O
samples, R cells, or rows, of the map with its ring of zeros, W its width."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax.models.dcnv3_dense import Samples, sample_gradients, widen
from m3i_jax.models.fusion_barrier import fusion_barrier

# of what one point adds to the gradient of the input, computed at once: more would not stay in a
# processor's cache
_BYTES = 8 << 20


def _corner(
    y: jax.Array, x: jax.Array, size: tuple[int, int]
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Row and column of every sample's upper left cell on the map with its ring of zeros, and the
    shares of the lower and the right cells.

    One ring of zeros before and two behind: every coordinate in [-1, size] finds its four cells,
    and beyond there is nothing to find."""
    y, x = jnp.clip(y, -1, size[0]), jnp.clip(x, -1, size[1])
    row, column = jnp.floor(y), jnp.floor(x)
    return (row + 1).astype(jnp.int32), (column + 1).astype(jnp.int32), y - row, x - column


def _ringed(x_BxQxC: jax.Array, size: tuple[int, int], groups: int) -> jax.Array:
    """The map with its ring of zeros: [B, height + 3, width + 3, G, D]."""
    b, _, c = x_BxQxC.shape
    return jnp.pad(
        x_BxQxC.reshape(b, *size, groups, c // groups), ((0, 0), (1, 2), (1, 2), (0, 0), (0, 0))
    )


def _steps(size: tuple[int, int], groups: int) -> tuple[int, int, int, int]:
    """Rows from a cell to itself, its right, its lower and its lower right neighbour."""
    return 0, groups, (size[1] + 3) * groups, (size[1] + 4) * groups


def _shares(below: jax.Array, right: jax.Array) -> jax.Array:
    """Bilinear weights of the four cells, on a last axis in the order of `_steps`."""
    return jnp.stack(
        [(1 - below) * (1 - right), (1 - below) * right, below * (1 - right), below * right], -1
    )


def _look(rows_BxRxD: jax.Array, index: jax.Array) -> jax.Array:
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


def _look_around(map_RxWxD: jax.Array, at_Nx3: jax.Array, width: int) -> jax.Array:
    """The four cells from a place on, by row, column and first of that many channels: [N, 2, 2,
    width]."""
    where = jax.lax.GatherDimensionNumbers(
        offset_dims=(1, 2, 3), collapsed_slice_dims=(), start_index_map=(0, 1, 2)
    )
    return jax.lax.gather(map_RxWxD, at_Nx3, where, (2, 2, width), mode="promise_in_bounds")


def _add_around(map_RxWxD: jax.Array, at_Nx2: jax.Array, more_Nx2x2xD: jax.Array) -> jax.Array:
    """Adds to the four cells from a place on, by row and column."""
    where = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3), inserted_window_dims=(), scatter_dims_to_operand_dims=(0, 1)
    )
    return jax.lax.scatter_add(map_RxWxD, at_Nx2, more_Nx2x2xD, where, mode="promise_in_bounds")


def forward(x_BxQxC: jax.Array, at: Samples, size: tuple[int, int]) -> jax.Array:
    """Modulated sum of samples, [B, O, C] in the type of x.

    Args:
      x_BxQxC: the input, channels of a group side by side.
      at: samples in pixels of the input, here [B, O, G, P].
      size: its height and width; Q is their product.

    >>> at = Samples(*(jnp.full((1, 1, 1, 1), value) for value in (0.5, 1.0, 2.0)))
    >>> forward(jnp.arange(4.0).reshape(1, 4, 1), at, (2, 2)).item()  # twice the mean of cells 1 and 3
    4.0
    """
    b, o, groups, points = at.y.shape
    row, column, below, right = _corner(at.y, at.x, size)
    cell = (row * (size[1] + 3) + column) * groups + np.arange(groups, dtype=np.int32)[:, None]
    steps = _steps(size, groups)

    def body(rows_BxRxD: jax.Array, cell: jax.Array, share: jax.Array) -> jax.Array:
        total: Any = 0.0
        for p in range(points):
            for corner, step in enumerate(steps):
                total += share[..., p, corner, None] * _look(rows_BxRxD, cell[..., p] + step)
        return total

    # a row a cell and group
    rows_BxRxD = _ringed(x_BxQxC, size, groups).reshape(b, -1, x_BxQxC.shape[2] // groups)
    y_BxOxGxD = fusion_barrier(body, rows_BxRxD, cell, _shares(below, right) * at.m[..., None])
    return y_BxOxGxD.reshape(b, o, -1).astype(x_BxQxC.dtype)


def backward(
    x_BxQxC: jax.Array, at: Samples, grad_BxOxC: jax.Array, size: tuple[int, int]
) -> tuple[jax.Array, Samples]:
    """Gradients of the input, and of the samples' coordinates and modulation. Arguments as of
    `forward`.

    A coordinate of exactly -1 or less gets none: its sample is outside, as in the published
    operator.

    >>> at = Samples(*(jnp.full((1, 1, 1, 1), value) for value in (0.5, 1.0, 2.0)))
    >>> dx, grad = backward(jnp.arange(4.0).reshape(1, 4, 1), at, jnp.ones((1, 1, 1)), (2, 2))
    >>> dx.ravel().tolist(), grad.y.item(), grad.m.item()
    ([0.0, 1.0, 0.0, 1.0], 4.0, 2.0)
    """
    b, o, c = grad_BxOxC.shape
    fit = max(n for n in range(1, b + 1) if b % n == 0 and (n == 1 or n * o * c * 4 * 4 <= _BYTES))
    # As in models.scan_blocks: every device keeps its rows.
    deal = lambda a: a.reshape(fit, b // fit, *a.shape[1:]).swapaxes(0, 1)
    collect = lambda a: a.swapaxes(0, 1).reshape(b, *a.shape[2:])
    some = jax.tree.map(deal, (x_BxQxC, at, grad_BxOxC))
    return jax.tree.map(
        collect, jax.lax.map(lambda one: _backward(one[0], one[1], one[2], size), some)
    )


def _backward(
    x_BxQxC: jax.Array, at: Samples, grad_BxOxC: jax.Array, size: tuple[int, int]
) -> tuple[jax.Array, Samples]:
    (height, width), dtype = size, widen(x_BxQxC.dtype)
    b, o, groups, points = at.y.shape
    d = x_BxQxC.shape[2] // groups
    # A map of an image and group under the other, each with its ring of zeros: [R, W, D]. What a
    # sample reads and adds to is a square of four cells then, which XLA's scatter goes through in
    # one inner loop.
    maps = _ringed(x_BxQxC, size, groups).transpose(0, 3, 1, 2, 4).reshape(-1, width + 3, d)
    grad_NxD = grad_BxOxC.reshape(b, o, groups, d).swapaxes(1, 2).reshape(-1, d).astype(dtype)
    y, x, m = (jnp.transpose(a, (3, 0, 2, 1)) for a in at)
    row, column, below, right = _corner(y, x, size)
    row += (np.arange(b * groups, dtype=np.int32) * (height + 3)).reshape(b, groups, 1)
    one_by_one = jax.lax.optimization_barrier(
        tuple(a.reshape(points, -1) for a in (row, column, below, right, m))
    )
    # A product over the channels of one sample is short. It is summed up over pieces of a vector's
    # width first, and then over that.
    lanes = math.gcd(d, 8)

    def along(maps: jax.Array, row: jax.Array, column: jax.Array, grad: jax.Array) -> jax.Array:
        total: Any = 0.0
        for channel in range(0, d, lanes):
            found = _look_around(
                maps, jnp.stack([row, column, jnp.full_like(row, channel)], -1), lanes
            )
            total += found * grad[:, None, None, channel : channel + lanes]  # wide, as grad is
        return total

    def shares(below: jax.Array, right: jax.Array, m: jax.Array) -> jax.Array:
        return (_shares(below, right) * m[:, None]).reshape(-1, 2, 2)

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
        return _add_around(dv, jnp.stack([row, column], -1), more_Nx2x2xD), read

    dv, read = jax.lax.scan(point, jnp.zeros(maps.shape, dtype), one_by_one)
    dx = dv.reshape(b, groups, height + 3, width + 3, d)[
        :, :, 1 : height + 1, 1 : width + 1
    ].transpose(0, 2, 3, 1, 4)
    read = jax.tree.map(lambda a: a.reshape(points, b, groups, o).transpose(1, 3, 2, 0), read)
    return dx.reshape(x_BxQxC.shape).astype(x_BxQxC.dtype), sample_gradients(at, read)
