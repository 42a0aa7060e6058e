"""Progress bars of long work: a line on stderr that disappears when the work is done. Without a
terminal, or without tqdm, nothing is written. Work of less than a second shows no bar."""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
DELAY = 1.0  # seconds before a bar appears


def shows_progress() -> bool:
    """Returns whether bars are drawn: stderr is a terminal.

    >>> shows_progress()
    False
    """
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # a closed stream
        return False


@contextlib.contextmanager
def progress_bar(
    what: str, total: int | None = None, unit: str = "images"
) -> Iterator[Callable[[int], None]]:
    """Yields a bar around a block, which yields a function that advances it by so many units.

    Args:
      what: the work, such as "features".
      total: units of all of it; None: unknown, and the bar only counts.
      unit: what is counted.

    >>> with progress_bar("features", total=2) as advance:
    ...     advance(2)
    """
    if not shows_progress():
        yield lambda count: None
        return
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:
        yield lambda count: None
        return
    tqdm.monitor_interval = 0  # no thread of its own, which would outlive the bar
    with tqdm(
        desc=what,
        total=total,
        unit=f" {unit}",
        leave=False,
        dynamic_ncols=True,
        delay=DELAY,
        file=sys.stderr,
    ) as bar:
        yield bar.update


def track_progress(
    items: Iterable[T],
    what: str,
    total: int | None = None,
    unit: str = "images",
    size: Callable[[T], int] = lambda item: 1,
) -> Iterator[T]:
    """Yields the items, with a bar that advances by the size of each when the next one is asked
    for.

    >>> list(track_progress([3, 4], "features"))
    [3, 4]
    """
    with progress_bar(what, total, unit) as advance:
        for item in items:
            yield item
            advance(size(item))
