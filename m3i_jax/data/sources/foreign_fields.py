"""Fields of data of other projects: which column holds what, and labels."""

from collections.abc import Sequence
from typing import Any


def column(names: Sequence[str], present: Sequence[str]) -> str | None:
    """Returns the first of `names` that is present, else the only one present, else None.

    >>> column(("image", "img"), ("mask", "img")), column(("image",), ("photo",))
    ('img', 'photo')
    >>> column(("image",), ("a", "b")) is None
    True
    """
    only = present[0] if len(present) == 1 else None
    return next((name for name in names if name in present), only)


def parse_label(value: Any) -> int | None:
    """Returns a label of a foreign file if it is a whole number from 0 to a million, else None.

    >>> parse_label(7), parse_label(-1), parse_label(True), parse_label("cat")
    (7, None, None, None)
    """
    return value if type(value) is int and 0 <= value <= 1_000_000 else None
