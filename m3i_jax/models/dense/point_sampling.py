"""A map at single points, bilinear with zeros outside, for losses that compare masks at points.

H W size of the map, C channels, P points.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_FEW = 4  # channels up to which four neighbours are read at once


def around_points(points_Px2: jax.Array, size: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Which four cells of a map are around each point, as a row of `packed_neighbours`, int32 [P],
    and their bilinear weights, float32 [P, 4]: 0 for all four of a point far outside.

    Args:
      points_Px2: (x, y); the map spans 0..1.
      size: (height, width) of the map.

    >>> index, weights = around_points(jnp.array([[0.5, 0.25]]), (2, 2))
    >>> index.tolist(), weights.tolist()
    ([4], [[0.5, 0.5, 0.0, 0.0]])
    """
    x, y = (points_Px2.astype(jnp.float32) * np.array(size[::-1], np.float32) - 0.5).T
    left, top = jnp.floor(x), jnp.floor(y)
    right, below = x - left, y - top  # shares of the second cells
    near = (top >= -1) & (top < size[0]) & (left >= -1) & (left < size[1])
    sides = ((1 - below) * (1 - right), (1 - below) * right, below * (1 - right), below * right)
    weights_Px4 = jnp.where(near[:, None], jnp.stack(sides, -1), 0)
    row, column = (jnp.clip(at, -1, n - 1) + 1 for at, n in zip((top, left), size, strict=True))
    return (row * (size[1] + 1) + column).astype(jnp.int32), weights_Px4


def packed_neighbours(map_HxWxC: jax.Array, outside: int = 0) -> jax.Array:
    """Every two by two cells of a map side by side, [(H + 1) (W + 1), 4, C], with a border of cells
    of the value `outside`: one read of a point has all that it needs.

    >>> packed_neighbours(jnp.array([[1, 2]])[..., None], -1)[1, :, 0].tolist()
    [-1, -1, 1, 2]
    """
    padded = jnp.pad(map_HxWxC, ((1, 1), (1, 1), (0, 0)), constant_values=outside)
    rows = padded[:-1], padded[1:]
    parts = [part for row in rows for part in (row[:, :-1], row[:, 1:])]
    return jnp.stack(parts, 2).reshape(-1, 4, map_HxWxC.shape[2])


@jax.jit
def sample_points(map_HxWxC: jax.Array, points_Px2: jax.Array) -> jax.Array:
    """A map at single points, [P, C] in the type of the map: bilinear, zeros outside, with
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
    if c <= _FEW:
        index_P, weights_Px4 = around_points(points_Px2, (h, w))
        cells_Px4xC = packed_neighbours(map_HxWxC)[index_P].astype(jnp.float32)
        return (weights_Px4[..., None] * cells_Px4xC).sum(1).astype(map_HxWxC.dtype)
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
