"""Frozen teachers beside an objective (`objective.teachers`): a dense term for each, whose linear
map predicts its normalised features at the cells that the input shows.

AM-RADIO (Ranzinger et al. 2024) and EUPE distil several teachers this way; here every objective can
have them, with one pass of its own encoder for both.
"""

import dataclasses
from collections.abc import Sequence

from m3i_jax.objective.posteriors import SmoothL1
from m3i_jax.objective.terms import (
    FULL,
    IMAGE_TARGETS,
    LinearHead,
    Target,
    Term,
    Terms,
)


def teacher_name(number: int) -> str:
    """The name of a teacher as a target encoder.

    >>> teacher_name(0)
    'teacher0'
    """
    return f"teacher{number}"


def linear_name(term: Term) -> str:
    """The name of the linear map of a term with a `LinearHead`: one a teacher, else one a kind of
    target.

    >>> from m3i_jax.objective.terms import pixel_term
    >>> linear_name(pixel_term(FULL, 0, head=LinearHead()))
    'linear_pixels'
    """
    encoder = term.target.encoder
    return encoder if encoder.startswith("teacher") else f"linear_{term.target.of}"


def predicts_visible(term: Term) -> bool:
    """Whether a term predicts a teacher only at the cells that its input shows.

    >>> [term] = with_teachers((), [8])
    >>> predicts_visible(term)
    False
    """
    reads = term.reads
    shown = reads.mixed or (reads.masked and not reads.mask_tokens)
    return shown and term.target.encoder.startswith("teacher")


def with_teachers(terms: Terms, widths: Sequence[int], *, weight: float = 1.0) -> Terms:
    """An objective with a term for every teacher.

    A term that distils a frozen encoder by a linear map (feature distillation) is done for each
    teacher instead. Without one, a term is added that reads the first pass of the objective, so
    that no other pass is computed: smooth L1 to the features, normalised without scale and offset.

    Args:
      terms: the objective.
      widths: width of the features of each teacher.
      weight: of each of these terms.

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
                name=name,
                weight=weight,
                target=dataclasses.replace(t.target, encoder=name),
                head=LinearHead(width=width),
            )
            for t in distilled or [added]
        ]
    return tuple(out)
