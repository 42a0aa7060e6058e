"""RoIAlign on CPUs: the two products of `map_sampling`, but only with the windows of a map that
boxes cover, one window at a time. Whole maps would be multiplied by matrices that are mostly zeros.

The number of windows depends on the boxes, so these are loops that JAX does not differentiate; each
is the other's gradient.

B images, H W size of a map, C channels, N boxes of all images, T bins along an axis, K side of a
window.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_SIDE = 16  # of a window, in cells


class Weights(NamedTuple):
    """Weights with which boxes read one map.

    Attributes:
      image_N: the image of each box.
      rows_NxTxH, columns_NxTxW: weights of the cells along each axis.
      first_Nx2, last_Nx2: (row, column) of the first and last cells with weight.
      active_N: bool, which boxes are read from this map.
    """

    image_N: jax.Array
    rows_NxTxH: jax.Array
    columns_NxTxW: jax.Array
    first_Nx2: jax.Array
    last_Nx2: jax.Array
    active_N: jax.Array


def _each_window(weights: Weights, visit: Callable[..., Any], carry: Any) -> Any:
    """`visit(carry, box, image, row, column, rows_TxK, columns_TxK)` for every window of every
    active box; row and column are its first cell."""
    size = (weights.rows_NxTxH.shape[2], weights.columns_NxTxW.shape[2])
    side = [min(_SIDE, n) for n in size]
    spans_Nx2 = weights.last_Nx2 - weights.first_Nx2 + 1
    windows_Nx2 = jnp.maximum(-(-spans_Nx2 // jnp.array(side)), 0)

    def matrix(table_NxTxS: jax.Array, n: jax.Array, axis: int, i: jax.Array) -> tuple[Any, Any]:
        wanted = weights.first_Nx2[n, axis] + i * side[axis]
        # the last window of a map begins earlier, without the cells of the one before
        start = jnp.minimum(wanted, size[axis] - side[axis])
        part = jax.lax.dynamic_slice(
            table_NxTxS, (n, 0, start), (1, table_NxTxS.shape[1], side[axis])
        )[0]
        return start, jnp.where(jnp.arange(side[axis]) + start >= wanted, part, 0)

    def box(n: jax.Array, carry: Any) -> Any:
        def window(i: jax.Array, carry: Any) -> Any:
            row, rows = matrix(weights.rows_NxTxH, n, 0, i // windows_Nx2[n, 1])
            column, columns = matrix(weights.columns_NxTxW, n, 1, i % windows_Nx2[n, 1])
            return visit(carry, n, weights.image_N[n], row, column, rows, columns)

        count = jnp.where(weights.active_N[n], windows_Nx2[n, 0] * windows_Nx2[n, 1], 0)
        return jax.lax.fori_loop(0, count, window, carry)

    return jax.lax.fori_loop(0, weights.image_N.shape[0], box, carry)


def read_windows(y_NxTxTxC: jax.Array, map_BxHxWxC: jax.Array, weights: Weights) -> jax.Array:
    """Adds what the active boxes read from a map to y, float32.

    >>> one = jnp.ones((1, 1, 2))
    >>> corners = (jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), jnp.int32))
    >>> weights = Weights(jnp.array([0]), one, one, *corners, jnp.array([True]))
    >>> cells = jnp.arange(4.0).reshape(1, 2, 2, 1)
    >>> read_windows(jnp.zeros((1, 1, 1, 1)), cells, weights).item()
    6.0
    """
    c = map_BxHxWxC.shape[3]

    def visit(y: jax.Array, n: Any, image: Any, row: Any, column: Any, rows: Any, columns: Any):
        side = rows.shape[1], columns.shape[1]
        cells = jax.lax.dynamic_slice(map_BxHxWxC, (image, row, column, 0), (1, *side, c))
        read = rows @ cells.astype(jnp.float32).reshape(side[0], -1)
        read = jnp.einsum("yjc,xj->yxc", read.reshape(-1, side[1], c), columns)
        return y.at[n].add(read, mode="promise_in_bounds")

    return _each_window(weights, visit, y_NxTxTxC)


def add_windows(grad_NxTxTxC: jax.Array, size: tuple[int, int, int], weights: Weights) -> jax.Array:
    """Returns the gradient of a map [B, H, W, C], float32, for that of what boxes read from it.
    `size`: B, H and W.

    >>> one = jnp.ones((1, 1, 2))
    >>> corners = (jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), jnp.int32))
    >>> weights = Weights(jnp.array([0]), one, one, *corners, jnp.array([True]))
    >>> add_windows(jnp.full((1, 1, 1, 1), 3.0), (1, 2, 2), weights).ravel().tolist()
    [3.0, 3.0, 3.0, 3.0]
    """
    c = grad_NxTxTxC.shape[3]

    def visit(d: jax.Array, n: Any, image: Any, row: Any, column: Any, rows: Any, columns: Any):
        side = rows.shape[1], columns.shape[1]
        g = jax.lax.dynamic_index_in_dim(grad_NxTxTxC, n, keepdims=False).astype(jnp.float32)
        wide = jnp.einsum("yxc,xj->yjc", g, columns)
        cells = (rows.T @ wide.reshape(-1, side[1] * c)).reshape(1, *side, c)
        at = (image, row, column, 0)
        cells += jax.lax.dynamic_slice(d, at, cells.shape)
        return jax.lax.dynamic_update_slice(d, cells, at)

    return _each_window(weights, visit, jnp.zeros((*size, c)))
