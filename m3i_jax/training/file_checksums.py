"""Digests of the files of a checkpoint: what was written is what is read, or it is noticed before
it is used.

`digests.json` lies in the directory of a step and has two lines: a JSON object with the name of the
digest, and size and digest of every other file, and the CRC-32 of that line. The digest is XXH3 of
64 bits: it misses one of 2^64 damages, and takes less time than bringing the bytes from memory.
Older steps have CRC-32, which takes seven times as long.

A file that is missing, cut or of other bytes is damaged. A file that cannot be read (permission, a
disk or a server that fails) is not: what is in it may be whole, so that is an OSError."""

import concurrent.futures
import contextlib
import functools
import mmap
import os
import pathlib
import stat
import zlib
from collections.abc import Callable
from typing import Any

import xxhash

from m3i_jax import run_files

NAME = "digests.json"
# bytes read at once: so few that they are still in the processor's cache when they are digested
BLOCK = 2**18
LONGEST = 2**26  # bytes of digests.json that are read at all
THREADS = min(8, os.cpu_count() or 1)


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: memoryview | mmap.mmap) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


KINDS: dict[str, Callable[[], Any]] = {"xxh3-64": xxhash.xxh3_64, "crc32": _Crc32}
NOW = "xxh3-64"  # what is written


def file_digest(path: pathlib.Path, kind: str = NOW, *, written: bool = False) -> tuple[int, str]:
    """Size in bytes and digest of a file.

    Args: path: of the file. kind: of the digest, one of KINDS. written: it was written a moment
      ago, and is still in memory: on a local disk it is digested there, which takes half the time.
      A page that could not be brought from a disk or a network would end the process, so all else
      is read.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "x"
    >>> _ = path.write_bytes(b"123456789")
    >>> file_digest(path), file_digest(path, written=True) == file_digest(path), file_digest(path, "crc32")
    ((9, '72dcb18b67a17dff'), True, (9, 'cbf43926'))
    """
    size, value = 0, KINDS[kind]()
    with open(path, "rb", buffering=0) as file:
        about = os.fstat(file.fileno())
        if written and about.st_size and os.major(about.st_dev):  # 0: no disk of this machine
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
                size = len(pages)
                value.update(pages)
        else:
            block = bytearray(BLOCK)
            while count := file.readinto(block):
                size += count
                value.update(memoryview(block)[:count])
    return size, value.hexdigest()


def _files(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """All files below a directory but the digests themselves; links are not followed."""
    out = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            path = pathlib.Path(folder, name)
            out[path.relative_to(directory).as_posix()] = path
    out.pop(NAME, None)
    return out


def fsync_path(path: pathlib.Path) -> None:
    """A file, or the names in a directory, to the disk itself: a machine that loses power has it
    afterwards."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_checksums(directory: pathlib.Path, **notes: Any) -> None:
    """Digest all files of a directory, write it down there, and see all of it to the disk itself.
    `notes` are kept beside.

    Raises:
      OSError: something cannot be read or written.
    """
    files = _files(directory)
    with (
        concurrent.futures.ThreadPoolExecutor(THREADS) as disk,
        concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
    ):
        # a disk writes while a processor digests
        kept = [disk.submit(fsync_path, path) for path in files.values()]
        made = dict(
            zip(
                files,
                pool.map(functools.partial(file_digest, written=True), files.values()),
                strict=True,
            )
        )
        for one in kept:
            one.result()
    with open(directory / NAME, "wb") as file:
        file.write(run_files.seal_note({**notes, "digest": NOW, "files": made}))
        file.flush()
        os.fsync(file.fileno())
    for folder, _, _ in os.walk(directory, topdown=False):
        with contextlib.suppress(OSError):  # some file systems cannot do it for directories
            fsync_path(pathlib.Path(folder))


def read_checksums(directory: pathlib.Path) -> dict[str, Any] | None:
    """What `write_checksums` wrote there, None if it is not whole, or not there.

    Raises:
      OSError: it cannot be read.
    """
    place = directory / NAME
    try:
        if not stat.S_ISREG(place.lstat().st_mode):
            return None
    except (FileNotFoundError, NotADirectoryError):
        return None
    with open(place, "rb") as file:
        found = run_files.unseal_note(file.read(LONGEST))
    return found if _is_sound(found) else None


def _is_sound(found: Any) -> bool:
    """Whether something has the structure that `write_checksums` gives it, whoever made its
    checksum."""
    if (
        not isinstance(found, dict)
        or not isinstance(found.get("digest"), str)
        or not isinstance(found.get("files"), dict)
    ):
        return False
    numbers = [found[name] for name in ("format", "step") if name in found]
    arrays = found.get("arrays", {})
    return (
        all(type(number) is int for number in numbers)
        and isinstance(arrays, dict)
        and all(isinstance(value, str) for value in arrays.values())
        and run_files.parse_marks(list(found["files"].values())) is not None
        and not any(
            pathlib.PurePosixPath(name).is_absolute() or ".." in name.split("/")
            for name in found["files"]
        )
    )


def verify_checksums(directory: pathlib.Path) -> list[str]:
    """What is wrong with the files of a directory, `FILE: WHAT` each; nothing if all are as they
    were written. Files that came later are not looked at.

    Raises:
      OSError: a file is there and cannot be read.

    >>> import tempfile
    >>> place = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (place / "x").write_bytes(b"123"), (place / "y").write_bytes(b""), write_checksums(place)
    >>> verify_checksums(place), (place / "x").write_bytes(b"124"), (place / "y").unlink(), verify_checksums(place)
    ([], 3, None, ['x: other bytes than were written', 'y: is missing'])
    """
    found = read_checksums(directory)
    if found is None:
        there = os.path.lexists(directory / NAME)
        return [
            (
                f"{NAME}: is damaged"
                if there and not (directory / NAME).is_symlink()
                else f"{NAME}: is missing"
            )
        ]
    if (kind := found["digest"]) not in KINDS:
        return [f"{NAME}: has digests {kind!r}, which this version of m3i_jax does not know"]

    def one(item: tuple[str, tuple[int, str]]) -> str:
        name, (size, value) = item
        path = directory / name
        try:
            about = path.lstat()
            if not stat.S_ISREG(about.st_mode):
                return f"{name}: is not a file any more"
            if about.st_size != size:
                return f"{name}: {about.st_size:,} bytes, {size:,} were written"
            return (
                ""
                if file_digest(path, kind) == (size, value)
                else f"{name}: other bytes than were written"
            )
        except (FileNotFoundError, NotADirectoryError):
            return f"{name}: is missing"

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return [text for text in pool.map(one, sorted(found["files"].items())) if text]
