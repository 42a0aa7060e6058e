"""Few-shot classification by regularised least squares on frozen features: no SGD, no learning
rate, seconds. What follows a run best while it trains, beside kNN.

Features are whitened by the mean and deviation of the shots, and a constant feature stands for an
unregularised bias; targets are +1 for the class and -1 for all others; w = (X'X + l2 I)^-1 X'Y (the
protocol of big_vision's few-shot evaluator)."""

from collections.abc import Iterator, Sequence

import numpy as np

from m3i_jax import schema
from m3i_jax.evaluation.category_head import top_k_hits
from m3i_jax.evaluation.feature_extraction import EvalContext, Metric

L2 = 2.0**10
BIAS = 100.0  # so large that its weight is small, and the decay hardly touches it


def whiten_features(x_NxD: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """All arrays by the mean and deviation of the first, with the constant feature behind: float64
    [., D + 1].

    >>> whiten_features(np.array([[1.0], [3.0]]))[0].round(3).tolist()
    [[-1.0, 100.0], [1.0, 100.0]]
    """
    mean_D, std_D = x_NxD.mean(0, dtype=np.float64), x_NxD.std(0, dtype=np.float64) + 1e-5
    return [
        np.concatenate([(x - mean_D) / std_D, np.full((len(x), 1), BIAS)], 1)
        for x in (x_NxD, *others)
    ]


def solve_ridge(x_NxD: np.ndarray, y_NxC: np.ndarray, l2: float) -> np.ndarray:
    """The weights [D, C] that minimise |x w - y|^2 + l2 |w|^2, in the smaller of the two
    dimensions.

    >>> solve_ridge(np.eye(2), np.array([[2.0], [0.0]]), 1.0).tolist()
    [[1.0], [0.0]]
    """
    rows, width = x_NxD.shape
    if rows >= width:
        return np.linalg.solve(x_NxD.T @ x_NxD + l2 * np.eye(width), x_NxD.T @ y_NxC)
    return x_NxD.T @ np.linalg.solve(x_NxD @ x_NxD.T + l2 * np.eye(rows), y_NxC)


def draw_shots(label_N: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Rows [M] of at most `shots` images of every class, drawn by chance and in order; rows without
    a label are not drawn.

    >>> draw_shots(np.array([0, 1, 0, -1, 1, 1]), 2, seed=0).tolist() in ([0, 1, 2, 4], [0, 1, 2, 5], [0, 2, 4, 5])
    True
    """
    order = np.random.default_rng(seed).permutation(len(label_N))
    by_class = order[np.argsort(label_N[order], kind="stable")]
    labels = label_N[by_class]
    rank = np.arange(len(labels)) - np.searchsorted(labels, labels)  # the how-manieth of its class
    return np.sort(by_class[(labels >= 0) & (rank < shots)])


def few_shot_accuracy(
    queries: tuple[np.ndarray, np.ndarray],
    index: tuple[np.ndarray, np.ndarray],
    *,
    shots: Sequence[int],
    seeds: int = 3,
    l2: float = L2,
) -> Iterator[tuple[str, float]]:
    """("1", top-1), ("5", top-1), ... of queries (features, labels) by so many images a class of an
    index: means over the draws.

    A number of shots that no class of the index has is left out, for it would repeat the one
    before; rows without a label are, on both sides."""
    (q, q_label), (x, x_label) = (
        (f[label >= 0], label[label >= 0]) for f, label in (queries, index)
    )
    if not len(q) or not len(x):
        return
    classes, most = int(max(q_label.max(), x_label.max())) + 1, int(np.bincount(x_label).max())
    for count in shots:
        if count > most:
            continue
        found = []
        for seed in range(seeds):
            rows = draw_shots(x_label, count, seed)
            few, asked = whiten_features(x[rows], q)
            weights = solve_ridge(few, 2.0 * np.eye(classes)[x_label[rows]] - 1.0, l2)
            found.append((top_k_hits(asked @ weights, q_label) < 1).mean())
        yield str(count), float(np.mean(found))


def measure(config: schema.Config) -> Metric:
    """eval/few_shot/1, ... from the index and the queries."""

    def run(seen: EvalContext) -> Iterator[tuple[str, float]]:
        queries, index, e = seen("queries"), seen("index"), config.evaluate
        both = (queries.vectors, queries.labels), (index.vectors, index.labels)
        for shots in e.shots:
            seen.poll()
            for name, value in few_shot_accuracy(*both, shots=(shots,), seeds=e.shot_seeds):
                yield f"eval/few_shot/{name}", value

    return run
