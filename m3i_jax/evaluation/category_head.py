"""Classification with the head that pre-training made, nothing trained on top: the encoder's pooled
feature, the category representations, the largest logit (M3I Table 5, "without fine-tuning"; of a
fine-tuned run, its accuracy)."""

from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np

from m3i_jax import parallel, schema
from m3i_jax.evaluation.feature_extraction import EvalContext, Metric, Predictions
from m3i_jax.models import m3i


def top_k_hits(logits_QxC: np.ndarray, label_Q: np.ndarray) -> np.ndarray:
    """How many wrong classes [Q] have at least the logit of the right one: 0 is a hit. A tie counts
    against, so that equal logits everywhere score 0, and a logit that is no number is no hit.

    >>> top_k_hits(np.array([[2.0, 1.0, 3.0], [1.0, 1.0, 0.0]]), np.array([0, 0])).tolist()
    [1, 1]
    """
    right_Qx1 = np.take_along_axis(logits_QxC, label_Q[:, None].astype(np.int64), 1)
    return (~(logits_QxC < right_Qx1)).sum(1) - 1


def head_accuracy(rank_Q: np.ndarray, classes: int) -> Iterator[tuple[str, float]]:
    """("top1", share) and, of more than five classes, ("top5", share) of ranks as of
    `top_k_hits`."""
    for top in (1, 5):
        if top == 1 or classes > 5:
            yield f"top{top}", float((rank_Q < top).mean())


def head_predictions(
    config: schema.Config, *, pictures: str = "queries", statistics: str = ""
) -> Callable[[EvalContext], tuple[Predictions, np.ndarray]]:
    """What the head says of the images of a set whose category the model knows, and the ranks of
    the right answers.

    Args: config: the run's settings. images: name of the set; its features must be those of the
      pooling that the category term trains. statistics: of a pooling with batch norm, the set whose
      mean and variance stand for the batch's; "" without one.
    """
    logits = parallel.Program(
        lambda params, x: m3i.category_logits(config, params, x), name="category_logits"
    )

    def run(seen: EvalContext) -> tuple[Predictions, np.ndarray]:
        found = seen(pictures)
        known = (found.labels >= 0) & (found.labels < config.data.classes)
        x, label = found.raw[known], found.labels[known]
        guesses, ranks = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        if statistics:
            index = seen(statistics).raw
            x = (x - index.mean(0, dtype=np.float64)) / np.sqrt(
                index.var(0, dtype=np.float64) + 1e-6
            )
        for at in range(0, len(x), 4096):
            seen.poll()
            made = np.asarray(logits(seen.params, jnp.asarray(x[at : at + 4096], jnp.float32)))
            guesses.append(made.argmax(1))
            ranks.append(top_k_hits(made, label[at : at + 4096]))
        return Predictions(label, np.concatenate(guesses)), np.concatenate(ranks)

    return lambda seen: seen.once("direct", lambda: run(seen))


def measure(
    config: schema.Config, ask: Callable[[EvalContext], tuple[Predictions, np.ndarray]]
) -> Metric:
    """eval/direct/top1, ... of what a `head_predictions` says."""

    def run(seen: EvalContext) -> Iterator[tuple[str, float]]:
        _, rank_Q = ask(seen)
        if len(rank_Q):
            for name, value in head_accuracy(rank_Q, config.data.classes):
                yield f"eval/direct/{name}", value

    return run
