"""Saves leak no memory. RSS shows that only after an hour; Python's allocated blocks show it after
six saves."""

import gc
import os
import pathlib
import platform
import subprocess
import sys

import jax.numpy as jnp
import pytest

from m3i_jax.training.checkpoint import Checkpoints

ARRAYS, SAVES = 40, 6


def test_a_save_leaks_few_objects(tmp_path: pathlib.Path) -> None:
    """TensorStore leaks four objects an array and 270 more, 430 a save here; with
    training/malloc.py it is 20, and 30 more in the first saves, which fill caches."""
    checkpoints = Checkpoints(tmp_path, 1, log=lambda _: None)
    state = {f"a{i}": jnp.full((3, 5 + i % 7), i) for i in range(ARRAYS)}
    gc.collect()
    gc.freeze()  # what earlier tests left: searching it for garbage took most of the time
    blocks = []
    for step in range(1, 2 * SAVES + 1):
        checkpoints.save(step, state, {"samples_seen": step})
        checkpoints.wait()
        gc.collect()
        blocks.append(sys.getallocatedblocks())
    checkpoints.close()
    assert (blocks[-1] - blocks[SAVES - 1]) / SAVES < 2 * ARRAYS


COUNT_ARENAS = """
import concurrent.futures, ctypes, sys
from m3i_jax.training import malloc
malloc.limit_arenas()
library = ctypes.CDLL(None)
library.malloc.restype, library.fopen.restype = ctypes.c_void_p, ctypes.c_void_p
with concurrent.futures.ThreadPoolExecutor(64) as pool:
    list(pool.map(lambda _: [library.malloc(5000) for _ in range(100)], range(256)))
file = ctypes.c_void_p(library.fopen(sys.argv[1].encode(), b"w"))
library.malloc_info(0, file), library.fclose(file)
print(open(sys.argv[1]).read().count("<heap nr="))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_threads_share_few_arenas(tmp_path: pathlib.Path) -> None:
    """MALLOC_ARENA_MAX overrides their number."""
    arenas = []
    for more in ({}, {"MALLOC_ARENA_MAX": "1"}):
        environment = {
            name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"
        } | more
        done = subprocess.run(
            [sys.executable, "-c", COUNT_ARENAS, str(tmp_path / "arenas")],
            env=environment,
            capture_output=True,
            text=True,
        )
        arenas.append(int(done.stdout))
    assert arenas[1] == 1 < arenas[0] <= 2 * (os.cpu_count() or 1), arenas
