"""The momentum target encoder f_phi of M3I section 3.4 as an optax transform whose state holds the
target's parameters.

It is last in the chain and so receives the final updates: the target at step k + 1 contains the
parameters of step k + 1, which equals an update at the beginning of the next step, as in SiameseIM
and MoCo v3. As optimizer state it is sharded, donated, saved and restored like the rest.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

Schedule = Callable[[Any], Any]


class TargetState(NamedTuple):
    """count: int32, updates so far. params: the target's parameters, shaped like the selected part
    of the model's."""

    count: jax.Array  # type: ignore[assignment]  # optax's name; shadows tuple.count
    params: Any


def track_target(
    momentum: float | Schedule, select: Callable[[Any], Any] = lambda params: params
) -> optax.GradientTransformationExtraArgs:
    """Returns an optax transform that keeps an exponential moving average of parameters (M3I
    section 3.4; Table 7) and passes the updates through.

    The average starts as a copy of the parameters. Update number k (from 1) sets it to `m(k) * old
    + (1 - m(k)) * new`, new being the parameters *after* the update: put the transform last in the
    chain. Integer leaves are copied. The average has the types of the parameters: in bfloat16,
    whose numbers are about 0.5 % apart, it does not follow them at a momentum near 1, so keep them
    in float32.

    Args:
      momentum: m in [0, 1], or a schedule k -> m such as `cosine_momentum`.
      select: the part of the parameters that the target has, e.g. `lambda params:
        params["encoder"]`; default all. The decoder and the heads of the prediction side have no
        target (SiameseIM).

    Returns:
      the transform; its state is a `TargetState`. `update` takes `evaluated=`, a function from the
      parameters after the update to those that are averaged in their place (default: themselves),
      and raises ValueError without params.

    Raises:
      ValueError: a constant momentum outside [0, 1].

    >>> import jax.numpy as jnp, optax
    >>> target = track_target(0.75, lambda p: p["encoder"])
    >>> tx = optax.named_chain(("sgd", optax.sgd(1.0)), ("target", target))
    >>> params = {"encoder": jnp.array(1.0), "decoder": jnp.array(1.0)}
    >>> state = tx.init(params)
    >>> grads = {"encoder": jnp.array(4.0), "decoder": jnp.array(0.0)}
    >>> updates, state = tx.update(grads, state, params)
    >>> print(optax.apply_updates(params, updates)["encoder"])
    -3.0
    >>> print(state["target"].params)  # .75 * 1 + .25 * -3
    0.0
    """
    if not callable(momentum) and not 0 <= momentum <= 1:
        raise ValueError(f"momentum is {momentum}; it must lie in 0..1")

    def init(params: optax.Params) -> TargetState:
        # Copied because parameters and state are donated together, and one buffer cannot be donated
        # twice.
        return TargetState(
            jnp.zeros([], jnp.int32),
            jax.tree.map(lambda x: jnp.array(x, copy=True), select(params)),
        )

    def update(
        updates: optax.Updates,
        state: TargetState,
        params: optax.Params | None = None,
        *,
        evaluated: Callable[[Any], Any] = lambda params: params,
        **extra: Any,
    ) -> tuple[optax.Updates, TargetState]:
        del extra
        if params is None:
            raise ValueError(
                "track_target needs update(updates, state, params): it averages the parameters, not"
                " the updates"
            )
        count = optax.safe_increment(state.count)
        m = jnp.asarray(momentum(count) if callable(momentum) else momentum).astype(jnp.float32)
        new = select(evaluated(optax.apply_updates(params, updates)))
        return updates, TargetState(
            count, jax.tree.map(lambda old, x: _average(old, x, m), state.params, new)
        )

    return optax.GradientTransformationExtraArgs(init, update)


class SnapshotState(NamedTuple):
    """count: int32, updates so far. taken: float32, 1 where `params` is worth predicting: it has
    been taken in this run, or was loaded. params: of the target encoder at an earlier step."""

    count: jax.Array  # type: ignore[assignment]  # optax's name; shadows tuple.count
    taken: jax.Array
    params: Any


def hold_snapshot(
    steps: Sequence[int], select: Callable[[Any], Any], *, taken: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Returns an optax transform that keeps a target encoder as it was at one of `steps`, the last
    that has passed (the Gram teacher of DINOv3), and passes the updates through.

    Args:
      steps: updates, from 1, at which the snapshot is taken again.
      select: the part of the parameters that it has.
      taken: whether the parameters at the start are worth predicting.

    Returns:
      the transform; its state is a `SnapshotState`, and `update` takes `average=`, the parameters
      of the EMA target before that update, which has what `select` chooses. Without it, the
      snapshot stays.

    >>> import jax.numpy as jnp
    >>> tx = hold_snapshot([2], lambda params: params)
    >>> state = tx.init(jnp.zeros(1))
    >>> for average in (5.0, 6.0, 7.0):
    ...     _, state = tx.update(jnp.zeros(1), state, average=jnp.array([average]))
    ...     print(state.params.item(), state.taken)
    0.0 0.0
    6.0 1.0
    6.0 1.0
    """
    chosen = tuple(steps)

    def init(params: optax.Params) -> SnapshotState:
        copy = jax.tree.map(lambda x: jnp.array(x, copy=True), select(params))
        return SnapshotState(jnp.zeros([], jnp.int32), jnp.asarray(float(taken)), copy)

    def update(
        updates: optax.Updates,
        state: SnapshotState,
        params: optax.Params | None = None,
        *,
        average: Any = None,
        **extra: Any,
    ) -> tuple[optax.Updates, SnapshotState]:
        del params, extra
        count = optax.safe_increment(state.count)
        if average is None or not chosen:
            return updates, state._replace(count=count)
        now = jnp.isin(count, jnp.asarray(chosen, jnp.int32))
        new = jax.tree.map(lambda old, x: jnp.where(now, x, old), state.params, select(average))
        return updates, SnapshotState(count, jnp.where(now, 1.0, state.taken), new)

    return optax.GradientTransformationExtraArgs(init, update)


def _average(old: jax.Array, new: jax.Array, m: jax.Array) -> jax.Array:
    if not jnp.issubdtype(old.dtype, jnp.inexact):
        return new
    wide = jnp.float32 if old.dtype.itemsize < 4 else old.dtype
    m = m.astype(wide)
    return (m * old.astype(wide) + (1 - m) * new.astype(wide)).astype(old.dtype)


def cosine_momentum(start: float, steps: int) -> Schedule:
    """Returns the momentum of the target from `start` to 1 along a half cosine (M3I Table 7:
    "0.995, cosine"; BYOL).

    `m(k) = 1 - (1 - start) (1 + cos(pi k / steps)) / 2`, and 1 from step `steps` on.

    Args:
      start: m(0) in [0, 1]; the paper's 0.995 belongs to batches of 4,096 and more and to runs of
        500,000 steps.
      steps: length of the run in optimizer steps, at least 1.

    Returns:
      schedule k -> m, for Python numbers and traced arrays, float32.

    Raises:
      ValueError: start outside 0..1 or steps below 1.

    >>> m = cosine_momentum(0.995, 1000)
    >>> print(*(f"{m(k):.7f}" for k in (0, 250, 500, 750, 1000)))
    0.9950000 0.9957322 0.9975000 0.9992678 1.0000000
    """
    if not 0 <= start <= 1:
        raise ValueError(f"start is {start}; it must lie in 0..1")
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")

    def schedule(count: ArrayLike) -> jax.Array:
        done = jnp.clip(jnp.asarray(count).astype(jnp.float32) / float(steps), 0.0, 1.0)
        return 1 - (1 - start) * (1 + jnp.cos(jnp.pi * done)) / 2

    return schedule
