"""Texts of annotated objects, which a decoder of captions reads off an image (LocCa): the box of an
object, given its name, or box and name. A box is four whole numbers from 0 to 500, left, top, right
and bottom of a view."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from m3i_jax.data.sources.base import DataSource, inner_sources, map_classes, object_table
from m3i_jax.data.sources.objects import Objects

BINS = 500
VISIBLE = 0.5  # least share of a box that a view shows
TASKS = ("box", "region")  # given the name; with the name after it


class RegionTokenizer(Protocol):
    """What a tokenizer needs to encode regions; `Tokenizer` trains on `region_corpus`."""

    length: int

    def ids(self, text: str, *, cleaned: bool = False) -> list[int]:
        """All ids of a text, without start and end."""

    def frame(self, ids: Sequence[int]) -> tuple[np.ndarray, int]:
        """(int32 [length], number of real ids): start, as many ids as fit, end, zeros."""


def has_objects(source: DataSource) -> bool:
    """Returns whether a source, or one of a mixture, annotates objects.

    >>> has_objects([])
    False
    """
    return object_table(source) is not None or any(map(has_objects, inner_sources(source)))


def has_maps(source: DataSource) -> bool:
    """Returns whether a source, or one of a mixture, has class maps.

    >>> has_maps([])
    False
    """
    return bool(map_classes(source)) or any(map(has_maps, inner_sources(source)))


def object_in_view(
    objects: Objects, box: Sequence[float], flip: bool, u: float
) -> tuple[int, tuple[int, int, int, int]] | None:
    """Chooses one of the objects that a view shows at least half of, crowds left out.

    Args:
        objects: of the image.
        box: (top, left, height, width) of the view in pixels of the image.
        flip: whether the view is mirrored.
        u: a uniform number, which decides.

    Returns:
        (class, its box in the view in steps of 1 / 500), or None if there is no such object.

    >>> from m3i_jax.data.sources.objects import empty_objects
    >>> object_in_view(empty_objects(), (0, 0, 10, 10), False, 0.5) is None
    True
    """
    top, left, height, width = box
    x0, y0, x1, y1 = objects.boxes.astype(np.float64).T
    places = np.stack([(x0 - left) / width, (y0 - top) / height], 1)
    ends = np.stack([(x1 - left) / width, (y1 - top) / height], 1)
    area = np.prod(np.maximum(ends - places, 0), 1)
    places, ends = places.clip(0, 1), ends.clip(0, 1)
    shown = np.prod(np.maximum(ends - places, 0), 1)
    (usable,) = np.nonzero((area > 0) & (shown >= VISIBLE * area) & ~objects.crowd)
    if not len(usable):
        return None
    chosen = int(usable[int(u * len(usable))])
    (a, b), (c, d) = places[chosen].tolist(), ends[chosen].tolist()
    if flip:
        a, c = 1 - c, 1 - a
    left_500, top_500, right_500, bottom_500 = (round(BINS * value) for value in (a, b, c, d))
    return int(objects.classes[chosen]), (left_500, top_500, right_500, bottom_500)


def encode_region(
    tokenizer: RegionTokenizer, task: str, name: str, box: Iterable[int]
) -> tuple[np.ndarray, int, int] | None:
    """Encodes an object as a text of a task.

    Returns:
        (int32 [length], number of real ids, how many of these are given: start and prefix), or None
        if the text does not fit the length.

    >>> from m3i_jax.data.tokenizer import train_tokenizer
    >>> tokenizer = train_tokenizer(region_corpus(["cat"]), 400, 24)
    >>> ids, length, given = encode_region(tokenizer, "box", "cat", (0, 10, 250, 500))
    >>> tokenizer.decode(ids), tokenizer.decode(ids[:given])
    ('box: cat: 0 10 250 500', 'box: cat:')
    """
    numbers = " ".join(map(str, box))
    prefix = f"box: {name}:" if task == "box" else "region:"
    text = numbers if task == "box" else f"{numbers} {name}"
    given, rest = tokenizer.ids(prefix, cleaned=True), tokenizer.ids(text, cleaned=True)
    if len(given) + len(rest) + 2 > tokenizer.length:
        return None
    ids, length = tokenizer.frame([*given, *rest])
    return ids, length, 1 + len(given)


def region_corpus(names: Sequence[str]) -> Iterator[str]:
    """Yields texts of which a tokenizer learns the names and the numbers.

    >>> next(region_corpus(["cat"]))
    'box: cat: 0 1 2 3'
    """
    for k in range(BINS + 1):
        numbers = " ".join(str(min(k + n, BINS)) for n in range(4))
        yield f"box: {names[k % len(names)]}: {numbers}" if names else f"region: {numbers}"
    for name in names:
        yield f"region: 0 0 {BINS} {BINS} {name}"
