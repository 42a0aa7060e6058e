"""Blocks of memory that worker processes, or threads, fill again once no reference is left."""

import copy
import fcntl
import gc
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
from concurrent import futures

import jax
import numpy as np
import pytest

from m3i_jax.data import shared_buffers


@pytest.fixture
def pool():
    shared = shared_buffers.SharedBufferPool()
    yield shared
    shared.close()


def send(
    writer: shared_buffers.BufferWriter, value: int, shape: tuple[int, ...] = (64, 128)
) -> shared_buffers.BufferHandle:
    with writer.lend(shape) as (handle, array):
        array[:] = value
    return copy.copy(handle)


def test_a_block_is_reused_only_when_no_view_is_left(pool):
    writer = copy.copy(pool.writer())
    first = pool.take(send(writer, 1))
    part = first[3:5, ::2]
    second = pool.take(send(writer, 2))
    assert not np.shares_memory(first, second)
    del first
    gc.collect()
    third = pool.take(send(writer, 3))  # `part` still refers to the first block
    assert (part == 1).all() and (second == 2).all() and (third == 3).all()
    freed = address(part) - 3 * 128
    del part
    gc.collect()
    fourth = pool.take(send(writer, 4))
    assert address(fourth) == freed and (fourth == 4).all() and (third == 3).all()


def test_arrays_on_the_device_are_not_overwritten(pool):
    """On CPU `jax.device_put` may take the memory itself."""
    writer, held = pool.writer(), []
    for value in range(8):
        held.append(jax.device_put(pool.take(send(writer, value))))
    assert [set(np.asarray(array).ravel().tolist()) for array in held] == [
        {value} for value in range(8)
    ]


def test_a_loop_needs_few_blocks(pool):
    writer, held = pool.writer(), None
    for value in range(20):
        held = pool.take(send(writer, value))
        assert (held == value).all()
    assert (
        len(os.listdir(pool.directory)) == 1 + 2
    )  # the lock; one block is held while the next is filled


def test_other_shapes_and_failures(pool):
    writer = pool.writer()
    small, large = (pool.take(send(writer, 5, shape)) for shape in ((2, 2), (300, 300)))
    with pytest.raises(RuntimeError, match="no image"), writer.lend((7, 7)) as (_, array):
        array[:] = 9
        raise RuntimeError("no image")
    before = len(os.listdir(pool.directory))
    assert (pool.take(send(writer, 6, (7, 7))) == 6).all() and len(
        os.listdir(pool.directory)
    ) == before
    assert (small == 5).all() and (large == 5).all()


def test_batches_of_several_shapes_share_blocks(pool):
    """A batch of a drawn size: the blocks of every size that occurred would stay."""
    writer, threads, held = pool.writer(), shared_buffers.ThreadBufferPool(), None
    places, kept = set(), None
    for value, shape in enumerate([(2, 300), (300, 300), (40, 50), (300, 200)] * 5):
        with writer.lend(shape, 300 * 300) as (handle, array):
            array[:] = value
        held = pool.take(copy.copy(handle))
        assert held.shape == shape and (held == value).all()
        with threads.lend(shape, 300 * 300) as (kept, _):
            places.add(address(kept))
    assert len(os.listdir(pool.directory)) == 1 + 2 and len(places) == 2


def test_a_directory_that_is_removed_before_it_is_locked(monkeypatch):
    original, directories = fcntl.flock, []

    def late(file: int, how: int) -> None:
        if how == fcntl.LOCK_EX and not directories:  # another process starts meanwhile
            directories.append(os.path.dirname(os.readlink(f"/proc/self/fd/{file}")))
            shared_buffers._remove_stale()
        original(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    pool = shared_buffers.SharedBufferPool()
    assert (pool.take(send(pool.writer(), 3)) == 3).all()
    assert not os.path.exists(directories[0]) and pool.directory != directories[0]
    pool.close()


def test_close_removes_the_directory_and_keeps_arrays(pool):
    array = pool.take(send(pool.writer(), 8))
    assert os.stat(pool.directory).st_mode & 0o777 == 0o700
    pool.close()
    assert not os.path.exists(pool.directory) and (array == 8).all()
    pool.close()  # a second call has no effect


def test_the_next_run_removes_the_directory_of_a_killed_one():
    code = (
        "import os, signal\nfrom m3i_jax.data import shared_buffers\npool ="
        " shared_buffers.SharedBufferPool()\nprint(pool.directory, flush=True)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code + "os.kill(os.getpid(), signal.SIGKILL)"],
        capture_output=True,
        text=True,
    )
    left = killed.stdout.strip()
    assert os.path.isdir(left)
    with_lock = shared_buffers.SharedBufferPool()  # alive, so the next one does not remove it
    other = shared_buffers.SharedBufferPool()
    assert (
        not os.path.exists(left)
        and os.path.isdir(with_lock.directory)
        and os.path.isdir(other.directory)
    )
    other.close()
    with_lock.close()
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not os.path.exists(ended.stdout.strip())


def fill(
    pool: shared_buffers.ThreadBufferPool, value: int, shape: tuple[int, ...] = (64, 128)
) -> np.ndarray:
    with pool.lend(shape) as (handle, array):
        array[:] = value
    return handle


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_threads_reuse_only_unreferenced_blocks():
    pool = shared_buffers.ThreadBufferPool()
    first, second = fill(pool, 1), fill(pool, 2)
    reused, part = address(first), first[3:5, ::2]
    del first
    third = fill(pool, 3)
    assert (
        address(third) not in (reused, address(second))
        and (part == 1).all()
        and (second == 2).all()
    )
    del part
    assert address(fill(pool, 4)) == reused and (third == 3).all()
    assert address(fill(pool, 5, (128, 64))) == reused and address(fill(pool, 6, (2, 2))) != reused
    with pytest.raises(RuntimeError, match="no image"), pool.lend((7, 7)) as (handle, array):
        raise RuntimeError("no image")
    before = address(array)
    del handle, array
    gc.collect()  # the traceback refers to the array
    assert address(fill(pool, 7, (7, 7))) == before


def test_arrays_on_the_device_are_not_overwritten_by_threads():
    pool = shared_buffers.ThreadBufferPool()
    held = [jax.device_put(fill(pool, value)) for value in range(8)]
    assert [set(np.asarray(array).ravel().tolist()) for array in held] == [
        {value} for value in range(8)
    ]


def test_threads_never_get_the_same_block():
    pool = shared_buffers.ThreadBufferPool()

    def work(value: int) -> tuple[bool, int]:
        intact, addresses = True, set()
        for _ in range(200):
            array = fill(pool, value)
            intact &= bool((array == value).all())
            addresses.add(address(array))
        return intact, len(addresses)

    with futures.ThreadPoolExecutor(4) as executor:
        done = list(executor.map(work, range(4)))
    assert all(intact for intact, _ in done) and max(count for _, count in done) <= 8


KILLED = """
import multiprocessing, os, signal
from m3i_jax.data import shared_buffers
pool = shared_buffers.SharedBufferPool()
held = [multiprocessing.get_context("spawn").Event() for _ in range(3)]
print(pool.directory, flush=True)
os.killpg(0, signal.SIGKILL)
"""


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="semaphores are no files here")
@pytest.mark.row("A14")
def test_a_run_that_is_killed_with_its_group_leaves_no_semaphores_for_long():
    """Python's pool janitor dies with the group; the next run removes what is left, and nothing of
    a run that goes on."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        check=False,
    )
    directory = pathlib.Path(done.stdout.strip())

    def left():
        return list(directory.parent.glob(f"sem.{directory.name}-*"))

    assert done.returncode == -signal.SIGKILL and directory.is_dir() and len(left()) >= 3
    alive = shared_buffers.SharedBufferPool()
    event = multiprocessing.get_context("spawn").Event()
    names = set(directory.parent.glob(f"sem.{pathlib.Path(alive.directory).name}-*"))
    assert not left() and not directory.exists() and names
    shared_buffers.SharedBufferPool().close()
    assert (
        names == set(directory.parent.glob(f"sem.{pathlib.Path(alive.directory).name}-*"))
        and not event.is_set()
    )
    alive.close()
    shared_buffers.SharedBufferPool().close()
    assert all(path.exists() for path in names)  # Python removes them at exit
    assert multiprocessing.current_process()._config["semprefix"] == "/mp"
