"""Checksums of a checkpoint: of its files, so that damage on disk is detected before they are used,
and of its arrays, computed on the devices, so that restored arrays are those that were trained.

Files: `digests.json` in the directory of a step has two lines: a JSON object with the name of the
digest, and size and digest of every other file; and the CRC-32 of that line. The digest is 64-bit
XXH3, which misses one damage in 2^64 and takes less time than reading the bytes from memory. Older
steps have CRC-32, which takes seven times as long. A file that is missing, truncated or has other
bytes is damaged. A file that cannot be read (permission, a failing disk or server) may be
undamaged, so that is an OSError.

Arrays: these checksums also detect wrong bytes that were written, and an array that a restore to
another sharding changed. A checksum is the sum modulo 2^32, over the elements of an array, of a
hash of their bits and their index. Integer sums do not depend on the order, so all shardings give
the same value. A change of one element always changes it; of other changes one in 2^32 is missed.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import mmap
import os
import pathlib
import stat
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from m3i_jax import parallel, run_files
from m3i_jax.parallel.sharding import path_text

NAME = "digests.json"
BLOCK = 2**18  # bytes a read: they are still in the processor's cache when they are hashed
LONGEST = 2**26  # most bytes of digests.json that are read
THREADS = min(8, os.cpu_count() or 1)
_GOLDEN = np.uint32(0x9E3779B1)  # odd, so that every index has its own product


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: memoryview | mmap.mmap) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


KINDS: dict[str, Callable[[], Any]] = {"xxh3-64": xxhash.xxh3_64, "crc32": _Crc32}
CURRENT = "xxh3-64"  # the kind that is written


def file_digest(
    path: pathlib.Path, kind: str = CURRENT, *, written: bool = False
) -> tuple[int, str]:
    """Returns the size in bytes and digest of a file.

    Args:
      path: of the file.
      kind: of the digest, one of KINDS.
      written: the file was just written and is still in memory; on a local disk it is mapped, which
        takes half the time. All other files are read: a mapped page that a disk or a network cannot
        deliver would kill the process.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "x"
    >>> _ = path.write_bytes(b"123456789")
    >>> file_digest(path), file_digest(path, "crc32")
    ((9, '72dcb18b67a17dff'), (9, 'cbf43926'))
    >>> file_digest(path, written=True) == file_digest(path)
    True
    """
    size, value = 0, KINDS[kind]()
    with open(path, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if written and status.st_size and os.major(status.st_dev):  # 0: not a local disk
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
    """All files below a directory except digests.json; links are not followed."""
    out = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            path = pathlib.Path(folder, name)
            out[path.relative_to(directory).as_posix()] = path
    out.pop(NAME, None)
    return out


def fsync_path(path: pathlib.Path) -> None:
    """Flush a file, or the entries of a directory, to the disk, to survive a loss of power."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_checksums(directory: pathlib.Path, **notes: Any) -> None:
    """Write digests.json for all files of a directory, and flush all of them to the disk.

    Args:
      directory: of a step.
      notes: more entries of the JSON object.

    Raises:
      OSError: a file cannot be read or written.
    """
    files = _files(directory)
    with (
        concurrent.futures.ThreadPoolExecutor(THREADS) as disk,
        concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
    ):
        # the disk writes while the processor hashes
        flushed = [disk.submit(fsync_path, path) for path in files.values()]
        checksums = dict(
            zip(
                files,
                pool.map(functools.partial(file_digest, written=True), files.values()),
                strict=True,
            )
        )
        for future in flushed:
            future.result()
    with open(directory / NAME, "wb") as file:
        file.write(run_files.seal_note({**notes, "digest": CURRENT, "files": checksums}))
        file.flush()
        os.fsync(file.fileno())
    for folder, _, _ in os.walk(directory, topdown=False):
        with contextlib.suppress(OSError):  # some file systems cannot flush directories
            fsync_path(pathlib.Path(folder))


def read_checksums(directory: pathlib.Path) -> dict[str, Any] | None:
    """Returns the JSON object of digests.json; None if the file is damaged or missing.

    Raises:
      OSError: the file cannot be read.
    """
    path = directory / NAME
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return None
    except (FileNotFoundError, NotADirectoryError):
        return None
    with open(path, "rb") as file:
        content = run_files.unseal_note(file.read(LONGEST))
    return content if _is_valid(content) else None


def _is_valid(content: Any) -> bool:
    """Whether a JSON value has the structure that `write_checksums` gives it: its CRC-32 may be
    forged."""
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("digest"), str)
        or not isinstance(content.get("files"), dict)
    ):
        return False
    numbers = [content[name] for name in ("format", "step") if name in content]
    arrays = content.get("arrays", {})
    return (
        all(type(number) is int for number in numbers)
        and isinstance(arrays, dict)
        and all(isinstance(value, str) for value in arrays.values())
        and run_files.parse_marks(list(content["files"].values())) is not None
        and not any(
            pathlib.PurePosixPath(name).is_absolute() or ".." in name.split("/")
            for name in content["files"]
        )
    )


def verify_checksums(directory: pathlib.Path) -> list[str]:
    """Returns differences between the files of a directory and its digests.json, `FILE: PROBLEM`
    each; empty if there are none. Files that were added later are ignored.

    Raises:
      OSError: a file exists and cannot be read.

    >>> import tempfile
    >>> step = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (step / "x").write_bytes(b"123"), (step / "y").write_bytes(b"")
    >>> write_checksums(step); verify_checksums(step)
    []
    >>> _ = (step / "x").write_bytes(b"124"), (step / "y").unlink(); verify_checksums(step)
    ['x: other bytes than were written', 'y: is missing']
    """
    saved = read_checksums(directory)
    if saved is None:
        path = directory / NAME
        exists = os.path.lexists(path) and not path.is_symlink()
        return [f"{NAME}: is {'damaged' if exists else 'missing'}"]
    if (kind := saved["digest"]) not in KINDS:
        return [f"{NAME}: has digests {kind!r}, which this version of m3i_jax does not know"]

    def verify(item: tuple[str, tuple[int, str]]) -> str:
        name, (size, value) = item
        path = directory / name
        try:
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                return f"{name}: is not a file any more"
            if status.st_size != size:
                return f"{name}: {status.st_size:,} bytes, {size:,} were written"
            return (
                ""
                if file_digest(path, kind) == (size, value)
                else f"{name}: other bytes than were written"
            )
        except (FileNotFoundError, NotADirectoryError):
            return f"{name}: is missing"

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return [text for text in pool.map(verify, sorted(saved["files"].items())) if text]


@jax.jit  # traced once for each shape: params, two moments and target share theirs
def _checksum(x: jax.Array) -> jax.Array:
    """The checksum, uint32 [], of an array of any shape."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = 8 * x.dtype.itemsize
    # 64-bit elements become two words in a new last axis
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{min(width, 32)}")).astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = index * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    hashed = bits ^ (index * _GOLDEN)
    # bijective: two values of one element never have the same hash
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        hashed = (hashed ^ (hashed >> shift)) * np.uint32(factor)
    hashed ^= hashed >> 16
    # one axis at a time, the last one last: it is vectorized, which is four times as fast
    while hashed.ndim:
        hashed = jax.lax.optimization_barrier(jnp.sum(hashed, axis=0, dtype=jnp.uint32))
    return hashed


@dataclasses.dataclass(frozen=True)
class ArrayChecksums:
    """Checksums of the N arrays of a tree.

    Attributes:
      paths: of the arrays.
      values: uint32 [N], which may still be computing.
    """

    paths: tuple[str, ...]
    values: jax.Array

    def read(self) -> dict[str, str]:
        """Returns {path: checksum in hexadecimal}; waits for the devices."""
        return {
            path: f"{value:08x}"
            for path, value in zip(self.paths, np.asarray(self.values).tolist(), strict=True)
        }


def checksum_arrays(state: Any) -> ArrayChecksums:
    """Checksums of a tree of arrays, replicated to every host. The computation is dispatched, and
    the arrays may be donated afterwards.

    >>> checksum_arrays({"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.int32(7)}).read()
    {'a': '42d88fd1', 'b': '948ba1e6'}
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    layouts = [leaf.sharding for _, leaf in leaves if isinstance(leaf, jax.Array)]
    mesh = next(
        (layout.mesh for layout in layouts if isinstance(layout, jax.sharding.NamedSharding)), None
    )
    return ArrayChecksums(tuple(path_text(path) for path, _ in leaves), _compiled(mesh)(state))


@functools.cache
def _compiled(mesh: jax.sharding.Mesh | None) -> Any:
    layout = None if mesh is None else parallel.replicated(mesh)
    return parallel.Program(
        lambda tree: jnp.stack([_checksum(leaf) for leaf in jax.tree.leaves(tree)]),
        name="fingerprints",
        announced="the checksums of a checkpoint",
        out_shardings=layout,
    )


def changed_arrays(state: Any, saved: Mapping[str, str]) -> list[str]:
    """Paths of the arrays whose saved checksum is another one, or is absent."""
    return [
        path for path, value in checksum_arrays(state).read().items() if saved.get(path) != value
    ]
