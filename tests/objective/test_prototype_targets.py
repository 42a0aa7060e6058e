"""Constraints on assignments to prototypes against numpy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m3i_jax.objective import prototype_targets
from m3i_jax.objective.prototype_targets import (
    PrototypeSoftmax,
    prototype_terms,
    track_centers,
    with_constraint,
)
from m3i_jax.objective.registry import form
from tests.objective.numeric import compiled

functions = compiled(
    prototype_targets, sinkhorn=("iterations",), centering=(), soft_cross_entropy=()
)
sinkhorn, centering = functions.sinkhorn, functions.centering
soft_cross_entropy = functions.soft_cross_entropy


def logits(seed: int, rows: int = 8, prototypes: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, prototypes)).astype(np.float32)


def scaled_exponentials(z: np.ndarray, tau: float, iterations: int) -> np.ndarray:
    """The published loop, in float64 and with its constants."""
    q = np.exp(z.astype(np.float64) / tau)
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(0, keepdims=True) * q.shape[1]
        q /= q.sum(1, keepdims=True) * q.shape[0]
    return q * q.shape[0]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("iterations", [1, 3, 50])
def test_sinkhorn_is_the_published_loop(iterations: int) -> None:
    z = logits(0)
    q = np.asarray(sinkhorn(z, temperature=0.25, iterations=iterations))
    np.testing.assert_allclose(q, scaled_exponentials(z, 0.25, iterations), rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(q.sum(1), 1, rtol=1e-5)  # rows last
    mean = q.astype(np.float64).mean(0)
    entropy = -(mean * np.log(mean)).sum()
    assert entropy <= np.log(12) + 1e-6
    if iterations == 50:  # the marginal of the assignments is uniform
        assert entropy == pytest.approx(np.log(12), abs=1e-3)


def test_sinkhorn_of_logits_beyond_the_range_of_float32() -> None:
    z = 10 * logits(1)  # exp(z / .04) is infinite
    q = np.asarray(sinkhorn(z, temperature=0.04))
    np.testing.assert_allclose(q, scaled_exponentials(z, 0.04, 3), atol=1e-4)
    assert np.isfinite(np.asarray(sinkhorn(1e4 * z, temperature=0.04))).all()


def test_rows_of_no_weight_change_no_other() -> None:
    z = logits(2)
    padded = np.concatenate([z, np.full((3, 12), np.nan, np.float32)])
    where = np.r_[np.ones(8), np.zeros(3)]
    with_padding = sinkhorn(padded, where, temperature=0.1)
    np.testing.assert_allclose(with_padding[:8], sinkhorn(z, temperature=0.1), rtol=1e-6)
    # a row of weight two is two rows
    twice = sinkhorn(z, np.r_[2.0, np.ones(7)], temperature=0.1)
    np.testing.assert_allclose(
        twice, sinkhorn(np.concatenate([z, z[:1]]), temperature=0.1)[:8], rtol=1e-5
    )
    nothing = sinkhorn(z, np.zeros(8), temperature=0.1)
    assert np.isfinite(np.asarray(nothing)).all()


def test_no_iteration_is_refused() -> None:
    with pytest.raises(ValueError, match="iterations is 0"):
        sinkhorn(logits(0), temperature=0.1, iterations=0)


def test_centering_subtracts_before_the_temperature() -> None:
    z, center = logits(3), logits(4)[0]
    want = softmax((z.astype(np.float64) - center) / 0.04)
    np.testing.assert_allclose(centering(z, center, temperature=0.04), want, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="center"):
        centering(z, center[:5], temperature=0.04)


def test_centering_makes_the_mean_assignment_uniform_to_first_order() -> None:
    """Entropy of the mean assignment: what is missing to log K falls with the fourth power of the
    temperature around the mean of the logits, with the second around another center."""

    def missing(center: np.ndarray, temperature: float) -> float:
        q = np.asarray(centering(z, center, temperature=temperature), np.float64).mean(0)
        return np.log(12) + (q * np.log(q)).sum()

    z = 3 * logits(7, rows=200) + np.linspace(0, 3, 12, dtype=np.float32)
    first, second = (missing(z.mean(0), tau) for tau in (8.0, 16.0))
    assert 0 < first < 1e-3 and first / second > 10
    other = [missing(0 * z[0], tau) for tau in (8.0, 16.0)]
    assert other[0] > 10 * first and 3 < other[0] / other[1] < 5


def test_cross_entropy_and_its_gradient() -> None:
    z, t, where = logits(5), softmax(logits(6).astype(np.float64)), np.r_[np.ones(7), 0]
    z[7] = np.nan
    loss = lambda x: soft_cross_entropy(x, t, where, temperature=0.1)
    total, count = loss(z)
    p = softmax(z[:7].astype(np.float64) / 0.1)
    assert float(count) == 7
    assert float(total) == pytest.approx(-(t[:7] * np.log(p)).sum(), rel=1e-5)
    gradient = jax.jit(jax.grad(lambda x: loss(x)[0]))(z)
    np.testing.assert_allclose(gradient[:7], (p - t[:7]) / 0.1, rtol=1e-3, atol=1e-4)
    assert (np.asarray(gradient[7]) == 0).all()
    through = jax.jit(jax.grad(lambda x: soft_cross_entropy(z[:7], x, temperature=0.1)[0]))(
        jnp.array(t[:7])
    )
    assert (np.asarray(through) == 0).all()


def test_centres_are_those_of_the_steps_before() -> None:
    rising = track_centers({"a": 3}, rise=lambda step: jnp.minimum(step / 2.0, 1.0))
    state = rising.init({})
    assert (np.asarray(state.centers["a"]) == 0).all() and float(state.rise) == 0
    center = np.zeros(3)
    for k in range(4):
        mean = np.arange(3.0) + k
        updates, state = rising.update({"w": 1}, state, {}, mean_logits={"a": jnp.array(mean)})
        center = 0.9 * center + 0.1 * mean
        assert updates == {"w": 1} and float(state.rise) == min((k + 1) / 2, 1)
    np.testing.assert_allclose(state.centers["a"], center, rtol=1e-6)
    _, same = rising.update({}, state, {})
    np.testing.assert_array_equal(same.centers["a"], state.centers["a"])
    with pytest.raises(ValueError, match="'b', of which none is among the widths: a"):
        rising.update({}, state, {}, mean_logits={"b": jnp.zeros(3)})
    # a chain of two gives both the means of both
    both = optax.named_chain(("one", rising), ("two", track_centers({"b": 3}, momentum=0.5)))
    _, states = both.update({}, both.init({}), {}, mean_logits={"a": jnp.ones(3), "b": jnp.ones(3)})
    np.testing.assert_allclose(states["two"].centers["b"], 0.5)
    with pytest.raises(ValueError, match="momentum is 1"):
        track_centers({}, momentum=1.0)


def test_temperatures_rise_and_settings_replace_the_methods_choice() -> None:
    z, zero = logits(7), jnp.zeros(12)
    posterior = PrototypeSoftmax(target_temperature=(0.04, 0.08))
    for rise, tau in ((0.0, 0.04), (0.5, 0.06), (1.0, 0.08)):
        np.testing.assert_allclose(
            posterior.assign(z, zero, rise),
            softmax(z.astype(np.float64) / tau),
            rtol=1e-3,
            atol=1e-6,
        )
    by_sinkhorn = with_constraint(
        form("dino"), constraint="sinkhorn", target_temperature=(0.1, 0.1)
    )
    assert {t.posterior for t in by_sinkhorn} == {
        PrototypeSoftmax(constraint="sinkhorn", target_temperature=(0.1, 0.1))
    }
    assert with_constraint(form("sim"), constraint="sinkhorn") == form("sim")
    with pytest.raises(ValueError, match="constraint 'queue'"):
        PrototypeSoftmax(constraint="queue")


def test_one_space_has_one_constraint() -> None:
    row = form("dino")
    assert list(prototype_terms(row)) == ["global_pooled"]
    assert list(prototype_terms(form("ibot"))) == ["global_pooled", "global_tokens"]
    mixed = (*row[:1], *with_constraint(row, constraint="sinkhorn")[1:])
    with pytest.raises(ValueError, match="their posteriors differ"):
        prototype_terms(mixed)
