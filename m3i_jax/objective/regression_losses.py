"""Regression losses of public methods: smooth L1, cosine, the squared error of two views that both
receive gradients, and that of the similarities of tokens.

M3I's is `losses.gaussian`. All return `(sum, count)`, two float32 scalars; all but `squared_error`
treat the target as a constant. Rows of weight 0 are ignored, even if NaN. `[B, N, D]` with weights
`[B, N]` gives the same numbers as `[B * N, D]` with weights `[B * N]`.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from m3i_jax.objective.numerics import (
    EXACT,
    assert_equal_shape,
    assert_shape,
    float32,
    l2_normalize,
    weighted_sum,
    zero_masked_rows,
)


def smooth_l1(
    prediction_TxD: ArrayLike,
    target_TxD: ArrayLike,
    where_T: ArrayLike | None = None,
    *,
    beta: float = 2.0,
) -> tuple[jax.Array, jax.Array]:
    """Computes the smooth-L1 loss: squared near the target, absolute far from it (data2vec, Feature
    Distillation).

    An element at distance d costs `d^2 / (2 beta)` where |d| < beta and `|d| - beta / 2` beyond; a
    row costs the mean of its D elements.

    Args:
      prediction_TxD: predictions, not normalised.
      target_TxD: targets of the same shape; both methods `losses.layer_normalize` them. No gradient
        flows to them.
      where_T: weight of a row, bool or float >= 0; None counts every row once.
      beta: distance > 0 at which the square turns into a line, in the units of the target; both
        methods use 2.

    Returns:
      (sum over rows of weight * cost, sum of weights), float32 scalars. In the units of the target.

    Raises:
      ValueError: shapes that do not belong together, or beta <= 0.

    >>> import jax.numpy as jnp
    >>> p = jnp.array([[1., 5.], [9., 9.]])
    >>> total, count = smooth_l1(p, jnp.zeros((2, 2)), jnp.array([True, False]))
    >>> print(total, count)  # (1 / 4 + 5 - 1) / 2
    2.125 1.0
    """
    if not beta > 0:
        raise ValueError(
            f"beta is {beta}; it must be > 0, the distance at which the square turns into a line"
        )
    p_TxD, t_TxD, weight_T = _pair(prediction_TxD, target_TxD, where_T)
    distance_TxD = jnp.abs(p_TxD - t_TxD)
    cost_TxD = jnp.where(
        distance_TxD < beta, jnp.square(distance_TxD) / (2 * beta), distance_TxD - beta / 2
    )
    return weighted_sum(cost_TxD.mean(-1), weight_T), weight_T.sum()


def cosine(
    prediction_TxD: ArrayLike, target_TxD: ArrayLike, where_T: ArrayLike | None = None
) -> tuple[jax.Array, jax.Array]:
    """Computes the squared distance of the directions, `2 - 2 cos(p, t)` (BYOL): the Gaussian of
    vectors scaled to length 1.

    BYOL adds up the losses of both directions of a pair of views; that is left to the caller.

    Args:
      prediction_TxD: predictions of any length; a zero row costs 2 and gets no gradient.
      target_TxD: targets of the same shape. No gradient flows to them.
      where_T: weight of a row, bool or float >= 0; None counts every row once.

    Returns:
      (sum over rows of weight * cost, sum of weights), float32 scalars. A cost lies between 0 and
      4.

    Raises:
      ValueError: shapes that do not belong together.

    >>> import jax.numpy as jnp
    >>> total, count = cosine(jnp.array([[3., 0.], [0., 1.]]), jnp.array([[1., 0.], [0., -5.]]))
    >>> print(total, count)
    4.0 2.0
    """
    p_TxD, t_TxD, weight_T = _pair(prediction_TxD, target_TxD, where_T)
    return (
        weighted_sum(2 - 2 * (l2_normalize(p_TxD) * l2_normalize(t_TxD)).sum(-1), weight_T),
        weight_T.sum(),
    )


def squared_error(
    a_TxD: ArrayLike, b_TxD: ArrayLike, where_T: ArrayLike | None = None
) -> tuple[jax.Array, jax.Array]:
    """Computes the squared error per element, `|a - b|^2 / D`, with gradient through both sides:
    the invariance of VICReg, and of LeJEPA, where the mean squared distance of two views from their
    mean is a quarter of it.

    By itself it is smallest where both are constant; an entropy term keeps them apart (`entropy`).

    Args:
      a_TxD, b_TxD: two representations of the same rows.
      where_T: weight of a row, bool or float >= 0; None counts every row once.

    Returns:
      (sum over rows of weight * cost, sum of weights), float32 scalars, in the units of the
      features.

    Raises:
      ValueError: shapes that do not belong together.

    >>> import jax.numpy as jnp
    >>> print(*squared_error(jnp.array([[1., 5.], [0., 0.]]), jnp.zeros((2, 2))))
    13.0 2.0
    """
    a_TxD, b_TxD, weight_T = _pair(a_TxD, b_TxD, where_T, constant=False)
    return weighted_sum(jnp.square(a_TxD - b_TxD).mean(-1), weight_T), weight_T.sum()


def token_similarity(
    prediction_BxNxD: ArrayLike, target_BxNxD: ArrayLike, where_BxN: ArrayLike | None = None
) -> tuple[jax.Array, jax.Array]:
    """Computes the squared error of the cosines of all pairs of tokens of an image (Gram anchoring
    of DINOv3): a Gaussian on how similar the tokens are to each other, whatever their directions.

    A token costs the mean over all tokens j of its image of `(cos(p_i, p_j) - cos(t_i, t_j))^2`,
    weighted by the weights of j; the pair of a token with itself counts and costs 0.

    Args:
      prediction_BxNxD: tokens of any length.
      target_BxNxD: tokens of the same images at the same cells; their width may differ. No gradient
        flows to them.
      where_BxN: weight of a token, bool or float >= 0; None counts every token once.

    Returns:
      (sum over tokens of weight * cost, sum of weights), float32 scalars. A cost lies between 0 and
      4.

    Raises:
      ValueError: shapes that do not belong together.

    Source: Simeoni et al. 2025, "DINOv3", section 4.2; facebookresearch/dinov3,
    dinov3/loss/gram_loss.py.

    >>> import jax.numpy as jnp
    >>> total, count = token_similarity(jnp.eye(2)[None], jnp.ones((1, 2, 3)))
    >>> print(total, count)  # of each token, the pair with the other
    1.0 2.0
    """
    total, count, _ = similarity_sums(prediction_BxNxD, target_BxNxD, where_BxN)
    return total, count


def similarity_sums(
    prediction_BxNxD: ArrayLike, target_BxNxD: ArrayLike, where_BxN: ArrayLike | None = None
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """`token_similarity` with sums over all pairs of different tokens: `pairs` (their weights),
    `error`, `square` and `first` (their squared errors, squared targets and targets).

    >>> import jax.numpy as jnp
    >>> sums = similarity_sums(jnp.eye(2)[None], jnp.ones((1, 2, 3)))[2]
    >>> print(*(f"{name} {value}" for name, value in sorted(sums.items())))
    error 2.0 first 2.0 pairs 2.0 square 2.0
    """
    p_BxNxD, t_BxNxD = float32(prediction_BxNxD), float32(target_BxNxD)
    if p_BxNxD.ndim != 3 or p_BxNxD.shape[:2] != t_BxNxD.shape[:2]:
        raise ValueError(
            f"prediction {p_BxNxD.shape} and target {t_BxNxD.shape}: must be [B, N, D] of the same"
            " tokens"
        )
    where_BxN = (
        jnp.ones(p_BxNxD.shape[:2], jnp.float32) if where_BxN is None else float32(where_BxN)
    )
    assert_shape(where_BxN, p_BxNxD.shape[:2], custom_message="where: one weight per token")
    seen_BxNx1 = (where_BxN > 0)[..., None]  # tokens of weight 0 may be NaN
    p_BxNxD, t_BxNxD = (
        l2_normalize(jnp.where(seen_BxNx1, x, 0.0))
        for x in (p_BxNxD, jax.lax.stop_gradient(t_BxNxD))
    )
    of_t_BxNxN = jnp.einsum("bnd,bmd->bnm", t_BxNxD, t_BxNxD, precision=EXACT)
    # both sides of a product are the same tokens and its gradient is symmetric: that of one side,
    # twice, is one product less
    half_BxNxN = jnp.einsum(
        "bnd,bmd->bnm", p_BxNxD, jax.lax.stop_gradient(p_BxNxD), precision=EXACT
    )
    of_p_BxNxN = 2 * half_BxNxN - jax.lax.stop_gradient(half_BxNxN)
    weight_BxNxN = where_BxN[:, :, None] * where_BxN[:, None]
    square_BxNxN = jnp.square(of_p_BxNxN - of_t_BxNxN)
    of_image_B = where_BxN.sum(1)
    of_image_B = jnp.where(of_image_B > 0, of_image_B, 1.0)
    total = ((weight_BxNxN * square_BxNxN).sum((1, 2)) / of_image_B).sum()
    others_BxNxN = weight_BxNxN * (1 - jnp.eye(p_BxNxD.shape[1], dtype=jnp.float32))
    sums = {
        "pairs": others_BxNxN.sum(),
        "error": (others_BxNxN * square_BxNxN).sum(),
        "square": (others_BxNxN * jnp.square(of_t_BxNxN)).sum(),
        "first": (others_BxNxN * of_t_BxNxN).sum(),
    }
    return total, where_BxN.sum(), jax.lax.stop_gradient(sums)


def _pair(
    prediction_TxD: ArrayLike,
    target_TxD: ArrayLike,
    where_T: ArrayLike | None,
    constant: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    p_TxD, t_TxD = float32(prediction_TxD), float32(target_TxD)
    t_TxD = jax.lax.stop_gradient(t_TxD) if constant else t_TxD
    assert_equal_shape([p_TxD, t_TxD], custom_message="prediction and target")
    if p_TxD.ndim < 1:
        raise ValueError("prediction and target are scalars; pass arrays of shape [..., D]")
    return zero_masked_rows(p_TxD, t_TxD, where_T)
