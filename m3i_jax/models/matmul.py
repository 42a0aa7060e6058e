"""The matrix product of the dense layers."""

from typing import Any

import jax
import jax.numpy as jnp


@jax.custom_vjp
def _turned(kernel_CxD: jax.Array) -> jax.Array:
    return kernel_CxD.T


def _turned_back(_: None, grad_DxC: jax.Array) -> tuple[jax.Array]:
    # Without the barrier the compiler turns the product that this comes from.
    forms: dict[str, Any] = {
        "cpu": lambda grad: jax.lax.optimization_barrier(grad).T,
        "default": lambda grad: grad.T,
    }
    return (jax.lax.platform_dependent(grad_DxC, **forms),)


_turned.defvjp(lambda kernel: (kernel.T, None), _turned_back)


def matmul(x_NxC: jax.Array, kernel_CxD: jax.Array, out: Any = None) -> jax.Array:
    """`x W`, [N, D] in the type `out`, by default that of the arguments.

    On a CPU the gradient of a kernel with more rows than columns, as of a transformer's second MLP
    layer, is made as [D, C] and turned: XLA's product of two matrices along their rows takes up to
    twice as long the other way round. Of few rows of x turning would take longer than that saves.
    Elsewhere it is JAX's own of `x @ W`.

    >>> matmul(jnp.ones((1, 2)), jnp.eye(2)).tolist()
    [[1.0, 1.0]]
    >>> jax.grad(lambda kernel: matmul(jnp.array([[2.0, 3.0]]), kernel).sum())(jnp.zeros((2, 1))).tolist()
    [[2.0], [3.0]]
    """
    # of an exported program it is a symbol
    few = isinstance(x_NxC.shape[0], int) and 4 * x_NxC.shape[0] < kernel_CxD.shape[0]
    if few or kernel_CxD.shape[0] <= kernel_CxD.shape[1]:
        return jnp.dot(x_NxC, kernel_CxD, preferred_element_type=out)
    return jax.lax.dot_general(
        x_NxC, _turned(kernel_CxD), (((1,), (1,)), ((), ())), preferred_element_type=out
    )
