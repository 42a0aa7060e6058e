"""How gradients become updates: AdamW, and LARS for linear probes, as links for `optax.chain`. Both
end in the learning rate, and leave the factors that a layer has to whoever chains them."""

from collections.abc import Callable
from typing import Any

import jax
import optax

Rate = Callable[[Any], Any]
Mask = Callable[[Any], Any]
Links = tuple[optax.GradientTransformation, ...]


def adamw(
    rate: Rate | float,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    mask: Mask | None = None,
) -> Links:
    """AdamW: `p <- p - rate * (m / (sqrt(v) + eps) + weight_decay * p)`, bias-corrected, with decay
    where the mask says so."""
    return (
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask=mask),
        optax.scale_by_learning_rate(rate),
    )


def lars(
    rate: Rate | float,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust: float = 0.001,
    mask: Mask | None = None,
) -> Links:
    """LARS as MoCo v3 and MAE train linear probes (M3I Table 9).

    For the parameters of the mask: `g <- g + weight_decay * p`, then `g <- g * trust * |p| / |g|`,
    or g itself if either norm is 0. For
    all: `u <- momentum * u + g`, `p <- p - rate * u`: the rate stands outside the momentum, so that
    a schedule acts at once.

    Args: rate: learning rate, or a schedule of the step. momentum: of the buffer. weight_decay:
      added to the gradient. trust: coefficient of the ratio. mask: params -> tree of booleans:
      those with decay and trust ratio; None: matrices, not vectors.

    >>> import jax.numpy as jnp
    >>> tx = optax.chain(*lars(1.0))
    >>> params = {"kernel": jnp.full((1, 1), 2.0), "bias": jnp.ones(1)}
    >>> updates, _ = tx.update({"kernel": jnp.full((1, 1), 5.0), "bias": jnp.ones(1)}, tx.init(params), params)
    >>> round(float(updates["kernel"][0, 0]), 6), float(updates["bias"][0])
    (-0.002, -1.0)
    """
    chosen = mask or matrix_mask
    return (
        optax.add_decayed_weights(weight_decay, mask=chosen),
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust), chosen),
        optax.trace(decay=momentum),
        optax.scale_by_learning_rate(rate),
    )


def matrix_mask(params: Any) -> Any:
    """A tree of booleans: which parameters have more than one axis."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
