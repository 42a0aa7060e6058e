"""Predictions of the terms of an objective from the features of their passes. Calls of a decoder or
a pooling with inputs of equal shape are made together. No method has code of its own here.

Shapes: B images, R rows of a pass (B, or B / 2 of a batch in halves), N patches, K visible ones, D
encoder width, W decoder width. Terms are named by their index in `plan.terms`."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax.models import captioner, decoder, heads, m3i, pooling, text
from m3i_jax.objective import mixing, positions
from m3i_jax.objective.caption_posterior import CaptionSoftmax
from m3i_jax.objective.derived_terms import linear_name, predicts_visible
from m3i_jax.objective.entropy_terms import EntropyTerm
from m3i_jax.objective.terms import (
    IMAGE_FEATURE,
    ClusterHead,
    DecoderHead,
    LinearHead,
    Pass,
    PooledHead,
    ProjectionHead,
    Term,
)
from m3i_jax.training.plan import Plan, TargetKey
from m3i_jax.training.targets import TargetFeatures, pool_tokens
from m3i_jax.training.views import (
    Batch,
    Inputs,
    PassInputs,
    parallel_captions,
    stack_rows,
    unstack_rows,
)

Arrays = dict[int, jax.Array]  # {term index: array}
Features = dict[Pass, jax.Array]
# Inputs of heads by the terms that read them: (tokens, cells, queries, cls or None) of a decoder,
# one array of others.
HeadInputs = dict[tuple[int, ...], tuple[Any, ...]]


def predicts_hidden_only(term: Term) -> bool:
    """Returns whether a term predicts only the cells that its input hides."""
    return isinstance(term.head, DecoderHead | ProjectionHead) and term.head.queries == "hidden"


def predicts_blocks(term: Term) -> bool:
    """Returns whether a term predicts each target block of a multi-block mask by itself."""
    return isinstance(term.head, DecoderHead) and term.head.queries == "blocks"


def query_cells(term: Term, inputs: PassInputs) -> jax.Array | None:
    """Returns the cells [R, H] that a term predicts, those of target blocks one after the other;
    None: all cells."""
    if predicts_hidden_only(term):
        return inputs.hidden_cells(term.image)
    if predicts_blocks(term):
        assert inputs.blocks is not None
        return inputs.blocks.reshape(inputs.blocks.shape[0], -1)
    if predicts_visible(term):
        return inputs.cells(term.image) if term.reads.mixed else inputs.own
    return None


def visible_tokens(
    plan: Plan, term: Term | EntropyTerm, z: Features, inputs: Inputs
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns (tokens [R, K, D] that show the term's image, their cells [R, K], cls [R, D] or
    None)."""
    z_RxTxD, read = z[term.reads], inputs[term.reads]
    first = int(plan.config.model.encoder.cls_token)
    cls, z_RxTxD = (z_RxTxD[:, 0] if first else None), z_RxTxD[:, first:]
    if term.reads.mixed and not (isinstance(term.head, PooledHead) and term.head.everything):
        cells = read.cells(term.image)
        return mixing.gather(z_RxTxD, cells), cells, cls
    if term.reads.masked and not term.reads.mask_tokens:
        return z_RxTxD, read.own, cls
    return z_RxTxD, jnp.broadcast_to(jnp.arange(z_RxTxD.shape[1]), z_RxTxD.shape[:2]), cls


def group_by_shape(keys: dict[Any, tuple[Any, ...]]) -> list[list[Any]]:
    """Lists of keys whose arrays have equal shapes, and which can share a call."""
    groups: dict[Any, list[Any]] = {}
    for key, arrays in keys.items():
        groups.setdefault(tuple(a if a is None else a.shape for a in arrays), []).append(key)
    return list(groups.values())


def _queries(plan: Plan, params: Any, term: Term, inputs: PassInputs) -> jax.Array:
    """Decoder queries [R, N, W] of a term, or [R, H, W] of the cells that it predicts."""
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
    cells = query_cells(term, inputs)
    return queries if cells is None else mixing.gather(queries, cells)


def decoder_inputs(
    plan: Plan, params: Any, z: Features, inputs: Inputs, indices: tuple[int, ...]
) -> dict[int, tuple[Any, ...]]:
    """Returns {term: (tokens, cells, queries, cls or None)} of those terms that have a decoder."""
    out = {}
    for i in indices:
        term = plan.terms[i]
        if isinstance(term.head, DecoderHead):
            tokens, cells, cls = visible_tokens(plan, term, z, inputs)
            queries = _queries(plan, params, term, inputs[term.reads])
            cls = cls if plan.reads_cls(term) else None
            if predicts_blocks(term):  # a row for each block, which sees no other
                count = plan.config.data.mask_blocks
                queries = queries.reshape(-1, queries.shape[1] // count, queries.shape[2])
                tokens, cells = (jnp.repeat(x, count, 0) for x in (tokens, cells))
                cls = None if cls is None else jnp.repeat(cls, count, 0)
            out[i] = (tokens, cells, queries, cls)
    return out


def _decode(plan: Plan, params: Any, arguments: dict[int, tuple[Any, ...]]) -> Arrays:
    """Predictions of terms with a decoder by one call of it, and by one head for targets of one
    kind."""
    model, tree = plan.config.model, params.get("decoder")
    group, out = list(arguments), Arrays()
    tokens, cells, queries = (stack_rows([arguments[i][k] for i in group]) for k in range(3))
    no_cls = arguments[group[0]][3] is None
    cls = None if no_cls else stack_rows([arguments[i][3] for i in group])
    with jax.named_scope("decoder"):
        decoded = decoder.apply(
            model, tree, tokens, cells, queries, grid=plan.config.grid, cls_BxD=cls
        )
    kinds = {_output(plan.terms[i]) for i in group}
    if len(kinds) == 1:
        rows = _head_rows(plan, params, decoded, *kinds)
        out |= dict(zip(group, unstack_rows(rows, len(group)), strict=True))
    else:
        for i, rows in zip(group, unstack_rows(decoded, len(group)), strict=True):
            out[i] = _head_rows(plan, params, rows, _output(plan.terms[i]))
    for i, x in out.items():
        if predicts_blocks(plan.terms[i]):  # the blocks of an image side by side again
            out[i] = x.reshape(-1, plan.config.data.mask_blocks * x.shape[1], x.shape[2])
    return out


def _output(term: Term) -> tuple[str, str]:
    """(kind of the targets that a decoder predicts, name of their clusters)."""
    assert isinstance(term.head, DecoderHead)
    return term.target.of, term.head.clusters


def _head_rows(
    plan: Plan, params: Any, rows_RxNxW: jax.Array, output: tuple[str, str]
) -> jax.Array:
    """The predictions of a decoder from its rows: features, pixels, or similarities to the
    prototypes of clusters."""
    model, (of, clusters) = plan.config.model, output
    if not clusters:
        return decoder.prediction_head(model, params["decoder"], rows_RxNxW, of)
    space = ProjectionHead(name=clusters, prototypes="scaled")
    return heads.prototype_logits(model, params["heads"][clusters], space, rows_RxNxW)


def predict_clusters(
    plan: Plan, params: Any, targets: TargetFeatures, indices: tuple[int, ...]
) -> Arrays:
    """Returns logits [B, N, K] of those of these terms whose head clusters the target encoder's
    tokens."""
    out: Arrays = {}
    for i in clustering_terms(plan, indices):
        tokens, tree = targets[TargetKey(plan.terms[i].target, None)], params["heads"]
        name = plan.terms[i].head.name  # type: ignore[union-attr]
        out[i] = heads.cluster_logits(plan.config.model, tree[name], tokens)
    return out


def clustering_terms(plan: Plan, indices: tuple[int, ...]) -> list[int]:
    """Returns those of these terms that `predict_clusters` predicts."""
    return _with_head(plan, ClusterHead, indices)


def head_inputs(
    plan: Plan, params: Any, z: Features, inputs: Inputs, indices: tuple[int, ...]
) -> HeadInputs:
    """Returns what the heads of these image terms read of the features. Terms that project the same
    features read one array."""
    decoded = decoder_inputs(plan, params, z, inputs, indices)
    out: HeadInputs = {(i,): arrays for i, arrays in decoded.items()}
    linear: dict[Any, list[int]] = {}
    for i in _with_head(plan, LinearHead, indices):
        term = plan.terms[i]
        linear.setdefault((term.reads, term.image, linear_name(term)), []).append(i)
    for group in linear.values():
        term = plan.terms[group[0]]
        tokens, _, cls = visible_tokens(plan, term, z, inputs)
        pooled = term.target.of == "pooled"
        out[tuple(group)] = (pool_tokens(IMAGE_FEATURE, tokens, cls) if pooled else tokens,)
    users: dict[Any, list[int]] = {}
    for i in _with_head(plan, ProjectionHead, indices):
        term = plan.terms[i]
        users.setdefault((term.reads, term.image, term.head), []).append(i)
    for (read, image, head), group in users.items():
        tokens, _, cls = visible_tokens(plan, plan.terms[group[0]], z, inputs)
        if predicts_hidden_only(plan.terms[group[0]]):
            tokens = mixing.gather(tokens, inputs[read].hidden_cells(image))
        out[tuple(group)] = (pool_tokens(head, tokens, cls),)
    return out


def image_calls(plan: Plan, given: HeadInputs) -> list[tuple[tuple[int, ...], ...]]:
    """Returns the calls of heads on these inputs, or on their shapes: of each, the terms by input.
    `predict_images` makes them and `plan_table` lists them.

    Inputs of equal shape go through a decoder together; so they do through a projection to
    prototypes, which has no batch norm."""
    calls: dict[Any, list[tuple[int, ...]]] = {}
    for group, arrays in given.items():
        head = plan.terms[group[0]].head
        shapes = tuple(None if array is None else array.shape for array in arrays)
        together: Any = group
        if isinstance(head, DecoderHead):
            together = DecoderHead, shapes
        elif isinstance(head, ProjectionHead) and head.prototypes:
            together = head, shapes
        calls.setdefault(together, []).append(group)
    return [tuple(call) for call in calls.values()]


def predict_images(
    plan: Plan, params: Any, z: Features, inputs: Inputs, indices: tuple[int, ...]
) -> Arrays:
    """Returns predictions of these image terms: [R, N, D] of dense ones at the positions of their
    target view, [R, D] of pooled ones."""
    given, out = head_inputs(plan, params, z, inputs, indices), Arrays()
    for call in image_calls(plan, given):
        term = plan.terms[call[0][0]]
        if isinstance(term.head, DecoderHead):
            out |= _decode(plan, params, {i: given[(i,)] for (i,) in call})
        elif isinstance(term.head, LinearHead):
            tree, (tokens,) = params["heads"][linear_name(term)], given[call[0]]
            out |= dict.fromkeys(call[0], heads.apply_linear(plan.config.model, tree, tokens))
        elif isinstance(term.head, ProjectionHead):
            rows = _project(plan, params, term.head, [given[group][0] for group in call])
            for group, x in zip(call, rows, strict=True):
                out |= dict.fromkeys(group, x)
    return out


def _project(
    plan: Plan, params: Any, head: ProjectionHead, pooled: list[jax.Array]
) -> list[jax.Array]:
    """Projections of features of equal shape, by one call."""
    tree = params.get("heads", {}).get(head.name, {})
    x = pooled[0] if len(pooled) == 1 else stack_rows(pooled)
    y = heads.apply_predictor(plan.config.model, tree, head, x)
    return [y] if len(pooled) == 1 else unstack_rows(y, len(pooled))


def _with_head(plan: Plan, kind: type, indices: Iterable[int]) -> list[int]:
    return [i for i in indices if isinstance(plan.terms[i].head, kind)]


def pooled_terms(plan: Plan) -> list[int]:
    """Returns indices of the terms whose features `pool_images` pools."""
    return _with_head(plan, PooledHead, range(len(plan.terms)))


def pool_key(term: Term) -> Any:
    """Returns (pass, image, whether all tokens are pooled): annotation terms with equal keys read
    one pooled vector."""
    everything = isinstance(term.head, PooledHead) and term.head.everything
    return term.reads, "own" if everything else term.image, everything


def pool_images(plan: Plan, params: Any, z: Features, inputs: Inputs) -> dict[Any, jax.Array]:
    """Returns pooled features [R, pool width] by `pool_key` of every annotation term, each once."""
    terms = [plan.terms[i] for i in pooled_terms(plan)]
    arguments = {pool_key(t): visible_tokens(plan, t, z, inputs) for t in terms}
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
    """Returns image embeddings [R, E] of every text term, and the text embeddings [B, E] of the
    batch's captions, each encoded once; ({}, None) without text terms."""
    indices = plan.where("text")
    if not indices:
        return {}, None
    images = {
        i: m3i.image_embedding(plan.config, params, vectors[pool_key(plan.terms[i])])
        for i in indices
    }
    with jax.named_scope("text"):
        return images, encode_captions(plan, params, batch)


def encode_captions(plan: Plan, params: Any, batch: Batch) -> jax.Array:
    """Returns embeddings [B, E] of the captions of a batch."""
    return text.apply(plan.config.model, params["text"], batch["tokens"], batch["length"])


def caption_rows(term: Term, inputs: PassInputs) -> tuple[jax.Array, jax.Array, Any]:
    """Returns (tokens [R, L], their number [R], how many of them are given, [R] or 1) of a caption,
    or of the text of an object."""
    rows = inputs.rows[term.image]
    if term.target.of == "caption":
        return rows["tokens"], rows["length"], 1
    task = ("box", "region").index(term.target.of)
    return rows["regions"][:, task], rows["region_length"][:, task], rows["region_given"][:, task]


def parallel_rows(plan: Plan, term: Term, inputs: PassInputs) -> jax.Array | None:
    """Returns which captions of a term are predicted at once, bool [R]; None: none."""
    assert isinstance(term.posterior, CaptionSoftmax)
    position = inputs.rows[term.image]["position"]
    return parallel_captions(plan.config, position, term.posterior.parallel)


def caption_logits(
    plan: Plan, params: Any, z: Features, inputs: Inputs, indices: tuple[int, ...]
) -> Arrays:
    """Returns logits [R, L - 1, V] of these caption terms; inputs of equal shape share a call."""
    arguments: dict[int, tuple[Any, ...]] = {}
    for i in indices:
        term, read = plan.terms[i], inputs[plan.terms[i].reads]
        tokens = caption_rows(term, read)[0]
        memory = visible_tokens(plan, term, z, inputs)[0]
        arguments[i] = tokens, memory, parallel_rows(plan, term, read)
    out: Arrays = {}
    for group in group_by_shape(arguments):
        tokens, memory = (stack_rows([arguments[i][k] for i in group]) for k in range(2))
        every = [arguments[i][2] for i in group]
        parallel = None if every[0] is None else stack_rows(every)
        logits = captioner.apply(plan.config.model, params["captioner"], tokens, memory, parallel)
        out |= dict(zip(group, unstack_rows(logits, len(group)), strict=True))
    return out
