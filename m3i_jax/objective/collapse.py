"""Collapse monitors. The regularization term H(p(z_y | t_y)) of Eq. 2 can only be estimated
(`entropy`), so a collapse of the targets has to be detected in other ways, too.

What prevents collapse is part of the posteriors (stop-gradient and second moment in
`losses.gaussian`, negatives in `losses.boltzmann`; Table 1) or a term of its own
(`entropy_terms`). The values of collapsed targets:

- dense targets: `target_std` 0, `centered_energy` 0, `effective_rank` 1;
- global targets: `alignment` 0 and `uniformity` 0 together. Alignment 0 alone is the aim of
  training.

No function here has a gradient.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from m3i_jax.objective import entropy
from m3i_jax.objective.numerics import (
    assert_equal_shape,
    assert_rank,
    assert_shape,
    float32,
    l2_normalize,
    zero_masked_rows,
)


def target_std(target_TxD: ArrayLike, where_T: ArrayLike | None = None) -> jax.Array:
    """Computes the standard deviation of the targets over tokens, averaged over the D dimensions.

    Pass targets *before* layer norm: normalised targets have a large deviation within a token even
    if all tokens are equal.

    Args:
      target_TxD: [..., D] targets.
      where_T: [...] weights >= 0 of the tokens; None counts every token once.

    Returns:
      float32 scalar >= 0, in the units of the features; 0 if all tokens are equal (or none counts).

    Raises:
      ValueError: weights of another shape than the tokens.

    >>> import jax.numpy as jnp
    >>> float(target_std(jnp.array([[1., 5.], [3., 5.]])))
    0.5
    """
    x_TxD = jax.lax.stop_gradient(float32(target_TxD))
    x_TxD, _, weight_T = zero_masked_rows(x_TxD, x_TxD, where_T)
    rows = tuple(range(x_TxD.ndim - 1))
    share_Tx1 = (weight_T / jnp.maximum(weight_T.sum(), np.finfo(np.float32).tiny))[..., None]
    mean_D = (share_Tx1 * x_TxD).sum(rows)
    return jnp.sqrt((share_Tx1 * jnp.square(x_TxD - mean_D)).sum(rows)).mean()


def effective_rank(moment_DxD: ArrayLike) -> jax.Array:
    """Computes the effective rank of the targets: the exponential of the entropy of the normalised
    eigenvalues of their second moment.

    The eigenvalue decomposition costs about D^3: call it at log intervals, not in every step.

    Args:
      moment_DxD: symmetric second moment, `losses.second_moment` of the targets.

    Returns:
      float32 scalar: D if all directions carry the same energy, 1 if all energy lies in one
      direction, 0 for a zero matrix.

    Raises:
      ValueError: not a square matrix.

    >>> import jax.numpy as jnp
    >>> print(f"{effective_rank(jnp.eye(8)):.2f} {effective_rank(jnp.ones((8, 8))):.2f}")
    8.00 1.00
    """
    c_DxD = jax.lax.stop_gradient(float32(moment_DxD))
    assert_shape(c_DxD, 2 * c_DxD.shape[-1:], custom_message="moment_DxD must be square")
    # Rounding makes small eigenvalues negative; their logarithm would be NaN.
    energy_D = jnp.maximum(jnp.linalg.eigvalsh(c_DxD), 0.0)
    total = energy_D.sum()
    share_D = energy_D / jnp.where(total > 0, total, 1.0)
    return jnp.where(total > 0, jnp.exp(jax.scipy.special.entr(share_D).sum()), 0.0)


def centered_energy(mean_D: ArrayLike, moment_DxD: ArrayLike) -> jax.Array:
    """Returns the share of the targets' energy that varies over tokens: `1 - |mean|^2 / trace(C)`.

    It has no unit, unlike the standard deviation, so one threshold serves all models, and it shows
    a collapse in spite of layer norm.

    Args:
      mean_D: mean target.
      moment_DxD: second moment C of the same targets, `losses.second_moment`.

    Returns:
      float32 scalar in 0..1: 1 if the targets have mean 0, 0 if all are equal (or all are 0).

    Raises:
      ValueError: shapes that do not belong together.

    >>> import jax.numpy as jnp
    >>> c = jnp.array([[5., 1.], [1., 2.]])  # of the targets (1, 2) and (3, 0)
    >>> print(f"{centered_energy(jnp.array([2., 1.]), c):.4f}")  # 1 - 5 / 7
    0.2857
    """
    mean_D, c_DxD = jax.lax.stop_gradient((float32(mean_D), float32(moment_DxD)))
    assert_rank(mean_D, 1, custom_message="mean_D must be [D]")
    assert_shape(c_DxD, 2 * mean_D.shape, custom_message="moment_DxD must be [D, D]")
    energy = jnp.trace(c_DxD)
    share = jnp.square(mean_D).sum() / jnp.where(energy > 0, energy, 1.0)
    return jnp.where(energy > 0, jnp.clip(1 - share, 0.0, 1.0), 0.0)


def alignment(a_BxD: ArrayLike, b_BxD: ArrayLike, where_B: ArrayLike | None = None) -> jax.Array:
    """Computes alignment of Wang and Isola: mean squared distance of two views of an image on the
    unit sphere.

    Args:
      a_BxD: global features of one view, of any length; they are scaled to length 1.
      b_BxD: those of the other view.
      where_B: weights >= 0 of the images; None counts every image once.

    Returns:
      float32 scalar in 0..4: 0 if both views agree, 2 if they are unrelated; 0 if no image counts.

    Raises:
      ValueError: shapes that do not belong together.

    >>> import jax.numpy as jnp
    >>> float(alignment(jnp.array([[2., 0.], [0., 1.]]), jnp.array([[1., 0.], [1., 0.]])))
    1.0
    """
    a_BxD, b_BxD = jax.lax.stop_gradient((float32(a_BxD), float32(b_BxD)))
    assert_equal_shape([a_BxD, b_BxD], custom_message="the two views")
    a_BxD, b_BxD, weight_B = zero_masked_rows(a_BxD, b_BxD, where_B)
    total = weight_B.sum()
    return (
        weight_B * jnp.square(l2_normalize(a_BxD) - l2_normalize(b_BxD)).sum(-1)
    ).sum() / jnp.where(total > 0, total, 1.0)


def uniformity(x_BxD: ArrayLike, where_B: ArrayLike | None = None, t: float = 2.0) -> jax.Array:
    """Computes uniformity of Wang and Isola: `log mean exp(-t |u - v|^2)` over all pairs of
    different images on the unit sphere. `entropy.uniformity_loss` is the same value as a loss.

    Args:
      x_BxD: global features of the images, of any length; they are scaled to length 1.
      where_B: weights >= 0 of the images, a pair weighs their product; None counts every image
        once.
      t: inverse width > 0 of the kernel; 2 as published.

    Returns:
      float32 scalar <= 0: 0 if all images are equal, about -2 t (a little above) if they are
      spread over a sphere of many dimensions; 0 if fewer than two images count.

    Raises:
      ValueError: shapes that do not belong together.

    >>> import jax.numpy as jnp
    >>> print(uniformity(jnp.array([[1., 0.], [-3., 0.]])), uniformity(jnp.ones((5, 2))))
    -8.0 0.0
    """
    total, count = entropy.uniformity_loss(jax.lax.stop_gradient(x_BxD), where_B, t=t)
    return total / jnp.where(count > 0, count, 1.0)
