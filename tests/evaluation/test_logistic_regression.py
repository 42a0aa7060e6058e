"""Logistic regression compared with scipy's optimizer in float64, and the choice of its weight
decay."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from m3i_jax.evaluation import feature_extraction, logistic_regression


def data(classes: int = 4, *, rows: int = 90, width: int = 6, noise: float = 1.0, seed: int = 0):
    """Features around one centre a class, on scales of 0.01 to 100, and labels of which some are
    wrong."""
    r = np.random.default_rng(seed)
    centres, scale = (
        np.random.default_rng(99).normal(size=(classes, width)),
        10.0 ** np.linspace(-2, 2, width),
    )
    label = r.permutation(np.arange(rows) % classes)
    x = (centres[label] + noise * r.normal(size=(rows, width)) + 3) * scale
    return x.astype(np.float32), np.where(
        r.random(rows) < 0.1, r.integers(0, classes, rows), label
    ).astype(np.int32)


def objective(
    flat: np.ndarray, x: np.ndarray, label: np.ndarray, weight: np.ndarray, l2: float, classes: int
) -> float:
    w, b = flat[:-classes].reshape(-1, classes), flat[-classes:]
    logits = x @ w + b
    nll = scipy.special.logsumexp(logits, axis=1) - logits[np.arange(len(label)), label]
    return float((weight * nll).sum() / weight.sum() + l2 / 2 * (w**2).sum())


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_the_fit_is_the_minimum_of_scipy(l2: float) -> None:
    x, label = data()
    (x,) = logistic_regression.standardize_features(x)
    weight = np.where(np.arange(len(x)) % 3, 1.0, 0.0)
    start = logistic_regression.zero_weights(x.shape[1], 4)
    made = logistic_regression.fit_logistic(
        jnp.asarray(x), jnp.asarray(label), jnp.asarray(weight, jnp.float32), start, l2
    )
    arguments = (x.astype(np.float64), label, weight, l2, 4)
    exact = {"maxiter": 2000, "maxfun": 10**6, "ftol": 1e-15, "gtol": 1e-9}
    wanted = scipy.optimize.minimize(
        objective, np.zeros(28), arguments, method="L-BFGS-B", options=exact
    )
    got = np.concatenate(
        [np.asarray(made["kernel"], np.float64).reshape(-1), np.asarray(made["bias"], np.float64)]
    )
    assert objective(got, *arguments) <= wanted.fun + 1e-6
    np.testing.assert_allclose(
        made["kernel"],
        wanted.x[:-4].reshape(-1, 4),
        atol=2e-4 / l2**0.5 * max(1.0, abs(wanted.x).max() * 0.05),
    )


def test_all_weight_decays_share_one_compilation() -> None:
    x, label = data(3, rows=40)
    logistic_regression.fit_logistic.clear_cache()
    dict(logistic_regression.logistic_accuracy((x[:10], label[:10]), (x, label)))
    assert logistic_regression.fit_logistic._cache_size() == 1


def test_the_weight_decay_is_chosen_on_a_fifth_of_the_index() -> None:
    """Split, sweep, final fit and queries are repeated in scipy and numpy."""
    (x, label), (q, q_label) = data(6, rows=120, noise=1.5), data(6, rows=70, noise=1.5, seed=1)
    got = dict(logistic_regression.logistic_accuracy((q, q_label), (x, label)))
    mean, std = x.astype(np.float64).mean(0), x.astype(np.float64).std(0)
    x, q = (x - mean) / std, (q - mean) / std
    aside = np.zeros(120, bool)
    aside[np.random.default_rng(0).permutation(120)[:24]] = True

    def right(
        l2: float, weight: np.ndarray, of: np.ndarray, its: np.ndarray, top: int = 1
    ) -> float:
        flat = scipy.optimize.minimize(
            objective,
            np.zeros(42),
            (x, label, weight, l2, 6),
            method="L-BFGS-B",
            options={"maxfun": 10**6},
        ).x
        order = np.argsort(-(of @ flat[:-6].reshape(-1, 6) + flat[-6:]), 1)
        return float((order[:, :top] == its[:, None]).any(1).mean())

    scores = [right(l2, 1.0 - aside, x[aside], label[aside]) for l2 in logistic_regression.L2]
    # the first among equals, which is the strongest
    best = logistic_regression.L2[int(np.argmax(scores))]
    # the choice changes the result on these data
    assert 0 < int(np.argmax(scores)) < len(logistic_regression.L2) - 1
    wanted = {f"top{top}": right(best, np.ones(120), q, q_label, top) for top in (1, 5)}
    assert got == pytest.approx(wanted | {"log10_l2": np.log10(best)}, abs=1 / 70 + 1e-9)
    assert got["top1"] > 1.5 / 6


def test_constant_features_become_zero() -> None:
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    x[:, 1] = 7.25 + 1e-7 * np.arange(50)
    first, other = logistic_regression.standardize_features(x, 2 * x)
    np.testing.assert_allclose(first.std(0), [1, 0, 1], atol=1e-5)
    assert (other[:, 1] == 0).all() and np.isfinite(other).all()


def test_rows_without_a_label_are_left_out_and_too_few_yield_no_metric() -> None:
    (x, label), (q, q_label) = data(3, rows=40), data(3, rows=20, seed=1)
    wanted = list(
        logistic_regression.logistic_accuracy((q[::2], q_label[::2]), (x[::2], label[::2]))
    )
    blank = [(f, np.where(np.arange(len(y)) % 2, -1, y)) for f, y in ((q, q_label), (x, label))]
    assert list(logistic_regression.logistic_accuracy(*blank)) == wanted and [
        name for name, _ in wanted
    ] == ["top1", "log10_l2"]
    none = q, np.full_like(q_label, -1)
    assert (
        list(logistic_regression.logistic_accuracy(none, (x, label)))
        == list(logistic_regression.logistic_accuracy((q, q_label), none))
        == []
    )
    assert list(logistic_regression.logistic_accuracy((q, q_label), (x[:4], label[:4]))) == []


def test_a_poll_comes_before_every_fit() -> None:
    x, label = data(3, rows=40)
    sets = {
        "index": feature_extraction.ImageFeatures(x, label, np.arange(40)),
        "queries": feature_extraction.ImageFeatures(x[:9], label[:9], np.arange(9)),
    }
    polls = []
    context = feature_extraction.EvalContext(
        {name: lambda params, poll, name=name: (sets[name], {}) for name in sets},
        {},
        lambda: polls.append(1),
    )
    found = dict(logistic_regression.measure()(context))
    assert len(polls) == len(logistic_regression.L2) + 1
    assert found == {
        f"eval/linear/{name}": value
        for name, value in logistic_regression.logistic_accuracy((x[:9], label[:9]), (x, label))
    }


@pytest.mark.parametrize("side", ["index", "queries"])
def test_features_that_are_not_finite_are_never_right(side: str) -> None:
    """A sort puts NaN in the order of the classes, so that all images would be of class 0."""
    (x, label), (q, q_label) = data(3, rows=60), data(3, rows=30, seed=1)
    (x if side == "index" else q)[:] = np.nan
    got = dict(logistic_regression.logistic_accuracy((q, q_label), (x, label)))
    assert got["top1"] == 0
