"""Reads a tuple of terms (objective/terms.py): what they predict, what they cost. No method has
code of its own here.

Shapes: B images, R rows of a pass (B, or B / 2 of a batch in halves), N patches, K visible ones, D
encoder width, W decoder width."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax.models import m3i
from m3i_jax.objective import collapse, mixing, positions
from m3i_jax.objective.numerics import l2_normalize
from m3i_jax.objective.posteriors import LossInputs, LossSum
from m3i_jax.objective.terms import (
    DENSE_TARGETS,
    DecoderHead,
    LinearHead,
    Pass,
    PooledHead,
    ProjectionHead,
    Term,
)
from m3i_jax.training import targets, views
from m3i_jax.training.plan import Plan, TargetKey
from m3i_jax.training.targets import TargetFeatures, stack_rows, unstack_rows
from m3i_jax.training.views import Batch

TermLosses = dict[int, LossSum]  # of every term, by its place in the tuple
Arrays = dict[int, jax.Array]


def rows_of_image(plan: Plan, term: Term, x_Bx: jax.Array) -> jax.Array:
    """Rows of `x` for the image that the term is about."""
    return views.image_rows(plan.config, term.reads, term.image, x_Bx)


def label_weight(plan: Plan, term: Term, batch: Batch) -> jax.Array:
    """Weight [R] of each row: 0 where the image has no such annotation; of a blended image the
    image's share of it."""
    if term.target.of == "category":
        labelled = (rows_of_image(plan, term, batch["label"]) >= 0).astype(jnp.float32)
        if not term.reads.blended:
            return labelled
        share = views.mixup_of(plan.config, batch).share
        return labelled * (share if term.image == "own" else 1 - share)
    if term.target.of == "text":
        return (rows_of_image(plan, term, batch["length"]) > 0).astype(jnp.float32)
    return jnp.ones(rows_of_image(plan, term, batch["mask"]).shape[0])


def predicts_hidden_only(term: Term) -> bool:
    """Whether there are predictions only where the input is hidden."""
    return isinstance(term.head, DecoderHead) and term.head.queries == "hidden"


def hidden_index(plan: Plan, term: Term, batch: Batch) -> jax.Array:
    """Cells [R, H] that a term's input does not show of its image, ascending."""
    own, other = views.visible_cells(plan.config, term.reads, batch)
    return own if term.image == "partner" else other


def position_weight(plan: Plan, term: Term, batch: Batch) -> jax.Array:
    """Which predictions of an image term count: [R, N] of dense ones, [R] of pooled ones."""
    mask_RxN = views.pass_mask(plan.config, term.reads, batch)
    if term.target.of == "pooled":
        return jnp.ones(mask_RxN.shape[0])
    if predicts_hidden_only(term):
        return jnp.ones((mask_RxN.shape[0], plan.config.hidden))
    if not term.hidden:
        return jnp.ones(mask_RxN.shape)
    return (~mask_RxN if term.image == "own" else mask_RxN).astype(jnp.float32)


def loss_weights(plan: Plan, batch: Batch) -> tuple[list[jax.Array], list[jax.Array]]:
    """(count of every term, factor of its sum in its group's loss), over the whole batch and
    without gradient.

    Images: the mean of each term, then their weighted mean. Annotations: one pool, so that L_sp =
    (n_c L_category + n_t L_text) / (n_c + n_t) when some images have a category, some a caption,
    some both."""
    pictures = plan.pictures
    counts = [
        (position_weight if i in pictures else label_weight)(plan, term, batch).sum()
        for i, term in enumerate(plan.terms)
    ]
    factors = []
    for i, (term, count) in enumerate(zip(plan.terms, counts, strict=True)):
        mates = [
            (t, counts[j])
            for j, t in enumerate(plan.terms)
            if t.group == term.group and (j in pictures) == (i in pictures)
        ]
        if i in pictures:
            factors.append(term.weight / jnp.maximum(count, 1) / sum(t.weight for t, _ in mates))
        else:
            factors.append(term.weight / jnp.maximum(sum(t.weight * n for t, n in mates), 1))
    return counts, factors


def visible_tokens(
    plan: Plan, term: Term, z: dict[Pass, jax.Array], batch: Batch
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(tokens [R, K, D] that show the term's image, their cells [R, K], cls [R, D] if there is
    one)."""
    config, z_RxTxD = plan.config, z[term.reads]
    first = int(config.model.encoder.cls_token)
    cls, z_RxTxD = (z_RxTxD[:, 0] if first else None), z_RxTxD[:, first:]
    if term.reads.mixed and not (isinstance(term.head, PooledHead) and term.head.everything):
        own, other = views.visible_cells(config, term.reads, batch)
        index = own if term.image == "own" else other
        return mixing.gather(z_RxTxD, index), index, cls
    if term.reads.masked and not term.reads.filled:
        return z_RxTxD, views.visible_cells(config, term.reads, batch)[0], cls
    return z_RxTxD, jnp.broadcast_to(jnp.arange(config.tokens), z_RxTxD.shape[:2]), cls


def group_by_shape(keys: dict[Any, tuple[Any, ...]]) -> list[list[Any]]:
    """Keys whose arrays have equal shapes: they share a call."""
    groups: dict[Any, list[Any]] = {}
    for key, arrays in keys.items():
        groups.setdefault(tuple(a if a is None else a.shape for a in arrays), []).append(key)
    return list(groups.values())


def _queries(plan: Plan, params: Any, term: Term, batch: Batch) -> jax.Array:
    config, width = plan.config, plan.config.model.decoder.width
    # the same for every image: one row of N queries instead of R
    if term.reads.crop == term.target.crop:
        queries = m3i.queries(
            config, params, jnp.asarray(positions.same_view_positions(config.grid, width))
        )
        queries = jnp.broadcast_to(
            queries, (rows_of_image(plan, term, batch["mask"]).shape[0], *queries.shape[-2:])
        )
    else:
        box, flip = (
            rows_of_image(plan, term, batch["box"]),
            rows_of_image(plan, term, batch["flip"]),
        )
        x, y = term.reads.crop, term.target.crop
        assert y is not None
        raw = positions.relative_positions(
            box[:, x], flip[:, x], box[:, y], flip[:, y], grid=config.grid, width=width
        )
        queries = m3i.queries(config, params, raw)
    return (
        mixing.gather(queries, hidden_index(plan, term, batch))
        if predicts_hidden_only(term)
        else queries
    )


def decoder_inputs(
    plan: Plan, params: Any, z: dict[Pass, jax.Array], batch: Batch, places: tuple[int, ...]
) -> dict[int, tuple[Any, ...]]:
    """(tokens, cells, queries, cls) of those of the terms that have a decoder; terms with inputs of
    equal shapes share a call."""
    out = {}
    for i in places:
        if isinstance(plan.terms[i].head, DecoderHead):
            tokens, index, cls = visible_tokens(plan, plan.terms[i], z, batch)
            out[i] = (
                tokens,
                index,
                _queries(plan, params, plan.terms[i], batch),
                cls if plan.reads_cls(plan.terms[i]) else None,
            )
    return out


def _decoded(
    plan: Plan, params: Any, z: dict[Pass, jax.Array], batch: Batch, places: tuple[int, ...]
) -> Arrays:
    """Predictions of the terms with a decoder; one call for those of equal shape, one head for
    those of one kind."""
    inputs = decoder_inputs(plan, params, z, batch, places)
    out: Arrays = {}
    for group in group_by_shape(inputs):
        tokens, index, queries = (stack_rows([inputs[i][part] for i in group]) for part in range(3))
        cls = None if inputs[group[0]][3] is None else stack_rows([inputs[i][3] for i in group])
        rows = m3i.decode(plan.config, params, tokens, index, queries, cls)
        kinds = {plan.terms[i].target.of for i in group}
        if len(kinds) == 1:
            out |= dict(
                zip(
                    group,
                    unstack_rows(m3i.decode_head(plan.config, params, rows, *kinds), len(group)),
                    strict=True,
                )
            )
        else:
            split = zip(group, unstack_rows(rows, len(group)), strict=True)
            out |= {
                i: m3i.decode_head(plan.config, params, mine, plan.terms[i].target.of)
                for i, mine in split
            }
    return out


def predictions(
    plan: Plan, params: Any, z: dict[Pass, jax.Array], batch: Batch, places: tuple[int, ...]
) -> Arrays:
    """Predictions of these image terms, [R, N, D] of dense ones at the positions of their target
    view, [R, D] of pooled ones."""
    out = _decoded(plan, params, z, batch, places)
    for i in places:
        term = plan.terms[i]
        if isinstance(term.head, DecoderHead):
            continue
        tokens, _, cls = visible_tokens(plan, term, z, batch)
        if isinstance(term.head, LinearHead):
            out[i] = m3i.linear(plan.config, params, tokens, term.target.of)
        elif isinstance(term.head, ProjectionHead):
            out[i] = m3i.predict(
                plan.config,
                params["heads"],
                term.head,
                targets.pool_target(plan, term.head, tokens, cls),
            )
    return out


@dataclasses.dataclass(frozen=True)
class TargetBundle:
    """What is known before the online encoder runs: goals of these rows, their keys among the whole
    batch, the moments of all targets."""

    goals: TargetFeatures
    keys: TargetFeatures
    # [B] of the rows in the keys; None: they are all of them, in their order
    index: jax.Array | None
    moments: dict[TargetKey, jax.Array]


def _image_loss(
    plan: Plan,
    i: int,
    params: Any,
    prediction: jax.Array,
    z: dict[Pass, jax.Array],
    seen: TargetBundle,
    batch: Batch,
) -> LossSum:
    term = plan.terms[i]
    goal = plan.goal(term)
    if term.target.encoder == "online":
        raw = targets.project_target(plan, params, goal.space, z[Pass(crop=term.target.crop)])  # type: ignore[arg-type]
    else:
        raw = rows_of_image(plan, term, seen.goals[goal])
    if isinstance(term.head, ProjectionHead) and term.head.match == "likeness":
        likeness = _cosines(
            visible_tokens(plan, term, z, batch)[0],
            rows_of_image(plan, term, seen.goals[TargetKey(term.target, None)]),
        )
        raw = mixing.gather(raw, likeness.argmax(-1))
    target = targets.normalize_target(term, raw)
    if predicts_hidden_only(term):
        target = mixing.gather(target, hidden_index(plan, term, batch))
    keys = (
        targets.normalize_target(term, seen.keys[goal])
        if goal in seen.keys and term.posterior.batch_keys
        else None
    )
    places = jnp.arange(batch["mask"].shape[0]) if seen.index is None else seen.index
    settings = plan.config.objective
    given = LossInputs(
        weight=settings.second_moment,
        moment=seen.moments.get(targets.moment_key(goal)),
        temperature=settings.temperature,
        keys=keys,
        index=None if keys is None else rows_of_image(plan, term, places),
        parameters=(
            params["heads"][term.head.name].get("prototypes")
            if isinstance(term.head, ProjectionHead)
            else None
        ),
    )
    cost = term.posterior.cost(prediction, target, position_weight(plan, term, batch), given)
    if term.target.of != "pooled":
        return cost
    both = jax.lax.stop_gradient((prediction, target))
    monitors = {"alignment": collapse.alignment(*both), "uniformity": collapse.uniformity(both[1])}
    return cost._replace(
        evidence={**cost.evidence, **{k: v * cost.count for k, v in monitors.items()}}
    )


def _cosines(a_RxNxD: jax.Array, b_RxMxD: jax.Array) -> jax.Array:
    a, b = (l2_normalize(jax.lax.stop_gradient(x).astype(jnp.float32)) for x in (a_RxNxD, b_RxMxD))
    return jnp.einsum("rnd,rmd->rnm", a, b)


def pool_terms(
    plan: Plan, params: Any, z: dict[Pass, jax.Array], batch: Batch
) -> dict[Any, jax.Array]:
    """Pooled features [R, pool width] of every (pass, image, head) that an annotation is predicted
    from, each once."""
    seen: dict[Any, tuple[Any, ...]] = {
        _pool_key(t): visible_tokens(plan, t, z, batch)
        for t in plan.terms
        if isinstance(t.head, PooledHead)
    }
    out: dict[Any, jax.Array] = {}
    for group in group_by_shape(seen):
        tokens = stack_rows([seen[key][0] for key in group])
        cls = None if seen[group[0]][2] is None else stack_rows([seen[key][2] for key in group])
        out |= dict(
            zip(
                group,
                unstack_rows(m3i.pool(plan.config, params, tokens, cls=cls), len(group)),
                strict=True,
            )
        )
    return out


def _pool_key(term: Term) -> Any:
    everything = isinstance(term.head, PooledHead) and term.head.everything
    return term.reads, "own" if everything else term.image, everything


def contrastive_embeddings(
    plan: Plan, params: Any, vectors: dict[Any, jax.Array], batch: Batch
) -> tuple[Arrays, jax.Array | None]:
    """Image embeddings [R, E] of every text term and the text embeddings [B, E] of the batch's
    captions, each caption encoded once."""
    text = plan.where("text")
    if not text:
        return {}, None
    images = {
        i: m3i.image_embedding(plan.config, params, vectors[_pool_key(plan.terms[i])]) for i in text
    }
    return images, m3i.text_embedding(plan.config, params, batch["tokens"], batch["length"])


def _same_text(batch: Batch) -> jax.Array:
    """A number [B] for each caption, equal for equal captions."""
    length = batch["tokens"].shape[1]
    odd = jnp.asarray([pow(2654435761, n + 1, 2**32) | 1 for n in range(length)], jnp.uint32)
    real = jnp.arange(length) < batch["length"][:, None]
    # Finalised before the sum: a plain sum of products would make permuted captions alike too
    # often.
    mixed = (batch["tokens"].astype(jnp.uint32) + 1) * odd
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(2246822519)
    return jnp.where(real, mixed ^ (mixed >> 13), 0).sum(1, dtype=jnp.uint32)


def text_losses(
    plan: Plan, images: Arrays, captions: jax.Array, log_scale: jax.Array, batch: Batch
) -> TermLosses:
    """CLIP loss of every text term by itself, so that no caption stands twice in one softmax."""
    group = _same_text(batch) if plan.config.objective.equal_captions == "ignored" else None
    out = {}
    for i, u_RxE in images.items():
        term = plan.terms[i]
        mates = None if group is None else rows_of_image(plan, term, group)
        given = LossInputs(
            parameters=log_scale, group=mates, chunk=plan.config.objective.text_chunk
        )
        out[i] = term.posterior.cost(
            u_RxE, rows_of_image(plan, term, captions), label_weight(plan, term, batch), given
        )
    return out


@dataclasses.dataclass(frozen=True)
class CachedTextGradients:
    """Gradients of the text terms at the embeddings of the whole batch; a microbatch only pulls its
    rows back."""

    images: Arrays  # {term: [R, E]}
    captions: Arrays  # {term: [B, E]}
    log_scale: Arrays


jax.tree_util.register_dataclass(
    CachedTextGradients, data_fields=["images", "captions", "log_scale"], meta_fields=[]
)


def group_loss(
    plan: Plan,
    group: str,
    *,
    factors: list[jax.Array],
    batch: Batch,
    seen: TargetBundle,
    cached: CachedTextGradients | None,
) -> Callable[[Any, dict[Pass, jax.Array]], tuple[jax.Array, TermLosses]]:
    """(heads, z) -> (loss of the group, {term: cost}) on these rows, as a function that jax.grad
    can take."""

    def loss(heads: Any, z: dict[Pass, jax.Array]) -> tuple[jax.Array, TermLosses]:
        costs: TermLosses = {}
        if pictures := plan.where(*DENSE_TARGETS, "pooled", group=group):
            made = predictions(plan, heads, z, batch, pictures)
            costs |= {i: _image_loss(plan, i, heads, made[i], z, seen, batch) for i in pictures}
        if plan.where("category", "text", group=group):
            vectors = pool_terms(plan, heads, z, batch)
            for i in plan.where("category", group=group):
                term = plan.terms[i]
                logits = m3i.category_logits(plan.config, heads, vectors[_pool_key(term)])
                given = LossInputs(smoothing=plan.config.objective.label_smoothing)
                costs[i] = term.posterior.cost(
                    logits,
                    rows_of_image(plan, term, batch["label"]),
                    label_weight(plan, term, batch),
                    given,
                )
            images, captions = (
                contrastive_embeddings(plan, heads, vectors, batch)
                if plan.where("text", group=group)
                else ({}, None)
            )
            if captions is not None and cached is None:
                costs |= text_losses(plan, images, captions, heads["logit_scale"], batch)
            elif captions is not None and cached is not None:
                # A linear stand-in with the gradient of the whole batch's softmax; its value is not
                # the loss.
                none = jnp.zeros(())
                for i, u in images.items():
                    value = jnp.vdot(cached.images[i], u) + jnp.vdot(cached.captions[i], captions)
                    costs[i] = LossSum(
                        value + cached.log_scale[i] * heads["logit_scale"],
                        none,
                        {"nll": none, "log_choices": none},
                    )
        total = sum((factors[i] * cost.sum for i, cost in costs.items()), jnp.zeros(()))
        return total, costs

    return loss
