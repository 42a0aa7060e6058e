"""Helpers of the posteriors' tests: arrays, central differences, equations of jaxprs."""

import types
from typing import Any

import jax
import numpy as np


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def compiled(module, **static: tuple[str, ...]) -> Any:
    """Functions of a module, compiled, as in use: for each its arguments that are no arrays. Eager
    operations take longer, for each is compiled by itself."""
    functions = {
        name: jax.jit(getattr(module, name), static_argnames=arguments)
        for name, arguments in static.items()
    }
    return types.SimpleNamespace(**functions)


def mean(result):
    total, count = result
    return total / count


def grad_of(*args, **options):
    return jax.jit(jax.grad(*args, **options))


def value_and_grad_of(*args, **options):
    return jax.jit(jax.value_and_grad(*args, **options))


def check_gradient(f, *args, step=1e-2):
    """Compare jax.grad of every argument with central differences."""
    f, grads = jax.jit(f), jax.jit(jax.grad(f, tuple(range(len(args)))))(*args)
    for k, grad in enumerate(grads):
        expected = np.zeros(np.shape(args[k]))
        for index in np.ndindex(expected.shape):
            move = np.zeros(expected.shape, np.float32)
            move[index] = step
            up, down = (f(*args[:k], args[k] + sign * move, *args[k + 1 :]) for sign in (1, -1))
            expected[index] = (up - down) / (2 * step)
        assert expected.any()
        np.testing.assert_allclose(grad, expected, atol=2e-3, rtol=1e-2)


def equations(jaxpr):
    """All equations of a jaxpr, inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def primitives(jaxpr, name):
    return sum(equation.primitive.name == name for equation in equations(jaxpr))
