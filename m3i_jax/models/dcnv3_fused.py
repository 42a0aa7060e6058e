"""DCNv3 for CPUs: every output adds up the four cells around each of its samples in one loop over the channels of its group.

Nothing that was looked up is ever stored, forwards; backwards the gradient of the input is a scatter, point by point. XLA's CPU compiler
makes fast code of this where the innermost loop is over the D channels of one group, which lie side by side: the cells are found once, and
what is left is a product and a sum in vector registers. It loses that where it may fuse the reshape [.., G, D] -> [.., C] that follows:
of the two inner loops it makes one, in which every channel looks its cell up by itself. So the loops stand `apart`.

B batch, Q input cells, O output cells, C channels, G groups, D = C / G, P points, R cells of the map with its ring of zeros.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax.models.apart import apart
from m3i_jax.models.dcnv3_dense import Samples, inside, wide

_BYTES = 12 << 20  # of what one point adds to the gradient of the input, computed at once: more would not stay in a processor's cache


def _found(at: Samples, size: tuple[int, int]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Upper left cell of every sample as a row of `_rows`, and the shares of the lower and the right cells; all [B, O, G, P].

    One ring of zeros before and two behind: every coordinate in [-1, size] finds its four cells, and beyond there is nothing to find.
    """
    height, width = size
    groups = at.y.shape[2]
    y, x = jnp.clip(at.y, -1, height), jnp.clip(at.x, -1, width)
    row, column = jnp.floor(y), jnp.floor(x)
    cell = ((row + 1) * (width + 3) + column + 1).astype(jnp.int32)
    return cell * groups + np.arange(groups, dtype=np.int32)[:, None], y - row, x - column


def _rows(x_BxQxC: jax.Array, size: tuple[int, int], groups: int) -> jax.Array:
    """The map with its ring of zeros, a row a cell and group: [B, R G, D]."""
    b, _, c = x_BxQxC.shape
    padded = jnp.pad(x_BxQxC.reshape(b, *size, c), ((0, 0), (1, 2), (1, 2), (0, 0)))
    return padded.reshape(b, -1, c // groups)


def _steps(size: tuple[int, int], groups: int) -> tuple[int, int, int, int]:
    """Rows from a cell to itself, its right, its lower and its lower right neighbour."""
    return 0, groups, (size[1] + 3) * groups, (size[1] + 4) * groups


def _shares(below: jax.Array, right: jax.Array) -> jax.Array:
    """Bilinear weights of the four cells, on a last axis in the order of `_steps`."""
    return jnp.stack([(1 - below) * (1 - right), (1 - below) * right, below * (1 - right), below * right], -1)


def _look(rows_BxRxD: jax.Array, index: jax.Array) -> jax.Array:
    """Rows by index, [B, ...] -> [B, ..., D]."""
    where = jax.lax.GatherDimensionNumbers(
        offset_dims=(index.ndim,),
        collapsed_slice_dims=(1,),
        start_index_map=(1,),
        operand_batching_dims=(0,),
        start_indices_batching_dims=(0,),
    )
    return jax.lax.gather(rows_BxRxD, index[..., None], where, (1, 1, rows_BxRxD.shape[2]), mode="promise_in_bounds")


def _add_at(rows_BxRxD: jax.Array, index_BxN: jax.Array, more_BxNxD: jax.Array) -> jax.Array:
    where = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(2,),
        inserted_window_dims=(1,),
        scatter_dims_to_operand_dims=(1,),
        operand_batching_dims=(0,),
        scatter_indices_batching_dims=(0,),
    )
    return jax.lax.scatter_add(rows_BxRxD, index_BxN[..., None], more_BxNxD, where, mode="promise_in_bounds")


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
    cell, below, right = _found(at, size)
    steps = _steps(size, groups)

    def body(rows_BxRxD: jax.Array, cell: jax.Array, share: jax.Array) -> jax.Array:
        total: Any = 0.0
        for p in range(points):
            for corner, step in enumerate(steps):
                total += share[..., p, corner, None] * _look(rows_BxRxD, cell[..., p] + step)
        return total

    y_BxOxGxD = apart(body, _rows(x_BxQxC, size, groups), cell, _shares(below, right) * at.m[..., None])
    return y_BxOxGxD.reshape(b, o, -1).astype(x_BxQxC.dtype)


def backward(x_BxQxC: jax.Array, at: Samples, grad_BxOxC: jax.Array, size: tuple[int, int]) -> tuple[jax.Array, Samples]:
    """Gradients of the input, and of the samples' coordinates and modulation. Arguments as of `forward`.

    A coordinate of exactly -1 or less gets none: its sample is outside, as in the published operator.

    >>> at = Samples(*(jnp.full((1, 1, 1, 1), value) for value in (0.5, 1.0, 2.0)))
    >>> dx, grad = backward(jnp.arange(4.0).reshape(1, 4, 1), at, jnp.ones((1, 1, 1)), (2, 2))
    >>> dx.ravel().tolist(), grad.y.item(), grad.m.item()
    ([0.0, 1.0, 0.0, 1.0], 4.0, 2.0)
    """
    b, o, c = grad_BxOxC.shape
    fit = max(n for n in range(1, b + 1) if b % n == 0 and (n == 1 or n * o * c * 4 * 4 <= _BYTES))
    deal = lambda a: a.reshape(fit, b // fit, *a.shape[1:]).swapaxes(0, 1)  # as in models.stacked: every device keeps its rows  # noqa: E731
    collect = lambda a: a.swapaxes(0, 1).reshape(b, *a.shape[2:])  # noqa: E731
    some = jax.tree.map(deal, (x_BxQxC, at, grad_BxOxC))
    return jax.tree.map(collect, jax.lax.map(lambda one: _backward(one[0], one[1], one[2], size), some))


def _backward(x_BxQxC: jax.Array, at: Samples, grad_BxOxC: jax.Array, size: tuple[int, int]) -> tuple[jax.Array, Samples]:
    (height, width), dtype = size, wide(x_BxQxC.dtype)
    b, o, groups, _ = at.y.shape
    rows_BxRxD = _rows(x_BxQxC, size, groups)
    r, d = rows_BxRxD.shape[1:]
    # A product over the channels of one sample is short. It is summed up over pieces of a vector's width first, and then over that.
    lanes = math.gcd(d, 8)
    pieces = d // lanes
    rows_of_lanes = rows_BxRxD.reshape(b, r * pieces, lanes)
    grad = grad_BxOxC.reshape(b, o, groups, d).astype(dtype)
    one_by_one = jax.lax.optimization_barrier(jax.tree.map(lambda a: jnp.moveaxis(a, -1, 0), (*_found(at, size), at.m)))

    def along(rows: jax.Array, cell: jax.Array, grad: jax.Array) -> jax.Array:
        total: Any = 0.0
        for piece in range(pieces):
            total += _look(rows, cell + piece) * grad[:, :, :, None, piece]  # wide, as grad is
        return total

    def point(dv: jax.Array, one: tuple[jax.Array, ...]) -> tuple[jax.Array, Samples]:
        cell, below, right, m = one
        cells = (cell[..., None] + np.array(_steps(size, groups), np.int32)) * pieces
        summed = apart(along, rows_of_lanes, cells, grad.reshape(b, o, groups, pieces, lanes)) @ jnp.ones(lanes, dtype)
        a, b_, c, d_ = (summed[..., corner] for corner in range(4))
        upper, lower = a + right * (b_ - a), c + right * (d_ - c)
        read = Samples(lower - upper, (1 - below) * (b_ - a) + below * (d_ - c), upper + below * (lower - upper))
        share = apart(lambda below, right, m: _shares(below, right) * m[..., None], below, right, m)
        more = share[..., None] * grad[:, :, :, None]
        return _add_at(dv, cell.reshape(b, -1), more.reshape(b, -1, 4 * d)), read

    dv, read = jax.lax.scan(point, jnp.zeros((b, r, 4 * d), dtype), one_by_one)
    dv = dv.reshape(b, height + 3, width + 3, groups, 4, d)
    # Every row has taken what goes to its cell and to three neighbours of it.
    parts = [dv[:, 1 - i : height + 1 - i, 1 - j : width + 1 - j, :, 2 * i + j] for i in range(2) for j in range(2)]
    read = jax.tree.map(lambda a: jnp.moveaxis(a, 0, -1), read)
    dx_BxQxC = sum(parts[1:], parts[0]).reshape(x_BxQxC.shape).astype(x_BxQxC.dtype)
    return dx_BxQxC, inside(at, read)
