"""Passes, heads and terms that several named methods share, and how a method is declared."""

import dataclasses

from m3i_jax.objective.caption_posterior import CaptionHead, CaptionSoftmax
from m3i_jax.objective.entropy_terms import AnyTerms
from m3i_jax.objective.posteriors import Posterior
from m3i_jax.objective.prototype_targets import PrototypeSoftmax
from m3i_jax.objective.terms import (
    FULL,
    MlpShape,
    Pass,
    ProjectionHead,
    Target,
    Term,
    pooled_term,
    token_term,
)

OTHER, SMALL = Pass(view=1), Pass(view=2)
MASK_TOKENS = Pass(masked=True, mask_tokens=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedMethod:
    """terms: the objective. kept, left_out: parts of the publication, settings included, as
    prose."""

    terms: AnyTerms
    kept: str
    left_out: str


DINO = ProjectionHead(
    pool="cls",
    projector=MlpShape(layers=3, norm="none", activation="gelu", std=0.02),
    prototypes="unit",
)
DINOV2 = dataclasses.replace(DINO, prototypes="scaled")


def dino_terms(
    read: Pass, head: ProjectionHead, posterior: Posterior, weight: float = 1.0
) -> tuple[Term, ...]:
    """Returns DINO's terms: each large view predicts the other's target from cls, and each small
    view both, all pairs with equal weights. `read` is the pass of the first large view."""
    pairs = ((read, 1), (OTHER, 0), (SMALL, 0), (SMALL, 1))
    return tuple(
        pooled_term(a, b, posterior=posterior, head=head, weight=weight / len(pairs))
        for a, b in pairs
    )


def ibot_term(head: ProjectionHead, posterior: PrototypeSoftmax) -> Term:
    """Returns iBOT's term: each hidden token predicts the assignment of the target's token at its
    cell. One of the two large views is masked, and the mean is over both, so it weighs one half."""
    tokens = dataclasses.replace(head, pool="none", queries="hidden")
    return token_term(
        MASK_TOKENS, 0, name="dense", posterior=posterior, head=tokens, hidden=True, weight=0.5
    )


def caption_term(posterior: CaptionSoftmax, *, of: str = "caption", weight: float = 1.0) -> Term:
    """Returns a term in which a decoder predicts the tokens of the caption, or the text of an
    object, from the whole image."""
    return Term(
        name=of,
        reads=FULL,
        target=Target(of=of),
        posterior=posterior,
        head=CaptionHead(),
        group="sp",
        weight=weight,
    )
