"""The paper's Table 1 as data. A term is one row of it: what the encoder reads, what is predicted and under which posterior; an
objective is
a tuple of terms. One train step reads any of them: equal passes are computed once, dense terms of equal shape share one decoder call.

    I(z_x; z_y | t_x, t_y)  >=  H(z_y | t_y)  +  E log P^(z_y | f_psi(z_x, t_x, t_y))          M3I section 3.1, Eqs. 1 and 2
                                regularisation   the terms below

With several inputs and targets the prediction terms add up (section 3.3, Eq. 12).
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Pass:
    """One call of the online encoder, z_x = f_theta(t_x(s)).

    crop    which of the two views of an image is read
    masked  only the cells that show the row's own image are read, the others are dropped
    mixed   the other cells show the partner image (section 3.4); excludes `masked`

    >>> Pass(mixed=True).mixed
    True
    """

    crop: int = 0
    masked: bool = False
    mixed: bool = False

    def __post_init__(self) -> None:
        if self.masked and self.mixed:
            raise ValueError("a pass is masked or mixed, not both: a mixed input fills the cells that a masked one drops")


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Target:
    """One target representation, z_y = f_phi(t_y(s)).

    of       tokens (dense features), category or text
    crop     which view the target encoder reads; None where the target is not a picture
    """

    of: str
    crop: int | None = None

    def __post_init__(self) -> None:
        if self.of not in ("tokens", "category", "text"):
            raise ValueError(f"target of {self.of!r}: must be tokens, category or text")
        if (self.of == "tokens") != (self.crop is not None):
            raise ValueError(f"target of {self.of!r} with crop {self.crop!r}: dense targets name a crop, annotations do not")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term:
    """-log P^(z_y | f_psi(z_x, t_x, t_y)) for one target.

    name     of the loss in the log, loss/<name>; terms of one name are averaged there
    image    which image of a mixed pass: own (i) or partner (j)
    hidden   count only target positions that the pass does not show
    group    ssp or sp: the two groups that lambda balances (Eq. 13)
    """

    name: str
    reads: Pass
    target: Target
    image: str = "own"
    hidden: bool = False
    group: str = "ssp"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.image not in ("own", "partner") or self.group not in ("ssp", "sp"):
            raise ValueError(f"term {self.name}: image must be own or partner, group ssp or sp")
        if self.image == "partner" and not self.reads.mixed:
            raise ValueError(f"term {self.name}: only a mixed pass shows a partner")


Terms = tuple[Term, ...]

FULL, MASKED, MIXED = Pass(), Pass(masked=True), Pass(mixed=True)
SAME, OTHER = Target(of="tokens", crop=0), Target(of="tokens", crop=1)
CATEGORY, TEXT = Target(of="category"), Target(of="text")


def _annotated(reads: Pass, image: str = "own") -> Terms:
    return (
        Term(name="category", reads=reads, target=CATEGORY, image=image, group="sp"),
        Term(name="text", reads=reads, target=TEXT, image=image, group="sp"),
    )


M3I: Terms = (
    Term(name="intra", reads=MIXED, target=SAME),
    Term(name="inter", reads=MIXED, target=OTHER, image="partner"),
    *_annotated(MIXED),
    *_annotated(MIXED, "partner"),
)
FORMS: dict[str, Terms] = {
    "m3i": M3I,
    "mim": (Term(name="intra", reads=MASKED, target=SAME),),
    "sim": (Term(name="inter", reads=MASKED, target=OTHER),),
    "supervised": (Term(name="category", reads=FULL, target=CATEGORY, group="sp"),),
    "clip": (Term(name="text", reads=FULL, target=TEXT, group="sp"),),
    "sim_supervised": (Term(name="inter", reads=MASKED, target=OTHER), *_annotated(MASKED)),
}


def select(form: str, *, categories: bool, captions: bool, intra_positions: str = "all") -> Terms:
    """The terms of a form that the data can feed: annotation terms drop out where a source has no such annotation.

    Args:
      form: a key of FORMS.
      categories: whether the data has category labels.
      captions: whether the data has captions.
      intra_positions: all | hidden, which target positions of the same view count.

    Raises:
      KeyError: for an unknown form. ValueError: if nothing is left to predict.

    >>> [t.name for t in select("m3i", categories=True, captions=False)]
    ['intra', 'inter', 'category', 'category']
    """
    present = {"category": categories, "text": captions}
    terms = tuple(t for t in FORMS[form] if present.get(t.target.of, True))
    if not terms:
        raise ValueError(f"form {form!r} predicts only what this data does not have")
    if intra_positions == "hidden":
        terms = tuple(
            dataclasses.replace(t, hidden=True) if t.target.of == "tokens" and t.target.crop == t.reads.crop else t for t in terms
        )
    return terms
