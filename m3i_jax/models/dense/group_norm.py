"""Group norm of maps, in float32: the channels of an image are normalised in groups over all cells,
so an image does not depend on its batch.

B images, H W size of the map, C channels."""

import math

import jax
import jax.numpy as jnp

from m3i_jax.models.layers import Params

GROUPS, _EPS = 32, 1e-5


def group_norm(params: Params, x_BxHxWxC: jax.Array) -> jax.Array:
    """PyTorch's GroupNorm of 32 groups, or of the greatest common divisor of 32 and C where 32 does
    not divide C; the type of x.

    Args:
      params: `scale` and `bias` [C].
      x_BxHxWxC: the map.

    >>> params = {"scale": jnp.ones(1), "bias": jnp.zeros(1)}
    >>> group_norm(params, jnp.array([1.0, 3.0]).reshape(1, 1, 2, 1)).ravel().round(3).tolist()
    [-1.0, 1.0]
    """
    b, h, w, c = x_BxHxWxC.shape
    wide = x_BxHxWxC.astype(jnp.float32).reshape(b, h * w, math.gcd(GROUPS, c), -1)
    mean = wide.mean((1, 3), keepdims=True)
    variance = jnp.square(wide - mean).mean((1, 3), keepdims=True)
    unit = ((wide - mean) * jax.lax.rsqrt(variance + _EPS)).reshape(x_BxHxWxC.shape)
    return (unit * params["scale"] + params["bias"]).astype(x_BxHxWxC.dtype)
