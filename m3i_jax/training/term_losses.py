"""Losses of the predictions of the terms, and their sums over the two groups.

Shapes: B images, R rows of a pass (B, or B / 2 of a batch in halves), N patches, E width of the
joint space. Terms are named by their index in `plan.terms`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax import parallel
from m3i_jax.models import m3i
from m3i_jax.objective import collapse, mixing
from m3i_jax.objective.caption_posterior import CAPTIONS, CaptionSoftmax
from m3i_jax.objective.numerics import l2_normalize
from m3i_jax.objective.posteriors import LossInputs, LossSum
from m3i_jax.objective.prototype_targets import PrototypeSoftmax
from m3i_jax.objective.terms import (
    IMAGE_TARGETS,
    DecoderHead,
    LinearHead,
    Pass,
    ProjectionHead,
    Term,
)
from m3i_jax.training import entropy_losses, predictions, targets, views
from m3i_jax.training.plan import Plan, TargetKey
from m3i_jax.training.predictions import Arrays, Features, query_cells
from m3i_jax.training.targets import TargetFeatures
from m3i_jax.training.views import Batch, Inputs, PassInputs

TermLosses = dict[int, LossSum]  # {term index: sum, count and evidence}


def label_weight(term: Term, inputs: PassInputs) -> jax.Array:
    """Returns the weight [R] of each row of an annotation term: 0 where the image has no such
    annotation; of a blended image, its share."""
    rows = inputs.rows[term.image]
    if term.target.of == "text":
        return (rows["length"] > 0).astype(jnp.float32)
    if term.target.of in CAPTIONS:
        return (predictions.caption_rows(term, inputs)[1] > 0).astype(jnp.float32)
    labelled = (rows["label"] >= 0).astype(jnp.float32)
    if inputs.blend is None:
        return labelled
    share = inputs.blend.share
    return labelled * (share if term.image == "own" else 1 - share)


def token_weight(term: Term, inputs: PassInputs) -> jax.Array:
    """Returns the weight [R, L - 1] of each token of a caption that is predicted: those after the
    given ones, with the end of the caption and without padding."""
    tokens_RxL, length_R, given = predictions.caption_rows(term, inputs)
    place_L = jnp.arange(1, tokens_RxL.shape[1])
    given_Rx1 = jnp.broadcast_to(given, length_R.shape)[:, None]
    return ((place_L >= given_Rx1) & (place_L < length_R[:, None])).astype(jnp.float32)


def position_weight(term: Term, inputs: PassInputs) -> jax.Array:
    """Returns the weight of each prediction of an image term: [R, N] of dense ones, [R, H] where
    only some cells are predicted, [R] of pooled ones."""
    mask_RxN = inputs.mask
    if term.target.of == "pooled":
        return jnp.ones(mask_RxN.shape[0])
    if (cells := query_cells(term, inputs)) is not None:
        return jnp.ones(cells.shape)
    if not term.hidden:
        return jnp.ones(mask_RxN.shape)
    return (~mask_RxN if term.image == "own" else mask_RxN).astype(jnp.float32)


def per_token(term: Term) -> bool:
    """Returns whether the loss of a term is a mean over the tokens of all captions."""
    return isinstance(term.posterior, CaptionSoftmax) and term.posterior.per_token


def loss_weights(
    plan: Plan, inputs: Inputs, snapshot: Any = None
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Returns (count of each term, weight of its sum in the loss of its group), over the whole
    batch and without gradient. `snapshot`: the state of the snapshot's link; None: it counts.

    Image terms: the mean of each, then their weighted mean, to which entropy terms are added with
    weights relative to those of the image terms of their group; they come after all terms, as in
    `Plan.numbered_entropies`. Annotation terms share one pool, so
    that L_sp = (n_c L_category + n_t L_text) / (n_c + n_t) when some images have a category, some a
    caption, some both. A loss whose mean is over tokens has the weight of its captions."""
    is_image = [term.target.of in IMAGE_TARGETS for term in plan.terms]
    rows = [
        (position_weight if image else label_weight)(term, inputs[term.reads]).sum()
        for term, image in zip(plan.terms, is_image, strict=True)
    ]
    counts = [
        token_weight(term, inputs[term.reads]).sum() if per_token(term) else count
        for term, count in zip(plan.terms, rows, strict=True)
    ]
    weights = []
    for i, (term, count) in enumerate(zip(plan.terms, counts, strict=True)):
        pool = [
            (t, rows[j])
            for j, t in enumerate(plan.terms)
            if t.group == term.group and is_image[j] == is_image[i]
        ]
        if is_image[i]:
            # 1 where all weights are 0: their losses are 0, and not 0 / 0
            pool_weight = sum(t.weight for t, _ in pool) or 1
            weights.append(term.weight / jnp.maximum(count, 1) / pool_weight)
        else:
            share = rows[i] / jnp.maximum(count, 1) if per_token(term) else 1.0
            total = jnp.asarray(sum(t.weight * n for t, n in pool))
            weights.append(share * term.weight / jnp.where(total > 0, total, 1.0))
    if snapshot is not None:  # a snapshot that has not been taken is random
        taken = [t.target.encoder == "snapshot" for t in plan.terms]
        weights = [w * snapshot.taken if t else w for w, t in zip(weights, taken, strict=True)]
    for entropy_term in plan.entropy_terms:
        pool_weight = sum(
            t.weight
            for t, image in zip(plan.terms, is_image, strict=True)
            if image and t.group == entropy_term.group
        )
        count = jnp.asarray(entropy_losses.entropy_rows(plan, entropy_term, inputs), jnp.float32)
        counts.append(count)
        weights.append(entropy_term.weight / count / (pool_weight or 1))
    return counts, weights


@dataclasses.dataclass(frozen=True)
class TargetBundle:
    """Targets known before the online encoder runs: those of these rows, those of the whole batch
    (as contrastive keys), and second moments over the whole batch."""

    rows: TargetFeatures
    batch: TargetFeatures
    moments: dict[TargetKey, jax.Array]


def _image_loss(
    plan: Plan,
    i: int,
    params: Any,
    prediction: jax.Array,
    project: entropy_losses.OnlineProjections,
    z: Features,
    bundle: TargetBundle,
    inputs: Inputs,
) -> LossSum:
    """The cost of one image term."""
    term = plan.terms[i]
    key, read = plan.target_key(term), inputs[term.reads]

    def image_rows(x_Bx: jax.Array) -> jax.Array:
        return views.image_rows(plan.config, term.reads, term.image, x_Bx)

    if term.target.encoder == "online" and isinstance(term.head, ProjectionHead):
        raw = project.of_target(term)
    elif term.target.encoder == "online":
        assert term.target.view is not None
        raw = targets.project_target(plan, params, key.space, z[Pass(view=term.target.view)])
    else:
        raw = image_rows(bundle.rows[key])
    if isinstance(term.head, ProjectionHead) and term.head.match == "likeness":
        tokens = predictions.visible_tokens(plan, term, z, inputs)[0]
        features = image_rows(bundle.rows[TargetKey(term.target, None)])
        raw = mixing.gather(raw, _cosines(tokens, features).argmax(-1))
    target = targets.normalize_target(term, raw)
    cells = query_cells(term, read)
    # a projection's are gathered
    if cells is not None and isinstance(term.head, DecoderHead | LinearHead):
        target = mixing.gather(target, cells)
    contrastive = term.posterior.batch_keys and key in bundle.batch
    settings, prototypes = plan.config.objective, None
    if isinstance(term.head, ProjectionHead):
        prototypes = params.get("heads", {}).get(term.head.name, {}).get("prototypes")
    given = LossInputs(
        moment_weight=settings.second_moment,
        moment=bundle.moments.get(targets.moment_key(key)),
        temperature=settings.temperature,
        keys=targets.normalize_target(term, bundle.batch[key]) if contrastive else None,
        index=read.rows[term.image]["row"] if contrastive else None,
        parameters=prototypes,
    )
    cost = term.posterior.cost(prediction, target, position_weight(term, read), given)
    if term.target.of != "pooled" or isinstance(term.posterior, PrototypeSoftmax):
        return cost
    both = jax.lax.stop_gradient((prediction, target))
    monitors = {
        "alignment": collapse.alignment(*both),
        "uniformity": collapse.uniformity(both[1]),
    }
    return cost._replace(
        evidence={**cost.evidence, **{k: v * cost.count for k, v in monitors.items()}}
    )


def _cosines(a_RxNxD: jax.Array, b_RxMxD: jax.Array) -> jax.Array:
    a, b = (l2_normalize(jax.lax.stop_gradient(x).astype(jnp.float32)) for x in (a_RxNxD, b_RxMxD))
    return jnp.einsum("rnd,rmd->rnm", a, b)


def _caption_hash(batch: Batch) -> jax.Array:
    """A uint32 [B] for each caption, equal for equal captions."""
    length = batch["tokens"].shape[1]
    odd = jnp.asarray([pow(2654435761, n + 1, 2**32) | 1 for n in range(length)], jnp.uint32)
    real = jnp.arange(length) < batch["length"][:, None]
    # each product is scrambled before the sum, or permuted captions would often be equal
    mixed = (batch["tokens"].astype(jnp.uint32) + 1) * odd
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(2246822519)
    return jnp.where(real, mixed ^ (mixed >> 13), 0).sum(1, dtype=jnp.uint32)


def text_losses(
    plan: Plan,
    images: Arrays,
    captions: jax.Array,
    scalars: dict[int, Any],
    batch: Batch,
    inputs: Inputs,
) -> TermLosses:
    """CLIP loss of every text term by itself, so that no caption is twice in one softmax.

    Args:
      plan: of the run.
      images: embeddings {term: [R, E]}.
      captions: embeddings [B, E].
      scalars: {term: what its posterior trains beside them}.
      batch, inputs: of the same rows.
    """
    settings = plan.config.objective
    group = _caption_hash(batch) if settings.equal_captions == "ignored" else None
    out = {}
    for i, u_RxE in images.items():
        term = plan.terms[i]

        def image_rows(x_Bx: jax.Array, term: Term = term) -> jax.Array:
            return views.image_rows(plan.config, term.reads, term.image, x_Bx)

        given = LossInputs(
            parameters=scalars[i],
            group=None if group is None else image_rows(group),
            chunk=settings.text_chunk,
            axes=parallel.split_axes(u_RxE.shape[0]),
        )
        weight = label_weight(term, inputs[term.reads])
        out[i] = term.posterior.cost(u_RxE, image_rows(captions), weight, given)
    return out


def text_scalars(term: Term, params: Any) -> Any:
    """Returns what the posterior of a text term trains: its `scalars` by name, or the logarithm of
    the inverse temperature."""
    if term.posterior.scalars:
        return params["scalars"][term.name]
    return params["logit_scale"]


@dataclasses.dataclass(frozen=True)
class CachedTextGradients:
    """Gradients of the text terms at the embeddings of the whole batch, so that a microbatch only
    pulls back those of its rows."""

    images: Arrays  # {term: [R, E]}
    captions: Arrays  # {term: [B, E]}
    scalars: dict[int, Any]


jax.tree_util.register_dataclass(
    CachedTextGradients, data_fields=["images", "captions", "scalars"], meta_fields=[]
)


def group_loss(
    plan: Plan,
    group: str,
    *,
    weights: list[jax.Array],
    batch: Batch,
    inputs: Inputs,
    bundle: TargetBundle,
    cached: CachedTextGradients | None,
    cached_entropies: Arrays | None = None,
) -> Callable[[Any, Features], tuple[jax.Array, TermLosses]]:
    """Returns (heads, z) -> (loss of the group, {term: cost}) on these rows, a function for
    `jax.grad`.

    Args:
      plan: of the run.
      group: ssp or sp.
      weights: of every term, as of `loss_weights` over the whole batch.
      batch, inputs: of these rows.
      bundle: their targets.
      cached: gradients of the text terms; None: their softmax spans these rows.
      cached_entropies: gradients of the entropy terms at their features; None: they see these rows.
    """

    def loss(heads: Any, z: Features) -> tuple[jax.Array, TermLosses]:
        costs: TermLosses = {}
        images = plan.where(*IMAGE_TARGETS, group=group)
        predicted = predictions.predict_images(plan, heads, z, inputs, images) if images else {}
        predicted |= predictions.predict_clusters(plan, heads, bundle.rows, images)
        project = entropy_losses.OnlineProjections(plan, heads, z, inputs, predicted)
        for i in images:
            costs[i] = _image_loss(plan, i, heads, predicted[i], project, z, bundle, inputs)
        for i, term in plan.numbered_entropies(group).items():
            features = project(term)
            if cached_entropies is None:
                costs[i] = entropy_losses.entropy_cost(plan, term, features, batch)
            else:  # a linear function with the gradient of the whole batch's cost
                value = jnp.vdot(cached_entropies[i], features.astype(jnp.float32))
                costs[i] = LossSum(value, jnp.zeros(()), {})
        if plan.where("category", "text", group=group):
            vectors = predictions.pool_images(plan, heads, z, inputs)
            for i in plan.where("category", group=group):
                costs[i] = _category_loss(plan, i, heads, vectors, inputs)
            if plan.where("text", group=group):
                texts = _text_losses(plan, heads, vectors, batch, inputs, cached)
                costs |= {i: cost for i, cost in texts.items() if plan.terms[i].group == group}
        if captions := plan.where(*CAPTIONS, group=group):
            logits = predictions.caption_logits(plan, heads, z, inputs, captions)
            costs |= {i: _caption_loss(plan, i, logits[i], inputs) for i in captions}
        total = sum((weights[i] * cost.sum for i, cost in costs.items()), jnp.zeros(()))
        return total, costs

    return loss


def _category_loss(
    plan: Plan, i: int, heads: Any, vectors: dict[Any, jax.Array], inputs: Inputs
) -> LossSum:
    term, read = plan.terms[i], inputs[plan.terms[i].reads]
    logits = m3i.category_logits(heads, vectors[predictions.pool_key(term)])
    given = LossInputs(smoothing=plan.config.objective.label_smoothing)
    labels = read.rows[term.image]["label"]
    return term.posterior.cost(logits, labels, label_weight(term, read), given)


def _caption_loss(plan: Plan, i: int, logits: jax.Array, inputs: Inputs) -> LossSum:
    term, read = plan.terms[i], inputs[plan.terms[i].reads]
    given = LossInputs(parallel=predictions.parallel_rows(plan, term, read))
    tokens = predictions.caption_rows(term, read)[0][:, 1:]
    return term.posterior.cost(logits, tokens, token_weight(term, read), given)


def _text_losses(
    plan: Plan,
    heads: Any,
    vectors: dict[Any, jax.Array],
    batch: Batch,
    inputs: Inputs,
    cached: CachedTextGradients | None,
) -> TermLosses:
    images, captions = predictions.contrastive_embeddings(plan, heads, vectors, batch)
    assert captions is not None
    scalars = {i: text_scalars(plan.terms[i], heads) for i in images}
    if cached is None:
        return text_losses(plan, images, captions, scalars, batch, inputs)
    # a linear function with the gradient of the whole batch's softmax; its value is not the loss
    out, zero = {}, jnp.zeros(())
    for i, u in images.items():
        value = jnp.vdot(cached.images[i], u) + jnp.vdot(cached.captions[i], captions)
        products = jax.tree.map(jnp.multiply, cached.scalars[i], scalars[i])
        value = sum(jax.tree.leaves(products), value)
        out[i] = LossSum(value, zero, {"nll": zero, "log_choices": zero})
    return out


def loss_metrics(
    plan: Plan, costs: TermLosses, counts: list[jax.Array], weights: list[jax.Array]
) -> dict[str, jax.Array]:
    """loss/<group>, loss/<name>, info/<name> in bits a prediction, bits/<name> of captions,
    entropy/<name> in bits a row, and the collapse monitors of pooled targets."""
    out: dict[str, jax.Array] = {}
    for group in ("ssp", "sp"):
        indices = [i for i, t in enumerate(plan.terms) if t.group == group]
        if indices := [*indices, *plan.numbered_entropies(group)]:
            out[f"loss/{group}"] = sum((weights[i] * costs[i].sum for i in indices), jnp.zeros(()))
    for name in dict.fromkeys(t.name for t in plan.terms):
        indices = [i for i, t in enumerate(plan.terms) if t.name == name]
        count = jnp.maximum(sum(counts[i] for i in indices), 1)
        out[f"loss/{name}"] = sum((costs[i].sum for i in indices), jnp.zeros(())) / count
        evidence = jax.tree.map(lambda *x: sum(x[1:], x[0]), *(costs[i].evidence for i in indices))
        for monitor in ("alignment", "uniformity"):
            if monitor in evidence:
                key = f"collapse/{monitor}"
                out[f"{key}/{name}" if key in out else key] = evidence.pop(monitor) / count
        posterior = plan.terms[indices[0]].posterior
        bits = posterior.bits(evidence, count)
        if bits is not None:
            out[f"info/{name}"] = bits
        if isinstance(posterior, CaptionSoftmax):
            out |= {f"bits/{name}/{k}": x for k, x in posterior.figures(evidence).items()}
    return out | _entropy_metrics(plan, costs, counts)


def _entropy_metrics(
    plan: Plan, costs: TermLosses, counts: list[jax.Array]
) -> dict[str, jax.Array]:
    """loss/<name> and, where it is an estimate, entropy/<name> in bits of every entropy term."""
    out: dict[str, jax.Array] = {}
    terms = plan.numbered_entropies()
    for name in dict.fromkeys(t.name for t in terms.values()):
        same = {i: t for i, t in terms.items() if t.name == name}
        count = sum((counts[i] for i in same), jnp.zeros(()))
        out[f"loss/{name}"] = sum((costs[i].sum for i in same), jnp.zeros(())) / count
        evidence = jax.tree.map(lambda *x: sum(x[1:], x[0]), *(costs[i].evidence for i in same))
        bits = next(iter(same.values())).estimator.bits(evidence, count)
        if bits is not None:
            out[f"entropy/{name}"] = bits
    return out
