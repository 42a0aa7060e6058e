"""What a run of a month would leave in memory, and why it does not.

TensorStore (0.1.86, the newest that this was tried with) turns JSON into Python objects without
ever freeing the keys and values of their dicts. Orbax asks it for the JSON of the place of every
array of every save, and twice a save for its metrics: some 1,100 objects a save for a state of 200
arrays. Orbax has no option that avoids either, so `patch_tensorstore` has both functions answer
otherwise, in all of this process:

    KvStore.Spec.to_json                    TensorStore is asked once for a place, then it is what
    was said before experimental_collect_matching_metrics   nothing; Orbax makes a line about bytes
    on the disk for its own log of it, which it leaves out

A save still asks for the few directories that it has not used before, which leaves about 1 kB.

And the C library of Linux keeps what is freed, in pieces in the heaps of all threads that ever
asked for some, up to eight a core: what a compilation or an evaluation needed for a moment stays
the process's own. `malloc_trim` returns what is free, after every save; two heaps a core
(`limit_arenas`) leave less of it, about 3 kB a save. One for all (MALLOC_ARENA_MAX=1) leaves
nothing that was seen in an hour, but threads wait for it, and what a compilation leaves in it slows
every step after: the toys of configs/quickstart.py trained at half and at two thirds of the speed,
and compiled in 1.5 times the time."""

import contextlib
import ctypes
import functools
import json
import os
from typing import Any

ARENA_MAX, A_CORE = -8, 2  # M_ARENA_MAX of malloc.h
PLACES = 16  # of which the answer is kept: more than one save asks for


@functools.cache
def patch_tensorstore() -> None:
    """Put the two functions in their place; once is enough.

    >>> import sys, tensorstore
    >>> patch_tensorstore()
    >>> spec = tensorstore.KvStore.Spec({"driver": "file", "path": "/a/b/"})
    >>> before = [spec.to_json() for _ in range(3)], sys.getallocatedblocks()
    >>> spec.to_json(), len([spec.to_json() for _ in range(1000)]), sys.getallocatedblocks() - before[1] < 1000
    ({'driver': 'file', 'path': '/a/b/'}, 1000, True)
    """
    # here, for a mistake on the command line is told before anything heavy is imported
    import tensorstore

    ask = tensorstore.KvStore.Spec.to_json
    said: dict[tuple[str, str], str] = {}

    def to_json(spec: tensorstore.KvStore.Spec, *args: Any, **how: Any) -> Any:
        place = repr(spec), repr((args, how))  # a repr has all of a spec, and leaves nothing behind
        if (text := said.get(place)) is None:
            if len(said) >= PLACES:
                said.clear()
            text = said[place] = json.dumps(ask(spec, *args, **how))
        return json.loads(text)

    tensorstore.KvStore.Spec.to_json = to_json  # type: ignore[assignment, method-assign]
    tensorstore.experimental_collect_matching_metrics = lambda *_, **__: []


@functools.cache
def _library(name: str) -> Any:
    with contextlib.suppress(OSError, AttributeError):  # another C library, another system
        return getattr(ctypes.CDLL(None), name)  # lets other threads of Python go on
    return lambda *_: 0


def limit_arenas() -> None:
    """Threads that start from now on share a few heaps. Who sets MALLOC_ARENA_MAX has decided."""
    if "MALLOC_ARENA_MAX" not in os.environ:
        _library("mallopt")(ARENA_MAX, A_CORE * (os.cpu_count() or 1))


def malloc_trim() -> None:
    """Whole pages of the C library's heap that are free, back to the system."""
    _library("malloc_trim")(0)
