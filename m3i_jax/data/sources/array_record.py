"""ArrayRecord files: random access to millions of records, with a checksum each. What
`--mode=convert` writes, and what others wrote.

A record is a tf.train.Example, which every tool of that world reads: `image` (the original bytes,
never encoded again), `key`, and, if there are any, `label` and `caption`. No pickle anywhere. A
converted data set is a directory:

    NAME-00000-of-00008.array_record        the records, group size 1, not compressed: JPEGs do not
    get smaller NAME-00000-of-00008.array_record.npz    of each record: hash of its key, label,
    whether it has a caption (13 bytes); digest of the shard dataset.json
    version, classes, shards with counts and digests; written last, so it says "complete"

To write one: `write_shard` once a shard, in any order and from any process, then
`write_shard_index`. A shard is renamed into place when it is whole, so a shard that is there need
not be written again (`shard_length`)."""

import glob
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from m3i_jax import privacy
from m3i_jax.data.sources import base, tf_example
from m3i_jax.data.sources.base import HandleCache, Record
from m3i_jax.data.sources.registry import SourceKind, register_source
from m3i_jax.errors import UnreadableError, UserError

VERSION = 1
INDEX = "dataset.json"
INDEX_LIMIT = 1 << 22  # bytes of it that are read; a shard takes a hundred
ENDING = ".array_record"
# stands for bytes whose checksum does not hold: no decoder takes it, so it is counted and replaced
DAMAGED = b"damaged record"
# What others call these things, the first that is there counts.
IMAGES = ("image", "image/encoded", "image_bytes", "jpg", "jpeg", "png", "webp")
LABELS = ("label", "image/class/label", "class", "cls")
CAPTIONS = ("caption", "text", "txt", "image/caption")
KEYS = ("key", "__key__", "id", "image/filename", "filename", "file_name")
_OPEN = 256  # files held open at a time
_BLOCK = 256  # records read at a time where all are read
_COLUMNS = {"key": np.uint64, "label": np.int32, "caption": np.bool_}
_log = logging.getLogger(__name__)


def pack_record(record: Record) -> bytes:
    """A record as the bytes of a tf.train.Example. An image that is pixels already is stored as
    PNG, every other one as it is.

    >>> unpack_record(pack_record(Record("a", b"...", 3, "a cat")))
    Record(key='a', image=b'...', label=3, caption=b'a cat')
    """
    image = record.image if isinstance(record.image, bytes) else _png(record.image)
    features: dict[str, bytes | int] = {
        "image": image,
        "key": record.key.encode("utf-8", "surrogateescape"),
    }
    if record.label >= 0:
        features["label"] = int(record.label)
    if record.caption is not None:
        features["caption"] = (
            record.caption
            if isinstance(record.caption, bytes)
            else record.caption.encode("utf-8", "replace")
        )
    return tf_example.encode_example(features)


def unpack_record(raw: bytes, key: str = "") -> Record:
    """The record of a tf.train.Example, ours or one with the usual names (IMAGES, LABELS, CAPTIONS,
    KEYS).

    Args:
        raw: the message.
        key: of the record, if the message holds none.

    Raises:
        ValueError: the bytes are no tf.train.Example. One without an image gives empty bytes.

    >>> unpack_record(tf_example.encode_example({"image/encoded": b"...", "text": b"a dog"}), "7")
    Record(key='7', image=b'...', label=-1, caption=b'a dog')
    """
    features = tf_example.decode_example(raw)

    def first(names: Sequence[str], kind: type) -> Any:
        for name in names:
            if (values := features.get(name)) and isinstance(values[0], kind):
                return values[0]
        return None

    label, name = base.parse_label(first(LABELS, int)), first(KEYS, bytes)
    return Record(
        name.decode("utf-8", "surrogateescape") if name else key,
        first(IMAGES, bytes) or b"",
        -1 if label is None else label,
        first(CAPTIONS, bytes),
    )


def write_shard(path: str, records: Iterable[Record]) -> int:
    """Writes one file of records and the small file of its keys and labels, each whole or not at
    all.

    Args:
        path: of the new file; ends in ".array_record". Its directory is made.
        records: in the order in which they are to stand.

    Returns:
        The number of records written.
    """
    array_record = _library()
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    part, content = f"{path}.{os.getpid()}.part", hashlib.blake2b(digest_size=8)
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    try:
        writer = array_record.ArrayRecordWriter(part, "group_size:1,uncompressed")
        try:
            for record in records:
                packed = pack_record(record)
                content.update(len(packed).to_bytes(8, "little") + packed)
                columns["key"].append(base.key_hash(record.key))
                columns["label"].append(record.label)
                columns["caption"].append(record.caption is not None)
                writer.write(packed)
        finally:
            writer.close()
        _save(
            f"{path}.npz",
            {name: np.array(columns[name], kind) for name, kind in _COLUMNS.items()},
            content.hexdigest(),
        )
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.unlink(part)
    return len(columns["key"])


def shard_length(path: str) -> int | None:
    """The number of records of a shard that was written whole, or None if it is not there.

    >>> shard_length("/no/such.array_record") is None
    True
    """
    columns = _load(f"{path}.npz") if os.path.exists(path) else None
    return None if columns is None else len(columns["key"])


def write_shard_index(
    directory: str, *, classes: Sequence[str] = (), captions: bool | None = None, name: str = ""
) -> int:
    """Writes `dataset.json` for the shards that lie in a directory; without it they are not read as
    one finished data set.

    Args:
        directory: holds the finished shards.
        classes: names of the labels.
        captions: whether there are any; None: look.
        name: where the records come from, for descriptions.

    Returns:
        The number of records.

    Raises:
        UserError: there is no shard, or one of them was not written by `write_shard`.
    """
    shards: list[dict[str, Any]] = []
    any_caption = False
    for path in _files(directory):
        columns = _load(f"{path}.npz")
        if columns is None:
            raise UserError(
                f"{path!r} has no index beside it: it was not written whole; remove it and convert"
                " again"
            )
        any_caption |= bool(columns["caption"].any())
        shards.append(
            {
                "file": os.path.basename(path),
                "count": len(columns["key"]),
                "digest": str(columns["digest"]),
            }
        )
    if not shards:
        raise UserError(f"{directory!r} holds no {ENDING} file to index")
    count = sum(int(shard["count"]) for shard in shards)
    about = {
        "version": VERSION,
        "name": privacy.redact(name),
        "count": count,
        "captions": any_caption if captions is None else captions,
    }
    base.write_atomic(
        os.path.join(directory, INDEX),
        json.dumps({**about, "classes": list(classes), "shards": shards}, indent=1).encode(),
    )
    return count


class ArrayRecordSource:
    """The records of ArrayRecord files, in the order of file names and then of records.

    Of a directory that `--mode=convert` wrote, the index is read; other files are read through once
    to learn keys and labels, which are then kept in `cache`. Their classes have no names: "0", "1",
    ... A record whose checksum does not hold is replaced like any image that cannot be decoded.

    Args: path: directory of the files, or a glob of them. cache: directory for the index of files
        that have none; "" to build it at every start. lenient: a shard of a converted data set may
        be missing if its index is there: its records are `UnreadableError`, and all others keep
        their places.

    Raises:
        UserError: no file, a damaged one, or the package array_record is missing.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = write_shard(f"{folder}/x-00000-of-00001.array_record", [Record("7", b"...", 1, "a cat")])
    ...     _ = write_shard_index(folder, classes=("bird", "cat"))
    ...     source = ArrayRecordSource(folder)
    ...     print(source.classes, source[0])
    ('bird', 'cat') Record(key='7', image=b'...', label=1, caption=b'a cat')
    """

    def __init__(self, path: str, *, cache: str = "", lenient: bool = False) -> None:
        _library()
        self._lenient = lenient
        self.path, self.name = os.path.expanduser(path), f"array_record {path!r}"
        self._readers = HandleCache(_OPEN)
        index = os.path.join(self.path, INDEX)
        if os.path.isfile(index):
            self._adopt(index)
        else:
            self._learn(cache)
        self._ends = np.cumsum(self._counts)
        if not len(self):
            raise UserError(
                f"data.path={path!r} holds no record: the {ENDING} files there are empty"
            )

    def _adopt(self, index: str) -> None:
        """A directory of `write_shard_index`."""
        try:
            about = json.loads(
                base.read_byte_range(index, 0, min(os.path.getsize(index), INDEX_LIMIT))
            )
            shards = about["shards"]
            self.classes: tuple[str, ...] = tuple(map(str, about["classes"]))
            self.captions = bool(about["captions"])
            self.files = [
                os.path.join(self.path, os.path.basename(shard["file"])) for shard in shards
            ]
            self._counts = [int(shard["count"]) for shard in shards]
            self._identity = base.stable_digest(
                *(shard["digest"] for shard in shards), *self.classes
            )
            version = int(about["version"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{index!r} is damaged ({type(error).__name__}: {error}): remove it and convert the"
                " data set again"
            ) from error
        if version != VERSION:
            raise UserError(
                f"{index!r} is of version {version}, this program reads {VERSION}: convert the data"
                " set again"
            )
        for file in self.files:
            if not os.path.isfile(file):
                if not self._lenient:
                    raise UserError(
                        f"{file!r} is missing, and {index!r} lists it: restore it or convert the"
                        " data set again"
                    )
                _log.warning("%r is missing: its records are replaced (config.data.missing)", file)
        parts = [_load(f"{file}.npz") for file in self.files]
        if any(
            part is None or len(part["key"]) != count
            for part, count in zip(parts, self._counts, strict=True)
        ):
            raise UserError(
                f"the small .npz files beside the shards of {self.path!r} are missing or damaged:"
                " convert the data set again"
            )
        self._columns = {
            name: np.concatenate([part[name] for part in parts if part is not None])
            for name in _COLUMNS
        }

    def _learn(self, cache: str) -> None:
        """Files of somebody else: what their records hold has to be read."""
        self.files = _files(self.path)
        if not self.files:
            raise UserError(
                f"data.path={self.path!r} holds no {ENDING} file: give a directory or a glob of"
                " them"
            )
        states = [(os.path.realpath(file), os.stat(file)) for file in self.files]
        signature = base.stable_digest(
            VERSION, *(f"{path}\0{state.st_size}\0{state.st_mtime_ns}" for path, state in states)
        )
        kept = os.path.join(cache, f"array_record_{signature}.npz") if cache else ""
        self._counts = [_count(self._reader(i), file) for i, file in enumerate(self.files)]
        columns = _load(kept) if kept else None
        if columns is None:
            columns = self._read_all()
            if kept:
                try:
                    _save(kept, {name: columns[name] for name in _COLUMNS}, str(columns["digest"]))
                except OSError as error:
                    _log.warning(
                        "the index %r cannot be kept (%s); it is built again at the next start",
                        kept,
                        error.strerror,
                    )
        self._columns = {name: columns[name] for name in _COLUMNS}
        self.captions = bool(columns["caption"].any())
        highest = int(columns["label"].max(initial=-1))
        self.classes = tuple(str(i) for i in range(highest + 1))
        self._identity = base.stable_digest(str(columns["digest"]))

    def _read_all(self) -> dict[str, np.ndarray]:
        content, at = hashlib.blake2b(digest_size=8), 0
        columns: dict[str, np.ndarray] = {
            name: np.zeros(sum(self._counts), kind) for name, kind in _COLUMNS.items()
        }
        for shard, count in enumerate(self._counts):
            _log.info("indexing %s: %d of %d", self.files[shard], shard + 1, len(self.files))
            for first in range(0, count, _BLOCK):
                rows = range(first, min(first + _BLOCK, count))
                for row, raw in zip(rows, self._raw(shard, list(rows)), strict=True):
                    record = self._record(shard, row, raw)
                    content.update(
                        f"{record.key}\0{len(raw)}\0{record.label}".encode(
                            "utf-8", "surrogateescape"
                        )
                    )
                    columns["key"][at], columns["label"][at] = (
                        base.key_hash(record.key),
                        record.label,
                    )
                    columns["caption"][at] = record.caption is not None
                    at += 1
        return {**columns, "digest": np.array(content.hexdigest())}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        """Several records at once: one call of the library a file, tens of times faster than one by
        one."""
        wanted = np.asarray(indices, np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"{wanted.min()}..{wanted.max()} of {len(self)} records")
        shards = np.searchsorted(self._ends, wanted, side="right")
        got: list[Record | None] = [None] * len(wanted)
        for shard in np.unique(shards).tolist():
            places = np.flatnonzero(shards == shard)
            rows = (wanted[places] - (self._ends[shard] - self._counts[shard])).tolist()
            for place, row, raw in zip(places.tolist(), rows, self._raw(shard, rows), strict=True):
                got[place] = self._record(shard, row, raw)
        return [record for record in got if record is not None]

    def key(self, index: int) -> str:
        return self[index].key

    def key_hashes(self) -> np.ndarray:
        return self._columns["key"]

    def fingerprint(self) -> str:
        return self._identity

    def description(self) -> str:
        share = f", captions for {self._columns['caption'].mean():.0%}" if self.captions else ""
        classes = f", {len(self.classes):,} classes" if self.classes else ""
        return f"{len(self):,} images in {len(self.files):,} files of {self.name}{classes}{share}"

    def _record(self, shard: int, row: int, raw: bytes) -> Record:
        key = f"{os.path.basename(self.files[shard])}#{row}"
        try:
            return Record(key, DAMAGED) if raw is DAMAGED else unpack_record(raw, key)
        except ValueError:
            return Record(key, DAMAGED)

    def _raw(self, shard: int, rows: list[int]) -> list[bytes]:
        try:
            return self._reader(shard).read(rows)
        except (RuntimeError, ValueError, IndexError):
            if not os.path.isfile(self.files[shard]):
                raise UnreadableError(
                    f"{self.files[shard]!r} cannot be read although it could when the run began;"
                    " restore it"
                ) from None
        # one by one, so that a damaged record takes none of its neighbours along
        return [self._one(shard, row) for row in rows]

    def _one(self, shard: int, row: int) -> bytes:
        try:
            return self._reader(shard).read([row])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            if "orrupt" in str(error) or "mismatch" in str(error):
                return DAMAGED
            raise UnreadableError(
                f"record {row} of {self.files[shard]!r} cannot be read ({error}); restore the file"
                " and start again"
            ) from error

    def _reader(self, shard: int) -> Any:
        options = "readahead_buffer_size:0,max_parallelism:0"
        return self._readers(
            shard,
            lambda: _library().ArrayRecordReader(
                self.files[shard], options, file_reader_buffer_size=1 << 15
            ),
        )


def _library() -> Any:
    try:
        from array_record.python import array_record_module
    except ImportError:
        raise UserError(
            "ArrayRecord files need the package array_record: pip install 'm3i-jax[tfds]'"
        ) from None
    return array_record_module


def _count(reader: Any, path: str) -> int:
    count = reader.num_records()
    if not reader.ok():
        raise UserError(
            f"{path!r} is no whole ArrayRecord file: it is cut off or of another format; restore it"
            " or leave it out"
        )
    return count


def _files(path: str) -> list[str]:
    pattern = os.path.join(glob.escape(path), f"*{ENDING}*") if os.path.isdir(path) else path
    return sorted(
        f
        for f in glob.glob(pattern, recursive=True)
        if os.path.isfile(f) and not f.endswith((".npz", ".part"))
    )


def _png(pixels: np.ndarray) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _save(path: str, columns: dict[str, np.ndarray], digest: str) -> None:
    base.save_arrays(path, digest=np.array(digest), **columns)


def _load(path: str) -> dict[str, np.ndarray] | None:
    there = base.load_arrays(path)
    return there if there is not None and {*_COLUMNS, "digest"} <= there.keys() else None


register_source(
    SourceKind(
        name="array_record",
        open=lambda path, split, data, cache: ArrayRecordSource(
            base.split_path(path, split), cache=cache, lenient=data.missing == "replace"
        ),
        path="the directory that holds the .array_record files",
        reads=("class_names",),
    )
)
