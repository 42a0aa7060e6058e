"""The attentive probe: a learned query attends to the frozen tokens of an image, and a linear map
classifies the result. It recovers what a mean of the tokens hides: encoders trained on pixel or
dense targets keep most of their information in single tokens (CAE).

The tokens of at most `evaluate.attentive_limit` training images are computed once and kept in the
memory of every host, in the compute precision. For more images and for augmentation, run
configs/transfer/probe.py:kind=attentive."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from m3i_jax import parallel, schema
from m3i_jax.evaluation import registry
from m3i_jax.evaluation.category_head import head_accuracy, top_k_hits
from m3i_jax.evaluation.feature_extraction import (
    EvalContext,
    Metric,
    check_finite,
    drop_cls,
    extract_set,
    gather_from_hosts,
)
from m3i_jax.models import pooling
from m3i_jax.objective import losses
from m3i_jax.training import optimizer, update_rules

Batches = Callable[[], Any]


class AttentiveProbe:
    """The head of an attentive probe and the functions that train and apply it.

    Args:
      config: settings of the run.
      mesh: batches are split over its data axes.
    """

    def __init__(self, config: schema.Config, mesh: jax.sharding.Mesh) -> None:
        pool = dataclasses.replace(
            config.model.pool, kind="attention", query="learned", norm="layer", projection=True
        )
        self._config, self._mesh = config, mesh
        self._model = dataclasses.replace(config.model, pool=pool)
        self._cls_tokens = int(config.model.encoder.cls_token)

    def start(self, classes: int) -> Any:
        """Returns the head before training: {"pool", "kernel", "bias"}."""
        pool = jax.jit(lambda: pooling.init(self._model, jax.random.key(self._config.seed)))()
        return {
            "pool": pool,
            "kernel": jnp.zeros((self._model.pool.width, classes)),
            "bias": jnp.zeros(classes),
        }

    def logits(self, head: Any, tokens_BxTxD: jax.Array) -> jax.Array:
        """Returns [B, C] float32 of tokens, cls first."""
        pooled = pooling.apply(
            self._model, head["pool"], tokens_BxTxD[:, self._cls_tokens :]
        ).astype(jnp.float32)
        return (
            jnp.matmul(pooled, head["kernel"], precision=jax.lax.Precision.HIGHEST) + head["bias"]
        )

    def fit(
        self,
        tokens_NxTxD: np.ndarray,
        label_N: np.ndarray,
        classes: int,
        batch: int,
        poll: Callable[[], None],
    ) -> Any:
        """Returns the head after `evaluate.attentive_epochs` epochs of AdamW. `batch` is a multiple
        of the data shards. An epoch of fewer rows than a batch repeats some of them in it."""
        settings, rows = self._config.evaluate, len(tokens_NxTxD)
        steps = max(rows // batch, 1)
        rate = optimizer.lr_schedule(
            schema.Optim(lr=settings.attentive_lr),
            steps=settings.attentive_epochs * steps,
            warmup=steps,
        )
        tx = optax.chain(
            *update_rules.adamw(
                rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.05, mask=optimizer.decay_mask
            )
        )

        @parallel.Program
        def step(head: Any, opt: Any, tokens: jax.Array, label_B: jax.Array) -> tuple[Any, Any]:
            def loss(head: Any) -> jax.Array:
                total, count = losses.category(self.logits(head, tokens), label_B, smoothing=0.0)
                return total / count

            updates, opt = tx.update(jax.grad(loss)(head), opt, head)
            return optax.apply_updates(head, updates), opt

        head = jax.device_put(self.start(classes), parallel.replicated(self._mesh))
        rng, opt = np.random.default_rng(self._config.seed), tx.init(head)
        for _ in range(settings.attentive_epochs):
            for rows_B in np.resize(rng.permutation(rows), (steps, batch)):
                poll()
                head, opt = step(
                    head,
                    opt,
                    parallel.split_rows(self._mesh, tokens_NxTxD[rows_B]),
                    parallel.split_rows(self._mesh, label_N[rows_B]),
                )
        return head


def measure(
    config: schema.Config, mesh: jax.sharding.Mesh, index: Batches, queries: Batches, batch: int
) -> Metric:
    """eval/attentive/top1, ...

    Args:
      config: settings of the run.
      mesh: devices.
      index, queries: give a fresh iterator over batches of clean views.
      batch: images a step, a multiple of the data shards.
    """
    probe, replicated = AttentiveProbe(config, mesh), parallel.replicated(mesh)

    def tokens_and_means(params: Any, views: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens_BxTxD = drop_cls(config, params, views)
        return tokens_BxTxD, tokens_BxTxD.astype(jnp.float32).mean((1, 2))

    encode = parallel.Program(tokens_and_means, name="tokens", out_shardings=replicated)
    classify = parallel.Program(
        lambda both, views: probe.logits(both[1], drop_cls(config, both[0], views)),
        name="attentive",
        out_shardings=replicated,
    )

    def run(context: EvalContext) -> Iterator[tuple[str, float]]:
        tokens, labels, batches = [], [], index()
        for (tokens_BxTxD, mean_B), rows in extract_set(
            mesh, encode, context.params, batches, context.poll
        ):
            check_finite(mean_B, rows["index"])  # as finite as the tokens, of which there are many
            labelled = rows["label"] >= 0
            tokens.append(tokens_BxTxD[labelled])
            labels.append(rows["label"][labelled])
        context.count_skipped("index", gather_from_hosts(getattr(batches, "skipped", {})))
        if not tokens or not sum(map(len, tokens)):
            return
        label_N = np.concatenate(labels)
        classes = max(config.data.classes, int(label_N.max()) + 1)
        head = probe.fit(np.concatenate(tokens), label_N, classes, batch, context.poll)
        ranks, batches = [], queries()
        for logits, rows in extract_set(
            mesh,
            lambda params, views: classify((params, head), views),
            context.params,
            batches,
            context.poll,
        ):
            label_Q = rows["label"]
            known = (label_Q >= 0) & (label_Q < classes)
            # a class that no image of the index has is never right, as for the other classifiers
            rank_Q = np.full(len(label_Q), classes)
            rank_Q[known] = top_k_hits(logits[known], label_Q[known])
            ranks.append(rank_Q[label_Q >= 0])
        context.count_skipped("queries", gather_from_hosts(getattr(batches, "skipped", {})))
        if ranks and sum(map(len, ranks)):
            for name, value in head_accuracy(np.concatenate(ranks), classes):
                yield f"eval/attentive/{name}", value

    return run


registry.register_evaluator(
    registry.Evaluator(
        name="attentive",
        setting="attentive",
        reads=("attentive_lr", "attentive_epochs", "attentive_limit"),
        needs=(registry.LABELS,),
        build=lambda inputs: measure(
            inputs.config,
            inputs.mesh,
            functools.partial(inputs.index_batches, inputs.config.evaluate.attentive_limit),
            inputs.query_batches,
            inputs.batch_size,
        ),
    )
)
