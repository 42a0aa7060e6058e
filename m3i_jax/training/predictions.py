"""What the terms of an objective predict from the features of their passes. Calls of a decoder or a
pooling with inputs of equal shape are made together. No method has code of its own here.

Shapes: B images, R rows of a pass (B, or B / 2 of a batch in halves), N patches, K visible ones, D
encoder width, W decoder width. Terms are named by their index in `plan.terms`."""

from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax.models import decoder, heads, m3i, pooling, text
from m3i_jax.objective import mixing, positions
from m3i_jax.objective.entropy_terms import EntropyTerm
from m3i_jax.objective.terms import DecoderHead, LinearHead, Pass, PooledHead, ProjectionHead, Term
from m3i_jax.training.plan import Plan
from m3i_jax.training.targets import pool_tokens, stack_rows, unstack_rows
from m3i_jax.training.views import Batch, Inputs, PassInputs

Arrays = dict[int, jax.Array]  # {term index: array}
Features = dict[Pass, jax.Array]


def predicts_hidden_only(term: Term) -> bool:
    """Whether a term predicts only the cells that its input hides."""
    return isinstance(term.head, DecoderHead) and term.head.queries == "hidden"


def visible_tokens(
    plan: Plan, term: Term | EntropyTerm, z: Features, inputs: Inputs
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(tokens [R, K, D] that show the term's image, their cells [R, K], cls [R, D] or None)."""
    z_RxTxD, read = z[term.reads], inputs[term.reads]
    first = int(plan.config.model.encoder.cls_token)
    cls, z_RxTxD = (z_RxTxD[:, 0] if first else None), z_RxTxD[:, first:]
    if term.reads.mixed and not (isinstance(term.head, PooledHead) and term.head.everything):
        cells = read.cells(term.image)
        return mixing.gather(z_RxTxD, cells), cells, cls
    if term.reads.masked and not term.reads.mask_tokens:
        return z_RxTxD, read.own, cls
    return z_RxTxD, jnp.broadcast_to(jnp.arange(plan.config.tokens), z_RxTxD.shape[:2]), cls


def group_by_shape(keys: dict[Any, tuple[Any, ...]]) -> list[list[Any]]:
    """Lists of keys whose arrays have equal shapes, and which can share a call."""
    groups: dict[Any, list[Any]] = {}
    for key, arrays in keys.items():
        groups.setdefault(tuple(a if a is None else a.shape for a in arrays), []).append(key)
    return list(groups.values())


def _queries(plan: Plan, params: Any, term: Term, inputs: PassInputs) -> jax.Array:
    """Decoder queries [R, N, W] of a term, or [R, H, W] of hidden cells."""
    config, width = plan.config, plan.config.model.decoder.width
    x, y, rows = term.reads.view, term.target.view, inputs.rows[term.image]
    if x == y:  # the same for every image: one row of N queries instead of R
        raw = jnp.asarray(positions.same_view_positions(config.grid, width))
        queries = decoder.decoder_queries(config.model, params["decoder"], raw)
        queries = jnp.broadcast_to(queries, (inputs.mask.shape[0], *queries.shape[-2:]))
    else:
        assert y is not None
        box, flip = rows["box"], rows["flip"]
        raw = positions.relative_positions(
            box[:, x], flip[:, x], box[:, y], flip[:, y], grid=config.grid, width=width
        )
        queries = decoder.decoder_queries(config.model, params["decoder"], raw)
    if predicts_hidden_only(term):
        return mixing.gather(queries, inputs.hidden_cells(term.image))
    return queries


def decoder_inputs(
    plan: Plan, params: Any, z: Features, inputs: Inputs, indices: tuple[int, ...]
) -> dict[int, tuple[Any, ...]]:
    """{term: (tokens, cells, queries, cls or None)} of those terms that have a decoder."""
    out = {}
    for i in indices:
        term = plan.terms[i]
        if isinstance(term.head, DecoderHead):
            tokens, cells, cls = visible_tokens(plan, term, z, inputs)
            queries = _queries(plan, params, term, inputs[term.reads])
            out[i] = (tokens, cells, queries, cls if plan.reads_cls(term) else None)
    return out


def _decode(plan: Plan, params: Any, arguments: dict[int, tuple[Any, ...]]) -> Arrays:
    """Predictions of the terms with a decoder: one call for inputs of equal shape, one head for
    targets of one kind."""
    model, tree = plan.config.model, params.get("decoder")
    out: Arrays = {}
    for group in group_by_shape(arguments):
        tokens, cells, queries = (stack_rows([arguments[i][k] for i in group]) for k in range(3))
        no_cls = arguments[group[0]][3] is None
        cls = None if no_cls else stack_rows([arguments[i][3] for i in group])
        decoded = decoder.apply(
            model, tree, tokens, cells, queries, grid=plan.config.grid, cls_BxD=cls
        )
        kinds = {plan.terms[i].target.of for i in group}
        if len(kinds) == 1:
            rows = decoder.prediction_head(model, tree, decoded, *kinds)
            out |= dict(zip(group, unstack_rows(rows, len(group)), strict=True))
        else:
            for i, rows in zip(group, unstack_rows(decoded, len(group)), strict=True):
                out[i] = decoder.prediction_head(model, tree, rows, plan.terms[i].target.of)
    return out


def predict_images(
    plan: Plan, params: Any, z: Features, inputs: Inputs, indices: tuple[int, ...]
) -> Arrays:
    """Predictions of these image terms: [R, N, D] of dense ones at the positions of their target
    view, [R, D] of pooled ones."""
    model = plan.config.model
    out = _decode(plan, params, decoder_inputs(plan, params, z, inputs, indices))
    for i in indices:
        term = plan.terms[i]
        if isinstance(term.head, LinearHead):
            tree = params["heads"][f"linear_{term.target.of}"]
            out[i] = heads.apply_linear(model, tree, visible_tokens(plan, term, z, inputs)[0])
        elif isinstance(term.head, ProjectionHead):
            tokens, _, cls = visible_tokens(plan, term, z, inputs)
            tree = params["heads"].get(term.head.name, {})
            pooled = pool_tokens(term.head, tokens, cls)
            out[i] = heads.apply_predictor(model, tree, term.head, pooled)
    return out


def pool_key(term: Term) -> Any:
    """(pass, image, whether all tokens are pooled): annotation terms with equal keys read one
    pooled vector."""
    everything = isinstance(term.head, PooledHead) and term.head.everything
    return term.reads, "own" if everything else term.image, everything


def pool_images(plan: Plan, params: Any, z: Features, inputs: Inputs) -> dict[Any, jax.Array]:
    """Pooled features [R, pool width] by `pool_key` of every annotation term, each once."""
    arguments = {
        pool_key(t): visible_tokens(plan, t, z, inputs)
        for t in plan.terms
        if isinstance(t.head, PooledHead)
    }
    out: dict[Any, jax.Array] = {}
    for group in group_by_shape(arguments):
        tokens = stack_rows([arguments[key][0] for key in group])
        every = [arguments[key][2] for key in group]
        cls = None if every[0] is None else stack_rows(every)  # type: ignore[arg-type]
        pooled = pooling.apply(plan.config.model, params.get("pool", {}), tokens, cls_BxD=cls)
        out |= dict(zip(group, unstack_rows(pooled, len(group)), strict=True))
    return out


def contrastive_embeddings(
    plan: Plan, params: Any, vectors: dict[Any, jax.Array], batch: Batch
) -> tuple[Arrays, jax.Array | None]:
    """Image embeddings [R, E] of every text term, and the text embeddings [B, E] of the batch's
    captions, each encoded once; ({}, None) without text terms."""
    indices = plan.where("text")
    if not indices:
        return {}, None
    images = {
        i: m3i.image_embedding(plan.config, params, vectors[pool_key(plan.terms[i])])
        for i in indices
    }
    captions = text.apply(plan.config.model, params["text"], batch["tokens"], batch["length"])
    return images, captions
