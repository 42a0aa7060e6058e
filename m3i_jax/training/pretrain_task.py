"""Pre-training as a task: M3I's objective, and every other tuple of terms."""

import collections
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from m3i_jax import schema
from m3i_jax.data import pipeline, region_texts
from m3i_jax.models import m3i
from m3i_jax.objective import masks
from m3i_jax.objective.caption_posterior import CAPTIONS
from m3i_jax.training import (
    assignments,
    optimizer,
    plan,
    predictions,
    pretrain_gradients,
    targets,
    views,
)
from m3i_jax.training.plan import Plan
from m3i_jax.training.task import Batch, State, StepGradients, Task, register_task


@dataclasses.dataclass(frozen=True)
class Pretrain(Task):
    """The terms of `config.objective` on view pairs that are mixed or masked."""

    traits = schema.TASKS["pretrain"]

    @functools.cached_property
    def plan(self) -> plan.Plan:
        """The plan of the objective, built once."""
        return plan.build_plan(self.config)

    def init(self, rng: jax.Array) -> Any:
        return m3i.init(
            self.config,
            terms=self.plan.terms,
            classes=self.config.data.classes if self.plan.where("category") else 0,
            vocabulary=self.vocabulary if self.plan.where("text", *CAPTIONS) else 0,
            rng=rng,
        )

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        config = self.config
        b, s, n = config.train.batch_size, config.data.image_size, config.tokens
        groups = config.small_views if max(self.plan.views) > 1 else ()
        small = len(groups)
        shapes = {
            "views": ((b, 2, s, s, 3), "uint8"),
            "box": ((b, 2 + small, 4), "float32"),
            "flip": ((b, 2 + small), "bool"),
            "mask": ((b, n), "bool"),
            "label": ((b,), "int32"),
            "position": ((b, 2), "uint32"),
        }
        for size, count in collections.Counter(group.size for group in groups).items():
            shapes[f"views_{size}"] = ((b, count, size, size, 3), "uint8")
        if config.data.mask == "multi_block":
            cells = masks.block_cells(config.grid, config.data.mask_block_share)
            shapes["blocks"] = ((b, config.data.mask_blocks, cells), "int32")
        if config.data.captions == "yes":
            length = config.data.caption_length
            shapes |= {"tokens": ((b, length), "int32"), "length": ((b,), "int32")}
        if config.data.regions:
            length, tasks = config.data.caption_length, len(region_texts.TASKS)
            shapes["regions"] = ((b, tasks, length), "int32")
            shapes |= dict.fromkeys(("region_length", "region_given"), ((b, tasks), "int32"))
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}

    def gradients(self, params: Any, opt: Any, batch: Batch) -> StepGradients:
        weight = pretrain_gradients.balance_lambda(self.config, opt)
        teachers = pretrain_gradients.target_encoders(opt)
        grads, metrics, norms = pretrain_gradients.objective_gradients(
            self.plan,
            params,
            teachers,
            batch,
            weight,
            opt.get("prototypes"),
            opt.get("snapshot"),
        )
        means: Any = metrics.pop(assignments.MEAN_LOGITS, {})
        zero = jnp.zeros(())
        loss = metrics.get("loss/ssp", zero) + weight * metrics.get("loss/sp", zero)
        metrics |= {
            "balance/lambda": weight,
            "balance/ssp_norm": norms[0],
            "balance/sp_norm": norms[1],
        }
        extras = {"feature_grad_norms": norms, "mean_logits": means}
        if "snapshot" in opt:
            extras["average"] = opt["target"].params
        return StepGradients(grads, loss, metrics, extras)

    def optimizer(self, *, steps: int, warmup: int) -> optax.GradientTransformationExtraArgs:
        return optimizer.build_optimizer(self.config, self.plan.terms, steps=steps, warmup=warmup)

    def batches(self, source: Any, tokenizer: Any, **options: Any) -> pipeline.Batches:
        options["views"] = options.get("views") or self.plan.views
        return pipeline.iterate_batches(self.config, source, tokenizer, **options)

    def pullbacks(self, state: State, batch: Batch) -> tuple[Any, list[Any]]:
        return pretrain_gradients.loss_pullbacks(self.plan, state, batch)

    def waiting(self, state: State, batch: Batch) -> Any:
        return pretrain_gradients.views_and_targets(self.plan, state, batch)

    def panel_outputs(self, state: State, batch: Batch) -> dict[str, jax.Array]:
        return panel_outputs(self.plan, state, batch)

    def scheduled(self, step: int, *, steps: int) -> dict[str, float]:
        return {"ema": optimizer.ema_momentum(self.config.optim, steps=steps)(step)}

    def after_init(self, state: State, load: Any) -> State:
        objective = self.config.objective
        opt = state.opt.copy()  # keeps its type: to JAX another mapping type is another tree
        if (frozen := opt.get("frozen")) is not None:
            teacher = load(objective.target_checkpoint, "frozen", "encoder")
            opt["frozen"] = frozen._replace(params={**frozen.params, "encoder": teacher})
        if (snapshot := opt.get("snapshot")) is not None and objective.target_checkpoint:
            first = load(objective.target_checkpoint, "snapshot", "encoder")
            opt["snapshot"] = snapshot._replace(params={"encoder": first})
        if (held := opt.get("teachers")) is not None:
            paths = zip(held.params, objective.teachers, strict=True)
            loaded = {name: load(path, "teachers", name) for name, path in paths}
            opt["teachers"] = held._replace(params=loaded)
        return State(step=state.step, params=state.params, opt=opt)

    @classmethod
    def objectives(cls, config: schema.Config) -> list[tuple[str, ...]]:
        return [config.objective.forms]

    @classmethod
    def reject_unused_settings(cls, config: schema.Config) -> None:
        plan.reject_unused_settings(config, [config.objective.forms])


register_task("pretrain", Pretrain)


def panel_outputs(plan: Plan, state: State, batch: Batch) -> dict[str, jax.Array]:
    """Patches and features [R, N, ...] of a batch for a panel.

    input, input_view       what the first pass reads, and the own view that it is made from
    <term>/view             the target view of each dense term
    <term>/picture          predicted pixels, with the mean and deviation of the true patch
    <term>/prediction, <term>/target    predicted features and those that they are compared with
    """
    config = plan.config
    patches, features = pretrain_gradients.views_and_targets(plan, state, batch)
    inputs = views.pass_inputs(config, plan.passes, batch)
    first = plan.passes[0]
    out = {
        "input": views.encoder_input(config, first, inputs[first], patches),
        "input_view": views.image_rows(config, first, "own", patches[first.view]),
    }
    indices = tuple(
        i
        for i in plan.dense
        if plan.terms[i].target.encoder != "online"
        and not targets.has_prototypes(plan.target_key(plan.terms[i]))
    )
    z = views.encode_passes(config, inputs, patches, state.params["encoder"])
    predicted = predictions.predict_images(plan, state.params, z, inputs, indices)
    for i, prediction in predicted.items():
        term = plan.terms[i]
        assert term.target.view is not None
        raw, view = (
            views.image_rows(config, term.reads, term.image, x)
            for x in (features[plan.target_key(term)], patches[term.target.view])
        )
        raw = raw.astype(jnp.float32)
        target = targets.normalize_target(term, raw)
        cells = predictions.query_cells(term, inputs[term.reads])
        if cells is not None:  # the others show their target
            rows = jnp.arange(cells.shape[0])[:, None]
            prediction = target.at[rows, cells].set(prediction.astype(target.dtype))
        out[f"{term.name}/view"] = view
        if term.target.of == "pixels":
            std, mean = raw.std(-1, ddof=1, keepdims=True), raw.mean(-1, keepdims=True)
            out[f"{term.name}/picture"] = prediction * std + mean
        else:
            out[f"{term.name}/prediction"] = prediction.astype(jnp.float32)
            out[f"{term.name}/target"] = target
    return out
