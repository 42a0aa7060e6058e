"""Paths and local files of sources: reading by byte range, handles that stay open, and files that
are replaced as a whole."""

import collections
import difflib
import glob
import logging
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from m3i_jax.data.sources.outages import OUTAGES
from m3i_jax.errors import (
    UnreachableError,
    UnreadableError,
    UserError,
    is_transient,
    path_exists,
)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# An image file is read into memory before its header is checked, so 256 MiB is the limit.
FILE_LIMIT = 1 << 28
# Seconds before each retry of a failed read: two minutes in total, which a file server needs to
# start again. An error that no server causes, such as too many open files, has `BRIEF` waits.
WAITS, BRIEF = (0.2, 0.8, 4.0, 15.0, 30.0, 60.0), 2
_JOINED = 1 << 23  # most bytes of ranges that are read at once
_EXAMPLES = 20  # matches of a glob that are asked for what they are, from either end
_log = logging.getLogger(__name__)


def split_path(path: str, split: str) -> str:
    """Joins a split to a path: a folder or glob below the path, or the split itself if it is
    absolute or a URL. If the last part of the path is a glob of files, the split takes its place.

    >>> split_path("/data", "train"), split_path("/data", ""), split_path("/data", "/other/val")
    ('/data/train', '/data', '/other/val')
    >>> split_path("gs://bucket/x", "val-*.tar"), split_path("/data", "gs://bucket/x/*.tar")
    ('gs://bucket/x/val-*.tar', 'gs://bucket/x/*.tar')
    >>> split_path("gs://bucket/x/*.tar", "000*.tar"), split_path("gs://bucket/x-*", "a/*.tar")
    ('gs://bucket/x/000*.tar', 'gs://bucket/x-*/a/*.tar')
    """
    if not split:
        return path
    if "://" in split:
        return split
    folder, last = os.path.split(path := os.path.expanduser(path))
    if glob.has_magic(last) and not _names_directories(path):
        path = folder
    return os.path.join(path, os.path.expanduser(split))


def _names_directories(path: str) -> bool:
    """Whether a glob is of directories, below which a split lies; of a URL by its form."""
    if "://" in path:
        return "." not in os.path.basename(path)
    if os.path.isdir(path):
        return True
    # of tens of thousands of shards a few say what all are
    matches = sorted(glob.iglob(path))
    return any(map(os.path.isdir, {*matches[:_EXAMPLES], *matches[-_EXAMPLES:]}))


def whole_files(source: Any) -> list[tuple[str, int, int]]:
    """Returns the `extents` of a source that reads all records of its `files`.

    >>> import types
    >>> whole_files(types.SimpleNamespace(files=["a.tar"]))[0][:2]
    ('a.tar', 0)
    """
    return [(file, 0, sys.maxsize) for file in source.files]


def missing_path_error(path: str) -> str:
    """Names the first missing part of a path, and the closest name that exists.

    >>> missing_path_error("/no/such/folder")
    "there is no 'no' in '/'"
    """
    parent, name = os.path.split(os.path.abspath(path))
    while not os.path.isdir(parent):
        parent, name = os.path.split(parent)
    near = difflib.get_close_matches(name, sorted(os.listdir(parent)), 1)
    return f"there is no {name!r} in {parent!r}" + (
        f", did you mean {os.path.join(parent, near[0])!r}?" if near else ""
    )


def format_counts(ignored: dict[str, int]) -> str:
    """Formats counts of ignored files as the end of a description.

    >>> format_counts({"hidden": 2, "link out of the folder": 0})
    '; ignored: 2 hidden'
    """
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(ignored.items()) if count)
    return f"; ignored: {kinds}" if kinds else ""


def format_links(count: int) -> str:
    """Formats a number of records that are read under another name, too, as part of a description.

    >>> format_links(2), format_links(0)
    ('; 2 records are links to others', '')
    """
    if not count:
        return ""
    return (
        f"; {count:,} records are links to others"
        if count > 1
        else "; 1 record is a link to another"
    )


def is_file(path: str) -> bool:
    """Returns whether a path is a regular file, as `os.path.isfile`, which is False also where the
    disk of the file fails: a file would be left out of a new run.

    Raises:
        OSError: of a kind that may pass.

    >>> is_file(__file__), is_file("/"), is_file("/no/such/file")
    (True, False, False)
    """
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError) as error:  # ValueError: no file can have this name
        if is_transient(error):
            raise
        return False


def open_nonblocking(path: str, flags: int) -> int:
    """An opener for `open` that does not block on a named pipe without a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_byte_range(
    path: str, offset: int = 0, size: int | None = None, *, limit: int = FILE_LIMIT
) -> bytes:
    """Reads part of a file by position; see `read_byte_ranges`.

    Args:
        path: local file.
        offset: of the first byte.
        size: bytes; None for the rest of the file.
        limit: most bytes of the rest of the file.

    Returns:
        The bytes; exactly `size` of them if `size` is given.

    >>> read_byte_range(__file__, 0, 3)
    b'\"\"\"'
    """
    return read_byte_ranges(path, [(offset, size)], limit=limit)[0]


def read_byte_ranges(
    path: str, ranges: Sequence[tuple[int, int | None]], *, limit: int = FILE_LIMIT
) -> list[bytes]:
    """Reads parts of a file, (offset, size) each, and opens it once.

    A failed read is retried. A read that keeps failing is an error and not a bad record: otherwise
    the order of the stream would depend on transient faults of a network disk.

    Raises:
        UnreadableError: the file cannot be read, or is shorter than when it was indexed; an
            UnreachableError where its disk does not answer.
    """
    started = time.monotonic()
    for attempt in range(len(WAITS) + 1):
        try:
            with open(path, "rb", buffering=0, opener=open_nonblocking) as file:
                state = os.fstat(file.fileno())
                if not stat.S_ISREG(state.st_mode):
                    raise UnreadableError(
                        f"{path!r} is no longer a regular file, as it was when the run began;"
                        " restore it"
                    )
                contents = []
                for offset, size in ranges:
                    length = min(state.st_size - offset, limit) if size is None else size
                    contents.append(content := _read_at(file.fileno(), offset, length))
                    if size is not None and len(content) < size:
                        raise UnreadableError(
                            f"{path!r} ends before byte {offset + size}: it became shorter while"
                            " the run was reading it; start again"
                        )
            OUTAGES.answered(path)
            return contents
        except OSError as error:
            transient = is_transient(error)
            waits = WAITS if transient and not OUTAGES.lasts(path) else WAITS[:BRIEF]
            if attempt >= len(waits) or isinstance(error, FileNotFoundError | PermissionError):
                if len(waits) == len(WAITS):
                    OUTAGES.begin(path, started)
                raise (UnreachableError if transient else UnreadableError)(
                    f"{path!r} cannot be read ({error.strerror}) although it could when the run"
                    " began; restore it"
                ) from error
            log_retry(path, error, wait := waits[attempt])
            time.sleep(wait)
    raise AssertionError("unreachable")


def _read_at(file: int, offset: int, length: int) -> bytes:
    """Reads bytes at an offset, fewer where the file ends."""
    chunks, count = [], 0
    while count < length and (chunk := os.pread(file, length - count, offset + count)):
        chunks.append(chunk)
        count += len(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


Range = tuple[str, int, int]  # path, and offset and size, or start and end


def read_joined(
    ranges: Sequence[Range], gap: int, read: Callable[[list[Range]], list[bytes]]
) -> list[bytes]:
    """Reads ranges (path, offset, size). Those of a file that lie close together, such as an image
    and its caption, are one request.

    Args:
        ranges: to read.
        gap: bytes between two ranges that are read along.
        read: requests (path, start, end), sorted -> the bytes of each.
    """
    requests, places = join_ranges(ranges, gap)
    contents = read(requests)
    results: list[bytes] = []
    for (_, start, size), place in zip(ranges, places, strict=True):
        begin = start - requests[place][1]
        whole = begin == 0 and size == len(contents[place])
        results.append(contents[place] if whole else contents[place][begin : begin + size])
    return results


def join_ranges(ranges: Sequence[Range], gap: int) -> tuple[list[Range], list[int]]:
    """Returns requests (path, start, end), sorted, and of each range the number of its request.

    >>> join_ranges([("b", 9, 3), ("a", 5, 2), ("a", 0, 4)], gap=1)
    ([('a', 0, 7), ('b', 9, 12)], [1, 0, 0])
    """
    requests: list[Range] = []
    places = [0] * len(ranges)
    for i in sorted(range(len(ranges)), key=ranges.__getitem__):
        path, start, size = ranges[i]
        last, begin, end = requests[-1] if requests else ("", 0, 0)
        joined = max(end, start + size)
        if path == last and start <= end + gap and joined - begin <= _JOINED:
            requests[-1] = (path, begin, joined)
        else:
            requests.append((path, start, start + size))
        places[i] = len(requests) - 1
    return requests, places


def check_presence(path: str) -> None:
    """Raises the error of a file that was there when the run began and is not any more.

    Raises:
        UnreadableError: it is gone; an UnreachableError where its disk does not answer.

    >>> check_presence("/no/such/file")
    Traceback (most recent call last):
    m3i_jax.errors.UnreadableError: '/no/such/file' cannot be read although it could when the ...
    """
    try:
        if path_exists(path):
            return
        kind = UnreadableError
    except OSError:
        kind = UnreachableError
    raise kind(f"{path!r} cannot be read although it could when the run began; restore it")


def log_retry(path: str, error: Exception, wait: float) -> None:
    """Logs that a failed read is retried after a wait, if the wait is long enough to be noticed."""
    if wait >= 1:
        reason = " ".join(str(error).split())[:200]
        _log.warning("%r cannot be read (%s); retrying in %g seconds", path, reason, wait)


class HandleCache:
    """A thread-safe LRU cache of open files, keyed by the caller. A pickled copy is empty, so a
    source that is sent to a worker arrives with nothing open.

    Args:
        size: entries kept; the least recently used is dropped and closed once nothing refers to it.

    >>> import copy                                        # copies as pickle does: `__reduce__`
    >>> cache = HandleCache(1)
    >>> [cache(name, lambda: name.upper()) for name in ("a", "b")], len(cache)
    (['A', 'B'], 1)
    >>> len(copy.copy(cache))
    0
    """

    def __init__(self, size: int = 1) -> None:
        self._size, self._lock = size, threading.Lock()
        self._making: dict[Hashable, threading.Lock] = {}
        self._handles: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()

    def __call__(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Returns the entry of `key`, made by `make` if it is not cached. Entries of other keys are
        there meanwhile, and are made at the same time."""
        with self._lock:
            if key in self._handles:
                self._handles.move_to_end(key)
                return self._handles[key]
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                made = self._handles.get(key)  # by the thread that this one waited for
            if made is None:
                made = make()
            with self._lock:
                self._making.pop(key, None)
                self._handles[key] = made
                self._handles.move_to_end(key)
                if len(self._handles) > self._size:
                    self._handles.popitem(last=False)
                return made

    def __len__(self) -> int:
        return len(self._handles)

    def __reduce__(self) -> tuple[Any, ...]:
        return HandleCache, (self._size,)


def write_atomic(path: str, content: bytes) -> None:
    """Writes a file under a temporary name and renames it, so that no reader sees half of it.

    Raises:
        UserError: the directory cannot be written to; no partial file is left.
    """
    try:
        replace_file(path, lambda file: file.write(content))
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; make room or choose another directory"
        ) from error


def replace_file(path: str, write: Callable[[Any], Any]) -> None:
    """Calls `write` with a file of a temporary name beside the path, and renames it to the path."""
    # a random name: containers of several hosts have the same process id
    temporary = f"{path}.{os.urandom(8).hex()}.part"
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
