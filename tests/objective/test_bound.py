"""Equations 1, 2, 10 and 12 of the paper as exact statements, on a world small enough to write down
completely.

A sample s, an input transform t_x and target transforms t_y are drawn; what they lead to is
deterministic: z_x of 3 values, z_1 of 4, z_2 of 3. True information is summed up in float64, the
prediction terms are this project's losses: `category` on a table of logits, `boltzmann` on
embeddings of the targets."""

import functools

import jax
import numpy as np
import pytest

from m3i_jax.objective.information import softmax_bits
from m3i_jax.objective.losses import boltzmann, category

X, Y1, Y2 = 3, 4, 3
nll = jax.jit(functools.partial(category, smoothing=0.0))
point = jax.jit(functools.partial(boltzmann, normalize=False))
SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])


def log(p):
    return np.log(np.where(p > 0, p, 1.0))


def entropy(p):
    return -(p * log(p)).sum()


def world(seed, samples=5, transforms=2):
    """p(t_x, t_y, z_x, z_1, z_2): transforms are independent of the sample ("data-irrelevant"),
    encoders deterministic."""
    rng = np.random.default_rng(seed)
    p_s, p_tx, p_ty = (rng.dirichlet(np.full(n, 3.0)) for n in (samples, transforms, transforms))
    of_x = rng.integers(X, size=(samples, transforms))
    of_1, of_2 = (
        rng.integers(Y1, size=(samples, transforms)),
        rng.integers(Y2, size=(samples, transforms)),
    )
    p = np.zeros((transforms, transforms, X, Y1, Y2))
    for s, a, b in np.ndindex(samples, transforms, transforms):
        p[a, b, of_x[s, a], of_1[s, b], of_2[s, b]] += p_s[s] * p_tx[a] * p_ty[b]
    return p


def joint(seed):
    """The same with an arbitrary joint table: stochastic encoders."""
    return (
        np.random.default_rng(seed)
        .dirichlet(np.full(2 * 2 * X * Y1 * Y2, 0.3))
        .reshape(2, 2, X, Y1, Y2)
    )


def independent(seed):
    """Targets that are conditionally independent given z_x and the transforms."""
    rng = np.random.default_rng(seed)
    p_tx, p_ty = rng.dirichlet(np.ones(2)), rng.dirichlet(np.ones(2))
    p_x, p_1, p_2 = (
        rng.dirichlet(np.ones(X), size=(2, 2)),
        rng.dirichlet(np.ones(Y1), (2, 2, X)),
        rng.dirichlet(np.ones(Y2), (2, 2, X)),
    )
    return np.einsum("a,b,abx,abxi,abxj->abxij", p_tx, p_ty, p_x, p_1, p_2)


def information(p_txz):
    """I(z_x; z | t_x, t_y) of a table [t_x, t_y, z_x, z], in nats."""
    product, total = (
        p_txz.sum(3, keepdims=True) * p_txz.sum(2, keepdims=True),
        p_txz.sum((2, 3), keepdims=True),
    )
    return (p_txz * (log(p_txz * total) - log(product))).sum()


def given_t(p_txz):
    """E over the transforms of H(p(z | t_x, t_y)), which equals H(p(z | t_y)) if z is independent
    of t_x."""
    p_t = p_txz.sum((2, 3))
    return sum(
        p_t[a, b] * entropy(p_txz[a, b].sum(0) / p_t[a, b]) for a, b in np.ndindex(p_t.shape)
    )


def conditional(p_txz):
    """p(z | z_x, t_x, t_y); uniform where the condition never occurs."""
    total = p_txz.sum(-1, keepdims=True)
    return np.where(total > 0, p_txz / np.where(total > 0, total, 1), 1 / p_txz.shape[-1])


def prediction_term(p_txz, logits):
    """E log P^(z | prediction) by the package's loss: one row per (t_x, t_y, z_x, z), weighted by
    its probability."""
    target = np.broadcast_to(np.arange(p_txz.shape[-1]), p_txz.shape)
    rows = np.broadcast_to(logits[..., None, :], (*p_txz.shape, p_txz.shape[-1]))
    total, count = nll(rows, target, p_txz)
    assert float(count) == pytest.approx(1, abs=1e-5)
    return -float(total)


def first(p):
    return p.sum(4)


def second(p):
    return p.sum(3)


def both(p):
    return p.reshape(*p.shape[:3], Y1 * Y2)


def bounded(p):
    """Logits of the true posterior, finite for events of probability 0."""
    return np.maximum(np.log(np.maximum(p, 1e-30)), -60)


# --- Equations 1 and 2: one target
@SEEDS
@pytest.mark.parametrize("make", [world, joint])
def test_bound_never_exceeds_the_information(make, seed):
    p = first(make(seed))
    true, rng = information(p), np.random.default_rng(seed + 10)
    for scale in (0.0, 0.3, 3.0):
        logits = scale * rng.normal(size=p.shape)
        bound = given_t(p) + prediction_term(p, logits)
        assert bound <= true + 1e-6
        # The gap is exactly the divergence of the posteriors.
        log_p_hat = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        divergence = (p * (log(conditional(p)) - log_p_hat)).sum()
        assert true - bound == pytest.approx(divergence, abs=2e-6)
        assert divergence > 1e-3


@SEEDS
@pytest.mark.parametrize("make", [world, joint])
def test_bound_is_tight_for_the_true_posterior(make, seed):
    p = first(make(seed))
    logits = bounded(conditional(p))
    assert given_t(p) + prediction_term(p, logits) == pytest.approx(information(p), abs=2e-6)
    assert information(p) > 0.05
    rows = np.broadcast_to(logits[..., None, :], (*p.shape, Y1)).astype(np.float32)
    grad = jax.grad(lambda x: nll(x, np.broadcast_to(np.arange(Y1), p.shape), p)[0])(rows)
    # supremum over f_psi: no nearby table of logits is better
    np.testing.assert_allclose(grad.sum(3), 0, atol=1e-6)


@SEEDS
def test_target_entropy_is_independent_of_the_input_transform(seed):
    """The regularization term of Eq. 2 is H(p(z_y | t_y)): transforms are drawn independently of
    the sample."""
    p = first(world(seed))
    p_ty = p.sum((0, 2))  # [t_y, z]
    expected = sum(p_ty[b].sum() * entropy(p_ty[b] / p_ty[b].sum()) for b in range(2))
    assert given_t(p) == pytest.approx(expected, abs=1e-12)


@SEEDS
def test_boltzmann_over_target_representations_is_tight_too(seed):
    """Section 3.1: P^ ~ exp(prediction . z_y / tau), z' over all possible target
    representations."""
    p, tau = first(world(seed)), 0.7
    keys = np.random.default_rng(seed).normal(size=(Y1, 6))
    log_p = np.maximum(bounded(conditional(p)), -30)
    prediction = tau * log_p @ np.linalg.pinv(keys).T  # prediction . key / tau = log p
    rows = np.broadcast_to(prediction[..., None, :], (*p.shape, 6))
    total, _ = point(rows, keys, np.broadcast_to(np.arange(Y1), p.shape), p, temperature=tau)
    assert given_t(p) - float(total) == pytest.approx(information(p), abs=2e-5)
    wrong, _ = point(
        rows[..., ::-1], keys, np.broadcast_to(np.arange(Y1), p.shape), p, temperature=tau
    )
    assert given_t(p) - float(wrong) < information(p) - 0.01


def test_info_nce_over_a_batch_never_exceeds_the_information():
    """The logged estimate log2 B - loss, averaged over all batches of B = 2 pairs, for the optimal
    critic and a poor one."""
    p = np.random.default_rng(3).dirichlet(np.full(9, 0.4)).reshape(3, 3)
    ratio = np.log(p / np.outer(p.sum(1), p.sum(0)))
    true = (p * ratio).sum() / np.log(2)
    x, y = (k.ravel() for k in np.indices(p.shape))
    one, two = (k.ravel() for k in np.indices((9, 9)))
    weight = np.stack([p.ravel()[one] * p.ravel()[two]] * 2, 1)

    def bits(critic):
        rows, keys = critic[np.stack([x[one], x[two]], 1)], np.eye(3)[np.stack([y[one], y[two]], 1)]
        each = jax.vmap(lambda r, k, w: point(r, k, np.arange(2), w)[0])(rows, keys, weight)
        return float(softmax_bits(each.sum() / weight.sum(), np.log(2)))

    assert 0.05 < bits(ratio) < true
    assert bits(0.2 * ratio) < bits(ratio) and bits(-ratio) < 0


# --- Equations 10 and 12: several targets
def total_correlation(p):
    """Mutual information of the targets given z_x, E KL(p(z_1, z_2 | z_x, t) || p(z_1 | z_x, t)
    p(z_2 | z_x, t))."""
    product = conditional(first(p))[..., :, None] * conditional(second(p))[..., None, :]
    return (p * (log(conditional(both(p)).reshape(p.shape)) - log(product))).sum()


@SEEDS
@pytest.mark.parametrize("make", [world, joint])
def test_sum_over_targets_never_exceeds_the_information(make, seed):
    """Eq. 12 with its gap: the divergence of each posterior and the mutual information of the
    targets."""
    p, rng = make(seed), np.random.default_rng(seed + 10)
    logits = rng.normal(size=first(p).shape), rng.normal(size=second(p).shape)
    bound = (
        given_t(both(p))
        + prediction_term(first(p), logits[0])
        + prediction_term(second(p), logits[1])
    )
    best = given_t(both(p)) + sum(
        prediction_term(of(p), bounded(conditional(of(p)))) for of in (first, second)
    )
    true = information(both(p))
    assert bound < best <= true + 2e-6
    assert true - best == pytest.approx(total_correlation(p), abs=4e-6)
    normalized = [x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in logits]
    divergences = [
        (of(p) * (log(conditional(of(p))) - x)).sum()
        for of, x in zip((first, second), normalized, strict=True)
    ]
    assert true - bound == pytest.approx(sum(divergences) + total_correlation(p), abs=4e-6)


@SEEDS
def test_sum_over_targets_is_tight_where_the_input_explains_their_dependence(seed):
    p = independent(seed)
    best = given_t(both(p)) + sum(
        prediction_term(of(p), bounded(conditional(of(p)))) for of in (first, second)
    )
    assert total_correlation(p) == pytest.approx(0, abs=1e-12)
    assert best == pytest.approx(information(both(p)), abs=2e-6)
    assert total_correlation(joint(seed)) > 0.05  # this joint does not satisfy the condition above


@SEEDS
def test_separate_losses_are_the_loss_of_the_product(seed):
    """sum_k -log P^_k is -log of one posterior over all targets, for arbitrary posteriors."""
    p, rng = joint(seed), np.random.default_rng(seed)
    one, two = rng.normal(size=first(p).shape), rng.normal(size=second(p).shape)
    product = (one[..., :, None] + two[..., None, :]).reshape(*p.shape[:3], Y1 * Y2)
    separate = prediction_term(first(p), one) + prediction_term(second(p), two)
    assert separate == pytest.approx(prediction_term(both(p), product), abs=2e-6)


@SEEDS
def test_chain_of_targets_is_exact(seed):
    """Eq. 10: predictions that also read the preceding targets make the bound exact."""
    p = joint(seed)
    after_first = p.reshape(2, 2, X * Y1, Y2)  # condition: z_x together with z_1
    chain = prediction_term(first(p), bounded(conditional(first(p)))) + prediction_term(
        after_first, bounded(conditional(after_first))
    )
    assert given_t(both(p)) + chain == pytest.approx(information(both(p)), abs=4e-6)
