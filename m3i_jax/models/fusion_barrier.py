"""Keeping XLA's CPU compiler from fusing a function with what stands around it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def fusion_barrier(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """`function(*arrays)`; on a CPU as a program of its own, which the compiler fuses with nothing
    before and after it.

    There it is a condition that always holds, which the compiler does not know: the barrier before
    it goes only after conditions were looked at. A barrier around the result, which must do on
    other platforms, would not do: it is gone before loops are fused. For use in rules of
    derivatives: what is differentiated through a condition keeps both sides.

    >>> fusion_barrier(lambda x: 2 * x, jnp.ones(2)).tolist()
    [2.0, 2.0]
    """

    def alone(*arrays: jax.Array) -> jax.Array:
        out = jax.eval_shape(function, *arrays)
        return jax.lax.cond(
            jax.lax.optimization_barrier(jnp.bool_(True)),
            function,
            lambda *_: jnp.zeros(out.shape, out.dtype),
            *arrays,
        )

    def beside(*arrays: jax.Array) -> jax.Array:
        return jax.lax.optimization_barrier(function(*arrays))

    forms: dict[str, Any] = {"cpu": alone, "default": beside}
    return jax.lax.platform_dependent(*arrays, **forms)
