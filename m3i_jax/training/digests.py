"""Digests of the files of a checkpoint: what was written is what is read, or it is found out before it is used.

`digests.json` lies in the directory of a step and has two lines: a JSON object with size and CRC-32 of every other file, and the CRC-32 of
that line. A CRC-32 finds every single flipped bit and every burst of up to 32, whatever the length of the file; of other damage it misses
one in 2^32. zlib's needs no package and reads a file about as fast as a disk does.
"""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import stat
import zlib
from typing import Any

NAME = "digests.json"
BLOCK = 2**22  # bytes read at once
LONGEST = 2**26  # bytes of digests.json that are read at all
THREADS = min(8, os.cpu_count() or 1)


def digest(path: pathlib.Path) -> tuple[int, str]:
    """Size in bytes and CRC-32 of a file.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "x"
    >>> _ = path.write_bytes(b"123456789")
    >>> digest(path)
    (9, 'cbf43926')
    """
    size, value = 0, 0
    with open(path, "rb", buffering=0) as file:
        block = bytearray(BLOCK)
        while count := file.readinto(block):
            size, value = size + count, zlib.crc32(memoryview(block)[:count], value)
    return size, f"{value:08x}"


def _files(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """All files below a directory but the digests themselves; links are not followed."""
    out = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            path = pathlib.Path(folder, name)
            out[path.relative_to(directory).as_posix()] = path
    out.pop(NAME, None)
    return out


def to_disk(path: pathlib.Path) -> None:
    """A file, or the names in a directory, to the disk itself: a machine that loses power has it afterwards."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write(directory: pathlib.Path, **notes: Any) -> None:
    """Digest all files of a directory, write it down there, and see all of it to the disk itself. `notes` are kept beside.

    Raises:
      OSError: something cannot be read or written.
    """
    files = _files(directory)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        made = dict(zip(files, pool.map(digest, files.values()), strict=True))
        list(pool.map(to_disk, files.values()))
    line = json.dumps({**notes, "digest": "crc32", "files": made}, sort_keys=True)
    with open(directory / NAME, "w", encoding="ascii") as file:
        file.write(f"{line}\n{zlib.crc32(line.encode()):08x}\n")
        file.flush()
        os.fsync(file.fileno())
    for folder, _, _ in os.walk(directory, topdown=False):
        with contextlib.suppress(OSError):  # some file systems cannot do it for directories
            to_disk(pathlib.Path(folder))


def read(directory: pathlib.Path) -> dict[str, Any] | None:
    """What `write` wrote there, None if it is not whole."""
    try:
        with open(directory / NAME, "rb") as file:
            line, _, check = file.read(LONGEST).partition(b"\n")
        if check != b"%08x\n" % zlib.crc32(line):
            return None
        return json.loads(line)
    except (OSError, ValueError):
        return None


def complaints(directory: pathlib.Path) -> list[str]:
    """What is wrong with the files of a directory, `FILE: WHAT` each; nothing if all are as they were written. Files that came later are
    not looked at.

    >>> import tempfile
    >>> place = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (place / "x").write_bytes(b"123"), (place / "y").write_bytes(b""), write(place)
    >>> complaints(place), (place / "x").write_bytes(b"124"), (place / "y").unlink(), complaints(place)
    ([], 3, None, ['x: other bytes than were written', 'y: is missing'])
    """
    if (directory / NAME).is_symlink() or not (directory / NAME).is_file():
        return [f"{NAME}: is missing"]
    found = read(directory)
    if found is None:
        return [f"{NAME}: is damaged"]

    def one(item: tuple[str, tuple[int, str]]) -> str:
        name, (size, value) = item
        path = directory / name
        try:
            about = path.lstat()
            if not stat.S_ISREG(about.st_mode):
                return f"{name}: is not a file any more"
            if about.st_size != size:
                return f"{name}: {about.st_size:,} bytes, {size:,} were written"
            return "" if digest(path) == (size, value) else f"{name}: other bytes than were written"
        except FileNotFoundError:
            return f"{name}: is missing"
        except OSError as error:
            return f"{name}: cannot be read ({error.strerror or error})"

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return [text for text in pool.map(one, sorted(found["files"].items())) if text]
