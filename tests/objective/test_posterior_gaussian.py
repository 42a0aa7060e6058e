"""The Gaussian posterior and the second moment: golden values, gradients, weights, and the products
of the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax.objective import losses
from tests.objective.numeric import (
    check_gradient,
    equations,
    grad_of,
    mean,
    normal,
    primitives,
    value_and_grad_of,
)

# Compiled, as in use, which is faster than eager operations.
gaussian = jax.jit(losses.gaussian, static_argnames=("second_moment",))
second_moment = jax.jit(losses.second_moment)
layer_normalize = jax.jit(losses.layer_normalize)

P = np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, -1.0]], np.float32)
RAW = np.array([[1.0, 2.0, 3.0, 4.0], [4.0, 0.0, 0.0, 0.0]], np.float32)


def largest(jaxpr):
    return max(
        np.prod(v.aval.shape, dtype=int) for equation in equations(jaxpr) for v in equation.outvars
    )


# --- Gaussian
@pytest.mark.parametrize(("weight", "golden"), [(0.0, 1.7104032), (0.02, 1.7204031)])
def test_gaussian_golden(weight, golden):
    total, count = gaussian(P, layer_normalize(RAW), second_moment=weight)
    assert float(total / count) == pytest.approx(golden, rel=1e-6)
    assert float(count) == 2


def test_gaussian_parts_golden():
    t = layer_normalize(RAW)
    plain, both = (float(mean(gaussian(P, t, second_moment=w))) * 4 for w in (0, 1))
    assert plain == pytest.approx(6.8416127, rel=1e-6)
    assert both - plain == pytest.approx(1.9999875, rel=1e-5)


@pytest.mark.parametrize("given", [False, True])
def test_gaussian_gradient_is_the_formula(given):
    p, t, w = normal(12, 6), normal(12, 6, seed=1), 0.3
    c = t.T @ t / 12
    value, grad = value_and_grad_of(
        lambda p: mean(gaussian(p, t, second_moment=w, moment_DxD=c if given else None))
    )(p)
    np.testing.assert_allclose(
        value, (((p - t) ** 2).sum(-1) + w * ((p @ c) * p).sum(-1)).mean() / 6, rtol=1e-5
    )
    np.testing.assert_allclose(grad, 2 / (12 * 6) * ((p - t) + w * (p @ c)), rtol=1e-5, atol=1e-7)


def test_gaussian_gradient_numerically():
    p, t, where = normal(5, 4), normal(5, 4, seed=1), np.array([1, 0, 1, 0.5, 1], np.float32)
    check_gradient(lambda p: gaussian(p, t, where, second_moment=0.3)[0], p)


def test_gaussian_optimum():
    t = normal(20, 5).astype(np.float64)
    best = np.linalg.solve(np.eye(5) + 0.4 * t.T @ t / 20, t.T).T
    grad = grad_of(lambda p: gaussian(p, t, second_moment=0.4)[0])(jnp.asarray(best, jnp.float32))
    np.testing.assert_allclose(grad, 0, atol=2e-6)


def test_gaussian_backward_adds_no_product():
    p, t, c = normal(12, 6), normal(12, 6, seed=1), np.eye(6, dtype=np.float32)

    def dots(f, *args):
        return primitives(jax.make_jaxpr(f)(*args).jaxpr, "dot_general")

    def given(p):
        return gaussian(p, t, second_moment=0.02, moment_DxD=c)[0]

    def own(p):
        return gaussian(p, t, second_moment=0.02)[0]

    def naive(p):
        return (jnp.square(p - t) + 0.02 * (p @ c) * p).sum()

    assert dots(given, p) == dots(grad_of(given), p) == 1
    assert dots(own, p) == dots(grad_of(own), p) == 2
    assert dots(grad_of(naive), p) == 2  # plain autodiff: the counter works
    assert dots(grad_of(lambda p: gaussian(p, t)[0]), p) == 0


def test_gaussian_gives_no_gradient_to_target_moment_and_weight():
    p, t, c = normal(6, 4), normal(6, 4, seed=1), np.eye(4, dtype=np.float32)
    grads = grad_of(
        lambda t, c, w: losses.gaussian(p, t, second_moment=w, moment_DxD=c)[0], (0, 1, 2)
    )(t, c, 0.5)
    assert all(not np.any(g) for g in grads)
    shared = grad_of(lambda x: gaussian(x, 2 * x, second_moment=0.5)[0])(p)
    stopped = grad_of(lambda x: gaussian(x, 2 * p, second_moment=0.5)[0])(p)
    np.testing.assert_allclose(shared, stopped, rtol=1e-5, atol=1e-6)


def test_gaussian_skips_rows_without_weight_even_nan():
    p, t, where = normal(6, 4), normal(6, 4, seed=1), np.array([1, 0, 1, 1, 0, 1], bool)
    keep = np.flatnonzero(where)
    expected = gaussian(p[keep], t[keep], second_moment=0.5)
    p[1], t[4] = np.nan, np.inf
    total, count = gaussian(p, t, where, second_moment=0.5)
    np.testing.assert_allclose(total, expected[0], rtol=1e-6)
    assert float(count) == 4
    grad = grad_of(lambda p: gaussian(p, t, where, second_moment=0.5)[0])(p)
    assert np.isfinite(grad).all() and not grad[1].any() and grad[0].any()


def test_gaussian_without_rows_is_zero_and_finite():
    p = normal(3, 4)
    (total, count), grad = value_and_grad_of(
        lambda p: gaussian(p, p, np.zeros(3), second_moment=0.5), has_aux=True
    )(p)
    assert (float(total), float(count)) == (0, 0) and not np.any(grad)


def test_gaussian_parts_of_a_batch_add_up():
    p, t = normal(8, 4), normal(8, 4, seed=1)
    c = second_moment(t)
    whole = gaussian(p, t, second_moment=0.5)
    parts = [
        gaussian(p[k : k + 2], t[k : k + 2], second_moment=0.5, moment_DxD=c)
        for k in range(0, 8, 2)
    ]
    np.testing.assert_allclose(sum(x[0] for x in parts), whole[0], rtol=1e-6)
    assert sum(float(x[1]) for x in parts) == float(whole[1]) == 8


def test_gaussian_takes_leading_axes():
    p, t, where = (
        normal(3, 5, 4),
        normal(3, 5, 4, seed=1),
        np.random.default_rng(2).random((3, 5)) < 0.6,
    )
    nested = gaussian(p, t, where, second_moment=0.5)
    flat = gaussian(p.reshape(15, 4), t.reshape(15, 4), where.reshape(15), second_moment=0.5)
    np.testing.assert_allclose(nested, flat, rtol=1e-6)


def test_gaussian_computes_in_float32():
    p, t = (jnp.asarray(x, jnp.bfloat16) for x in (normal(64, 8), normal(64, 8, seed=1)))
    low = gaussian(p, t, second_moment=0.02)
    high = gaussian(p.astype(jnp.float32), t.astype(jnp.float32), second_moment=0.02)
    assert all(x.dtype == jnp.float32 and x.shape == () for x in low)
    np.testing.assert_array_equal(low, high)
    assert grad_of(lambda p: gaussian(p, t, second_moment=0.02)[0])(p).dtype == jnp.bfloat16


def test_gaussian_weight_may_be_traced():
    p, t = normal(6, 4), normal(6, 4, seed=1)
    traced = jax.jit(lambda p, t, w: losses.gaussian(p, t, second_moment=w))(p, t, 0.25)
    np.testing.assert_allclose(traced, gaussian(p, t, second_moment=0.25), rtol=1e-6)


def test_second_moment_punishes_collapse_by_the_width():
    p = normal(512, 16)
    spread, collapsed = normal(4096, 16, seed=1), np.tile(normal(1, 16, seed=2), (4096, 1))
    collapsed *= 4 / np.linalg.norm(collapsed[0])  # |t|^2 = D in both, as after layer norm

    def penalty(t):
        moment = second_moment(t)
        return 16 * float(mean(gaussian(p, p, second_moment=1.0, moment_DxD=moment)))

    energy = float((p**2).sum(-1).mean())
    assert penalty(spread) == pytest.approx(energy, rel=0.1)
    along = float(((p @ (collapsed[0] / 4)) ** 2).mean())
    assert penalty(collapsed) == pytest.approx(16 * along, rel=1e-4)


# --- second moment
def test_second_moment():
    t, weight = normal(3, 7, 5), np.random.default_rng(1).random((3, 7)).astype(np.float32)
    np.testing.assert_allclose(
        second_moment(t), np.einsum("bnd,bne->de", t, t) / 21, rtol=1e-5, atol=1e-6
    )
    weighted = np.einsum("bn,bnd,bne->de", weight, t, t) / weight.sum()
    np.testing.assert_allclose(second_moment(t, weight), weighted, rtol=1e-5, atol=1e-6)
    assert not np.any(second_moment(t, np.zeros((3, 7))))
    assert not np.any(grad_of(lambda t: second_moment(t).sum())(t))


def test_second_moment_makes_no_gram_matrix():
    t = normal(64, 4)
    assert largest(jax.make_jaxpr(second_moment)(t).jaxpr) <= 64 * 4
    assert largest(jax.make_jaxpr(lambda t: t @ t.T)(t).jaxpr) == 64 * 64
    assert (
        largest(jax.make_jaxpr(lambda p, t: gaussian(p, t, second_moment=0.1)[0])(t, t).jaxpr)
        <= 64 * 4
    )
