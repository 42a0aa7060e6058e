"""Lists files in a bucket (gs://, s3://, memory://, ...) and reads byte ranges of them with fsspec,
without local copies."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from m3i_jax.errors import UnreadableError, UserError

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
BLOCK = 1 << 20  # bytes per request while headers are read
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
            f"{path!r} needs a package: {error}; pip install 'm3i-jax[gcs]' brings fsspec and gcsfs"
        ) from error
    except ValueError as error:
        raise UserError(f"{path!r}: {error}") from error


def glob_urls(pattern: str) -> list[str]:
    """Returns the URLs that match a glob, sorted; of a folder, its .tar files."""
    files, protocol = file_system(pattern), pattern.partition("://")[0]
    if not any(c in pattern for c in "*?[") and not retry_network(
        pattern, lambda: files.isfile(pattern)
    ):
        pattern = f"{pattern.rstrip('/')}/*.tar"
    names = [str(name) for name in retry_network(pattern, lambda: files.glob(pattern))]
    if protocol != "file":
        names = [name.removeprefix(f"{protocol}://").lstrip("/") for name in names]
    return sorted(f"{protocol}://{name}" for name in names)


def file_state(path: str) -> tuple[int, str]:
    """Returns (size in bytes, a text that changes when the file changes)."""
    info = retry_network(path, lambda: file_system(path).info(path))
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
    return int(info["size"]), str([str(info[name]) for name in names if info.get(name)])


def open_file(path: str) -> Any:
    """Opens a URL for sequential reading, with readahead."""
    return retry_network(
        path, lambda: file_system(path).open(path, "rb", block_size=BLOCK, cache_type="readahead")
    )


def read_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Reads several ranges (URL, offset, size) of one file system, concurrently if it supports
    that.

    Raises:
        UnreadableError: a range cannot be read, or a file ends before it.
    """
    if not ranges:
        return []
    files, (paths, starts, sizes) = file_system(ranges[0][0]), zip(*ranges, strict=True)
    ends = [start + size for start, size in zip(starts, sizes, strict=True)]
    results = files.cat_ranges(list(paths), list(starts), ends, on_error="return")
    contents: list[bytes] = []
    for (path, start, size), content in zip(ranges, results, strict=True):
        if isinstance(content, Exception):  # retry this range alone
            content = retry_network(
                path, functools.partial(files.cat_file, path, start, start + size)
            )
        if len(content) != size:
            raise UnreadableError(
                f"{path!r} ends before byte {start + size}: it became shorter while the run was"
                " reading it; start again"
            )
        contents.append(bytes(content))
    return contents


def retry_network(path: str, act: Callable[[], _T], tries: int = 4) -> _T:
    """Calls `act` until it succeeds, at most `tries` times. A lasting failure is an error, not a
    bad record.

    Raises:
        UnreadableError: the last attempt failed, or the file is missing or forbidden.

    >>> retry_network("gs://x", lambda: 3)
    3
    """
    for attempt in range(1, tries + 1):
        try:
            return act()
        except UserError:
            raise
        except Exception as error:  # each store raises its own types
            if attempt == tries or isinstance(error, (FileNotFoundError, PermissionError)):
                reason = " ".join(str(error).split())[:200]
                raise UnreadableError(
                    f"{path!r} cannot be read ({type(error).__name__}: {reason}): check the address"
                    " and the access"
                ) from error
            time.sleep(0.2 * attempt**2)
    raise AssertionError("unreachable")
