"""Losses -log P^(z_y | prediction), the prediction terms of Eqs. 3 and 4: Gaussian (squared error)
or Boltzmann (softmax cross-entropy).

Every function returns `(sum, count)`, two float32 scalars: the weighted sum over rows and the sum
of the weights, and the caller divides once. A row without a target has weight 0. Rows of weight 0
are ignored in the sum and in all gradients, even if NaN. Inputs of any float type are computed in
float32.

Sums over parts of a batch add up to those of the batch where a row's cost depends on its row alone.
Functions that compare rows (`text`, `boltzmann` with keys of the batch, `gaussian` with a second
moment) see the rows of the call: call them on the global batch, or pass them the keys or the moment
of the whole batch.

T rows (tokens or images), D width, K keys, B images, C classes, E width of the joint space.
Functions of `_TxD` arrays take any number of leading axes: `[B, N, D]` with weights `[B, N]` gives
the same numbers as `[B * N, D]` with weights `[B * N]`."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from m3i_jax.objective.manual_axes import custom_vjp
from m3i_jax.objective.numerics import (
    ABSENT,
    EXACT,
    assert_equal_shape,
    assert_rank,
    assert_shape,
    checked_index,
    float32,
    l2_normalize,
    select_logit,
    softmax_cross_entropy,
    weighted_sum,
    zero_masked_rows,
)
from m3i_jax.objective.similarity import Pairs, chunked_cross_entropy, similarities


def gaussian(
    prediction_TxD: ArrayLike,
    target_TxD: ArrayLike,
    where_T: ArrayLike | None = None,
    *,
    second_moment: ArrayLike = 0.0,
    moment_DxD: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes the dense Gaussian posterior: squared error per element, with an optional
    anti-collapse term.

    A row costs `(|p - t|^2 + w p' C p) / D`. The first part is the Gaussian of M3I section 3.1 (the
    paper's 1 / (2 sigma^2) is 1 / D here); the second, with C the second moment of the targets, is
    the one SiameseIM takes from UniGrad: `p' C p` is about `|p|^2` while the target features are
    decorrelated and D times as much once they have collapsed to one direction.

    Its gradient with respect to p, `2 g (p - t + w p C) / D`, is written by hand: the forward
    pass keeps the product p C, so the backward pass has no matrix product. Only p gets
    a gradient: t and C are constants, also where the target shares parameters. The product runs at
    JAX's default matrix precision (`jax.default_matmul_precision` changes it); everything else is
    float32. With `second_moment`, only reverse mode works: `jax.jvp` and `jax.jacfwd` raise
    TypeError.

    Args:
      prediction_TxD: predictions p, not normalised.
      target_TxD: targets t of the same shape; `layer_normalize` them for features,
        `patch_normalize` for pixels.
      where_T: weight of a row, bool or float >= 0; None counts every row once.
      second_moment: w >= 0; SiameseIM uses 0.02. The Python number 0 removes the term from the
        program.
      moment_DxD: C, symmetric. None: computed from the counted targets. Pass it when the call sees
        only a part of the batch.

    Returns:
      (sum over rows of weight * cost, sum of weights), float32 scalars. Dimensionless, per element
      of a row.

    Raises:
      ValueError: shapes that do not belong together.

    >>> import jax.numpy as jnp
    >>> p = jnp.array([[1., 0., 0., 0.], [0., 1., 0., -1.]])
    >>> t = layer_normalize(jnp.array([[1., 2., 3., 4.], [4., 0., 0., 0.]]))
    >>> total, count = gaussian(p, t, second_moment=0.02)
    >>> print(f"{total / count:.4f} over {count:.0f} rows")
    1.7204 over 2 rows
    """
    p_TxD, t_TxD = float32(prediction_TxD), jax.lax.stop_gradient(float32(target_TxD))
    assert_equal_shape([p_TxD, t_TxD], custom_message="prediction and target")
    if p_TxD.ndim < 1:
        raise ValueError("prediction and target are scalars; pass arrays of shape [..., D]")
    p_TxD, t_TxD, weight_T = zero_masked_rows(p_TxD, t_TxD, where_T)
    width = p_TxD.shape[-1]
    if isinstance(second_moment, int | float) and second_moment == 0:
        cost_T = jnp.square(p_TxD - t_TxD).sum(-1)
    else:
        if moment_DxD is None:
            c_DxD = _moment(t_TxD, weight_T)
        else:
            c_DxD = float32(moment_DxD)
            assert_shape(c_DxD, (width, width), custom_message="moment_DxD must be [D, D]")
        cost_T = _energy(
            p_TxD,
            t_TxD,
            jax.lax.stop_gradient(c_DxD),
            jax.lax.stop_gradient(float32(second_moment)),
        )
    return (weight_T * cost_T).sum() / width, weight_T.sum()


@custom_vjp
def _energy(p_TxD: jax.Array, t_TxD: jax.Array, c_DxD: jax.Array, w: jax.Array) -> jax.Array:
    return _energy_forward(p_TxD, t_TxD, c_DxD, w)[0]


def _energy_forward(
    p_TxD: jax.Array, t_TxD: jax.Array, c_DxD: jax.Array, w: jax.Array
) -> tuple[jax.Array, jax.Array]:
    error_TxD, weighted_TxD = p_TxD - t_TxD, w * (p_TxD @ c_DxD)
    # The only residual is half of the gradient; p, t, C and their product are not kept.
    return (jnp.square(error_TxD) + p_TxD * weighted_TxD).sum(-1), error_TxD + weighted_TxD


def _energy_backward(half_TxD: jax.Array, g_T: jax.Array) -> tuple[jax.Array, None, None, None]:
    return 2 * g_T[..., None] * half_TxD, None, None, None


_energy.defvjp(_energy_forward, _energy_backward)


def second_moment(target_TxD: ArrayLike, where_T: ArrayLike | None = None) -> jax.Array:
    """Computes the second moment of the targets, `C = sum_t w t t' / sum_t w` (SiameseIM's
    anti-collapse term), without a T x T product.

    Take it over all targets of the global batch together: the average of C over parts is C only if
    the parts have equal weight.

    Args:
      target_TxD: targets.
      where_T: weights >= 0; None counts every row once.

    Returns:
      C, float32 [D, D], symmetric; zeros if no row counts. No gradient flows through it.

    Raises:
      ValueError: weights of another shape than the rows.

    >>> import jax.numpy as jnp
    >>> second_moment(jnp.array([[1., 2.], [3., 0.]])).tolist()
    [[5.0, 1.0], [1.0, 2.0]]
    >>> second_moment(jnp.array([[1., 2.], [3., 0.]]), jnp.array([True, False])).tolist()
    [[1.0, 2.0], [2.0, 4.0]]
    """
    t_TxD = jax.lax.stop_gradient(float32(target_TxD))
    t_TxD, _, weight_T = zero_masked_rows(t_TxD, t_TxD, where_T)
    return _moment(t_TxD, weight_T)


def _moment(t_TxD: jax.Array, weight_T: jax.Array) -> jax.Array:
    rows = tuple(range(t_TxD.ndim - 1))
    total = weight_T.sum()
    sum_DxD = jnp.tensordot(t_TxD * weight_T[..., None], t_TxD, axes=(rows, rows))
    return sum_DxD / jnp.where(total > 0, total, 1.0)


def boltzmann(
    prediction_TxD: ArrayLike,
    keys_KxD: ArrayLike,
    index_T: ArrayLike,
    where_T: ArrayLike | None = None,
    *,
    where_K: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    normalize: bool = True,
    stop_gradient: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Computes the Boltzmann posterior over given targets: `-log( exp(p.k_index / tau) / sum_k
    exp(p.k / tau) )`, M3I section 3.1; InfoNCE.

    The keys are the target representations that the denominator runs over: those of the batch stand
    for those of the training set. For dense targets whose negatives are the same position of the
    other images, `jax.vmap` this function over positions. MoCo v3 uses temperature 0.2 and
    multiplies its loss by twice the temperature; that factor is left to the caller.

    Args:
      prediction_TxD: predictions.
      keys_KxD: target representations, the right one and the negatives.
      index_T: integer, the row of `keys_KxD` that is the target of a prediction, 0..K-1.
      where_T: weight of a prediction, bool or float >= 0; None counts every row once.
      where_K: which keys exist, bool; None: all. A counted prediction must point at a key that
        exists.
      temperature: tau > 0.
      normalize: scale predictions and keys to length 1 first (a zero row stays zero). The paper's
        formula has no such step, every public implementation has.
      stop_gradient: treat the keys as constants.

    Returns:
      (sum over rows of weight * cost in nats, sum of weights), float32 scalars. A counted
      row whose index is not in 0..K-1 gives NaN, so that the mistake is noticed.

    Raises:
      ValueError: shapes that do not belong together.

    >>> import jax.numpy as jnp
    >>> z = jnp.eye(3)
    >>> total, count = boltzmann(z, z, jnp.arange(3), temperature=0.5)
    >>> print(f"{total / count:.4f}")  # log(1 + 2 exp(-2))
    0.2395
    """
    p_TxD, k_KxD, index_T = float32(prediction_TxD), float32(keys_KxD), jnp.asarray(index_T)
    assert_rank(k_KxD, 2, custom_message="keys must be [K, D]")
    assert_shape(p_TxD, (..., k_KxD.shape[1]), custom_message=f"keys have shape {k_KxD.shape}")
    assert_shape(index_T, p_TxD.shape[:-1], custom_message="index: one per prediction")
    p_TxD, _, weight_T = zero_masked_rows(p_TxD, p_TxD, where_T)
    k_KxD = jax.lax.stop_gradient(k_KxD) if stop_gradient else k_KxD
    if where_K is not None:
        exists_K = jnp.asarray(where_K) > 0
        assert_shape(exists_K, k_KxD.shape[:1], custom_message="where_K: one per key")
        k_KxD = jnp.where(exists_K[:, None], k_KxD, 0.0)
    if normalize:
        p_TxD, k_KxD = l2_normalize(p_TxD), l2_normalize(k_KxD)
    logits_TxK = jnp.matmul(p_TxD, k_KxD.T, precision=EXACT) / temperature
    if where_K is not None:
        logits_TxK = jnp.where(exists_K, logits_TxK, ABSENT)
    index_T = checked_index(index_T, weight_T > 0)
    return weighted_sum(softmax_cross_entropy(logits_TxK, index_T), weight_T), weight_T.sum()


def category(
    logits_BxC: ArrayLike,
    label_B: ArrayLike,
    where_B: ArrayLike | None = None,
    *,
    smoothing: ArrayLike = 0.1,
) -> tuple[jax.Array, jax.Array]:
    """Computes the category posterior: softmax cross-entropy with label smoothing; the targets are
    the rows of the classifier (M3I section 3.2).

    `(1 - s) (-log p_label) + s (-mean_c log p_c)`: the smoothed part is spread over all C classes,
    the right one included. M3I uses s = 0.1 (Table 7).

    Args:
      logits_BxC: unnormalised log-probabilities.
      label_B: integer class 0..C-1; a negative label means that the image has no category and
        weighs 0.
      where_B: further weight of an image, bool or float >= 0; None counts every labelled image
        once.
      smoothing: s in [0, 1]. With the Python number 0, a class whose logit is -inf is ruled out.

    Returns:
      (sum over images of weight * cost in nats, sum of weights), float32 scalars. A counted label
      >= C gives NaN, so that a wrong number of classes is noticed.

    Raises:
      ValueError: shapes that do not belong together.

    >>> import jax.numpy as jnp
    >>> logits = jnp.array([[2., 1., 0., -1.], [9., 9., 9., 9.]])
    >>> total, count = category(logits, jnp.array([0, -1]))
    >>> print(f"{total:.4f} over {count:.0f} image")
    0.5902 over 1 image
    """
    logits_BxC, label_B = float32(logits_BxC), jnp.asarray(label_B)
    if logits_BxC.ndim < 1:
        raise ValueError("logits are a scalar; pass an array of shape [..., C]")
    assert_shape(label_B, logits_BxC.shape[:-1], custom_message="label: one per row of logits")
    labelled_B = label_B >= 0
    weight_B = labelled_B.astype(jnp.float32)
    if where_B is not None:
        where_B = jnp.asarray(where_B)
        assert_equal_shape([where_B, label_B], custom_message="where and label")
        weight_B = weight_B * where_B.astype(jnp.float32)
    logits_BxC = jnp.where((weight_B > 0)[..., None], logits_BxC, 0.0)
    label_B = checked_index(label_B, weight_B > 0)
    cost_B = softmax_cross_entropy(logits_BxC, label_B)
    # 0 times the -inf of a class that a caller rules out would be NaN
    if not (isinstance(smoothing, int | float) and smoothing == 0):
        above_B = (logits_BxC - select_logit(logits_BxC, label_B)[..., None]).mean(-1)
        cost_B -= smoothing * above_B
    return weighted_sum(cost_B, weight_B), weight_B.sum()


def text(
    image_BxE: ArrayLike,
    text_BxE: ArrayLike,
    log_scale: ArrayLike,
    where_B: ArrayLike | None = None,
    *,
    group_B: ArrayLike | None = None,
    chunk: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Computes the text posterior: the symmetric contrastive loss of CLIP over the whole batch (M3I
    section 3.2, weakly-supervised).

    With u, v the embeddings scaled to length 1 and s = exp(log_scale), a pair costs the mean of two
    cross-entropies over `s u v'`: its caption among all captions and its image among all images. On
    global arrays under `jit` this is the loss of the global batch with its full gradient, whatever
    the sharding over axes of type `AxisType.Auto`, which is not the default of `jax.make_mesh`;
    sums over microbatches are another loss, with fewer negatives. Call it once for each role: the
    same caption must not stand in one softmax twice.

    Args:
      image_BxE: image embeddings; row b belongs to row b of `text_BxE`.
      text_BxE: text embeddings. Both receive gradients: the text tower is trained jointly (M3I
        section 3.4).
      log_scale: scalar, the logarithm of the inverse temperature; CLIP starts at ln(1 / 0.07) and
        keeps it at most ln 100.
      where_B: weight of a pair, bool or float >= 0; a pair of weight 0 is neither a query nor a
        negative. None counts every pair once.
      group_B: integers; pairs of equal number, such as those of equal captions, are no negatives of
        each other. A pair stays its own positive. None: all other pairs are negatives.
      chunk: captions whose similarities to all images are in memory at once, in forward and
        backward; any number. 0: all, as one B x B matrix. Same numbers; the product of similarities
        is computed once more in the backward, and `jax.jvp` and `jax.jacfwd` raise TypeError.

    Returns:
      (sum over pairs of weight * cost in nats, sum of weights), float32 scalars; (0, 0) if no pair
      counts.

    Raises:
      ValueError: shapes that do not belong together.

    >>> import jax.numpy as jnp
    >>> total, count = text(jnp.eye(2), jnp.eye(2), jnp.log(2.))
    >>> print(f"{total / count:.4f}")  # log(1 + exp(-2))
    0.1269
    >>> total, count = text(jnp.eye(3), jnp.eye(3), jnp.log(2.), group_B=jnp.array([4, 7, 7]))
    >>> print(f"{total:.4f}")  # 2 log(1 + exp(-2)) + log(1 + 2 exp(-2))
    0.4934
    """
    u_BxE, v_BxE = float32(image_BxE), float32(text_BxE)
    assert_equal_shape([u_BxE, v_BxE], custom_message="image and text")
    assert_rank(u_BxE, 2, custom_message="image and text must be [B, E]")
    u_BxE, v_BxE, weight_B = zero_masked_rows(u_BxE, v_BxE, where_B)
    u_BxE, v_BxE = l2_normalize(u_BxE) * jnp.exp(float32(log_scale)), l2_normalize(v_BxE)
    batch = u_BxE.shape[0]
    if group_B is not None:
        group_B = jnp.asarray(group_B)
        assert_equal_shape([group_B, weight_B], custom_message="group: one per row")
    number_B = jnp.arange(batch)
    rows = Pairs(number_B, None if where_B is None else weight_B > 0, group_B)
    if 0 < chunk < batch:
        cost_B = chunked_cross_entropy(chunk, u_BxE, v_BxE, rows)
    else:
        logits_BxB = similarities(u_BxE, v_BxE, rows, rows)
        cost_B = (
            softmax_cross_entropy(logits_BxB, number_B)
            + softmax_cross_entropy(logits_BxB.T, number_B)
        ) / 2
    return weighted_sum(cost_B, weight_B), weight_B.sum()


def layer_normalize(x: ArrayLike, eps: float = 1e-5) -> jax.Array:
    """Layer norm over the last axis without scale and offset, for dense targets (SiameseIM, and its
    eps rather than 1e-6).

    Args:
      x: [..., D].
      eps: added to the (biased) variance.

    Returns:
      float32 of the same shape, mean 0 and variance about 1 along the last axis.

    >>> import jax.numpy as jnp
    >>> print(*(f"{x:.4f}" for x in layer_normalize(jnp.array([4., 0., 0., 0.]))))
    1.7320 -0.5773 -0.5773 -0.5773
    """
    x = float32(x)
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)


def patch_normalize(pixels: ArrayLike, eps: float = 1e-6) -> jax.Array:
    """Normalise the pixels of each patch by their own mean and unbiased variance: MAE's pixel
    targets.

    Args:
      pixels: [..., P], the P numbers of a patch (row in the patch, column in the patch, channel).
      eps: added to the variance, which is divided by P - 1.

    Returns:
      float32 of the same shape.

    Raises:
      ValueError: fewer than two numbers a patch, which have no unbiased variance.

    >>> import jax.numpy as jnp
    >>> print(*(f"{x:.4f}" for x in patch_normalize(jnp.arange(4.))))
    -1.1619 -0.3873 0.3873 1.1619
    """
    x = float32(pixels)
    if x.ndim < 1 or x.shape[-1] < 2:
        raise ValueError(
            f"pixels have shape {x.shape}; a patch needs at least two numbers on the last axis"
        )
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(
        jnp.square(centred).sum(-1, keepdims=True) / (x.shape[-1] - 1) + eps
    )
