"""What all losses over rows share: float32 inside, weights that may be 0, and no NaN from a row
that does not count."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

# Softmax entries that do not exist get this logit. Finite, because a row of minus infinities only
# would be NaN in value and gradient.
ABSENT = -1e30
# Products in float32 for real. The default of TPUs and GPUs rounds their inputs to 8 or 11 bits, an
# error of .2 at CLIP's largest scale.
EXACT = jax.lax.Precision.HIGHEST


def float32(x: ArrayLike) -> jax.Array:
    """The array in float32, whatever its type was.

    >>> print(float32(jnp.ones(2, jnp.bfloat16)).dtype)
    float32
    """
    return jnp.asarray(x).astype(jnp.float32)


def check_same_shape(
    what: str, shape: tuple[int, ...], other: str, wanted: tuple[int, ...]
) -> None:
    """Raises ValueError unless both shapes are equal.

    >>> check_same_shape("label", (3,), "the rows of logits", (4,))
    Traceback (most recent call last):
    ValueError: label has shape (3,), but the rows of logits has shape (4,); they must be equal
    """
    if shape != wanted:
        raise ValueError(
            f"{what} has shape {shape}, but {other} has shape {wanted}; they must be equal"
        )


def zero_masked_rows(
    a_TxD: jax.Array, b_TxD: jax.Array, where_T: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Both arrays with rows of weight 0 set to 0, and the weights: 0 times NaN would be NaN, in the
    sum and in the gradient.

    >>> a = jnp.array([[jnp.nan], [2.0]])
    >>> [x.tolist() for x in zero_masked_rows(a, a, jnp.array([False, True]))]
    [[[0.0], [2.0]], [[0.0], [2.0]], [0.0, 1.0]]
    """
    if where_T is None:
        return a_TxD, b_TxD, jnp.ones(a_TxD.shape[:-1], jnp.float32)
    weight_T = float32(where_T)
    check_same_shape("where", weight_T.shape, "the rows", a_TxD.shape[:-1])
    counts_Tx1 = (weight_T > 0)[..., None]
    return jnp.where(counts_Tx1, a_TxD, 0.0), jnp.where(counts_Tx1, b_TxD, 0.0), weight_T


def l2_normalize(x_TxD: jax.Array) -> jax.Array:
    """Rows at length 1; a zero row stays zero and gets no gradient, where dividing by a tiny length
    would give it a huge one.

    >>> l2_normalize(jnp.array([[2.0, 0.0], [0.0, 0.0]])).tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    square_Tx1 = jnp.square(x_TxD).sum(-1, keepdims=True)
    long_Tx1 = square_Tx1 > 1e-24
    return x_TxD * jnp.where(long_Tx1, jax.lax.rsqrt(jnp.where(long_Tx1, square_Tx1, 1.0)), 0.0)


def select_logit(logits_TxK: jax.Array, index_T: jax.Array) -> jax.Array:
    """Entry `index` of each row by comparison: no gather, no scatter in the backward pass, and any
    sharding of K stays as it is. NaN where the index is outside.

    >>> select_logit(jnp.array([[5.0, 6.0], [7.0, 8.0]]), jnp.array([1, 2])).tolist()
    [6.0, nan]
    """
    classes = logits_TxK.shape[-1]
    hit_TxK = jnp.arange(classes) == index_T[..., None]
    chosen_T = jnp.where(hit_TxK, logits_TxK, 0.0).sum(-1)
    return jnp.where((index_T >= 0) & (index_T < classes), chosen_T, math.nan)


def softmax_cross_entropy(logits_TxK: jax.Array, index_T: jax.Array) -> jax.Array:
    """`-log softmax(logits)[index]` of each row, in nats, as accurate as its logits and never
    negative; NaN where the index is outside.

    Computed as `log(1 + sum_{k != index} exp(logit_k - logit_index))`. The usual `logsumexp(logits)
    - logit_index` subtracts two numbers of the size of the logits: at CLIP's largest scale, 100, it
    is off by 8e-6 a row, 2e-3 of a loss of .005.

    >>> print(softmax_cross_entropy(jnp.array([[100.0, 80.0], [0.0, 0.0]]), jnp.array([0, 1])))
    [2.0611537e-09 6.9314718e-01]
    """
    classes = logits_TxK.shape[-1]
    hit_TxK = jnp.arange(classes) == index_T[..., None]
    own_Tx1 = jnp.where(hit_TxK, logits_TxK, 0.0).sum(-1, keepdims=True)
    others_T = jax.nn.logsumexp(jnp.where(hit_TxK, ABSENT, logits_TxK - own_Tx1), axis=-1)
    # NaN enters last, so that a row of weight 0 with such an index has no NaN in its gradient.
    return jnp.where((index_T >= 0) & (index_T < classes), jax.nn.softplus(others_T), math.nan)


def weighted_sum(cost_T: jax.Array, weight_T: jax.Array) -> jax.Array:
    """Sum of weight times cost; a cost of weight 0 may be NaN.

    >>> print(weighted_sum(jnp.array([jnp.nan, 3.0]), jnp.array([0.0, 2.0])))
    6.0
    """
    return (jnp.where(weight_T > 0, cost_T, 0.0) * weight_T).sum()
