"""Estimated information against known values."""

import inspect

import jax
import numpy as np
import pytest

from m3i_jax.objective import information, losses, posteriors

gaussian_bits = jax.jit(information.gaussian_bits, static_argnums=2)
softmax_bits, category_bits = jax.jit(information.softmax_bits), jax.jit(information.category_bits)
gaussian, boltzmann, category = (
    jax.jit(losses.gaussian),
    jax.jit(losses.boltzmann),
    jax.jit(losses.category),
)


def test_gaussian_bits_of_jointly_gaussian_targets_is_their_information():
    """I = -D / 2 log2(1 - rho^2), attained only by the best linear prediction."""
    rng, rho, width = np.random.default_rng(0), 0.8, 4
    x = rng.normal(size=(20000, width))
    t = 3 + 2 * (rho * x + np.sqrt(1 - rho**2) * rng.normal(size=x.shape))

    def bits(prediction):
        total, count = gaussian(prediction, t)
        return float(gaussian_bits(total / count, t.var(0).mean(), width))

    known = -width / 2 * np.log2(1 - rho**2)
    assert bits(3 + 2 * rho * x) == pytest.approx(known, rel=0.02)
    assert bits(3 + 2 * rho * 0.7 * x) < known - 0.3
    assert bits(np.full_like(x, 3)) == pytest.approx(0, abs=0.01)
    assert bits(3 - 2 * rho * x) < 0


def test_gaussian_bits_is_scale_free():
    np.testing.assert_allclose(
        gaussian_bits(0.3, 0.9, 16), gaussian_bits(300.0, 900.0, 16), rtol=1e-5
    )


def test_gaussian_bits_limits():
    assert float(gaussian_bits(0.0, 1.0, 10)) == 240  # 24 bits an element
    assert float(gaussian_bits(0.0, 0.0, 10)) == float(gaussian_bits(1.0, 0.0, 10)) == 0
    # a negative variance from rounded moments
    assert float(gaussian_bits(1.0, -1e-9, 10)) == 0
    assert float(gaussian_bits(1.0, 1.0, 10)) == 0


def test_softmax_bits():
    z = np.eye(8, dtype=np.float32)
    sure, unsure = (boltzmann(z, z, np.arange(8), temperature=t)[0] / 8 for t in (0.01, 1e6))
    assert float(softmax_bits(sure, np.log(8))) == pytest.approx(3, abs=1e-5)
    assert float(softmax_bits(unsure, np.log(8))) == pytest.approx(0, abs=1e-5)


def test_category_bits_is_the_information_in_a_confusion_matrix():
    joint = np.array([[0.4, 0.1, 0.0], [0.0, 0.2, 0.1], [0.05, 0.0, 0.15]])  # input x label
    x, label = (k.ravel() for k in np.indices(joint.shape))
    marginal = joint.sum(0)
    with np.errstate(divide="ignore"):
        log_posterior = np.maximum(np.log(joint / joint.sum(1, keepdims=True)), -50)
    total, count = category(log_posterior[x], label, joint.ravel(), smoothing=0.0)
    ratio = np.where(joint > 0, joint / np.outer(joint.sum(1), marginal), 1.0)
    assert float(category_bits(total / count, 100 * marginal)) == pytest.approx(
        (joint * np.log2(ratio)).sum(), rel=1e-5
    )


def test_category_bits_limits():
    assert float(category_bits(0.0, np.array([3, 0, 0]))) == 0
    assert float(category_bits(0.0, np.zeros(3))) == 0
    assert float(category_bits(np.log(4), np.ones(4))) == pytest.approx(0, abs=1e-6)
    soft = np.array([0.5, 0.25, 0.25])
    assert (
        float(category_bits(0.0, soft))
        == pytest.approx(1.5)
        == pytest.approx(float(category_bits(0.0, 7 * soft)))
    )
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        category_bits(0.0, np.ones((2, 3)))


def test_no_gradient():
    assert jax.grad(gaussian_bits, (0, 1))(0.5, 1.0, 4) == (0, 0)
    assert jax.grad(softmax_bits, (0, 1))(0.5, 1.0) == (0, 0)
    assert jax.grad(category_bits)(0.5, np.ones(2)) == 0


def test_every_estimator_names_its_marginal():
    functions = {
        name
        for name, _ in inspect.getmembers(information, inspect.isfunction)
        if name.endswith("_bits")
    }
    assert functions == set(information.MARGINALS) and all(information.MARGINALS.values())


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_captions_that_are_no_candidates_tell_nothing(kind):
    """Equal captions that are no negatives of each other are no choices of a softmax either: of
    equal captions alone, each is predicted at no cost, and that is no information."""
    rng = np.random.default_rng(0)
    u, v = (rng.normal(size=(5, 3)) for _ in range(2))
    where, group = np.array([1.0, 1, 1, 0, 1]), np.array([7, 2, 7, 7, 4])
    scalars = {"logit_scale": np.float32(0.5), "logit_bias": np.float32(-1)}
    posterior = {"softmax": posteriors.TextSoftmax(), "sigmoid": posteriors.TextSigmoid()}[kind]
    trained = scalars["logit_scale"] if kind == "softmax" else scalars

    @jax.jit
    def bits(group):
        given = posteriors.LossInputs(parameters=trained, group=group)
        cost = posterior.cost(u.astype(np.float32), v.astype(np.float32), where, given)
        return posterior.bits(cost.evidence, cost.count)

    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (u, v))
    product = np.exp(0.5) * a @ b.T
    there = (where > 0) & ((group[:, None] != group) | np.eye(5, dtype=bool))
    each = []
    for logits in (product, product.T)[: 2 if kind == "softmax" else 1]:
        for i in np.flatnonzero(where):
            left = logits[i][there[i]]
            each.append(np.log(len(left)) + logits[i, i] - np.log(np.exp(left).sum()))
    assert float(bits(group)) == pytest.approx(np.mean(each) / np.log(2), abs=1e-5)
    assert float(bits(np.zeros(5, int))) == pytest.approx(0, abs=1e-6)
