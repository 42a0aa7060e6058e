"""Multi-scale deformable attention (Zhu et al., Deformable DETR, ICLR 2021), the sampling alone, as
a pure function with gradients: every query of every head reads each of several maps at a few places
of its own, bilinearly, and adds what it reads with its own weights.

B images, N tokens: the cells of all maps, one map after the other, each row by row; H heads, C
channels of a head, Q queries, L maps (levels), P points.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax.models.dcnv3 import METHODS
from m3i_jax.models.dcnv3_dense import Samples, widen
from m3i_jax.models.sampled_sums import (
    SampledSum,
    kernel_fits,
    kernel_is_trusted,
    sampled_sum,
)

Shapes = tuple[tuple[int, int], ...]

# of random numbers that try values, locations and weights
_BOUNDS = (-2.0, 2.0), (-0.1, 1.1), (0.0, 0.5)
_SMALL = 2**18  # entries of the matrix of one head of one image
_BAND_QUERIES = 512  # queries of a band: in an encoder, neighbours


class _Located(NamedTuple):
    """Where deformable attention samples a map of this size."""

    size: tuple[int, int]

    def channels_last(self, at_BxQxHxPx2: jax.Array, weights_BxQxHxP: jax.Array) -> Samples:
        """Returns coordinates in cells and weights, [B, Q, H, P]."""
        y, x = (at_BxQxHxPx2[..., i] * n - 0.5 for i, n in ((1, self.size[0]), (0, self.size[1])))
        return Samples(y, x, weights_BxQxHxP)

    def cells_last(self, at_BxQxHxPx2: jax.Array, weights_BxQxHxP: jax.Array) -> Samples:
        """Returns the same as [B, H, P, Q]."""
        moved = jnp.transpose(at_BxQxHxPx2, (0, 4, 2, 3, 1))
        y, x = (moved[:, i] * n - 0.5 for i, n in ((1, self.size[0]), (0, self.size[1])))
        return Samples(y, x, jnp.moveaxis(weights_BxQxHxP, 1, 3))


def _methods(cells: int, queries: int, use_kernel: bool) -> tuple[tuple[str, str], ...]:
    """The form for each platform. On a CPU it is the loop, on TPUs and GPUs the kernel where it can
    be used; else products with the whole matrix where that is small, on a TPU bands of it, on a GPU
    gathers."""
    kernel = "kernel" if use_kernel else ""
    small = "dense" if queries * cells <= _SMALL else ""
    return (
        ("cpu", "fused"),
        ("tpu", kernel or small or "band"),
        ("default", kernel or small or "gather"),
    )


def deformable_attention(
    value_BxNxHxC: jax.Array,
    shapes: Shapes,
    locations_BxQxHxLxPx2: jax.Array,
    weights_BxQxHxLxP: jax.Array,
    *,
    method: str = "auto",
) -> jax.Array:
    """Returns what every query reads, [B, Q, H C] in the type of the values, the channels of a head
    side by side: the sum over levels and points of weight times the map's value at the location.

    A location (0, 0) is the upper left corner of a map and (1, 1) its lower right one; the value of
    a cell belongs to its centre, and outside of the map are zeros (torch's `grid_sample` at 2 *
    location - 1 with align_corners False). Values, locations and weights get gradients. Locations,
    weights and sums are float32 for every type of the values.

    Args:
      value_BxNxHxC: the cells of all maps, N = sum of height * width.
      shapes: (height, width) of every map; static.
      locations_BxQxHxLxPx2: (x, y) of every point.
      weights_BxQxHxLxP: of every point, after the softmax over levels and points.
      method: as of `dcnv3.dcnv3`, which samples in the same forms; the numbers are equal to
        rounding.

    Raises:
      ValueError: shapes that do not fit each other, or an unknown method.

    >>> value = jnp.array([0.0, 1.0, 2.0, 3.0, 10.0]).reshape(1, 5, 1, 1)  # 2 x 2 cells and one
    >>> middle = jnp.full((1, 1, 1, 2, 1, 2), 0.5)
    >>> weights = jnp.array([1.0, 0.1]).reshape(1, 1, 1, 2, 1)
    >>> deformable_attention(value, ((2, 2), (1, 1)), middle, weights).tolist()
    [[[2.5]]]
    """
    b, tokens, heads, c = value_BxNxHxC.shape
    sizes = [height * width for height, width in shapes]
    expected = (b, locations_BxQxHxLxPx2.shape[1], heads, len(shapes))
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
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
    wide, points = widen(value_BxNxHxC.dtype), weights_BxQxHxLxP.shape[4]
    locations, weights = locations_BxQxHxLxPx2.astype(wide), weights_BxQxHxLxP.astype(wide)
    rows_of_bands = 2 * -(-expected[1] // _BAND_QUERIES)
    total: Any = 0.0
    for level, (size, map_BxSxHxC) in enumerate(
        zip(shapes, jnp.split(value_BxNxHxC, np.cumsum(sizes)[:-1].tolist(), 1), strict=True)
    ):
        map_BxSxD = map_BxSxHxC.reshape(b, -1, heads * c)
        arrays = map_BxSxD, locations[:, :, :, level], weights[:, :, :, level]
        call = SampledSum((("default", method),), size, rows_of_bands, _Located(size))
        if method == "auto":
            use_kernel = kernel_fits(
                map_BxSxD, size, heads, points, expected[1]
            ) and kernel_is_trusted(call, _BOUNDS, *arrays)
            call = call._replace(methods=_methods(map_BxSxD.shape[1], expected[1], use_kernel))
        read = sampled_sum(call, *arrays)
        total += read.astype(wide)
    return total.astype(value_BxNxHxC.dtype)
