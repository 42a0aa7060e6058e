"""Operations in the form from which XLA's CPU compiler makes faster code.

`matmul` computes the gradient of a tall kernel transposed, which saves 2 to 4 % of a ViT block's
forward and backward pass; `fusion_barrier` keeps a function from being fused with the code around
it, without which a layer of InternImage takes 1.6 to 1.8 times as long at 32 x 32 cells.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax.objective.manual_axes import vary_like


@jax.custom_vjp
def _transposed(kernel_CxD: jax.Array) -> jax.Array:
    return kernel_CxD.T


def _transposed_backward(_: None, grad_DxC: jax.Array) -> tuple[jax.Array]:
    # Without the barrier the compiler moves the transposition into the product before it.
    forms: dict[str, Any] = {
        "cpu": lambda grad: jax.lax.optimization_barrier(grad).T,
        "default": lambda grad: grad.T,
    }
    return (jax.lax.platform_dependent(grad_DxC, **forms),)


_transposed.defvjp(lambda kernel: (kernel.T, None), _transposed_backward)


def matmul(x_NxC: jax.Array, kernel_CxD: jax.Array, out: Any = None) -> jax.Array:
    """`x W`, [N, D] in the type `out`, by default that of the arguments.

    On a CPU the gradient of a kernel with more rows than columns, such as a transformer's second
    MLP layer, is computed as [D, C] and transposed: XLA's product that sums over the rows of both
    factors is slower the other way round. With few rows of x the transposition would cost more than
    it saves. On other platforms the gradient is that of `x @ W`.

    >>> matmul(jnp.ones((1, 2)), jnp.eye(2)).tolist()
    [[1.0, 1.0]]
    >>> total = lambda kernel: matmul(jnp.array([[2.0, 3.0]]), kernel).sum()
    >>> jax.grad(total)(jnp.zeros((2, 1))).tolist()
    [[2.0], [3.0]]
    """
    # the number of rows is a symbol in an exported program
    few = isinstance(x_NxC.shape[0], int) and 4 * x_NxC.shape[0] < kernel_CxD.shape[0]
    if few or kernel_CxD.shape[0] <= kernel_CxD.shape[1]:
        return jnp.dot(x_NxC, kernel_CxD, preferred_element_type=out)
    return jax.lax.dot_general(
        x_NxC, _transposed(kernel_CxD), (((1,), (1,)), ((), ())), preferred_element_type=out
    )


def fusion_barrier(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """`function(*arrays)`; on a CPU the compiler fuses it with nothing before or after it.

    On a CPU it is a branch of a condition that always holds. The compiler does not know that: it
    removes the barrier on the predicate only after it has simplified conditions. A barrier around
    the result, as on other platforms, is not enough there: it is removed before loops are fused.
    For derivative rules only: differentiation through a condition keeps the residuals of both
    branches.

    >>> fusion_barrier(lambda x: 2 * x, jnp.ones(2)).tolist()
    [2.0, 2.0]
    """

    arrays = vary_like(arrays, arrays)  # both branches must differ along the same axes of a mesh

    def separate(*arrays: jax.Array) -> jax.Array:
        out = jax.eval_shape(function, *arrays)
        return jax.lax.cond(
            jax.lax.optimization_barrier(jnp.bool_(True)),
            function,
            lambda *_: vary_like(jnp.zeros(out.shape, out.dtype), arrays),
            *arrays,
        )

    def fenced(*arrays: jax.Array) -> jax.Array:
        return jax.lax.optimization_barrier(function(*arrays))

    forms: dict[str, Any] = {"cpu": separate, "default": fenced}
    return jax.lax.platform_dependent(*arrays, **forms)
