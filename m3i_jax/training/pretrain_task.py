"""Pre-training as a task: M3I's objective, and every other tuple of terms. The gradients of one
batch take one encoder backward pass:

    1. what every pass reads of the batch       views.pass_inputs
    2. targets, without gradient                z_y = f_EMA(clean views)
    3. the online encoder once, with pullback   z, pullback = vjp(f_theta, input)
    4. each group: its loss and gradients       L_ssp, dz_ssp      L_sp, dz_sp
    5. one encoder backward                     pullback(dz_ssp + lambda * dz_sp)

k microbatches of B/k give the result of one batch of B: every loss is divided by the count of the
whole batch, the second moment is taken over all targets before, the norms are roots of summed
squares, assignments to prototypes are balanced over the whole batch before, and the text softmax
spans the batch through embeddings that are computed once more."""

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
from m3i_jax.objective import balance, masks
from m3i_jax.objective.caption_posterior import CAPTIONS
from m3i_jax.objective.derived_terms import teacher_name
from m3i_jax.objective.ema import SnapshotState
from m3i_jax.objective.prototype_targets import PrototypeState
from m3i_jax.training import (
    entropy_losses,
    frozen_target,
    optimizer,
    plan,
    predictions,
    targets,
    teachers,
    term_losses,
    unused_settings,
    views,
)
from m3i_jax.training.plan import Plan
from m3i_jax.training.predictions import Arrays
from m3i_jax.training.targets import TargetFeatures
from m3i_jax.training.task import (
    Batch,
    State,
    StepGradients,
    Task,
    merge_microbatches,
    register_task,
    split_microbatches,
)
from m3i_jax.training.term_losses import CachedTextGradients, TargetBundle, TermLosses
from m3i_jax.training.views import Inputs, Patches

Metrics = dict[str, jax.Array]
GROUPS = ("ssp", "sp")


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
        weight = balance_lambda(self.config, opt)
        encoders = target_encoders(opt)
        grads, metrics, norms = objective_gradients(
            self.plan,
            params,
            encoders,
            batch,
            weight,
            opt.get("prototypes"),
            opt.get("snapshot"),
        )
        means: Any = metrics.pop(targets.MEAN_LOGITS, {})
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
        return loss_pullbacks(self.plan, state, batch)

    def waiting(self, state: State, batch: Batch) -> Any:
        return views_and_targets(self.plan, state, batch)

    def panel_outputs(self, state: State, batch: Batch) -> dict[str, jax.Array]:
        return panel_outputs(self.plan, state, batch)

    def scheduled(self, step: int, *, steps: int) -> dict[str, float]:
        return {"ema": optimizer.ema_momentum(self.config.optim, steps=steps)(step)}

    def after_init(self, state: State, shardings: State) -> State:
        path, layouts = self.config.objective.target_checkpoint, shardings.opt
        opt = state.opt.copy()  # keeps its type: to JAX another mapping type is another tree
        for link in ("frozen", "snapshot"):
            if (held := opt.get(link)) is not None and (path or link == "frozen"):
                layout = layouts[link].params["encoder"]
                own = state.params["encoder"]
                encoder = frozen_target.load_encoder(path, self.config, own, layout)
                opt[link] = held._replace(params={**held.params, "encoder": encoder})
        if (held := opt.get("teachers")) is not None:
            # by name: a compiled function returns a dict sorted, teacher10 before teacher2
            names = {teacher_name(k): run for k, run in enumerate(self.config.objective.teachers)}
            loaded = {
                name: teachers.load_params(run, layouts["teachers"].params[name])
                for name, run in names.items()
            }
            opt["teachers"] = held._replace(params=loaded)
        return State(step=state.step, params=state.params, opt=opt)

    @classmethod
    def objectives(cls, config: schema.Config) -> list[tuple[str, ...]]:
        return [config.objective.forms]

    @classmethod
    def reject_unused_settings(cls, config: schema.Config) -> None:
        unused_settings.reject_unused_settings(config, [config.objective.forms])


register_task("pretrain", Pretrain)


def panel_outputs(plan: Plan, state: State, batch: Batch) -> dict[str, jax.Array]:
    """Patches and features [R, N, ...] of a batch for a panel.

    input, input_view       what the first pass reads, and the own view that it is made from
    <term>/view             the target view of each dense term
    <term>/pixels           predicted pixels, with the mean and deviation of the true patch
    <term>/prediction, <term>/target    predicted features and those that they are compared with
    """
    config = plan.config
    patches, features = views_and_targets(plan, state, batch)
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
            out[f"{term.name}/pixels"] = prediction * std + mean
        else:
            out[f"{term.name}/prediction"] = prediction.astype(jnp.float32)
            out[f"{term.name}/target"] = target
    return out


def _cached_text_gradients(
    plan: Plan,
    params: Any,
    batch: Batch,
    inputs: Inputs,
    microbatches: tuple[Batch, Inputs, Patches],
) -> tuple[TermLosses, CachedTextGradients]:
    """Costs of the text terms over all rows of all microbatches, and their gradients at every
    embedding."""

    def embed(_: None, part: tuple[Batch, Inputs, Patches]) -> tuple[None, Any]:
        part_batch, part_inputs, patches = part
        with jax.named_scope("encoder"):
            z = views.encode_passes(plan.config, part_inputs, patches, params["encoder"])
        vectors = predictions.pool_images(plan, params, z, part_inputs)
        return None, predictions.contrastive_embeddings(plan, params, vectors, part_batch)

    _, (images, captions) = jax.lax.scan(embed, None, microbatches)
    count, pairs = microbatches[0]["mask"].shape[0], batch["mask"].shape[0] // 2

    def costs(u: Arrays, v: Arrays, s: dict[int, Any]) -> tuple[jax.Array, TermLosses]:
        out = {i: term_losses.text_losses(plan, {i: u[i]}, v[i], s, batch, inputs)[i] for i in u}
        return sum((cost.sum for cost in out.values()), jnp.zeros(())), out

    u, v = merge_microbatches((images, captions), count, pairs)
    (_, value), (du, dv, ds) = jax.value_and_grad(costs, (0, 1, 2), has_aux=True)(
        u, dict.fromkeys(u, v), {i: term_losses.text_scalars(plan.terms[i], params) for i in u}
    )
    du, dv = split_microbatches((du, dv), count, pairs)
    scalars = jax.tree.map(lambda x: jnp.broadcast_to(x / count, (count,)), ds)
    return value, CachedTextGradients(images=du, captions=dv, scalars=scalars)


def _cached_entropy_gradients(
    plan: Plan, params: Any, batch: Batch, microbatches: tuple[Batch, Inputs, Patches]
) -> tuple[TermLosses, Arrays]:
    """Costs of the entropy terms over all rows of all microbatches, and their gradients at the
    features of each."""

    def read(_: None, part: tuple[Batch, Inputs, Patches]) -> tuple[None, Arrays]:
        part_inputs, patches = part[1:]
        with jax.named_scope("encoder"):
            z = views.encode_passes(plan.config, part_inputs, patches, params["encoder"])
        return None, entropy_losses.entropy_features(plan, params, z, part_inputs)

    _, features = jax.lax.scan(read, None, microbatches)
    count, pairs = microbatches[0]["mask"].shape[0], batch["mask"].shape[0] // 2

    def costs(features: Arrays) -> tuple[jax.Array, TermLosses]:
        terms = plan.numbered_entropies()
        out = {i: entropy_losses.entropy_cost(plan, terms[i], features[i], batch) for i in terms}
        return sum((cost.sum for cost in out.values()), jnp.zeros(())), out

    merged = merge_microbatches(features, count, pairs)
    (_, value), gradients = jax.value_and_grad(costs, has_aux=True)(merged)
    return value, split_microbatches(gradients, count, pairs)


def _encode(plan: Plan, params: Any, inputs: Inputs, patches: Patches) -> tuple[Any, Any]:
    """(features of every pass, their pullback to the encoder's parameters)."""

    def encode(encoder: Any) -> Any:
        with jax.named_scope("encoder"):
            return views.encode_passes(plan.config, inputs, patches, encoder)

    return jax.vjp(encode, params["encoder"])


def _views_and_targets(
    plan: Plan, encoders: dict[str, Any], batch: Batch
) -> tuple[Patches, TargetFeatures]:
    with jax.named_scope("views"):
        patches = views.augmented_patches(plan.config, batch, plan.views, exact=plan.exact)
    with jax.named_scope("target_encoder"):
        return patches, targets.target_features(plan, encoders, patches, batch["mask"])


def objective_gradients(
    plan: Plan,
    params: Any,
    encoders: dict[str, Any],
    batch: Batch,
    weight: jax.Array,
    prototypes: PrototypeState | None = None,
    snapshot: SnapshotState | None = None,
) -> tuple[Any, Metrics, tuple[jax.Array, jax.Array]]:
    """Computes the gradients of L_ssp + weight * L_sp with one encoder backward.

    Args:
      plan: the terms and their settings.
      params: the parameter tree; `params["encoder"]` is f_theta, the others are heads.
      encoders: {name: tree} of the target encoders, as of `target_encoders`; "shared" is added
        here.
      batch: one global batch, leading axis B.
      weight: lambda, a scalar without gradient.
      prototypes: centres and temperature of assignments to prototypes, of the steps before; None:
        those of the start.
      snapshot: the state of the link that holds the EMA encoder of an earlier step; None: terms
        that predict it count.

    Returns:
      (gradients like params, metrics, (norm of dL_ssp/dz, norm of dL_sp/dz)). Beside scalars, the
      metrics hold a matrix, `targets.MOMENT`, and the centres' input, `targets.MEAN_LOGITS`,
      where the objective has them.
    """
    config, heads = plan.config, {k: v for k, v in params.items() if k != "encoder"}
    count, size = config.train.microbatches, batch["mask"].shape[0]
    encoders = encoders | _shared_encoder(plan, params)
    inputs = views.pass_inputs(config, plan.passes, batch)
    counts, weights = term_losses.loss_weights(plan, inputs, snapshot)
    views_and_targets = functools.partial(_views_and_targets, plan, encoders)

    def microbatch_grads(
        batch: Batch,
        inputs: Inputs,
        patches: Patches,
        rows: TargetFeatures,
        cached: CachedTextGradients | None,
        cached_entropies: Arrays | None,
    ) -> tuple[Any, Any]:
        z, pullback = _encode(plan, params, inputs, patches)
        bundle = TargetBundle(rows=rows, batch=features, moments=moments)
        costs: TermLosses = {}
        grads = []
        for group in GROUPS:
            loss = term_losses.group_loss(
                plan,
                group,
                weights=weights,
                batch=batch,
                inputs=inputs,
                bundle=bundle,
                cached=cached,
                cached_entropies=cached_entropies,
            )
            with jax.named_scope("losses"):
                (_, group_costs), grad = jax.value_and_grad(loss, (0, 1), has_aux=True)(heads, z)
            costs |= group_costs
            grads.append(grad)
        add_weighted = functools.partial(
            jax.tree.map, lambda a, b: (a.astype(jnp.float32) + weight * b).astype(a.dtype)
        )
        (heads_ssp, z_ssp), (heads_sp, z_sp) = grads
        (encoder,) = pullback(add_weighted(z_ssp, z_sp))
        squares = tuple(jnp.square(balance.feature_norm(g)) for g in (z_ssp, z_sp))
        return {"encoder": encoder, **add_weighted(heads_ssp, heads_sp)}, (costs, squares)

    if count == 1:
        patches, features = views_and_targets(batch)
        features, monitors = targets.assign_targets(plan, features, prototypes)
        moments = targets.target_moments(plan, features)
        grads, (costs, squares) = microbatch_grads(batch, inputs, patches, features, None, None)
    else:
        parts, part_inputs = split_microbatches((batch, inputs), count, size // 2)
        patches, rows = jax.lax.map(views_and_targets, parts)
        features = merge_microbatches(rows, count, size // 2)
        features, monitors = targets.assign_targets(plan, features, prototypes)
        assigned = {key: x for key, x in features.items() if targets.has_prototypes(key)}
        rows = rows | split_microbatches(assigned, count, size // 2)
        moments = targets.target_moments(plan, features)
        cached_costs: TermLosses = {}
        cached = None
        if plan.where("text") and config.objective.text_softmax == "batch":
            cached_costs, cached = _cached_text_gradients(
                plan, params, batch, inputs, (parts, part_inputs, patches)
            )

        cached_entropies = None
        if plan.entropy_terms and config.objective.entropy_rows == "batch":
            entropy_costs, cached_entropies = _cached_entropy_gradients(
                plan, params, batch, (parts, part_inputs, patches)
            )
            cached_costs |= entropy_costs

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, microbatch_grads(*part)), None

        xs = (parts, part_inputs, patches, rows, cached, cached_entropies)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(microbatch_grads, *jax.tree.map(lambda x: x[0], xs)),
        )
        (grads, (costs, squares)), _ = jax.lax.scan(add, zeros, xs)
        costs |= cached_costs

    metrics = term_losses.loss_metrics(plan, costs, counts, weights)
    metrics |= targets.target_metrics(plan, features, moments) | monitors
    return grads, metrics, (jnp.sqrt(squares[0]), jnp.sqrt(squares[1]))


def target_encoders(opt: Any) -> dict[str, Any]:
    """Returns the trees of the target encoders in an optimizer state."""
    out = {"ema": opt["target"].params}
    if "snapshot" in opt:
        out["snapshot"] = opt["snapshot"].params
    if "teachers" in opt:
        out |= {name: {"encoder": tree} for name, tree in opt["teachers"].params.items()}
    return out | ({"frozen": opt["frozen"].params} if "frozen" in opt else {})


def _shared_encoder(plan: Plan, params: Any) -> dict[str, Any]:
    """The online encoder as a target encoder, and the heads that make targets as they are trained,
    without gradient."""
    parts = m3i.target_parts(plan.config, plan.terms, params)
    trained = m3i.trained_parts(plan.terms, params)
    return jax.lax.stop_gradient({"shared": parts, targets.TRAINED: trained})


def views_and_targets(plan: Plan, state: State, batch: Batch) -> tuple[Patches, TargetFeatures]:
    """Returns (patches of every view, targets) of a batch. With microbatches, those of all of them
    are computed before the first gradient."""
    encoders = target_encoders(state.opt) | _shared_encoder(plan, state.params)
    return _views_and_targets(plan, encoders, batch)


def loss_pullbacks(plan: Plan, state: State, batch: Batch) -> tuple[Any, list[Any]]:
    """Returns (pullback of the encoder, [pullback of each group's loss]) of a batch that is one
    microbatch, as trees of the arrays that they keep. The first and one of the others live from the
    forward pass to the backward."""
    patches, features = views_and_targets(plan, state, batch)
    features, _ = targets.assign_targets(plan, features, state.opt.get("prototypes"))
    inputs = views.pass_inputs(plan.config, plan.passes, batch)
    moments = targets.target_moments(plan, features)
    z, pullback = _encode(plan, state.params, inputs, patches)
    group_loss = functools.partial(
        term_losses.group_loss,
        plan,
        weights=term_losses.loss_weights(plan, inputs, state.opt.get("snapshot"))[1],
        batch=batch,
        inputs=inputs,
        bundle=TargetBundle(rows=features, batch=features, moments=moments),
        cached=None,
    )
    heads = {k: v for k, v in state.params.items() if k != "encoder"}
    return pullback, [jax.vjp(group_loss(g), heads, z, has_aux=True)[1] for g in GROUPS]


def balance_lambda(config: schema.Config, opt: Any) -> jax.Array:
    """Lambda of a step, from the statistics of the steps before it."""
    settings = config.objective
    if settings.weighting != "dynamic":
        return jnp.asarray(settings.gamma, jnp.float32)
    low, high = settings.balance_range
    return balance.balance_weight(opt["balance"], gamma=settings.gamma, limits=(low, high))
