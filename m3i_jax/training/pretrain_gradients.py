"""Gradients of M3I's objective on one batch, with one encoder backward pass.

    1. what every pass reads of the batch       views.pass_inputs
    2. targets, without gradient                z_y = f_EMA(clean views)
    3. the online encoder once, with pullback   z, pullback = vjp(f_theta, input)
    4. each group: its loss and gradients       L_ssp, dz_ssp      L_sp, dz_sp
    5. one encoder backward                     pullback(dz_ssp + lambda * dz_sp)

k microbatches of B/k give the result of one batch of B: every loss is divided by the count of the
whole batch, the second moment is taken over all targets before, the norms are roots of summed
squares, assignments to prototypes are balanced over the whole batch before, and the text softmax
spans the batch through embeddings that are computed once more."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.models import m3i
from m3i_jax.objective import balance
from m3i_jax.objective.ema import SnapshotState
from m3i_jax.objective.prototype_targets import PrototypeState
from m3i_jax.training import assignments, entropy_losses, predictions, targets, term_losses, views
from m3i_jax.training.plan import Plan
from m3i_jax.training.predictions import Arrays
from m3i_jax.training.targets import TargetFeatures
from m3i_jax.training.task import State, merge_microbatches, split_microbatches
from m3i_jax.training.term_losses import CachedTextGradients, TargetBundle, TermLosses
from m3i_jax.training.views import Batch, Inputs, Patches

Metrics = dict[str, jax.Array]
GROUPS = ("ssp", "sp")


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
    plan: Plan, teachers: dict[str, Any], batch: Batch
) -> tuple[Patches, TargetFeatures]:
    with jax.named_scope("views"):
        patches = views.augmented_patches(plan.config, batch, plan.views, exact=plan.exact)
    with jax.named_scope("target_encoder"):
        return patches, targets.target_features(plan, teachers, patches, batch["mask"])


def objective_gradients(
    plan: Plan,
    params: Any,
    teachers: dict[str, Any],
    batch: Batch,
    weight: jax.Array,
    prototypes: PrototypeState | None = None,
    snapshot: SnapshotState | None = None,
) -> tuple[Any, Metrics, tuple[jax.Array, jax.Array]]:
    """Computes the gradients of L_ssp + weight * L_sp with one encoder backward.

    Args:
      plan: the terms and their settings.
      params: the parameter tree; `params["encoder"]` is f_theta, the others are heads.
      teachers: {"ema": tree, "frozen": tree} of the target encoders, as of `m3i.target_parts`;
        "shared" is added here.
      batch: one global batch, leading axis B.
      weight: lambda, a scalar without gradient.
      prototypes: centres and temperature of assignments to prototypes, of the steps before; None:
        those of the start.
      snapshot: the state of the link that holds the EMA encoder of an earlier step; None: terms
        that predict it count.

    Returns:
      (gradients like params, metrics, (norm of dL_ssp/dz, norm of dL_sp/dz)). Beside scalars, the
      metrics hold a matrix, `targets.MOMENT`, and the centres' input, `assignments.MEAN_LOGITS`,
      where the objective has them.
    """
    config, heads = plan.config, {k: v for k, v in params.items() if k != "encoder"}
    count, size = config.train.microbatches, batch["mask"].shape[0]
    teachers = teachers | _shared_encoder(plan, params)
    inputs = views.pass_inputs(config, plan.passes, batch)
    counts, weights = term_losses.loss_weights(plan, inputs, snapshot)
    views_and_targets = functools.partial(_views_and_targets, plan, teachers)

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
        features, monitors = assignments.assign_targets(plan, features, prototypes)
        moments = targets.target_moments(plan, features)
        grads, (costs, squares) = microbatch_grads(batch, inputs, patches, features, None, None)
    else:
        parts, part_inputs = split_microbatches((batch, inputs), count, size // 2)
        patches, rows = jax.lax.map(views_and_targets, parts)
        features = merge_microbatches(rows, count, size // 2)
        features, monitors = assignments.assign_targets(plan, features, prototypes)
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
    teachers = target_encoders(state.opt) | _shared_encoder(plan, state.params)
    return _views_and_targets(plan, teachers, batch)


def loss_pullbacks(plan: Plan, state: State, batch: Batch) -> tuple[Any, list[Any]]:
    """Returns (pullback of the encoder, [pullback of each group's loss]) of a batch that is one
    microbatch, as trees of the arrays that they keep. The first and one of the others live from the
    forward pass to the backward."""
    patches, features = views_and_targets(plan, state, batch)
    features, _ = assignments.assign_targets(plan, features, state.opt.get("prototypes"))
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
