"""Classification by the category head of the run, with nothing trained on top: the largest logit of
the pooled feature (M3I Table 5, "without fine-tuning"; the accuracy of a fine-tuned run)."""

from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np

from m3i_jax import parallel, schema
from m3i_jax.evaluation import registry
from m3i_jax.evaluation.feature_extraction import EvalContext, Metric, Predictions
from m3i_jax.models import m3i

_ROWS = 4096  # features a call of the head


def top_k_hits(logits_QxC: np.ndarray, label_Q: np.ndarray) -> np.ndarray:
    """Returns the number of wrong classes [Q] whose logit is at least that of the right one: 0 is a
    hit. A tie counts as wrong, so that equal logits score 0; a NaN logit is never a hit.

    >>> top_k_hits(np.array([[2.0, 1.0, 3.0], [1.0, 1.0, 0.0]]), np.array([0, 0])).tolist()
    [1, 1]
    """
    right_Qx1 = np.take_along_axis(logits_QxC, label_Q[:, None].astype(np.int64), 1)
    return (~(logits_QxC < right_Qx1)).sum(1) - 1


def head_accuracy(rank_Q: np.ndarray, classes: int) -> Iterator[tuple[str, float]]:
    """Yields ("top1", share) and, with more than five classes, ("top5", share) of the ranks that
    `top_k_hits` gives."""
    for top in (1, 5):
        if top == 1 or classes > 5:
            yield f"top{top}", float((rank_Q < top).mean())


def head_predictions(
    config: schema.Config, *, image_set: str = "queries", statistics_set: str = ""
) -> Callable[[EvalContext], tuple[Predictions, np.ndarray]]:
    """Returns predictions of the head for the images of a set whose category it has, and the ranks
    of the right classes; computed once an evaluation.

    Args:
      config: settings of the run.
      image_set: name of the set; its features are those of the pooling that the category term
        trains.
      statistics_set: for a pooling with batch norm, the set whose mean and variance replace those
        of the batch; else "".
    """
    logits = parallel.Program(m3i.category_logits, name="category_logits")

    def run(context: EvalContext) -> tuple[Predictions, np.ndarray]:
        features = context(image_set)
        labelled = (features.labels >= 0) & (features.labels < config.data.classes)
        x, label = features.raw[labelled], features.labels[labelled]
        guesses, ranks = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        if statistics_set:
            index = context(statistics_set).raw
            x = (x - index.mean(0, dtype=np.float64)) / np.sqrt(
                index.var(0, dtype=np.float64) + 1e-6
            )
        for start in range(0, len(x), _ROWS):
            context.poll()
            rows = slice(start, start + _ROWS)
            logits_BxC = np.asarray(logits(context.params, jnp.asarray(x[rows], jnp.float32)))
            guesses.append(logits_BxC.argmax(1))
            ranks.append(top_k_hits(logits_BxC, label[rows]))
        return Predictions(label, np.concatenate(guesses)), np.concatenate(ranks)

    return lambda context: context.once("direct", lambda: run(context))


def shared_predictions(
    inputs: registry.EvalInputs,
) -> Callable[[EvalContext], tuple[Predictions, np.ndarray]]:
    """`head_predictions` of a run, compiled once for all evaluators that use it."""
    return inputs.once(
        "category head",
        lambda: head_predictions(
            inputs.config, image_set=inputs.pooled_set, statistics_set=inputs.statistics_set
        ),
    )


def measure(
    config: schema.Config, predict: Callable[[EvalContext], tuple[Predictions, np.ndarray]]
) -> Metric:
    """eval/direct/top1, ... of predictions as `head_predictions` gives them."""

    def run(context: EvalContext) -> Iterator[tuple[str, float]]:
        _, rank_Q = predict(context)
        if len(rank_Q):
            for name, value in head_accuracy(rank_Q, config.data.classes):
                yield f"eval/direct/{name}", value

    return run


registry.register_evaluator(
    registry.Evaluator(
        name="direct",
        setting="direct",
        needs=(registry.CATEGORY_HEAD,),
        build=lambda inputs: measure(inputs.config, shared_predictions(inputs)),
    )
)
