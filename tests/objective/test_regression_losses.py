"""Smooth L1 and cosine against numpy, numerical gradients, weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax.objective import regression_losses
from tests.objective.numeric import check_gradient, grad_of, normal, value_and_grad_of

smooth_l1 = jax.jit(regression_losses.smooth_l1, static_argnames=("beta",))
cosine = jax.jit(regression_losses.cosine)
BOTH = pytest.mark.parametrize("loss", [smooth_l1, cosine], ids=["smooth_l1", "cosine"])


def numpy_smooth_l1(p, t, beta):
    d = np.abs(p.astype(np.float64) - t)
    return np.where(d < beta, d**2 / (2 * beta), d - beta / 2).mean(-1)


def numpy_cosine(p, t):
    p, t = p.astype(np.float64), t.astype(np.float64)
    return 2 - 2 * (p * t).sum(-1) / np.linalg.norm(p, axis=-1) / np.linalg.norm(t, axis=-1)


@pytest.mark.parametrize("beta", [0.12, 1.0, 2.0])
def test_smooth_l1_is_numpy(beta):
    p, t = 2 * normal(6, 5), normal(6, 5, seed=1)
    assert (np.abs(p - t) < beta).any() and (np.abs(p - t) > beta).any()
    total, count = smooth_l1(p, t, beta=beta)
    np.testing.assert_allclose(total, numpy_smooth_l1(p, t, beta).sum(), rtol=1e-5)
    assert float(count) == 6


def test_smooth_l1_default_is_two():
    p, t = 3 * normal(4, 5), normal(4, 5, seed=1)
    np.testing.assert_allclose(smooth_l1(p, t)[0], numpy_smooth_l1(p, t, 2.0).sum(), rtol=1e-5)


def test_smooth_l1_golden_and_smooth():
    """Value and slope are continuous at beta; the slope is 1 / D far away, and near 0 the cost is
    half the squared error over beta."""
    assert float(
        smooth_l1(np.array([[1.0, -3.0, 2.0, 0.0]]), np.zeros((1, 4)))[0]
    ) == pytest.approx((0.25 + 2 + 1 + 0) / 4)
    grad = grad_of(lambda p: smooth_l1(p, np.zeros((1, 5)))[0])(
        np.array([[0.0, 1.999, 2.0, 2.001, -9.0]])
    )
    np.testing.assert_allclose(5 * grad, [[0, 0.9995, 1, 1, -1]], atol=1e-6)


def test_cosine_is_numpy_and_ignores_length():
    p, t = normal(7, 5), normal(7, 5, seed=1)
    total, count = cosine(p, t)
    np.testing.assert_allclose(total, numpy_cosine(p, t).sum(), rtol=1e-5)
    np.testing.assert_allclose(cosine(3 * p, 0.1 * t)[0], total, rtol=1e-5)
    assert float(count) == 7


def test_cosine_of_unit_vectors_is_squared_distance():
    p, t = (
        x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (normal(5, 4), normal(5, 4, seed=1))
    )
    np.testing.assert_allclose(cosine(p, t)[0], ((p - t) ** 2).sum(), rtol=1e-5)


def test_cosine_of_a_zero_row_is_finite():
    value, grad = value_and_grad_of(lambda p: cosine(p, normal(2, 3))[0])(
        np.zeros((2, 3), np.float32)
    )
    assert float(value) == 4 and not np.any(grad)


@BOTH
def test_gradient_numerically_and_none_to_targets(loss):
    p, t, where = 2 * normal(4, 3), normal(4, 3, seed=1), np.array([1, 0.5, 0, 1], np.float32)
    check_gradient(lambda p: loss(p, t, where)[0], p)
    assert not np.any(grad_of(lambda t: loss(p, t, where)[0])(t))


@BOTH
def test_rows_without_weight_may_hold_anything(loss):
    p, t, where = normal(5, 3), normal(5, 3, seed=1), np.array([1, 0, 0.5, 0, 2], np.float32)
    expected = sum(w * float(loss(p[k : k + 1], t[k : k + 1])[0]) for k, w in enumerate(where))
    p[1], t[3] = np.nan, np.inf
    total, count = loss(p, t, where)
    assert float(total) == pytest.approx(expected, rel=1e-5) and float(count) == 3.5
    grad = grad_of(lambda p: loss(p, t, where)[0])(p)
    assert np.isfinite(grad).all() and not grad[1].any() and not grad[3].any() and grad[0].any()
    value, grad = value_and_grad_of(lambda p: loss(p, t, np.zeros(5)), has_aux=True)(p)
    assert tuple(map(float, value)) == (0, 0) and not np.any(grad)


@BOTH
def test_leading_axes_and_bfloat16(loss):
    p, t, where = (
        normal(3, 4, 5),
        normal(3, 4, 5, seed=1),
        np.random.default_rng(2).random((3, 4)) < 0.6,
    )
    np.testing.assert_allclose(
        loss(p, t, where), loss(p.reshape(12, 5), t.reshape(12, 5), where.reshape(12)), rtol=1e-6
    )
    p, t = jnp.asarray(p, jnp.bfloat16), jnp.asarray(t, jnp.bfloat16)
    low = loss(p, t)
    assert all(x.dtype == jnp.float32 and x.shape == () for x in low)
    np.testing.assert_allclose(low, loss(p.astype(jnp.float32), t.astype(jnp.float32)), rtol=1e-6)


@pytest.mark.parametrize("loss", [regression_losses.smooth_l1, regression_losses.cosine])
def test_errors_name_what_is_wrong(loss):
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(3, 5\)"):
        loss(np.zeros((3, 4)), np.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"\(2,\).*\(3\)"):
        loss(np.zeros((3, 4)), np.zeros((3, 4)), np.zeros(2))
    with pytest.raises(ValueError, match="scalars"):
        loss(np.zeros(()), np.zeros(()))


@pytest.mark.parametrize("beta", [0.0, -1.0])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match=str(beta)):
        regression_losses.smooth_l1(np.zeros((3, 4)), np.zeros((3, 4)), beta=beta)


@pytest.mark.parametrize("shape", [(2, 1), (3,), (1, 3)])
def test_weights_of_tokens_of_another_shape_are_named(shape):
    with pytest.raises(ValueError, match="one weight per token"):
        regression_losses.token_similarity(normal(2, 3, 4), normal(2, 3, 5), np.ones(shape))
