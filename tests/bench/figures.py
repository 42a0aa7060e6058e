"""What a benchmark claims, as a value: `bash launch/bench.sh` prints all of them in one table."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=False)
class Figure:
    """value: a ratio, a count, or a share; None: not measured, and `note` says why. target: None
    where it is only reported. most: whether the target is the most allowed, or the least."""

    what: str
    value: float | None
    target: float | None = None
    most: bool = True
    note: str = ""

    @property
    def verdict(self) -> str:
        """
        >>> [Figure("a", v, 1.1).verdict for v in (1.1, 1.2, None)], Figure("a", 0.8, 0.9, most=False).verdict, Figure("a", 2.0).verdict
        (['met', 'missed', 'not measured'], 'missed', '')
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
