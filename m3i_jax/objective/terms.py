"""The paper's Table 1 as data.

A term is one row: the encoder's input, the target, the prediction head and the posterior. An
objective is a tuple of terms. One train step runs every objective: equal passes are computed once,
and dense terms of equal shape share one decoder call.

    I(z_x; z_y | t_x, t_y) >= H(z_y | t_y) + E log P^(z_y | f_psi(z_x, t_x, t_y))
                              regularization  the terms below       M3I section 3.1, Eqs. 1 and 2

With several inputs and targets the prediction terms add up (section 3.3, Eq. 12). View 0 is the
input view, view 1 the other view; the paper's table numbers them the other way round.
"""

import dataclasses
import math
from typing import Any

from m3i_jax.objective.caption_posterior import CAPTIONS, CaptionHead
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

    Attributes:
      view: index of the view that is read: 0, 1, or 2 for every small view.
      masked: only cells that show the row's own image are read; the others are dropped.
      mask_tokens: with `masked`: hidden cells are replaced by a learned mask token instead of being
        dropped (BEiT, data2vec).
      mixed: the other cells show the partner image (section 3.4); excludes `masked`.
      blended: the whole image is blended with its partner by mixup or CutMix; excludes `masked`
        and `mixed`.

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


# Targets computed from an image; the others are annotations.
IMAGE_TARGETS = ("pixels", "tokens", "pooled")
DENSE_TARGETS = ("pixels", "tokens")
ANNOTATIONS = ("category", "text", *CAPTIONS)


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Target:
    """One target representation, z_y = f_phi(t_y(s)).

    Attributes:
      of: pixels, tokens (dense features), pooled (one vector), category, text, or one of CAPTIONS.
      view: index of the view that the target encoder reads; None for annotations.
      encoder: identity; ema; shared: the online encoder without gradient; online: with gradient, in
        a pass of its own; frozen: from a checkpoint; snapshot: the EMA encoder of an earlier step,
        without heads; teacher<k>: one of `objective.teachers`.
      others: views averaged with `view` in the projection space of an online target (LeJEPA).
      enlarge: side of the view as the target encoder reads it, in sides of the view; its tokens are
        resized to the grid of the view (DINOv3: 2).
      blocks: for tokens: mean over the normalised outputs of this many last blocks, or of all if
        there are fewer (data2vec).
    """

    of: str
    view: int | None = None
    encoder: str = "identity"
    blocks: int = 1
    others: tuple[int, ...] = ()
    enlarge: int = 1

    def __post_init__(self) -> None:
        if self.of not in (kinds := (*IMAGE_TARGETS, *ANNOTATIONS)):
            raise ValueError(f"target of {self.of!r}: must be one of {', '.join(kinds)}")
        if (self.of in IMAGE_TARGETS) != (self.view is not None):
            raise ValueError(
                f"target of {self.of!r} with view {self.view!r}: image targets need a view,"
                " annotations have none"
            )
        known = ("identity", "ema", "shared", "online", "frozen", "snapshot")
        teacher = self.encoder.startswith("teacher")
        if (self.encoder not in known and not teacher) or self.learned != (
            self.encoder != "identity"
        ):
            raise ValueError(
                f"target of {self.of!r} with encoder {self.encoder!r}: only tokens and pooled have"
                " an encoder"
            )
        if self.enlarge < 1 or (self.enlarge > 1 and self.of != "tokens"):
            raise ValueError(
                f"target of {self.of!r} with enlarge {self.enlarge}: only dense features are"
                " resized, from a view at least as large"
            )

    @property
    def learned(self) -> bool:
        return self.of in ("tokens", "pooled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpShape:
    """Layers of a projector or predictor; `config.model.head` has their widths.

    Attributes:
      layers: number of linear layers.
      norm: norm after every hidden layer: batch or none.
      last_norm: batch norm without scale and offset after the last layer.
      activation: between layers: relu or gelu.
      std: standard deviation of the initial matrices; 0: Xavier.
    """

    layers: int
    norm: str = "batch"
    last_norm: bool = False
    activation: str = "relu"
    std: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderHead:
    """Dense prediction by the decoder, with one query per target position, only per hidden cell of
    the input (MAE), or per cell of each target block by itself (blocks; I-JEPA). With `clusters`,
    the prediction is the assignment of a token to the prototypes of the `ClusterHead` of that
    name."""

    queries: str = "all"
    clusters: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearHead:
    """Prediction by one linear layer: of a dense target on the encoder's tokens at the same cells,
    of a pooled one on cls, or on the mean of the tokens without it. `width` is that of a target of
    another encoder; 0: the encoder's own."""

    width: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectionHead:
    """Prediction in a projection space: pool, project, predict. The target passes the same pooling
    and projector, but not the predictor.

    Attributes:
      name: key in params["heads"]; equal names share parameters, within a row or where the spaces
        are equal (`uniquify`).
      pool: mean of the patch tokens, cls, or none: every token is projected.
      match: for dense projections: the target token that a token predicts, by position or by
        likeness of the encoder's features (DenseCL).
      queries: for dense projections: all tokens, or only the hidden ones of the input.
      prototypes: the space ends in similarities to prototypes, of which the target has a copy;
        their length is 1 (unit) or trained (scaled). Empty: it has none.
    """

    name: str = "global"
    pool: str = "mean"
    projector: MlpShape | None = None
    predictor: MlpShape | None = None
    match: str = "position"
    queries: str = "all"
    prototypes: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterHead:
    """Online clustering of the target encoder's own tokens (CAPI): a linear map of the tokens, of
    length 1, learns the assignments that are balanced from its own logits. No online pass is read,
    and no encoder has a gradient. `name`: key in params["heads"]."""

    name: str = "clusters"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PooledHead:
    """Prediction of an annotation from the pooled tokens of its image; with `everything`, from all
    tokens of a mixed input."""

    everything: bool = False


Head = DecoderHead | LinearHead | ProjectionHead | ClusterHead | PooledHead | CaptionHead


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term:
    """-log P^(z_y | f_psi(z_x, t_x, t_y)) for one target.

    Attributes:
      name: name of the loss in the log, loss/<name>; terms of equal name are averaged there.
      reads: the encoder pass, z_x.
      posterior: P^, a value of `posteriors`.
      head: f_psi.
      image: image of a mixed pass: own (i) or partner (j).
      hidden: count only target positions that are hidden in the pass.
      group: ssp or sp, the two groups that lambda balances (Eq. 13).
      weight: >= 0; the losses of a group are averaged with their weights.
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
        if not 0 <= self.weight < math.inf:
            raise ValueError(
                f"term {self.name}: weight is {self.weight}; losses are averaged with their"
                " weights, so give a finite one of at least 0"
            )
        if self.image == "partner" and not (self.reads.mixed or self.reads.blended):
            raise ValueError(f"term {self.name}: only a mixed or blended pass shows a partner")
        if self.reads.blended and self.head != PooledHead(everything=True):
            raise ValueError(
                f"term {self.name}: a blended input has no cells of one image; use"
                " PooledHead(everything=True)"
            )
        if self.target.encoder == "online" and not self.posterior.grad_through_target:
            raise ValueError(
                f"term {self.name}: {type(self.posterior).__name__} treats its target as a"
                " constant; use a shared target"
            )
        if self.target.encoder == "snapshot" and (
            isinstance(self.head, DecoderHead) or getattr(self.head, "projector", None)
        ):
            raise ValueError(
                f"term {self.name}: a snapshot is an encoder without decoder and projector; use a"
                " linear head, or a projection without projector"
            )
        heads = (
            (DecoderHead, LinearHead, ProjectionHead, ClusterHead)
            if self.target.of in DENSE_TARGETS
            else (ProjectionHead, LinearHead)
            if self.target.of == "pooled"
            else CaptionHead
            if self.target.of in CAPTIONS
            else PooledHead
        )
        if not isinstance(self.head, heads):
            raise ValueError(
                f"term {self.name}: a target of {self.target.of} cannot be predicted by"
                f" {type(self.head).__name__}"
            )

    @property
    def space(self) -> ProjectionHead | ClusterHead | None:
        """The space in which prediction and target are compared; None: that of the encoder's
        features, of pixels or of annotations."""
        if isinstance(self.head, DecoderHead):
            return ClusterHead(name=self.head.clusters) if self.head.clusters else None
        return self.head if isinstance(self.head, ProjectionHead | ClusterHead) else None

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Online passes of the term: its input, and its target if that has a gradient."""
        if self.target.encoder != "online":
            return (self.reads,)
        assert self.target.view is not None
        views = (self.target.view, *self.target.others)
        return (self.reads, *(Pass(view=view) for view in views))


Terms = tuple[Term, ...]

FULL, MASKED, MIXED, BLENDED = Pass(), Pass(masked=True), Pass(mixed=True), Pass(blended=True)
CATEGORY, TEXT = Target(of="category"), Target(of="text")
IMAGE_FEATURE = ProjectionHead(pool="cls")  # what a linear map of an image reads and predicts
# The paper specifies no head for global targets; MoCo v3's is the closest public one.
MOCO = ProjectionHead(
    projector=MlpShape(layers=3, last_norm=True), predictor=MlpShape(layers=2, last_norm=True)
)


def pixel_term(reads: Pass, view: int, **more: Any) -> Term:
    """Predict the pixels of a view. Positions that a masked input of the same view shows do not
    count: they could be copied."""
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
    """Predict the dense features of a view."""
    target = Target(of="tokens", view=view, encoder=encoder, blocks=blocks)
    defaults = {
        "name": "intra" if view == reads.view else "inter",
        "posterior": Gaussian(second_moment=True),
        "head": DecoderHead(),
    }
    return Term(**{"reads": reads, "target": target, **defaults, **more})


def pooled_term(reads: Pass, view: int, *, encoder: str = "ema", **more: Any) -> Term:
    """Predict the pooled feature of a view."""
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
    """Predict the category of an image."""
    return _annotation_term(CATEGORY, CategorySoftmax(), reads, image)


def text_term(reads: Pass, image: str = "own") -> Term:
    """Predict the caption of an image."""
    return _annotation_term(TEXT, TextSoftmax(), reads, image)


def _annotation_term(target: Target, posterior: Posterior, reads: Pass, image: str) -> Term:
    options: dict[str, Any] = {"head": PooledHead(), "image": image, "group": "sp"}
    return Term(name=target.of, reads=reads, target=target, posterior=posterior, **options)


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
    # Both roles from one masked input, each with half the weight: in expectation equal to drawing
    # the role of every image.
    "m3i_unmixed": (
        token_term(MASKED, 0),
        token_term(MASKED, 1),
        category_term(MASKED),
        text_term(MASKED),
    ),
}
# Objectives after pre-training. The target of a blended image is the blend of both targets, and
# cross-entropy is linear in its target: each image has a term, weighted by its share of the input.
TRANSFER: dict[str, Terms] = {
    "finetune": tuple(
        dataclasses.replace(
            category_term(FULL), reads=BLENDED, image=image, head=PooledHead(everything=True)
        )
        for image in ("own", "partner")
    ),
}
# Letters of the paper's Table 3, and its two abbreviations of the annotated rows.
LETTERS = dict(zip("abcdefghijkl", FORMS, strict=False)) | {
    "ic": "supervised",
    "wsp": "weakly_supervised",
}
