"""The plan of a step as a table: every call of an encoder, a decoder or a head once, the terms that
use it, and its FLOPs. Which calls there are is what the step itself asks: `views.encoder_calls`,
`Plan.target_passes`, `predictions.image_calls`; a row counts the function that the step calls."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from m3i_jax.models import backbones
from m3i_jax.objective.caption_posterior import CAPTIONS, CaptionHead
from m3i_jax.objective.derived_terms import SMALL
from m3i_jax.objective.entropy_terms import EntropyTerm
from m3i_jax.objective.terms import (
    IMAGE_TARGETS,
    ClusterHead,
    DecoderHead,
    Pass,
    PooledHead,
    Term,
)
from m3i_jax.training import entropy_losses, predictions, targets, teachers, views
from m3i_jax.training.plan import Plan, TargetKey, target_pass

PlanRow = Sequence[str]
# (function, *arguments) -> an object with `.total`: profiling.flops.count_flops, which this
# folder may not import
Count = Callable[..., Any]
HEADERS_TERMS = ("term", "encoder reads", "image", "predicts", "by", "posterior", "group")
HEADERS_CALLS = ("call", "reads", "used by", "GFLOP an image, forward")


def describe_pass(read: Pass, drops: bool = True) -> str:
    """Returns what an encoder pass reads. `drops`: whether the backbone drops hidden cells;
    otherwise it reads mask tokens there.

    >>> describe_pass(Pass(mixed=True)), describe_pass(Pass(view=1, masked=True))
    ('view 0 mixed with the partner', 'view 1, own cells')
    """
    if read.mixed:
        shown = " mixed with the partner"
    elif read.blended:
        shown = " blended with the partner"
    elif read.mask_tokens:
        shown = ", hidden cells as mask tokens"
    elif read.masked:
        shown = ", own cells" + ("" if drops else ", the others as mask tokens")
    else:
        shown = ""
    return f"view {read.view}{shown}"


def describe_target(term: Term) -> str:
    """Returns what a term predicts."""
    t = term.target
    if t.view is None:
        return t.of
    if isinstance(term.space, ClusterHead):
        of_same = "" if isinstance(term.head, ClusterHead) else ", hidden cells"
        return f"assignment of EMA dense features of view {t.view}{of_same}"
    whose = {
        "identity": "",
        "ema": "EMA ",
        "shared": "shared ",
        "online": "online ",
        "frozen": "frozen ",
        "snapshot": "earlier EMA ",
    }.get(t.encoder, f"{t.encoder}'s ")
    what = {"pixels": "pixels", "tokens": "dense features", "pooled": "global feature"}[t.of]
    large = f" enlarged {t.enlarge} times" if t.enlarge > 1 else ""
    averaged = f", mean of {t.blocks} blocks" if t.blocks > 1 else ""
    views = ", ".join(map(str, (t.view, *t.others)))
    return f"{whose}{what} of view {views}{large}{averaged}" + (
        ", hidden cells"
        if term.hidden or predictions.predicts_hidden_only(term)
        else ", each target block by itself"
        if predictions.predicts_blocks(term)
        else ""
    )


def describe_posterior(term: Term) -> str:
    more = ", second moment" if getattr(term.posterior, "second_moment", False) else ""
    if share := getattr(term.posterior, "parallel", 0.0):
        more = f", {share:.0%} of the captions at once"
    return type(term.posterior).__name__ + more


def describe_space(term: EntropyTerm) -> str:
    """Returns the features that an entropy term reads.

    >>> from m3i_jax.objective.entropy_terms import Koleo
    >>> describe_space(EntropyTerm(name="koleo", estimator=Koleo()))
    'cls'
    """
    what = {"cls": "cls", "mean": "mean of the tokens", "none": "every token"}[term.head.pool]
    return what + ("" if term.head.projector is None else f" in the projection {term.head.name}")


def describe_head(term: Term) -> str:
    if isinstance(term.head, PooledHead):
        return "pool of all tokens" if term.head.everything else "pool"
    if isinstance(term.head, CaptionHead):
        return "caption decoder"
    return type(term.head).__name__.lower()


def term_rows(plan: Plan) -> list[PlanRow]:
    """Returns one row a term."""
    drops = backbones.get_backbone(plan.config.model).can_drop_tokens
    rows: list[PlanRow] = [
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
    rows += [
        (
            f"loss/{e.name}",
            describe_pass(e.reads, drops),
            e.image,
            "entropy",
            describe_space(e),
            type(e.estimator).__name__,
            e.group,
        )
        for e in plan.entropy_terms
    ]
    return rows


class _CallTable:
    """The rows of `call_rows`. count: the products of a call; images: of the batch."""

    def __init__(self, plan: Plan, images: int, count: Count) -> None:
        self.plan, self.images, self.count = plan, images, count
        self.drops = backbones.get_backbone(plan.config.model).can_drop_tokens
        self.rows: list[PlanRow] = []
        self._terms: list[Term | EntropyTerm] = [*plan.terms, *plan.entropy_terms]

    def add(
        self,
        call: str,
        reads: str,
        indices: Iterable[int],
        function: Callable[..., Any],
        *arguments: Any,
    ) -> None:
        """Add the row of a call that terms of these indices share."""
        users = ", ".join(dict.fromkeys(self._terms[i].name for i in indices))
        gflop = self.count(function, *arguments).total / self.images / 1e9
        self.rows.append((call, reads, users, f"{gflop:,.4g}"))

    def reads(self, index: int) -> str:
        """What a term reads."""
        return describe_pass(self._terms[index].reads, self.drops)


def call_rows(plan: Plan, params: Any, batch: Any, count: Count) -> list[PlanRow]:
    """Returns one row a call, with its forward matrix products in GFLOP an image. `params` and
    `batch` may be shapes."""
    table = _CallTable(plan, jax.tree.leaves(batch)[0].shape[0], count)
    inputs, patches = jax.eval_shape(
        lambda b: (
            views.pass_inputs(plan.config, plan.passes, b),
            views.augmented_patches(plan.config, b, plan.views, exact=plan.exact),
        ),
        batch,
    )
    z, of_targets = _add_encoders(table, params, inputs, patches)
    _add_image_heads(table, params, z, of_targets, inputs)
    _add_other_heads(table, params, z, inputs, batch)
    return table.rows


def _add_encoders(table: _CallTable, params: Any, inputs: Any, patches: Any) -> tuple[Any, Any]:
    """The online encoder and the target encoders. Returns the features of all passes."""
    plan, config = table.plan, table.plan.config
    encode_passes = functools.partial(views.encode_passes, config)
    for passes in views.encoder_calls(config, plan.passes):
        users = [i for i, t in enumerate(plan.terms) if set(passes) & set(t.passes)]
        together = {read: inputs[read] for read in passes}
        shown = describe_pass(passes[0], table.drops)
        if passes[0].view >= SMALL:
            size = config.view_size(passes[0].view)
            shown = f"{len(passes)} small views of {size} pixels"
        table.add("encoder", shown, users, encode_passes, together, patches, params["encoder"])
    of_targets: dict[Any, Any] = {}
    names = {"ema": "EMA target", "snapshot": "earlier EMA target"}
    for target in plan.target_passes:
        users = [
            i
            for i in plan.where(*IMAGE_TARGETS)
            if plan.terms[i].target.learned and target_pass(plan.terms[i].target) == target
        ]
        tree, shown = params["encoder"], f"view {target.view}"
        name = names.get(target.encoder, f"{target.encoder} target")
        if target.encoder.startswith("teacher"):
            tree = teachers.teacher_shapes(config.objective.teachers)[target.encoder]
            name = target.encoder
        shown += f", enlarged {target.enlarge} times" if target.enlarge > 1 else ""
        encode = functools.partial(targets.encode_target, plan, target)
        table.add(name, shown, users, encode, tree, patches[target.view])
        of_targets[target] = jax.eval_shape(encode, tree, patches[target.view])
    return jax.eval_shape(encode_passes, inputs, patches, params["encoder"]), of_targets


def _add_image_heads(table: _CallTable, params: Any, z: Any, of_targets: Any, inputs: Any) -> None:
    """Predictions of image targets: decoder, linear heads, projections and clusters."""
    plan, images = table.plan, table.plan.where(*IMAGE_TARGETS)
    inputs_of = functools.partial(predictions.head_inputs, plan, indices=images)
    calls = predictions.image_calls(plan, jax.eval_shape(inputs_of, params, z, inputs))
    listed: dict[int, tuple[Any, ...]] = {}  # by their first term, after the decoder
    for call in calls:
        terms = tuple(users[0] for users in call)
        if isinstance(plan.terms[terms[0]].head, DecoderHead):
            reads = ", ".join(dict.fromkeys(table.reads(i) for i in terms))
            reads = f"{len(terms)} x {reads}" if len(terms) > 1 else reads
            predict = functools.partial(predictions.predict_images, plan, indices=terms)
            table.add("decoder", reads, terms, predict, params, z, inputs)
            continue
        for users in call:  # a row for each input
            predict = functools.partial(predictions.predict_images, plan, indices=users[:1])
            name, shown = describe_head(plan.terms[users[0]]), table.reads(users[0])
            listed[users[0]] = (name, shown, users, predict, params, z, inputs)
    for i in predictions.clustering_terms(plan, images):
        term = plan.terms[i]
        cluster = functools.partial(predictions.predict_clusters, plan, indices=(i,))
        features = jax.eval_shape(
            functools.partial(targets.project_target, plan, None, None),
            of_targets[target_pass(term.target)],
        )
        given = {TargetKey(term.target, None): features}
        listed[i] = ("clusters", describe_target(term), (i,), cluster, params, given)
    for i in sorted(listed):
        table.add(*listed[i])


def _add_other_heads(table: _CallTable, params: Any, z: Any, inputs: Any, batch: Any) -> None:
    """Predictions of annotations, and the features of entropy terms."""
    plan = table.plan
    if pooled := predictions.pooled_terms(plan):
        pool = functools.partial(predictions.pool_images, plan)
        table.add("pool", "own tokens of each image", pooled, pool, params, z, inputs)
    if captions := plan.where(*CAPTIONS):
        decode = functools.partial(predictions.caption_logits, plan, indices=captions)
        shown = table.reads(captions[0])
        table.add("caption decoder", shown, captions, decode, params, z, inputs)
    heads = {name: part for name, part in params.items() if name != "encoder"}
    entropies = plan.numbered_entropies()
    read_features = functools.partial(entropy_losses.entropy_features, plan)
    features = jax.eval_shape(read_features, heads, z, inputs) if entropies else {}
    for i, term in entropies.items():
        cost = functools.partial(entropy_losses.entropy_cost, plan, term)
        shown = f"{describe_space(term)} of {table.reads(i)}"
        table.add("entropy", shown, (i,), cost, features[i], batch)
    if captions := plan.where("text"):
        encode = functools.partial(predictions.encode_captions, plan)
        table.add("text tower", "captions", captions, encode, params, batch)
