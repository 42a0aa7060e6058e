"""The linear probe of M3I Table 9 on frozen features: batch norm without scale and offset, one
linear map, LARS, 90 epochs of batches of 16,384, cosine after 10 epochs of warm-up (as MAE's code
does it).

It uses the features of clean views, computed once: the protocol without its augmentation, which
takes seconds. With augmentation, run configs/transfer/probe.py. The L-BFGS classifier of
`logistic_regression` is the optimum of a convex problem; published numbers are those of this
probe."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from m3i_jax import schema
from m3i_jax.evaluation import registry
from m3i_jax.evaluation.category_head import head_accuracy, top_k_hits
from m3i_jax.evaluation.feature_extraction import EvalContext, Metric
from m3i_jax.objective import losses
from m3i_jax.training import optimizer, update_rules

BATCH = 16_384  # the learning rate is that of a batch of this size
EPS, KEEP = 1e-6, 0.9  # batch norm: added to the variance; decay of the running statistics
INIT = 0.01  # standard deviation of the initial weights
FEW_STEPS = 200  # below, LARS with its warm-up has hardly moved the weights


class LinearProbe(NamedTuple):
    """State of a probe: weights {"kernel": [D, C], "bias": [C]}, state of LARS, and the running
    mean and variance [D] of the batch norm, from 0 while it is trained."""

    weights: Any
    opt: Any
    mean: jax.Array
    variance: jax.Array


def probe_logits(probe: LinearProbe, x_NxD: jax.Array) -> jax.Array:
    """Returns logits [N, C] of features [N, D], by the running statistics."""
    unit_NxD = (x_NxD - probe.mean) * jax.lax.rsqrt(probe.variance + EPS)
    return (
        jnp.matmul(unit_NxD, probe.weights["kernel"], precision=jax.lax.Precision.HIGHEST)
        + probe.weights["bias"]
    )


def probe_step(
    tx: optax.GradientTransformation, probe: LinearProbe, x_BxD: jax.Array, label_B: jax.Array
) -> LinearProbe:
    """Takes one step of LARS on one batch."""
    mean_D, variance_D = x_BxD.mean(0), x_BxD.var(0)
    unit_BxD = (x_BxD - mean_D) * jax.lax.rsqrt(variance_D + EPS)

    def loss(weights: Any) -> jax.Array:
        logits_BxC = (
            jnp.matmul(unit_BxD, weights["kernel"], precision=jax.lax.Precision.HIGHEST)
            + weights["bias"]
        )
        total, count = losses.category(logits_BxC, label_B, smoothing=0.0)
        return total / count

    updates, opt = tx.update(jax.grad(loss)(probe.weights), probe.opt, probe.weights)
    rows = x_BxD.shape[0]
    # the running statistics take the unbiased variance, as in torch
    unbiased_D = variance_D * (rows / max(rows - 1, 1))
    average = lambda old, new: KEEP * old + (1 - KEEP) * new
    return LinearProbe(
        optax.apply_updates(probe.weights, updates),
        opt,
        average(probe.mean, mean_D),
        average(probe.variance, unbiased_D),
    )


def count_steps(rows: int, *, epochs: int, batch: int) -> int:
    """Returns the number of steps of a training on so many rows.

    >>> count_steps(300, epochs=90, batch=16_384), count_steps(300, epochs=90, batch=128)
    (90, 180)
    """
    return epochs * (rows // min(batch, rows))


def fit_linear_probe(
    x_NxD: np.ndarray,
    label_N: np.ndarray,
    classes: int,
    *,
    lr: float = 3.2,
    epochs: int = 90,
    warmup: int = 10,
    batch: int = BATCH,
    seed: int = 0,
    poll: Callable[[], None] = lambda: None,
) -> LinearProbe:
    """Train a probe. The last partial batch of an epoch is dropped; fewer rows than a batch are one
    batch. The running statistics are weighted means of those of the batches, without a share of
    their start: the bias is corrected as Adam does, which changes nothing after many steps.

    Args:
      x_NxD: features.
      label_N: int in 0..classes - 1.
      classes: C.
      lr: peak learning rate of a batch of 16,384, scaled linearly with the batch.
      epochs, warmup: length of the training and of its linear warm-up, in epochs.
      batch: rows a step.
      seed: of the initial weights and of the order.
      poll: called before every epoch; may raise.
    """
    rows, size = len(x_NxD), min(batch, len(x_NxD))
    steps, total = rows // size, count_steps(rows, epochs=epochs, batch=batch)
    settings = schema.Optim(lr=lr * size / BATCH, min_lr=0.0)
    tx = optax.chain(
        *update_rules.lars(
            optimizer.lr_schedule(settings, steps=total, warmup=min(warmup, epochs) * steps)
        )
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(
        probe: LinearProbe, x_NxD: jax.Array, label_N: jax.Array, order_SxB: jax.Array
    ) -> LinearProbe:
        return jax.lax.scan(
            lambda p, rows_B: (probe_step(tx, p, x_NxD[rows_B], label_N[rows_B]), None),
            probe,
            order_SxB,
        )[0]

    rng, width = np.random.default_rng(seed), x_NxD.shape[1]
    weights = {
        "kernel": jnp.asarray(INIT * rng.normal(size=(width, classes)), jnp.float32),
        "bias": jnp.zeros(classes),
    }
    probe = LinearProbe(weights, tx.init(weights), jnp.zeros(width), jnp.zeros(width))
    x, label = jax.device_put((x_NxD.astype(np.float32), label_N.astype(np.int32)))
    for _ in range(epochs):
        poll()
        probe = epoch(probe, x, label, rng.permutation(rows)[: steps * size].reshape(steps, size))
    seen = 1 - KEEP**total  # the sum of the weights of the batches
    return probe._replace(mean=probe.mean / seen, variance=probe.variance / seen)


def linear_probe_accuracy(
    queries: tuple[np.ndarray, np.ndarray],
    index: tuple[np.ndarray, np.ndarray],
    *,
    poll: Callable[[], None] = lambda: None,
    **options: Any,
) -> Iterator[tuple[str, float]]:
    """Yields ("top1", share) and, with more than five classes, ("top5", share) of queries
    (features, labels), by a probe trained on an index (features, labels). `options` go to
    `fit_linear_probe`.

    Rows without a label (-1) are left out on both sides; nothing is yielded if no query or fewer
    than two rows of the index are left."""
    (q, q_label), (x, x_label) = (
        (f[label >= 0], label[label >= 0]) for f, label in (queries, index)
    )
    if not len(q) or len(x) < 2:
        return
    classes = int(max(q_label.max(), x_label.max())) + 1
    probe = fit_linear_probe(x, x_label, classes, poll=poll, **options)
    yield from head_accuracy(
        top_k_hits(np.asarray(jax.jit(probe_logits)(probe, jnp.asarray(q))), q_label), classes
    )


def measure(config: schema.Config, log: Callable[[str], None]) -> Metric:
    """eval/probe/..., from the index and the queries. The first evaluation logs the number of
    steps."""

    @functools.cache
    def log_steps(rows: int) -> None:
        settings = config.evaluate
        steps = count_steps(rows, epochs=settings.probe_epochs, batch=settings.probe_batch)
        line = f"the linear probe takes {steps:,} steps on {rows:,} images"
        if steps < FEW_STEPS:
            line = (
                f"warning: {line}, fewer than {FEW_STEPS}: eval/probe needs large sets; for small"
                " ones use eval/linear (config.evaluate.linear=true)"
            )
        log(line)

    def run(context: EvalContext) -> Iterator[tuple[str, float]]:
        queries, index, settings = context("queries"), context("index"), config.evaluate
        if labelled := int((index.labels >= 0).sum()):
            log_steps(labelled)
        both = (queries.raw, queries.labels), (index.raw, index.labels)
        for name, value in linear_probe_accuracy(
            *both,
            lr=settings.probe_lr,
            epochs=settings.probe_epochs,
            warmup=settings.probe_warmup,
            batch=settings.probe_batch,
            seed=config.seed,
            poll=context.poll,
        ):
            yield f"eval/probe/{name}", value

    return run


registry.register_evaluator(
    registry.Evaluator(
        name="probe",
        setting="probe",
        reads=("probe_lr", "probe_epochs", "probe_warmup", "probe_batch"),
        needs=(registry.LABELS,),
        build=lambda inputs: measure(inputs.config, inputs.log),
    )
)
