"""Soft assignments of images or tokens to prototypes as targets, and what keeps them from collapse:
Sinkhorn-Knopp (SwAV, DINOv2) and centring (DINO, iBOT).

A prototype posterior predicts which of K prototypes the target encoder assigns a row to. Its
prediction term alone is least if every row goes to one prototype. Both functions are constraints on
the marginal of the targets, H(mean assignment), which is at most log K: `sinkhorn` scales the
assignments of a batch until every prototype has an equal share, `centering` subtracts a running
mean of the logits, its first-order approximation, which needs no other row of the batch.

In the published code every sum of both is over the rows of all devices, and so it is here: they see
one global batch, however it is divided.

M rows (images, or tokens of images), K prototypes."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from m3i_jax.objective.numerics import (
    assert_rank,
    assert_shape,
    float32,
    weighted_sum,
    zero_masked_rows,
)


def sinkhorn(
    logits_MxK: ArrayLike,
    where_M: ArrayLike | None = None,
    *,
    temperature: ArrayLike,
    iterations: int = 3,
) -> jax.Array:
    """Assignments of rows to prototypes that share the rows (almost) equally: exp(logits /
    temperature) is scaled in turn to equal sums of the prototypes and to sums 1 of the rows.

    The last scaling is that of the rows, so that each row is a distribution, and the prototypes are
    equal only up to what few iterations leave. Computed on logarithms: no logit overflows, and a
    prototype that is far from all rows causes no division by 0.

    Args:
      logits_MxK: similarities of the target encoder.
      where_M: weight of a row in the shares, bool or float >= 0; rows of weight 0 change no other
        row, even if NaN, and their own result has no meaning. None counts every row once.
      temperature: tau > 0.
      iterations: at least 1; 3 as published.

    Returns:
      float32 [M, K], rows that sum to 1. No gradient flows through it.

    Raises:
      ValueError: shapes that do not belong together, or no iteration.

    Source: Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster
    Assignments", section 3.1; DINOv2, dinov2/loss/dino_clstoken_loss.py.

    >>> import jax.numpy as jnp
    >>> logits = jnp.array([[2.0, 0.0], [2.0, 0.0], [2.0, 1.9]])
    >>> q = sinkhorn(logits, temperature=1.0, iterations=50)
    >>> print(*(f"{x:.3f}" for x in q[:, 0]), *(f"{x:.2f}" for x in q.sum(0)))
    0.644 0.644 0.213 1.50 1.50
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; without one, nothing is scaled")
    z_MxK = jax.lax.stop_gradient(float32(logits_MxK))
    assert_rank(z_MxK, 2, custom_message="logits must be [M, K]")
    z_MxK, _, weight_M = zero_masked_rows(z_MxK, z_MxK, where_M)
    # Without any row there is nothing to share; the logarithm of an empty sum would be -inf.
    weight_Mx1 = jnp.where(weight_M.sum() > 0, weight_M, 1.0)[:, None]

    def scale(_: int, log_q_MxK: jax.Array) -> jax.Array:
        shares_1xK = jax.nn.logsumexp(log_q_MxK, axis=0, b=weight_Mx1, keepdims=True)
        return jax.nn.log_softmax(log_q_MxK - shares_1xK)

    # A loop: unrolled, every iteration adds to XLA's compile time.
    return jnp.exp(jax.lax.fori_loop(0, iterations, scale, z_MxK / temperature))


def centering(logits_MxK: ArrayLike, center_K: ArrayLike, *, temperature: ArrayLike) -> jax.Array:
    """Assignments of rows to prototypes, softmax((logits - center) / temperature): a prototype that
    was near to many rows before has to be nearer to be chosen again.

    Args:
      logits_MxK: similarities of the target encoder, [..., K].
      center_K: running mean of the logits of earlier steps, as `track_centers` keeps it; 0 at the
        first step. It is subtracted before the division by the temperature.
      temperature: tau > 0; less than the prediction's, or the assignments become uniform.

    Returns:
      float32 [..., K], rows that sum to 1. No gradient flows through it.

    Raises:
      ValueError: a center of another width.

    Source: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", section
    3.1; facebookresearch/dino, main_dino.py.

    >>> import jax.numpy as jnp
    >>> print(centering(jnp.array([[3.0, 1.0]]), jnp.array([2.0, 0.0]), temperature=0.1).tolist())
    [[0.5, 0.5]]
    """
    z_MxK, c_K = jax.lax.stop_gradient((float32(logits_MxK), float32(center_K)))
    assert_shape(c_K, z_MxK.shape[-1:], custom_message="center: one number a prototype")
    return jax.nn.softmax((z_MxK - c_K) / temperature)


def soft_cross_entropy(
    logits_MxK: ArrayLike,
    target_MxK: ArrayLike,
    where_M: ArrayLike | None = None,
    *,
    temperature: ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of softmax(logits / temperature) with a distribution as target (DINO, iBOT).

    Args:
      logits_MxK: predictions, [..., K].
      target_MxK: distributions such as those of `sinkhorn` or `centering`; constants.
      where_M: weight of a row, bool or float >= 0; rows of weight 0 may be NaN. None counts every
        row once.
      temperature: tau > 0 of the prediction; 0.1 as published.

    Returns:
      (sum over rows of weight * cost in nats, sum of weights), float32 scalars.

    Raises:
      ValueError: shapes that do not belong together.

    >>> import jax.numpy as jnp
    >>> total, count = soft_cross_entropy(jnp.zeros((3, 4)), jnp.full((3, 4), 0.25), temperature=1)
    >>> print(f"{total / count:.4f}")  # log 4
    1.3863
    """
    z_MxK, t_MxK = float32(logits_MxK), jax.lax.stop_gradient(float32(target_MxK))
    assert_shape(t_MxK, z_MxK.shape, custom_message="target: like the logits")
    z_MxK, t_MxK, weight_M = zero_masked_rows(z_MxK, t_MxK, where_M)
    cost_M = -(t_MxK * jax.nn.log_softmax(z_MxK / temperature)).sum(-1)
    return weighted_sum(cost_M, weight_M), weight_M.sum()


class PrototypeState(NamedTuple):
    """count: int32, updates so far. rise: float32 in 0..1, how far the targets' temperature has
    risen. centers: {space: [K]}, running means of the target encoder's logits."""

    count: jax.Array  # type: ignore[assignment]  # optax's name; shadows tuple.count
    rise: jax.Array
    centers: dict[str, jax.Array]


def track_centers(
    widths: Mapping[str, int],
    *,
    momentum: float = 0.9,
    rise: Callable[[Any], Any] = lambda step: 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Optax transform that keeps the centres of `centering` and passes the updates through:
    `center <- momentum * center + (1 - momentum) * mean logits`, from 0.

    The centre of a step thus holds the logits of the steps before it. As optimizer state it is
    saved and restored with the rest.

    Args:
      widths: {name of a space: number of its prototypes K}.
      momentum: in [0, 1); 0.9 as published.
      rise: a schedule of the step in 0..1, kept in the state for temperatures that rise.

    Returns:
      the transform; its state is a `PrototypeState`, and `update` takes
      `mean_logits={space: [K]}`. Without it, or for a space that it lacks, a centre stays.

    Raises:
      ValueError: a momentum outside 0..1, 1 excluded.

    >>> import jax.numpy as jnp
    >>> tx = track_centers({"space": 2}, momentum=0.75)
    >>> state = tx.init({})
    >>> _, state = tx.update({}, state, {}, mean_logits={"space": jnp.array([4.0, 8.0])})
    >>> print(state.centers["space"].tolist())
    [1.0, 2.0]
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}; it must lie in 0..1, 1 excluded")

    def init(params: optax.Params) -> PrototypeState:
        del params
        zero = jnp.zeros([], jnp.int32)
        centers = {name: jnp.zeros(width, jnp.float32) for name, width in widths.items()}
        return PrototypeState(zero, jnp.asarray(rise(zero), jnp.float32), centers)

    def update(
        updates: optax.Updates,
        state: PrototypeState,
        params: optax.Params | None = None,
        *,
        mean_logits: Mapping[str, jax.Array] | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, PrototypeState]:
        del params, extra
        count, means = optax.safe_increment(state.count), mean_logits or {}
        centers = {
            name: momentum * center + (1 - momentum) * means[name] if name in means else center
            for name, center in state.centers.items()
        }
        return updates, PrototypeState(count, jnp.asarray(rise(count), jnp.float32), centers)

    return optax.GradientTransformationExtraArgs(init, update)
