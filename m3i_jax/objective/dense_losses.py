"""Losses of segmentation and detection: cross-entropy per pixel, binary and focal cross-entropy,
dice, and the federated loss of LVIS.

Every function returns `(sum, count)`, float32 scalars; `pixel_cross_entropy` returns two counts.
The caller divides once. What has weight 0 is ignored in the sum and in all gradients, even if NaN.
Targets are constants. Inputs of any float type are computed in float32, and every function works
under `jax.jit` and `jax.vmap`.

B images, H rows and W columns of a map, K categories, R regions, T rows."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from m3i_jax.objective.numerics import (
    assert_equal_shape,
    assert_rank,
    assert_shape,
    float32,
    ignored_label,
    select_logit,
    sigmoid_cross_entropy,
    weighted_sum,
    zero_masked_rows,
)


def pixel_cross_entropy(
    logits_BxHxWxK: ArrayLike, labels_BxHxW: ArrayLike, ignore: int | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the softmax cross-entropy of semantic segmentation.

    Two divisors are in use: mmsegmentation divides by all pixels, ignored ones included, others by
    the labelled ones. The first makes an image of few labelled pixels count less.

    Args:
      logits_BxHxWxK: predictions, at the size of the labels; any number of axes before the last.
      labels_BxHxW: integers, 0..K-1 or `ignore`.
      ignore: label of pixels that cost nothing; None: 255.

    Returns:
      (sum in nats, number of labelled pixels, number of all pixels), float32 scalars. The sum is
      NaN if a label is neither a category nor `ignore`.

    Raises:
      ValueError: shapes that do not belong together, or more than 255 categories without `ignore`.

    >>> logits, labels = jnp.zeros((1, 2, 2, 4)), jnp.array([[[0, 3], [255, 255]]])
    >>> print(*(x.round(4) for x in pixel_cross_entropy(logits, labels)))
    2.7726 2.0 4.0
    """
    logits_TxK, labels_T = float32(logits_BxHxWxK), jnp.asarray(labels_BxHxW)
    assert_shape(labels_T, logits_TxK.shape[:-1], custom_message="one label per pixel")
    labels_T = labels_T.astype(jnp.int32)
    counts_T = labels_T != ignored_label(ignore, logits_TxK.shape[-1])
    logits_TxK = jnp.where(counts_T[..., None], logits_TxK, 0.0)
    labels_T = jnp.where(counts_T, labels_T, 0)
    top_T = jax.lax.stop_gradient(logits_TxK.max(-1, keepdims=True))
    shifted_TxK = logits_TxK - top_T
    cost_T = jnp.log(jnp.exp(shifted_TxK).sum(-1)) - select_logit(shifted_TxK, labels_T)
    total = weighted_sum(cost_T, counts_T.astype(jnp.float32))
    return total, counts_T.sum(dtype=jnp.float32), jnp.float32(labels_T.size)


def binary_cross_entropy(
    logits: ArrayLike, targets: ArrayLike, where: ArrayLike | None = None
) -> tuple[jax.Array, jax.Array]:
    """Computes the cross-entropy of independent yes-no predictions: objectness, masks, points.

    Args:
      logits: predictions, any shape.
      targets: 0..1, of the same shape.
      where: weights >= 0 of the elements, or of the leading axes, whose elements all get this
        weight; None counts every element once.

    Returns:
      (sum over elements of weight * cost in nats, sum of the elements' weights), float32 scalars.

    Raises:
      ValueError: shapes that do not belong together.

    >>> masks = jnp.array([[0.0, 2.0], [9.0, 9.0]])
    >>> total, count = binary_cross_entropy(masks, jnp.ones((2, 2)), jnp.array([1, 0]))
    >>> print((total / count).round(4), count)
    0.41 2.0
    """
    x, t, weight = _elements(logits, targets, where)
    return weighted_sum(sigmoid_cross_entropy(x, t), weight), weight.sum()


def sigmoid_focal(
    logits: ArrayLike,
    targets: ArrayLike,
    where: ArrayLike | None = None,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> tuple[jax.Array, jax.Array]:
    """Computes the focal loss (Lin et al., ICCV 2017): binary cross-entropy times `(1 - p_t)^gamma`
    with p_t the probability given to the truth, so that the many easy negatives count little.

    Args:
      logits: predictions, one per category, any shape.
      targets: 0..1, of the same shape; one-hot, all 0 for background.
      where: weights >= 0 of the elements, or of the leading axes; None counts every element once.
      alpha: weight of positive elements, and 1 - alpha that of negative ones; negative: no weights.
      gamma: >= 0; 0 is cross-entropy.

    Returns:
      (sum over elements of weight * cost, sum of weight * target), float32 scalars. The count is
      the number of positives, by which RetinaNet and DINO divide (but at least 1).

    Raises:
      ValueError: shapes that do not belong together, or gamma < 0.

    >>> logits = jnp.array([[3.0, -3.0], [-3.0, -3.0]])
    >>> total, positives = sigmoid_focal(logits, jnp.array([[1.0, 0.0], [0.0, 0.0]]))
    >>> print(f"{total:.6f}", positives)
    0.000273 1.0
    """
    if gamma < 0:
        raise ValueError(f"gamma is {gamma}; it must be at least 0")
    x, t, weight = _elements(logits, targets, where)
    p = jax.nn.sigmoid(x)
    # not quite 0, where a power below 1 has no gradient
    miss = jnp.maximum(p * (1 - t) + (1 - p) * t, 1e-30)
    cost = sigmoid_cross_entropy(x, t) * miss**gamma
    if alpha >= 0:
        cost *= alpha * t + (1 - alpha) * (1 - t)
    return weighted_sum(cost, weight), (weight * t).sum()


def dice(
    logits_TxP: ArrayLike, targets_TxP: ArrayLike, where_T: ArrayLike | None = None
) -> tuple[jax.Array, jax.Array]:
    """Computes the Dice loss of masks: `1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1)` with p the
    sigmoid (MaskFormer). A small mask weighs as much as a large one.

    Args:
      logits_TxP: predictions at P pixels or points of T masks; any number of axes before the last.
      targets_TxP: 0..1, of the same shape.
      where_T: weight of a mask, bool or float >= 0; None counts every mask once.

    Returns:
      (sum over masks of weight * cost, sum of weights), float32 scalars; a cost is in 0..1.

    Raises:
      ValueError: shapes that do not belong together.

    >>> total, count = dice(jnp.array([[9.0, 9.0, -9.0]]), jnp.array([[1.0, 1.0, 0.0]]))
    >>> print(total.round(3), count)
    0.0 1.0
    """
    x_TxP, t_TxP = float32(logits_TxP), jax.lax.stop_gradient(float32(targets_TxP))
    assert_equal_shape([x_TxP, t_TxP], custom_message="logits and targets")
    if x_TxP.ndim < 1:
        raise ValueError("logits and targets are scalars; pass arrays of shape [..., P]")
    x_TxP, t_TxP, weight_T = zero_masked_rows(x_TxP, t_TxP, where_T)
    p_TxP = jax.nn.sigmoid(x_TxP)
    both_T = (p_TxP * t_TxP).sum(-1)
    cost_T = 1 - (2 * both_T + 1) / (p_TxP.sum(-1) + t_TxP.sum(-1) + 1)
    return weighted_sum(cost_T, weight_T), weight_T.sum()


def federated_categories(
    classes_R: ArrayLike,
    where_R: ArrayLike | None,
    uniform_K: ArrayLike,
    frequency_K: ArrayLike | None = None,
    *,
    count: int = 50,
    power: float = 0.5,
) -> jax.Array:
    """Returns the categories that the federated loss of an image covers: those of its regions, and
    others drawn without replacement, in proportion to a power of their frequency.

    In LVIS an image is annotated exhaustively for a few categories only: most others are not known
    to be absent. As in detectron2, background is one of the `count` categories if a region has it:
    with the default, 49 others remain. If the regions have more, all of them stay, and none is
    drawn.

    The draw takes the greatest of `log weight + Gumbel noise`, which has the same distribution as
    drawing one after the other, in static shapes.

    Args:
      classes_R: category of each region, 0..K-1, or K: background.
      where_R: weight of a region; the category of one of weight 0 does not count. None: all count.
      uniform_K: uniform random numbers in [0, 1), one per category.
      frequency_K: images of the training set that have each category; None: all equal. A category
        of frequency 0 is never drawn.
      count: categories to keep, background included.
      power: of the frequency.

    Returns:
      bool [K].

    Raises:
      ValueError: shapes that do not belong together.

    >>> kept = federated_categories([2, 5, 2], None, [0.9, 0.1, 0.5, 0.8, 0.2], count=3)
    >>> kept.tolist()  # category 2 of the regions; background, 5; one drawn
    [True, False, True, False, False]
    """
    classes_R, uniform_K = jnp.asarray(classes_R), float32(uniform_K)
    assert_rank(uniform_K, 1)
    assert_rank(classes_R, 1)
    classes = len(uniform_K)
    frequency_K = float32(jnp.ones(classes) if frequency_K is None else frequency_K)
    assert_shape(frequency_K, (classes,), custom_message="one frequency per category")
    exists_R = jnp.ones(classes_R.shape, bool) if where_R is None else jnp.asarray(where_R) > 0
    assert_equal_shape([exists_R, classes_R], custom_message="one weight per region")
    present_RxK1 = (classes_R[:, None] == jnp.arange(classes + 1)) & exists_R[:, None]
    present_K1 = present_RxK1.any(0)
    present_K = present_K1[:classes]

    uniform_K = jnp.clip(uniform_K, 1e-30, 1 - 2**-24)
    weight_K = power * jnp.log(frequency_K)  # -inf: never drawn
    key_K = jnp.where(present_K, -jnp.inf, weight_K - jnp.log(-jnp.log(uniform_K)))
    rank_K = jnp.argsort(jnp.argsort(-key_K))
    drawn_K = (rank_K < count - present_K1.sum()) & (key_K > -jnp.inf)
    return present_K | drawn_K


def federated_cross_entropy(
    logits_RxK: ArrayLike,
    classes_R: ArrayLike,
    where_R: ArrayLike | None = None,
    *,
    uniform_K: ArrayLike,
    frequency_K: ArrayLike | None = None,
    count: int = 50,
    power: float = 0.5,
) -> tuple[jax.Array, jax.Array]:
    """Computes the federated loss of LVIS (Zhou et al., Probabilistic two-stage detection, 2021):
    the binary cross-entropy of the regions of one image in the categories of
    `federated_categories`; the other columns cost nothing.

    Args:
      logits_RxK: predictions, without a column for background.
      classes_R: category of each region, 0..K-1, or K: background, which is 0 in all columns.
      where_R: weight of a region, bool or float >= 0; None counts every region once.
      uniform_K, frequency_K, count, power: see `federated_categories`.

    Returns:
      (sum over regions and kept categories of weight * cost in nats, sum of the regions' weights),
      float32 scalars.

    Raises:
      ValueError: shapes that do not belong together.

    >>> logits, uniform = jnp.zeros((2, 100)), jnp.linspace(0, 0.99, 100)
    >>> total, regions = federated_cross_entropy(logits, jnp.array([3, 100]), uniform_K=uniform)
    >>> print((total / regions / jnp.log(2)).round(4))  # 49 categories: background is the 50th
    49.0
    """
    x_RxK, classes_R = float32(logits_RxK), jnp.asarray(classes_R)
    assert_rank(x_RxK, 2)
    assert_shape(classes_R, x_RxK.shape[:1], custom_message="one category per row of logits")
    assert_shape(uniform_K, x_RxK.shape[1:], custom_message="one random number per column")
    kept_K = federated_categories(
        classes_R, where_R, uniform_K, frequency_K, count=count, power=power
    )
    target_RxK = (classes_R[:, None] == jnp.arange(x_RxK.shape[1])).astype(jnp.float32)
    x_RxK, target_RxK, weight_R = zero_masked_rows(x_RxK, target_RxK, where_R)
    x_RxK = jnp.where(kept_K, x_RxK, 0.0)
    cost_R = jnp.where(kept_K, sigmoid_cross_entropy(x_RxK, target_RxK), 0.0).sum(1)
    return weighted_sum(cost_R, weight_R), weight_R.sum()


def _elements(
    logits: ArrayLike, targets: ArrayLike, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits and targets with elements of weight 0 set to 0, and a weight for every element."""
    x, t = float32(logits), jax.lax.stop_gradient(float32(targets))
    assert_equal_shape([x, t], custom_message="logits and targets")
    if where is None:
        return x, t, jnp.ones(x.shape, jnp.float32)
    weight = float32(where)
    assert_shape(weight, x.shape[: weight.ndim], custom_message="where: the leading axes of logits")
    weight = jnp.broadcast_to(weight.reshape(weight.shape + (1,) * (x.ndim - weight.ndim)), x.shape)
    return jnp.where(weight > 0, x, 0.0), jnp.where(weight > 0, t, 0.0), weight
