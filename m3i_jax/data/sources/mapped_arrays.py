"""Maps the arrays of a file of `base.save_arrays` into memory: a large index is there at once, and
the processes of a machine share one copy of it."""

import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from m3i_jax.data.sources import base

_BLOCK = 1 << 22  # bytes
_LOCAL = 30  # bytes of a zip file's local header without its name and extra field


def map_arrays(path: str, *, verify: bool = True) -> dict[str, np.ndarray] | None:
    """Returns the arrays of a file, read-only and read when they are used; None if it is missing,
    damaged, or has another layout.

    Args:
        path: a file of `base.save_arrays`.
        verify: compare the checksums, which reads the file once; without, only the layout.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     base.save_arrays(f"{folder}/a.npz", a=np.arange(3), b=7)
    ...     arrays = map_arrays(f"{folder}/a.npz")
    ...     print(arrays["a"].tolist(), int(arrays["b"]))
    [0, 1, 2] 7
    """
    if not os.path.isfile(path):  # opening a pipe would block
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if base.zip_member_count(path) != len(members):
                return None
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                return None
        with open(path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return {
            member.filename.removesuffix(".npy"): _map_member(content, member, verify)
            for member in members
        }
    except Exception:  # numpy's header parser and zipfile raise many types
        return None


def _map_member(content: mmap.mmap, member: zipfile.ZipInfo, verify: bool) -> np.ndarray:
    begin = member.header_offset
    name, extra = struct.unpack("<HH", content[begin + _LOCAL - 4 : begin + _LOCAL])
    begin += _LOCAL + name + extra
    end = begin + member.file_size
    if end > len(content):
        raise ValueError("a member ends behind the file")
    if verify:
        checksum = 0
        with memoryview(content) as view:
            for start in range(begin, end, _BLOCK):
                with view[start : min(start + _BLOCK, end)] as block:
                    checksum = zlib.crc32(block, checksum)
        if checksum != member.CRC:
            raise ValueError("a checksum does not match")
    content.seek(begin)
    version = np.lib.format.read_magic(content)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, fortran, dtype = read_header(content)
    start, count = content.tell(), int(np.prod(shape))
    if dtype.hasobject or fortran and len(shape) > 1 or start + count * dtype.itemsize != end:
        raise ValueError("not an array of this layout")
    if not count:
        return np.zeros(shape, dtype)
    return np.frombuffer(content, dtype, count, start).reshape(shape)


class Column(NamedTuple):
    """An array of `length` elements that is written block by block."""

    name: str
    dtype: Any
    length: int
    blocks: Iterator[np.ndarray]


def write_columns(path: str, columns: Iterable[Column]) -> None:
    """Writes a file of the layout of `base.save_arrays` of arrays that need not fit in memory,
    atomically. Creates its directory.

    Raises:
        OSError: the directory cannot be written to; no partial file is left.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     blocks = iter([np.arange(2), np.arange(1)])
    ...     write_columns(f"{folder}/a.npz", [Column("a", np.int64, 3, blocks)])
    ...     print(map_arrays(f"{folder}/a.npz")["a"].tolist())
    [0, 1, 0]
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    part = f"{path}.{os.urandom(8).hex()}.part"
    try:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
            for name, dtype, left, blocks in columns:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
                    header = {"descr": descr, "fortran_order": False, "shape": (left,)}
                    np.lib.format.write_array_header_1_0(file, header)
                    for block in blocks:
                        array = np.ascontiguousarray(block, dtype)
                        left -= len(array)
                        file.write(array.view(np.uint8).data)
                    if left:
                        raise ValueError(f"the blocks of {name} have another length")
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.unlink(part)
