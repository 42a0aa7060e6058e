"""Losses that compare the images of a batch with each other, as in the public
instance-discrimination methods.

`losses.boltzmann` is the plain form over one list of keys. This module adds dense InfoNCE
(negatives per position, and DenseCL's), SimCLR's NT-Xent, Barlow Twins and MSN's prototypes. All
return `(sum, count)`, two float32 scalars. Rows of weight 0 are ignored, even if NaN; where a
function takes one array for both, they are neither query nor negative.

B images, N positions, K key images or prototypes, D width. Row b of two arrays are two views of the
same image."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from m3i_jax.objective.numerics import (
    ABSENT,
    EXACT,
    assert_equal_shape,
    assert_rank,
    assert_shape,
    checked_index,
    float32,
    l2_normalize,
    softmax_cross_entropy,
    weighted_sum,
    zero_masked_rows,
)


def dense_boltzmann(
    prediction_BxNxD: ArrayLike,
    keys_KxNxD: ArrayLike,
    where_BxN: ArrayLike | None = None,
    *,
    index_B: ArrayLike | None = None,
    where_KxN: ArrayLike | None = None,
    temperature: ArrayLike,
    normalize: bool = True,
    stop_gradient: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Computes dense InfoNCE: a token's positive against the targets at the same position of the
    other images (M3I Table 1, dense instance discrimination).

    Equal to `losses.boltzmann` mapped over positions, computed as one batched product: logits [N,
    B, K], no gather. Their memory, 4 N B K bytes, limits the batch: 13 GB for 196 positions of 4096
    images, divided by the number of devices that share the predictions.

    Args:
      prediction_BxNxD: predictions.
      keys_KxNxD: targets of all images of the batch.
      where_BxN: weight of a prediction, bool or float >= 0; None counts every one once.
      index_B: integer, which key image shows the image of a prediction, 0..K-1; None: the same row,
        K = B. Pass it when the predictions are a part of the batch.
      where_KxN: which keys exist, bool; None: all. A counted prediction must point at a key that
        exists.
      temperature: tau > 0; DenseCL uses 0.2.
      normalize: scale predictions and keys to length 1 first (a zero row stays zero).
      stop_gradient: treat the keys as constants.

    Returns:
      (sum over tokens of weight * cost in nats, sum of weights), float32 scalars. A counted image
      whose index is not in 0..K-1 gives NaN.

    Raises:
      ValueError: shapes that do not belong together.

    >>> import jax.numpy as jnp
    >>> z = jnp.tile(jnp.eye(3)[:, None], (1, 2, 1))  # 3 images, 2 positions
    >>> total, count = dense_boltzmann(z, z, temperature=0.5)
    >>> print(f"{total / count:.4f} over {count:.0f} tokens")  # log(1 + 2 exp(-2))
    0.2395 over 6 tokens
    """
    p_BxNxD, k_KxNxD = float32(prediction_BxNxD), float32(keys_KxNxD)
    assert_rank(p_BxNxD, 3, custom_message="prediction must be [B, N, D]")
    assert_shape(
        k_KxNxD, (None, *p_BxNxD.shape[1:]), custom_message=f"prediction has shape {p_BxNxD.shape}"
    )
    index_B = _index(index_B, p_BxNxD.shape[0], k_KxNxD.shape[0])
    p_BxNxD, _, weight_BxN = zero_masked_rows(p_BxNxD, p_BxNxD, where_BxN)
    k_KxNxD = jax.lax.stop_gradient(k_KxNxD) if stop_gradient else k_KxNxD
    if where_KxN is not None:
        exists_KxN = jnp.asarray(where_KxN) > 0
        assert_shape(exists_KxN, k_KxNxD.shape[:-1], custom_message="where_KxN: one per key")
        k_KxNxD = jnp.where(exists_KxN[..., None], k_KxNxD, 0.0)
    if normalize:
        p_BxNxD, k_KxNxD = l2_normalize(p_BxNxD), l2_normalize(k_KxNxD)
    logits_NxBxK = jnp.einsum("bnd,knd->nbk", p_BxNxD, k_KxNxD, precision=EXACT) / temperature
    if where_KxN is not None:
        logits_NxBxK = jnp.where(exists_KxN.T[:, None, :], logits_NxBxK, ABSENT)
    index_NxB = jnp.broadcast_to(index_B, logits_NxBxK.shape[:2])
    index_NxB = checked_index(index_NxB, weight_BxN.T > 0)
    return (
        weighted_sum(softmax_cross_entropy(logits_NxBxK, index_NxB), weight_BxN.T),
        weight_BxN.sum(),
    )


def densecl(
    prediction_BxNxD: ArrayLike,
    positive_BxNxD: ArrayLike,
    negative_KxD: ArrayLike,
    where_BxN: ArrayLike | None = None,
    *,
    index_B: ArrayLike | None = None,
    where_K: ArrayLike | None = None,
    temperature: ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    """Computes dense InfoNCE of DenseCL: a token's own target against one key of every other image.

    Everything is scaled to length 1 first, so a negative that is the mean of an image's
    *un-normalised* dense targets is DenseCL's key. Its queue of 65536 keys is the batch here. Only
    the predictions get a gradient.

    Args:
      prediction_BxNxD: predictions.
      positive_BxNxD: the target of each prediction.
      negative_KxD: one key an image, of all images of the batch.
      where_BxN: weight of a prediction, bool or float >= 0; None counts every one once.
      index_B: integer, which negative is the image's own and left out; None: the same row, K = B.
        An index outside 0..K-1 leaves none out.
      where_K: which negatives exist, bool; None: all.
      temperature: tau > 0; DenseCL uses 0.2.

    Returns:
      (sum over tokens of weight * cost in nats, sum of weights), float32 scalars. Without any other
      image a token costs 0.

    Raises:
      ValueError: shapes that do not belong together.

    >>> import jax.numpy as jnp
    >>> z = jnp.eye(3)[:, None]
    >>> total, count = densecl(z, z, z.mean(1), temperature=0.5)
    >>> print(f"{total / count:.4f}")  # log(1 + 2 exp(-2))
    0.2395
    """
    p_BxNxD, t_BxNxD, n_KxD = (
        float32(prediction_BxNxD),
        float32(positive_BxNxD),
        float32(negative_KxD),
    )
    assert_equal_shape([p_BxNxD, t_BxNxD], custom_message="prediction and positive")
    assert_rank(p_BxNxD, 3, custom_message="prediction must be [B, N, D]")
    assert_shape(
        n_KxD, (None, p_BxNxD.shape[-1]), custom_message=f"prediction has shape {p_BxNxD.shape}"
    )
    index_B = _index(index_B, p_BxNxD.shape[0], n_KxD.shape[0])
    p_BxNxD, t_BxNxD, weight_BxN = zero_masked_rows(p_BxNxD, t_BxNxD, where_BxN)
    t_BxNxD, n_KxD = jax.lax.stop_gradient((t_BxNxD, n_KxD))
    other_BxK = jnp.arange(n_KxD.shape[0]) != index_B[:, None]
    if where_K is not None:
        exists_K = jnp.asarray(where_K) > 0
        assert_shape(exists_K, n_KxD.shape[:1], custom_message="where_K: one per negative")
        other_BxK, n_KxD = other_BxK & exists_K, jnp.where(exists_K[:, None], n_KxD, 0.0)
    p_BxNxD, t_BxNxD, n_KxD = l2_normalize(p_BxNxD), l2_normalize(t_BxNxD), l2_normalize(n_KxD)
    logits_BxNxK = jnp.einsum("bnd,kd->bnk", p_BxNxD, n_KxD, precision=EXACT) / temperature
    own_BxNx1 = (p_BxNxD * t_BxNxD).sum(-1, keepdims=True) / temperature
    above_BxNxK = jnp.where(other_BxK[:, None], logits_BxNxK - own_BxNx1, ABSENT)
    cost_BxN = jax.nn.softplus(jax.nn.logsumexp(above_BxNxK, axis=-1))
    return weighted_sum(cost_BxN, weight_BxN), weight_BxN.sum()


def nt_xent(
    a_BxD: ArrayLike, b_BxD: ArrayLike, where_B: ArrayLike | None = None, *, temperature: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Computes NT-Xent of SimCLR: each view picks its twin among the 2B - 1 other views of the
    batch; both views receive gradients.

    Args:
      a_BxD: one view of each image.
      b_BxD: the other view.
      where_B: weight of an image, bool or float >= 0; one of weight 0 is neither a query nor a
        negative. None counts every image once.
      temperature: tau > 0; SimCLR uses 0.1 to 0.5.

    Returns:
      (sum over images of weight * cost in nats, sum of weights), float32 scalars. A cost is the
      mean of the cross-entropies of both views.

    Raises:
      ValueError: shapes that do not belong together.

    >>> import jax.numpy as jnp
    >>> total, count = nt_xent(jnp.eye(2), jnp.eye(2), temperature=0.5)
    >>> print(f"{total / count:.4f} over {count:.0f} images")  # log(1 + 2 exp(-2))
    0.2395 over 2 images
    """
    a_BxD, b_BxD, weight_B = _views(a_BxD, b_BxD, where_B)
    batch = a_BxD.shape[0]
    z_VxD = jnp.concatenate([l2_normalize(a_BxD), l2_normalize(b_BxD)])
    exists_V = jnp.tile(weight_B > 0, 2)
    candidate_VxV = exists_V & ~jnp.eye(2 * batch, dtype=bool)
    logits_VxV = jnp.matmul(z_VxD, z_VxD.T, precision=EXACT) / temperature
    twin_V = jnp.roll(jnp.arange(2 * batch), batch)
    cost_V = softmax_cross_entropy(jnp.where(candidate_VxV, logits_VxV, ABSENT), twin_V)
    return weighted_sum((cost_V[:batch] + cost_V[batch:]) / 2, weight_B), weight_B.sum()


def barlow_twins(
    a_BxD: ArrayLike,
    b_BxD: ArrayLike,
    where_B: ArrayLike | None = None,
    *,
    off_diagonal: float = 0.0051,
    eps: float = 1e-5,
) -> tuple[jax.Array, jax.Array]:
    """Computes the redundancy reduction of Barlow Twins: `sum_d (C_dd - 1)^2 + off_diagonal *
    sum_{d != e} C_de^2`.

    C is the cross-correlation of the two views over the counted images, each dimension standardised
    by its mean and biased variance there. Both views receive gradients. It is a function of the
    batch, not a sum over images: parts of a batch do not add up to the whole.

    Args:
      a_BxD: one view of each image.
      b_BxD: the other view.
      where_B: weight of an image, bool or float >= 0, in all statistics; None counts every image
        once.
      off_diagonal: weight of the off-diagonal terms; 0.0051 as published.
      eps: added to the variances.

    Returns:
      (value * count, count) with count the sum of weights, float32 scalars, so that it divides like
      all other losses. Dimensionless.

    Raises:
      ValueError: shapes that do not belong together.

    >>> import jax.numpy as jnp
    >>> z = jnp.array([[1., 1.], [1., -1.], [-1., 1.], [-1., -1.]])
    >>> total, count = barlow_twins(z, z)
    >>> print(f"{total / count:.4f}")
    0.0000
    >>> total, count = barlow_twins(z, z[:, ::-1])
    >>> print(f"{total / count:.4f}")  # two zeros on the diagonal, two ones beside it
    2.0102
    """
    a_BxD, b_BxD, weight_B = _views(a_BxD, b_BxD, where_B)
    count = weight_B.sum()
    share_Bx1 = (weight_B / jnp.where(count > 0, count, 1.0))[:, None]

    def standardize(x_BxD: jax.Array) -> jax.Array:
        centred_BxD = x_BxD - (share_Bx1 * x_BxD).sum(0)
        return centred_BxD * jax.lax.rsqrt((share_Bx1 * jnp.square(centred_BxD)).sum(0) + eps)

    c_DxD = jnp.matmul((share_Bx1 * standardize(a_BxD)).T, standardize(b_BxD), precision=EXACT)
    own_D = jnp.diagonal(c_DxD)
    others = jnp.where(jnp.eye(own_D.shape[0], dtype=bool), 0.0, jnp.square(c_DxD)).sum()
    return (jnp.square(own_D - 1).sum() + off_diagonal * others) * count, count


def prototypes(
    anchor_BxD: ArrayLike,
    target_BxD: ArrayLike,
    prototypes_KxD: ArrayLike,
    where_B: ArrayLike | None = None,
    *,
    temperature: float = 0.1,
    sharpening: float = 0.25,
    sinkhorn: int = 3,
    mean_entropy: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Assignment to learned prototypes with mean-entropy maximisation (MSN): `CE(q, p) +
    mean_entropy * (log K - H(mean p))`.

    `p = softmax(cos / temperature)` over the prototypes for the anchor, `q = assignments(...)` for
    the target. Anchor and prototypes receive gradients through p; q is a constant. The mean of p
    and the balancing of q run over the counted images of this call: parts of a batch do not add up
    to the whole.

    Args:
      anchor_BxD: the view that is trained.
      target_BxD: the other view of each image.
      prototypes_KxD: trainable prototypes; MSN draws 1024 from U(-1, 1) / sqrt(D).
      where_B: weight of an image, bool or float >= 0; None counts every image once.
      temperature: tau > 0 of the anchor.
      sharpening: T > 0 of the target, `q ~ p^(1/T)`.
      sinkhorn: number of balancing steps of q; 0 leaves it as sharpened.
      mean_entropy: weight of the term that spreads the batch over the prototypes. The Python number
        0 removes it from the program.

    Returns:
      (sum over images of weight * cost in nats, sum of weights), float32 scalars; the mean-entropy
      term counts once an image.

    Raises:
      ValueError: shapes that do not belong together.

    >>> import jax.numpy as jnp
    >>> z = jnp.eye(2)
    >>> total, count = prototypes(z, z[::-1], z, temperature=0.5)  # each anchor predicts wrongly
    >>> print(f"{total / count:.4f}")
    2.1263
    """
    a_BxD, t_BxD, weight_B = _views(anchor_BxD, target_BxD, where_B)
    k_KxD = float32(prototypes_KxD)
    q_BxK = assignments(
        t_BxD, k_KxD, weight_B, temperature=temperature, sharpening=sharpening, sinkhorn=sinkhorn
    )
    log_p_BxK = jax.nn.log_softmax(_cosine_similarity(a_BxD, k_KxD) / temperature)
    total, count = weighted_sum(-(q_BxK * log_p_BxK).sum(-1), weight_B), weight_B.sum()
    if not (isinstance(mean_entropy, int | float) and mean_entropy == 0):
        mean_K = (weight_B[:, None] * jnp.exp(log_p_BxK)).sum(0) / jnp.where(count > 0, count, 1.0)
        # No logarithm of an underflowed share: its gradient would be NaN.
        negative_entropy = (mean_K * jnp.log(jnp.where(mean_K > 0, mean_K, 1.0))).sum()
        total = total + mean_entropy * count * (jnp.log(float(k_KxD.shape[0])) + negative_entropy)
    return total, count


def assignments(
    target_BxD: ArrayLike,
    prototypes_KxD: ArrayLike,
    where_B: ArrayLike | None = None,
    *,
    temperature: float = 0.1,
    sharpening: float = 0.25,
    sinkhorn: int = 3,
) -> jax.Array:
    """Returns the targets of `prototypes`: sharpened softmax over the prototypes, balanced by
    Sinkhorn steps (MSN).

    One step scales every prototype to an equal share of the batch, then every image back to its
    weight. Computed on logarithms, so that a prototype far from all images causes no division by 0.

    Args:
      target_BxD: target embeddings.
      prototypes_KxD: prototypes.
      where_B: weight of an image, bool or float >= 0, in the balancing; None counts every image
        once.
      temperature: tau > 0.
      sharpening: T > 0, the exponent is 1 / T.
      sinkhorn: number of steps.

    Returns:
      float32 [B, K], rows that sum to 1 (the row of an image of weight 0 has no meaning). No
      gradient flows through it.

    Raises:
      ValueError: shapes that do not belong together.

    >>> import jax.numpy as jnp
    >>> z = jnp.array([[1., 0.], [1., 0.], [0., 1.]])
    >>> q = assignments(z, jnp.eye(2), temperature=1.0, sharpening=1.0, sinkhorn=3)
    >>> print(*(f"{x:.3f}" for x in q[:, 0]))
    0.650 0.650 0.201
    """
    t_BxD, k_KxD = jax.lax.stop_gradient((float32(target_BxD), float32(prototypes_KxD)))
    t_BxD, _, weight_B = zero_masked_rows(t_BxD, t_BxD, where_B)
    # Without any image there is nothing to balance; the logarithm of an empty sum would be -inf.
    weight_Bx1 = jnp.where(weight_B.sum() > 0, weight_B, 1.0)[:, None]
    log_q_BxK = jax.nn.log_softmax(_cosine_similarity(t_BxD, k_KxD) / (temperature * sharpening))

    def balance(_: int, log_q_BxK: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(log_q_BxK - jax.nn.logsumexp(log_q_BxK, axis=0, b=weight_Bx1))

    # A loop: unrolled, every step adds a second of XLA compile time.
    return jnp.exp(jax.lax.fori_loop(0, sinkhorn, balance, log_q_BxK))


def _cosine_similarity(x_BxD: jax.Array, k_KxD: jax.Array) -> jax.Array:
    assert_rank(x_BxD, 2, custom_message="images must be [B, D]")
    assert_shape(
        k_KxD, (None, x_BxD.shape[1]), custom_message=f"prototypes, with images {x_BxD.shape}"
    )
    return jnp.matmul(l2_normalize(x_BxD), l2_normalize(k_KxD).T, precision=EXACT)


def _views(
    a_BxD: ArrayLike, b_BxD: ArrayLike, where_B: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    a_BxD, b_BxD = float32(a_BxD), float32(b_BxD)
    assert_equal_shape([a_BxD, b_BxD], custom_message="the two views")
    assert_rank(a_BxD, 2, custom_message="both views must be [B, D]")
    return zero_masked_rows(a_BxD, b_BxD, where_B)


def _index(index_B: ArrayLike | None, batch: int, keys: int) -> jax.Array:
    if index_B is None:
        if batch != keys:
            raise ValueError(
                f"{batch} images have {keys} keys; pass index_B, which names the key of each image"
            )
        return jnp.arange(batch)
    index_B = jnp.asarray(index_B)
    assert_shape(index_B, (batch,), custom_message="index: one per image")
    return index_B
