"""Information that the predictions carry about their targets, in bits: Eq. 2 as a number for the
log.

    I(z_x; z_y) >= H(z_y) + E log P^(z_y | prediction)
    estimate = (mean of -log marginal - mean of -log posterior) / ln 2

The posterior term is the loss. The marginal, the best prediction of a target without the input, is
unknown and has to be modelled; `MARGINALS` describes the model of each function. A marginal that
fits the targets badly costs more than their entropy, so an estimate is a lower bound of the
information only as far as its marginal is right. A value below 0 means that the marginal predicts
better than the prediction.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from m3i_jax.objective.numerics import assert_rank, float32

# {function of this module: its model of the marginal}, printed beside the number.
MARGINALS = {
    "gaussian_bits": "isotropic Gaussian around the mean target with the variance of the targets",
    "softmax_bits": (
        "uniform over the candidates of the softmax (InfoNCE: never more than log2 of their number)"
    ),
    "category_bits": "shares of the classes, or mean assignment to the prototypes, in the batch",
}
# float32 has a relative resolution of 2^-24, so no element can be predicted to more than 24 bits.
_FINEST = 2.0**-48


def gaussian_bits(squared_error: ArrayLike, variance: ArrayLike, width: int) -> jax.Array:
    """Information of a Gaussian posterior (M3I section 3.1), `width / 2 * log2(variance / squared
    error)`.

    Posterior and marginal are isotropic Gaussians, around the prediction and around the mean
    target, each with the variance that fits best. Exact for jointly Gaussian, isotropic targets
    with the best linear prediction. The true marginal is narrower if the elements of the targets
    depend on each other or differ in variance; the estimate is then too high.

    Args:
      squared_error: mean of (p - t)^2 over rows and elements.
      variance: mean of (t - mean target)^2 over rows and elements; the mean target is a vector of
        `width` elements.
      width: elements of a target.

    Returns:
      float32, bits a row, at most 24 `width`; 0 if the targets are constant. No gradient.

    >>> print(gaussian_bits(0.25, 1.0, 8), gaussian_bits(2.0, 1.0, 8), gaussian_bits(0.0, 0.0, 8))
    8.0 -4.0 0.0
    """
    error, variance = jax.lax.stop_gradient((float32(squared_error), float32(variance)))
    varies = variance > 0
    ratio = jnp.where(varies, error, 1.0) / jnp.where(varies, variance, 1.0)
    return -width / 2 * jnp.log2(jnp.maximum(ratio, _FINEST))


def softmax_bits(negative_log_likelihood: ArrayLike, log_choices: ArrayLike) -> jax.Array:
    """Information of a Boltzmann posterior over K candidates, `(log K - nll) / ln 2`: the bound of
    InfoNCE.

    A lower bound of the mutual information in expectation, if the negatives are drawn like the
    positive; at most log2 K, so a small batch limits the estimate.

    Args:
      negative_log_likelihood: mean cost of a row in nats, without label smoothing or other terms.
      log_choices: log K, or its mean over the rows.

    Returns:
      float32, bits a row. No gradient.

    >>> import math
    >>> print(softmax_bits(0.0, math.log(256)), softmax_bits(math.log(256), math.log(256)))
    8.0 0.0
    """
    nll, log_choices = jax.lax.stop_gradient(
        (float32(negative_log_likelihood), float32(log_choices))
    )
    return (log_choices - nll) / math.log(2)


def category_bits(negative_log_likelihood: ArrayLike, counts_C: ArrayLike) -> jax.Array:
    """Information about a category, or about the assignment to a prototype: `(H(shares) - nll) / ln
    2`.

    In a batch with fewer images than classes, the shares have a smaller entropy than the classes:
    sum counts and costs over several batches. Soft assignments count with their weights.

    Args:
      negative_log_likelihood: mean cost of a counted row in nats, without label smoothing
        (`losses.category` with smoothing 0).
      counts_C: number, or sum of weights, of the counted rows of each class; rows without a label
        belong to none.

    Returns:
      float32, bits a row; 0 if no class was counted. No gradient.

    Raises:
      ValueError: counts that are not a vector.

    >>> print(category_bits(0.0, jnp.array([5, 5, 5, 5])), category_bits(0.0, jnp.array([8, 0])))
    2.0 0.0
    """
    nll, counts_C = jax.lax.stop_gradient((float32(negative_log_likelihood), float32(counts_C)))
    assert_rank(counts_C, 1, custom_message="counts must be [C]")
    total = counts_C.sum()
    share_C = counts_C / jnp.where(total > 0, total, 1.0)
    entropy = jax.scipy.special.entr(share_C).sum()
    return jnp.where(total > 0, (entropy - nll) / math.log(2), 0.0)
