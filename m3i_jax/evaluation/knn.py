"""k-nearest-neighbour accuracy on frozen features: no training, no head, one number that can be read while pre-training runs."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import schema
from m3i_jax.evaluation.features import Measure, Seen


@functools.partial(jax.jit, static_argnames=("k", "classes", "temperature"))
def votes(queries_QxD: jax.Array, index_NxD: jax.Array, label_N: jax.Array, *, k: int, classes: int, temperature: float) -> jax.Array:
    """Votes [Q, C] of the k nearest rows of the index, each weighted exp(cosine / temperature), the nearest one being 1.

    Args:
      queries_QxD: L2-normalised features to classify.
      index_NxD: L2-normalised features with known labels.
      label_N: int labels of the index, in 0..classes - 1.
      k: neighbours that vote, at most N.
      classes: C.
      temperature: of the weights.

    >>> import jax.numpy as jnp
    >>> index = jnp.eye(2)
    >>> votes(index[:1], index, jnp.array([1, 0]), k=1, classes=2, temperature=1.0).argmax(-1).tolist()
    [1]
    """
    similarity, nearest = jax.lax.top_k(jnp.matmul(queries_QxD, index_NxD.T, precision=jax.lax.Precision.HIGHEST), k)
    weight = jnp.exp((similarity - similarity[:, :1]) / temperature)  # at low temperature neither infinite nor all zero
    return (jax.nn.one_hot(label_N[nearest], classes) * weight[..., None]).sum(1)


def accuracy(
    queries: tuple[np.ndarray, np.ndarray], index: tuple[np.ndarray, np.ndarray], *, k: int, temperature: float, chunk: int = 1024
) -> Iterator[tuple[str, float]]:
    """("top1", share) and, with more than five classes, ("top5", share) of queries (features, labels) among an index (features, labels).

    Rows without a label (-1) are left out on both sides; nothing comes where that leaves nothing.
    """
    (q, q_label), (x, x_label) = ((f[label >= 0], label[label >= 0]) for f, label in (queries, index))
    if not len(q) or not len(x):
        return
    x, x_label = jax.device_put((x, x_label))
    classes, k = int(max(q_label.max(), x_label.max())) + 1, min(k, len(x))
    best = [np.asarray(votes(q[i : i + chunk], x, x_label, k=k, classes=classes, temperature=temperature)) for i in range(0, len(q), chunk)]
    order = np.argsort(-np.concatenate(best), axis=1, kind="stable")
    for top in (1, 5):
        if top == 1 or classes > 5:
            yield f"top{top}", float((order[:, :top] == q_label[:, None]).any(1).mean())


def measure(config: schema.Config) -> Measure:
    """eval/knn/..., from the index and the queries."""

    def run(seen: Seen) -> Iterator[tuple[str, float]]:
        queries, index = seen("queries"), seen("index")
        both, e = ((queries.vectors, queries.labels), (index.vectors, index.labels)), config.evaluate
        for name, value in accuracy(*both, k=e.k, temperature=e.temperature):
            yield f"eval/knn/{name}", value

    return run
