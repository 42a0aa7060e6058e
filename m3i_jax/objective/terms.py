"""The paper's Table 1 as data. A term is one row of it: what the encoder reads, what is predicted,
through which head and under which posterior. An objective is a tuple of terms, and one train step
reads any of them: equal passes are computed once, dense terms of equal shape share one decoder
call.

    I(z_x; z_y | t_x, t_y)  >=  H(z_y | t_y)  +  E log P^(z_y | f_psi(z_x, t_x, t_y))          M3I
                                section 3.1, Eqs. 1 and 2 regularisation   the terms below

With several inputs and targets the prediction terms add up (section 3.3, Eq. 12). View 0 is the
input view, view 1 the other one; the paper's table counts them the other way round."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from m3i_jax.objective.posteriors import (
    Boltzmann,
    CategorySoftmax,
    Gaussian,
    Posterior,
    TextSoftmax,
)


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Pass:
    """One call of the online encoder, z_x = f_theta(t_x(s)).

    view         which of the two views of an image is read
    masked       only the cells that show the row's own image are read, the others are dropped
    mask_tokens  of a masked pass: hidden cells become a learned mask token (BEiT, data2vec)
    mixed        the other cells show the partner image (section 3.4); excludes `masked`
    blended      the whole image is blended with its partner, by mixup or CutMix; excludes both

    >>> Pass(mixed=True).mixed
    True
    """

    view: int = 0
    masked: bool = False
    mask_tokens: bool = False
    mixed: bool = False
    blended: bool = False

    def __post_init__(self) -> None:
        if self.masked and self.mixed:
            raise ValueError(
                "a pass is masked or mixed, not both: a mixed input fills the cells that a masked"
                " one drops"
            )
        if self.blended and (self.masked or self.mixed):
            raise ValueError("a pass that blends whole images is neither masked nor mixed")
        if self.mask_tokens and not self.masked:
            raise ValueError("only a masked pass has hidden cells to replace by mask tokens")


# targets that a view has; the others are annotations
IMAGE_TARGETS = ("pixels", "tokens", "pooled")
DENSE_TARGETS = ("pixels", "tokens")


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Target:
    """One target representation, z_y = f_phi(t_y(s)).

    of       pixels, tokens (dense features), pooled (one vector), category or text
    view     which view the target encoder reads; None where the target is not an image
    encoder  identity, ema, shared (online without gradient), online (with gradient), or frozen
    blocks   tokens: mean over the normalised outputs of up to this many last blocks (data2vec)
    """

    of: str
    view: int | None = None
    encoder: str = "identity"
    blocks: int = 1

    def __post_init__(self) -> None:
        if self.of not in (*IMAGE_TARGETS, "category", "text"):
            raise ValueError(
                f"target of {self.of!r}: must be pixels, tokens, pooled, category or text"
            )
        if (self.of in IMAGE_TARGETS) != (self.view is not None):
            raise ValueError(
                f"target of {self.of!r} with view {self.view!r}: images name a view, annotations"
                " do not"
            )
        if self.encoder not in (
            "identity",
            "ema",
            "shared",
            "online",
            "frozen",
        ) or self.learned != (self.encoder != "identity"):
            raise ValueError(
                f"target of {self.of!r} with encoder {self.encoder!r}: tokens and pooled have an"
                " encoder, the others have none"
            )

    @property
    def learned(self) -> bool:
        return self.of in ("tokens", "pooled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpShape:
    """Layers of a projector or predictor; how wide they are is `config.model.head`.

    layers     linear maps
    norm       after every hidden one: batch or none
    last_norm  whether the last one has a batch norm without scale and offset too
    """

    layers: int
    norm: str = "batch"
    last_norm: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderHead:
    """Dense prediction by the decoder: one query a target position, or only where the input is
    hidden (MAE)."""

    queries: str = "all"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearHead:
    """Dense prediction by one linear map of the encoder's tokens at the same cells."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectionHead:
    """Prediction in a space of its own: pool, project, predict. The target goes through the same
    pooling and projector, not the predictor.

    name       under params["heads"]; equal names share parameters, within a row or where the spaces
    are equal (`uniquify`) pool       mean of the patch tokens, cls, or none: every token by itself
    match      of dense projections: the target token that a token predicts, by position or by
    likeness of the encoder's features (DenseCL)"""

    name: str = "global"
    pool: str = "mean"
    projector: MlpShape | None = None
    predictor: MlpShape | None = None
    match: str = "position"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PooledHead:
    """Prediction of an annotation from the pooled tokens of its image; `everything`: from all
    tokens of a mixed input."""

    everything: bool = False


Head = DecoderHead | LinearHead | ProjectionHead | PooledHead


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term:
    """-log P^(z_y | f_psi(z_x, t_x, t_y)) for one target.

    name       of the loss in the log, loss/<name>; terms of one name are averaged there
    posterior  its normal form, a value of families.py
    head       f_psi
    image      which image of a mixed pass: own (i) or partner (j)
    hidden     count only target positions that the pass does not show
    group      ssp or sp: the two groups that lambda balances (Eq. 13)
    """

    name: str
    reads: Pass
    target: Target
    posterior: Posterior
    head: Head
    image: str = "own"
    hidden: bool = False
    group: str = "ssp"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.image not in ("own", "partner") or self.group not in ("ssp", "sp"):
            raise ValueError(f"term {self.name}: image must be own or partner, group ssp or sp")
        if self.image == "partner" and not (self.reads.mixed or self.reads.blended):
            raise ValueError(f"term {self.name}: only a mixed or blended pass shows a partner")
        if self.reads.blended and self.head != PooledHead(everything=True):
            raise ValueError(
                f"term {self.name}: a blended image has no cells of its own; predict from all of"
                " them"
            )
        if self.target.encoder == "online" and not self.posterior.grad_through_target:
            raise ValueError(
                f"term {self.name}: {type(self.posterior).__name__} takes its target as a constant;"
                " use a shared target"
            )
        wanted = (
            (DecoderHead, LinearHead, ProjectionHead)
            if self.target.of in DENSE_TARGETS
            else ProjectionHead
            if self.target.of == "pooled"
            else PooledHead
        )
        if not isinstance(self.head, wanted):
            raise ValueError(
                f"term {self.name}: a target of {self.target.of} cannot be predicted by"
                f" {type(self.head).__name__}"
            )

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Online passes that the term needs: its input, and its target where that has a
        gradient."""
        if self.target.encoder != "online":
            return (self.reads,)
        assert self.target.view is not None
        return (self.reads, Pass(view=self.target.view))


Terms = tuple[Term, ...]

FULL, MASKED, MIXED, BLENDED = Pass(), Pass(masked=True), Pass(mixed=True), Pass(blended=True)
CATEGORY, TEXT = Target(of="category"), Target(of="text")
# The paper names no head for global targets; MoCo v3 is the closest public one.
MOCO = ProjectionHead(
    projector=MlpShape(layers=3, last_norm=True), predictor=MlpShape(layers=2, last_norm=True)
)


def pixel_term(reads: Pass, view: int, **more: Any) -> Term:
    """Predict the pixels of a view; those that the input shows are not counted where they could be
    copied."""
    copied = reads.masked and view == reads.view
    defaults = {"posterior": Gaussian(), "head": DecoderHead(), "hidden": copied}
    return Term(
        **{
            "name": "pixel",
            "reads": reads,
            "target": Target(of="pixels", view=view),
            **defaults,
            **more,
        }
    )


def token_term(
    reads: Pass, view: int, *, encoder: str = "ema", blocks: int = 1, **more: Any
) -> Term:
    """Predict dense features of a view."""
    target = Target(of="tokens", view=view, encoder=encoder, blocks=blocks)
    defaults = {
        "name": "intra" if view == reads.view else "inter",
        "posterior": Gaussian(second_moment=True),
        "head": DecoderHead(),
    }
    return Term(**{"reads": reads, "target": target, **defaults, **more})


def pooled_term(reads: Pass, view: int, *, encoder: str = "ema", **more: Any) -> Term:
    """Predict one vector of a view."""
    target = Target(of="pooled", view=view, encoder=encoder)
    return Term(
        **{
            "name": "global",
            "reads": reads,
            "target": target,
            "posterior": Boltzmann(),
            "head": MOCO,
            **more,
        }
    )


def category_term(reads: Pass, image: str = "own") -> Term:
    return Term(
        name="category",
        reads=reads,
        target=CATEGORY,
        posterior=CategorySoftmax(),
        head=PooledHead(),
        image=image,
        group="sp",
    )


def text_term(reads: Pass, image: str = "own") -> Term:
    return Term(
        name="text",
        reads=reads,
        target=TEXT,
        posterior=TextSoftmax(),
        head=PooledHead(),
        image=image,
        group="sp",
    )


FORMS: dict[str, Terms] = {
    "auto_encoder": (pixel_term(FULL, 0),),
    "dense_distillation": (token_term(FULL, 0),),
    "global_distillation": (pooled_term(FULL, 0),),
    "mim_pixel": (pixel_term(MASKED, 0),),
    "mim": (token_term(MASKED, 0),),
    "mim_global": (pooled_term(MASKED, 0, posterior=Gaussian()),),
    "novel_view": (pixel_term(FULL, 1),),
    "dense_instance": (token_term(FULL, 1, posterior=Boltzmann()),),
    "instance": (pooled_term(FULL, 1),),
    "sim_pixel": (pixel_term(MASKED, 1),),
    "sim": (token_term(MASKED, 1),),
    "sim_global": (pooled_term(MASKED, 1),),
    "supervised": (category_term(FULL),),
    "weakly_supervised": (text_term(FULL),),
    "m3i": (
        token_term(MIXED, 0),
        token_term(MIXED, 1, image="partner"),
        *(
            make(MIXED, image)
            for image in ("own", "partner")
            for make in (category_term, text_term)
        ),
    ),
    # Both roles from one masked input, each with half the weight: in expectation what drawing the
    # role of every image would give.
    "m3i_unmixed": (
        token_term(MASKED, 0),
        token_term(MASKED, 1),
        category_term(MASKED),
        text_term(MASKED),
    ),
}
# What is trained after pre-training. The target of a blend is the blend of both targets, and the
# cross-entropy is linear in its target: so each image has a term, weighed by its share of the
# input.
TRANSFER: dict[str, Terms] = {
    "finetune": tuple(
        dataclasses.replace(
            category_term(FULL), reads=BLENDED, image=image, head=PooledHead(everything=True)
        )
        for image in ("own", "partner")
    ),
}
# Letters of the paper's Table 3, and its two names of the annotated rows.
LETTERS = dict(zip("abcdefghijkl", FORMS, strict=False)) | {
    "ic": "supervised",
    "wsp": "weakly_supervised",
}


def uniquify(rows: Mapping[str, Terms]) -> list[Terms]:
    """Rows that train together, so that none takes over another's space or log line by chance of
    its name.

    A space that differs from those that earlier rows call the same has a projector of its own:
    `_<row>` is added to its name. A term gets a name of its own if its posterior or its space is
    another than that of the earlier terms of its name, since their losses have no mean.

    Args:
      rows: {name of a row: its terms}, in order; the first keeps all of its names.

    >>> first, second = uniquify({"dense_instance": FORMS["dense_instance"], "sim": FORMS["sim"]})
    >>> first[0].name, second[0].name
    ('inter', 'inter_sim')
    """
    spaces: dict[str, dict[Any, str]] = {}
    names: dict[str, dict[Any, str]] = {}
    out = []
    for row, terms in rows.items():
        more = _suffixes(row, spaces, {(space.name, space) for t in terms if (space := _space(t))})
        heads = [
            (
                dataclasses.replace(space, name=space.name + more[space.name])
                if (space := _space(t))
                else t.head
            )
            for t in terms
        ]
        terms = tuple(
            dataclasses.replace(t, head=head) for t, head in zip(terms, heads, strict=True)
        )
        more = _suffixes(row, names, {(t.name, (t.posterior, _space(t))) for t in terms})
        out.append(tuple(dataclasses.replace(t, name=t.name + more[t.name]) for t in terms))
    return out


def _space(term: Term) -> ProjectionHead | None:
    return term.head if isinstance(term.head, ProjectionHead) else None


def _suffixes(
    row: str, given: dict[str, dict[Any, str]], kinds: set[tuple[str, Any]]
) -> dict[str, str]:
    """{name: what is added to it in this row}; what one row calls the same is one thing, of several
    parts perhaps."""
    out = {}
    for name in {name for name, _ in kinds}:
        mine = given.setdefault(name, {})
        out[name] = mine.setdefault(
            frozenset(kind for other, kind in kinds if other == name), f"_{row}" if mine else ""
        )
    return out


def merge(*rows: Terms, annotation_input: str = "shared") -> Terms:
    """Several rows as one objective. Equal terms stand in it once.

    Args: rows: objectives. annotation_input: shared: annotations of a row that has nothing else are
      predicted from the input of the first self-supervised row; own: from whole views, as the row
      says.

    >>> both = merge(FORMS["sim"], FORMS["supervised"])
    >>> [t.name for t in both], len({t.reads for t in both})
    (['inter', 'category'], 1)
    """
    learned = [t.reads for row in rows for t in row if t.target.of in IMAGE_TARGETS]
    out: list[Term] = []
    for row in rows:
        alone = all(t.target.of not in IMAGE_TARGETS for t in row)
        if alone and learned and annotation_input == "shared":
            images = ("own", "partner") if learned[0].mixed else ("own",)
            row = tuple(
                dataclasses.replace(t, reads=learned[0], image=image)
                for image in images
                for t in row
            )
        out += [t for t in row if t not in out]
    return tuple(out)


def drop_unavailable(terms: Terms, *, categories: bool, captions: bool) -> Terms:
    """The terms that the data can feed: an annotation term drops out where the source has no such
    annotation.

    Raises:
      ValueError: if nothing is left to predict.

    >>> [t.name for t in drop_unavailable(FORMS["m3i"], categories=True, captions=False)]
    ['intra', 'inter', 'category', 'category']
    """
    present = {"category": categories, "text": captions}
    left = tuple(t for t in terms if present.get(t.target.of, True))
    if not left:
        raise ValueError("it predicts only what this data does not have")
    return left


def with_options(
    terms: Terms,
    *,
    intra_positions: str = "all",
    soft_label: str = "separate",
    symmetric: bool = False,
    target_encoder: str = "method",
    second_group: tuple[str, ...] = ("category", "text"),
) -> Terms:
    """The same objective with another choice where the paper leaves one.

    Args: terms: the objective. intra_positions: hidden: dense features of the input's own view
      count only where the input does not show them. soft_label: joint: both categories of a mixed
      input are predicted from all its tokens. symmetric: add every self-supervised term with its
      two views exchanged. target_encoder: ema, shared or frozen instead of what the terms say.
      second_group: names of the terms that lambda scales.

    >>> [t.hidden for t in with_options(FORMS["m3i"], intra_positions="hidden")][:2]
    [True, False]
    >>> [(t.reads.view, t.target.view) for t in with_options(FORMS["instance"], symmetric=True)]
    [(0, 1), (1, 0)]
    """

    def one(t: Term) -> Term:
        target, head, hidden = t.target, t.head, t.hidden
        if (
            intra_positions == "hidden"
            and target.of == "tokens"
            and target.view == t.reads.view
            and (t.reads.masked or t.reads.mixed)
        ):
            hidden = True
        if soft_label == "joint" and target.of == "category" and t.reads.mixed:
            head = PooledHead(everything=True)
        if target_encoder != "method" and target.encoder in ("ema", "shared", "frozen"):
            target = dataclasses.replace(target, encoder=target_encoder)
        return dataclasses.replace(
            t,
            target=target,
            head=head,
            hidden=hidden,
            group="sp" if t.name in second_group else "ssp",
        )

    def exchanged(t: Term) -> Term:
        assert t.target.view is not None
        reads, target = (
            dataclasses.replace(t.reads, view=1 - t.reads.view),
            dataclasses.replace(t.target, view=1 - t.target.view),
        )
        return dataclasses.replace(t, reads=reads, target=target)

    out = [one(t) for t in terms]
    if symmetric:
        out += [x for t in out if t.target.of in IMAGE_TARGETS and (x := exchanged(t)) not in out]
    return tuple(out)
