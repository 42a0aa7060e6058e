"""The plan of a step as a table for people: every call of an encoder and of the decoder once, who asks for it, and what it costs."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax.models import backbones, m3i
from m3i_jax.objective.methods import Decoder, Pass, Pooled, Term
from m3i_jax.training import terms, views
from m3i_jax.training.plan import Plan, view

Row = Sequence[str]
Count = Callable[..., Any]  # (function, *arguments) -> something with `.total`; reporting.flops.count, which this room does not know
HEADERS_TERMS = ("term", "encoder reads", "image", "predicts", "by", "posterior", "group")
HEADERS_CALLS = ("call", "reads", "asked by", "GFLOP an image, forward")


def read_words(read: Pass, drops: bool = True) -> str:
    """What an encoder pass reads. `drops`: whether the backbone leaves cells out, or sees the mask token there.

    >>> read_words(Pass(mixed=True)), read_words(Pass(crop=1, masked=True))
    ('view 0 mixed with the partner', 'view 1, own cells')
    """
    how = (
        " mixed with the partner"
        if read.mixed
        else " blended with the partner"
        if read.blended
        else ", hidden cells as mask tokens"
        if read.filled
        else ", own cells" + ("" if drops else ", the others as mask tokens")
        if read.masked
        else ""
    )
    return f"view {read.crop}{how}"


def target_words(term: Term) -> str:
    """What a term predicts."""
    t = term.target
    if t.crop is None:
        return t.of
    whose = {"identity": "", "ema": "EMA ", "shared": "shared ", "online": "online ", "frozen": "frozen "}[t.encoder]
    what = {"pixels": "pixels", "tokens": "dense features", "pooled": "global feature"}[t.of]
    averaged = f", mean of {t.blocks} blocks" if t.blocks > 1 else ""
    return f"{whose}{what} of view {t.crop}{averaged}" + (", hidden cells" if term.hidden or terms.is_partial(term) else "")


def posterior_words(term: Term) -> str:
    more = ", second moment" if getattr(term.posterior, "second_moment", False) else ""
    return type(term.posterior).__name__ + more


def head_words(term: Term) -> str:
    if isinstance(term.head, Pooled):
        return "pool of all tokens" if term.head.everything else "pool"
    return type(term.head).__name__.lower()


def term_rows(plan: Plan) -> list[Row]:
    """One row a term."""
    drops = backbones.of(plan.config.model).drops
    return [
        (f"loss/{t.name}", read_words(t.reads, drops), t.image, target_words(t), head_words(t), posterior_words(t), t.group)
        for t in plan.terms
    ]


def call_rows(plan: Plan, params: Any, batch: Any, count: Count) -> list[Row]:
    """One row a call, with its forward matrix products in GFLOP an image. `params` and `batch` may be shapes."""
    config, images = plan.config, jax.tree.leaves(batch)[0].shape[0]
    rows: list[Row] = []
    drops = backbones.of(config.model).drops

    def add(call: str, reads: str, places: Iterable[int], function: Callable[..., Any], *arguments: Any) -> None:
        asked = ", ".join(dict.fromkeys(plan.terms[i].name for i in places))
        rows.append((call, reads, asked, f"{count(function, *arguments).total / images / 1e9:,.4g}"))

    def places(wanted: Callable[[Term], bool]) -> list[int]:
        return [i for i, t in enumerate(plan.terms) if wanted(t)]

    crops = jax.eval_shape(lambda b: views.patches(config, b, plan.crops, exact=plan.exact), batch)
    for read in plan.passes:
        users = [i for i, t in enumerate(plan.terms) if read in t.passes]
        add("encoder", read_words(read, drops), users, functools.partial(views.encode, config, (read,)), batch, crops, params["encoder"])
    for seen in plan.views:
        users = [i for i in plan.pictures if plan.terms[i].target.learned and view(plan.terms[i].target) == seen]
        encode = functools.partial(m3i.encode, config, blocks=min(seen.blocks, config.model.encoder.depth))
        name = {"ema": "EMA target", "frozen": "frozen target", "shared": "shared target"}[seen.encoder]
        add(name, f"view {seen.crop}", users, encode, params["encoder"], crops[seen.crop])
    z = jax.eval_shape(functools.partial(views.encode, config, plan.passes), batch, crops, params["encoder"])

    def predicted(group: Iterable[int]) -> Callable[..., Any]:
        return functools.partial(terms.predictions, plan, places=tuple(group))

    for group in decoder_groups(plan, params, z, batch):
        reads = ", ".join(dict.fromkeys(read_words(plan.terms[i].reads, drops) for i in group))
        add("decoder", f"{len(group)} x {reads}" if len(group) > 1 else reads, group, predicted(group), params, z, batch)
    for i in plan.pictures:
        if not isinstance(plan.terms[i].head, Decoder):
            add(head_words(plan.terms[i]), read_words(plan.terms[i].reads, drops), (i,), predicted((i,)), params, z, batch)
    if annotated := places(lambda t: isinstance(t.head, Pooled)):
        add("pool", "own tokens of each image", annotated, functools.partial(terms.pooled, plan), params, z, batch)
    if text := plan.where("text"):
        add("text tower", "captions", text, functools.partial(m3i.text_embedding, config), params, batch["tokens"], batch["length"])
    return rows


def decoder_groups(plan: Plan, params: Any, z: Any, batch: Any) -> list[list[int]]:
    """Places of the terms of each decoder call."""
    found: list[list[int]] = []

    def look(params: Any, z: Any, batch: Any) -> jax.Array:
        found.extend(terms.grouped(terms.decoder_inputs(plan, params, z, batch, plan.dense)))
        return jnp.zeros(())

    jax.eval_shape(look, params, z, batch)
    return found
