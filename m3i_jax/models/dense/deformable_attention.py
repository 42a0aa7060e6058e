"""Multi-scale deformable attention (Zhu et al., Deformable DETR, ICLR 2021), the sampling alone, as
a pure function with gradients: every query of every head reads each of several maps at a few places
of its own, bilinearly, and adds what it reads with its own weights.

B images, N tokens: the cells of all maps, one map after the other, each row by row; H heads, C
channels of a head, Q queries, L maps (levels), P points.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax.models.dcnv3_dense import widen

Shapes = tuple[tuple[int, int], ...]


def _read(map_BxSxHxC: jax.Array, at_BxQxHxPx2: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """One map at places in 0..1, [B, Q, H, P, C]."""
    height, width = shape
    y, x = (at_BxQxHxPx2[..., i] * n - 0.5 for i, n in ((1, height), (0, width)))
    b, _, heads, c = map_BxSxHxC.shape
    top, left = jnp.clip(jnp.floor(y), -2, height), jnp.clip(jnp.floor(x), -2, width)
    total = 0.0
    for down, over in itertools.product((0, 1), repeat=2):
        row, column = top + down, left + over
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        weight = jnp.where(inside, (1 - jnp.abs(y - row)) * (1 - jnp.abs(x - column)), 0)
        index = jnp.clip(row, 0, height - 1) * width + jnp.clip(column, 0, width - 1)
        index_BxNxH = index.astype(jnp.int32).swapaxes(2, 3).reshape(b, -1, heads)
        cells = jnp.take_along_axis(map_BxSxHxC, index_BxNxH[..., None], 1)
        cells = cells.reshape(b, y.shape[1], -1, heads, c).swapaxes(2, 3)
        total += weight[..., None] * cells.astype(weight.dtype)
    return total


def deformable_attention(
    value_BxNxHxC: jax.Array,
    shapes: Shapes,
    locations_BxQxHxLxPx2: jax.Array,
    weights_BxQxHxLxP: jax.Array,
) -> jax.Array:
    """What every query reads, [B, Q, H C] in the type of the values, the channels of a head side by
    side: the sum over levels and points of weight times the map's value at the location.

    A location (0, 0) is the upper left corner of a map and (1, 1) its lower right one; the value of
    a cell belongs to its centre, and outside of the map are zeros (torch's `grid_sample` at 2 *
    location - 1 with align_corners False). Values, locations and weights get gradients. Locations,
    weights and sums are float32 for every type of the values.

    Args:
      value_BxNxHxC: the cells of all maps, N = sum of height * width.
      shapes: (height, width) of every map; static.
      locations_BxQxHxLxPx2: (x, y) of every point.
      weights_BxQxHxLxP: of every point, after the softmax over levels and points.

    Raises:
      ValueError: shapes that do not fit each other.

    >>> value = jnp.array([0.0, 1.0, 2.0, 3.0, 10.0]).reshape(1, 5, 1, 1)  # 2 x 2 cells and one
    >>> middle = jnp.full((1, 1, 1, 2, 1, 2), 0.5)
    >>> weights = jnp.array([1.0, 0.1]).reshape(1, 1, 1, 2, 1)
    >>> deformable_attention(value, ((2, 2), (1, 1)), middle, weights).tolist()
    [[[2.5]]]
    """
    b, tokens, heads, c = value_BxNxHxC.shape
    sizes = [height * width for height, width in shapes]
    expected = (b, locations_BxQxHxLxPx2.shape[1], heads, len(shapes))
    if sum(sizes) != tokens:
        raise ValueError(
            f"the maps {list(shapes)} have {sum(sizes)} cells and the values {tokens} tokens"
        )
    for name, array, rank in (
        ("locations", locations_BxQxHxLxPx2, 6),
        ("weights", weights_BxQxHxLxP, 5),
    ):
        if array.ndim != rank or array.shape[:4] != expected:
            raise ValueError(
                f"{name} have shape {array.shape}; for {len(shapes)} maps and values of"
                f" {value_BxNxHxC.shape} it must be {(*expected, 'points', 2)[:rank]}"
            )
    wide = widen(value_BxNxHxC.dtype)
    locations, weights = locations_BxQxHxLxPx2.astype(wide), weights_BxQxHxLxP.astype(wide)
    total = jnp.zeros((), wide)
    for level, (shape, map_BxSxHxC) in enumerate(
        zip(shapes, jnp.split(value_BxNxHxC, np.cumsum(sizes)[:-1].tolist(), 1), strict=True)
    ):
        read = _read(map_BxSxHxC, locations[:, :, :, level], shape)
        total += (weights[:, :, :, level, :, None] * read).sum(3)
    return total.reshape(b, -1, heads * c).astype(value_BxNxHxC.dtype)
