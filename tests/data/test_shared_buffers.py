"""Blocks of memory that worker processes, or threads, fill again once nobody holds them."""

import copy
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
def lender():
    made = shared_buffers.SharedBufferPool()
    yield made
    made.close()


def send(
    borrower: shared_buffers.BufferWriter, value: int, shape: tuple[int, ...] = (64, 128)
) -> shared_buffers.BufferHandle:
    with borrower.lend(shape) as (sent, array):
        array[:] = value
    return copy.copy(sent)


def test_a_block_is_filled_again_only_when_no_view_is_left(lender):
    borrower = copy.copy(lender.borrower())
    first = lender.take(send(borrower, 1))
    part = first[3:5, ::2]
    second = lender.take(send(borrower, 2))
    assert not np.shares_memory(first, second)
    del first
    gc.collect()
    third = lender.take(send(borrower, 3))  # the part is still held
    assert (part == 1).all() and (second == 2).all() and (third == 3).all()
    place = part.__array_interface__["data"][0] - 3 * 128
    del part
    gc.collect()
    fourth = lender.take(send(borrower, 4))
    assert (
        fourth.__array_interface__["data"][0] == place
        and (fourth == 4).all()
        and (third == 3).all()
    )


def test_what_the_device_reads_is_not_filled_again(lender):
    """On CPU `jax.device_put` may take the memory itself."""
    borrower, kept = lender.borrower(), []
    for value in range(8):
        kept.append(jax.device_put(lender.take(send(borrower, value))))
    assert [set(np.asarray(array).ravel().tolist()) for array in kept] == [
        {value} for value in range(8)
    ]


def test_a_loop_needs_few_blocks(lender):
    borrower, held = lender.borrower(), None
    for value in range(20):
        held = lender.take(send(borrower, value))
        assert (held == value).all()
    assert len(os.listdir(lender.place)) == 1 + 2  # its lock; one is held while the next is filled


def test_other_shapes_and_failures(lender):
    borrower = lender.borrower()
    small, large = (lender.take(send(borrower, 5, shape)) for shape in ((2, 2), (300, 300)))
    with pytest.raises(RuntimeError, match="no picture"), borrower.lend((7, 7)) as (_, array):
        array[:] = 9
        raise RuntimeError("no picture")
    before = len(os.listdir(lender.place))
    assert (lender.take(send(borrower, 6, (7, 7))) == 6).all() and len(
        os.listdir(lender.place)
    ) == before
    assert (small == 5).all() and (large == 5).all()


def test_nothing_is_left_and_nothing_is_pulled_away(lender):
    array = lender.take(send(lender.borrower(), 8))
    assert os.stat(lender.place).st_mode & 0o777 == 0o700
    lender.close()
    assert not os.path.exists(lender.place) and (array == 8).all()
    lender.close()  # twice does no harm


def test_the_next_run_sweeps_after_one_that_was_killed():
    code = (
        "import os, signal\nfrom m3i_jax.data import loans\nlender ="
        " shared_buffers.SharedBufferPool()\nprint(lender.place, flush=True)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code + "os.kill(os.getpid(), signal.SIGKILL)"],
        capture_output=True,
        text=True,
    )
    left = killed.stdout.strip()
    assert os.path.isdir(left)
    with_lock = shared_buffers.SharedBufferPool()  # alive: not swept by the next
    other = shared_buffers.SharedBufferPool()
    assert (
        not os.path.exists(left) and os.path.isdir(with_lock.place) and os.path.isdir(other.place)
    )
    other.close()
    with_lock.close()
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not os.path.exists(ended.stdout.strip())


def made(
    own: shared_buffers.ThreadBufferPool, value: int, shape: tuple[int, ...] = (64, 128)
) -> np.ndarray:
    with own.lend(shape) as (sent, array):
        array[:] = value
    return sent


def place(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_threads_fill_again_only_what_nobody_holds():
    own = shared_buffers.ThreadBufferPool()
    first, second = made(own, 1), made(own, 2)
    at, part = place(first), first[3:5, ::2]
    del first
    third = made(own, 3)
    assert place(third) not in (at, place(second)) and (part == 1).all() and (second == 2).all()
    del part
    assert place(made(own, 4)) == at and (third == 3).all()
    assert place(made(own, 5, (128, 64))) == at and place(made(own, 6, (2, 2))) != at
    with pytest.raises(RuntimeError, match="no picture"), own.lend((7, 7)) as (sent, array):
        raise RuntimeError("no picture")
    before = place(array)
    del sent, array
    gc.collect()  # a traceback holds what was lent
    assert place(made(own, 7, (7, 7))) == before


def test_what_the_device_reads_is_not_filled_again_by_threads():
    own = shared_buffers.ThreadBufferPool()
    kept = [jax.device_put(made(own, value)) for value in range(8)]
    assert [set(np.asarray(array).ravel().tolist()) for array in kept] == [
        {value} for value in range(8)
    ]


def test_threads_never_get_the_same_block():
    own = shared_buffers.ThreadBufferPool()

    def work(value: int) -> tuple[bool, int]:
        whole, at = True, set()
        for _ in range(200):
            array = made(own, value)
            whole &= bool((array == value).all())
            at.add(place(array))
        return whole, len(at)

    with futures.ThreadPoolExecutor(4) as pool:
        done = list(pool.map(work, range(4)))
    assert all(whole for whole, _ in done) and max(places for _, places in done) <= 8


KILLED = """
import multiprocessing, os, signal
from m3i_jax.data import loans
lender = shared_buffers.SharedBufferPool()
kept = [multiprocessing.get_context("spawn").Event() for _ in range(3)]
print(lender.place, flush=True)
os.killpg(0, signal.SIGKILL)
"""


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="semaphores are no files here")
@pytest.mark.row("A14")
def test_a_run_that_is_killed_with_its_group_leaves_no_semaphores_for_long():
    """Python's own janitor dies with the group; the next run removes what is left, and nothing of a
    run that goes on."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        check=False,
    )
    place = pathlib.Path(done.stdout.strip())

    def left():
        return list(place.parent.glob(f"sem.{place.name}-*"))

    assert done.returncode == -signal.SIGKILL and place.is_dir() and len(left()) >= 3
    alive = shared_buffers.SharedBufferPool()
    event = multiprocessing.get_context("spawn").Event()
    names = set(place.parent.glob(f"sem.{pathlib.Path(alive.place).name}-*"))
    assert not left() and not place.exists() and names
    shared_buffers.SharedBufferPool().close()
    assert (
        names == set(place.parent.glob(f"sem.{pathlib.Path(alive.place).name}-*"))
        and not event.is_set()
    )
    alive.close()
    assert multiprocessing.current_process()._config["semprefix"] == "/mp"
