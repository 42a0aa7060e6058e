"""The interface of a data source, and what its implementations share: identity, hashed splits,
reading by byte range, arrays on disk, cached file handles.

A source has random access: it knows how many records it holds and reads any of them. It decodes no
image. Sources hold paths and small arrays and never an open file, so they can be pickled to worker
processes. What a source ignores (hidden files, links out of its folder, damaged members) is counted
and listed in its description."""

import collections
import dataclasses
import difflib
import functools
import hashlib
import os
import stat
import threading
import time
import zipfile
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from m3i_jax.data.sources import captions
from m3i_jax.data.sources.objects import Objects, ObjectTable
from m3i_jax.errors import UnreadableError, UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# An image file is read into memory before its header is checked, so 256 MiB is the limit.
FILE_LIMIT = 1 << 28


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One record as the source holds it.

    key: identifies the record in its source. image: encoded bytes, or RGB uint8 [height, width, 3].
    label: category, -1 if unknown. caption: None if absent. objects: None if the source annotates
    none. map: class of each pixel, 255 where unknown: a PNG, or uint8 [height, width].
    other_captions: further captions, which only the evaluation of retrieval reads."""

    key: str
    image: bytes | np.ndarray
    label: int = -1
    caption: str | bytes | None = None
    objects: Objects | None = dataclasses.field(default=None, repr=False)
    map: bytes | np.ndarray | None = dataclasses.field(default=None, repr=False)
    other_captions: tuple[str | bytes, ...] = dataclasses.field(default=(), repr=False)


@runtime_checkable
class DataSource(Protocol):
    """The methods and attributes that every source has.

    classes: names of the categories, by label. captions: whether any record has one. fingerprint():
    changes when the records or their order do.

    Optional, for speed: `__getitems__(indices)`, `key(i)`, `key_hashes()`, `caption(i)`, and if
    records have several, `caption_list(i)`; functions fall back to `__getitem__`. Annotated
    sources: `object_table()`, `map_classes`, and for the tables of an evaluation `category_ids` and
    `frequencies`. Sources of sources:
    `identity()`, `part(holdout, part)`, `locate(seed, positions, attempt)`, `record_weights` and
    `cumulative_weights`. `names_its_classes`: see `registry.SourceKind`."""

    @property
    def name(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def captions(self) -> bool: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Record: ...
    def fingerprint(self) -> str: ...
    def description(self) -> str: ...


def split_path(path: str, split: str) -> str:
    """Joins a split to a path: a folder or glob below the path, or the split itself if it is
    absolute or a URL.

    >>> split_path("/data", "train"), split_path("/data", ""), split_path("/data", "/other/val")
    ('/data/train', '/data', '/other/val')
    >>> split_path("gs://bucket/x", "val-*.tar"), split_path("/data", "gs://bucket/x/*.tar")
    ('gs://bucket/x/val-*.tar', 'gs://bucket/x/*.tar')
    """
    if not split:
        return path
    if "://" in split:
        return split
    return os.path.join(os.path.expanduser(path), os.path.expanduser(split))


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


def open_nonblocking(path: str, flags: int) -> int:
    """An opener for `open` that does not block on a named pipe without a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_byte_range(
    path: str, offset: int = 0, size: int | None = None, *, tries: int = 3
) -> bytes:
    """Reads part of a file by position.

    A failed read is retried. A read that keeps failing is an error and not a bad record: otherwise
    the order of the stream would depend on transient faults of a network disk.

    Args:
        path: local file.
        offset: of the first byte.
        size: bytes; None for the rest of the file, at most FILE_LIMIT.
        tries: attempts before giving up.

    Returns:
        The bytes; exactly `size` of them if `size` is given.

    Raises:
        UnreadableError: the file cannot be read, or is shorter than when it was indexed.

    >>> read_byte_range(__file__, 0, 3)
    b'\"\"\"'
    """
    for attempt in range(1, tries + 1):
        try:
            with open(path, "rb", buffering=0, opener=open_nonblocking) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise UnreadableError(
                        f"{path!r} is no longer a regular file, as it was when the run began;"
                        " restore it"
                    )
                length = (
                    min(os.fstat(file.fileno()).st_size - offset, FILE_LIMIT)
                    if size is None
                    else size
                )
                chunks, count = [], 0
                while count < length and (
                    chunk := os.pread(file.fileno(), length - count, offset + count)
                ):
                    chunks.append(chunk)
                    count += len(chunk)
            if size is not None and count < size:
                raise UnreadableError(
                    f"{path!r} ends before byte {offset + size}: it became shorter while the run"
                    " was reading it; start again"
                )
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)
        except OSError as error:
            if attempt == tries or isinstance(error, (FileNotFoundError, PermissionError)):
                raise UnreadableError(
                    f"{path!r} cannot be read ({error.strerror}) although it could when the run"
                    " began; restore it"
                ) from error
            time.sleep(0.2 * attempt**2)
    raise AssertionError("unreachable")


def read_items(source: DataSource, indices: Sequence[int]) -> list[Record]:
    """Reads several records, in one call if the source has `__getitems__`.

    >>> read_items(["a", "b", "c"], [2, 0])
    ['c', 'a']
    """
    read_batch = getattr(source, "__getitems__", None)
    return list(read_batch(indices)) if read_batch else [source[i] for i in indices]


def source_key(source: DataSource, index: int) -> str:
    """Returns the key of a record without reading it, or its index if the source has no `key`.

    >>> source_key(["a"], 0)
    '0'
    """
    key = getattr(source, "key", None)
    return key(index) if key else str(index)


def object_table(source: DataSource) -> ObjectTable | None:
    """Returns all annotated objects of a source, or None if it annotates none.

    >>> object_table([Record("a", b"")]) is None
    True
    """
    table = getattr(source, "object_table", None)
    return table() if table else None


def map_classes(source: DataSource) -> tuple[str, ...]:
    """Returns the names of the classes of a source's maps; () if it has no maps.

    >>> import types
    >>> map_classes(types.SimpleNamespace(map_classes=("sky",))), map_classes([])
    (('sky',), ())
    """
    return getattr(source, "map_classes", ())


def source_key_hashes(source: DataSource) -> np.ndarray:
    """Returns `key_hash` of every key, uint64 [N].

    >>> int(source_key_hashes(["a"])[0]) == key_hash("0")
    True
    """
    if key_hashes := getattr(source, "key_hashes", None):
        return key_hashes()
    keys = (source_key(source, i) for i in range(len(source)))
    return np.fromiter(map(key_hash, keys), np.uint64, len(source))


def source_identity(source: DataSource) -> list[str]:
    """Describes a source for `data.txt`: name, number of images, fingerprint; a mixture has one
    line per source.

    >>> class Five:
    ...     name = "five"
    ...     def __len__(self): return 5
    ...     def fingerprint(self): return "0123456789abcdef"
    >>> source_identity(Five())
    ['five, 5 images, fingerprint 0123456789abcdef']
    """
    if identity := getattr(source, "identity", None):
        return identity()
    return [f"{source.name}, {len(source):,} images, fingerprint {source.fingerprint()}"]


def current_identity(text: str) -> str:
    """The text of a data.txt in today's words: version 0.1 has another word for images.

    >>> current_identity("source 1 = five, 5 pictures, fingerprint 0123456789abcdef")
    'source 1 = five, 5 images, fingerprint 0123456789abcdef'
    """
    return text.replace(" pictures, fingerprint ", " images, fingerprint ")


def stable_digest(*parts: str | bytes | int | float) -> str:
    """Hashes the parts to 16 hexadecimal digits, the same in every process and version.

    >>> stable_digest("a", 1), stable_digest("a1")
    ('c25807dbd8416470', '0e8529f9d51ffb1f')
    """
    h = hashlib.blake2b(digest_size=8)
    for part in parts:
        raw = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogateescape")
        h.update(len(raw).to_bytes(8, "little") + raw)
    return h.hexdigest()


def key_hash(key: str) -> int:
    """Hashes a key to 64 bits, which decide whether `split_by_hash` holds the record out.

    >>> key_hash("a") == key_hash("a") != key_hash("b"), 0 <= key_hash("a") < 2**64
    (True, True)
    """
    return int.from_bytes(
        hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little"
    )


def write_atomic(path: str, content: bytes) -> None:
    """Writes a file under a temporary name and renames it, so that no reader sees half of it.

    Raises:
        UserError: the directory cannot be written to; no partial file is left.
    """
    try:
        _write_and_rename(path, lambda file: file.write(content))
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; make room or choose another directory"
        ) from error


def format_counts(ignored: dict[str, int]) -> str:
    """Formats counts of ignored files as the end of a description.

    >>> format_counts({"hidden": 2, "link out of the folder": 0})
    '; ignored: 2 hidden'
    """
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(ignored.items()) if count)
    return f"; ignored: {kinds}" if kinds else ""


class SubsetSource:
    """A subset of a source, with the same classes: record i of the subset is record `indices[i]` of
    the source."""

    def __init__(self, source: DataSource, indices: np.ndarray, subset: str, identity: str) -> None:
        self.source, self.indices, self.subset, self._identity = source, indices, subset, identity
        self.name, self.classes, self.captions = (
            f"{source.name} ({subset})",
            source.classes,
            source.captions,
        )
        self.map_classes = map_classes(source)
        self.class_ids: tuple[str, ...] = getattr(source, "class_ids", ())
        weights = getattr(source, "record_weights", None)  # see `sampler.records_at`
        self.record_weights: np.ndarray | None = None if weights is None else weights[indices]

    @functools.cached_property
    def cumulative_weights(self) -> np.ndarray | None:
        return None if self.record_weights is None else np.cumsum(self.record_weights)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.source[int(self.indices[index])]

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        return read_items(self.source, self.indices[np.asarray(indices, np.int64)].tolist())

    def key(self, index: int) -> str:
        return source_key(self.source, int(self.indices[index]))

    def key_hashes(self) -> np.ndarray:
        return source_key_hashes(self.source)[self.indices]

    def caption(self, index: int) -> str | bytes | None:
        return captions.source_caption(self.source, int(self.indices[index]))

    def caption_list(self, index: int) -> tuple[str | bytes, ...]:
        return captions.source_captions(self.source, int(self.indices[index]))

    def object_table(self) -> ObjectTable | None:
        table = object_table(self.source)
        return table.subset(self.indices) if table else None

    def fingerprint(self) -> str:
        return stable_digest(self.source.fingerprint(), self._identity)

    def description(self) -> str:
        return f"{len(self):,} of {self.source.description()} ({self.subset})"


def split_by_hash(source: DataSource, holdout: float, part: str) -> DataSource:
    """Returns the training or the held-out part of a source, chosen by a hash of each record's key.

    Adding images moves none of the others to another part, and equal keys stay together.

    Args:
        source: to split; a mixture is split source by source.
        holdout: share of the records to hold out, 0..1.
        part: "train" or "held_out".

    Raises:
        ValueError: `part` is neither.

    >>> class Ten:
    ...     name, classes, captions = "ten", (), False
    ...     def __len__(self): return 10
    ...     def __getitem__(self, i): return Record(str(i), b"")
    >>> [len(split_by_hash(Ten(), 0.3, part)) for part in ("train", "held_out")]
    [7, 3]
    """
    if part not in ("train", "held_out"):
        raise ValueError(f"part must be 'train' or 'held_out', not {part!r}")
    # the weights of a mixture then hold for each part
    if split_sources := getattr(source, "part", None):
        return split_sources(holdout, part)
    held_out = source_key_hashes(source) / 2.0**64 < holdout
    # 442 million records: 1.8 GB instead of 3.5
    index_type = np.uint32 if len(source) < 1 << 32 else np.int64
    indices = np.flatnonzero(held_out == (part == "held_out")).astype(index_type)
    return SubsetSource(source, indices, part, f"{part} {holdout!r}")


def column(names: Sequence[str], present: Sequence[str]) -> str | None:
    """Returns the first of `names` that is present, else the only one present, else None.

    >>> column(("image", "img"), ("mask", "img")), column(("image",), ("photo",))
    ('img', 'photo')
    >>> column(("image",), ("a", "b")) is None
    True
    """
    only = present[0] if len(present) == 1 else None
    return next((name for name in names if name in present), only)


def parse_label(value: Any) -> int | None:
    """Returns a label of a foreign file if it is a whole number from 0 to a million, else None.

    >>> parse_label(7), parse_label(-1), parse_label(True), parse_label("cat")
    (7, None, None, None)
    """
    return value if type(value) is int and 0 <= value <= 1_000_000 else None


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
        self._handles: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()

    def __call__(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Returns the entry of `key`, made by `make` if it is not cached."""
        with self._lock:
            if key not in self._handles:
                self._handles[key] = make()
            self._handles.move_to_end(key)
            if len(self._handles) > self._size:
                self._handles.popitem(last=False)
            return self._handles[key]

    def __len__(self) -> int:
        return len(self._handles)

    def __reduce__(self) -> tuple[Any, ...]:
        return HandleCache, (self._size,)


def save_arrays(path: str, **arrays: np.ndarray | int) -> None:
    """Writes arrays to an uncompressed .npz file without pickled objects, atomically. Creates its
    directory.

    Raises:
        OSError: the directory cannot be written to; no partial file is left.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    _write_and_rename(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]


def load_arrays(path: str) -> dict[str, np.ndarray] | None:
    """Reads a file of `save_arrays`; None if it is missing, damaged, or has another layout.

    >>> load_arrays("/no/such.npz") is None
    True
    """
    if not os.path.isfile(path):  # opening a pipe would block
        return None
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            if zip_member_count(path) != len(archive.infolist()):
                return None
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED:
                    return None
                with archive.open(member) as file:
                    arrays[member.filename.removesuffix(".npy")] = np.lib.format.read_array(
                        file, allow_pickle=False
                    )
                    # bytes behind the array: its shape was damaged. Reading to the end also makes
                    # zipfile compare the checksum.
                    if file.read(1):
                        return None
    except Exception:  # numpy's header parser raises many types
        return None
    return arrays


def zip_member_count(path: str) -> int:
    """Returns the member count in the end record of a zip file. Python's zipfile does not compare
    it with the members of the directory, where a damaged entry may hide others."""
    with open(path, "rb") as file:
        file.seek(-22, os.SEEK_END)  # size of the end record of a file without a comment
        end = file.read(22)
    return int.from_bytes(end[10:12], "little") if end[:4] == b"PK\x05\x06" else -1


def _write_and_rename(path: str, write: Callable[[Any], Any]) -> None:
    # a random name: containers of several hosts have the same process id
    temporary = f"{path}.{os.urandom(8).hex()}.part"
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
