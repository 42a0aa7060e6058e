"""Few-shot classification by ridge regression on frozen features: no SGD, no learning rate, done in
seconds. With kNN the best evaluator to follow a run while it trains.

Features are standardised by the mean and deviation of the shots, and a constant feature serves as
an almost unregularised bias; targets are +1 for the class and -1 for all others; w = (X'X + l2
I)^-1 X'Y (the protocol of big_vision's few-shot evaluator; but the features are those of kNN, which
have length 1)."""

from collections.abc import Iterator, Sequence

import numpy as np

from m3i_jax import schema
from m3i_jax.evaluation import registry
from m3i_jax.evaluation.category_head import top_k_hits
from m3i_jax.evaluation.feature_extraction import EvalContext, Metric

L2 = 2.0**10
BIAS = 100.0  # large, so that its weight is small and hardly regularised


def whiten_features(x_NxD: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Returns all arrays standardised by the mean and deviation of the first, with the constant
    feature appended: float64 [., D + 1].

    >>> whiten_features(np.array([[1.0], [3.0]]))[0].round(3).tolist()
    [[-1.0, 100.0], [1.0, 100.0]]
    """
    mean_D, std_D = x_NxD.mean(0, dtype=np.float64), x_NxD.std(0, dtype=np.float64) + 1e-5
    return [
        np.concatenate([(x - mean_D) / std_D, np.full((len(x), 1), BIAS)], 1)
        for x in (x_NxD, *others)
    ]


def class_sums(x_NxD: np.ndarray, label_N: np.ndarray, classes: int) -> np.ndarray:
    """Returns the sums [C, D] of the rows of each class.

    >>> class_sums(np.array([[1.0], [2.0], [4.0]]), np.array([2, 0, 2]), 3).tolist()
    [[2.0], [0.0], [5.0]]
    """
    order = np.argsort(label_N, kind="stable")
    present, starts = np.unique(label_N[order], return_index=True)
    sums_CxD = np.zeros((classes, x_NxD.shape[1]), x_NxD.dtype)
    sums_CxD[present] = np.add.reduceat(x_NxD[order], starts, axis=0)
    return sums_CxD


def solve_ridge(x_NxD: np.ndarray, label_N: np.ndarray, classes: int, l2: float) -> np.ndarray:
    """Returns the weights [D, C] that minimise |x w - y|^2 + l2 |w|^2 for targets y of +1 for the
    class of a row and -1 for all others, in the smaller of the two dimensions.

    The targets [N, C] are not made: of many classes they take more memory than all else. X'y is
    twice the sum of the rows of the class less the sum of all rows.

    >>> solve_ridge(np.eye(2), np.array([1, 1]), 2, 1.0).tolist()
    [[-0.5, 0.5], [-0.5, 0.5]]
    """
    rows, width = x_NxD.shape
    targets_of = lambda z_NxD: (2 * class_sums(z_NxD, label_N, classes) - z_NxD.sum(0)).T
    if rows >= width:
        return np.linalg.solve(x_NxD.T @ x_NxD + l2 * np.eye(width), targets_of(x_NxD))
    # X' (XX' + l2 I)^-1 y, whose inverse is symmetric
    return targets_of(np.linalg.solve(x_NxD @ x_NxD.T + l2 * np.eye(rows), x_NxD))


def draw_shots(label_N: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Returns rows [M] of at most `shots` random images of every class, ascending; rows without a
    label are not drawn.

    >>> rows = draw_shots(np.array([0, 1, 0, -1, 1, 1]), 2, seed=0).tolist()
    >>> rows in ([0, 1, 2, 4], [0, 1, 2, 5], [0, 2, 4, 5])
    True
    """
    order = np.random.default_rng(seed).permutation(len(label_N))
    by_class = order[np.argsort(label_N[order], kind="stable")]
    labels = label_N[by_class]
    rank = np.arange(len(labels)) - np.searchsorted(labels, labels)  # 0, 1, ... within its class
    return np.sort(by_class[(labels >= 0) & (rank < shots)])


def few_shot_accuracy(
    queries: tuple[np.ndarray, np.ndarray],
    index: tuple[np.ndarray, np.ndarray],
    *,
    shots: Sequence[int],
    seeds: int = 3,
    l2: float = L2,
) -> Iterator[tuple[str, float]]:
    """Yields ("1", top-1), ("5", top-1), ... of queries (features, labels), classified by so many
    images a class of an index (features, labels); means over the seeds.

    A number of shots that no class of the index has is left out: it would repeat the one before.
    Rows without a label (-1) are left out on both sides."""
    (q, q_label), (x, x_label) = (
        (f[label >= 0], label[label >= 0]) for f, label in (queries, index)
    )
    if not len(q) or not len(x):
        return
    classes, largest = int(max(q_label.max(), x_label.max())) + 1, int(np.bincount(x_label).max())
    for count in shots:
        if count > largest:
            continue
        accuracies = []
        for seed in range(seeds):
            rows = draw_shots(x_label, count, seed)
            shots_MxD, queries_QxD = whiten_features(x[rows], q)
            weights = solve_ridge(shots_MxD, x_label[rows], classes, l2)
            accuracies.append((top_k_hits(queries_QxD @ weights, q_label) < 1).mean())
        yield str(count), float(np.mean(accuracies))


def measure(config: schema.Config) -> Metric:
    """eval/few_shot/1, ... from the index and the queries."""

    def run(context: EvalContext) -> Iterator[tuple[str, float]]:
        queries, index, settings = context("queries"), context("index"), config.evaluate
        both = (queries.vectors, queries.labels), (index.vectors, index.labels)
        for shots in settings.shots:
            context.poll()
            for name, value in few_shot_accuracy(*both, shots=(shots,), seeds=settings.shot_seeds):
                yield f"eval/few_shot/{name}", value

    return run


registry.register_evaluator(
    registry.Evaluator(
        name="few_shot",
        title="few-shot",
        setting="few_shot",
        reads=("shots", "shot_seeds"),
        needs=(registry.LABELS,),
        build=lambda inputs: measure(inputs.config),
    )
)
