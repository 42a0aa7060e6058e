"""The one train step, a pure function (state, batch) -> (state, metrics), whatever the task.

1. loss, gradients, metrics of a batch      task.gradients
2. the optimizer chain                      its named links take what the task hands them
3. keep the old state if a value is not finite, or if the step is a spike to skip"""

import jax
import jax.numpy as jnp
import optax

from m3i_jax.training import optimizer
from m3i_jax.training.task import State, Task

Metrics = dict[str, jax.Array]
# the run ends after this many steps in a row that were skipped because a value was not finite
MOST_NOT_FINITE = 3


def train_step(
    task: Task, tx: optax.GradientTransformationExtraArgs, state: State, batch: dict[str, jax.Array]
) -> tuple[State, Metrics]:
    """Takes one optimizer step on one global batch. A step whose loss or gradient is not finite, or
    that is a spike to skip, changes only `step` and is counted in the metrics."""
    grads, loss, metrics, extras = task.gradients(state.params, state.opt, batch)
    with jax.named_scope("optimizer"):  # scopes are the parts of profiling/traffic_parts.py
        updates, opt = tx.update(grads, state.opt, state.params, **extras)
        params = optax.apply_updates(state.params, updates)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        (params, opt), skipped = optimizer.skip_update(
            (state.params, state.opt),
            (params, opt),
            loss,
            grad_norm,
            finite,
            task.config.optim.skip_spikes,
        )
    metrics = metrics | {"loss": loss, "grad_norm": grad_norm}
    if (taken := optimizer.schedule_count(opt)) is not None:
        skipped["skipped/steps"] = (state.step + 1 - taken).astype(jnp.float32)
    return State(step=state.step + 1, params=params, opt=opt), metrics | skipped
