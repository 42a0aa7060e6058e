"""Rows that are trained together: names that they share, one tuple of terms, and its options where
the paper leaves them open."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from m3i_jax.objective.available_terms import SMALL
from m3i_jax.objective.caption_posterior import CAPTIONS
from m3i_jax.objective.terms import IMAGE_TARGETS, Pass, PooledHead, ProjectionHead, Term, Terms

# Target encoders that have no gradient and the shape of the online one.
ENCODERS = ("ema", "shared", "frozen", "snapshot")


def uniquify(rows: Mapping[str, Terms]) -> list[Terms]:
    """Rows renamed so that rows trained together share projection spaces and log names only where
    these are equal.

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
    """Several rows as one objective, without duplicate terms.

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
        out += [t for t in row if t not in out]
    return tuple(out)


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
    """The objective with other choices where the paper leaves them open.

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
        reads, target = (
            dataclasses.replace(t.reads, view=1 - t.reads.view),
            dataclasses.replace(t.target, view=1 - t.target.view),
        )
        return dataclasses.replace(t, reads=reads, target=target)

    out = [one(t) for t in terms]
    if symmetric:
        pairs = [t for t in out if t.target.of in IMAGE_TARGETS and t.reads.view < 2]
        out += [x for t in pairs if (x := exchanged(t)) not in out]
    return tuple(out)
