"""Masks of Mask2Former (Cheng et al., 2022): which queries predict which masks, and what that
costs. Masks are compared at points, not at pixels.

An image has Q queries, each a distribution over K categories and "none" and the logits of a mask,
and M slots for true masks, of which some may be empty. P points.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from m3i_jax.objective.assignment import hungarian
from m3i_jax.objective.dense_losses import binary_cross_entropy, dice
from m3i_jax.objective.numerics import (
    EXACT,
    assert_equal_shape,
    assert_rank,
    assert_shape,
    float32,
    select_logit,
)
from m3i_jax.objective.partial_selection import smallest_indices


class MatchWeights(NamedTuple):
    """Weights of the three costs of a pair; the losses have the same.

    Attributes:
      category: of -p(category).
      mask: of the mean binary cross-entropy at the points.
      dice: of the dice loss at the points.
    """

    category: float = 2.0
    mask: float = 5.0
    dice: float = 5.0


DEFAULT_WEIGHTS = MatchWeights()


def _product(a_PxM: jax.Array, b_PxQ: jax.Array) -> jax.Array:
    return jnp.einsum("pm,pq->mq", a_PxM, b_PxQ, precision=EXACT)


def mask_costs(
    class_logits_QxK1: ArrayLike,
    mask_logits_PxQ: ArrayLike,
    targets_PxM: ArrayLike,
    classes_M: ArrayLike,
    weights: MatchWeights = DEFAULT_WEIGHTS,
) -> jax.Array:
    """What every pair of a true mask and a query costs, float32 [M, Q].

    Args:
      class_logits_QxK1: of the K categories and, last, of none.
      mask_logits_PxQ: the masks of the queries at the same P points.
      targets_PxM: the true masks there, 0..1.
      classes_M: their categories; the cost of a slot that is not one is without meaning.
      weights: of the three costs.

    Raises:
      ValueError: shapes that do not belong together.

    >>> logits, masks = jnp.zeros((2, 3)), jnp.array([[9.0, -9.0], [9.0, -9.0]])
    >>> mask_costs(logits, masks, jnp.array([[1.0], [1.0]]), jnp.array([0])).round(1).tolist()
    [[-0.7, 47.7]]
    """
    logits_QxK1, x_PxQ = float32(class_logits_QxK1), float32(mask_logits_PxQ)
    t_PxM, classes_M = float32(targets_PxM), jnp.asarray(classes_M)
    assert_rank([logits_QxK1, x_PxQ, t_PxM], 2)
    assert_shape(x_PxQ, (len(t_PxM), len(logits_QxK1)), custom_message="points x queries")
    assert_shape(classes_M, t_PxM.shape[1:], custom_message="one category per mask")
    probability_QxK1 = jax.nn.softmax(logits_QxK1)
    category_MxQ = probability_QxK1.T[jnp.clip(classes_M, 0, logits_QxK1.shape[1] - 2)]
    # binary cross-entropy is softplus(x) - t x
    entropy_MxQ = (jax.nn.softplus(x_PxQ).sum(0) - _product(t_PxM, x_PxQ)) / len(x_PxQ)
    p_PxQ = jax.nn.sigmoid(x_PxQ)
    sizes_MxQ = t_PxM.sum(0)[:, None] + p_PxQ.sum(0)
    dice_MxQ = 1 - (2 * _product(t_PxM, p_PxQ) + 1) / (sizes_MxQ + 1)
    return weights.mask * entropy_MxQ + weights.dice * dice_MxQ - weights.category * category_MxQ


def match_masks(
    class_logits_QxK1: ArrayLike,
    mask_logits_PxQ: ArrayLike,
    targets_PxM: ArrayLike,
    classes_M: ArrayLike,
    weights: MatchWeights = DEFAULT_WEIGHTS,
) -> jax.Array:
    """The query of every true mask, int32 [M]: the assignment of least `mask_costs`; -1 for empty
    slots, whose category is negative. No gradient.

    Raises:
      ValueError: shapes that do not belong together, or more slots than queries.

    >>> logits, masks = jnp.zeros((2, 3)), jnp.array([[-9.0, 9.0], [9.0, -9.0]])
    >>> match_masks(logits, masks, jnp.array([[1.0, 1.0], [0.0, 0.0]]), [1, -1]).tolist()
    [1, -1]
    """
    cost_MxQ = mask_costs(class_logits_QxK1, mask_logits_PxQ, targets_PxM, classes_M, weights)
    return hungarian(cost_MxQ, jnp.asarray(classes_M) >= 0)


def query_class_loss(
    class_logits_QxK1: ArrayLike, query_M: ArrayLike, classes_M: ArrayLike, none_weight: float = 0.1
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the categories of all queries; those without a mask should say none.

    Args:
      class_logits_QxK1: as of `mask_costs`.
      query_M: of `match_masks`.
      classes_M: categories of the true masks; negative: empty slots.
      none_weight: weight of queries without a mask; others have 1.

    Returns:
      (sum over queries of weight * cost in nats, sum of weights), float32 scalars.

    >>> total, weight = query_class_loss(jnp.zeros((3, 4)), [2, -1], [0, -1])
    >>> print((total / weight).round(4), weight.round(1))
    1.3863 1.2
    """
    x_QxK1, query_M = float32(class_logits_QxK1), jnp.asarray(query_M)
    classes_M = jnp.asarray(classes_M)
    assert_equal_shape([query_M, classes_M], custom_message="one query per mask")
    queries, none = x_QxK1.shape[0], x_QxK1.shape[1] - 1
    place_M = jnp.where(classes_M >= 0, query_M, queries)
    target_Q = jnp.full(queries, none).at[place_M].set(classes_M, mode="drop")
    weight_Q = jnp.where(target_Q == none, jnp.float32(none_weight), 1.0)
    cost_Q = jax.nn.logsumexp(x_QxK1, -1) - select_logit(x_QxK1, target_Q)
    return (weight_Q * cost_Q).sum(), weight_Q.sum()


def uncertain_points(
    logits_MxN: ArrayLike, candidates_MxNx2: ArrayLike, fresh_MxFx2: ArrayLike, count: int
) -> jax.Array:
    """Points for the losses of masks (PointRend): of N candidates the `count` whose logits are
    nearest to 0, and F others as they are; [M, count + F, 2]. No gradient.

    >>> logits, places = jnp.array([[3.0, -1.0, 2.0]]), jnp.array([[[0.1, 0], [0.2, 0], [0.3, 0]]])
    >>> uncertain_points(logits, places, jnp.full((1, 1, 2), 0.5), 2)[0, :, 0].round(1).tolist()
    [0.2..., 0.3..., 0.5]
    """
    logits_MxN = jax.lax.stop_gradient(float32(logits_MxN))
    candidates_MxNx2 = float32(candidates_MxNx2)
    index_MxU = smallest_indices(jnp.abs(logits_MxN), count)
    taken_MxUx2 = jnp.take_along_axis(candidates_MxNx2, index_MxU[..., None], 1)
    return jnp.concatenate([taken_MxUx2, float32(fresh_MxFx2)], 1)


def point_mask_loss(
    logits_MxP: ArrayLike, targets_MxP: ArrayLike, valid_M: ArrayLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Losses of matched masks at their points.

    Args:
      logits_MxP: the masks of the matched queries.
      targets_MxP: the true masks, 0..1.
      valid_M: which slots have a mask.

    Returns:
      (sum over masks of the mean binary cross-entropy, sum of their dice losses, number of masks),
      float32 scalars.

    >>> logits = jnp.array([[0.0, 0.0], [5.0, 5.0]])
    >>> print(*(x.round(3) for x in point_mask_loss(logits, jnp.ones((2, 2)), [True, False])))
    0.693 0.25 1.0
    """
    logits_MxP = float32(logits_MxP)
    entropy, _ = binary_cross_entropy(logits_MxP, targets_MxP, jnp.asarray(valid_M))
    overlap, masks = dice(logits_MxP, targets_MxP, jnp.asarray(valid_M))
    return entropy / logits_MxP.shape[1], overlap, masks
