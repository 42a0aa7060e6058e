"""A 3 x 3 convolution of a map that was enlarged first, without ever making the large map.

Interpolation acts on cells and a convolution's kernel on channels, so their order is free: the
channels are mixed on the small map, for each of the nine taps, and the results are interpolated,
shifted and added by two products with small matrices. For a map that is enlarged n times along each
axis this takes about 1 / n^2 of the multiply-adds, and the backward pass keeps the small map only.
The result is that of the two operations, in another order of summation.

B images, H W size of the small map, C channels, D channels of the result, U V size of the result.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import parallel
from m3i_jax.models.cpu_codegen import matmul
from m3i_jax.models.dcnv3_dense import widen
from m3i_jax.models.dense.map_sampling import resize_matrix
from m3i_jax.models.intern_image_layer import convolve


def _taps(size: int, out: int) -> np.ndarray:
    """Weights [out, size, 3] of the cells that a tap of the kernel meets at each place, zero where
    it is outside of the large map."""
    padded = np.pad(resize_matrix(size, out), ((1, 1), (0, 0)))
    return np.stack([padded[tap : tap + out] for tap in range(3)], -1)


def _apply_matrix(matrix_UxK: np.ndarray, x_NxKxD: jax.Array) -> jax.Array:
    """The matrix times every [K, D], in the type of x; sums are float32."""
    settings: dict[str, Any] = {
        "precision": None if x_NxKxD.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST,
        "preferred_element_type": widen(x_NxKxD.dtype),
    }
    matrix = jnp.asarray(matrix_UxK, x_NxKxD.dtype)
    if parallel.platform() == "cpu":  # else the compiler would transpose the product
        repeated = jnp.broadcast_to(matrix, (x_NxKxD.shape[0], *matrix.shape))
        y = jnp.einsum("nuk,nkd->nud", repeated, x_NxKxD, **settings)
    else:
        y = jnp.einsum("uk,nkd->nud", matrix, x_NxKxD, **settings)
    return y.astype(x_NxKxD.dtype)


def convolve_resized(
    kernel_3x3xCxD: jax.Array, x_BxHxWxC: jax.Array, size: tuple[int, int]
) -> jax.Array:
    """`convolve` of `map_sampling.resize_bilinear(x, size)`: 3 x 3, stride 1, padding 1, without
    bias, [B, U, V, D] in the type of x.

    Args:
      kernel_3x3xCxD: the kernel.
      x_BxHxWxC: the small map; one of the size itself is convolved as it is.
      size: (U, V) of the large map.

    >>> x = jnp.array([0.0, 4.0]).reshape(1, 1, 2, 1)
    >>> convolve_resized(jnp.ones((3, 3, 1, 1)), x, (1, 4)).ravel().tolist()  # of 0 1 3 4
    [1.0, 4.0, 8.0, 7.0]
    """
    b, h, w, c = x_BxHxWxC.shape
    if (h, w) == tuple(size):
        return convolve({"kernel": kernel_3x3xCxD}, x_BxHxWxC, 1)
    d = kernel_3x3xCxD.shape[-1]
    kernel = kernel_3x3xCxD.astype(x_BxHxWxC.dtype)
    columns_Vx3W = _taps(w, size[1]).reshape(size[1], 3 * w)
    rows_Ux3H = _taps(h, size[0]).reshape(size[0], 3 * h)
    by_row = []
    for row in range(3):
        mixed = matmul(x_BxHxWxC.reshape(-1, c), kernel[row].swapaxes(0, 1).reshape(c, 3 * d))
        by_row.append(_apply_matrix(columns_Vx3W, mixed.reshape(-1, 3 * w, d)))
    stacked = jnp.stack([y.reshape(b, h, size[1] * d) for y in by_row], 2)
    return _apply_matrix(rows_Ux3H, stacked.reshape(b, 3 * h, -1)).reshape(b, *size, d)
