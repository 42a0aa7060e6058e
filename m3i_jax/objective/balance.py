"""Dynamic weighting, Eq. 13: `L = L_ssp + lambda L_sp` with lambda = gamma * g_ssp / g_sp.

g is an exponential moving average of the norm of the gradient that a loss sends back to the input
features, that is to the encoder's output. The averages are the state of an optax transform, so that
they are sharded, saved and restored with the optimizer.

Order of a step: lambda is computed from the averages before the step; the step then updates them
with its norms. So lambda is independent of the split into microbatches and needs no second backward
pass.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike


class BalanceState(NamedTuple):
    """count: int32, number of steps. ssp, sp: float32, average gradient norm of the self-supervised
    and of the supervised losses; 0: no norm yet."""

    count: jax.Array  # type: ignore[assignment]  # optax's name; shadows tuple.count
    ssp: jax.Array
    sp: jax.Array


def track_balance(decay: float) -> optax.GradientTransformationExtraArgs:
    """Returns an optax transform that averages the two feature-gradient norms (M3I appendix B.1)
    and passes the updates through unchanged.

    `update(..., feature_grad_norms=(ssp, sp))` takes the norms of this step, two scalars >= 0. The
    first norm of a group initialises its average, so there is no bias towards zero. A norm that is
    zero (no labelled sample in the batch) or not finite leaves the average unchanged.

    Args:
      decay: weight of the past in [0, 1); the paper gives none, 0.99 is the default of this
        project.

    Returns:
      the transform; its state is a `BalanceState`. `update` raises ValueError without
      `feature_grad_norms`.

    Raises:
      ValueError: decay outside [0, 1).

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.named_chain(("balance", track_balance(0.9)), ("sgd", optax.sgd(0.1)))
    >>> state = tx.init(jnp.ones(2))
    >>> for norms in ((2., 4.), (3., 0.)):
    ...     _, state = tx.update(jnp.ones(2), state, jnp.ones(2), feature_grad_norms=norms)
    >>> averages = state["balance"]
    >>> print(f"{averages.ssp:.2f} {averages.sp:.2f} {balance_weight(averages):.3f}")
    2.10 4.00 0.525
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}; it must be at least 0 and below 1")

    def init(params: optax.Params) -> BalanceState:
        del params
        return BalanceState(
            jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32), jnp.zeros([], jnp.float32)
        )

    def update(
        updates: optax.Updates,
        state: BalanceState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, BalanceState]:
        del params
        if "feature_grad_norms" not in extra:
            raise ValueError(
                "track_balance needs update(..., feature_grad_norms=(ssp, sp)), the gradient norms"
                " at the encoder output"
            )
        ssp, sp = extra["feature_grad_norms"]
        return updates, BalanceState(
            optax.safe_increment(state.count),
            _average(state.ssp, ssp, decay),
            _average(state.sp, sp, decay),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _average(old: jax.Array, norm: ArrayLike, decay: float) -> jax.Array:
    norm = jax.lax.stop_gradient(jnp.asarray(norm).astype(jnp.float32))
    new = jnp.where(old == 0, norm, decay * old + (1 - decay) * norm)
    return jnp.where(jnp.isfinite(norm) & (norm > 0), new, old)


def balance_weight(
    state: BalanceState, *, gamma: ArrayLike = 1.0, limits: tuple[float, float] = (0.0, 1e4)
) -> jax.Array:
    """lambda of Eq. 13, `gamma * ssp / sp`, clipped; gamma until both groups have an average.

    Args:
      state: the averages *before* this step.
      gamma: ratio of the supervised to the self-supervised gradient at the features; 1 in the
        paper.
      limits: (lowest, highest) lambda.

    Returns:
      float32 scalar without a gradient.

    Raises:
      ValueError: limits that are not 0 <= lowest <= highest.

    >>> import jax.numpy as jnp
    >>> state = BalanceState(jnp.int32(5), jnp.float32(3.), jnp.float32(2.))
    >>> float(balance_weight(state, gamma=2.))
    3.0
    >>> float(balance_weight(BalanceState(0, jnp.float32(0.), jnp.float32(0.)), gamma=2.))
    2.0
    """
    low, high = limits
    if not (0 <= low <= high and not math.isinf(low)):
        raise ValueError(f"limits are {limits}; they must be 0 <= lowest <= highest")
    gamma = jnp.asarray(gamma).astype(jnp.float32)
    both = (state.ssp > 0) & (state.sp > 0)
    ratio = jnp.clip(gamma * state.ssp / (state.sp + 1e-12), low, high)
    return jax.lax.stop_gradient(jnp.where(both, ratio, gamma))


def feature_norm(tree: Any) -> jax.Array:
    """Global Frobenius norm of a tree of gradients, in float32: the gradient norm "to input
    features" of M3I appendix B.1.

    On global arrays under `jit` the sum is over the global batch. Given the norms of parts of a
    batch (microbatches whose losses are divided by the count of the whole batch), it returns the
    norm of the whole: the root of the sum of squares.

    Args:
      tree: any tree of arrays, usually the cotangent of the encoder output [B, T, D].

    Returns:
      float32 scalar; 0 for an empty tree.

    >>> import jax.numpy as jnp
    >>> float(feature_norm({"z": jnp.array([3., 0.]), "cls": jnp.array([4.])}))
    5.0
    >>> float(feature_norm([3., 4.]))
    5.0
    """
    squares = [jnp.square(jnp.asarray(x).astype(jnp.float32)).sum() for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.zeros([], jnp.float32)))
