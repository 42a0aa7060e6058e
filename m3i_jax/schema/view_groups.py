"""Groups of small views: how many, of which size, from which share of an image."""

import dataclasses
import re

from m3i_jax.errors import UserError

_GROUP = re.compile(r"(\d{1,3}) ?x ?(\d{1,4}) at (\d?\.?\d{1,6}) ?- ?(\d?\.?\d{1,6})")
MOST = 64  # small views of an image


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewGroup:
    """Views of one size.

    Attributes:
      count: views of an image.
      size: side in pixels.
      scale: range of the area of their crops as a share of the image.
    """

    count: int
    size: int
    scale: tuple[float, float]

    def __str__(self) -> str:
        return f"{self.count} x {self.size} at {self.scale[0]:g}-{self.scale[1]:g}"


def parse_view_group(text: str, key: str = "config.data.small_views") -> ViewGroup:
    """The group that an entry of `data.small_views` describes.

    Raises:
      UserError: it is no such entry, or its shares are none.

    >>> print(parse_view_group("8x98 at .05-.32"))
    8 x 98 at 0.05-0.32
    """
    found = _GROUP.fullmatch(text.strip())
    if not found:
        raise UserError(
            f"{key}: {text[:60]!r} is no group of views; write COUNT x PIXELS at SHARE-SHARE, such"
            " as 8 x 98 at 0.05-0.32"
        )
    count, size = int(found[1]), int(found[2])
    try:
        low, high = float(found[3]), float(found[4])
    except ValueError:
        low = high = -1.0
    if not 0 < low <= high <= 1:
        raise UserError(
            f"{key}: {text[:60]!r} cuts crops from {found[3]} to {found[4]} of an image; give two"
            " shares above 0 and up to 1, the smaller first"
        )
    if not 1 <= count <= MOST or size < 1:
        raise UserError(
            f"{key}: {text[:60]!r} has {count} views of {size} pixels; 1 to {MOST} of at least one"
            " pixel work"
        )
    return ViewGroup(count=count, size=size, scale=(low, high))
