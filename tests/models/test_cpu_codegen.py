import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax.models.cpu_codegen import matmul


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def both(x, kernel, out=None):
    """Value, and the gradients of its product with what comes back."""
    y, pull = jax.vjp(lambda x, kernel: matmul(x, kernel, out), x, kernel)
    back = normal(2, *y.shape)
    return y, *pull(back.astype(y.dtype)), back


@pytest.mark.parametrize("shape", [(3, 7), (5, 5), (7, 3)])
def test_value_and_gradients_equal_numpy(shape):
    x, kernel = normal(0, 11, shape[0]), normal(1, *shape)
    y, dx, dkernel, back = map(np.asarray, both(x, kernel))
    a, b = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    for got, wanted in ((y, a @ b), (dx, back @ b.T), (dkernel, a.T @ back)):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 8), (8, 4)])
def test_the_result_has_the_type_that_is_asked_for_and_gradients_those_of_their_arrays(shape):
    x, kernel = normal(0, 16, shape[0]).astype(jnp.bfloat16), normal(1, *shape).astype(jnp.bfloat16)
    y, dx, dkernel, back = both(x, kernel, jnp.float32)
    assert (y.dtype, dx.dtype, dkernel.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(
        np.asarray(y),
        np.asarray(x, np.float32) @ np.asarray(kernel, np.float32),
        rtol=1e-5,
        atol=1e-5,
    )
    np.testing.assert_allclose(
        np.asarray(dkernel, np.float32),
        np.asarray(x, np.float32).T @ np.asarray(back),
        rtol=0.02,
        atol=0.05,
    )


def test_the_number_of_rows_may_be_a_symbol():
    (rows,) = jax.export.symbolic_shape("b")
    made = jax.export.export(jax.jit(matmul))(
        jax.ShapeDtypeStruct((rows, 32), "float32"), jax.ShapeDtypeStruct((32, 8), "float32")
    )
    assert made.out_avals[0].shape == (rows, 8)


def test_the_gradient_of_a_tall_kernel_is_made_lying():
    """On the CPU this runs on; the value, and other gradients, take the product that they always
    took."""

    def made(rows, columns):
        x, kernel = jnp.zeros((rows, 32)), jnp.zeros((32, columns))
        compiled = (
            jax.jit(jax.grad(lambda kernel: jnp.square(matmul(x, kernel)).sum()))
            .lower(kernel)
            .compile()
        )
        return [
            line.split("f32[")[1].split("]")[0]
            for line in compiled.as_text().splitlines()
            if " dot(" in line
        ]

    assert "8,32" in made(64, 8) and "32,8" not in made(64, 8)
    assert "32,128" in made(64, 128) and "128,32" not in made(64, 128)
    assert "32,8" in made(7, 8) and "8,32" not in made(7, 8)  # too few rows
