"""Boltzmann posteriors and normalised targets against numpy, scipy and optax: golden values,
gradients, errors. See also *_gaussian."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import logsumexp

from m3i_jax.objective import losses
from tests.objective.numeric import (
    check_gradient,
    grad_of,
    mean,
    normal,
    primitives,
    value_and_grad_of,
)

# Compiled, as in use, which is faster than eager operations.
boltzmann = jax.jit(losses.boltzmann, static_argnames=("temperature", "normalize", "stop_gradient"))
category = jax.jit(losses.category, static_argnames=("smoothing",))
text = jax.jit(losses.text)
layer_normalize = jax.jit(losses.layer_normalize)
patch_normalize = jax.jit(losses.patch_normalize)


# --- Boltzmann
def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("normalize", [True, False])
def test_boltzmann_is_scipy(normalize):
    p, k, index = normal(7, 5), normal(4, 5, seed=1), np.array([0, 1, 2, 3, 3, 0, 1])
    total, count = boltzmann(p, k, index, temperature=0.2, normalize=normalize)
    a, b = (unit(p), unit(k)) if normalize else (p, k)
    logits = (a.astype(np.float64) @ b.T) / 0.2
    np.testing.assert_allclose(
        total, (logsumexp(logits, axis=1) - logits[np.arange(7), index]).sum(), rtol=1e-5
    )
    assert float(count) == 7


def test_boltzmann_over_the_batch_is_info_nce():
    q, k = normal(6, 8), normal(6, 8, seed=1)
    logits = unit(q) @ unit(k).T / 0.2
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, np.arange(6)).mean()
    np.testing.assert_allclose(
        mean(boltzmann(q, k, np.arange(6), temperature=0.2)), expected, rtol=1e-5
    )


def test_boltzmann_gradient_numerically_and_to_keys():
    p, k, index = normal(4, 3), normal(5, 3, seed=1), np.array([0, 4, 2, 2])

    def loss(p, k):
        return boltzmann(p, k, index, temperature=0.7, stop_gradient=False)[0]

    check_gradient(loss, p, k)
    frozen = grad_of(lambda p, k: boltzmann(p, k, index, temperature=0.7)[0], (0, 1))(p, k)
    np.testing.assert_allclose(frozen[0], grad_of(loss)(p, k), rtol=1e-5, atol=1e-6)
    assert not np.any(frozen[1])


def test_boltzmann_weights_and_missing_keys():
    p, k, index, where = (
        normal(4, 3),
        normal(5, 3, seed=1),
        np.array([0, -1, 3, 3]),
        np.array([1.0, 0.0, 0.5, 1.0]),
    )
    exists = np.array([1, 0, 1, 1, 0], bool)
    k[~exists], p[1] = np.nan, np.nan
    total, count = boltzmann(p, k, index, where, where_K=exists)
    logits = unit(p).astype(np.float64) @ unit(k[exists]).T
    cost = logsumexp(logits, axis=1) - logits[np.arange(4), [0, 0, 2, 2]]
    np.testing.assert_allclose(total, cost[0] + 0.5 * cost[2] + cost[3], rtol=1e-5)
    assert float(count) == 2.5
    grads = grad_of(
        lambda p, k: boltzmann(p, k, index, where, where_K=exists, stop_gradient=False)[0], (0, 1)
    )(p, k)
    assert all(np.isfinite(g).all() for g in grads)


def test_boltzmann_index_out_of_range_is_nan():
    z = np.eye(3, dtype=np.float32)
    assert np.isnan(boltzmann(z, z, np.array([0, 1, 3]))[0])
    assert np.isnan(boltzmann(z, z, np.array([0, -1, 2]))[0])
    assert np.isfinite(boltzmann(z, z, np.array([0, 1, 3]), np.array([1, 1, 0]))[0])


def test_boltzmann_of_a_zero_row_is_finite():
    p, k = np.zeros((2, 3), np.float32), normal(4, 3)
    (total, _), grad = value_and_grad_of(lambda p: boltzmann(p, k, np.zeros(2, int)), has_aux=True)(
        p
    )
    assert float(total) == pytest.approx(2 * np.log(4), rel=1e-6)
    assert np.isfinite(grad).all()


def test_boltzmann_maps_over_positions():
    """Dense instance discrimination: a token's negatives are at the same position of the other
    images."""
    p, k = normal(6, 4, 5), normal(6, 4, 5, seed=1)
    total, count = jax.vmap(
        lambda p, k: boltzmann(p, k, jnp.arange(6), temperature=0.2), in_axes=(1, 1)
    )(p, k)
    one = boltzmann(p[:, 2], k[:, 2], np.arange(6), temperature=0.2)
    np.testing.assert_allclose((total[2], count[2]), one, rtol=1e-5)


# --- category
def test_category_golden():
    total, count = category(np.array([[2.0, 1.0, 0.0, -1.0]]), np.array([0]))
    assert float(total / count) == pytest.approx(0.5901897, rel=1e-6)


def test_category_without_smoothing_may_rule_out_classes():
    """A logit of -inf: the loss is that of the other classes, in its gradient, too."""
    logits, label = normal(4, 6), np.array([0, 1, 2, 5])
    logits[:, 3] = -np.inf
    run = value_and_grad_of(lambda x: category(x, label, smoothing=0.0)[0])
    value, grad = run(logits)
    expected, kept = run(np.where(np.isinf(logits), -99, logits).astype(np.float32))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grad, kept, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_category_is_optax(smoothing):
    logits, label = 3 * normal(9, 6), np.random.default_rng(1).integers(0, 6, 9)
    total, count = category(logits, label, smoothing=smoothing)
    expected = optax.softmax_cross_entropy(
        logits, optax.smooth_labels(jax.nn.one_hot(label, 6), smoothing)
    )
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-5)
    assert float(count) == 9


def test_category_missing_labels_have_weight_zero():
    logits, label, where = (
        normal(5, 4),
        np.array([1, -1, 3, 0, 2]),
        np.array([1, 1, 0, 0.5, 1], np.float32),
    )
    counted = np.array([0, 3, 4])
    single = [float(category(logits[b : b + 1], label[b : b + 1])[0]) for b in counted]
    logits[[1, 2]] = np.nan
    total, count = category(logits, label, where)
    assert float(total) == pytest.approx(single[0] + 0.5 * single[1] + single[2], rel=1e-6)
    assert float(count) == 2.5
    grad = grad_of(lambda x: category(x, label, where)[0])(logits)
    assert np.isfinite(grad).all() and not np.any(grad[1:3])


def test_category_without_labels_is_zero_and_finite():
    (total, count), grad = value_and_grad_of(lambda x: category(x, np.full(3, -1)), has_aux=True)(
        normal(3, 4)
    )
    assert (float(total), float(count)) == (0, 0) and not np.any(grad)


def test_category_unknown_class_is_nan():
    assert np.isnan(category(normal(2, 4), np.array([0, 4]))[0])


def test_category_gradient():
    logits, label = normal(3, 4), np.array([0, 3, -1])
    check_gradient(lambda x: category(x, label)[0], logits)
    grad = grad_of(lambda x: category(x, label)[0])(logits)
    target = np.array([[0.925, 0.025, 0.025, 0.025], [0.025, 0.025, 0.025, 0.925]])
    np.testing.assert_allclose(grad[:2], jax.nn.softmax(logits[:2]) - target, atol=1e-6)


def test_category_needs_no_gather():
    jaxpr = jax.make_jaxpr(grad_of(lambda x: category(x, jnp.array([0, 1]))[0]))(normal(2, 4)).jaxpr
    assert (
        primitives(jaxpr, "gather")
        == primitives(jaxpr, "scatter-add")
        == primitives(jaxpr, "scatter")
        == 0
    )


# --- text
def clip(u, v, log_scale):
    logits = np.exp(log_scale) * unit(u).astype(np.float64) @ unit(v).astype(np.float64).T
    return (logsumexp(logits, axis=1) + logsumexp(logits, axis=0)) / 2 - np.diag(logits)


@pytest.mark.parametrize("log_scale", [0.0, np.log(1 / 0.07), np.log(100.0)])
def test_text_is_scipy(log_scale):
    u, v = normal(8, 6), normal(8, 6, seed=1)
    total, count = text(u, v, log_scale)
    np.testing.assert_allclose(total, clip(u, v, log_scale).sum(), rtol=2e-5)
    assert float(count) == 8


def test_text_is_symmetric_and_ignores_length():
    u, v = normal(5, 4), normal(5, 4, seed=1)
    np.testing.assert_allclose(text(u, v, 1.0), text(v, 3 * u, 1.0), rtol=1e-5)


def test_text_gradient_numerically():
    args = (normal(4, 3), normal(4, 3, seed=1), np.float32(0.7))
    check_gradient(lambda u, v, s: text(u, v, s)[0], *args)
    grads = grad_of(lambda u, v, s: text(u, v, s)[0], (0, 1, 2))(*args)
    assert all(np.any(g) for g in grads)


def test_text_missing_pairs_are_neither_query_nor_negative():
    u, v, where = normal(6, 4), normal(6, 4, seed=1), np.array([1, 0, 1, 1, 0, 1], bool)
    expected = text(u[where], v[where], 1.5)
    u[1], v[4] = np.nan, 0
    np.testing.assert_allclose(text(u, v, 1.5, where), expected, rtol=1e-5)
    grads = grad_of(lambda u, v, s: text(u, v, s, where)[0], (0, 1, 2))(u, v, 1.5)
    assert all(np.isfinite(g).all() for g in grads)
    assert not np.any(grads[0][~where]) and not np.any(grads[1][~where]) and np.any(grads[0][where])


def test_text_fractional_weights():
    u, v, where = normal(3, 4), normal(3, 4, seed=1), np.array([1.0, 0.25, 2.0])
    total, count = text(u, v, 1.0, where)
    np.testing.assert_allclose(total, (clip(u, v, 1.0) * where).sum(), rtol=1e-5)
    assert float(count) == 3.25


def test_text_without_captions_is_zero_and_finite():
    u, v = normal(3, 4), np.zeros((3, 4), np.float32)
    value, grads = value_and_grad_of(
        lambda u, v, s: text(u, v, s, np.zeros(3)), (0, 1, 2), has_aux=True
    )(u, v, 2.0)
    assert tuple(map(float, value)) == (0, 0) and all(not np.any(g) for g in grads)


def test_text_of_a_zero_embedding_is_finite():
    u, v = np.zeros((2, 3), np.float32), normal(2, 3)
    value, grads = value_and_grad_of(lambda u, v: text(u, v, 2.0)[0], (0, 1))(u, v)
    assert float(value) == pytest.approx(2 * np.log(2), rel=1e-6) and all(
        np.isfinite(g).all() for g in grads
    )


def test_text_equal_captions_are_no_negatives():
    u, v, group = normal(5, 4), normal(5, 4, seed=1), np.array([3, 0, 3, 1, 0])
    logits = np.exp(1.5) * unit(u).astype(np.float64) @ unit(v).astype(np.float64).T
    kept = (group[:, None] != group) | np.eye(5, dtype=bool)
    rows, columns = (logsumexp(np.where(kept, x, -np.inf), axis=1) for x in (logits, logits.T))
    np.testing.assert_allclose(
        text(u, v, 1.5, group_B=group)[0], ((rows + columns) / 2 - np.diag(logits)).sum(), rtol=1e-5
    )
    check_gradient(
        lambda u, v, s: text(u, v, s, group_B=group)[0], u[:, :2], v[:, :2], np.float32(0.7)
    )


def test_text_groups_of_one_and_of_all():
    u, v = normal(5, 4), normal(5, 4, seed=1)
    np.testing.assert_array_equal(
        text(u, v, 1.5, group_B=np.array([4, 2, 9, -1, 0])), text(u, v, 1.5)
    )
    value, grads = value_and_grad_of(
        lambda u, v, s: text(u, v, s, group_B=np.zeros(5, int))[0], (0, 1, 2)
    )(u, v, 1.5)
    assert abs(float(value)) < 1e-5 and all(np.abs(g).max() < 1e-5 for g in grads)


def test_text_groups_and_missing_pairs():
    u, v, where, group = (
        normal(6, 4),
        normal(6, 4, seed=1),
        np.array([1, 0, 1, 1, 0, 1], bool),
        np.array([0, 0, 1, 0, 1, 2]),
    )
    expected = text(u[where], v[where], 1.5, group_B=group[where])
    u[1], v[4] = np.nan, np.inf
    np.testing.assert_allclose(text(u, v, 1.5, where, group_B=group), expected, rtol=1e-5)
    grads = grad_of(lambda u, v, s: text(u, v, s, where, group_B=group)[0], (0, 1, 2))(u, v, 1.5)
    assert all(np.isfinite(g).all() for g in grads) and np.any(grads[0][where])


def test_text_computes_in_float32():
    u, v = (jnp.asarray(normal(6, 4, seed=k), jnp.bfloat16) for k in (0, 1))
    low = text(u, v, 4.6)
    assert all(x.dtype == jnp.float32 for x in low)
    np.testing.assert_allclose(
        low, text(u.astype(jnp.float32), v.astype(jnp.float32), 4.6), rtol=1e-6
    )


# --- targets
def test_layer_normalize():
    x = 5 + 3 * normal(4, 3, 8)
    x64 = x.astype(np.float64)
    expected = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(layer_normalize(x), expected, atol=1e-5)
    assert layer_normalize(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.float32
    # The variance is as large as eps: an eps of 1e-6 would give .953 instead of .707.
    small = np.array([1.0, -1.0]) * np.sqrt(1e-5)
    np.testing.assert_allclose(layer_normalize(small), [np.sqrt(0.5), -np.sqrt(0.5)], rtol=1e-5)


def test_patch_normalize_golden():
    np.testing.assert_allclose(
        patch_normalize(np.arange(4.0)), [-1.161895, -0.387298, 0.387298, 1.161895], atol=1e-6
    )


def test_patch_normalize_divides_by_one_less():
    x = normal(2, 5, 12)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True, ddof=1) + 1e-6)
    np.testing.assert_allclose(patch_normalize(x), expected, atol=1e-5)


# --- errors
A = np.zeros


@pytest.mark.parametrize(
    ("call", "shapes"),
    [
        (lambda: losses.gaussian(A((3, 4)), A((3, 5))), ["(3, 4)", "(3, 5)"]),
        (lambda: losses.gaussian(A((3, 4)), A((3, 4)), A(4)), ["(4,)", "(3,)"]),
        (
            lambda: losses.gaussian(A((3, 4)), A((3, 4)), second_moment=1.0, moment_DxD=A((3, 3))),
            ["(3, 3)", "(4, 4)"],
        ),
        (lambda: losses.gaussian(A(()), A(())), ["scalars"]),
        (lambda: losses.second_moment(A((3, 4)), A(2)), ["(2,)", "(3,)"]),
        (lambda: losses.boltzmann(A((3, 4)), A((5, 3)), A(3, int)), ["(3, 4)", "(5, 3)"]),
        (lambda: losses.boltzmann(A((3, 4)), A((5, 4)), A(2, int)), ["(2,)", "(3,)"]),
        (lambda: losses.boltzmann(A((3, 4)), A((5, 4)), A(3, int), where_K=A(3)), ["(3,)", "(5,)"]),
        (lambda: losses.category(A((3, 4)), A(2, int)), ["(2,)", "(3,)"]),
        (lambda: losses.category(A((3, 4)), A(3, int), A(4)), ["(4,)", "(3,)"]),
        (lambda: losses.category(A(()), A((), int)), ["scalar"]),
        (lambda: losses.text(A((3, 4)), A((2, 4)), 0.0), ["(3, 4)", "(2, 4)"]),
        (lambda: losses.text(A((3, 4)), A((3, 4)), 0.0, A(2)), ["(2,)", "(3,)"]),
        (lambda: losses.text(A(4), A(4), 0.0), ["(4,)"]),
        (lambda: losses.text(A((3, 4)), A((3, 4)), 0.0, group_B=A(2, int)), ["(2,)", "(3,)"]),
        (lambda: losses.patch_normalize(A((3, 1))), ["(3, 1)"]),
    ],
)
def test_wrong_shapes_are_named(call, shapes):
    with pytest.raises(ValueError) as error:
        call()
    text = str(error.value).replace(",)", ")")  # chex writes (3,) as (3)
    assert all(shape.replace(",)", ")") in text for shape in shapes)
