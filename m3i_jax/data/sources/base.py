"""Random access to what users have. A source knows how many records it holds and reads any of them;
nothing here decodes an image.

Sources hold paths and small arrays, never an open file, so that they can be sent to worker
processes. What a source ignores (hidden files, links that lead out, damaged members) is counted and
told in its description."""

import dataclasses
import difflib
import hashlib
import os
import stat
import time
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from m3i_jax import schema
from m3i_jax.errors import UnreadableError, UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
KINDS = ("shapes", "folder", "tars", "array_record", "tfds", "hugging_face")
_WANTED = {
    "folder": "the directory that holds the pictures",
    "tars": "the tar files, such as 'DIR/*.tar'",
    "array_record": "the directory that holds the .array_record files",
    "tfds": "the name of the data set, such as 'food101', or the directory of its version",
    "hugging_face": "the directory that save_to_disk wrote",
}
# an image file above 256 MiB would be read whole before its header can refuse it
FILE_LIMIT = 1 << 28


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One image as the source has it: encoded bytes, or RGB uint8 [height, width, 3]; label -1 and
    caption None where there is none."""

    key: str
    image: bytes | np.ndarray
    label: int = -1
    caption: str | bytes | None = None


@runtime_checkable
class DataSource(Protocol):
    """What every source offers. Optional, for speed: `__getitems__(indices)`, `key(i)`,
    `caption(i)`, `key_hashes()`: see `read_items` and what follows it."""

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


def open_source(data: schema.Data, *, cache: str = "") -> DataSource:
    """Opens the source that the configuration names.

    Args: data: `source`, `path`, `split_by_hash`, `mixture` and, for the built-in shapes, `size`.
        cache: directory in which the index of tar files is kept, so that the next start need not
        read their headers again; "" for none.

    Returns:
        The whole source; see `split_by_hash` for the part to train on.

    Raises: UserError: the path is missing, or holds nothing that can be read as an image; see
        `mixture.mixture_entries`; or a split is held out by name, which is none of the source:
        `splits.open_splits` opens both.

    >>> open_source(schema.Data(source="folder"))
    Traceback (most recent call last):
    m3i_jax.errors.UserError: data.path is empty, and data.source='folder' needs it: give the directory that holds the images
    """
    from m3i_jax.data.sources import mixture, split_folders

    entries = mixture.mixture_entries(data)
    for entry in entries:
        if (
            entry.kind == "folder"
            and not entry.split
            and (found := split_folders.find_split_folders(entry.path))
        ):
            raise UserError(
                f"data.path={entry.path!r} holds splits ({found.note.partition(': ')[2]}), which"
                f" would be mixed here: set data.split={found.train} and read each by itself, or"
                " data.split=. to read every sub-folder as a category"
            )
    if held_out := [entry.held_out for entry in entries if entry.held_out]:
        place = (
            "the part of data.mixture after '|'"
            if data.source == "mixture"
            else "data.holdout_split"
        )
        raise UserError(
            f"{place} names {held_out[0]!r}, which would be left out here: remove it, and read that"
            " split by itself"
        )
    return mixture.join_sources(
        data,
        entries,
        [open_kind(entry.kind, entry.path, entry.split, data, cache=cache) for entry in entries],
    )


def open_kind(
    kind: str, path: str, split: str, data: schema.Data, *, cache: str = ""
) -> DataSource:
    """Opens one source.

    Args: kind: one of KINDS. path: what its kind understands by it; see `schema.Data.path`. For the
        built-in shapes their number, "" for `data.size`. split: part of it: name of a split of TFDS
        or Hugging Face, else a folder (or glob) below the path. "": all. data: the other settings.
        cache: see `open_source`.

    Raises:
        UserError: nothing there that can be read as an image, or a package is missing.

    >>> open_kind("shapes", "12", "", schema.Data()).description()
    '12 images in shapes (336 x 336 pixels, seed 0), 8 classes, captions for 100%'
    """
    if kind not in KINDS:
        raise UserError(
            f"data.source={kind!r} is not a source: use {', '.join(map(repr, KINDS[:-1]))},"
            f" {KINDS[-1]!r} or 'mixture'"
        )
    if kind == "shapes":
        from m3i_jax.data.sources.shapes import ShapesSource

        if split:
            raise UserError(
                f"the built-in shapes have no split {split!r}: leave data.split empty, data.holdout"
                " holds a share out"
            )
        if path and not path.isdigit():
            raise UserError(
                f"shapes:{path}: the built-in shapes have no path: give their number, such as"
                " shapes:10000"
            )
        return ShapesSource(int(path) if path else data.size, side=3 * data.image_size // 2)
    if not path:
        raise UserError(
            f"data.path is empty, and data.source={kind!r} needs it: give {_WANTED[kind]}"
        )
    place = split_path(path, split) if split else path
    source: Any
    if kind == "folder":
        from m3i_jax.data.sources.folder import FolderSource

        source = FolderSource(place)
    elif kind == "tars":
        from m3i_jax.data.sources.tars import TarSource

        source = TarSource(place, cache=cache)
    elif kind == "array_record":
        from m3i_jax.data.sources.array_record import ArrayRecordSource

        source = ArrayRecordSource(place, cache=cache, lenient=data.missing == "replace")
    elif kind == "tfds":
        from m3i_jax.data.sources.tfds import TfdsSource

        source = TfdsSource(path, split or "train", directory=data.directory)
    else:
        from m3i_jax.data.sources.hugging_face import HuggingFaceSource

        source = HuggingFaceSource(path, split)
    from m3i_jax.data.sources import class_names

    if data.class_names:
        source.classes = class_names.class_names_from_file(data.class_names, source.classes)
    elif kind == "folder" and class_names.are_wordnet_ids(source.classes):
        source.classes = class_names.names_near_folder(source.path, source.classes)
    return source


def split_path(path: str, split: str) -> str:
    """A split of a path: the folder or glob of that name in it, or another place if the split is
    one.

    >>> split_path("/data", "train"), split_path("/data", "/other/val"), split_path("gs://bucket/x", "val-*.tar")
    ('/data/train', '/other/val', 'gs://bucket/x/val-*.tar')
    """
    return (
        split
        if "://" in split
        else os.path.join(os.path.expanduser(path), os.path.expanduser(split))
    )


def missing_path_error(path: str) -> str:
    """Says which part of a missing path is wrong, and the nearest name that exists.

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


def _without_waiting(path: str, flags: int) -> int:
    """Opens a file for `open`; of a named pipe, opening would wait for a writer for ever."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_byte_range(
    path: str, offset: int = 0, size: int | None = None, *, tries: int = 3
) -> bytes:
    """Reads part of a file by position. A failing read is repeated; that it fails for good is an
    error, never a bad record: otherwise the order of the stream would depend on the weather of a
    network disk.

    Args:
        path: local file.
        offset: of the first byte.
        size: bytes; None for the rest of the file, at most FILE_LIMIT.
        tries: reads before giving up.

    Returns:
        The bytes; for a given `size`, exactly so many.

    Raises:
        Unreadable: the file cannot be read, or is shorter than it was when it was indexed.

    >>> read_byte_range(__file__, 0, 3)
    b'\"\"\"'
    """
    for attempt in range(1, tries + 1):
        try:
            with open(path, "rb", buffering=0, opener=_without_waiting) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise UnreadableError(
                        f"{path!r} is no regular file any more, as it was when the run began;"
                        " restore it"
                    )
                wanted = (
                    min(os.fstat(file.fileno()).st_size - offset, FILE_LIMIT)
                    if size is None
                    else size
                )
                pieces, got = [], 0
                while got < wanted and (
                    piece := os.pread(file.fileno(), wanted - got, offset + got)
                ):
                    pieces.append(piece)
                    got += len(piece)
            if size is not None and got < size:
                raise UnreadableError(
                    f"{path!r} ends before byte {offset + size}: it became shorter while the run"
                    " was reading it; start again"
                )
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        except OSError as error:
            if attempt == tries or isinstance(error, (FileNotFoundError, PermissionError)):
                raise UnreadableError(
                    f"{path!r} cannot be read ({error.strerror}) although it could when the run"
                    " began; restore it"
                ) from error
            time.sleep(0.2 * attempt**2)
    raise AssertionError("unreachable")


def read_items(source: DataSource, indices: Sequence[int]) -> list[Record]:
    """Reads several records, at once where the source can.

    >>> read_items(["a", "b", "c"], [2, 0])
    ['c', 'a']
    """
    many = getattr(source, "__getitems__", None)
    return list(many(indices)) if many else [source[i] for i in indices]


def source_key(source: DataSource, index: int) -> str:
    """The key of a record without reading it, where the source knows it; else its index.

    >>> source_key(["a"], 0)
    '0'
    """
    key = getattr(source, "key", None)
    return key(index) if key else str(index)


def source_caption(source: DataSource, index: int) -> str | bytes | None:
    """The caption of a record as the source has it, without its image where the source can.

    >>> source_caption([Record("a", b"", caption="a cat")], 0)
    'a cat'
    """
    caption = getattr(source, "caption", None)
    return caption(index) if caption else source[index].caption


def source_key_hashes(source: DataSource) -> np.ndarray:
    """uint64 [N]: `key_hash` of every key, at once where the source can.

    >>> int(source_key_hashes(["a"])[0]) == key_hash("0")
    True
    """
    many = getattr(source, "key_hashes", None)
    return (
        many()
        if many
        else np.fromiter(
            (key_hash(source_key(source, i)) for i in range(len(source))), np.uint64, len(source)
        )
    )


def source_identity(source: DataSource) -> list[str]:
    """What a source is, in lines for a person: name, number of images, fingerprint; of a mixture,
    one line a source.

    >>> class Five:
    ...     name = "five"
    ...     def __len__(self): return 5
    ...     def fingerprint(self): return "0123456789abcdef"
    >>> source_identity(Five())
    ['five, 5 images, fingerprint 0123456789abcdef']
    """
    lines = getattr(source, "identity", None)
    return (
        lines()
        if lines
        else [f"{source.name}, {len(source):,} images, fingerprint {source.fingerprint()}"]
    )


def stable_digest(*parts: str | bytes | int | float) -> str:
    """16 hexadecimal digits of a stable hash of the parts.

    >>> stable_digest("a", 1), stable_digest("a1")
    ('c25807dbd8416470', '0e8529f9d51ffb1f')
    """
    h = hashlib.blake2b(digest_size=8)
    for part in parts:
        raw = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogateescape")
        h.update(len(raw).to_bytes(8, "little") + raw)
    return h.hexdigest()


def key_hash(key: str) -> int:
    """64 bits of a key: what decides the part of a split that it belongs to.

    >>> key_hash("a") == key_hash("a") != key_hash("b"), 0 <= key_hash("a") < 2**64
    (True, True)
    """
    return int.from_bytes(
        hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little"
    )


def write_atomic(path: str, content: bytes) -> None:
    """Writes a file beside its final name first: another process sees the whole of it or nothing.

    Raises:
        UserError: the place cannot be written to; nothing is left there.
    """
    part = f"{path}.{os.getpid()}.part"
    try:
        try:
            with open(part, "wb") as file:
                file.write(content)
            os.replace(part, path)
        finally:
            if os.path.exists(part):
                os.unlink(part)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; make room or choose another directory"
        ) from error


def format_counts(ignored: dict[str, int]) -> str:
    """The tail of a description: what was ignored, and how often.

    >>> format_counts({"hidden": 2, "link out of the folder": 0})
    '; ignored: 2 hidden'
    """
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(ignored.items()) if count)
    return f"; ignored: {kinds}" if kinds else ""


class SubsetSource:
    """A part of a source, with the source's classes: index i of the part is record `indices[i]` of
    the whole."""

    def __init__(self, source: DataSource, indices: np.ndarray, part: str, identity: str) -> None:
        self.source, self.indices, self.part, self._identity = source, indices, part, identity
        self.name, self.classes, self.captions = (
            f"{source.name} ({part})",
            source.classes,
            source.captions,
        )

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
        return source_caption(self.source, int(self.indices[index]))

    def fingerprint(self) -> str:
        return stable_digest(self.source.fingerprint(), self._identity)

    def description(self) -> str:
        return f"{len(self):,} of {self.source.description()} ({self.part})"


def split_by_hash(source: DataSource, holdout: float, part: str) -> DataSource:
    """One part of a source, by a hash of each record's key: adding images moves none of the others,
    and equal keys stay together.

    Args:
        source: the whole.
        holdout: share of the records to hold out, 0..1.
        part: "train" or "held_out".

    Returns:
        The part, itself a source.

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
    # a mixture is split source by source: its weights hold for each part
    if parts := getattr(source, "part", None):
        return parts(holdout, part)
    held = source_key_hashes(source) / 2.0**64 < holdout
    # 442 million records: 1.8 GB instead of 3.5
    small = np.uint32 if len(source) < 1 << 32 else np.int64
    return SubsetSource(
        source,
        np.flatnonzero(held == (part == "held_out")).astype(small),
        part,
        f"{part} {holdout!r}",
    )


def column(wanted: Sequence[str], present: Sequence[str]) -> str | None:
    """The first wanted name that is present, else the only one.

    >>> column(("image", "img"), ("mask", "img")), column(("image",), ("photo",)), column(("image",), ("a", "b"))
    ('img', 'photo', None)
    """
    return next(
        (name for name in wanted if name in present), present[0] if len(present) == 1 else None
    )


def parse_label(value: Any) -> int | None:
    """A category as written by somebody: a whole number from 0 to a million, or None.

    >>> parse_label(7), parse_label(-1), parse_label(True), parse_label("cat")
    (7, None, None, None)
    """
    return value if type(value) is int and 0 <= value <= 1_000_000 else None
