"""The figures of a benchmark as values; `bash launch/bench.sh` prints all of them in one table."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=False)
class Figure:
    """One figure.

    Attributes:
      what: description.
      value: ratio, count or share; None: not measured, for the reason in `note`.
      target: None for a figure without a target.
      most: whether the target is an upper limit; otherwise a lower limit.
    """

    what: str
    value: float | None
    target: float | None = None
    most: bool = True
    note: str = ""

    @property
    def verdict(self) -> str:
        """Whether the target is met.

        >>> [Figure("a", value, 1.1).verdict for value in (1.1, 1.2, None)]
        ['met', 'missed', 'not measured']
        >>> Figure("a", 0.8, 0.9, most=False).verdict, Figure("a", 2.0).verdict
        ('missed', '')
        """
        if self.value is None:
            return "not measured"
        if self.target is None:
            return ""
        return (
            "met"
            if (self.value <= self.target if self.most else self.value >= self.target)
            else "missed"
        )

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """A row of the table."""
        value = (
            "-"
            if self.value is None
            else f"{self.value:.1e}"
            if 0 < abs(self.value) < 1e-3
            else f"{self.value:.3f}"
        )
        target = (
            "-"
            if self.target is None
            else f"{'at most' if self.most else 'at least'} {self.target:g}"
        )
        return self.what, value, target, self.verdict, self.note
