"""What a tuple of terms (objective/terms.py) asks of one step: every encoder pass, every target
view and every projection once."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.models import backbones
from m3i_jax.objective import registry
from m3i_jax.objective import terms as objective_terms
from m3i_jax.objective.terms import (
    DENSE_TARGETS,
    IMAGE_TARGETS,
    DecoderHead,
    Pass,
    ProjectionHead,
    Target,
    Term,
    Terms,
)


class TargetPass(NamedTuple):
    """One call of a target encoder on a clean view."""

    encoder: str
    crop: int
    blocks: int


class TargetKey(NamedTuple):
    """One array of target representations; terms with an equal goal share it. `space`: what the
    target's features went through."""

    target: Target
    space: Any  # a Projection, "decoder" for the decoder's own projector, or None

    def __lt__(self, other: object) -> bool:
        # a dict of goals is a tree to JAX, which sorts its keys; spaces have no order of their own
        return repr(self) < repr(other)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The terms of a run and its settings."""

    config: schema.Config
    terms: Terms

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Calls of the online encoder."""
        return tuple(sorted({read for t in self.terms for read in t.passes}))

    @property
    def views(self) -> tuple[TargetPass, ...]:
        """Calls of target encoders: those without gradient."""
        seen = {
            target_pass(t.target)
            for t in self.terms
            if t.target.learned and t.target.encoder != "online"
        }
        return tuple(sorted(seen))

    @property
    def crops(self) -> tuple[int, ...]:
        """Views of an image that anything reads."""
        return tuple(
            sorted(
                {p.crop for p in self.passes}
                | {t.target.crop for t in self.terms if t.target.crop is not None}
            )
        )

    @property
    def exact(self) -> bool:
        """Whether pixels are a target, and so must not be rounded to the compute precision."""
        return any(t.target.of == "pixels" for t in self.terms)

    def where(self, *of: str, group: str | None = None) -> tuple[int, ...]:
        """Places of the terms that predict one of these, in a group."""
        return tuple(
            i for i, t in enumerate(self.terms) if t.target.of in of and group in (None, t.group)
        )

    def goal(self, term: Term) -> TargetKey:
        """The representation that an image term predicts."""
        if isinstance(term.head, ProjectionHead):
            return TargetKey(
                term.target, dataclasses.replace(term.head, predictor=None, match="position")
            )
        deep = (
            term.target.of == "tokens"
            and isinstance(term.head, DecoderHead)
            and self.config.model.decoder.projector_depth
        )
        return TargetKey(term.target, "decoder" if deep else None)

    @property
    def goals(self) -> tuple[TargetKey, ...]:
        """All of them that can be computed before the online encoder runs."""
        fixed = [
            t for t in self.terms if t.target.of in IMAGE_TARGETS and t.target.encoder != "online"
        ]
        matched = [
            TargetKey(t.target, None)
            for t in fixed
            if isinstance(t.head, ProjectionHead) and t.head.match == "likeness"
        ]
        return tuple(dict.fromkeys([*(self.goal(t) for t in fixed), *matched]))

    def reads_cls(self, term: Term) -> bool:
        """Whether the decoder of a term reads the cls token: that of a mixed input is shared by two
        images."""
        wanted = self.config.model.decoder.cls
        return self.config.model.encoder.cls_token and (
            wanted == "yes" or (wanted == "auto" and not term.reads.mixed)
        )

    @property
    def dense(self) -> tuple[int, ...]:
        return self.where(*DENSE_TARGETS)

    @property
    def pictures(self) -> tuple[int, ...]:
        return self.where(*IMAGE_TARGETS)


def target_pass(target: Target) -> TargetPass:
    """The call of a target encoder that a target is made from."""
    assert target.crop is not None
    return TargetPass(target.encoder, target.crop, target.blocks)


def terms_named(name: str, key: str = "config.objective.forms") -> objective_terms.Terms:
    """One row of an objective: a form, its letter in the paper's Table 3, or a named method; `key`
    is the setting that names it.

    Raises:
      UserError: for a name that is none of them.

    >>> [t.name for t in terms_named("k")] == [t.name for t in terms_named("sim")]
    True
    """
    try:
        return registry.form(name)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from None


def _terms_of(o: schema.Objective) -> Terms:
    """The terms of an objective, whatever the data have."""
    if not o.forms:
        raise UserError("config.objective.forms: is empty; name at least one form, such as m3i")
    names = [objective_terms.LETTERS.get(name, name) for name in o.forms]
    if twice := [
        given for given, name in zip(o.forms, names, strict=True) if names.count(name) > 1
    ]:
        raise UserError(
            f"config.objective.forms: {twice[0]} and {twice[-1]} are the same objective; name it"
            " once"
        )
    rows = objective_terms.uniquify({name: terms_named(name) for name in names})
    return objective_terms.with_options(
        objective_terms.merge(*rows, annotation_input=o.annotation_input), intra_positions=o.intra_positions, soft_label=o.soft_label,
        symmetric=o.symmetric, target_encoder=o.target_encoder, second_group=o.second_group,
    )  # fmt: skip


def build_plan(config: schema.Config) -> Plan:
    """The terms of a completed configuration (data.classes and data.captions known)."""
    backbones.validate_backbone(config)
    o, terms = config.objective, _terms_of(config.objective)
    try:
        terms = objective_terms.drop_unavailable(
            terms, categories=config.data.classes > 0, captions=config.data.captions == "yes"
        )
    except ValueError as error:
        raise UserError(
            f"config.objective.forms: {', '.join(o.forms)}: {error}; choose another form or a"
            " source with categories or captions"
        ) from None
    made = Plan(config, terms)
    _validate(made)
    return made


def _validate(made: Plan) -> None:
    """Refuse what the terms and the settings cannot do together."""
    config, terms = made.config, made.terms
    annotations = [t for t in terms if t.target.of in ("category", "text")]
    if config.objective.annotation_input == "own" and any(
        t.reads.masked or t.reads.mixed for t in annotations
    ):
        raise UserError(
            "config.objective.annotation_input: 'own' gives the annotations of a set a view of"
            f" their own, and {', '.join(config.objective.forms)} predicts them from its hidden or"
            " mixed input by itself; use shared, or a set such as objective.forms=sim,supervised"
        )
    frozen = any(t.target.encoder == "frozen" for t in terms)
    if frozen and not config.objective.target_checkpoint:
        raise UserError(
            "config.objective.target_checkpoint: is empty, and the objective has a frozen target;"
            " give the workdir of a run"
        )
    if config.model.decoder.positions == "absolute" and any(
        isinstance(t.head, objective_terms.DecoderHead) and t.reads.crop != t.target.crop
        for t in terms
    ):
        raise UserError(
            "config.model.decoder.positions: 'absolute' cannot say where another view lies, and the"
            " objective predicts one; use 'relative'"
        )
    if not config.model.encoder.cls_token:
        for key, wanted in (
            (
                "model.pool.kind",
                config.model.pool.kind == "cls"
                and any(isinstance(t.head, objective_terms.PooledHead) for t in terms),
            ),
            (
                "objective.forms",
                any(
                    isinstance(t.head, objective_terms.ProjectionHead) and t.head.pool == "cls"
                    for t in terms
                ),
            ),
        ):
            if wanted:
                way = (
                    "set model.encoder.cls_token"
                    if backbones.get_backbone(config.model).has_cls_token
                    else f"{config.model.backbone} has none: use another"
                )
                raise UserError(f"config.{key}: needs the cls token; {way}")
    if config.model.pool.kind == "cls" and (
        shared := [
            t.name for t in annotations if t.reads.mixed and t.head == objective_terms.PooledHead()
        ]
    ):
        raise UserError(
            "config.model.pool.kind: 'cls' is one token for both images of a mixed input, and"
            f" {shared[0]} is predicted of each; use attention or mean, or for categories alone"
            " objective.soft_label=joint"
        )
    mixed = any(t.reads.mixed for t in terms)
    backbone = backbones.get_backbone(config.model)
    if config.objective.isolate and mixed and not backbone.can_isolate:
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
    if config.objective.isolate and mixed and 2 * config.hidden != config.tokens:
        raise UserError(
            "config.objective.isolate: needs as many cells of both images, and data.mask_ratio"
            f" {config.data.mask_ratio} shows {config.tokens - config.hidden} of {config.tokens};"
            " use 0.5"
        )


def reject_unused_settings(config: schema.Config, trains: Iterable[tuple[str, ...]]) -> None:
    """Refuse a setting that does nothing in all of these objectives (names of forms): whoever sets
    it expects something of it.

    For whoever starts to train. A run that is evaluated or goes on as an encoder may keep what its
    objective no longer reads. `objective.pairing` is not judged: configs/quickstart.py sets it for
    whatever form comes after.

    Raises:
      UserError: the setting, why it does nothing, and what to leave it at.

    >>> reject_unused_settings(schema.Config(), [("sim",)])
    """
    o, plain = config.objective, schema.Config()
    sets = list(trains)
    terms = [t for forms in sets for t in _terms_of(dataclasses.replace(o, forms=forms))]
    told = ", ".join("+".join(forms) for forms in sets)
    mixed, blended = any(t.reads.mixed for t in terms), any(t.reads.blended for t in terms)
    a, b = config.data.augment, plain.data.augment
    for key, value, default, read, what in (
        (
            "objective.target_checkpoint",
            o.target_checkpoint,
            "",
            any(t.target.encoder == "frozen" for t in terms),
            "no frozen target",
        ),
        ("objective.isolate", o.isolate, plain.objective.isolate, mixed, "no mixed input"),
        ("objective.soft_label", o.soft_label, plain.objective.soft_label, mixed, "no mixed input"),
        ("data.augment.mixup", a.mixup, b.mixup, blended, "no blended input (as in finetune)"),
        ("data.augment.cutmix", a.cutmix, b.cutmix, blended, "no blended input (as in finetune)"),
    ):
        if value != default and not read:
            raise UserError(
                f"config.{key}: {value!r} does nothing: there is {what} in {told}; leave it at"
                f" {default!r} or choose another form"
            )
    known = sorted({t.name for each in (*registry.forms().values(), terms) for t in each})
    for name in o.second_group if o.second_group != plain.objective.second_group else ():
        if name not in known:
            raise UserError(
                f"config.objective.second_group: {name!r} is the name of no term; there are"
                f" {', '.join(known)}"
            )
