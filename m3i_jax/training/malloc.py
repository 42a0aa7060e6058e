"""Workarounds for slow memory growth in long runs.

TensorStore (0.1.86, the newest tried) never frees the keys and values of the dicts that it makes of
JSON. In every save Orbax asks it for the JSON of the path of every array, and twice for its
metrics: some 1,100 objects a save for a state of 200 arrays. No option of Orbax avoids either call,
so `patch_tensorstore` replaces both functions in the whole process:

    KvStore.Spec.to_json    asks TensorStore once for a path and then returns the cached JSON
    experimental_collect_matching_metrics    returns nothing; Orbax then leaves out one line about
                                             bytes on disk in its own log

A save still asks for the few directories that are new to it, which leaves about 1 kB.

The C library of Linux also keeps freed memory in the heaps (arenas) of all threads that allocated
any, up to eight a core, so that the memory of a compilation or evaluation stays with the process.
`malloc_trim` returns free pages after every save; two heaps a core (`limit_arenas`) leave about
3 kB a save. One heap for all (MALLOC_ARENA_MAX=1) left nothing measurable in an hour, but threads
wait for it and a compilation fragments it: configs/quickstart.py trained its toys at half and two
thirds of the speed, and compiled in 1.5 times the time."""

import contextlib
import ctypes
import functools
import json
import os
from typing import Any

M_ARENA_MAX = -8  # of malloc.h
ARENAS_PER_CORE = 2
CACHED_PATHS = 16  # more than one save asks for


@functools.cache
def patch_tensorstore() -> None:
    """Replace both functions. Calls after the first do nothing.

    >>> import sys, tensorstore
    >>> patch_tensorstore()
    >>> spec = tensorstore.KvStore.Spec({"driver": "file", "path": "/a/b/"})
    >>> before = [spec.to_json() for _ in range(3)], sys.getallocatedblocks()
    >>> spec.to_json(), len([spec.to_json() for _ in range(1000)])
    ({'driver': 'file', 'path': '/a/b/'}, 1000)
    >>> sys.getallocatedblocks() - before[1] < 1000
    True
    """
    # imported here, so that a mistake on the command line is reported before heavy imports
    import tensorstore

    original = tensorstore.KvStore.Spec.to_json
    cache: dict[tuple[str, str], str] = {}

    def to_json(spec: tensorstore.KvStore.Spec, *args: Any, **kwargs: Any) -> Any:
        key = repr(spec), repr((args, kwargs))  # a repr is complete and leaks nothing
        if (text := cache.get(key)) is None:
            if len(cache) >= CACHED_PATHS:
                cache.clear()
            text = cache[key] = json.dumps(original(spec, *args, **kwargs))
        return json.loads(text)

    tensorstore.KvStore.Spec.to_json = to_json  # type: ignore[assignment, method-assign]
    tensorstore.experimental_collect_matching_metrics = lambda *_, **__: []


@functools.cache
def _libc_function(name: str) -> Any:
    with contextlib.suppress(OSError, AttributeError):  # another C library or system
        return getattr(ctypes.CDLL(None), name)  # a call releases the GIL
    return lambda *_: 0


def limit_arenas() -> None:
    """Let threads that start from now on share a few heaps, unless MALLOC_ARENA_MAX is set."""
    if "MALLOC_ARENA_MAX" not in os.environ:
        _libc_function("mallopt")(M_ARENA_MAX, ARENAS_PER_CORE * (os.cpu_count() or 1))


def malloc_trim() -> None:
    """Return the free pages of the C library's heaps to the system."""
    _libc_function("malloc_trim")(0)
