"""A run that measures its own memory every few seconds, after a garbage collection and malloc_trim:
`python -m tests.faults.watched FILE` and the arguments of m3i_jax.main. Garbage varies by ten MB
and would hide a leak.

FILE has two numbers in MB: allocated memory, with Python's own if PYTHONMALLOC=malloc; and resident
memory, with the free pieces that the C library keeps."""

import ctypes
import gc
import pathlib
import re
import sys
import threading
import time

from m3i_jax import main
from m3i_jax.training import malloc

EVERY = 5.0  # seconds


def own() -> float:
    """MB of memory of this process, without files that the kernel may drop."""
    found = re.search(r"RssAnon:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


class _Info(ctypes.Structure):
    """`struct mallinfo2` of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def allocated() -> float:
    """MB allocated and not freed, in all arenas and by mmap."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = _Info
    found = ask()
    return (found.uordblks + found.hblkhd) / 2**20


def note(file: pathlib.Path) -> None:
    while True:
        time.sleep(EVERY)
        gc.collect()
        malloc.malloc_trim()
        file.write_text(f"{allocated()} {own()}\n")


if __name__ == "__main__":
    malloc.limit_arenas()  # as the command line does
    threading.Thread(target=note, args=(pathlib.Path(sys.argv[1]),), daemon=True).start()
    sys.exit(main.main(sys.argv[2:]))
