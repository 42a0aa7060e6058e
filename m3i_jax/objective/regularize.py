"""Watching for collapse: the regularization term H(p(z_y | t_y)) of Eq. 2 cannot be computed, so its loss has to be noticed.

The terms that prevent collapse live with the posteriors (stop-gradient and second moment in `posterior.gaussian`, negatives in
`posterior.boltzmann`; Table 1). These two numbers say whether they do: with healthy targets both stay well above their lowest values, in a
collapse the standard deviation goes to 0 and the effective rank to 1.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def target_std(target_TxD: ArrayLike, where_T: ArrayLike | None = None) -> jax.Array:
    """Standard deviation of the targets over tokens, averaged over the D dimensions.

    Give it targets *before* layer norm: normalised ones have a large deviation within a token even if all tokens are equal.

    Args:
      target_TxD: [..., D] targets.
      where_T: [...] weights >= 0 of the tokens; None counts every token once.

    Returns:
      float32 scalar >= 0, in the units of the features; 0 means that all tokens are the same (or that none counts).

    Raises:
      ValueError: weights of another shape than the tokens.

    >>> import jax.numpy as jnp
    >>> float(target_std(jnp.array([[1., 5.], [3., 5.]])))
    0.5
    """
    x_TxD = jax.lax.stop_gradient(jnp.asarray(target_TxD).astype(jnp.float32))
    weight_T = jnp.ones(x_TxD.shape[:-1], jnp.float32) if where_T is None else jnp.asarray(where_T).astype(jnp.float32)
    if weight_T.shape != x_TxD.shape[:-1]:
        raise ValueError(f"where has shape {weight_T.shape}, but the tokens have shape {x_TxD.shape[:-1]}; they must be equal")
    rows = tuple(range(x_TxD.ndim - 1))
    share_Tx1 = (weight_T / jnp.maximum(weight_T.sum(), jnp.finfo(jnp.float32).tiny))[..., None]
    x_TxD = jnp.where(share_Tx1 > 0, x_TxD, 0.0)
    mean_D = (share_Tx1 * x_TxD).sum(rows)
    return jnp.sqrt((share_Tx1 * jnp.square(x_TxD - mean_D)).sum(rows)).mean()


def effective_rank(moment_DxD: ArrayLike) -> jax.Array:
    """Effective rank of the targets: the exponential of the entropy of the normalised eigenvalues of their second moment.

    An eigenvalue decomposition costs about D^3: call it at log intervals, not inside every step.

    Args:
      moment_DxD: symmetric second moment, `posterior.second_moment` of the targets.

    Returns:
      float32 scalar: D if all directions carry the same energy, 1 if all energy lies in one direction, 0 for a zero matrix.

    Raises:
      ValueError: not a square matrix.

    >>> import jax.numpy as jnp
    >>> print(f"{effective_rank(jnp.eye(8)):.2f} {effective_rank(jnp.ones((8, 8))):.2f}")
    8.00 1.00
    """
    c_DxD = jax.lax.stop_gradient(jnp.asarray(moment_DxD).astype(jnp.float32))
    if c_DxD.ndim != 2 or c_DxD.shape[0] != c_DxD.shape[1]:
        raise ValueError(f"moment_DxD has shape {c_DxD.shape}; it must be square")
    # Rounding makes small eigenvalues negative, and a logarithm of them NaN.
    energy_D = jnp.maximum(jnp.linalg.eigvalsh(c_DxD), 0.0)
    total = energy_D.sum()
    share_D = energy_D / jnp.where(total > 0, total, 1.0)
    return jnp.where(total > 0, jnp.exp(jax.scipy.special.entr(share_D).sum()), 0.0)
