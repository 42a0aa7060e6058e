"""Losses that compare the images of a batch, against their formulas in numpy (float64), numerical
gradients, weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp, softmax

from m3i_jax.objective import contrastive, losses
from tests.objective.numeric import (
    check_gradient,
    equations,
    grad_of,
    normal,
    primitives,
    value_and_grad_of,
)

dense_boltzmann = jax.jit(
    contrastive.dense_boltzmann, static_argnames=("temperature", "normalize", "stop_gradient")
)
dense_against = jax.jit(contrastive.densecl, static_argnames=("temperature",))
nt_xent = jax.jit(contrastive.nt_xent, static_argnames=("temperature",))
decorrelation = jax.jit(contrastive.barlow_twins, static_argnames=("off_diagonal", "eps"))
SETTINGS = ("temperature", "sharpening", "sinkhorn")
prototypes = jax.jit(contrastive.prototypes, static_argnames=(*SETTINGS, "mean_entropy"))
assignments = jax.jit(contrastive.assignments, static_argnames=SETTINGS)

# Losses of two views [B, D] and weights [B].
PROTOTYPES = normal(5, 4, seed=9)
OF_VIEWS = {
    "nt_xent": lambda a, b, where=None: nt_xent(a, b, where, temperature=0.5),
    "decorrelation": lambda a, b, where=None: decorrelation(a, b, where, off_diagonal=0.3),
    "prototypes": lambda a, b, where=None: prototypes(a, b, PROTOTYPES, where),
    "dense_boltzmann": lambda a, b, where=None: dense_boltzmann(
        *_dense(a, b, where), where_KxN=_column(where), temperature=0.5
    ),
    "dense_against": lambda a, b, where=None: dense_against(
        a[:, None], b[:, None], b, _column(where), where_K=where, temperature=0.5
    ),
}


def _column(where):
    return None if where is None else where[:, None]


def _dense(a, b, where):
    return a[:, None], b[:, None], _column(where)


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# --- all of them
@pytest.mark.parametrize("loss", OF_VIEWS.values(), ids=OF_VIEWS)
def test_weights_and_degenerate_rows(loss):
    """Images of weight 0 are ignored and produce no NaN; one compilation for all cases."""
    a, b, where = normal(6, 4), normal(6, 4, seed=1), np.array([1, 0, 1, 1, 0, 1], np.float32)
    full = value_and_grad_of(lambda a, b, where: loss(a, b, where), (0, 1), has_aux=True)
    keep = where > 0
    expected = loss(a[keep], b[keep])
    a[1], b[4] = np.nan, np.inf
    value, grads = full(a, b, where)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert all(np.isfinite(g).all() and not g[~keep].any() for g in grads) and grads[0][keep].any()
    value, grads = full(a, b, np.zeros(6, np.float32))
    assert tuple(map(float, value)) == (0, 0) and not any(np.any(g) for g in grads)
    for rows in (np.zeros((6, 4), np.float32), np.ones((6, 4), np.float32)):
        value, grads = full(rows, rows, where)
        assert np.isfinite(value).all() and all(np.isfinite(g).all() for g in grads)
    low, high = (jnp.asarray(normal(4, 4, seed=k), jnp.bfloat16) for k in (0, 1))
    value = loss(low, high)
    assert all(x.dtype == jnp.float32 and x.shape == () for x in value)
    np.testing.assert_allclose(
        value, loss(np.asarray(low, np.float32), np.asarray(high, np.float32)), rtol=1e-6
    )


# --- dense
@pytest.mark.parametrize("normalize", [True, False])
def test_dense_boltzmann_is_scipy_at_each_position(normalize):
    p, k, where = (
        normal(4, 3, 5),
        normal(4, 3, 5, seed=1),
        np.random.default_rng(2).random((4, 3)).round(1),
    )
    total, count = dense_boltzmann(p, k, where, temperature=0.2, normalize=normalize)
    a, b = (unit(p), unit(k)) if normalize else (p.astype(np.float64), k.astype(np.float64))
    logits = np.einsum("bnd,knd->nbk", a, b) / 0.2
    cost = logsumexp(logits, axis=-1) - np.einsum("nbb->nb", logits)
    np.testing.assert_allclose(total, (cost * where.T).sum(), rtol=1e-5)
    np.testing.assert_allclose(count, where.sum(), rtol=1e-6)


def test_dense_boltzmann_is_boltzmann_mapped_without_gather():
    p, k = normal(4, 3, 5), normal(4, 3, 5, seed=1)
    of_one = lambda p, k: losses.boltzmann(p, k, jnp.arange(4), temperature=0.3)
    mapped = jax.jit(jax.vmap(of_one, in_axes=(1, 1)))(p, k)
    np.testing.assert_allclose(
        dense_boltzmann(p, k, temperature=0.3), [x.sum() for x in mapped], rtol=1e-5
    )
    jaxpr = jax.make_jaxpr(
        jax.grad(lambda p: contrastive.dense_boltzmann(p, k, temperature=0.3)[0])
    )(p).jaxpr
    assert primitives(jaxpr, "gather") == primitives(jaxpr, "scatter-add") == 0
    # one product forward and one backward, for all positions
    assert primitives(jaxpr, "dot_general") == 2
    assert (
        max(np.prod(v.aval.shape, dtype=int) for e in equations(jaxpr) for v in e.outvars)
        <= 3 * 4 * 5
    )


def test_dense_boltzmann_parts_of_a_batch_add_up():
    p, k = normal(4, 3, 5), normal(4, 3, 5, seed=1)
    parts = [
        dense_boltzmann(p[i], k, index_B=i, temperature=0.3)
        for i in (np.array([2, 0]), np.array([1, 3]))
    ]
    np.testing.assert_allclose(
        np.sum(parts, axis=0), dense_boltzmann(p, k, temperature=0.3), rtol=1e-5
    )


def test_dense_boltzmann_missing_keys():
    p, k, exists = (
        normal(4, 2, 3),
        normal(4, 2, 3, seed=1),
        np.array([[1, 1], [0, 1], [1, 1], [1, 0]], bool),
    )
    k[~exists] = np.nan
    total, count = dense_boltzmann(p, k, exists, where_KxN=exists, temperature=1.0)
    expected = 0
    for n in range(2):
        rows = exists[:, n]
        logits = unit(p[rows, n]) @ unit(k[rows, n]).T
        expected += (logsumexp(logits, axis=1) - np.diag(logits)).sum()
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert float(count) == 6


def test_dense_boltzmann_index_out_of_range_is_nan():
    p = normal(2, 3, 4)
    assert np.isnan(dense_boltzmann(p, p, index_B=np.array([0, 2]), temperature=1.0)[0])
    assert np.isfinite(
        dense_boltzmann(
            p, p, np.array([[1, 1, 1], [0, 0, 0]]), index_B=np.array([0, 2]), temperature=1.0
        )[0]
    )


def test_dense_boltzmann_gradient():
    p, k, where = (
        normal(3, 2, 3),
        normal(3, 2, 3, seed=1),
        np.array([[1, 0], [1, 1], [0.5, 1]], np.float32),
    )
    check_gradient(
        lambda p, k: dense_boltzmann(p, k, where, temperature=0.7, stop_gradient=False)[0], p, k
    )
    assert not np.any(grad_of(lambda k: dense_boltzmann(p, k, where, temperature=0.7)[0])(k))


def test_densecl_is_numpy():
    p, t, where = (
        normal(4, 3, 5),
        2 * normal(4, 3, 5, seed=1),
        np.random.default_rng(2).random((4, 3)).round(1),
    )
    total, count = dense_against(p, t, t.mean(1), where, temperature=0.2)
    negative = unit(t.astype(np.float64).mean(1))  # mean of vectors before normalisation
    expected = 0
    for b in range(4):
        for n in range(3):
            others = [c for c in range(4) if c != b]
            logits = (
                np.array([unit(p[b, n]) @ unit(t[b, n]), *(unit(p[b, n]) @ negative[others].T)])
                / 0.2
            )
            expected += where[b, n] * (logsumexp(logits) - logits[0])
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(count, where.sum(), rtol=1e-6)


def test_densecl_parts_and_missing_images():
    p, t = normal(4, 3, 5), normal(4, 3, 5, seed=1)
    negative = t.mean(1)
    parts = [
        dense_against(p[i], t[i], negative, index_B=i, temperature=0.2)
        for i in (np.array([2, 0]), np.array([1, 3]))
    ]
    np.testing.assert_allclose(
        np.sum(parts, axis=0), dense_against(p, t, negative, temperature=0.2), rtol=1e-5
    )
    negative[3] = np.nan
    some = dense_against(
        p[:3],
        t[:3],
        negative,
        index_B=np.arange(3),
        where_K=np.array([1, 1, 1, 0]),
        temperature=0.2,
    )
    np.testing.assert_allclose(
        some, dense_against(p[:3], t[:3], negative[:3], temperature=0.2), rtol=1e-5
    )


def test_densecl_keys_of_other_images():
    """No negative belongs to the image: an index out of range, as with a queue."""
    p, t, queue = normal(2, 1, 4), normal(2, 1, 4, seed=1), normal(3, 4, seed=2)
    logits = (
        np.concatenate([(unit(p) * unit(t)).sum(-1), unit(p)[:, 0] @ unit(queue).T], axis=1) / 0.2
    )
    total, _ = dense_against(p, t, queue, index_B=np.array([-1, -1]), temperature=0.2)
    np.testing.assert_allclose(total, (logsumexp(logits, axis=1) - logits[:, 0]).sum(), rtol=1e-5)


def test_densecl_of_a_single_image_is_zero():
    p = normal(1, 3, 4)
    (total, _), grad = value_and_grad_of(
        lambda p: dense_against(p, p, p.mean(1), temperature=0.2), has_aux=True
    )(p)
    assert float(total) == 0 and not np.any(grad)


def test_densecl_gradient():
    p, t = normal(3, 2, 3), normal(3, 2, 3, seed=1)
    check_gradient(lambda p: dense_against(p, t, t.mean(1), temperature=0.7)[0], p)
    assert not np.any(grad_of(lambda t: dense_against(p, t, t.mean(1), temperature=0.7)[0])(t))


# --- SimCLR
def numpy_nt_xent(a, b, temperature):
    z = np.concatenate([unit(a), unit(b)])
    batch, cost = len(a), []
    for v in range(2 * batch):
        logits = np.delete(z @ z[v], v) / temperature
        cost.append(logsumexp(logits) - z[v] @ z[(v + batch) % (2 * batch)] / temperature)
    return (np.array(cost[:batch]) + cost[batch:]) / 2


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_is_numpy(temperature):
    a, b, where = normal(5, 4), normal(5, 4, seed=1), np.array([1, 2, 0.5, 1, 0.25], np.float32)
    total, count = nt_xent(a, b, where, temperature=temperature)
    np.testing.assert_allclose(total, (numpy_nt_xent(a, b, temperature) * where).sum(), rtol=1e-5)
    assert float(count) == 4.75
    np.testing.assert_allclose(nt_xent(b, a, where, temperature=temperature)[0], total, rtol=1e-5)


def test_nt_xent_gradient_through_both_views():
    a, b = normal(3, 3), normal(3, 3, seed=1)
    check_gradient(lambda a, b: nt_xent(a, b, temperature=0.7)[0], a, b)


# --- Barlow Twins
def numpy_decorrelation(a, b, off_diagonal):
    a, b = (
        (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        for x in (a.astype(np.float64), b.astype(np.float64))
    )
    c = a.T @ b / len(a)
    own = np.diag(c)
    return ((own - 1) ** 2).sum() + off_diagonal * ((c**2).sum() - (own**2).sum())


def test_barlow_twins_is_numpy():
    a = 2 + 3 * normal(9, 4)
    b = 0.7 * a + normal(9, 4, seed=1)
    total, count = decorrelation(a, b)
    np.testing.assert_allclose(total / count, numpy_decorrelation(a, b, 0.0051), rtol=1e-4)
    assert float(count) == 9
    np.testing.assert_allclose(
        decorrelation(a, b, off_diagonal=0.5)[0] / 9, numpy_decorrelation(a, b, 0.5), rtol=1e-4
    )


def test_barlow_twins_weights_count_like_copies():
    a, b = normal(5, 3), normal(5, 3, seed=1)
    copied = decorrelation(np.concatenate([a, a[:2]]), np.concatenate([b, b[:2]]))
    np.testing.assert_allclose(decorrelation(a, b, np.array([2, 2, 1, 1, 1])), copied, rtol=1e-4)


def test_barlow_twins_gradient_through_both_views():
    a, b = normal(6, 3), normal(6, 3, seed=1)
    check_gradient(
        lambda a, b: decorrelation(a, b, np.array([1, 1, 0, 1, 2, 1]), off_diagonal=0.3)[0], a, b
    )


# --- MSN
def numpy_assignments(t, k, temperature, sharpening, sinkhorn):
    p = softmax(unit(t) @ unit(k).T / temperature, axis=1) ** (1 / sharpening)
    q = p / p.sum(1, keepdims=True)
    if sinkhorn:
        q /= q.sum()
        for _ in range(sinkhorn):
            q /= q.sum(0, keepdims=True) * len(k)
            q /= q.sum(1, keepdims=True) * len(t)
        q *= len(t)
    return q


def numpy_prototypes(a, t, k, temperature, sharpening, sinkhorn, mean_entropy):
    p, q = (
        softmax(unit(a) @ unit(k).T / temperature, axis=1),
        numpy_assignments(t, k, temperature, sharpening, sinkhorn),
    )
    mean = p.mean(0)
    return -(q * np.log(p)).sum(1).mean() + mean_entropy * (
        np.log(len(k)) + (mean * np.log(mean)).sum()
    )


@pytest.mark.parametrize("settings", [(0.1, 0.25, 3, 1.0), (0.5, 0.5, 0, 0.0), (0.2, 1.0, 2, 0.3)])
def test_prototypes_are_numpy(settings):
    a, t, k = normal(6, 4), normal(6, 4, seed=1), normal(5, 4, seed=2)
    total, count = prototypes(
        a, t, k, **dict(zip((*SETTINGS, "mean_entropy"), settings, strict=True))
    )
    np.testing.assert_allclose(total / count, numpy_prototypes(a, t, k, *settings), rtol=2e-5)
    balanced = assignments(t, k, **dict(zip(SETTINGS, settings[:3], strict=True)))
    np.testing.assert_allclose(balanced, numpy_assignments(t, k, *settings[:3]), rtol=2e-4)
    if settings == (0.1, 0.25, 3, 1.0):
        np.testing.assert_allclose(prototypes(a, t, k)[0], total, rtol=1e-6)


def test_prototypes_gradient_to_anchor_and_prototypes_only():
    a, t, k, where = (
        normal(3, 3),
        normal(3, 3, seed=1),
        normal(4, 3, seed=2),
        np.array([1, 0.5, 1], np.float32),
    )
    q = numpy_assignments(t, k, 0.5, 0.5, 0)

    def with_constant_targets(a, k):
        logits = (
            jnp.asarray(a / jnp.linalg.norm(a, axis=1, keepdims=True))
            @ (k / jnp.linalg.norm(k, axis=1, keepdims=True)).T
            / 0.5
        )
        log_p = jax.nn.log_softmax(logits)
        mean = (where[:, None] * jnp.exp(log_p)).sum(0) / 2.5
        return (where * -(q * log_p).sum(1)).sum() + 2.5 * (mean * jnp.log(mean)).sum()

    def loss(a, t, k):
        return prototypes(a, t, k, where, temperature=0.5, sharpening=0.5, sinkhorn=0)[0]

    check_gradient(lambda a: loss(a, t, k), a)
    check_gradient(with_constant_targets, a, k)
    grads, expected = (
        grad_of(loss, (0, 1, 2))(a, t, k),
        grad_of(with_constant_targets, (0, 1))(a, k),
    )
    assert not np.any(grads[1])
    np.testing.assert_allclose(grads[0], expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads[2], expected[1], rtol=1e-4, atol=1e-5)


def test_assignments_balance_the_batch():
    """All images are near one prototype: sharpening alone assigns all of them to it, balancing
    gives every prototype a share."""
    t, k = (
        np.array([[1.0, 0.0]]) + 0.1 * normal(40, 2),
        np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]),
    )
    np.testing.assert_allclose(assignments(t, k, sinkhorn=0).mean(0), [1, 0, 0], atol=1e-3)
    balanced = assignments(t, k, temperature=1.0, sinkhorn=50)
    np.testing.assert_allclose(balanced.mean(0), 1 / 3, atol=1e-3)
    np.testing.assert_allclose(balanced.sum(1), 1, rtol=1e-5)


def test_assignments_weights_count_like_copies():
    t, k = normal(4, 3), normal(5, 3, seed=1)
    copied = assignments(np.concatenate([t, t[:2]]), k)
    np.testing.assert_allclose(
        assignments(t, k, np.array([2.0, 2.0, 1.0, 1.0])), copied[:4], rtol=1e-4
    )


def test_distant_prototype_stays_finite():
    """The share of a prototype underflows to 0 in every row at this temperature."""
    t = np.tile(np.array([[1.0, 0.0]], np.float32), (3, 1))
    k = np.array([[1.0, 0.0], [-1.0, 0.0]], np.float32)
    value, grads = value_and_grad_of(
        lambda a, k: prototypes(a, t, k, temperature=0.005)[0], (0, 1)
    )(t, k)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)


# --- errors
A = np.zeros
TAU = {"temperature": 1.0}


@pytest.mark.parametrize(
    ("call", "shapes"),
    [
        (
            lambda: contrastive.dense_boltzmann(A((2, 3, 4)), A((2, 3, 5)), **TAU),
            ["(2, 3, 4)", "(2, 3, 5)"],
        ),
        (lambda: contrastive.dense_boltzmann(A((2, 3)), A((2, 3)), **TAU), ["(2, 3)"]),
        (lambda: contrastive.dense_boltzmann(A((2, 3, 4)), A((5, 3, 4)), **TAU), ["2 images", "5"]),
        (
            lambda: contrastive.dense_boltzmann(
                A((2, 3, 4)), A((5, 3, 4)), index_B=A(3, int), **TAU
            ),
            ["(3,)", "(2,)"],
        ),
        (
            lambda: contrastive.dense_boltzmann(A((2, 3, 4)), A((2, 3, 4)), A(2), **TAU),
            ["(2,)", "(2, 3)"],
        ),
        (
            lambda: contrastive.dense_boltzmann(A((2, 3, 4)), A((2, 3, 4)), where_KxN=A(2), **TAU),
            ["(2,)", "(2, 3)"],
        ),
        (
            lambda: contrastive.densecl(A((2, 3, 4)), A((2, 4, 4)), A((2, 4)), **TAU),
            ["(2, 3, 4)", "(2, 4, 4)"],
        ),
        (
            lambda: contrastive.densecl(A((2, 3, 4)), A((2, 3, 4)), A((2, 5)), **TAU),
            ["(2, 3, 4)", "(2, 5)"],
        ),
        (
            lambda: contrastive.densecl(A((2, 3, 4)), A((2, 3, 4)), A((2, 4)), where_K=A(3), **TAU),
            ["(3,)", "(2,)"],
        ),
        (lambda: contrastive.nt_xent(A((2, 3)), A((3, 3)), **TAU), ["(2, 3)", "(3, 3)"]),
        (lambda: contrastive.nt_xent(A((2, 3)), A((2, 3)), A(3), **TAU), ["(3,)", "(2,)"]),
        (lambda: contrastive.barlow_twins(A((2, 3, 4)), A((2, 3, 4))), ["(2, 3, 4)"]),
        (lambda: contrastive.prototypes(A((2, 3)), A((2, 3)), A((5, 4))), ["(2, 3)", "(5, 4)"]),
        (lambda: contrastive.assignments(A((2, 3)), A((5, 3)), A(4)), ["(4,)", "(2,)"]),
    ],
)
def test_wrong_shapes_are_named(call, shapes):
    with pytest.raises(ValueError) as error:
        call()
    text = str(error.value).replace(",)", ")")  # chex writes (3,) as (3)
    assert all(shape.replace(",)", ")") in text for shape in shapes)
