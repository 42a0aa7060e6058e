"""Few-shot least squares against numpy's lstsq, and the drawing of the shots."""

import tracemalloc

import numpy as np
import pytest

from m3i_jax.evaluation import feature_extraction, few_shot
from tests import toy


def data(rows: int, width: int, classes: int = 4, seed: int = 0):
    r = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(classes, width))
    label = r.permutation(np.arange(rows) % classes).astype(np.int32)
    return (
        (centres[label] + 0.8 * r.normal(size=(rows, width))) * 10.0 ** np.linspace(-1, 1, width)
        + 2
    ).astype(np.float32), label


@pytest.mark.parametrize(("rows", "width"), [(40, 7), (12, 30), (9, 9)])
@pytest.mark.parametrize("l2", [1024.0, 1e-3])
def test_ridge_weights_equal_lstsq(rows: int, width: int, l2: float) -> None:
    """Ridge regression is least squares with sqrt(l2) times the identity appended to the data and
    zeros to the targets."""
    r = np.random.default_rng(1)
    x, label = r.normal(size=(rows, width)), r.integers(0, 4, rows)
    label[label == 1] = 3  # a class without a row
    y = 2.0 * np.eye(5)[label] - 1.0
    wanted = np.linalg.lstsq(
        np.concatenate([x, l2**0.5 * np.eye(width)]),
        np.concatenate([y, np.zeros((width, 5))]),
        rcond=None,
    )[0]
    got = few_shot.solve_ridge(x, label, 5, l2)
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("width", [20, 400])
def test_many_classes_need_no_targets_of_all(width: int) -> None:
    """The weights of explicit targets, to 1e-10; of 20,000 classes these take 32 MB, and the
    identity that they are rows of 3 GB."""
    r, classes = np.random.default_rng(2), 20_000
    x, label = r.normal(size=(200, width)), r.integers(0, classes, 200)
    few = np.unique(np.append(label, [0, classes - 1]))
    y = np.where(label[:, None] == few, 1.0, -1.0)
    wanted = x.T @ np.linalg.solve(x @ x.T + 1024.0 * np.eye(200), y)
    tracemalloc.start()
    got = few_shot.solve_ridge(x, label, classes, 1024.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(got[:, few], wanted, rtol=0, atol=1e-10)
    assert peak < 4 * got.nbytes + 2**22


@pytest.mark.parametrize("shots", [1, 3, 100])
def test_shots_are_drawn_from_each_class(shots: int) -> None:
    label = np.array([2, 0, 0, -1, 2, 0, 0, 2, 5, -1])
    draws = [few_shot.draw_shots(label, shots, seed) for seed in range(40)]
    for rows in draws:
        assert np.bincount(label[rows], minlength=6).tolist() == [
            min(shots, 4),
            0,
            min(shots, 3),
            0,
            0,
            min(shots, 1),
        ]
        assert (np.diff(rows) > 0).all()
    seen = {int(row) for rows in draws for row in rows}
    assert seen == {0, 1, 2, 4, 5, 6, 7, 8}  # every labelled row can be drawn


def test_few_shot_accuracy_equals_its_steps_in_numpy() -> None:
    (x, label), (q, q_label) = data(60, 6), data(50, 6, seed=3)
    label[:5], q_label[-4:] = -1, -1
    got = dict(few_shot.few_shot_accuracy((q, q_label), (x, label), shots=(1, 5, 99), seeds=3))
    assert list(got) == ["1", "5"]  # no class has 99 images
    x, label, q, q_label = x[5:], label[5:], q[:-4], q_label[:-4]
    for count in (1, 5):
        found = []
        for seed in range(3):
            rows = few_shot.draw_shots(label, count, seed)
            mean, std = x[rows].astype(np.float64).mean(0), x[rows].astype(np.float64).std(0) + 1e-5
            train, asked = (
                np.hstack([(a - mean) / std, np.full((len(a), 1), 100.0)]) for a in (x[rows], q)
            )
            y = np.where(np.arange(4) == label[rows][:, None], 1.0, -1.0)
            padded = np.vstack([train, np.sqrt(1024.0) * np.eye(7)])
            w = np.linalg.lstsq(padded, np.vstack([y, np.zeros((7, 4))]), rcond=None)[0]
            found.append(((asked @ w).argmax(1) == q_label).mean())
        assert got[str(count)] == pytest.approx(np.mean(found))
    assert 0.25 < got["1"] < got["5"] < 1


def test_empty_sets_yield_no_metric() -> None:
    x, label = data(8, 3)
    assert list(few_shot.few_shot_accuracy((x, np.full(8, -1)), (x, label), shots=(1,))) == []
    assert list(few_shot.few_shot_accuracy((x, label), (x, np.full(8, -1)), shots=(1,))) == []


def test_the_metric_uses_the_settings_and_both_sets() -> None:
    (x, label), (q, q_label) = data(40, 5), data(20, 5, seed=2)
    sets = {
        "index": feature_extraction.ImageFeatures(x, label, np.arange(40)),
        "queries": feature_extraction.ImageFeatures(q, q_label, np.arange(20)),
    }
    config = toy.settings(evaluate__shots="(2,4)", evaluate__shot_seeds=2)
    got = dict(
        few_shot.measure(config)(
            feature_extraction.EvalContext(
                {k: lambda p, poll, v=v: (v, {}) for k, v in sets.items()}, {}, lambda: None
            )
        )
    )
    wanted = few_shot.few_shot_accuracy((q, q_label), (x, label), shots=(2, 4), seeds=2)
    assert got == {f"eval/few_shot/{name}": value for name, value in wanted}
