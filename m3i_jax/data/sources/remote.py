"""Files in a bucket (gs://, s3://, memory://, ...), by fsspec: listed, described, and read by
ranges of bytes; nothing is copied."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from m3i_jax.errors import UnreadableError, UserError

# Of the many things that fsspec opens, what a store is. Others start programs (ssh, git), or unpack
# and keep copies (zip, simplecache::).
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
BLOCK = 1 << 20  # bytes that reading headers fetches at a time
_T = TypeVar("_T")


def is_remote(path: str) -> bool:
    """Whether a path is a URL.

    >>> is_remote("gs://bucket/x.tar"), is_remote("/data/x.tar")
    (True, False)
    """
    return "://" in path


def file_system(path: str) -> Any:
    """The fsspec file system of a URL; the library keeps one an address, so this is cheap.

    Raises: UserError: fsspec, or the package that it needs for this kind of URL, is missing; or
        this kind is not one of STORES.
    """
    kind = path.partition("://")[0]
    if kind not in STORES:
        raise UserError(
            f"{path!r}: {kind!r} is no store that is read from; these are: {', '.join(STORES)}"
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
    """The URLs that a glob stands for, sorted; a folder stands for its .tar files."""
    files, (kind, _, _) = file_system(pattern), pattern.partition("://")
    if not any(c in pattern for c in "*?["):
        pattern = (
            pattern
            if retry_network(pattern, lambda: files.isfile(pattern))
            else f"{pattern.rstrip('/')}/*.tar"
        )
    found = retry_network(pattern, lambda: files.glob(pattern))
    return sorted(
        f"{kind}://{str(name).removeprefix(f'{kind}://').lstrip('/') if kind != 'file' else name}"
        for name in found
    )


def file_state(path: str) -> tuple[int, str]:
    """(size in bytes, a text that changes when the file does)."""
    about = retry_network(path, lambda: file_system(path).info(path))
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
    return int(about["size"]), str([str(about[name]) for name in names if about.get(name)])


def open_file(path: str) -> Any:
    """A URL opened for reading ahead, from one end to the other."""
    return retry_network(
        path, lambda: file_system(path).open(path, "rb", block_size=BLOCK, cache_type="readahead")
    )


def read_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Several ranges (URL, offset, size) of one file system, at the same time where it can.

    Raises:
        UserError: one of them cannot be read, or ends too early.
    """
    if not ranges:
        return []
    files, (paths, starts, sizes) = file_system(ranges[0][0]), zip(*ranges, strict=True)
    ends = [start + size for start, size in zip(starts, sizes, strict=True)]
    got = files.cat_ranges(list(paths), list(starts), ends, on_error="return")
    out: list[bytes] = []
    for (path, start, size), content in zip(ranges, got, strict=True):
        if isinstance(content, Exception):  # one of many: again by itself
            content = retry_network(
                path, functools.partial(files.cat_file, path, start, start + size)
            )
        if len(content) != size:
            raise UnreadableError(
                f"{path!r} ends before byte {start + size}: it became shorter while the run was"
                " reading it; start again"
            )
        out.append(bytes(content))
    return out


def retry_network(path: str, act: Callable[[], _T], tries: int = 4) -> _T:
    """The value of `act`, which is repeated when the network fails it. That it fails for good is an
    error, never a bad record.

    >>> retry_network("gs://x", lambda: 3)
    3
    """
    for attempt in range(1, tries + 1):
        try:
            return act()
        except UserError:
            raise
        except Exception as error:  # every store has errors of its own
            if attempt == tries or isinstance(error, (FileNotFoundError, PermissionError)):
                reason = " ".join(str(error).split())[:200]
                raise UnreadableError(
                    f"{path!r} cannot be read ({type(error).__name__}: {reason}): check the address"
                    " and the access"
                ) from error
            time.sleep(0.2 * attempt**2)
    raise AssertionError("unreachable")
