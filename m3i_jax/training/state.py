"""The state of a run: three trees, all of them sharded by the same rules and saved with no special
case."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class State:
    """step: int32 scalar, optimizer steps taken. params: all trained parameters. opt: the state of
    a named optax chain, so that `opt["target"].params` is the EMA target and `opt["balance"]` the
    gradient-norm statistics."""

    step: jax.Array
    params: Any
    opt: Any


def create(params: Any, tx: optax.GradientTransformation) -> State:
    """A state at step 0. Trace it under `jax.eval_shape` for a template that allocates nothing."""
    return State(step=jnp.zeros([], jnp.int32), params=params, opt=tx.init(params))
