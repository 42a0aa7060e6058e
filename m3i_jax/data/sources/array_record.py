"""Reads and writes ArrayRecord files, which have random access and a checksum per record: those of
`--mode=convert` and those of other programs.

A record is a tf.train.Example with `image` (the original bytes, never encoded again), `key` and, if
known, `label` and `caption`. Nothing is pickled. A converted data set is a directory:

    NAME-00000-of-00008.array_record      the records; group size 1, not compressed, since JPEGs do
                                          not shrink
    NAME-00000-of-00008.array_record.npz  13 bytes per record: hash of the key, label, whether it
                                          has a caption; the digest of the shard
    dataset.npz                           the same of all shards, so that a start opens one file
    dataset.json                          version, classes, shards with counts and digests; written
                                          last, so it marks a complete data set

Written by `write_shard` for each shard, in any order and process, then `write_shard_index`. A
complete shard is renamed into place, after its small file (`shard_length`)."""

import functools
import glob
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from m3i_jax import privacy, progress
from m3i_jax.data.sources import base, shared_files
from m3i_jax.data.sources.base import HandleCache, Record
from m3i_jax.data.sources.packed_records import pack_record, unpack_record
from m3i_jax.data.sources.registry import SourceKind, register_source
from m3i_jax.errors import TransientError, UnreachableError, UnreadableError, UserError, as_refusal

VERSION = 1
INDEX, JOINED = "dataset.json", "dataset.npz"
# Bytes of the index that are read: of names of classes, and for each file of the directory. A shard
# takes a hundred and has two files, so an index of many shards does not lie there alone.
INDEX_LIMIT, _FILE_LIMIT = 1 << 22, 1 << 9
ENDING = ".array_record"
DAMAGED = b"damaged record"  # instead of bytes with a wrong checksum; no decoder accepts it
# Files open at a time: a sixteenth of those that a process may have open, within these bounds. Each
# record of an open file takes 8 bytes.
_FEW_OPEN, _MANY_OPEN, _OPEN_RECORDS = 256, 4096, 1 << 25
_BLOCK = 256  # records read at a time while the index is built
_COLUMNS = {"key": np.uint64, "label": np.int32, "caption": np.bool_}
_log = logging.getLogger(__name__)


def write_shard(path: str, records: Iterable[Record], *, writer_name: str = "") -> int:
    """Writes one file of records, and the small file of its keys and labels, both atomically.

    Args:
        path: of the new file; ends in ".array_record". Its directory is created.
        records: in their final order.
        writer_name: of the process, part of the name of its temporary files; "" for its id.

    Returns:
        The number of records written.
    """
    array_record = _library()
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    part = f"{path}.{writer_name or os.getpid()}.part"
    content = hashlib.blake2b(digest_size=8)
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
        base.save_arrays(
            f"{part}.npz",
            digest=np.array(content.hexdigest()),
            **{name: np.array(columns[name], kind) for name, kind in _COLUMNS.items()},
        )
        os.replace(f"{part}.npz", f"{path}.npz")
        os.replace(part, path)
    finally:
        for left in (part, f"{part}.npz"):
            if os.path.exists(left):
                os.unlink(left)
    return len(columns["key"])


def shard_length(path: str) -> int | None:
    """Returns the number of records of a complete shard, or None if it is missing.

    >>> shard_length("/no/such.array_record") is None
    True
    """
    columns = _load(f"{path}.npz") if os.path.isfile(path) else None
    return None if columns is None else len(columns["key"])


def check_shard(path: str, count: int) -> bool:
    """Returns whether a shard is complete: whether its small file has `count` records, and the
    ArrayRecord file itself states as many.

    >>> check_shard("/no/such.array_record", 3)
    False
    """
    if shard_length(path) != count:
        return False
    try:
        reader = _library().ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")
        return bool(reader.ok()) and int(reader.num_records()) == count
    except (RuntimeError, ValueError):
        return False


def write_shard_index(
    directory: str, *, classes: Sequence[str] = (), captions: bool | None = None, name: str = ""
) -> int:
    """Writes `dataset.npz` and `dataset.json` for the shards of a directory, of which the latter
    marks the data set as complete.

    Args:
        directory: of the shards.
        classes: names of the labels.
        captions: whether any record has one; None to take it from the shards.
        name: origin of the records, for descriptions.

    Returns:
        The number of records.

    Raises:
        UserError: there is no shard, or one of them was not written by `write_shard`.
    """
    shards: list[dict[str, Any]] = []
    parts: list[dict[str, np.ndarray]] = []
    for path in _files(directory):
        columns = _load(f"{path}.npz")
        if columns is None:
            raise UserError(
                f"{path!r} has no .npz file beside it, so it is incomplete; remove it and convert"
                " again"
            )
        parts.append(columns)
        shards.append(
            {
                "file": os.path.basename(path),
                "count": len(columns["key"]),
                "digest": str(columns["digest"]),
            }
        )
    if not shards:
        raise UserError(f"{directory!r} holds no {ENDING} file to index")
    joined, digest = _join(parts), _joined_digest(shards)
    if _load_joined(directory, digest, len(joined["key"])) is None:
        path = os.path.join(directory, JOINED)
        base.save_arrays(path, digest=np.array(digest), **joined)
    count = len(joined["key"])
    metadata = {
        "version": VERSION,
        "name": privacy.redact(name),
        "count": count,
        "captions": bool(joined["caption"].any()) if captions is None else captions,
    }
    index = {**metadata, "classes": list(classes), "shards": shards}
    shared_files.write_shared(os.path.join(directory, INDEX), json.dumps(index).encode())
    return count


def _join(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in _COLUMNS}


def _joined_digest(shards: Sequence[dict[str, Any]]) -> str:
    """Returns what changes if any shard does: the joined columns are those of these shards."""
    return base.stable_digest(*(f"{shard['count']}\0{shard['digest']}" for shard in shards))


def _load_joined(directory: str, digest: str, count: int) -> dict[str, np.ndarray] | None:
    """Returns the columns of all shards; None if there is no file of these shards."""
    joined = _load(os.path.join(directory, JOINED))
    if joined is None or str(joined["digest"]) != digest or len(joined["key"]) != count:
        return None
    return {name: joined[name] for name in _COLUMNS}


class ArrayRecordSource:
    """The records of ArrayRecord files, in the order of file names and then of records.

    The index of a directory that `--mode=convert` wrote is read. Other files are read once for
    their keys and labels, which are saved in `cache`; their classes are named "0", "1", ... A
    record whose checksum does not match is a bad record.

    Args:
        path: directory or glob of the files.
        cache: directory of the index of files without one; "" to build it at every start.
        lenient: accept that a shard of a converted data set is missing if its index is present.
            Reading its records raises UnreadableError; the others keep their indices.

    Raises:
        UserError: there is no file, one is damaged, or the package array_record is missing.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     records = [Record("7", b"...", 1, "a cat")]
    ...     _ = write_shard(f"{folder}/x-00000-of-00001.array_record", records)
    ...     _ = write_shard_index(folder, classes=("bird", "cat"))
    ...     source = ArrayRecordSource(folder)
    ...     print(source.classes, source[0])
    ('bird', 'cat') Record(key='7', image=b'...', label=1, caption=b'a cat')
    """

    extents = base.whole_files

    def __init__(self, path: str, *, cache: str = "", lenient: bool = False) -> None:
        _library()
        self._lenient = lenient
        self.path, self.name = os.path.expanduser(path), f"array_record {path!r}"
        self._readers = HandleCache(_FEW_OPEN)
        index = os.path.join(self.path, INDEX)
        self._converted = os.path.isfile(index)
        if self._converted:
            self._read_index(index)
        else:
            self._build_index(cache)
        self._ends = np.cumsum(self._counts)
        if not len(self):
            raise UserError(
                f"data.path={path!r} holds no record: the {ENDING} files there are empty"
            )
        self._readers = HandleCache(_most_open(len(self) / len(self.files)))

    def __getstate__(self) -> dict[str, Any]:
        # No worker process reads the columns, which are 13 bytes of every record.
        return {name: value for name, value in self.__dict__.items() if name != "_columns"}

    @functools.cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        return self._read_columns() if self._converted else self._scanned_columns()

    def _read_index(self, index: str) -> None:
        """Reads the index of a converted data set."""
        try:
            limit = INDEX_LIMIT + _FILE_LIMIT * len(os.listdir(self.path))
            size = min(os.path.getsize(index), limit)
            metadata = json.loads(base.read_byte_range(index, 0, size))
            shards = metadata["shards"]
            self.classes: tuple[str, ...] = tuple(map(str, metadata["classes"]))
            self.captions = bool(metadata["captions"])
            names = (os.path.basename(shard["file"]) for shard in shards)
            self.files = [os.path.join(self.path, name) for name in names]
            self._counts = [int(shard["count"]) for shard in shards]
            self._identity = base.stable_digest(
                *(shard["digest"] for shard in shards), *self.classes
            )
            self._joined = _joined_digest(shards)
            version = int(metadata["version"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{index!r} is damaged ({type(error).__name__}: {error}): remove it and convert the"
                " data set again"
            ) from error
        if version != VERSION:
            raise UserError(
                f"{index!r} has version {version}, this program reads {VERSION}: convert the data"
                " set again"
            )
        for file in self.files:
            if not os.path.isfile(file):
                if not self._lenient:
                    raise UserError(
                        f"{file!r} is missing, and {index!r} lists it: restore it or convert the"
                        " data set again"
                    )
                _log.warning("%r is missing; its records are replaced (config.data.missing)", file)
        _ = self._columns  # refuses a directory without them

    def _read_columns(self) -> dict[str, np.ndarray]:
        """Reads the keys and labels of a converted data set, of an earlier version shard by
        shard."""
        joined = _load_joined(self.path, self._joined, sum(self._counts))
        if joined is not None:
            return joined
        if os.path.isfile(os.path.join(self.path, JOINED)):
            _log.warning(
                "%r is damaged or of other shards: the files of the shards are read instead",
                os.path.join(self.path, JOINED),
            )
        parts = [_load(f"{file}.npz") for file in self.files]
        if any(
            part is None or len(part["key"]) != count
            for part, count in zip(parts, self._counts, strict=True)
        ):
            raise UserError(
                f"the small .npz files beside the shards of {self.path!r} are missing or damaged:"
                " convert the data set again"
            )
        return _join([part for part in parts if part is not None])

    def _build_index(self, cache: str) -> None:
        """Finds files without an index, and their keys and labels."""
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
        self._saved = os.path.join(cache, f"array_record_{signature}.npz") if cache else ""
        self._counts = [_count(self._reader(i), file) for i, file in enumerate(self.files)]
        self.captions = bool(self._columns["caption"].any())
        highest = int(self._columns["label"].max(initial=-1))
        self.classes = tuple(str(i) for i in range(highest + 1))
        self._identity = base.stable_digest(str(self._columns["digest"]))

    def _scanned_columns(self) -> dict[str, np.ndarray]:
        """Reads the keys and labels of files without an index, or loads them from the cache."""
        if self._saved and (saved := _load(self._saved)) is not None:
            return saved
        columns = self._read_all()
        if self._saved:
            index = {name: columns[name] for name in (*_COLUMNS, "digest")}
            try:
                base.save_arrays(self._saved, **index)
            except OSError as error:
                _log.warning(
                    "the index %r cannot be saved (%s); it will be rebuilt at the next start",
                    self._saved,
                    error.strerror,
                )
        return columns

    def _read_all(self) -> dict[str, np.ndarray]:
        content, position = hashlib.blake2b(digest_size=8), 0
        columns: dict[str, np.ndarray] = {
            name: np.zeros(sum(self._counts), kind) for name, kind in _COLUMNS.items()
        }
        shards = progress.track_progress(
            self._counts, "indexing", sum(self._counts), "records", size=lambda count: count
        )
        for shard, count in enumerate(shards):
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
                    columns["key"][position] = base.key_hash(record.key)
                    columns["label"][position] = record.label
                    columns["caption"][position] = record.caption is not None
                    position += 1
        return {**columns, "digest": np.array(content.hexdigest())}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        """Reads several records with one call per file, tens of times faster than one by one."""
        index_array = np.asarray(indices, np.int64)
        if index_array.size and not 0 <= index_array.min() <= index_array.max() < len(self):
            raise IndexError(
                f"record numbers {index_array.min()}..{index_array.max()} of {len(self)} records"
            )
        shards = np.searchsorted(self._ends, index_array, side="right")
        records: dict[int, Record] = {}
        for shard in np.unique(shards).tolist():
            positions = np.flatnonzero(shards == shard)
            rows = (index_array[positions] - (self._ends[shard] - self._counts[shard])).tolist()
            for position, row, raw in zip(
                positions.tolist(), rows, self._raw(shard, rows), strict=True
            ):
                records[position] = self._record(shard, row, raw)
        return [records[position] for position in range(len(index_array))]

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
            base.check_presence(self.files[shard])
        # one by one, so that a damaged record does not affect its neighbours
        return [self._read_one(shard, row) for row in rows]

    def _read_one(self, shard: int, row: int) -> bytes:
        try:
            return self._reader(shard).read([row])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            if "orrupt" in str(error) or "mismatch" in str(error):
                return DAMAGED
            away = isinstance(as_refusal(error), TransientError)
            raise (UnreachableError if away else UnreadableError)(
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


def _most_open(records: float) -> int:
    """Returns how many files of so many records each may be open at a time. In random order, a file
    that was closed is opened again, and its index read, for about every record of it. A sixteenth
    of the limit: a mixture has several sources, each with a held-out split."""
    try:
        import resource
    except ImportError:  # only Unix has it
        return _FEW_OPEN
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = _MANY_OPEN if limit == resource.RLIM_INFINITY else limit // 16
    return max(_FEW_OPEN, min(files, _MANY_OPEN, int(_OPEN_RECORDS / records)))


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
            f"{path!r} is not a complete ArrayRecord file: it is truncated or of another format;"
            " restore it or leave it out"
        )
    return count


def _files(path: str) -> list[str]:
    pattern = os.path.join(glob.escape(path), f"*{ENDING}*") if os.path.isdir(path) else path
    return sorted(
        f
        for f in glob.glob(pattern, recursive=True)
        if base.is_file(f) and not f.endswith((".npz", ".part"))
    )


def _load(path: str) -> dict[str, np.ndarray] | None:
    arrays = base.load_arrays(path)
    return arrays if arrays is not None and {*_COLUMNS, "digest"} <= arrays.keys() else None


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
