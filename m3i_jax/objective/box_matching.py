"""Predicted boxes as a set (Carion et al., DETR, ECCV 2020; with the focal loss of Deformable DETR
and DINO): what a pair of prediction and object costs, which prediction is matched with which
object, and the losses of the matched.

Functions are of one image; `jax.vmap` makes them of many. Boxes are (centre x, centre y, width,
height) in shares of the image. Shapes are static, and padding is marked by class -1.

Q predictions, M objects, K categories, N pairs.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from m3i_jax.objective.assignment import hungarian
from m3i_jax.objective.boxes import corner_boxes, generalized_box_iou
from m3i_jax.objective.dense_losses import sigmoid_focal
from m3i_jax.objective.numerics import assert_rank, assert_shape, float32

CLASS_COST, BOX_COST, IOU_COST = 2.0, 5.0, 2.0
ALPHA, GAMMA = 0.25, 2.0  # of the focal loss
_EPS = 1e-8  # inside the logarithms of the cost, as in the reference


def box_matching_cost(
    logits_QxK: ArrayLike, boxes_Qx4: ArrayLike, classes_M: ArrayLike, targets_Mx4: ArrayLike
) -> jax.Array:
    """Cost of every pair: 2 * focal + 5 * L1 - 2 * generalised IoU, where the focal part is what
    the class logit of the object would lose as a positive more than as a negative.

    Args:
      logits_QxK: of a sigmoid for every category.
      boxes_Qx4: predicted.
      classes_M: int, of the objects; -1: padding, whose row has finite numbers without a meaning.
      targets_Mx4: boxes of the objects.

    Returns:
      float32 [M, Q], without gradient.

    Raises:
      ValueError: shapes that do not belong together.

    >>> box = jnp.array([[0.5, 0.5, 0.2, 0.2], [0.2, 0.2, 0.2, 0.2]])
    >>> box_matching_cost(jnp.zeros((2, 3)), box, jnp.array([1]), box[:1]).round(3).tolist()
    [[-2.173, 4.187]]
    """
    logits_QxK, boxes_Qx4 = float32(logits_QxK), float32(boxes_Qx4)
    classes_M, targets_Mx4 = jnp.asarray(classes_M), float32(targets_Mx4)
    assert_rank(logits_QxK, 2)
    assert_shape(boxes_Qx4, (len(logits_QxK), 4), custom_message="one box per row of logits")
    assert_shape(targets_Mx4, (len(classes_M), 4), custom_message="one box per class")
    logits_QxK, boxes_Qx4, targets_Mx4 = jax.lax.stop_gradient((logits_QxK, boxes_Qx4, targets_Mx4))
    p_MxQ = jax.nn.sigmoid(logits_QxK).T[jnp.maximum(classes_M, 0)]
    positive_MxQ = ALPHA * (1 - p_MxQ) ** GAMMA * -jnp.log(p_MxQ + _EPS)
    negative_MxQ = (1 - ALPHA) * p_MxQ**GAMMA * -jnp.log(1 - p_MxQ + _EPS)
    far_MxQ = jnp.abs(targets_Mx4[:, None] - boxes_Qx4).sum(-1)
    iou_MxQ = generalized_box_iou(corner_boxes(targets_Mx4), corner_boxes(boxes_Qx4))
    return CLASS_COST * (positive_MxQ - negative_MxQ) + BOX_COST * far_MxQ - IOU_COST * iou_MxQ


def match_predictions(
    logits_QxK: ArrayLike, boxes_Qx4: ArrayLike, classes_M: ArrayLike, targets_Mx4: ArrayLike
) -> jax.Array:
    """Returns the prediction of every object in the matching of least total cost, int32 [M]; -1
    where there is no object.

    Args: as of `box_matching_cost`; M <= Q.

    >>> box = jnp.array([[0.5, 0.5, 0.2, 0.2], [0.2, 0.2, 0.2, 0.2]])
    >>> match_predictions(jnp.zeros((2, 3)), box, jnp.array([1, -1]), box[::-1]).tolist()
    [1, -1]
    """
    cost_MxQ = box_matching_cost(logits_QxK, boxes_Qx4, classes_M, targets_Mx4)
    return hungarian(cost_MxQ, jnp.asarray(classes_M) >= 0)


def matched_classes(match_M: ArrayLike, classes_M: ArrayLike, count: int) -> jax.Array:
    """Returns the class that each of `count` predictions learns, int32 [Q]: that of the object
    which is matched with it; -1, background, for the others.

    >>> matched_classes(jnp.array([2, -1]), jnp.array([7, -1]), 4).tolist()
    [-1, -1, 7, -1]
    """
    match_M, classes_M = jnp.asarray(match_M), jnp.asarray(classes_M)
    is_pair_MxQ = match_M[:, None] == jnp.arange(count)
    return jnp.where(is_pair_MxQ, classes_M[:, None], -1).max(0, initial=-1)


def focal_class_loss(
    logits_QxK: ArrayLike,
    classes_Q: ArrayLike,
    where_Q: ArrayLike | None = None,
    categories_K: ArrayLike | None = None,
) -> jax.Array:
    """Sum of the sigmoid focal loss (alpha 0.25, gamma 2) over predictions and categories.

    Args:
      logits_QxK: predictions.
      classes_Q: int, what each is; -1: background.
      where_Q: weights of the predictions; None: 1 each.
      categories_K: bool, categories that count (federated loss); None: all.

    >>> print(focal_class_loss(jnp.zeros((2, 3)), jnp.array([1, -1])).round(4))
    0.6932
    """
    logits_QxK, classes_Q = float32(logits_QxK), jnp.asarray(classes_Q)
    count = logits_QxK.shape[1]
    where_Q = jnp.ones(logits_QxK.shape[:1]) if where_Q is None else float32(where_Q)
    assert_shape(classes_Q, logits_QxK.shape[:1], custom_message="one class per row of logits")
    assert_shape(where_Q, logits_QxK.shape[:1], custom_message="where: one weight per row")
    where_QxK = where_Q[:, None]
    if categories_K is not None:
        where_QxK = where_QxK * float32(categories_K)
    target_QxK = classes_Q[:, None] == jnp.arange(count)
    where_QxK = jnp.broadcast_to(where_QxK, logits_QxK.shape)
    return sigmoid_focal(logits_QxK, target_QxK, where_QxK, alpha=ALPHA, gamma=GAMMA)[0]


def box_pair_losses(
    boxes_Nx4: ArrayLike, targets_Nx4: ArrayLike, where_N: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Sums over pairs of the L1 distance of the four numbers, and of 1 - generalised IoU.

    Args:
      boxes_Nx4: predicted, of which the gradient is.
      targets_Nx4: of the objects.
      where_N: weights; 0: no pair, whose numbers may be NaN.

    >>> box = jnp.array([[0.5, 0.5, 0.2, 0.2]])
    >>> [x.round(3).tolist() for x in box_pair_losses(box + 0.1, box, jnp.ones(1))]
    [0.4, 0.913]
    """
    where_N = float32(where_N)
    pair_N = where_N > 0
    targets_Nx4 = jax.lax.stop_gradient(jnp.where(pair_N[:, None], float32(targets_Nx4), 0.0))
    boxes_Nx4 = jnp.where(pair_N[:, None], float32(boxes_Nx4), targets_Nx4)
    far_N = jnp.abs(boxes_Nx4 - targets_Nx4).sum(-1)
    pairs = (corner_boxes(boxes)[:, None] for boxes in (boxes_Nx4, targets_Nx4))
    iou_N = generalized_box_iou(*pairs)[:, 0, 0]
    return (far_N * where_N).sum(), ((1 - iou_N) * where_N).sum()
