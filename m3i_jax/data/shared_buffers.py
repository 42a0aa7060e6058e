"""Large arrays from worker processes, or from threads, in memory that is lent and comes back.

A batch of images is tens of megabytes. Fresh memory for each of them costs page faults, of shared
memory one every 4 KiB, an eighth of the time that it takes to decode the images; so a worker fills
what it has filled before, as soon as nobody in the main process holds it any more. "Nobody" is what
Python says of the array and of all views of it, and so of `jax.device_put`, which on CPU reads the
very memory of a batch later on.

A block of a thread (`ThreadBufferPool`) is private memory. One of a worker process is a file of a
private directory in memory: one page whose first byte says whether it is lent, then the array. Only
the worker that made a block fills it. The main process removes the directory at the end, and what
others left behind at a sudden end.

So it is with semaphores, of which the queues of a worker need more than a dozen: multiprocessing
removes them at the end, by a process that dies with its group when that is killed. They are named
after the directory, and removed with it."""

import collections
import contextlib
import fcntl
import functools
import itertools
import mmap
import multiprocessing
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator

import numpy as np

_HEADER = mmap.PAGESIZE
_FREE, _LENT = 0, 1
_PREFIX = "m3i-batches-"
_SEMAPHORE = "sem."  # how the C library begins the names of the files of semaphores


class BufferHandle:
    """What a worker sends in place of an array: where it lies. Read by `Lender.take`."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape = name, shape


class BufferWriter:
    """The side of the worker: gives arrays of bytes to fill. Sent to the process, it arrives with
    no blocks.

    Args:
        place: the directory of the `SharedBufferPool`.
    """

    def __init__(self, place: str) -> None:
        self._place = place
        self._blocks: dict[str, mmap.mmap] = {}

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return BufferWriter, (self._place,)

    @contextlib.contextmanager
    def lend(self, shape: tuple[int, ...]) -> Iterator[tuple[BufferHandle, np.ndarray]]:
        """(what to send, uint8 array of any content to fill first). If filling it fails, the block
        stays here."""
        size = _HEADER + int(np.prod(shape))
        name, block = next(
            ((n, b) for n, b in self._blocks.items() if b[0] == _FREE and len(b) == size),
            (None, None),
        )
        if name is None or block is None:
            file, path = tempfile.mkstemp(dir=self._place)
            os.truncate(file, size)
            name, block = os.path.basename(path), _map(file)
            self._blocks[name] = block
        block[0] = _LENT
        try:
            yield BufferHandle(name, shape), np.ndarray(shape, np.uint8, block, _HEADER)
        except BaseException:
            block[0] = _FREE
            raise


class _Loan(np.ndarray):
    """The array in the main process; the base of every view of it, so that it goes last."""

    back: Callable[[], None] | None = None

    def __del__(self) -> None:
        if self.back is not None:
            self.back()


def _loan(
    block: mmap.mmap, shape: tuple[int, ...], offset: int, back: Callable[[], None]
) -> np.ndarray:
    """An array in the block; `back` is called once it and all its views are gone."""
    loan = np.ndarray.__new__(_Loan, shape, np.uint8, block, offset)
    loan.back = back
    return loan.view(np.ndarray)


class ThreadBufferPool:
    """The same for threads of one process: what is sent is the array itself.

    >>> own = ThreadBufferPool()
    >>> with own.lend((2, 3)) as (sent, array):
    ...     array[:] = 7
    >>> sent.tolist()
    [[7, 7, 7], [7, 7, 7]]
    """

    def __init__(self) -> None:
        self._free: dict[int, collections.deque[mmap.mmap]] = {}

    @contextlib.contextmanager
    def lend(self, shape: tuple[int, ...]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(what to send, the same to fill first). It is filled again once nobody holds it; whether
        filling it fails makes no difference."""
        size = int(np.prod(shape))
        free = self._free.setdefault(size, collections.deque())
        try:
            block = free.pop()  # several threads may
        except IndexError:
            # Not an array: NumPy would have views of the loan hold that one instead.
            block = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        array = _loan(block, shape, 0, functools.partial(free.append, block))
        yield array, array


class SharedBufferPool:
    """The side of the main process.

    >>> lender = SharedBufferPool()
    >>> with lender.borrower().lend((2, 3)) as (sent, array):
    ...     array[:] = 7
    >>> lender.take(sent).tolist()
    [[7, 7, 7], [7, 7, 7]]
    >>> lender.close()
    """

    def __init__(self) -> None:
        _sweep()
        self.place = tempfile.mkdtemp(prefix=_PREFIX, dir=_memory())
        lock = os.open(os.path.join(self.place, "lock"), os.O_CREAT | os.O_RDWR, 0o600)
        # the system lets go of it with this process, whatever ends it
        fcntl.flock(lock, fcntl.LOCK_EX)
        self._end = weakref.finalize(self, _end, self.place, lock)
        _name_semaphores(self.place)
        self._blocks: dict[str, mmap.mmap] = {}

    def borrower(self) -> BufferWriter:
        """What the worker processes get."""
        return BufferWriter(self.place)

    def take(self, sent: BufferHandle) -> np.ndarray:
        """The array that was sent, without a copy. It is the borrower's again once this array and
        all its views are gone."""
        if sent.name not in self._blocks:
            self._blocks[sent.name] = _map(os.open(os.path.join(self.place, sent.name), os.O_RDWR))
        block = self._blocks[sent.name]
        return _loan(block, sent.shape, _HEADER, functools.partial(block.__setitem__, 0, _FREE))

    def close(self) -> None:
        """Gives the memory back, except what is still held: that goes with its array."""
        self._blocks.clear()
        self._end()


def _end(place: str, lock: int) -> None:
    if multiprocessing.current_process()._config.get("semprefix") == f"/{os.path.basename(place)}":  # type: ignore[attr-defined]
        _name_semaphores("mp")
    shutil.rmtree(place, ignore_errors=True)
    os.close(lock)


def _name_semaphores(place: str) -> None:
    """Names of the semaphores that this process makes from now on begin with that of the directory;
    "mp": as Python's do."""
    if _memory():
        multiprocessing.current_process()._config["semprefix"] = f"/{os.path.basename(place)}"  # type: ignore[attr-defined]


def _memory() -> str | None:
    """A directory in memory, or None: that of temporary files."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


def _map(file: int) -> mmap.mmap:
    """An open file as memory, and closed."""
    try:
        return mmap.mmap(file, 0)
    finally:
        os.close(file)


def _sweep() -> None:
    """Removes directories of this user whose process is gone without having done so, and semaphores
    of directories that are gone."""
    folder = _memory() or tempfile.gettempdir()
    with contextlib.suppress(OSError):
        ours = (
            entry
            for entry in os.scandir(folder)
            if entry.name.removeprefix(_SEMAPHORE).startswith(_PREFIX)
        )
        # directories come before semaphores
        for entry in sorted(itertools.islice(ours, 1000), key=lambda entry: entry.name):
            with contextlib.suppress(OSError):
                if entry.stat(follow_symlinks=False).st_uid != os.getuid():
                    continue
                if entry.name.startswith(_SEMAPHORE):
                    if not os.path.isdir(
                        os.path.join(folder, entry.name.removeprefix(_SEMAPHORE).rpartition("-")[0])
                    ):
                        os.unlink(entry.path)
                    continue
                lock = os.open(os.path.join(entry.path, "lock"), os.O_RDWR | os.O_NOFOLLOW)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(entry.path, ignore_errors=True)
                finally:
                    os.close(lock)
