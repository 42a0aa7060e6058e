"""Maps at points of their own: the masks of Mask2Former where their losses compare them.

Reading and its gradient are each kept from being fused with what surrounds them. XLA's CPU compiler
would else locate the four cells of a point again for every operation that uses the value: the
losses of Mask2Former took four times as long.

M maps, H W their size, P points.
"""

import jax
import jax.numpy as jnp

from m3i_jax.models.cpu_codegen import fusion_barrier
from m3i_jax.objective.manual_axes import custom_vjp


def _corners(points_Px2: jax.Array, h: int, w: int) -> list[tuple[jax.Array, jax.Array]]:
    """(cells, weights) [P] of the four cells around every point, on a map of [H + 2, W + 2] cells
    with a ring of zeros."""
    x, y = points_Px2.astype(jnp.float32).T
    # beyond the ring everything is zero
    x, y = jnp.clip(x * w - 0.5, -1, w), jnp.clip(y * h - 0.5, -1, h)
    left, top = jnp.minimum(jnp.floor(x), w - 1), jnp.minimum(jnp.floor(y), h - 1)
    right, below = x - left, y - top
    first = ((top + 1) * (w + 2) + left + 1).astype(jnp.int32)
    return [
        (first, (1 - below) * (1 - right)),
        (first + 1, (1 - below) * right),
        (first + w + 2, below * (1 - right)),
        (first + w + 3, below * right),
    ]


def _read(map_HxW: jax.Array, points_Px2: jax.Array) -> jax.Array:
    cells = jnp.pad(map_HxW.astype(jnp.float32), 1).ravel()
    total = jnp.zeros(len(points_Px2))
    for index, weight in _corners(points_Px2, *map_HxW.shape):
        total += weight * cells.at[index].get(mode="promise_in_bounds")
    return total


def _add(grad_P: jax.Array, points_Px2: jax.Array, h: int, w: int) -> jax.Array:
    cells = jnp.zeros((h + 2) * (w + 2))
    for index, weight in _corners(points_Px2, h, w):
        cells = cells.at[index].add(weight * grad_P, mode="promise_in_bounds")
    return cells.reshape(h + 2, w + 2)[1:-1, 1:-1]


@custom_vjp
def read_maps(maps_MxHxW: jax.Array, points_MxPx2: jax.Array) -> jax.Array:
    """Returns every map at points of its own, float32 [M, P]: `map_sampling.sample_points` with
    gradients for the maps alone.

    Args:
      maps_MxHxW: the maps.
      points_MxPx2: (x, y); a map spans 0..1.

    >>> corners = jnp.array([[[0.0, 1.0], [2.0, 3.0]]])
    >>> read_maps(corners, jnp.array([[[0.5, 0.5], [0.0, 0.25]]])).tolist()
    [[1.5, 0.0]]
    """
    return fusion_barrier(jax.vmap(_read), maps_MxHxW, points_MxPx2)


def _backward(
    kept: tuple[jax.Array, jax.Array], grad_MxP: jax.Array
) -> tuple[jax.Array, jax.Array]:
    like_MxHxW, points_MxPx2 = kept
    h, w = like_MxHxW.shape[1:]
    add = jax.vmap(lambda grad_P, points_Px2: _add(grad_P, points_Px2, h, w))
    grad_MxHxW = fusion_barrier(add, grad_MxP, points_MxPx2)
    return grad_MxHxW.astype(like_MxHxW.dtype), jnp.zeros_like(points_MxPx2)


read_maps.defvjp(
    lambda maps, points: (read_maps(maps, points), (maps, points)),
    _backward,
)
