"""Lists files in a bucket (gs://, s3://, memory://, ...) and reads byte ranges of them with fsspec,
without local copies."""

import concurrent.futures
import io
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from m3i_jax.data.sources.local_files import log_retry, read_joined
from m3i_jax.data.sources.outages import OUTAGES
from m3i_jax.errors import UnreachableError, UnreadableError, UserError

# The protocols of fsspec that are stores. Others start programs (ssh, git) or keep unpacked copies
# (zip, simplecache::).
STORES = (
    "gs",
    "gcs",
    "s3",
    "s3a",
    "az",
    "abfs",
    "abfss",
    "adl",
    "oss",
    "http",
    "https",
    "hdfs",
    "webhdfs",
    "file",
    "memory",
)
# Bytes per request while headers are read: at 50 ms a request and 100 MB/s, 8 MiB take 130 ms.
BLOCK = 1 << 23
# Seconds before each retry of a range: two minutes in total. The first retry follows at once.
WAITS, BRIEF = (0.0, 0.2, 0.8, 4.0, 15.0, 30.0, 60.0), 3
_REFUSED = re.compile(r"(?i)forbidden|unauthorized|bad request|access ?denied")
JOIN = 1 << 16  # bytes between two ranges that are read along: less time than another request
_THREADS = 32  # of file systems that have no concurrent reads of their own
State = tuple[int, str]  # size in bytes, and a text that changes when the file changes
_T = TypeVar("_T")


def is_remote(path: str) -> bool:
    """Returns whether a path is a URL.

    >>> is_remote("gs://bucket/x.tar"), is_remote("/data/x.tar")
    (True, False)
    """
    return "://" in path


def file_system(path: str) -> Any:
    """Returns the fsspec file system of a URL. The library caches one per address.

    Raises:
        UserError: fsspec, or the package that it needs for this protocol, is missing; or the
            protocol is not one of STORES.
    """
    protocol = path.partition("://")[0]
    if protocol not in STORES:
        raise UserError(
            f"{path!r}: {protocol!r} is not a supported store; use one of {', '.join(STORES)}"
        )
    try:
        import fsspec

        return fsspec.core.url_to_fs(path)[0]
    except ImportError as error:
        raise UserError(
            f"{path!r} needs a package: {error}; install it (for gs://: pip install 'm3i-jax[gcs]')"
        ) from error
    except ValueError as error:
        raise UserError(f"{path!r}: {error}") from error


def glob_urls(pattern: str) -> dict[str, State | None]:
    """Returns the URLs that match a glob, sorted; of a folder, its .tar files. Each has its state
    if the listing of the store tells it, so that no file needs a request of its own."""
    files, protocol = file_system(pattern), pattern.partition("://")[0]
    if not any(c in pattern for c in "*?[") and not retry_network(
        pattern, lambda: files.isfile(pattern)
    ):
        pattern = f"{pattern.rstrip('/')}/*.tar"
    listed = retry_network(pattern, lambda: files.glob(pattern, detail=True))
    rest, bare = pattern.removeprefix(f"{protocol}://"), str(files._strip_protocol(pattern))
    urls = {}
    for name, info in listed.items():
        name = str(name).removeprefix(f"{protocol}://")
        # of HDFS, listings leave out the name node
        place = rest.removesuffix(bare) + name if rest.endswith(bare) else name.lstrip("/")
        urls[f"{protocol}://{place}"] = _state(info)
    return {url: urls[url] for url in sorted(urls)}


def file_states(paths: Iterable[str], known: Mapping[str, State | None]) -> list[State]:
    """Returns the states of files of one file system; asks for those that are not known, many at a
    time."""
    paths = list(paths)
    unknown = [path for path in paths if known.get(path) is None]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        asked = dict(zip(unknown, pool.map(file_state, unknown), strict=True))
    return [known.get(path) or asked[path] for path in paths]


def file_state(path: str) -> State:
    """Returns (size in bytes, a text that changes when the file changes)."""
    info = retry_network(path, lambda: file_system(path).info(path))
    return _state(info) or (int(info["size"] or 0), "")


def _state(info: Mapping[str, Any]) -> State | None:
    names = (
        "etag",
        "ETag",
        "md5Hash",
        "crc32c",
        "generation",
        "updated",
        "LastModified",
        "last_modified",
        "mtime",
        "created",
    )
    stamps = [str(info[name]) for name in names if info.get(name)]
    return (int(info["size"]), str(stamps)) if stamps and info.get("size") is not None else None


def open_file(path: str) -> io.BufferedReader:
    """Opens a URL for reading, with readahead; a request that fails is tried again."""
    return io.BufferedReader(_RangeFile(path), BLOCK)


class _RangeFile(io.RawIOBase):
    """A file whose reads are requests for ranges."""

    def __init__(self, path: str) -> None:
        self._path, self._size, self._place = path, file_state(path)[0], 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place}.get(whence, self._size)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        count = max(min(len(buffer), self._size - self._place), 0)
        if count:
            (content,) = _read_requests([(self._path, self._place, self._place + count)])
            buffer[:count] = content
        self._place += count
        return count


def read_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Reads several ranges (URL, offset, size) of one file system, all at the same time. Ranges of
    a file that lie close together, such as an image and its caption, are one request. Those that
    fail are asked for again, together.

    Raises:
        UnreadableError: a range cannot be read, or a file ends before it.
    """
    return read_joined(ranges, JOIN, _read_requests)


def _read_requests(requests: Sequence[tuple[str, int, int]]) -> list[bytes]:
    # a range of no bytes cannot be asked for: stores send the whole file, or refuse
    contents = {i: b"" for i, (_, start, end) in enumerate(requests) if start == end}
    started = time.monotonic()
    waits = WAITS[:BRIEF] if requests and OUTAGES.lasts(requests[0][0]) else WAITS
    for wait in (*waits, None):
        pending = [i for i in range(len(requests)) if i not in contents]
        if not pending:
            break
        failed: tuple[str, Exception] | None = None
        results = _read_once([requests[i] for i in pending])
        for i, content in zip(pending, results, strict=True):
            path, start, end = requests[i]
            if isinstance(content, Exception):
                if is_refusal(content):
                    raise UnreadableError(_reason(path, content)) from content
                if wait is None:
                    if waits is WAITS:
                        OUTAGES.begin(path, started)
                    raise UnreachableError(_reason(path, content)) from content
                failed = path, content
            elif len(content) < end - start:
                raise UnreadableError(
                    f"{path!r} ends before byte {end}: it became shorter while the run was reading"
                    " it; start again"
                )
            elif len(content) > end - start:
                raise UnreadableError(
                    f"{path!r}: the server sends whole files instead of ranges: use another store"
                )
            else:
                OUTAGES.answered(path)
                contents[i] = bytes(content)
        if failed and wait is not None:
            log_retry(*failed, wait)
            time.sleep(wait)
    return [contents[i] for i in range(len(requests))]


def _read_once(requests: Sequence[tuple[str, int, int]]) -> list[bytes | Exception]:
    if not requests:
        return []
    files = file_system(requests[0][0])
    paths, starts, ends = (list(column) for column in zip(*requests, strict=True))
    if getattr(files, "async_impl", False):
        return list(files.cat_ranges(paths, starts, ends, on_error="return"))

    def read(path: str, start: int, end: int) -> bytes | Exception:
        try:
            return bytes(files.cat_file(path, start, end))
        except Exception as error:  # each store raises its own types
            return error

    if len(requests) == 1:
        return [read(*requests[0])]
    with concurrent.futures.ThreadPoolExecutor(min(_THREADS, len(requests))) as pool:
        return list(pool.map(read, paths, starts, ends))


def retry_network(path: str, act: Callable[[], _T], tries: int = 4) -> _T:
    """Calls `act` until it succeeds, at most `tries` times. A lasting failure is an error, not a
    bad record.

    Raises:
        UserError: the file is missing or forbidden.
        UnreadableError: the last attempt failed.

    >>> retry_network("gs://x", lambda: 3)
    3
    """
    for attempt in range(1, tries + 1):
        try:
            return act()
        except UserError:
            raise
        except Exception as error:  # each store raises its own types
            # while a run reads, its access is refreshed and may fail for a moment; here it is new
            if is_refusal(error) or "credentials" in str(error).lower():
                raise UserError(_reason(path, error)) from error
            if attempt == tries:
                raise UnreachableError(_reason(path, error)) from error
            time.sleep(0.2 * attempt**2)
    raise AssertionError("unreachable")


def is_refusal(error: Exception) -> bool:
    """Returns whether a store refuses a request, so that no retry helps: there is no such file, or
    no access to it. Stores have errors of their own; gcsfs raises an OSError without number.

    >>> is_refusal(OSError("Forbidden: gs://x/a.tar")), is_refusal(OSError("502 Bad Gateway"))
    (True, False)
    """
    if isinstance(error, FileNotFoundError | PermissionError):
        return True
    code = getattr(error, "status", getattr(error, "code", None))
    return code in (400, 401, 403, 404) or bool(_REFUSED.search(str(error)))


def _reason(path: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    return (
        f"{path!r} cannot be read ({type(error).__name__}: {reason}): check the address and the"
        " access"
    )
