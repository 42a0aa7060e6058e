"""The plan of a step: the terms of an objective (objective/terms.py, objective/entropy_terms.py)
and the calls that they share.
Every encoder pass, target pass and target is listed once. `build_plan` also refuses terms and
settings that contradict each other."""

import dataclasses
import math
from typing import Any, NamedTuple

from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.models import backbones
from m3i_jax.objective import derived_terms, entropy_terms, prototype_targets, registry
from m3i_jax.objective.caption_posterior import with_parallel_captions
from m3i_jax.objective.derived_terms import with_teachers
from m3i_jax.objective.entropy_terms import EntropyTerm, EntropyTerms
from m3i_jax.objective.terms import (
    ANNOTATIONS,
    DENSE_TARGETS,
    IMAGE_FEATURE,
    IMAGE_TARGETS,
    LETTERS,
    ClusterHead,
    DecoderHead,
    Pass,
    PooledHead,
    ProjectionHead,
    Target,
    Term,
    Terms,
)
from m3i_jax.training import teachers


class TargetPass(NamedTuple):
    """One call of a target encoder on a clean view, whose sides are `enlarge` times as long."""

    encoder: str
    view: int
    blocks: int
    enlarge: int = 1


class TargetKey(NamedTuple):
    """Names one array of target representations, which all terms with an equal key share."""

    target: Target
    # of the comparison: a ProjectionHead or ClusterHead, "decoder": its projector, None: features
    space: Any

    def __lt__(self, other: object) -> bool:
        # JAX sorts the keys of a dict, and spaces have no natural order
        return repr(self) < repr(other)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The terms of a run and its settings. `build_plan` makes it, once a run."""

    config: schema.Config
    terms: Terms
    entropy_terms: EntropyTerms = ()

    def numbered_entropies(self, group: str | None = None) -> dict[int, EntropyTerm]:
        """Returns {number: entropy term} of a group or of any; numbers go on after those of
        `terms`."""
        return {
            i: t
            for i, t in enumerate(self.entropy_terms, len(self.terms))
            if group in (None, t.group)
        }

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Calls of the online encoder."""
        return tuple(sorted({read for t in self.terms for read in t.passes}))

    @property
    def target_passes(self) -> tuple[TargetPass, ...]:
        """Calls of target encoders, which have no gradient."""
        passes = {
            target_pass(t.target)
            for t in self.terms
            if t.target.learned and t.target.encoder != "online"
        }
        return tuple(sorted(passes))

    @property
    def views(self) -> tuple[int, ...]:
        """Indices of the views of an image that any pass or target reads."""
        targets = {t.target.view for t in self.terms if t.target.view is not None}
        return tuple(sorted({p.view for p in self.passes} | targets))

    @property
    def projects_hidden(self) -> bool:
        """Whether a term projects hidden tokens alone."""
        heads = (t.head for t in self.terms)
        return any(isinstance(h, ProjectionHead) and h.queries == "hidden" for h in heads)

    @property
    def exact(self) -> bool:
        """Whether pixels are a target, and so are not rounded to the compute precision."""
        return any(t.target.of == "pixels" for t in self.terms)

    def where(self, *of: str, group: str | None = None) -> tuple[int, ...]:
        """Returns indices of the terms that predict one of these kinds of target, in a group or in
        any."""
        return tuple(
            i for i, t in enumerate(self.terms) if t.target.of in of and group in (None, t.group)
        )

    @property
    def dense(self) -> tuple[int, ...]:
        """Indices of the dense terms."""
        return self.where(*DENSE_TARGETS)

    def target_key(self, term: Term) -> TargetKey:
        """Returns the key of the representation that an image term predicts."""
        if isinstance(term.space, ClusterHead):
            return TargetKey(term.target, term.space)
        if isinstance(term.head, ProjectionHead):
            space = dataclasses.replace(term.head, predictor=None, match="position")
            return TargetKey(term.target, space)
        if term.target.of == "pooled":
            return TargetKey(term.target, IMAGE_FEATURE)
        projected = (
            term.target.of == "tokens"
            and isinstance(term.head, DecoderHead)
            and self.config.model.decoder.projector_depth
        )
        return TargetKey(term.target, "decoder" if projected else None)

    @property
    def target_keys(self) -> tuple[TargetKey, ...]:
        """Keys of all targets that can be computed before the online encoder runs."""
        fixed = [
            t for t in self.terms if t.target.of in IMAGE_TARGETS and t.target.encoder != "online"
        ]
        matched = [
            TargetKey(t.target, None)
            for t in fixed
            if isinstance(t.head, ClusterHead)
            or (isinstance(t.head, ProjectionHead) and t.head.match == "likeness")
        ]
        return tuple(dict.fromkeys([*(self.target_key(t) for t in fixed), *matched]))

    @property
    def image_feature(self) -> str:
        """The feature of an image that the objective trains, as of `evaluate.features`: attention,
        the pooling that annotations are predicted from; cls, if images are compared by it alone
        (DINO, MoCo v3); else mean, of the patch tokens."""
        if self.where("category", "text"):
            return "attention"
        of_linear = "cls" if self.config.model.encoder.cls_token else "mean"
        pools = {getattr(self.terms[i].head, "pool", of_linear) for i in self.where("pooled")}
        return "cls" if pools == {"cls"} else "mean"

    def reads_cls(self, term: Term) -> bool:
        """Returns whether the decoder of a term reads the cls token. With decoder.cls=auto it does
        not in a mixed input, where two images share it."""
        cls = self.config.model.decoder.cls
        return self.config.model.encoder.cls_token and (
            cls == "yes" or (cls == "auto" and not term.reads.mixed)
        )


def target_pass(target: Target) -> TargetPass:
    """Returns the call of a target encoder that computes a target."""
    assert target.view is not None
    return TargetPass(target.encoder, target.view, target.blocks, target.enlarge)


def terms_named(name: str, key: str = "config.objective.forms") -> entropy_terms.AnyTerms:
    """Returns the terms of one row: a form, its letter in the paper's Table 3, or a published
    method.

    Args:
      name: of the row.
      key: the setting that names it, for the error.

    Raises:
      UserError: an unknown name.

    >>> [t.name for t in terms_named("k")] == [t.name for t in terms_named("sim")]
    True
    """
    try:
        return registry.form(name)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from None


def terms_of(o: schema.Objective, small_views: int) -> tuple[Terms, EntropyTerms]:
    """Returns the prediction and the entropy terms of an objective, before those without data are
    dropped.

    Args:
      o: settings of the objective.
      small_views: number of the small views of an image.

    Raises:
      UserError: unknown forms, or forms that cannot be joined.

    >>> predictions, entropies = terms_of(schema.Objective(forms=("byol", "koleo")), 0)
    >>> len(predictions), [t.name for t in entropies]
    (2, ['koleo'])
    """
    if not o.forms:
        raise UserError("config.objective.forms: is empty; name at least one form, such as m3i")
    names = [LETTERS.get(name, name) for name in o.forms]
    if twice := [
        given for given, name in zip(o.forms, names, strict=True) if names.count(name) > 1
    ]:
        raise UserError(
            f"config.objective.forms: {twice[0]} and {twice[-1]} are the same objective; name it"
            " once"
        )
    named = {name: terms_named(name) for name in names}
    predictions = {
        name: with_parallel_captions(found, o.parallel_captions)
        for name in names
        if (found := entropy_terms.predictions_of(named[name]))
    }
    rows = derived_terms.uniquify(predictions)
    try:
        renamed = dict(zip(predictions, rows, strict=True))
        entropies = entropy_terms.join_entropies(named, renamed, small_views=small_views > 0)
    except ValueError as error:
        raise UserError(f"config.objective.forms: {error}") from None
    # an annotation term that `uniquify` renamed stays in its group
    second_group = o.second_group + tuple(
        new.name
        for before, after in zip(predictions.values(), rows, strict=True)
        for old, new in zip(before, after, strict=True)
        if old.name in o.second_group and old.target.of not in IMAGE_TARGETS
    )
    terms = derived_terms.merge(*rows, annotation_input=o.annotation_input)
    terms = prototype_targets.with_constraint(
        terms, constraint=o.prototype_targets, target_temperature=o.target_temperature
    )
    try:
        prototype_targets.prototype_terms(terms)
        terms = derived_terms.with_small_views(terms, small_views)
    except ValueError as error:
        raise UserError(f"config.objective.forms: {', '.join(o.forms)}: {error}") from None
    before = terms
    terms = derived_terms.with_options(
        terms,
        intra_positions=o.intra_positions,
        soft_label=o.soft_label,
        symmetric=o.symmetric,
        target_encoder=o.target_encoder,
        second_group=second_group,
    )
    now, then = (
        sum(t.weight for t in each if t.target.of in IMAGE_TARGETS) for each in (terms, before)
    )
    return terms, entropy_terms.entropies_with_options(
        entropy_terms.entropies_of_small_views(entropies, small_views),
        symmetric=o.symmetric,
        second_group=second_group,
        growth=now / (then or 1),
    )


class MissingAnnotations(UserError):
    """The data have no annotation that the objective predicts."""


def build_plan(config: schema.Config) -> Plan:
    """Returns the plan of a completed configuration (data.classes and data.captions known).

    Raises:
      UserError: unknown forms, or settings that contradict the terms.
      MissingAnnotations: forms without data.
    """
    backbones.validate_backbone(config)
    o, (terms, entropies) = config.objective, terms_of(config.objective, len(config.small_views))
    try:
        terms = derived_terms.drop_unavailable(
            terms,
            categories=config.data.classes > 0,
            captions=config.data.captions == "yes",
            regions=config.data.regions,
        )
    except ValueError as error:
        folder = config.data.source == "folder" and config.data.classes == 0
        raise MissingAnnotations(
            f"config.objective.forms: {', '.join(o.forms)}: {error}; choose another form or a"
            " source with categories or captions, or data.regions for boxes"
            + ("; a folder has categories from two sub-folders of images on" if folder else "")
        ) from None
    terms = with_teachers(terms, teachers.widths(o.teachers), weight=o.teacher_weight)
    plan = Plan(config, terms, entropies)
    _validate(plan)
    return plan


def entropy_group(config: schema.Config) -> int:
    """Returns the number of rows that a batch of an objective must be a multiple of: that of the
    groups of its entropy terms.

    >>> entropy_group(schema.Config(objective=schema.Objective(forms=("dinov2",))))
    64
    """
    if not config.traits.views:
        return 1
    _, entropies = terms_of(config.objective, len(config.small_views))
    groups = (getattr(t.estimator, "group", 0) or 1 for t in entropies)
    return math.lcm(*groups)


def _validate(plan: Plan) -> None:
    """Refuse settings that contradict the terms."""
    _validate_inputs(plan)
    _validate_targets(plan)
    _validate_cls(plan)
    _validate_backbone(plan)


def _validate_inputs(plan: Plan) -> None:
    """Of what the terms read."""
    config, terms = plan.config, plan.terms
    forms = ", ".join(config.objective.forms)
    annotations = [t for t in terms if t.target.of in ANNOTATIONS]
    if config.objective.annotation_input == "own" and any(
        t.reads.masked or t.reads.mixed for t in annotations
    ):
        raise UserError(
            "config.objective.annotation_input: 'own' gives the annotations of a set a view of"
            f" their own, and {forms} predicts them from its hidden or mixed input by itself; use"
            " shared, or a set such as objective.forms=sim,supervised"
        )
    if elsewhere := [t for t in terms if t.target.of in ("box", "region") and t.reads.view]:
        raise UserError(
            f"config.objective.forms: {forms}: the boxes of {elsewhere[0].name} are those of view"
            f" 0, and it reads view {elsewhere[0].reads.view}; name a row first that reads view 0"
        )
    if config.data.mask != "multi_block" and any(
        isinstance(t.head, DecoderHead) and t.head.queries == "blocks" for t in terms
    ):
        raise UserError(
            f"config.data.mask: {config.data.mask!r} has no target blocks, and {forms} predicts"
            " them; use multi_block"
        )
    for entropy_term in plan.entropy_terms:
        if entropy_term.reads not in plan.passes:
            raise UserError(
                f"config.objective.forms: {forms}: the entropy term {entropy_term.name} reads a"
                " pass that no prediction reads; let it read one of theirs"
            )
        group = getattr(entropy_term.estimator, "group", 0)
        rows = config.train.batch_size
        if config.objective.entropy_rows == "microbatch":
            rows //= config.train.microbatches
        if 0 < group < rows and rows % group:
            raise UserError(
                f"config.train.batch_size: {rows} rows do not divide into the groups of {group} of"
                f" the entropy term {entropy_term.name}; use a multiple"
            )


def _validate_targets(plan: Plan) -> None:
    """Of what makes the targets."""
    config, terms, o = plan.config, plan.terms, plan.config.objective
    encoders = {t.target.encoder for t in terms}
    if "frozen" in encoders and not o.target_checkpoint:
        raise UserError(
            "config.objective.target_checkpoint: is empty, and the objective has a frozen target;"
            " give the workdir of a run"
        )
    if "snapshot" in encoders and not (o.snapshot_at or o.target_checkpoint or config.init_from):
        raise UserError(
            f"config.objective.snapshot_at: is empty, and the snapshot that {', '.join(o.forms)}"
            " predicts would stay at random values; give shares of the run such as 0.5,0.75, or"
            " objective.target_checkpoint"
        )
    if config.model.pool.norm == "batch" and plan.where("text"):
        raise UserError(
            "config.model.pool.norm: 'batch' has no statistics outside a batch of training, so that"
            " retrieval and zero-shot would compare other features with captions; use layer"
        )
    if config.model.head.prototypes < 2 and prototype_targets.prototype_terms(terms):
        raise UserError(
            f"config.model.head.prototypes: {config.model.head.prototypes} leaves nothing to"
            " predict: every assignment is the same; use at least 2"
        )
    if config.model.decoder.positions == "absolute" and any(
        isinstance(t.head, DecoderHead) and t.reads.view != t.target.view for t in terms
    ):
        raise UserError(
            "config.model.decoder.positions: 'absolute' has no position for another view, and the"
            " objective predicts one; use 'relative'"
        )


def _validate_cls(plan: Plan) -> None:
    """Of readers of the cls token."""
    config, terms = plan.config, plan.terms
    pools_cls = config.model.pool.kind == "cls"
    if not config.model.encoder.cls_token:
        heads = [*(t.head for t in terms), *(t.head for t in plan.entropy_terms)]
        reads_cls = {
            "model.pool.kind": pools_cls and any(isinstance(t.head, PooledHead) for t in terms),
            "objective.forms": any(
                isinstance(head, ProjectionHead) and head.pool == "cls" for head in heads
            ),
        }
        for key in [key for key, reads in reads_cls.items() if reads]:
            way = (
                "set model.encoder.cls_token"
                if backbones.get_backbone(config.model).has_cls_token
                else f"{config.model.backbone} has none: use another"
            )
            raise UserError(f"config.{key}: needs the cls token; {way}")
    shared = [
        t.name
        for t in terms
        if t.target.of in ANNOTATIONS and t.reads.mixed and t.head == PooledHead()
    ]
    if pools_cls and shared:
        raise UserError(
            "config.model.pool.kind: 'cls' is one token for both images of a mixed input, and"
            f" {shared[0]} is predicted of each; use attention or mean, or for categories alone"
            " objective.soft_label=joint"
        )


def _validate_backbone(plan: Plan) -> None:
    """Of what the backbone can do."""
    config, terms = plan.config, plan.terms
    isolates = config.objective.isolate and any(t.reads.mixed for t in terms)
    backbone = backbones.get_backbone(config.model)
    if isolates and not backbone.can_isolate:
        raise UserError(
            f"config.objective.isolate: the layers of model.backbone={config.model.backbone} look"
            " across the seam of two images; use false"
        )
    averaged = [t.target.blocks for t in terms if t.target.blocks > 1]
    if averaged and not backbone.can_average_blocks:
        raise UserError(
            f"config.objective.forms: {', '.join(config.objective.forms)}: the target is a mean"
            f" over the last {averaged[0]} blocks, which model.backbone={config.model.backbone}"
            " does not have; choose another form or vit"
        )
    if isolates and 2 * config.hidden != config.tokens:
        raise UserError(
            "config.objective.isolate: needs as many cells of both images, and data.mask_ratio"
            f" {config.data.mask_ratio} shows {config.tokens - config.hidden} of {config.tokens};"
            " use 0.5"
        )
