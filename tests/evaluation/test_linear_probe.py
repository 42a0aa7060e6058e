"""The linear probe of Table 9 compared with numpy: batch norm, LARS, cosine, running statistics."""

import numpy as np
import pytest

from m3i_jax.evaluation import feature_extraction, linear_probe
from tests import toy


def data(rows: int = 48, width: int = 5, classes: int = 3, seed: int = 0):
    r = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(classes, width))
    label = r.permutation(np.arange(rows) % classes).astype(np.int32)
    x = (centres[label] + 0.5 * r.normal(size=(rows, width))) * 10.0 ** np.linspace(
        -1, 1, width
    ) + 4
    return x.astype(np.float32), label


def reference(
    x: np.ndarray,
    label: np.ndarray,
    classes: int,
    lr: float,
    epochs: int,
    warmup: int,
    batch: int,
    seed: int,
):
    """The same training in float64 numpy."""
    r, size = np.random.default_rng(seed), min(batch, len(x))
    steps, peak = len(x) // size, lr * size / 16_384
    w, b = 0.01 * r.normal(size=(x.shape[1], classes)), np.zeros(classes)
    mw, mb, mean, var = (
        np.zeros_like(w),
        np.zeros_like(b),
        np.zeros(x.shape[1]),
        np.zeros(x.shape[1]),
    )
    for epoch in range(epochs):
        order = r.permutation(len(x))
        for k in range(steps):
            t = epoch * steps + k
            share = (t - warmup * steps) / max((epochs - warmup) * steps, 1)
            rate = (
                peak * t / (warmup * steps)
                if t < warmup * steps
                else peak * 0.5 * (1 + np.cos(np.pi * share))
            )
            rows = order[k * size : (k + 1) * size]
            m, v = x[rows].mean(0), x[rows].var(0)
            unit = (x[rows] - m) / np.sqrt(v + 1e-6)
            logits = unit @ w + b
            p = np.exp(logits - logits.max(1, keepdims=True))
            g = (p / p.sum(1, keepdims=True) - np.eye(classes)[label[rows]]) / size
            gw, gb = unit.T @ g, g.sum(0)
            gw *= 0.001 * np.linalg.norm(w) / np.linalg.norm(gw)
            mw, mb = 0.9 * mw + gw, 0.9 * mb + gb
            w, b = w - rate * mw, b - rate * mb
            mean, var = 0.9 * mean + 0.1 * m, 0.9 * var + 0.1 * v * size / (size - 1)
    seen = 1 - 0.9 ** (epochs * steps)
    return w, b, mean / seen, var / seen


@pytest.mark.parametrize("epochs", [1, 10])
def test_a_few_steps_give_the_statistics_of_their_batches(epochs: int) -> None:
    """All batches are the whole set: 35 % of the initial variance is left after ten steps without a
    correction."""
    x, label = data(50)
    made = linear_probe.fit_linear_probe(x, label, 3, epochs=epochs)
    np.testing.assert_allclose(made.mean, x.mean(0), rtol=1e-4)
    np.testing.assert_allclose(made.variance, x.var(0, ddof=1), rtol=1e-4)


def test_many_steps_need_no_correction() -> None:
    """The moving average from 0 and 1, as torch keeps it, in float64."""
    x, label = data(40)
    mean, var, r = np.zeros(5), np.ones(5), np.random.default_rng(0)
    r.normal(size=(5, 3))
    for _ in range(100):
        for rows in r.permutation(40).reshape(4, 10):
            mean = 0.9 * mean + 0.1 * x[rows].mean(0, dtype=np.float64)
            var = 0.9 * var + 0.1 * x[rows].var(0, ddof=1, dtype=np.float64)
    made = linear_probe.fit_linear_probe(x, label, 3, epochs=100, batch=10)
    np.testing.assert_allclose(made.mean, mean, rtol=2e-6)
    np.testing.assert_allclose(made.variance, var, rtol=2e-6)


@pytest.mark.parametrize(("epochs", "warned"), [(50, False), (49, True)])
def test_the_number_of_steps_is_logged_once_a_run(epochs: int, warned: bool) -> None:
    """Four steps an epoch of 40 images, two of which have no label; fewer than 200 warn."""
    (x, label), lines = data(42), []
    label[:2] = -1
    features = feature_extraction.ImageFeatures(x, label, np.arange(42), np.ones(42, np.float32))
    config = toy.settings(evaluate__probe_epochs=epochs, evaluate__probe_batch=10)
    measure = linear_probe.measure(config, lines.append)
    for _ in range(2):
        sets = {name: lambda p, poll: (features, {}) for name in ("index", "queries")}
        dict(measure(feature_extraction.EvalContext(sets, {}, lambda: None)))
    assert len(lines) == 1 and f" {4 * epochs} steps on 40 images" in lines[0]
    assert lines[0].startswith("warning: ") == warned == ("evaluate.linear" in lines[0])


@pytest.mark.parametrize("batch", [16, 16_384])
def test_the_probe_equals_a_numpy_implementation(batch: int) -> None:
    x, label = data(50)
    settings = {"lr": 3000.0, "epochs": 6, "warmup": 2, "batch": batch, "seed": 4}
    made = linear_probe.fit_linear_probe(x, label, 3, **settings)
    w, b, mean, var = reference(x.astype(np.float64), label, 3, **settings)
    for got, wanted in (
        (made.weights["kernel"], w),
        (made.weights["bias"], b),
        (made.mean, mean),
        (made.variance, var),
    ):
        np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=2e-4 * np.abs(wanted).max())
    logits = (x - mean) / np.sqrt(var + 1e-6) @ w + b
    np.testing.assert_allclose(
        linear_probe.probe_logits(made, x), logits, rtol=5e-3, atol=5e-3 * np.abs(logits).max()
    )


def test_the_probe_learns_and_polls() -> None:
    (x, label), (q, q_label) = data(300), data(200, seed=1)
    label[:9], q_label[:7], polls = -1, -1, []
    got = dict(
        linear_probe.linear_probe_accuracy(
            (q, q_label), (x, label), batch=64, lr=3.2 * 16_384 / 64, poll=lambda: polls.append(1)
        )
    )
    assert list(got) == ["top1"] and got["top1"] > 0.9 and len(polls) == 90
    assert list(linear_probe.linear_probe_accuracy((q, np.full(200, -1)), (x, label))) == []


def test_the_metric_uses_raw_features() -> None:
    (x, label), (q, q_label) = data(60), data(30, seed=2)
    found = {}
    for name, raw, its in (("index", x, label), ("queries", q, q_label)):
        length = np.linalg.norm(raw, axis=1)
        found[name] = feature_extraction.ImageFeatures(
            raw / length[:, None], its, np.arange(len(raw)), length
        )
    config = toy.settings(
        evaluate__probe_epochs=3,
        evaluate__probe_warmup=1,
        evaluate__probe_lr=900.0,
        evaluate__probe_batch=20,
    )
    got = dict(
        linear_probe.measure(config, print)(
            feature_extraction.EvalContext(
                {k: lambda p, poll, v=v: (v, {}) for k, v in found.items()}, {}, lambda: None
            )
        )
    )
    assert got == {
        "eval/probe/top1": dict(
            linear_probe.linear_probe_accuracy(
                (q, q_label), (x, label), lr=900.0, epochs=3, warmup=1, batch=20
            )
        )["top1"]
    }
