"""Numerics that all losses over rows share: float32 arithmetic, row weights that may be 0, no NaN
from a row of weight 0, and the checks of shapes."""

import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

# chex's checks of shapes, with the exception that a caller expects for a wrong argument.
assert_shape = functools.partial(chex.assert_shape, exception_type=ValueError)
assert_equal_shape = functools.partial(chex.assert_equal_shape, exception_type=ValueError)
assert_rank = functools.partial(chex.assert_rank, exception_type=ValueError)

# Logit of softmax entries that do not exist. It is finite because a row of only -inf would have NaN
# in value and gradient.
ABSENT = -1e30
# Matrix products in full float32. The default on TPUs and GPUs rounds the inputs to 8 or 11 bits,
# an error of .2 at CLIP's largest scale.
EXACT = jax.lax.Precision.HIGHEST
_config: Any = jax.config  # its flags have no types


def float32(x: ArrayLike) -> jax.Array:
    """Returns the array cast to float32.

    >>> print(float32(jnp.ones(2, jnp.bfloat16)).dtype)
    float32
    """
    return jnp.asarray(x).astype(jnp.float32)


def zero_masked_rows(
    a_TxD: jax.Array, b_TxD: jax.Array, where_T: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns both arrays with rows of weight 0 set to 0, and the weights.

    Without it, a NaN in a row of weight 0 would reach the sum and the gradient: 0 * NaN is NaN.

    >>> a = jnp.array([[jnp.nan], [2.0]])
    >>> [x.tolist() for x in zero_masked_rows(a, a, jnp.array([False, True]))]
    [[[0.0], [2.0]], [[0.0], [2.0]], [0.0, 1.0]]
    """
    if where_T is None:
        return a_TxD, b_TxD, jnp.ones(a_TxD.shape[:-1], jnp.float32)
    weight_T = float32(where_T)
    assert_shape(weight_T, a_TxD.shape[:-1], custom_message="where: one weight per row")
    counts_Tx1 = (weight_T > 0)[..., None]
    return jnp.where(counts_Tx1, a_TxD, 0.0), jnp.where(counts_Tx1, b_TxD, 0.0), weight_T


def l2_normalize(x_TxD: jax.Array) -> jax.Array:
    """Returns rows scaled to length 1. A zero row stays zero and gets no gradient; dividing it by a
    tiny length would give a huge one.

    >>> l2_normalize(jnp.array([[2.0, 0.0], [0.0, 0.0]])).tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    square_Tx1 = jnp.square(x_TxD).sum(-1, keepdims=True)
    long_Tx1 = square_Tx1 > 1e-24
    return x_TxD * jnp.where(long_Tx1, jax.lax.rsqrt(jnp.where(long_Tx1, square_Tx1, 1.0)), 0.0)


def select_logit(logits_TxK: jax.Array, index_T: jax.Array) -> jax.Array:
    """Entry `index` of each row; NaN where the index is out of range.

    Selected by comparison: no gather, no scatter in the backward pass, and any sharding of K is
    kept.

    >>> select_logit(jnp.array([[5.0, 6.0], [7.0, 8.0]]), jnp.array([1, 2])).tolist()
    [6.0, nan]
    """
    classes, index_T = logits_TxK.shape[-1], _widened(index_T)
    hit_TxK = jnp.arange(classes, dtype=index_T.dtype) == index_T[..., None]
    chosen_T = jnp.where(hit_TxK, logits_TxK, 0.0).sum(-1)
    return jnp.where((index_T >= 0) & (index_T < classes), chosen_T, math.nan)


def _widened(index: jax.Array) -> jax.Array:
    """Integers of 8 or 16 bits with 32, which every number of classes fits; others as they are."""
    index = jnp.asarray(index)
    small = jnp.issubdtype(index.dtype, jnp.integer) and index.dtype.itemsize < 8
    return index.astype(jnp.int32) if small else index


def checked_index(index_T: jax.Array, counts_T: jax.Array) -> jax.Array:
    """Returns the index of each row for `softmax_cross_entropy`. Under `jax_debug_nans`, which
    stops at NaN also where no sum has it, that of a row that does not count is 0.

    >>> with jax.debug_nans(True):
    ...     checked_index(jnp.array([2, -1]), jnp.array([True, False])).tolist()
    [2, 0]
    """
    if not _config.jax_debug_nans:  # the program is one selection less
        return index_T
    return jnp.where(counts_T, index_T, jnp.zeros_like(index_T))


def softmax_cross_entropy(logits_TxK: jax.Array, index_T: jax.Array) -> jax.Array:
    """`-log softmax(logits)[index]` of each row in nats, never negative; NaN where the index is out
    of range.

    Computed as `log(1 + sum_{k != index} exp(logit_k - logit_index))`, which is as accurate as the
    logits. The usual `logsumexp(logits) - logit_index` subtracts two numbers as large as the
    logits: at CLIP's largest scale, 100, its error is 8e-6 per row, 2e-3 of a loss of .005.

    >>> print(softmax_cross_entropy(jnp.array([[100.0, 80.0], [0.0, 0.0]]), jnp.array([0, 1])))
    [2.0611537e-09 6.9314718e-01]
    """
    classes, index_T = logits_TxK.shape[-1], _widened(index_T)
    hit_TxK = jnp.arange(classes, dtype=index_T.dtype) == index_T[..., None]
    own_Tx1 = jnp.where(hit_TxK, logits_TxK, 0.0).sum(-1, keepdims=True)
    others_T = jax.nn.logsumexp(jnp.where(hit_TxK, ABSENT, logits_TxK - own_Tx1), axis=-1)
    # NaN is set last, so that a row of weight 0 with such an index has no NaN in its gradient.
    return jnp.where((index_T >= 0) & (index_T < classes), jax.nn.softplus(others_T), math.nan)


def sigmoid_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """`-t log sigmoid(x) - (1 - t) log(1 - sigmoid(x))` of each element in nats: finite for every
    finite logit, accurate near 0, with the gradient `sigmoid(x) - t` everywhere, at x = 0, too.

    >>> logits, targets = jnp.array([0.0, 100.0, -2.0]), jnp.array([1.0, 0.0, 0.5])
    >>> print(sigmoid_cross_entropy(logits, targets).round(4))
    [  0.6931 100.       1.1269]
    """
    return targets * jax.nn.softplus(-logits) + (1 - targets) * jax.nn.softplus(logits)


def ignored_label(ignore: int | None, classes: int) -> int:
    """Returns the label that costs nothing: the given one, by default 255, the unlabelled value of
    8-bit maps.

    Raises:
      ValueError: the default is one of the classes.

    >>> ignored_label(None, 150), ignored_label(-1, 1000)
    (255, -1)
    """
    if ignore is not None:
        return ignore
    if classes > 255:
        raise ValueError(
            f"255 is ignored by default, and is one of the {classes:,} classes; give another label"
            " for pixels that do not count, such as ignore=-1"
        )
    return 255


def weighted_sum(cost_T: jax.Array, weight_T: jax.Array) -> jax.Array:
    """Sum of weight * cost; a cost of weight 0 may be NaN.

    >>> print(weighted_sum(jnp.array([jnp.nan, 3.0]), jnp.array([0.0, 2.0])))
    6.0
    """
    return (jnp.where(weight_T > 0, cost_T, 0.0) * weight_T).sum()
