"""Reads a tuple of terms (objective/methods.py): what they need, what they predict, what they cost. No method has code of its own here.

Shapes: B images, R predictions an input (own and partner), N patches, K visible ones, D encoder width, W decoder width."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.models import m3i
from m3i_jax.objective import mixing, positions, posterior
from m3i_jax.objective.methods import Pass, Term, Terms
from m3i_jax.training.views import Batch

Sums = dict[int, jax.Array]  # of every term, by its place in the tuple


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a tuple of terms asks of one step: every encoder pass and every target view once."""

    config: schema.Config
    terms: Terms

    @property
    def passes(self) -> tuple[Pass, ...]:
        return tuple(sorted({t.reads for t in self.terms}))

    @property
    def target_crops(self) -> tuple[int, ...]:
        return tuple(sorted({t.target.crop for t in self.terms if t.target.crop is not None}))

    @property
    def crops(self) -> tuple[int, ...]:
        """Views that any encoder reads."""
        return tuple(sorted({p.crop for p in self.passes} | set(self.target_crops)))

    def where(self, of: str, group: str | None = None) -> tuple[int, ...]:
        return tuple(i for i, t in enumerate(self.terms) if t.target.of == of and group in (None, t.group))


def _of_image(term: Term, x_Bx: jax.Array) -> jax.Array:
    """Rows of `x` for the image that the term is about."""
    return mixing.partner(x_Bx) if term.image == "partner" else x_Bx


def _present(term: Term, batch: Batch) -> jax.Array:
    """Weight [B] of each row: 0 where the image has no such annotation."""
    if term.target.of == "category":
        return (_of_image(term, batch["label"]) >= 0).astype(jnp.float32)
    if term.target.of == "text":
        return (_of_image(term, batch["length"]) > 0).astype(jnp.float32)
    return jnp.ones(batch["mask"].shape[0])


def counted(plan: Plan, term: Term, batch: Batch) -> jax.Array:
    """Target positions [B, N] of a dense term that count."""
    mask_BxN = batch["mask"]
    if not term.hidden:
        return jnp.ones(mask_BxN.shape)
    return (~mask_BxN if term.image == "own" else mask_BxN).astype(jnp.float32)


def scales(plan: Plan, batch: Batch) -> tuple[list[jax.Array], list[jax.Array]]:
    """(count of every term, factor of its sum in its group's loss), over the whole batch and without gradient.

    Dense terms: the mean of each, then their weighted mean. Annotations: one pool, so that L_sp = (n_c L_category + n_t L_text) / (n_c +
    n_t)
    when some images have a category, some a caption, some both.
    """
    counts = []
    for term in plan.terms:
        dense = term.target.of == "tokens"
        counts.append((counted(plan, term, batch) if dense else _present(term, batch)).sum())
    factors = []
    for term, count in zip(plan.terms, counts, strict=True):
        dense = term.target.of == "tokens"
        mates = [(t, n) for t, n in zip(plan.terms, counts, strict=True) if t.group == term.group and (t.target.of == "tokens") == dense]
        if dense:
            factors.append(term.weight / jnp.maximum(count, 1) / sum(t.weight for t, _ in mates))
        else:
            factors.append(term.weight / jnp.maximum(sum(t.weight * n for t, n in mates), 1))
    return counts, factors


def visible(plan: Plan, term: Term, z: dict[Pass, jax.Array], batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The rows of z [B, K, D] that show the term's image, and their grid positions [B, K]. The cls token, shared by two images, is left
    out."""
    config, z_BxTxD = plan.config, z[term.reads]
    z_BxTxD = z_BxTxD[:, int(config.model.encoder.cls_token) :]
    own_BxK, other_BxH = mixing.split(batch["mask"], config.tokens - config.hidden)
    if term.reads.mixed:
        index = own_BxK if term.image == "own" else other_BxH
        return mixing.gather(z_BxTxD, index), index
    if term.reads.masked:
        return z_BxTxD, own_BxK
    return z_BxTxD, jnp.broadcast_to(jnp.arange(config.tokens), z_BxTxD.shape[:2])


def _together(parts: list[jax.Array]) -> jax.Array:
    """[B, ...] arrays as one [B * R, ...] in which the predictions of an input lie side by side: the batch stays sharded as it was."""
    stacked = jnp.stack(parts, 1)
    return stacked.reshape(-1, *stacked.shape[2:])


def _apart(x_BRx: jax.Array, count: int) -> list[jax.Array]:
    split = x_BRx.reshape(-1, count, *x_BRx.shape[1:])
    return [split[:, r] for r in range(count)]


def _by_shape(seen: dict[Any, tuple[jax.Array, jax.Array]]) -> list[list[Any]]:
    """Keys whose visible rows have equal shape: they share a call."""
    groups: dict[tuple[int, ...], list[Any]] = {}
    for key, (z, _) in seen.items():
        groups.setdefault(z.shape, []).append(key)
    return list(groups.values())


def _queries(plan: Plan, params: Any, term: Term, batch: Batch) -> jax.Array:
    config, width = plan.config, plan.config.model.decoder.width
    if term.reads.crop == term.target.crop:  # the same for every image: one row of N queries instead of B
        queries = m3i.queries(config, params, jnp.asarray(positions.identity(config.grid, width)))
        return jnp.broadcast_to(queries, (batch["mask"].shape[0], *queries.shape[-2:]))
    box, flip = _of_image(term, batch["box"]), _of_image(term, batch["flip"])
    x, y = term.reads.crop, term.target.crop
    assert y is not None
    return m3i.queries(config, params, positions.relative(box[:, x], flip[:, x], box[:, y], flip[:, y], grid=config.grid, width=width))


def dense_predictions(plan: Plan, params: Any, z: dict[Pass, jax.Array], batch: Batch) -> Sums:
    """Predictions [B, N, D] of every dense term, at the positions of its target view; one decoder call for terms of equal shape."""
    seen = {i: visible(plan, plan.terms[i], z, batch) for i in plan.where("tokens")}
    out: Sums = {}
    for group in _by_shape(seen):
        own, index = (_together([seen[i][part] for i in group]) for part in (0, 1))
        queries = _together([_queries(plan, params, plan.terms[i], batch) for i in group])
        out |= dict(zip(group, _apart(m3i.decode(plan.config, params, own, index, queries), len(group)), strict=True))
    return out


def pooled(plan: Plan, params: Any, z: dict[Pass, jax.Array], batch: Batch) -> dict[tuple[Pass, str], jax.Array]:
    """Attention-pooled features [B, pool width] of every (pass, image) that an annotation is predicted from, each once."""
    seen = {(t.reads, t.image): visible(plan, t, z, batch) for t in plan.terms if t.target.of != "tokens"}
    out: dict[tuple[Pass, str], jax.Array] = {}
    for group in _by_shape(seen):
        features = m3i.pool(plan.config, params, _together([seen[key][0] for key in group]))
        out |= dict(zip(group, _apart(features, len(group)), strict=True))
    return out


def targets(plan: Plan, encoder: Any, crops: dict[int, jax.Array]) -> dict[int, jax.Array]:
    """Dense features {crop: [B, N, D]} of clean views under the target encoder, without gradient; one call for all views."""
    if not plan.target_crops:
        return {}
    z = m3i.encode(plan.config, encoder, _together([crops[c] for c in plan.target_crops]))[:, int(plan.config.model.encoder.cls_token) :]
    return dict(zip(plan.target_crops, _apart(jax.lax.stop_gradient(z), len(plan.target_crops)), strict=True))


def second_moment(plan: Plan, features: dict[int, jax.Array]) -> jax.Array | None:
    """C [D, D] over all target tokens of the batch, both views together."""
    if not features:
        return None
    width = plan.config.model.encoder.width
    moments = [posterior.second_moment(posterior.layer_normalize(t.reshape(-1, width))) for t in features.values()]
    return sum(moments[1:], moments[0]) / len(moments)


def _dense_sum(
    plan: Plan, i: int, prediction: jax.Array, features: dict[int, jax.Array], moment: jax.Array | None, batch: Batch
) -> jax.Array:
    term, width = plan.terms[i], plan.config.model.encoder.width
    assert term.target.crop is not None
    t_BNxD = posterior.layer_normalize(_of_image(term, features[term.target.crop]).reshape(-1, width))
    where = counted(plan, term, batch).reshape(-1)
    weight = plan.config.objective.second_moment
    return posterior.gaussian(prediction.reshape(-1, width), t_BNxD, where, second_moment=weight, moment_DxD=moment if weight else None)[0]


def embeddings(plan: Plan, params: Any, features: dict[tuple[Pass, str], jax.Array], batch: Batch) -> tuple[Sums, jax.Array | None]:
    """Image embeddings [B, E] of every text term and the text embeddings [B, E] of the batch's captions, each caption encoded once."""
    text = plan.where("text")
    if not text:
        return {}, None
    images = {i: m3i.image_embedding(plan.config, params, features[plan.terms[i].reads, plan.terms[i].image]) for i in text}
    return images, m3i.text_embedding(plan.config, params, batch["tokens"], batch["length"])


def text_sums(plan: Plan, images: Sums, captions: jax.Array, log_scale: jax.Array, batch: Batch) -> Sums:
    """CLIP loss of every text term by itself, so that no caption stands twice in one softmax."""
    return {
        i: posterior.text(u_BxE, _of_image(plan.terms[i], captions), log_scale, _present(plan.terms[i], batch))[0]
        for i, u_BxE in images.items()
    }


@dataclasses.dataclass(frozen=True)
class Cached:
    """Gradients of the text terms at the embeddings of the whole batch; a microbatch only pulls its rows back."""

    images: Sums  # {term: [B, E]}
    captions: dict[int, jax.Array]  # {term: [B, E]}
    log_scale: dict[int, jax.Array]


jax.tree_util.register_dataclass(Cached, data_fields=["images", "captions", "log_scale"], meta_fields=[])


def group_loss(
    plan: Plan,
    group: str,
    *,
    factors: list[jax.Array],
    moment: jax.Array | None,
    batch: Batch,
    features: dict[int, jax.Array],
    cached: Cached | None,
) -> Callable[[Any, dict[Pass, jax.Array]], tuple[jax.Array, Sums]]:
    """(heads, z) -> (loss of the group, {term: sum}) on these rows, as a function that jax.grad can take."""

    def loss(heads: Any, z: dict[Pass, jax.Array]) -> tuple[jax.Array, Sums]:
        sums: Sums = {}
        if dense := plan.where("tokens", group):
            predictions = dense_predictions(plan, heads, z, batch)
            sums |= {i: _dense_sum(plan, i, predictions[i], features, moment, batch) for i in dense}
        if plan.where("category", group) or plan.where("text", group):
            vectors = pooled(plan, heads, z, batch)
            for i in plan.where("category", group):
                term = plan.terms[i]
                logits_BxC = m3i.category_logits(plan.config, heads, vectors[term.reads, term.image])
                smoothing = plan.config.objective.label_smoothing
                sums[i] = posterior.category(logits_BxC, _of_image(term, batch["label"]), _present(term, batch), smoothing=smoothing)[0]
            images, captions = embeddings(plan, heads, vectors, batch)
            if captions is not None and cached is None:
                sums |= text_sums(plan, images, captions, heads["logit_scale"], batch)
            elif captions is not None and cached is not None:
                # A linear stand-in with the gradient of the whole batch's softmax; its value is not the loss.
                sums |= {
                    i: jnp.vdot(cached.images[i], u) + jnp.vdot(cached.captions[i], captions) + cached.log_scale[i] * heads["logit_scale"]
                    for i, u in images.items()
                }
        total = sum((factors[i] * s for i, s in sums.items()), jnp.zeros(()))
        return total, sums

    return loss
