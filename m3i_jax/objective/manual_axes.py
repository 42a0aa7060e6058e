"""Types of arrays inside `jax.shard_map`, which says of each array along which axes of the mesh it
differs between devices.

JAX casts the operands of its operations. It casts neither the carry of a loop, nor the branches of
a condition, nor the arguments of a function of `jax.custom_vjp`, whose gradients must differ along
the axes of their arguments. Outside `jax.shard_map`, and with `check_vma=False`,
no array has such axes, and the functions here do nothing."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

_lax: Any = jax.lax  # pcast has no types


def vary_like(tree: Any, like: Any) -> Any:
    """Returns a tree whose arrays differ between devices also along the axes along which one of
    the arrays of another tree does.

    The gradient of such a cast is the sum over those axes, so that the gradient of what all devices
    share is that of all rows.

    >>> vary_like(np.ones(2), np.ones(3)).tolist()
    [1.0, 1.0]
    """
    axes = frozenset().union(*(_axes(x) for x in jax.tree.leaves(like)))
    if not axes:
        return tree

    def cast(x: Any) -> Any:
        missing = axes - _axes(x)
        if not missing or not isinstance(x, jax.Array | np.ndarray):
            return x
        return _lax.pcast(x, tuple(sorted(missing)), to="varying")

    return jax.tree.map(cast, tree)


def _axes(x: Any) -> frozenset[str]:
    if not isinstance(x, jax.Array):
        return frozenset()
    aval: Any = jax.typeof(x)
    return frozenset(aval.manual_axis_type.varying)


def custom_vjp(function: Callable[..., Any], nondiff_argnums: tuple[int, ...] = ()) -> Any:
    """`jax.custom_vjp` of a function of several arrays, which may be called inside `jax.shard_map`
    with some that all devices share, such as parameters.

    >>> @custom_vjp
    ... def product(a, b):
    ...     return a * b
    >>> product.defvjp(lambda a, b: (a * b, (a, b)), lambda kept, g: (g * kept[1], g * kept[0]))
    >>> jax.grad(product)(2.0, 3.0).item()
    3.0
    """
    differentiable: Any = jax.custom_vjp(function, nondiff_argnums)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        args, options = vary_like((args, options), (args, options))
        return differentiable(*args, **options)

    wrapped: Any = call
    wrapped.defvjp = differentiable.defvjp
    return wrapped
