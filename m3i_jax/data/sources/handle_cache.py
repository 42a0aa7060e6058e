"""What a source opens at first use stays in the process that opened it: sent to a worker, the
source arrives with nothing open."""

import collections
import threading
from collections.abc import Callable, Hashable
from typing import Any


class HandleCache:
    """The last few things that were opened, by key; safe to use from several threads.

    Args: most: how many are kept; the one unused for longest is let go, and closed when nobody
        reads from it any more.

    >>> import copy                                                                  # copies as it is sent: through `__reduce__`
    >>> opened = HandleCache(1)
    >>> [opened(name, lambda: name.upper()) for name in ("a", "b")], len(opened), len(copy.copy(opened))
    (['A', 'B'], 1, 0)
    """

    def __init__(self, most: int = 1) -> None:
        self._most, self._lock = most, threading.Lock()
        self._kept: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()

    def __call__(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The thing of that key, made by `make` unless it is kept."""
        with self._lock:
            if key not in self._kept:
                self._kept[key] = make()
            self._kept.move_to_end(key)
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
            return self._kept[key]

    def __len__(self) -> int:
        return len(self._kept)

    def __reduce__(self) -> tuple[Any, ...]:
        return HandleCache, (self._most,)
