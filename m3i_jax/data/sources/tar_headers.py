"""Parses the headers of a tar file: names, offsets and sizes of its regular members, without
reading their content.

Python's `tarfile` keeps every member in memory and stops at a damaged header without an error. This
parser holds one header at a time, continues behind damage, and counts it. It supports POSIX ustar,
GNU long names and sizes, and the pax keys `path` and `size`."""

import collections
import os
from collections.abc import Iterator
from typing import BinaryIO

BLOCK = 512
_MAX_HEADER = 1 << 16  # bytes of a GNU name or pax header that are read
_ZEROS = 1 << 20  # bytes that are read at a time where a file has zeros instead of headers
TRUNCATED, BROKEN = "truncated ends", "damaged headers"
LINKS, SPECIAL, OUTSIDE = "links", "special members", "names that lead outside"
COMPRESSED = {  # the first bytes of a file that is no tar file before it is decompressed
    "gzip": b"\x1f\x8b",
    "bzip2": b"BZh",
    "xz": b"\xfd7zXZ\0",
    "zstd": b"\x28\xb5\x2f\xfd",
}
DAMAGE, HOSTILE = (TRUNCATED, BROKEN), (LINKS, SPECIAL, OUTSIDE)


def tar_members(
    file: BinaryIO, problems: collections.Counter[str]
) -> Iterator[tuple[str, int, int]]:
    """Yields (name, offset of the content, size) of the regular members of an open tar file.

    Args:
        file: open for reading, not compressed.
        problems: counts what is skipped: links, special files, names that lead outside, damaged
            headers, truncated ends; of a compressed file nothing else.

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
    offset, damaged = 0, False
    overrides: dict[str, bytes] = {}  # path and size of the next member, from extended headers
    while offset < end:
        header = read_at(file, offset, BLOCK)
        if not offset and (compression := _compression(header)):
            problems[compressed_by(compression)] += 1
            return
        if len(header) < BLOCK:
            problems[TRUNCATED] += 1
            return
        if header.count(0) == BLOCK:
            if (following := _skip_zeros(file, offset + BLOCK)) is None:
                return  # the end-of-archive marker and its padding
            # a range that was never written, or another archive behind the end of this one
            problems[BROKEN] += not damaged
            offset, damaged, overrides = following, True, {}
            continue
        size = _valid_size(header)
        if size is None:
            problems[BROKEN] += not damaged  # consecutive damaged blocks count once
            offset, damaged, overrides = offset + BLOCK, True, {}
            continue
        damaged, kind, content = False, header[156:157], offset + BLOCK
        if kind in b"LKxg" and kind:
            raw = read_at(file, content, min(size, _MAX_HEADER))
            if kind == b"L":
                overrides["path"] = raw.rstrip(b"\0")
            elif kind == b"x":
                overrides.update(_pax(raw))
            offset = content + -(-size // BLOCK) * BLOCK
            continue
        name = overrides.get("path") or _name(header)
        size, overrides = _number(overrides.get("size"), size), {}
        offset = content + -(-size // BLOCK) * BLOCK
        if content + size > end:
            problems[TRUNCATED] += 1
            return
        if kind in (b"1", b"2"):
            problems[LINKS] += 1
        elif kind not in (b"0", b"\0", b"7"):
            problems[SPECIAL] += kind != b"5"  # folders are not counted
        elif name.startswith(b"/") or b".." in name.split(b"/"):
            problems[OUTSIDE] += 1
        else:
            yield name.removeprefix(b"./").decode("utf-8", "surrogateescape"), content, size
    problems[TRUNCATED] += offset > end


def compressed_by(kind: str) -> str:
    """Returns the name under which compressed files are counted."""
    return f"files compressed by {kind}"


def _compression(header: bytes) -> str:
    """Returns how a file is compressed; "" for one whose first header is that of a tar file: a
    member may have any name."""
    kinds = (kind for kind, magic in COMPRESSED.items() if header.startswith(magic))
    kind = next(kinds, "")
    return "" if kind and len(header) == BLOCK and _valid_size(header) is not None else kind


def _skip_zeros(file: BinaryIO, offset: int) -> int | None:
    """Returns where the first block from `offset` on begins that is not zero; None if the file ends
    before. Of an archive that ends as it should, these are some KB."""
    while chunk := read_at(file, offset, _ZEROS):
        if (zeros := len(chunk) - len(chunk.lstrip(b"\0"))) < len(chunk):
            return offset + zeros // BLOCK * BLOCK
        offset += len(chunk)
    return None


def read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    """Reads bytes at an offset, fewer where the file ends."""
    file.seek(offset)
    return file.read(size)


def _valid_size(header: bytes) -> int | None:
    """Returns the size in a header, or None if its checksum does not match."""
    checksum, size = _octal(header[148:156]), _octal(header[124:136])
    if header[124] & 0x80:  # GNU: base 256
        size = int.from_bytes(header[125:136], "big") if header[124] == 0x80 else None
    return size if checksum == sum(header) - sum(header[148:156]) + 8 * 32 else None


def _octal(field: bytes) -> int | None:
    digits = field.split(b"\0", 1)[0].strip() or b"0"
    # int() alone would accept a sign
    return int(digits, 8) if digits.isdigit() and not (b"8" in digits or b"9" in digits) else None


def _name(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0", 1)[0], header[345:500].split(b"\0", 1)[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _number(text: bytes | None, default: int) -> int:
    return int(text) if text and text.isdigit() and len(text) < 20 else default


def _pax(raw: bytes) -> dict[str, bytes]:
    """Parses `path` and `size` of a pax header: records of the form "LENGTH KEY=VALUE\\n"."""
    values, start = {}, 0
    while start < len(raw):
        length, _, _ = raw[start : start + 20].partition(b" ")
        if not length.isdigit() or not 3 < int(length) <= len(raw) - start:
            break
        end = start + int(length)
        key, _, value = raw[start + len(length) + 1 : end - 1].partition(b"=")
        if key in (b"path", b"size"):
            values[key.decode()] = value
        start = end
    return values
