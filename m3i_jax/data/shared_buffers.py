"""Recycles the memory of batches that worker processes or threads fill.

A batch of images is tens of megabytes. New memory for each batch costs page faults, in shared
memory one per 4 KiB, which take an eighth of the time of decoding. So a worker fills a block again
once the main process holds no reference to it. References are those of Python: the array, all its
views, and `jax.device_put`, which on CPU keeps reading the memory of a batch.

A block of a thread (`ThreadBufferPool`) is private memory. A block of a worker process is a file in
a private directory in shared memory: a page whose first byte says whether the block is lent, then
the array. Only the worker that made a block fills it. The main process removes the directory when
it ends, and the directories of processes that were killed.

The queues of a worker need more than a dozen semaphores. Multiprocessing removes those with a
helper process, which is killed with its process group. So the semaphores are named after the
directory and removed with it."""

import collections
import contextlib
import fcntl
import functools
import itertools
import math
import mmap
import multiprocessing
import os
import shutil
import struct
import tempfile
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

_HEADER = mmap.PAGESIZE
_FREE, _LENT = 0, 1
_NOTE, _ENTRY = "note-", struct.Struct("<qqq")  # the file of the record that a worker decodes
_PREFIX = "m3i-batches-"
_SEMAPHORE = "sem."  # prefix of the C library for files of semaphores
_OWN = set[str]()  # names of directories of this process, whose semaphores Python removes at exit


class BufferHandle:
    """What a worker sends in place of an array: its block and shape; see
    `SharedBufferPool.take`."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape = name, shape


class BufferWriter:
    """Gives arrays to a worker process to fill. A pickled copy holds no blocks.

    Args:
        directory: of the `SharedBufferPool`.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._blocks: dict[str, mmap.mmap] = {}
        self._current: mmap.mmap | None = None

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return BufferWriter, (self._directory,)

    @contextlib.contextmanager
    def lend(
        self, shape: tuple[int, ...], room: int = 0
    ) -> Iterator[tuple[BufferHandle, np.ndarray]]:
        """Yields (handle to send, uint8 array of undefined content to fill before). If the block
        raises, the memory stays with the worker. Arrays of several shapes share the blocks if all
        ask for the bytes of the largest, `room`; pages that are not written take no memory."""
        size = _HEADER + max(math.prod(shape), room)
        name, block = next(
            ((n, b) for n, b in self._blocks.items() if b[0] == _FREE and len(b) == size),
            (None, None),
        )
        if name is None or block is None:
            file, path = tempfile.mkstemp(dir=self._directory)
            os.truncate(file, size)
            name, block = os.path.basename(path), _map(file)
            self._blocks[name] = block
        block[0] = _LENT
        try:
            yield BufferHandle(name, shape), np.ndarray(shape, np.uint8, block, _HEADER)
        except BaseException:
            block[0] = _FREE
            raise

    def note(self, position: int, record: int) -> None:
        """Notes the record that is being decoded for a position of the stream, for the case that it
        ends this process; (-1, -1): none is. See `SharedBufferPool.current_records`."""
        if self._current is None:
            file, _ = tempfile.mkstemp(prefix=_NOTE, dir=self._directory)
            os.truncate(file, _ENTRY.size)
            self._current = _map(file)
        _ENTRY.pack_into(self._current, 0, os.getpid(), position, record)


class _TrackedArray(np.ndarray):
    """The base of all views of a block in the main process, so that it is deleted last."""

    release: Callable[[], None] | None = None

    def __del__(self) -> None:
        if self.release is not None:
            self.release()


def _tracked_view(
    block: mmap.mmap, shape: tuple[int, ...], offset: int, release: Callable[[], None]
) -> np.ndarray:
    """Returns an array in the block; calls `release` once it and all its views are deleted."""
    array = np.ndarray.__new__(_TrackedArray, shape, np.uint8, block, offset)
    array.release = release
    return array.view(np.ndarray)


class ThreadBufferPool:
    """Recycles memory among the threads of one process; the array is its own handle.

    >>> pool = ThreadBufferPool()
    >>> with pool.lend((2, 3)) as (handle, array):
    ...     array[:] = 7
    >>> handle.tolist()
    [[7, 7, 7], [7, 7, 7]]
    """

    def __init__(self) -> None:
        self._free: dict[int, collections.deque[mmap.mmap]] = {}

    @contextlib.contextmanager
    def lend(
        self, shape: tuple[int, ...], room: int = 0
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the array twice: to send, and to fill before. Its memory is used again once no
        reference to the array is left, whether or not the block raises. For `room` see
        `BufferWriter.lend`."""
        size = max(math.prod(shape), room)
        free = self._free.setdefault(size, collections.deque())
        try:
            block = free.pop()  # thread-safe
        except IndexError:
            # Not an array: NumPy would make that the base of all views.
            block = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        array = _tracked_view(block, shape, 0, functools.partial(free.append, block))
        yield array, array

    def note(self, position: int, record: int) -> None:
        """Does nothing: a record that ends a thread ends the program; see `BufferWriter.note`."""


class SharedBufferPool:
    """Owns the shared memory in the main process, and receives the arrays of the workers.

    >>> pool = SharedBufferPool()
    >>> with pool.writer().lend((2, 3)) as (handle, array):
    ...     array[:] = 7
    >>> pool.take(handle).tolist()
    [[7, 7, 7], [7, 7, 7]]
    >>> pool.close()
    """

    def __init__(self) -> None:
        _remove_stale()
        while True:
            self.directory = tempfile.mkdtemp(prefix=_PREFIX, dir=_shared_memory())
            path = os.path.join(self.directory, "lock")
            lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
            # the kernel releases the lock when this process ends, however it ends
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.exists(path):
                break
            os.close(lock)  # before it was locked, another process took it for one left behind
        self._finalize = weakref.finalize(self, _remove, self.directory, lock)
        _OWN.add(os.path.basename(self.directory))
        _name_semaphores(self.directory)
        self._blocks: dict[str, mmap.mmap] = {}

    def writer(self) -> BufferWriter:
        """Returns what the worker processes write with."""
        return BufferWriter(self.directory)

    def take(self, handle: BufferHandle) -> np.ndarray:
        """Returns the array of a handle without a copy. The worker may fill its memory again once
        this array and all its views are deleted."""
        if handle.name not in self._blocks:
            path = os.path.join(self.directory, handle.name)
            self._blocks[handle.name] = _map(os.open(path, os.O_RDWR))
        block = self._blocks[handle.name]
        release = functools.partial(block.__setitem__, 0, _FREE)
        return _tracked_view(block, handle.shape, _HEADER, release)

    def current_records(self) -> list[tuple[int, int, int]]:
        """Returns (process, position of the stream, record) of the records that workers are
        decoding, or were when they ended."""
        notes = []
        for entry in os.scandir(self.directory):
            if entry.name.startswith(_NOTE):
                with open(entry.path, "rb") as file:
                    raw = file.read(_ENTRY.size)
                if len(raw) < _ENTRY.size:  # of a worker that was killed before it made room
                    continue
                note = _ENTRY.unpack(raw)
                notes += [note] if note[0] and note[1] >= 0 else []
        return notes

    def close(self) -> None:
        """Releases the memory; that of arrays which are still referenced lives as long as they."""
        self._blocks.clear()
        self._finalize()


def _remove(directory: str, lock: int) -> None:
    process: Any = multiprocessing.current_process()
    if process._config.get("semprefix") == f"/{os.path.basename(directory)}":
        _name_semaphores("mp")
    shutil.rmtree(directory, ignore_errors=True)
    os.close(lock)


def _name_semaphores(directory: str) -> None:
    """Makes the names of semaphores of this process begin with the name of the directory; "mp" is
    Python's default."""
    if _shared_memory():
        process: Any = multiprocessing.current_process()
        process._config["semprefix"] = f"/{os.path.basename(directory)}"


def _shared_memory() -> str | None:
    """Returns the directory of shared memory, or None for that of temporary files."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


def _map(file: int) -> mmap.mmap:
    """Maps an open file into memory and closes it."""
    try:
        return mmap.mmap(file, 0)
    finally:
        os.close(file)


def _remove_stale() -> None:
    """Removes directories of this user whose process was killed, and semaphores of directories that
    no longer exist."""
    folder = _shared_memory() or tempfile.gettempdir()
    with contextlib.suppress(OSError):
        entries = (
            entry
            for entry in os.scandir(folder)
            if entry.name.removeprefix(_SEMAPHORE).startswith(_PREFIX)
        )
        # sorted, directories come before semaphores
        for entry in sorted(itertools.islice(entries, 1000), key=lambda entry: entry.name):
            with contextlib.suppress(OSError):
                if entry.stat(follow_symlinks=False).st_uid != os.getuid():
                    continue
                if entry.name.startswith(_SEMAPHORE):
                    directory = entry.name.removeprefix(_SEMAPHORE).rpartition("-")[0]
                    if directory not in _OWN and not os.path.isdir(os.path.join(folder, directory)):
                        os.unlink(entry.path)
                    continue
                lock = os.open(os.path.join(entry.path, "lock"), os.O_RDWR | os.O_NOFOLLOW)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(entry.path, ignore_errors=True)
                finally:
                    os.close(lock)
