"""Walks the headers of a tar file: names, positions and sizes of its regular members, without
reading what they hold.

Python's `tarfile` keeps every member in memory and ends in silence at a damaged header; this walk
holds one header at a time, goes on behind damage, and counts it. POSIX ustar, GNU long names and
sizes, and pax `path` and `size` are understood."""

import collections
import os
from collections.abc import Iterator
from typing import BinaryIO

BLOCK = 512
_LONG = 1 << 16  # longest GNU name or pax header that is believed
TRUNCATED, BROKEN = "truncated ends", "damaged headers"
LINKS, SPECIAL, OUTSIDE = "links", "special members", "names that lead outside"
DAMAGE, HOSTILE = (TRUNCATED, BROKEN), (LINKS, SPECIAL, OUTSIDE)


def tar_members(
    file: BinaryIO, problems: collections.Counter[str]
) -> Iterator[tuple[str, int, int]]:
    """Yields (name, offset of the content, size) of the regular members of an open tar file.

    Args: file: opened for reading, not compressed. problems: counts what is passed over: links,
        special files, names that lead outside, damaged headers, truncated ends.

    >>> import io, tarfile
    >>> buffer = io.BytesIO()
    >>> with tarfile.open(fileobj=buffer, mode="w") as tar:
    ...     member = tarfile.TarInfo("a.txt")
    ...     member.size = 3
    ...     tar.addfile(member, io.BytesIO(b"abc"))
    >>> list(tar_members(buffer, collections.Counter()))
    [('a.txt', 512, 3)]
    """
    end = file.seek(0, os.SEEK_END)
    at, damaged = 0, False
    later: dict[str, bytes] = {}  # what a long name or pax header says of the next member
    while at < end:
        header = _read(file, at, BLOCK)
        if len(header) < BLOCK:
            problems[TRUNCATED] += 1
            return
        if header.count(0) == BLOCK:
            return  # the end mark
        size = _valid_size(header)
        if size is None:
            problems[BROKEN] += not damaged  # one for a whole stretch
            at, damaged, later = at + BLOCK, True, {}
            continue
        damaged, kind, content = False, header[156:157], at + BLOCK
        if kind in b"LKxg" and kind:
            raw = _read(file, content, min(size, _LONG))
            if kind == b"L":
                later["path"] = raw.rstrip(b"\0")
            elif kind == b"x":
                later.update(_pax(raw))
            at = content + -(-size // BLOCK) * BLOCK
            continue
        name, size, later = later.get("path") or _name(header), _number(later.get("size"), size), {}
        at = content + -(-size // BLOCK) * BLOCK
        if content + size > end:
            problems[TRUNCATED] += 1
            return
        if kind in (b"1", b"2"):
            problems[LINKS] += 1
        elif kind not in (b"0", b"\0", b"7"):
            problems[SPECIAL] += kind != b"5"  # folders are no loss
        elif name.startswith(b"/") or b".." in name.split(b"/"):
            problems[OUTSIDE] += 1
        else:
            yield name.removeprefix(b"./").decode("utf-8", "surrogateescape"), content, size
    problems[TRUNCATED] += at > end


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    return file.read(size)


def _valid_size(header: bytes) -> int | None:
    """The size a header gives, or None if it is no header: its checksum must hold."""
    checksum, size = _octal(header[148:156]), _octal(header[124:136])
    if header[124] & 0x80:  # GNU: base 256
        size = int.from_bytes(header[125:136], "big") if header[124] == 0x80 else None
    return size if checksum == sum(header) - sum(header[148:156]) + 8 * 32 else None


def _octal(field: bytes) -> int | None:
    digits = field.split(b"\0", 1)[0].strip() or b"0"
    # int() alone also takes a sign
    return int(digits, 8) if digits.isdigit() and not (b"8" in digits or b"9" in digits) else None


def _name(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0", 1)[0], header[345:500].split(b"\0", 1)[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _number(text: bytes | None, default: int) -> int:
    return int(text) if text and text.isdigit() and len(text) < 20 else default


def _pax(raw: bytes) -> dict[str, bytes]:
    """`path` and `size` of a pax header: records of the form "LENGTH KEY=VALUE\\n"."""
    found, at = {}, 0
    while at < len(raw):
        length, _, _ = raw[at : at + 20].partition(b" ")
        if not length.isdigit() or not 3 < int(length) <= len(raw) - at:
            break
        key, _, value = raw[at + len(length) + 1 : at + int(length) - 1].partition(b"=")
        if key in (b"path", b"size"):
            found[key.decode()] = value
        at += int(length)
    return found
