"""Saves leave nothing behind in memory. RSS says that only after an hour; the blocks that Python
has allocated say it after ten saves."""

import gc
import os
import pathlib
import platform
import subprocess
import sys

import jax.numpy as jnp
import pytest

from m3i_jax.training.checkpoint import Checkpoints

ARRAYS, SAVES = 40, 10


def test_a_save_leaves_nothing_behind(tmp_path: pathlib.Path) -> None:
    """TensorStore leaves four objects an array and 270 more behind, 430 a save here; with
    training/malloc.py it is 20, and 30 more in the first saves, which fill what is filled once."""
    one = Checkpoints(tmp_path, 1, say=lambda _: None)
    state = {f"a{i}": jnp.full((3, 5 + i % 7), i) for i in range(ARRAYS)}
    blocks = []
    for step in range(1, 2 * SAVES + 1):
        one.save(step, state, {"samples_seen": step})
        one.wait()
        gc.collect()
        blocks.append(sys.getallocatedblocks())
    one.close()
    assert (blocks[-1] - blocks[SAVES - 1]) / SAVES < 2 * ARRAYS


HEAPS = """
import concurrent.futures, ctypes, sys
from m3i_jax.training import malloc
malloc.limit_arenas()
library = ctypes.CDLL(None)
library.malloc.restype, library.fopen.restype = ctypes.c_void_p, ctypes.c_void_p
with concurrent.futures.ThreadPoolExecutor(64) as pool:
    list(pool.map(lambda _: [library.malloc(5000) for _ in range(1000)], range(256)))
file = ctypes.c_void_p(library.fopen(sys.argv[1].encode(), b"w"))
library.malloc_info(0, file), library.fclose(file)
print(open(sys.argv[1]).read().count("<heap nr="))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_threads_share_few_heaps(tmp_path: pathlib.Path) -> None:
    """Unless the user says how many there may be."""
    heaps = []
    for more in ({}, {"MALLOC_ARENA_MAX": "1"}):
        environment = {
            name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"
        } | more
        done = subprocess.run(
            [sys.executable, "-c", HEAPS, str(tmp_path / "heaps")],
            env=environment,
            capture_output=True,
            text=True,
        )
        heaps.append(int(done.stdout))
    assert heaps[1] == 1 < heaps[0] <= 2 * (os.cpu_count() or 1), heaps
