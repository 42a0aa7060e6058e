"""Norms of the channels of maps, in float32: batch norm and group norm.

Batch norm has running statistics, which go in and out as a tree beside the parameters: models keep
no state. In training a channel is normalised by the mean and the biased variance of its values in
the batch (one microbatch, over all devices), and the running statistics move towards the batch's
mean and unbiased variance; in evaluation it is normalised by the running ones (torch's
BatchNorm2d). Group norm normalises the channels of an image in groups over all cells, so an image
does not depend on its batch.

B images, H W size of the map, C channels.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax.models.layers import Params
from m3i_jax.objective.manual_axes import custom_vjp

_EPS = 1e-5
_GROUPS = 32


def norm_shapes(channels: int) -> dict[str, tuple[int, ...]]:
    """Returns the parameters of one batch norm, as shapes.

    >>> norm_shapes(8)
    {'scale': (8,), 'bias': (8,)}
    """
    return {"scale": (channels,), "bias": (channels,)}


def initial_statistics(channels: int) -> dict[str, jax.Array]:
    """Returns running statistics before the first step: mean 0, variance 1, float32.

    >>> initial_statistics(2)["variance"].tolist()
    [1.0, 1.0]
    """
    return {"mean": jnp.zeros(channels), "variance": jnp.ones(channels)}


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def _normalize(
    relu: bool, x_xC: jax.Array, scale_C: jax.Array, bias_C: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalised values, mean and biased variance of the batch; the latter two have no gradient."""
    return _normalize_forward(relu, x_xC, scale_C, bias_C)[0]


def _normalize_forward(
    relu: bool, x_xC: jax.Array, scale_C: jax.Array, bias_C: jax.Array
) -> tuple[Any, Any]:
    wide_xC, rows = x_xC.astype(jnp.float32), tuple(range(x_xC.ndim - 1))
    mean_C = wide_xC.mean(rows)
    variance_C = jnp.square(wide_xC - mean_C).mean(rows)
    y_xC = _affine(relu, x_xC, mean_C, variance_C, scale_C, bias_C)
    return (y_xC, mean_C, variance_C), (x_xC, mean_C, variance_C, scale_C, bias_C)


def _affine(
    relu: bool,
    x_xC: jax.Array,
    mean_C: jax.Array,
    variance_C: jax.Array,
    scale_C: jax.Array,
    bias_C: jax.Array,
) -> jax.Array:
    factor_C = scale_C * jax.lax.rsqrt(variance_C + _EPS)
    y_xC = (x_xC.astype(jnp.float32) - mean_C) * factor_C + bias_C
    return (jnp.maximum(y_xC, 0) if relu else y_xC).astype(x_xC.dtype)


def _normalize_backward(relu: bool, kept: Any, grads: Any) -> tuple[jax.Array, ...]:
    x_xC, mean_C, variance_C, scale_C, bias_C = kept
    g_xC, rows = grads[0].astype(jnp.float32), tuple(range(x_xC.ndim - 1))
    rstd_C = jax.lax.rsqrt(variance_C + _EPS)
    unit_xC = (x_xC.astype(jnp.float32) - mean_C) * rstd_C
    if relu:
        g_xC = jnp.where(unit_xC * scale_C + bias_C > 0, g_xC, 0)
    count = math.prod(x_xC.shape[:-1])
    along_C, total_C = (g_xC * unit_xC).sum(rows), g_xC.sum(rows)
    dx_xC = scale_C * rstd_C * (g_xC - (total_C + unit_xC * along_C) / count)
    return dx_xC.astype(x_xC.dtype), along_C, total_C


_normalize.defvjp(_normalize_forward, _normalize_backward)


def running_batch_norm(
    params: Params,
    statistics: Params,
    x_xC: jax.Array,
    *,
    train: bool,
    momentum: float = 0.1,
    relu: bool = False,
) -> tuple[jax.Array, Params]:
    """Affine batch norm over all axes but the last, computed in float32; and the statistics after
    it.

    Args:
      params: `scale` and `bias`, float32 [C].
      statistics: running `mean` and `variance`, float32 [C].
      x_xC: [..., C], any float type; more than one row in training.
      train: normalise by the batch, and update the statistics.
      momentum: share of the batch in the new statistics.
      relu: return max(y, 0), of which the backward pass keeps no copy.

    Returns:
      the shape and type of x; the new statistics, in evaluation the old ones.

    >>> params = {"scale": jnp.ones(1), "bias": jnp.zeros(1)}
    >>> x = jnp.array([[1.0], [3.0]])
    >>> y, after = running_batch_norm(params, initial_statistics(1), x, train=True)
    >>> y.ravel().round(3).tolist(), after["mean"].tolist(), after["variance"].tolist()
    ([-1.0, 1.0], [0.2], [1.1])
    """
    scale_C, bias_C = params["scale"], params["bias"]
    if not train:
        mean_C, variance_C = statistics["mean"], statistics["variance"]
        return _affine(relu, x_xC, mean_C, variance_C, scale_C, bias_C), statistics
    y_xC, mean_C, variance_C = _normalize(relu, x_xC, scale_C, bias_C)
    count = math.prod(x_xC.shape[:-1])
    batch = {"mean": mean_C, "variance": variance_C * (count / max(count - 1, 1))}
    new = {
        name: (1 - momentum) * statistics[name] + momentum * jax.lax.stop_gradient(value)
        for name, value in batch.items()
    }
    return y_xC, new


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
    wide = x_BxHxWxC.astype(jnp.float32).reshape(b, h * w, math.gcd(_GROUPS, c), -1)
    mean = wide.mean((1, 3), keepdims=True)
    variance = jnp.square(wide - mean).mean((1, 3), keepdims=True)
    unit = ((wide - mean) * jax.lax.rsqrt(variance + _EPS)).reshape(x_BxHxWxC.shape)
    return (unit * params["scale"] + params["bias"]).astype(x_BxHxWxC.dtype)
