"""k-nearest-neighbour accuracy on frozen features: nothing is trained, so it can follow a
pre-training."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import schema
from m3i_jax.evaluation import registry
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
    """Returns votes [Q, C] of the k nearest rows of the index, each weighted by exp(cosine /
    temperature), scaled so that the nearest has weight 1.

    Args:
      queries_QxD: L2-normalised features to classify.
      index_NxD: L2-normalised features with known labels.
      label_N: int labels of the index, in 0..classes - 1.
      k: neighbours that vote, at most N.
      classes: C.
      temperature: of the weights.

    >>> import jax.numpy as jnp
    >>> index, labels = jnp.eye(2), jnp.array([1, 0])
    >>> votes = knn_votes(index[:1], index, labels, k=1, classes=2, temperature=1.0)
    >>> votes.argmax(-1).tolist()
    [1]
    """
    similarity, nearest = jax.lax.top_k(
        jnp.matmul(queries_QxD, index_NxD.T, precision=jax.lax.Precision.HIGHEST), k
    )
    # relative to the nearest: neither overflow nor all zeros at a low temperature
    weight = jnp.exp((similarity - similarity[:, :1]) / temperature)
    return (jax.nn.one_hot(label_N[nearest], classes) * weight[..., None]).sum(1)


KnnIndex = tuple[np.ndarray, np.ndarray]  # features [n, D] and labels [n]
_RANKED = 6  # classes of a query that are kept: the five of top5, and one more
_MOST, _LEAST = 1024, 8  # queries at a time
_BLOCK = 1 << 28  # similarities at a time: 1 GiB


def queries_at_a_time(index: int) -> int:
    """Returns the number of queries at a time for an index of so many rows.

    >>> [queries_at_a_time(rows) for rows in (50_000, 1_281_167, 10**9)]
    [1024, 209, 8]
    """
    return min(_MOST, max(_LEAST, _BLOCK // index))


def rank_classes(
    queries: KnnIndex,
    index: KnnIndex,
    *,
    k: int,
    temperature: float,
    chunk: int = 0,
    poll: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (labels [Q], the first six classes by votes [Q, 6], most votes first) of the queries
    with a label, by the rows of an index with a label; fewer columns where there are fewer classes.
    -1 takes the place of a class without a vote: it is no prediction.

    Args:
      queries, index: features and labels.
      k, temperature: of the votes.
      chunk: queries at a time; 0: as many as memory allows, at most 1,024.
      poll: called before every chunk; may raise.

    >>> some = (np.eye(2, dtype=np.float32), np.array([1, -1]))
    >>> [x.tolist() for x in rank_classes(some, some, k=1, temperature=1.0)]
    [[1], [[1, -1]]]
    """
    (q, q_label), (x, x_label) = (
        (f[label >= 0], label[label >= 0]) for f, label in (queries, index)
    )
    if not len(q) or not len(x):
        return np.zeros(0, np.int64), np.zeros((0, 1), np.int64)
    x, x_label = jax.device_put((x, x_label))
    classes, k = int(max(q_label.max(), x_label.max())) + 1, min(k, len(x))
    ranked, chunk = [], chunk or queries_at_a_time(len(x))
    for i in range(0, len(q), chunk):
        poll()
        votes = knn_votes(
            q[i : i + chunk], x, x_label, k=k, classes=classes, temperature=temperature
        )
        ranked.append(_first_classes(np.asarray(votes)))
    return q_label, np.concatenate(ranked)


def _first_classes(votes_BxC: np.ndarray) -> np.ndarray:
    """The first classes [B, 6] of votes, as `rank_classes` returns them."""
    order_Bx6 = np.argsort(-votes_BxC, axis=1, kind="stable")[:, :_RANKED]
    # not true of NaN either
    return np.where(np.take_along_axis(votes_BxC, order_Bx6, 1) > 0, order_Bx6, -1)


def knn_top_accuracy(label_Q: np.ndarray, order_QxC: np.ndarray) -> Iterator[tuple[str, float]]:
    """Yields ("top1", share) and, with more than five classes, ("top5", share) of the ranking that
    `rank_classes` gives; nothing if it has no rows. Only classes with a vote are right: with few
    neighbours, top5 may be of fewer than five classes."""
    for top in (1, 5):
        if len(label_Q) and (top == 1 or order_QxC.shape[1] > 5):
            yield f"top{top}", float((order_QxC[:, :top] == label_Q[:, None]).any(1).mean())


def knn_accuracy(
    queries: KnnIndex, index: KnnIndex, *, k: int, temperature: float, chunk: int = 0
) -> Iterator[tuple[str, float]]:
    """Yields ("top1", share) and, with more than five classes, ("top5", share) of queries
    (features, labels) among an index (features, labels).

    Rows without a label (-1) are left out on both sides; nothing is yielded if no row is left.
    """
    yield from knn_top_accuracy(
        *rank_classes(queries, index, k=k, temperature=temperature, chunk=chunk)
    )


def knn_predictions(
    config: schema.Config,
) -> Callable[[EvalContext], tuple[Predictions, np.ndarray]]:
    """Returns predictions for the queries by their neighbours in the index, and the first classes
    by votes; computed once an evaluation."""

    def run(context: EvalContext) -> tuple[Predictions, np.ndarray]:
        queries, index, settings = context("queries"), context("index"), config.evaluate
        label, order = rank_classes(
            (queries.vectors, queries.labels),
            (index.vectors, index.labels),
            k=settings.k,
            temperature=settings.temperature,
            poll=context.poll,
        )
        return Predictions(label, order[:, 0]), order

    return lambda context: context.once("knn", lambda: run(context))


def measure(config: schema.Config) -> Metric:
    """eval/knn/..., from the index and the queries."""
    predict = knn_predictions(config)

    def run(context: EvalContext) -> Iterator[tuple[str, float]]:
        predictions, order_QxC = predict(context)
        for name, value in knn_top_accuracy(predictions.labels, order_QxC):
            yield f"eval/knn/{name}", value

    return run


registry.register_evaluator(
    registry.Evaluator(
        name="knn",
        title="kNN",
        setting="knn",
        reads=("k", "temperature"),
        needs=(registry.LABELS,),
        build=lambda inputs: measure(inputs.config),
    )
)
