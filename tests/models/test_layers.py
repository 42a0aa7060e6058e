import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special, stats

from m3i_jax.models import layers

# compiling is what takes the time here
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def close(a, b, tolerance=2e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=tolerance, atol=tolerance
        ),
        a,
        b,
    )


def test_layer_norm_equals_numpy_and_its_gradient_equals_autodiff():
    x, scale, bias, g = normal(0, 3, 5, 8) * 2 + 1, normal(1, 8), normal(2, 8), normal(3, 3, 5, 8)
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(
        wide.var(-1, keepdims=True) + 1e-6
    ) * np.asarray(scale) + np.asarray(bias)
    close(layers.layer_norm(x, scale, bias), expected)

    def plain(x, scale, bias):
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(
            x.var(-1, keepdims=True) + 1e-6
        ) * scale + bias

    got, want = (
        jit(jax.grad(lambda *a, f=f: (f(*a) * g).sum(), (0, 1, 2)))(x, scale, bias)
        for f in (layers.layer_norm, plain)
    )
    close(got, want)


def test_layer_norm_works_in_float32_inside_and_keeps_the_type():
    # in bfloat16 arithmetic the mean alone would be off by up to 0.25
    x = (normal(0, 4, 64) + 100).astype(jnp.bfloat16)
    y = layers.layer_norm(x, jnp.ones(64), jnp.zeros(64))
    wide = np.asarray(x, np.float64)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(y, np.float64),
        (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True),
        atol=0.01,
    )


def test_batch_norm_equals_numpy_and_its_gradient_equals_autodiff():
    x, scale, bias, g = normal(0, 3, 5, 8) * 2 + 1, normal(1, 8), normal(2, 8), normal(3, 3, 5, 8)
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean((0, 1))) / np.sqrt(wide.var((0, 1)) + 1e-5) * np.asarray(
        scale
    ) + np.asarray(bias)
    close(layers.batch_norm(x, scale, bias), expected)

    def plain(x, scale, bias):
        return (x - x.mean((0, 1))) / jnp.sqrt(x.var((0, 1)) + 1e-5) * scale + bias

    got, want = (
        jit(jax.grad(lambda *a, f=f: (f(*a) * g).sum(), (0, 1, 2)))(x, scale, bias)
        for f in (layers.batch_norm, plain)
    )
    close(got, want)


def test_batch_norm_works_in_float32_inside_and_keeps_the_type():
    x = (normal(0, 16, 4, 8) + 100).astype(jnp.bfloat16)
    y = layers.batch_norm(x, jnp.ones(8), jnp.zeros(8))
    wide = np.asarray(x, np.float64)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(y, np.float64), (wide - wide.mean((0, 1))) / wide.std((0, 1)), atol=0.01
    )


def test_gelu_is_exact_and_so_is_its_slope():
    """Exact as float32 has 1 + erf(x): PyTorch's is as far from it where both are nearly nought."""
    x = jnp.linspace(-6, 6, 241)
    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(layers.gelu(x), wide * special.ndtr(wide), rtol=1e-5, atol=7e-7)
    slope = special.ndtr(wide) + wide * stats.norm.pdf(wide)
    np.testing.assert_allclose(
        jit(jax.grad(lambda x: layers.gelu(x).sum()))(x), slope, rtol=1e-5, atol=1e-6
    )
    assert layers.gelu(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_gelu_keeps_its_input_alone():
    """Of every layer the product and its GELU wait for the backward pass; with an erf that both
    passes share, a third array would."""
    depth, x = 6, jnp.zeros((512, 128))

    def run(kernels):
        return functools.reduce(lambda y, kernel: layers.gelu(y @ kernel), kernels, x).sum()

    compiled = jit(jax.grad(run)).lower([jnp.zeros((128, 128))] * depth).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= (2 * depth + 2) * x.nbytes


def test_drop_rates():
    np.testing.assert_allclose(
        layers.linear_drop_rates(12, 0.1), 0.1 * np.arange(12) / 11, rtol=1e-6
    )
    np.testing.assert_allclose(layers.linear_drop_rates(4, 0.2, "uniform"), [0.2] * 4, rtol=1e-6)
    assert layers.linear_drop_rates(1, 0.2).tolist() == [0.0]
