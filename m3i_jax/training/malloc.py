"""Memory that saves leak in a run of weeks: a patch of TensorStore, and settings of malloc.

TensorStore leaks the keys and values of every JSON object that it converts to Python. Orbax
converts the spec of every array in every save, and TensorStore's metrics twice a save. With 200
arrays a save leaks 1,090 Python objects without `patch_tensorstore` and 45 with it (measured with
tensorstore 0.1.86 and orbax-checkpoint 0.12.8; see tests/training/test_malloc.py). Orbax has no
option that avoids either, so the patch replaces two functions in this process:

    KvStore.Spec.to_json                    converts each spec once, then returns a copy
    experimental_collect_matching_metrics   returns nothing; Orbax only logs its bytes written

A save still converts the directories that are new to it, about 1 kB.

glibc keeps freed memory in the arenas of all threads that ever allocated, up to eight a core, so
that the memory of one compilation or evaluation stays with the process. `malloc_trim` returns free
pages to the system after every save; with two arenas a core (`limit_arenas`) about 3 kB a save
remain. One arena (MALLOC_ARENA_MAX=1) left nothing in an hour, but threads wait for it and it
fragments: the toys of configs/quickstart.py trained at half and at two thirds of the speed, and
compiled in 1.5 times the time."""

import contextlib
import ctypes
import functools
import json
import os
from typing import Any

M_ARENA_MAX = -8  # of malloc.h
ARENAS_PER_CORE = 2
CACHED_SPECS = 16  # more than one save converts


@functools.cache
def patch_tensorstore() -> None:
    """Replace the two functions of TensorStore; a second call does nothing.

    >>> import sys, tensorstore
    >>> patch_tensorstore()
    >>> spec = tensorstore.KvStore.Spec({"driver": "file", "path": "/a/b/"})
    >>> before = [spec.to_json() for _ in range(3)], sys.getallocatedblocks()
    >>> spec.to_json(), len([spec.to_json() for _ in range(1000)])
    ({'driver': 'file', 'path': '/a/b/'}, 1000)
    >>> sys.getallocatedblocks() - before[1] < 1000
    True
    """
    # imported here, so that a mistake on the command line is reported before this slow import
    import tensorstore

    original = tensorstore.KvStore.Spec.to_json
    cache: dict[tuple[str, str], str] = {}

    def to_json(spec: tensorstore.KvStore.Spec, *args: Any, **kwargs: Any) -> Any:
        key = repr(spec), repr((args, kwargs))  # a repr is complete and leaks nothing
        if (text := cache.get(key)) is None:
            if len(cache) >= CACHED_SPECS:
                cache.clear()
            text = cache[key] = json.dumps(original(spec, *args, **kwargs))
        return json.loads(text)

    tensorstore.KvStore.Spec.to_json = to_json  # type: ignore[assignment, method-assign]
    tensorstore.experimental_collect_matching_metrics = lambda *_, **__: []


@functools.cache
def _libc_function(name: str) -> Any:
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        return getattr(ctypes.CDLL(None), name)  # releases Python's lock during a call
    return lambda *_: 0


def limit_arenas() -> None:
    """Let threads that start from now on share two malloc arenas a core; MALLOC_ARENA_MAX
    overrides."""
    if "MALLOC_ARENA_MAX" not in os.environ:
        _libc_function("mallopt")(M_ARENA_MAX, ARENAS_PER_CORE * (os.cpu_count() or 1))


def malloc_trim() -> None:
    """Return free pages of the C library's heap to the system."""
    _libc_function("malloc_trim")(0)
