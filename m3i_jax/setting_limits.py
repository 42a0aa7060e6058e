"""What a setting is: a default, a help line, and what values it takes. `option` does not take a
number or a text without its limits, so that a new setting is checked, and tried by the fuzzer, as
soon as it exists."""

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any

from m3i_jax.errors import DoesNotFit, UserError, shorten

# the largest index of an array, and the last step that a counter of the optimizer knows
INT32 = 2**31 - 1
NUMBERS = {1: "one number", 2: "two numbers", 3: "three numbers", 4: "four numbers"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListLimit:
    """How many entries a list takes, from `fewest` to `most`. `rising`: each at least the one
    before; `unique`: none twice; `names`: what they are, for a message; `open`: an empty list
    leaves the choice to the run."""

    fewest: int = 0
    most: int = 1000
    rising: bool = False
    unique: bool = False
    names: str = ""
    open: bool = False

    def wrong(self, values: Sequence[Any]) -> str:
        if self.open and not values:
            return ""
        what, names = (
            ("numbers" if any(isinstance(v, int | float) for v in values) else "entries"),
            self.names and f": {self.names}",
        )
        if not self.fewest <= len(values) <= self.most:
            if self.fewest == self.most:
                return f"must be {NUMBERS.get(self.most, f'{self.most} {what}')}{names}"
            return (
                f"must have at least {self.fewest} entries{names}"
                if len(values) < self.fewest
                else f"must have at most {self.most} entries"
            )
        if self.rising and any(a > b for a, b in zip(values, values[1:], strict=False)):
            return f"must be {NUMBERS.get(self.most, 'numbers')}, the smaller first"
        if self.unique and len(set(values)) < len(values):
            return f"names {next(v for v in values if list(values).count(v) > 1)} twice"
        return ""


@dataclasses.dataclass(frozen=True)
class NumberLimit:
    """A number from `least` to `most`, both included unless `above` or `below` says otherwise.

    Attributes: natural: both ends belong to what the number is, as 0..1 to a share; else `most` is
      only where sense ends. fits: what is larger than `most` is refused as what does not fit (exit
      3): a number of things in memory. text: the unit, or why, at the end of a message. open: a
      value beyond the limits that leaves the choice to the run; None where there is none. count: of
      a list, whose entries these limits hold for.
    """

    least: float
    most: float
    above: bool = dataclasses.field(default=False, kw_only=True)
    below: bool = dataclasses.field(default=False, kw_only=True)
    natural: bool = dataclasses.field(default=False, kw_only=True)
    fits: bool = dataclasses.field(default=False, kw_only=True)
    text: str = dataclasses.field(default="", kw_only=True)
    open: float | None = dataclasses.field(default=None, kw_only=True)
    count: ListLimit = dataclasses.field(default=ListLimit(), kw_only=True)

    def wrong(self, value: float) -> str:
        """Why a value is refused; "" if it is not.

        >>> NumberLimit(0, 1, natural=True, below=True).wrong(1), NumberLimit(0, 9).wrong(-1), NumberLimit(1, 9).wrong(10)
        ('must lie in 0..1, 1 excluded', 'must not be negative', 'must be at most 9')
        """
        if value == self.open:
            return ""
        small = value < self.least or (self.above and value == self.least)
        large = value > self.most or (self.below and value == self.most)
        if not small and not large:
            return ""
        if self.natural:
            out = " and ".join(
                f"{end:g}"
                for end, left_out in ((self.least, self.above), (self.most, self.below))
                if left_out
            )
            words = f"must lie in {self.least:g}..{self.most:g}" + (
                f", {out} excluded" if out else ""
            )
        elif large:
            words = f"must be at most {_figure(self.most)}"
        elif self.least == 0:
            words = "must be positive" if self.above else "must not be negative"
        else:
            words = (
                f"must be {'positive, ' if 0 < self.least < 0.1 else ''}at least"
                f" {_figure(self.least)}"
            )
        words += f" {self.text}" if self.text else ""
        return words if self.open is None else f"{words}, or be {self.open:g}, which leaves it open"


@dataclasses.dataclass(frozen=True)
class TextLimit:
    """A text on one line.

    Attributes: kind: "path": of this machine or an address; "name": of something that is known
      elsewhere; "pattern": a regular expression; "line": for people.
      most: characters.
      count: of a list, whose entries these limits hold for.
    """

    kind: str
    most: int = dataclasses.field(default=4096, kw_only=True)
    count: ListLimit = dataclasses.field(default=ListLimit(), kw_only=True)

    def wrong(self, value: str) -> str:
        """Why a value is refused; "" if it is not.

        >>> TextLimit("pattern").wrong("(")[:25], TextLimit("line").wrong("a\\nb")
        ('is no regular expression ', 'must be one line without control characters')
        """
        if len(value) > self.most:
            return f"must have at most {self.most:,} characters"
        if not value.isprintable():
            if any("\ud800" <= c <= "\udfff" for c in value):
                return "is not UTF-8 text; rename it"
            if re.search(r"[\x00-\x1f\x7f]", value):
                return "must be one line without control characters"
        if (
            self.kind == "path"
            and value.startswith("~")
            and os.path.expanduser(value).startswith("~")
        ):
            return (
                f"begins with the home of a user who is not here, {value.split('/')[0]}; write the"
                " whole path"
            )
        if self.kind == "pattern":
            try:
                re.compile(value)
            except (re.error, OverflowError, RecursionError) as error:
                return f"is no regular expression ({error}); use one such as ^encoder/"
        return ""


Limit = NumberLimit | TextLimit
TEXTS = ("path", "name", "pattern", "line")


def _figure(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def option(default: Any, text: str, *takes: Any) -> Any:
    """A field with a help line and what it takes: some values, or whatever is within limits; true
    and false need neither.

    Args:
      default: of the field.
      text: the help line.
      *takes: one `NumberLimit` or `TextLimit`, or the values, or one list of them, which may grow.

    Raises:
      TypeError: a number or a text, or a list of them, that takes nothing.
    """
    limits = takes[0] if takes and isinstance(takes[0], NumberLimit | TextLimit) else None
    if not isinstance(default, bool) and not takes:
        raise TypeError(
            f"the setting {text!r} has no choices and no limits; give those that it takes"
        )
    choices = takes[0] if takes and isinstance(takes[0], list) else () if limits else takes
    return dataclasses.field(
        default=default,
        metadata={"help": text, "choices": choices, "limits": limits},
    )


def section(cls: type) -> Any:
    """A field that holds a whole sub-tree of settings."""
    return dataclasses.field(default_factory=cls)


def check_limits(node: Any, prefix: str = "") -> None:
    """Every setting of a tree against its limits.

    Raises:
      UserError: the first that is refused, with its key, its value and why.
      DoesNotFit: it is larger than any machine has room for.
    """
    for field in dataclasses.fields(node):
        value, key = getattr(node, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            check_limits(value, key + ".")
            continue
        limits = field.metadata["limits"]
        if limits is None:
            continue
        entries = value if isinstance(value, tuple) else (value,)
        for entry in entries:
            if why := limits.wrong(entry):
                large = isinstance(limits, NumberLimit) and limits.fits and entry > limits.most
                raise (DoesNotFit if large else UserError)(
                    f"config.{key}: {shorten(entry)} {'does not fit: ' if large else ''}{why}"
                )
        if isinstance(value, tuple) and (why := limits.count.wrong(value)):
            raise UserError(f"config.{key}: {shorten(value)} {why}")


# What many settings take.
SHARE = NumberLimit(0, 1, natural=True)
BELOW_ONE = NumberLimit(0, 1, natural=True, below=True)
RATE = NumberLimit(0, 1e6, above=True)
WEIGHT = NumberLimit(0, 1e6)
STD = NumberLimit(0, 1e3)
EPS = NumberLimit(1e-30, 1)
TEMPERATURE = NumberLimit(1e-6, 1e6)
EPOCHS = NumberLimit(0, 1e6)
SECONDS = NumberLimit(0, 1e7)
STEPS = NumberLimit(0, INT32)
EVERY = NumberLimit(1, INT32)
MANY = NumberLimit(1, INT32, fits=True)
WIDTH = NumberLimit(1, 2**20)
DEPTH = NumberLimit(1, 1024)
HEADS = NumberLimit(1, 2**16)
RATIO = NumberLimit(0.01, 64)
PATH, NAME, LINE = TextLimit("path"), TextLimit("name", most=1000), TextLimit("line", most=1000)
