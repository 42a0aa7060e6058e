"""k nearest neighbours against a loop in numpy."""

import dataclasses

import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.evaluation import feature_extraction, knn


def data(classes: int, *, seed: int = 0, queries: int = 37, index: int = 60, width: int = 6):
    """Unit vectors around one centre a class, with noise so that neighbours disagree; every third
    vector has another label than its centre."""
    r = np.random.default_rng(seed)
    centres = r.normal(size=(classes, width))

    def some(n: int) -> tuple[np.ndarray, np.ndarray]:
        label = r.integers(0, classes, n)
        x = centres[label] + 1.5 * r.normal(size=(n, width))
        label[::3] = r.integers(0, classes, len(label[::3]))
        label[-1] = classes - 1
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), label.astype(
            np.int32
        )

    return some(queries), some(index)


def brute(queries, index, *, k: int, classes: int, temperature: float) -> np.ndarray:
    """Votes of every query, in float64 and one at a time."""
    out = np.zeros((len(queries[0]), classes))
    for i, q in enumerate(queries[0].astype(np.float64)):
        cosine = [float(q @ x) for x in index[0].astype(np.float64)]
        for j in sorted(range(len(cosine)), key=lambda j: -cosine[j])[:k]:
            out[i, index[1][j]] += np.exp(cosine[j] / temperature)
    return out


def share(votes: np.ndarray, label: np.ndarray, top: int) -> float:
    return float(
        np.mean(
            [
                votes[i, label[i]] > 0
                and label[i] in sorted(range(votes.shape[1]), key=lambda c: -votes[i, c])[:top]
                for i in range(len(label))
            ]
        )
    )


@pytest.mark.parametrize("classes", [3, 9])
@pytest.mark.parametrize(
    ("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.5), (60, 1.0), (59, 0.02)]
)
def test_votes_and_accuracy_equal_a_numpy_loop(classes: int, k: int, temperature: float) -> None:
    queries, index = data(classes)
    wanted = brute(queries, index, k=k, classes=classes, temperature=temperature)
    got = np.asarray(
        knn.knn_votes(queries[0], *index, k=k, classes=classes, temperature=temperature)
    )
    assert got.shape == wanted.shape
    np.testing.assert_allclose(
        got / got.sum(1, keepdims=True), wanted / wanted.sum(1, keepdims=True), atol=2e-5
    )
    # the last chunk is shorter
    result = dict(knn.knn_accuracy(queries, index, k=k, temperature=temperature, chunk=10))
    assert result.pop("top1") == share(wanted, queries[1], 1)
    assert result == ({"top5": share(wanted, queries[1], 5)} if classes > 5 else {})


@pytest.mark.parametrize(("classes", "names"), [(5, ["top1"]), (6, ["top1", "top5"])])
def test_top5_only_where_there_are_more_than_five(classes: int, names: list[str]) -> None:
    assert [name for name, _ in knn.knn_accuracy(*data(classes), k=3, temperature=0.1)] == names


@pytest.mark.parametrize("value", [1.0, np.nan])
def test_classes_without_a_vote_are_no_hits(value: float) -> None:
    """All neighbours are of the next class, or the features of a run that diverged are not finite:
    the four classes behind the first, which have no votes, are not those of the lowest numbers."""
    unit, label = value * np.eye(10, dtype=np.float32), np.arange(10)
    index = np.repeat(unit, 5, 0), np.repeat((label + 1) % 10, 5)
    found = dict(knn.knn_accuracy((unit, label), index, k=5, temperature=0.07))
    assert found == {"top1": 0.0, "top5": 0.0}


def test_votes_are_weighted_by_similarity() -> None:
    """One neighbour at cosine 1 against two at 0.6: the nearest wins at a low temperature only."""
    queries = np.array([[1, 0]], np.float32), np.array([0])
    index = np.array([[1, 0], [0.6, 0.8], [0.6, -0.8]], np.float32), np.array([0, 1, 1])
    assert [
        dict(knn.knn_accuracy(queries, index, k=3, temperature=t))["top1"] for t in (0.1, 10.0)
    ] == [1.0, 0.0]


def test_a_very_low_temperature_is_the_nearest_neighbour() -> None:
    """All neighbours are far away: the weights must not underflow for all classes."""
    queries = np.array([[1.0, 0.0]], np.float32), np.array([1])
    index = np.array([[-0.6, 0.8], [-0.8, 0.6]], np.float32), np.array([1, 0])
    votes = np.asarray(knn.knn_votes(queries[0], *index, k=2, classes=2, temperature=1e-3))
    np.testing.assert_allclose(votes, [[0, 1]], atol=1e-6)
    assert dict(knn.knn_accuracy(queries, index, k=2, temperature=1e-3)) == {"top1": 1.0}


def test_k_is_limited_to_the_size_of_the_index() -> None:
    queries, index = data(4, index=7)
    assert list(knn.knn_accuracy(queries, index, k=1000, temperature=0.1)) == list(
        knn.knn_accuracy(queries, index, k=7, temperature=0.1)
    )


def test_rows_without_a_label_are_left_out_on_both_sides() -> None:
    queries, index = data(7)
    few = [(x[::2], label[::2]) for x, label in (queries, index)]
    blanked = [(x, np.where(np.arange(len(label)) % 2, -1, label)) for x, label in (queries, index)]
    wanted = list(knn.knn_accuracy(*few, k=9, temperature=0.1))
    assert list(knn.knn_accuracy(*blanked, k=9, temperature=0.1)) == wanted
    assert wanted != list(knn.knn_accuracy(queries, index, k=9, temperature=0.1))


def test_without_any_label_there_is_no_accuracy() -> None:
    queries, index = data(4)
    none = queries[0], np.full_like(queries[1], -1)
    assert (
        list(knn.knn_accuracy(none, index, k=3, temperature=0.1))
        == list(knn.knn_accuracy(index, none, k=3, temperature=0.1))
        == []
    )


def test_a_large_index_has_fewer_queries_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most so many similarities a block, but eight queries; each block is polled for, and six
    classes are kept of each, which are those of all votes."""
    queries, index = data(9)
    votes = np.asarray(knn.knn_votes(queries[0], *index, k=5, classes=9, temperature=0.1))
    order = np.argsort(-votes, axis=1, kind="stable")
    wanted = np.where(np.take_along_axis(votes, order, 1) > 0, order, -1)[:, :6]
    inner, rows, polls = knn.knn_votes, [], []
    monkeypatch.setattr(
        knn, "knn_votes", lambda q, *a, **k: (rows.append(len(q)), inner(q, *a, **k))[1]
    )
    for block, shapes in ((1 << 28, [37]), (60 * 20, [20, 17]), (1, [8, 8, 8, 8, 5])):
        monkeypatch.setattr(knn, "_BLOCK", block)
        rows.clear(), polls.clear()
        _, got = knn.rank_classes(
            queries, index, k=5, temperature=0.1, poll=lambda: polls.append(1)
        )
        assert np.array_equal(got, wanted) and rows == shapes and len(polls) == len(shapes)
        assert got.base is None or got.base.size == got.size  # no view of all classes


def test_the_metric_uses_the_settings() -> None:
    queries, index = data(8)
    config = dataclasses.replace(schema.Config(), evaluate=schema.Evaluate(k=4, temperature=0.3))
    sets = {
        name: feature_extraction.ImageFeatures(*part, np.arange(len(part[1])))
        for name, part in (("queries", queries), ("index", index))
    }
    wanted = [
        (f"eval/knn/{name}", value)
        for name, value in knn.knn_accuracy(queries, index, k=4, temperature=0.3)
    ]
    context = feature_extraction.EvalContext(
        {name: lambda params, poll, name=name: (sets[name], {}) for name in sets}, {}, lambda: None
    )
    assert [name for name, _ in wanted] == ["eval/knn/top1", "eval/knn/top5"]
    assert list(knn.measure(config)(context)) == wanted
