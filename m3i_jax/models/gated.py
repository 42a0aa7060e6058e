"""SwiGLU, the activation of an MLP with two input matrices."""

from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax.objective.manual_axes import custom_vjp


@custom_vjp
def swiglu(gate: jax.Array, value: jax.Array) -> jax.Array:
    """`silu(gate) * value` (Shazeer, 2020), computed in float32; the type of gate. The backward
    pass keeps both inputs in their own type.

    >>> swiglu(jnp.array([0.0, 1.0]), jnp.array([5.0, 2.0])).round(4).tolist()
    [0.0, 1.4621...]
    """
    wide = gate.astype(jnp.float32)
    return (wide * jax.nn.sigmoid(wide) * value.astype(jnp.float32)).astype(gate.dtype)


def _swiglu_backward(kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[Any, Any]:
    gate, value = (x.astype(jnp.float32) for x in kept)
    wide, share = g.astype(jnp.float32), jax.nn.sigmoid(gate)
    slope = share * (1 + gate * (1 - share))
    return (
        (wide * value * slope).astype(kept[0].dtype),
        (wide * gate * share).astype(kept[1].dtype),
    )


swiglu.defvjp(lambda gate, value: (swiglu(gate, value), (gate, value)), _swiglu_backward)
