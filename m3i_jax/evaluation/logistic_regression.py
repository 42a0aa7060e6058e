"""Linear classification of frozen features: multinomial logistic regression by full-batch L-BFGS on
standardised features.

The problem is convex: no learning rate, schedule or seed has to be chosen. The weight decay is
chosen on a held-out fifth of the index; the queries are classified once, at the end."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from m3i_jax.evaluation import registry
from m3i_jax.evaluation.category_head import head_accuracy, top_k_hits
from m3i_jax.evaluation.feature_extraction import EvalContext, Metric

# weight decays from strong to weak: each fit starts from the weights of the one before
L2 = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
MAX_STEPS, TOLERANCE = 200, 1e-4
Weights = dict[str, jax.Array]


@functools.partial(jax.jit, static_argnames="steps")
def fit_logistic(
    x_NxD: jax.Array,
    label_N: jax.Array,
    weight_N: jax.Array,
    start: Weights,
    l2: jax.Array | float,
    *,
    steps: int = MAX_STEPS,
) -> Weights:
    """Minimises `sum_n weight_n CE_n / sum_n weight_n + l2 / 2 |kernel|^2` over {"kernel": [D, C],
    "bias": [C]}; the bias is free.

    Compiled once for all values of `l2` and all choices of rows.

    Args:
      x_NxD: standardised features.
      label_N: int in 0..C - 1.
      weight_N: weights of the rows; 0 leaves a row out.
      start: initial weights; their shapes give the number of classes.
      l2: weight decay of the kernel.
      steps: iterations at most; it stops once the norm of the gradient is below TOLERANCE.

    >>> x = jnp.array([[-1.0], [1.0]])
    >>> weights = fit_logistic(x, jnp.array([0, 1]), jnp.ones(2), zero_weights(1, 2), 1e-3)
    >>> (x @ weights["kernel"] + weights["bias"]).argmax(-1).tolist()
    [0, 1]
    """

    def loss(w: Weights) -> jax.Array:
        logits = jnp.matmul(x_NxD, w["kernel"], precision=jax.lax.Precision.HIGHEST) + w["bias"]
        nll_N = optax.softmax_cross_entropy_with_integer_labels(logits, label_N)
        return (weight_N * nll_N).sum() / weight_N.sum() + l2 / 2 * jnp.square(w["kernel"]).sum()

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def iterate(carry: Any) -> Any:
        w, state, _, n = carry
        value, grad = value_and_grad(w, state=state)
        updates, state = solver.update(grad, state, w, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(w, updates), state, optax.tree.norm(grad), n + 1

    def unfinished(carry: Any) -> jax.Array:
        return (carry[2] > TOLERANCE) & (carry[3] < steps)

    return jax.lax.while_loop(
        unfinished, iterate, (start, solver.init(start), jnp.asarray(jnp.inf), 0)
    )[0]


def zero_weights(width: int, classes: int) -> Weights:
    """Returns initial weights of a fit."""
    return {"kernel": jnp.zeros((width, classes)), "bias": jnp.zeros(classes)}


def standardize_features(x_NxD: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Returns all arrays shifted and scaled so that the first has mean 0 and deviation 1 in every
    dimension; a constant dimension becomes 0.

    >>> first, second = np.array([[1., 5.], [3., 5.]]), np.array([[5., 7.]])
    >>> [x.tolist() for x in standardize_features(first, second)]
    [[[-1.0, 0.0], [1.0, 0.0]], [[3.0, 0.0]]]
    """
    mean_D, std_D = x_NxD.mean(0, dtype=np.float64), x_NxD.std(0, dtype=np.float64)
    # a deviation below the rounding of float32 is noise, which must not be scaled up
    varies = std_D > 1e-6 * np.sqrt(np.square(x_NxD, dtype=np.float64).mean())
    scale_D = np.where(varies, 1 / np.where(varies, std_D, 1), 0)
    return [((x - mean_D) * scale_D).astype(np.float32) for x in (x_NxD, *others)]


def logistic_accuracy(
    queries: tuple[np.ndarray, np.ndarray],
    index: tuple[np.ndarray, np.ndarray],
    poll: Callable[[], None] = lambda: None,
) -> Iterator[tuple[str, float]]:
    """Yields ("top1", share), with more than five classes ("top5", share), and ("log10_l2",
    exponent of the chosen weight decay) of queries (features [Q, D], labels [Q]) by a classifier
    fitted to an index (features, labels).

    The weight decay is the one of `L2` with the highest accuracy on a fixed random fifth of the
    index; among equals, the strongest. The classifier is then fitted to the whole index. Rows
    without a label (-1) are left out on both sides; nothing is yielded if no query or fewer than
    five rows of the index are left. `poll` is called before every fit and may raise."""
    (q, q_label), (x, x_label) = (
        (f[label >= 0], label[label >= 0]) for f, label in (queries, index)
    )
    if not len(q) or len(x) < 5:
        return
    classes = int(max(q_label.max(), x_label.max())) + 1
    x, q = standardize_features(x, q)
    # not every fifth row: a source may list its classes in turn
    validation = np.isin(
        np.arange(len(x)), np.random.default_rng(0).permutation(len(x))[: len(x) // 5]
    )
    features, labels, training = jax.device_put(
        (x, x_label, np.where(validation, 0, 1).astype(np.float32))
    )
    trials, weights = [], zero_weights(x.shape[1], classes)
    for l2 in L2:
        poll()
        weights = fit_logistic(features, labels, training, weights, l2)
        right = _ranks(weights, x[validation], x_label[validation]) < 1
        trials.append((float(right.mean()), l2, weights))
    _, l2, weights = max(trials, key=lambda trial: trial[:2])
    poll()
    weights = fit_logistic(features, labels, jnp.ones(len(x)), weights, l2)
    yield from head_accuracy(_ranks(weights, q, q_label), classes)
    yield "log10_l2", round(float(np.log10(l2)), 3)


def _ranks(weights: Weights, x_NxD: np.ndarray, label_N: np.ndarray) -> np.ndarray:
    """Ranks [N] of the right classes, as of `top_k_hits`."""
    kernel, bias = np.asarray(weights["kernel"]), np.asarray(weights["bias"])
    return top_k_hits(x_NxD @ kernel + bias, label_N)


def measure() -> Metric:
    """eval/linear/..., from the index and the queries."""

    def run(context: EvalContext) -> Iterator[tuple[str, float]]:
        queries, index = context("queries"), context("index")
        for name, value in logistic_accuracy(
            (queries.vectors, queries.labels), (index.vectors, index.labels), context.poll
        ):
            yield f"eval/linear/{name}", value

    return run


registry.register_evaluator(
    registry.Evaluator(
        name="linear",
        setting="linear",
        needs=(registry.LABELS,),
        build=lambda inputs: measure(),
    )
)
