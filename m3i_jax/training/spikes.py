"""Spikes of the loss and of the gradient, which a run may skip: `optim.skip_spikes` standard
deviations above the median of the last 128 steps. The window is a link of the optimizer chain, so
that it is saved and a resumed run decides as the unbroken one.

The spread is 1.4826 times the median distance from the median, a standard deviation of normal noise
that no single spike can move. All finite steps enter the window, skipped ones too: after a lasting
change of the level half a window is skipped, and then it is the new level."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

WINDOW = 128
LEAST = 1e-3  # of the median: below this share a deviation is rounding, not a spike


class SpikeState(NamedTuple):
    """seen: [2, WINDOW] float32, losses and gradient norms, oldest overwritten. steps: int32, how
    many were pushed. skipped: int32."""

    seen: jax.Array
    steps: jax.Array
    skipped: jax.Array


def watch_spikes() -> optax.GradientTransformation:
    """The place of the window in the chain; updates pass through, `push_window` fills it."""
    return optax.GradientTransformation(
        lambda params: SpikeState(
            jnp.zeros((2, WINDOW)), jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        ),
        lambda updates, state, params=None: (updates, state),
    )


def is_spike(state: SpikeState, loss: jax.Array, norm: jax.Array, sigmas: float) -> jax.Array:
    """Whether one of the two is far above its window; never before the window is full, and never
    for a small one.

    >>> state = watch_spikes().init(None)
    >>> for k in range(WINDOW): state = push_window(state, jnp.float32(1 + k % 2), jnp.float32(5.0), jnp.array(False))
    >>> [bool(is_spike(state, jnp.float32(x), jnp.float32(y), 6.0)) for x, y in ((2.5, 5.0), (9.0, 5.0), (1.0, 5.1), (0.0, 0.0))]
    [False, True, True, False]
    """
    middle = jnp.median(state.seen, axis=1)
    spread = 1.4826 * jnp.median(jnp.abs(state.seen - middle[:, None]), axis=1)
    limit = middle + sigmas * jnp.maximum(spread, LEAST * jnp.abs(middle))
    return (state.steps >= WINDOW) & jnp.any(jnp.stack([loss, norm]) > limit)


def push_window(
    state: SpikeState, loss: jax.Array, norm: jax.Array, skipped: jax.Array
) -> SpikeState:
    """The window with the newest step in place of the oldest."""
    seen = state.seen.at[:, state.steps % WINDOW].set(jnp.stack([loss, norm]).astype(jnp.float32))
    return SpikeState(seen, state.steps + 1, state.skipped + skipped.astype(jnp.int32))


def skip_update(
    old: Any, new: Any, loss: jax.Array, norm: jax.Array, finite: jax.Array, sigmas: float
) -> tuple[Any, Any]:
    """((params, opt) after the step, metrics): new ones where the step counts, old ones where it is
    skipped.

    Args:
      old, new: (params, opt) before and after the update.
      loss, norm, finite: of the step.
      sigmas: `optim.skip_spikes`.
    """
    window = old[1].get("spikes")
    spike = (
        is_spike(window, loss, norm, sigmas) & finite if window is not None else jnp.zeros([], bool)
    )
    params, opt = jax.tree.map(lambda n, o: jnp.where(finite & ~spike, n, o), new, old)
    metrics = {"skipped/not_finite": 1.0 - finite}
    if window is not None:
        pushed = push_window(window, loss, norm, spike)
        opt["spikes"] = jax.tree.map(lambda n, o: jnp.where(finite, n, o), pushed, window)
        metrics["skipped/spikes"] = opt["spikes"].skipped
    return (params, opt), metrics
