"""Objectives derived from others: without the terms whose annotation is missing, with one term for
each small view, several rows trained together, with other options where the paper leaves them open,
and with a term for each frozen teacher.

AM-RADIO (Ranzinger et al. 2024) and EUPE distil several teachers as `with_teachers` does; here
every objective can have them, with one pass of its own encoder for both.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from m3i_jax.objective.caption_posterior import CAPTIONS
from m3i_jax.objective.posteriors import SmoothL1
from m3i_jax.objective.terms import (
    FULL,
    IMAGE_TARGETS,
    LinearHead,
    Pass,
    PooledHead,
    ProjectionHead,
    Target,
    Term,
    Terms,
)

SMALL = 2  # the view of a pass that stands for every small view; they are numbered from here on
# Target encoders that have no gradient and the shape of the online one.
ENCODERS = ("ema", "shared", "frozen", "snapshot")


def drop_unavailable(
    terms: Terms, *, categories: bool, captions: bool, regions: bool = False
) -> Terms:
    """Returns the terms without those whose annotation the data source does not have.

    Raises:
      ValueError: no term is left.

    >>> from m3i_jax.objective.terms import FORMS
    >>> [t.name for t in drop_unavailable(FORMS["m3i"], categories=True, captions=False)]
    ['intra', 'inter', 'category', 'category']
    """
    present = {"category": categories, "text": captions, "caption": captions}
    present |= {"box": regions, "region": regions}
    left = tuple(t for t in terms if present.get(t.target.of, True))
    if not left:
        raise ValueError("it predicts only annotations that this data does not have")
    return left


def with_small_views(terms: Terms, count: int) -> Terms:
    """Returns the terms with one copy for each small view in place of those that read view 2,
    `SMALL`.

    The terms of one name among which there are such share its weight equally (DINO: the mean over
    all pairs of a predicting and a target view), so that the loss of a name weighs the same beside
    others for any number of small views.

    Args:
      terms: the objective, as its row defines it.
      count: small views of an image; 0: these terms are left out.

    Raises:
      ValueError: no term is left, or one of them is not of a full small view.

    >>> from m3i_jax.objective.terms import FULL, Pass, pooled_term
    >>> row = pooled_term(FULL, 1), pooled_term(Pass(view=2), 0)
    >>> [(t.reads.view, round(t.weight, 3)) for t in with_small_views(row, 3)]
    [(0, 0.5), (2, 0.5), (3, 0.5), (4, 0.5)]
    """
    weights: collections.defaultdict[str, float] = collections.defaultdict(float)
    copies: collections.Counter[str] = collections.Counter()
    out: list[Term] = []
    spread = {t.name for t in terms if t.reads.view >= SMALL}
    for term in terms:
        read = term.reads
        if read.view < SMALL:
            made = [term]
        elif read.masked or read.mixed or read.blended:
            raise ValueError(
                f"term {term.name}: the mask of an image has the cells of a large view; a small one"
                " is read as it is"
            )
        else:
            made = [
                dataclasses.replace(term, reads=dataclasses.replace(read, view=SMALL + k))
                for k in range(count)
            ]
        weights[term.name] += term.weight
        copies[term.name] += len(made)
        out += made
    if not out:
        raise ValueError("it reads only small views, and data.small_views has none")
    return tuple(
        dataclasses.replace(t, weight=weights[t.name] / copies[t.name]) if t.name in spread else t
        for t in out
    )


def uniquify(rows: Mapping[str, Terms]) -> list[Terms]:
    """Returns rows renamed so that rows trained together share projection spaces and log names only
    where these are equal.

    A space that differs from an earlier row's space of the same name gets a projector of its own:
    `_<row>` is appended to its name. A term is renamed in the same way if its posterior or its
    space differs from that of earlier terms of its name, because their losses cannot be averaged.

    Args:
      rows: {name of a row: its terms}, in order; the first row keeps all of its names.

    >>> from m3i_jax.objective.terms import FORMS
    >>> first, second = uniquify({"dense_instance": FORMS["dense_instance"], "sim": FORMS["sim"]})
    >>> first[0].name, second[0].name
    ('inter', 'inter_sim')
    """
    spaces: dict[str, dict[Any, str]] = {}
    names: dict[str, dict[Any, str]] = {}
    out = []
    for row, terms in rows.items():
        more = _suffixes(row, spaces, {(space.name, space) for t in terms if (space := _space(t))})
        terms = tuple(
            dataclasses.replace(
                t, head=dataclasses.replace(space, name=space.name + more[space.name])
            )
            if (space := _space(t))
            else t
            for t in terms
        )
        more = _suffixes(row, names, {(t.name, (t.posterior, _space(t))) for t in terms})
        out.append(tuple(dataclasses.replace(t, name=t.name + more[t.name]) for t in terms))
    return out


def _space(term: Term) -> ProjectionHead | None:
    return term.head if isinstance(term.head, ProjectionHead) else None


def _suffixes(
    row: str, given: dict[str, dict[Any, str]], kinds: set[tuple[str, Any]]
) -> dict[str, str]:
    """{name: suffix in this row}. All kinds that a row has under one name count as one set."""
    suffixes = {}
    for name in {name for name, _ in kinds}:
        known = given.setdefault(name, {})
        same_name = frozenset(kind for other, kind in kinds if other == name)
        suffixes[name] = known.setdefault(same_name, f"_{row}" if known else "")
    return suffixes


def merge(*rows: Terms, annotation_input: str = "shared") -> Terms:
    """Returns several rows as one objective, without duplicate terms.

    Args:
      rows: objectives.
      annotation_input: shared: a row of annotations only predicts them from the input of the first
        self-supervised row, that of its own annotations if it has some; own: from unmasked views,
        as the row defines.

    >>> from m3i_jax.objective.terms import FORMS
    >>> both = merge(FORMS["sim"], FORMS["supervised"])
    >>> [t.name for t in both], len({t.reads for t in both})
    (['inter', 'category'], 1)
    """
    shared = _shared_input(rows) if annotation_input == "shared" else None
    out: list[Term] = []
    for row in rows:
        alone = all(t.target.of not in IMAGE_TARGETS for t in row)
        if alone and shared:
            images = ("own", "partner") if shared.mixed else ("own",)
            row = tuple(
                dataclasses.replace(t, reads=shared, image=image) for image in images for t in row
            )
        out += row
    return tuple(dict.fromkeys(out))


def _shared_input(rows: Sequence[Terms]) -> Pass | None:
    """What the first row with self-supervised terms reads its annotations from, or else its first
    large view; None without such a row."""
    for row in rows:
        if images := [t.reads for t in row if t.target.of in IMAGE_TARGETS]:
            annotations = [t.reads for t in row if t.target.of not in IMAGE_TARGETS]
            large = [read for read in images if read.view < SMALL]
            return (annotations or large or images)[0]
    return None


def with_options(
    terms: Terms,
    *,
    intra_positions: str = "all",
    soft_label: str = "separate",
    symmetric: bool = False,
    target_encoder: str = "method",
    second_group: tuple[str, ...] = ("category", "text"),
) -> Terms:
    """Returns the objective with other choices where the paper leaves them open.

    Args:
      terms: the objective.
      intra_positions: hidden: dense targets of the input's own view count only at hidden cells.
      soft_label: joint: both categories of a mixed input are predicted from all of its tokens.
      symmetric: add every self-supervised term with its two views exchanged.
      target_encoder: ema, shared or frozen instead of the terms' own; method keeps theirs.
      second_group: names of the terms that lambda scales; text also for what a decoder of captions
        predicts.

    >>> from m3i_jax.objective.terms import FORMS
    >>> [t.hidden for t in with_options(FORMS["m3i"], intra_positions="hidden")][:2]
    [True, False]
    >>> [(t.reads.view, t.target.view) for t in with_options(FORMS["instance"], symmetric=True)]
    [(0, 1), (1, 0)]
    """

    def read_by_decoder(t: Term) -> bool:
        return t.target.of in CAPTIONS and "text" in second_group

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
        if target_encoder != "method" and target.encoder in ENCODERS:
            target = dataclasses.replace(target, encoder=target_encoder)
        return dataclasses.replace(
            t,
            target=target,
            head=head,
            hidden=hidden,
            group="sp" if t.name in second_group or read_by_decoder(t) else "ssp",
        )

    def exchanged(t: Term) -> Term:
        assert t.target.view is not None
        reads = dataclasses.replace(t.reads, view=1 - t.reads.view)
        # of a mean of views too; in order, so that a mean of both is the same target again
        view, *others = sorted(1 - each for each in (t.target.view, *t.target.others))
        target = dataclasses.replace(t.target, view=view, others=tuple(others))
        return dataclasses.replace(t, reads=reads, target=target)

    out = [one(t) for t in terms]
    if symmetric:
        pairs = [t for t in out if t.target.of in IMAGE_TARGETS and t.reads.view < 2]
        out += [x for t in pairs if (x := exchanged(t)) not in out]
    return tuple(out)


def teacher_name(number: int) -> str:
    """Returns the name of a teacher as a target encoder.

    >>> teacher_name(0)
    'teacher0'
    """
    return f"teacher{number}"


def linear_name(term: Term) -> str:
    """Returns the name of the linear map of a term with a `LinearHead`: one for the tokens and one
    for the image of a teacher, else one a kind of target.

    >>> from m3i_jax.objective.terms import pixel_term
    >>> linear_name(pixel_term(FULL, 0, head=LinearHead()))
    'linear_pixels'
    """
    encoder, of = term.target.encoder, term.target.of
    if not encoder.startswith("teacher"):
        return f"linear_{of}"
    return encoder if of == "tokens" else f"{encoder}_image"


def predicts_visible(term: Term) -> bool:
    """Returns whether a term predicts a teacher only at the cells that its input shows.

    >>> [term] = with_teachers((), [8])
    >>> predicts_visible(term)
    False
    """
    reads = term.reads
    shown = reads.mixed or (reads.masked and not reads.mask_tokens)
    return shown and term.target.encoder.startswith("teacher") and term.target.of == "tokens"


def with_teachers(terms: Terms, widths: Sequence[int], *, weight: float = 1.0) -> Terms:
    """Returns an objective with a term for every teacher.

    Terms that distil a frozen encoder by a linear map (`feature_distillation`, `distill`) are done
    for each teacher instead; where there are several, the name of each ends in its own. Without
    one, a term is added that reads the first pass of the objective, so that no other pass is
    computed: smooth L1 to the features, normalised without scale and offset.

    Args:
      terms: the objective.
      widths: width of the features of each teacher.
      weight: of each teacher, by which the weights of its terms are multiplied.

    >>> from m3i_jax.objective.terms import FORMS
    >>> new = with_teachers(FORMS["m3i"], [768, 1024])[-2:]
    >>> [(t.name, t.head.width, t.reads.mixed, t.target.view) for t in new]
    [('teacher0', 768, True, 0), ('teacher1', 1024, True, 0)]
    """
    if not widths:
        return terms
    distilled = [
        t for t in terms if t.target.encoder == "frozen" and isinstance(t.head, LinearHead)
    ]
    passes = [t.reads for t in terms if t.target.of in IMAGE_TARGETS] + [t.reads for t in terms]
    reads = next((each for each in passes if not each.blended and each.view < 2), FULL)
    target = Target(of="tokens", view=reads.view, encoder=teacher_name(0))
    added = Term(
        name="teacher", reads=reads, target=target, posterior=SmoothL1(), head=LinearHead()
    )
    out = [t for t in terms if t not in distilled]
    for number, width in enumerate(widths):
        name = teacher_name(number)
        out += [
            dataclasses.replace(
                t,
                name=name if len(distilled) < 2 else f"{name}_{t.name}",
                weight=weight * t.weight,
                target=dataclasses.replace(t.target, encoder=name),
                head=LinearHead(width=width),
            )
            for t in distilled or [added]
        ]
    return tuple(out)
