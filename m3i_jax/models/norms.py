"""RMS norm. Layer and batch norm, and the choice of a tower's norm, are in `layers`."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from m3i_jax.objective.manual_axes import custom_vjp

_EPS = 1e-6


@functools.partial(custom_vjp, nondiff_argnums=(2,))
def rms_norm(x_xD: jax.Array, scale_D: jax.Array, eps: float = _EPS) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, computed in float32: a layer norm
    without mean and offset (Zhang and Sennrich, 2019).

    The backward pass keeps x in its own type and one number a row.

    Args:
      x_xD: [..., D], any float type.
      scale_D: float32 [D].

    Returns:
      the shape and type of x.

    >>> rms_norm(jnp.array([[7.0, 1.0]]), jnp.array([1.0, 5.0])).round(1).tolist()
    [[1.399..., 1.0]]
    """
    return _forward(x_xD, scale_D, eps)[0]


def _forward(x_xD: jax.Array, scale_D: jax.Array, eps: float) -> tuple[jax.Array, Any]:
    wide_xD = x_xD.astype(jnp.float32)
    rms = jax.lax.rsqrt(jnp.square(wide_xD).mean(-1, keepdims=True) + eps)
    return (wide_xD * rms * scale_D).astype(x_xD.dtype), (x_xD, rms, scale_D)


def _backward(eps: float, kept: Any, g_xD: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_xD, rms, scale_D = kept
    g = g_xD.astype(jnp.float32)
    unit_xD = x_xD.astype(jnp.float32) * rms
    inner_xD = g * scale_D
    along = (inner_xD * unit_xD).mean(-1, keepdims=True)
    dx_xD = rms * (inner_xD - unit_xD * along)
    rows = tuple(range(g.ndim - 1))
    return dx_xD.astype(x_xD.dtype), (g * unit_xD).sum(rows).astype(scale_D.dtype)


rms_norm.defvjp(_forward, _backward)


class RMSNorm(nn.Module):
    """`rms_norm` with its parameter `scale`, float32."""

    eps: float = _EPS

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # a declaration; `initializers.init_params` sets values
        return rms_norm(x, self.param("scale", nn.initializers.zeros, (x.shape[-1],)), self.eps)
