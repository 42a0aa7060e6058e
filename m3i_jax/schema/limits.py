"""Definition of a setting: its default, its help text and the values that it accepts.

`option` refuses a number or a text without limits, so that every new setting is validated, and
covered by the fuzzer, from the start.
"""

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any

from m3i_jax.errors import DoesNotFit, UserError, shorten

# The largest array index, and the last step that an optimizer's counter can hold.
INT32 = 2**31 - 1
NUMBERS = {1: "one number", 2: "two numbers", 3: "three numbers", 4: "four numbers"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListLimit:
    """Limits on the length and order of a list.

    Attributes:
      fewest, most: number of entries, both ends included.
      rising: each entry is at least as large as the previous one.
      unique: no entry occurs twice.
      names: description of the entries, for messages.
      open: an empty list is accepted and leaves the value to the run.
    """

    fewest: int = 0
    most: int = 1000
    rising: bool = False
    unique: bool = False
    names: str = ""
    open: bool = False

    def wrong(self, values: Sequence[Any]) -> str:
        """Returns the reason why a list is refused; "" if it is accepted."""
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
    """A number from `least` to `most`.

    Attributes:
      above, below: exclude `least`, exclude `most`.
      natural: both ends follow from the definition of the number, as 0..1 for a share; otherwise
        `most` is only a bound on plausible values.
      fits: a value above `most` is refused as one that does not fit in memory (exit code 3).
      text: unit or reason that ends a message.
      open: a value outside the limits that leaves the choice to the run; None if there is none.
      count: limits of a list; the other limits then apply to each entry.
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
        """Returns the reason why a value is refused; "" if it is accepted.

        >>> NumberLimit(0, 1, natural=True, below=True).wrong(1), NumberLimit(0, 9).wrong(-1)
        ('must lie in 0..1, 1 excluded', 'must not be negative')
        """
        if value == self.open:
            return ""
        small = value < self.least or (self.above and value == self.least)
        large = value > self.most or (self.below and value == self.most)
        if not small and not large:
            return ""
        if self.natural:
            excluded = " and ".join(
                f"{end:g}"
                for end, is_excluded in ((self.least, self.above), (self.most, self.below))
                if is_excluded
            )
            words = f"must lie in {self.least:g}..{self.most:g}" + (
                f", {excluded} excluded" if excluded else ""
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
        return (
            words
            if self.open is None
            else f"{words}, or be {self.open:g}, which leaves the choice to the run"
        )


@dataclasses.dataclass(frozen=True)
class TextLimit:
    """A text of one line.

    Attributes:
      kind: "path": a local path or a URL; "name": a name outside this project; "pattern": a
        regular expression; "line": prose.
      most: maximum number of characters.
      count: limits of a list; the other limits then apply to each entry.
    """

    kind: str
    most: int = dataclasses.field(default=4096, kw_only=True)
    count: ListLimit = dataclasses.field(default=ListLimit(), kw_only=True)

    def wrong(self, value: str) -> str:
        """Returns the reason why a value is refused; "" if it is accepted.

        >>> TextLimit("pattern").wrong("(")[:27], TextLimit("line").wrong("a\\nb")
        ('is not a regular expression', 'must be one line without control characters')
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
                f"begins with the home directory of an unknown user, {value.split('/')[0]};"
                " write an absolute path"
            )
        if self.kind == "pattern":
            try:
                re.compile(value)
            except (re.error, OverflowError, RecursionError) as error:
                return f"is not a regular expression ({error}); use one such as ^encoder/"
        return ""


TEXTS = ("path", "name", "pattern", "line")


def expand_home(limits: Any, value: Any) -> Any:
    """Returns a setting with the home directory in the place of `~` at the start of paths, which
    shells leave in `--config.KEY=~/FILE`. Other settings, and homes of unknown users, stay.

    >>> expand_home(PATH, "~/a") == os.path.expanduser("~/a"), expand_home(LINE, "~/a")
    (True, '~/a')
    """
    if not (isinstance(limits, TextLimit) and limits.kind == "path"):
        return value
    if isinstance(value, tuple):
        return tuple(map(os.path.expanduser, value))
    return os.path.expanduser(value)


def _figure(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def option(default: Any, text: str, *takes: Any) -> Any:
    """Returns a dataclass field for one setting.

    Args:
      default: default value.
      text: help text.
      *takes: accepted values, or one list or dict of them that may grow, or one `NumberLimit` or
        `TextLimit`; none for a bool.

    Raises:
      TypeError: a number, a text or a list without accepted values and limits.
    """
    limits = takes[0] if takes and isinstance(takes[0], NumberLimit | TextLimit) else None
    if not isinstance(default, bool) and not takes:
        raise TypeError(f"the setting {text!r} has neither choices nor limits; give one of them")
    grows = bool(takes) and isinstance(takes[0], list | dict)
    choices = takes[0] if grows else () if limits else takes
    return dataclasses.field(
        default=default,
        metadata={"help": text, "choices": choices, "limits": limits},
    )


def section(cls: type) -> Any:
    """Returns a dataclass field for a section of settings."""
    return dataclasses.field(default_factory=cls)


def check_limits(node: Any, prefix: str = "") -> None:
    """Check every setting of a tree against its limits.

    Raises:
      UserError: the first refused setting, with key, value and reason.
      DoesNotFit: a value for which no machine has enough memory.
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


# Limits that many settings share.
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
