"""The terms of an objective that a run has data for: without those whose annotation is missing, and
with one for each of its small views."""

import collections
import dataclasses

from m3i_jax.objective.terms import Term, Terms

SMALL = 2  # the view of a pass that stands for every small view; they are numbered from here on


def drop_unavailable(
    terms: Terms, *, categories: bool, captions: bool, regions: bool = False
) -> Terms:
    """The terms without those whose annotation the data source does not have.

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
    """The terms with one copy for each small view in place of those that read view 2, `SMALL`.

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
