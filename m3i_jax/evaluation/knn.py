"""k-nearest-neighbour accuracy on frozen features: no training, no head, one number that can be
read while pre-training runs."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import schema
from m3i_jax.evaluation.feature_extraction import EvalContext, Metric, Predictions


@functools.partial(jax.jit, static_argnames=("k", "classes", "temperature"))
def knn_votes(
    queries_QxD: jax.Array,
    index_NxD: jax.Array,
    label_N: jax.Array,
    *,
    k: int,
    classes: int,
    temperature: float,
) -> jax.Array:
    """Votes [Q, C] of the k nearest rows of the index, each weighted exp(cosine / temperature), the
    nearest one being 1.

    Args:
      queries_QxD: L2-normalised features to classify.
      index_NxD: L2-normalised features with known labels.
      label_N: int labels of the index, in 0..classes - 1.
      k: neighbours that vote, at most N.
      classes: C.
      temperature: of the weights.

    >>> import jax.numpy as jnp
    >>> index = jnp.eye(2)
    >>> knn_votes(index[:1], index, jnp.array([1, 0]), k=1, classes=2, temperature=1.0).argmax(-1).tolist()
    [1]
    """
    similarity, nearest = jax.lax.top_k(
        jnp.matmul(queries_QxD, index_NxD.T, precision=jax.lax.Precision.HIGHEST), k
    )
    # at low temperature neither infinite nor all zero
    weight = jnp.exp((similarity - similarity[:, :1]) / temperature)
    return (jax.nn.one_hot(label_N[nearest], classes) * weight[..., None]).sum(1)


KnnIndex = tuple[np.ndarray, np.ndarray]  # features [n, D] and labels [n]


def rank_classes(
    queries: KnnIndex, index: KnnIndex, *, k: int, temperature: float, chunk: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """(labels [Q], classes by their votes [Q, C], most first) of the queries with a label, by the
    rows of an index with a label.

    >>> some = (np.eye(2, dtype=np.float32), np.array([1, -1]))
    >>> [x.tolist() for x in rank_classes(some, some, k=1, temperature=1.0)]
    [[1], [[1, 0]]]
    """
    (q, q_label), (x, x_label) = (
        (f[label >= 0], label[label >= 0]) for f, label in (queries, index)
    )
    if not len(q) or not len(x):
        return np.zeros(0, np.int64), np.zeros((0, 1), np.int64)
    x, x_label = jax.device_put((x, x_label))
    classes, k = int(max(q_label.max(), x_label.max())) + 1, min(k, len(x))
    best = [
        np.asarray(
            knn_votes(q[i : i + chunk], x, x_label, k=k, classes=classes, temperature=temperature)
        )
        for i in range(0, len(q), chunk)
    ]
    return q_label, np.argsort(-np.concatenate(best), axis=1, kind="stable")


def knn_top_accuracy(label_Q: np.ndarray, order_QxC: np.ndarray) -> Iterator[tuple[str, float]]:
    """("top1", share) and, with more than five classes, ("top5", share) of what `rank_classes`
    gives; nothing where it gives nothing."""
    for top in (1, 5):
        if len(label_Q) and (top == 1 or order_QxC.shape[1] > 5):
            yield f"top{top}", float((order_QxC[:, :top] == label_Q[:, None]).any(1).mean())


def knn_accuracy(
    queries: KnnIndex, index: KnnIndex, *, k: int, temperature: float, chunk: int = 1024
) -> Iterator[tuple[str, float]]:
    """("top1", share) and, with more than five classes, ("top5", share) of queries (features,
    labels) among an index (features, labels).

    Rows without a label (-1) are left out on both sides; nothing comes where that leaves nothing.
    """
    yield from knn_top_accuracy(
        *rank_classes(queries, index, k=k, temperature=temperature, chunk=chunk)
    )


def knn_predictions(
    config: schema.Config,
) -> Callable[[EvalContext], tuple[Predictions, np.ndarray]]:
    """What the neighbours of the queries in the index say, and all classes by their votes."""

    def run(seen: EvalContext) -> tuple[Predictions, np.ndarray]:
        queries, index, e = seen("queries"), seen("index"), config.evaluate
        label, order = rank_classes(
            (queries.vectors, queries.labels),
            (index.vectors, index.labels),
            k=e.k,
            temperature=e.temperature,
        )
        # enough for `knn_top_accuracy`, and not a column a class
        return Predictions(label, order[:, 0]), order[:, :6]

    return lambda seen: seen.once("knn", lambda: run(seen))


def measure(config: schema.Config) -> Metric:
    """eval/knn/..., from the index and the queries."""
    ask = knn_predictions(config)

    def run(seen: EvalContext) -> Iterator[tuple[str, float]]:
        answers, order_QxC = ask(seen)
        for name, value in knn_top_accuracy(answers.labels, order_QxC):
            yield f"eval/knn/{name}", value

    return run
