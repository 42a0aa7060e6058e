"""Softmax attention and its backward pass against autodiff of the formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax.models import attention

# compiling is what takes the time here
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def close(got, expected, tolerance=2e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=tolerance, atol=tolerance
        ),
        got,
        expected,
    )


@pytest.mark.parametrize("masked", [False, True])
def test_attention_and_its_gradient_equal_autodiff_of_the_plain_formula(masked):
    q, k, v, g = (normal(i, 2, 3, n, 4) for i, n in enumerate((2, 5, 5, 2)))
    where = jnp.array([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]], bool) if masked else None

    def plain(q, k, v):
        logits = jnp.einsum("bhqe,bhte->bhqt", q, k) / 2.0
        if where is not None:
            logits = jnp.where(where[:, None, None], logits, -jnp.inf)
        return jnp.einsum("bhqt,bhte->bhqe", jax.nn.softmax(logits), v)

    close(attention.attend(q, k, v, where), plain(q, k, v))
    got, want = (
        jit(jax.grad(lambda *a, f=f: (f(*a) * g).sum(), (0, 1, 2)))(q, k, v)
        for f in (lambda *a: attention.attend(*a, where), plain)
    )
    close(got, want)
    if masked:
        assert (
            not np.asarray(got[1])[0, :, [1, 4]].any()
            and not np.asarray(got[2])[0, :, [1, 4]].any()
        )


def test_gradients_in_bfloat16_have_the_length_of_those_in_float32():
    """Of heads of the decoder, 48 wide: 1 / sqrt(48) in bfloat16 would lengthen those of queries
    and keys by 0.13 %."""
    arrays = [normal(i, 1, 4, 64, 48).astype(jnp.bfloat16) for i in range(4)]
    run = lambda *args: jax.vjp(attention.attend, *args[:3])[1](args[3])
    found, wanted = jit(run)(*arrays), jit(run)(*(array.astype(jnp.float32) for array in arrays))
    for a, b in zip(found, wanted, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert abs((a * b).sum() / (b * b).sum() - 1) < 5e-4


def test_attention_without_any_key_is_the_mean_and_finite():
    q, k, v = (normal(i, 1, 2, 3, 4) for i in range(3))
    none = jnp.zeros((1, 3), bool)
    close(attention.attend(q, k, v, none), jnp.broadcast_to(v.mean(2, keepdims=True), v.shape))
    grads = jit(jax.grad(lambda *a: attention.attend(*a, none).sum(), (0, 1, 2)))(q, k, v)
    assert not np.asarray(grads[0]).any() and np.isfinite(np.asarray(grads[2])).all()


def test_heads_are_cut_part_by_part_then_head_by_head():
    x = jnp.arange(2 * 3 * 24.0).reshape(2, 3, 24)
    q, k, v = attention.to_heads(x, 3, 2)
    np.testing.assert_array_equal(k[1, 1, 2], x[1, 2, 12:16])
    np.testing.assert_array_equal(attention.from_heads(v), x[..., 16:])
    np.testing.assert_array_equal(attention.from_heads(q), x[..., :8])
