"""The plan of a step as a table for people: every call of an encoder and of the decoder once, who
asks for it, and what it costs."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax.models import backbones, m3i
from m3i_jax.objective.terms import DecoderHead, Pass, PooledHead, Term
from m3i_jax.training import term_losses, views
from m3i_jax.training.plan import Plan, target_pass

PlanRow = Sequence[str]
# (function, *arguments) -> something with `.total`; reporting.flops.count, which this room does not
# know
Count = Callable[..., Any]
HEADERS_TERMS = ("term", "encoder reads", "image", "predicts", "by", "posterior", "group")
HEADERS_CALLS = ("call", "reads", "asked by", "GFLOP an image, forward")


def describe_pass(read: Pass, drops: bool = True) -> str:
    """What an encoder pass reads. `drops`: whether the backbone leaves cells out, or sees the mask
    token there.

    >>> describe_pass(Pass(mixed=True)), describe_pass(Pass(crop=1, masked=True))
    ('view 0 mixed with the partner', 'view 1, own cells')
    """
    how = (
        " mixed with the partner"
        if read.mixed
        else (
            " blended with the partner"
            if read.blended
            else (
                ", hidden cells as mask tokens"
                if read.filled
                else (
                    ", own cells" + ("" if drops else ", the others as mask tokens")
                    if read.masked
                    else ""
                )
            )
        )
    )
    return f"view {read.crop}{how}"


def describe_target(term: Term) -> str:
    """What a term predicts."""
    t = term.target
    if t.crop is None:
        return t.of
    whose = {
        "identity": "",
        "ema": "EMA ",
        "shared": "shared ",
        "online": "online ",
        "frozen": "frozen ",
    }[t.encoder]
    what = {"pixels": "pixels", "tokens": "dense features", "pooled": "global feature"}[t.of]
    averaged = f", mean of {t.blocks} blocks" if t.blocks > 1 else ""
    return f"{whose}{what} of view {t.crop}{averaged}" + (
        ", hidden cells" if term.hidden or term_losses.predicts_hidden_only(term) else ""
    )


def describe_posterior(term: Term) -> str:
    more = ", second moment" if getattr(term.posterior, "second_moment", False) else ""
    return type(term.posterior).__name__ + more


def describe_head(term: Term) -> str:
    if isinstance(term.head, PooledHead):
        return "pool of all tokens" if term.head.everything else "pool"
    return type(term.head).__name__.lower()


def term_rows(plan: Plan) -> list[PlanRow]:
    """One row a term."""
    drops = backbones.get_backbone(plan.config.model).can_drop_tokens
    return [
        (
            f"loss/{t.name}",
            describe_pass(t.reads, drops),
            t.image,
            describe_target(t),
            describe_head(t),
            describe_posterior(t),
            t.group,
        )
        for t in plan.terms
    ]


def call_rows(plan: Plan, params: Any, batch: Any, count: Count) -> list[PlanRow]:
    """One row a call, with its forward matrix products in GFLOP an image. `params` and `batch` may
    be shapes."""
    config, images = plan.config, jax.tree.leaves(batch)[0].shape[0]
    rows: list[PlanRow] = []
    drops = backbones.get_backbone(config.model).can_drop_tokens

    def add(
        call: str, reads: str, places: Iterable[int], function: Callable[..., Any], *arguments: Any
    ) -> None:
        asked = ", ".join(dict.fromkeys(plan.terms[i].name for i in places))
        rows.append(
            (call, reads, asked, f"{count(function, *arguments).total / images / 1e9:,.4g}")
        )

    def places(wanted: Callable[[Term], bool]) -> list[int]:
        return [i for i, t in enumerate(plan.terms) if wanted(t)]

    crops = jax.eval_shape(
        lambda b: views.augmented_patches(config, b, plan.crops, exact=plan.exact), batch
    )
    for read in plan.passes:
        users = [i for i, t in enumerate(plan.terms) if read in t.passes]
        add(
            "encoder",
            describe_pass(read, drops),
            users,
            functools.partial(views.encode_passes, config, (read,)),
            batch,
            crops,
            params["encoder"],
        )
    for seen in plan.views:
        users = [
            i
            for i in plan.pictures
            if plan.terms[i].target.learned and target_pass(plan.terms[i].target) == seen
        ]
        encode = functools.partial(
            m3i.encode, config, blocks=min(seen.blocks, config.model.encoder.depth)
        )
        name = {"ema": "EMA target", "frozen": "frozen target", "shared": "shared target"}[
            seen.encoder
        ]
        add(name, f"view {seen.crop}", users, encode, params["encoder"], crops[seen.crop])
    z = jax.eval_shape(
        functools.partial(views.encode_passes, config, plan.passes), batch, crops, params["encoder"]
    )

    def predicted(group: Iterable[int]) -> Callable[..., Any]:
        return functools.partial(term_losses.predictions, plan, places=tuple(group))

    for group in decoder_groups(plan, params, z, batch):
        reads = ", ".join(dict.fromkeys(describe_pass(plan.terms[i].reads, drops) for i in group))
        add(
            "decoder",
            f"{len(group)} x {reads}" if len(group) > 1 else reads,
            group,
            predicted(group),
            params,
            z,
            batch,
        )
    for i in plan.pictures:
        if not isinstance(plan.terms[i].head, DecoderHead):
            add(
                describe_head(plan.terms[i]),
                describe_pass(plan.terms[i].reads, drops),
                (i,),
                predicted((i,)),
                params,
                z,
                batch,
            )
    if annotated := places(lambda t: isinstance(t.head, PooledHead)):
        add(
            "pool",
            "own tokens of each image",
            annotated,
            functools.partial(term_losses.pool_terms, plan),
            params,
            z,
            batch,
        )
    if text := plan.where("text"):
        add(
            "text tower",
            "captions",
            text,
            functools.partial(m3i.text_embedding, config),
            params,
            batch["tokens"],
            batch["length"],
        )
    return rows


def decoder_groups(plan: Plan, params: Any, z: Any, batch: Any) -> list[list[int]]:
    """Places of the terms of each decoder call."""
    found: list[list[int]] = []

    def look(params: Any, z: Any, batch: Any) -> jax.Array:
        found.extend(
            term_losses.group_by_shape(
                term_losses.decoder_inputs(plan, params, z, batch, plan.dense)
            )
        )
        return jnp.zeros(())

    jax.eval_shape(look, params, z, batch)
    return found
