"""Keep-lists: a Parquet or Arrow file that names the records of a source to train on. Any engine
can write one, so filtering rewrites no image.

Columns: `key` of a record (text or a whole number); optional `weight`, how often it occurs in an
epoch on average (0: never); optional `caption` and `label`, which replace those of the source where
they are not null. Other columns are not read.

A kept set is a source. Its records are in the order of the source, so the order of the rows, the
format and the number of files of the list change neither the stream nor its fingerprint."""

import dataclasses
import glob
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from m3i_jax.data import decode
from m3i_jax.data.sources import base, remote
from m3i_jax.data.sources.base import DataSource, Record
from m3i_jax.errors import UserError, one_line, shorten

VERSION = 2  # of the index of a kept set
ENDINGS = (".parquet", ".arrow", ".feather")
WEIGHT_LIMIT = 1e6
_FORMAT = "a keep-list is a Parquet or Arrow file with a column `key`"
_OWN = -2  # the label of the source is kept


def keep_records(source: DataSource, path: str, *, cache: str = "") -> "KeptSource":
    """Returns the records of a source that a keep-list names.

    A key that several records of the source share keeps them all. Matching compares 64-bit hashes
    of the keys. What was found is saved in `cache`, so that the next start, or another host, reads
    neither the list nor the keys again.

    Args:
        source: of the records.
        path: the file, or a directory of such files as engines write them; a URL of one file.
        cache: directory of the index; "" for none.

    Raises:
        UserError: the file is no keep-list (another format, no column `key`, a key twice, a weight
            that is no number from 0 to a million, a label that is no category), or none of its keys
            is in the source; or pyarrow is missing.
    """
    files = _list_files(path)
    signature = json.dumps([VERSION, source.fingerprint(), [_state(file) for file in files]])
    name = f"keep_{base.stable_digest(path, source.fingerprint())}.npz"
    saved = os.path.join(cache, name) if cache else ""
    arrays = base.load_arrays(saved) if saved else None
    if arrays is None or bytes(arrays.get("signature", b"")) != signature.encode():
        arrays = _match(source, path, _read(files))
        arrays["signature"] = np.frombuffer(signature.encode(), np.uint8)
        if saved:
            try:
                base.save_arrays(saved, **arrays)
            except OSError:  # it is read again at the next start
                saved = ""
    return KeptSource(source, path, arrays, saved)


class KeptSource(base.SubsetSource):
    """The records that a keep-list names, in the order of the source; see `keep_records`.

    Attributes:
        record_weights: float64 [N], or None if every record occurs once in an epoch.
        missing: keys of the list that no record has.
        listed: keys of the list.
    """

    def __init__(
        self, source: DataSource, path: str, arrays: dict[str, np.ndarray], saved: str = ""
    ) -> None:
        part = f"kept by {os.path.basename(path.rstrip('/'))!r}"
        super().__init__(source, arrays["indices"], part, bytes(arrays["digest"]).decode())
        self.missing, self.listed = int(arrays["missing"]), int(arrays["listed"])
        self._saved = saved
        self._set_arrays(arrays)
        if (labels := arrays.get("label")) is not None:
            highest = int(labels.max(initial=-1))
            if not self.classes:
                self.classes = tuple(str(i) for i in range(highest + 1))
            elif highest >= len(self.classes):
                raise UserError(
                    f"data.keep={path!r}: the label {highest} is not one of the"
                    f" {len(self.classes):,} categories of {source.name}, from 0 on: repair the"
                    " column `label`"
                )
        self.captions = self.captions or bool(arrays.get("captioned", np.zeros(0)).any())

    def _set_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        self.indices, self.record_weights = arrays["indices"], arrays.get("weight")
        self._arrays = arrays

    def __getstate__(self) -> dict[str, Any]:
        # A worker process loads the index from its file if there is one, as that of tar files.
        state = self.__dict__.copy()
        state.pop("cumulative_weights", None)
        if self._saved and os.path.exists(self._saved):
            for name in ("_arrays", "indices", "record_weights"):
                del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "_arrays" not in state:
            arrays = base.load_arrays(self._saved)
            if arrays is None or bytes(arrays["digest"]).decode() != self._identity:
                raise UserError(
                    f"{self._saved!r} changed while the run was reading it; start again"
                )
            self._set_arrays(arrays)

    def __getitem__(self, index: int) -> Record:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        records = super().__getitems__(indices)
        return [self._replace(int(i), r) for i, r in zip(indices, records, strict=True)]

    def caption(self, index: int) -> str | bytes | None:
        own = self._own_caption(index)
        return super().caption(index) if own is None else own

    def caption_list(self, index: int) -> tuple[str | bytes, ...]:
        own = self._own_caption(index)
        return super().caption_list(index) if own is None else (own,)

    def _replace(self, index: int, record: Record) -> Record:
        label, caption = self._arrays.get("label"), self._own_caption(index)
        new_label = record.label if label is None or label[index] == _OWN else int(label[index])
        record = dataclasses.replace(record, label=new_label)
        if caption is None:
            return record
        return dataclasses.replace(record, caption=caption, other_captions=())

    @property
    def replaces(self) -> bool:
        """Whether captions or labels are those of the list."""
        return "captioned" in self._arrays or "label" in self._arrays

    def _own_caption(self, index: int) -> bytes | None:
        captioned, ends = self._arrays.get("captioned"), self._arrays.get("caption_end")
        if captioned is None or ends is None or not captioned[index]:
            return None
        return bytes(self._arrays["captions"][ends[index - 1] if index else 0 : ends[index]])

    def description(self) -> str:
        notes = [f"{self.subset}: {len(self) / max(len(self.source), 1):.1%}"]
        if self.missing:
            notes.append(f"{self.missing:,} of its {self.listed:,} keys are not in the source")
        if self.record_weights is not None:
            notes.append(
                f"weights {self.record_weights.min():.3g} to {self.record_weights.max():.3g},"
                f" {int(np.ceil(self.record_weights.sum())):,} samples an epoch"
            )
        for column, what in (("captioned", "captions"), ("label", "labels")):
            if (array := self._arrays.get(column)) is not None:
                own = array if column == "captioned" else array != _OWN
                notes.append(f"its {what} for {own.mean():.0%}")
        return f"{len(self):,} of {self.source.description()} ({'; '.join(notes)})"


def _list_files(path: str) -> list[str]:
    expanded = path if remote.is_remote(path) else os.path.expanduser(path)
    if remote.is_remote(path) or os.path.isfile(expanded):
        return [expanded]
    if not os.path.isdir(expanded) and os.path.exists(expanded):
        raise UserError(f"data.keep={path!r} is neither a file nor a directory: {_FORMAT}")
    if not os.path.isdir(expanded):
        raise UserError(
            f"data.keep={path!r} does not exist: {base.missing_path_error(expanded)}; {_FORMAT}"
        )
    names = sorted(glob.glob(os.path.join(glob.escape(expanded), "*")))
    if files := [name for name in names if name.lower().endswith(ENDINGS)]:
        return files
    raise UserError(
        f"data.keep={path!r} is a directory without a file of {', '.join(ENDINGS)}: {_FORMAT}"
    )


def _state(file: str) -> list[str]:
    if remote.is_remote(file):
        return [file, *map(str, remote.file_state(file))]
    state = os.stat(file)
    return [os.path.realpath(file), str(state.st_size), str(state.st_mtime_ns)]


def arrow_library() -> Any:
    """Returns pyarrow with its modules for files.

    Raises:
        UserError: it is not installed.

    >>> arrow_library().__name__
    'pyarrow'
    """
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "a keep-list needs the package pyarrow: pip install 'm3i-jax[arrow]'"
        ) from None
    return pyarrow


def _batches(file: str, *, one_of_many: bool = False) -> Iterator[Any]:
    """Yields the record batches of one file, with the columns that are read; it may be one of many
    files of a list."""
    arrow = arrow_library()
    wanted = ("key", "weight", "caption", "label")
    try:
        with remote.open_file(file) if remote.is_remote(file) else open(file, "rb") as opened:
            magic = opened.read(6)
            opened.seek(0)
            if magic[:4] == b"PAR1":
                parquet = arrow.parquet.ParquetFile(opened)
                _check_columns(file, parquet.schema_arrow, one_of_many)
                names = [name for name in wanted if name in parquet.schema_arrow.names]
                yield from parquet.iter_batches(1 << 18, columns=names)
                return
            if magic == b"ARROW1":
                reader = arrow.ipc.open_file(opened)
                _check_columns(file, reader.schema, one_of_many)
                yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
                return
            if magic[:4] == b"\xff\xff\xff\xff":
                stream = arrow.ipc.open_stream(opened)
                _check_columns(file, stream.schema, one_of_many)
                yield from stream
                return
    except (arrow.ArrowException, OSError) as error:
        reason = one_line(error, 200)
        raise UserError(f"data.keep={file!r} is damaged ({reason}): write it again") from error
    raise UserError(f"data.keep={file!r} is neither Parquet nor Arrow: {_FORMAT}")


def _check_columns(file: str, columns: Any, one_of_many: bool) -> None:
    arrow = arrow_library()
    if one_of_many and "copy_of" in columns.names:
        raise UserError(
            f"data.keep={os.path.dirname(file)!r}: its file {os.path.basename(file)!r} lists what"
            " --mode=curate left out (column `copy_of`), and would be kept with the rest: give the"
            " keep-list itself, such as keep.parquet"
        )
    if "key" not in columns.names:
        names = shorten(", ".join(columns.names))
        raise UserError(
            f"data.keep={file!r} has no column `key`, its columns are {names}: {_FORMAT}"
        )
    types, kinds = arrow.types, {name: columns.field(name).type for name in columns.names}
    kinds = {
        name: kind.value_type if types.is_dictionary(kind) else kind for name, kind in kinds.items()
    }

    def is_text(kind: Any) -> bool:
        # a view is what Polars writes to Arrow files
        views = types.is_string_view(kind)
        return bool(types.is_string(kind) or types.is_large_string(kind) or views)

    def is_key(kind: Any) -> bool:
        views = types.is_binary_view(kind)
        binary = types.is_binary(kind) or types.is_large_binary(kind) or views
        return bool(is_text(kind) or types.is_integer(kind) or binary)

    def is_number(kind: Any) -> bool:
        return bool(types.is_integer(kind) or types.is_floating(kind))

    accepted = {
        "key": (is_key, "text or whole numbers"),
        "weight": (is_number, "numbers"),
        "caption": (is_text, "text"),
        "label": (types.is_integer, "whole numbers"),
    }
    for name, (accepts, what) in accepted.items():
        if name in kinds and not accepts(kinds[name]):
            raise UserError(
                f"data.keep={file!r}: the column `{name}` is of type {kinds[name]}, not {what}:"
                " write it again"
            )


def _read(files: Sequence[str]) -> dict[str, Any]:
    """Reads the columns of a keep-list: `hash` of the keys; weight, label and caption if present,
    checked; `first`, a key for messages."""
    arrow = arrow_library()
    parts: dict[str, list[Any]] = {"hash": [], "weight": [], "label": [], "caption": []}
    first, count = "", 0
    for file in files:
        for batch in _batches(file, one_of_many=len(files) > 1):
            keys = batch.column("key").to_pylist()
            if None in keys:
                raise UserError(
                    f"data.keep={file!r}: a row has no `key` (row {count + keys.index(None):,}):"
                    " leave it out"
                )
            first = first or (_text(keys[0]) if keys else "")
            hashes = (base.key_hash(_text(key)) for key in keys)
            parts["hash"].append(np.fromiter(hashes, np.uint64, len(keys)))
            count += len(keys)
            if "weight" in batch.schema.names:
                column = batch.column("weight").cast(arrow.float64())
                weights = column.to_numpy(zero_copy_only=False)
                parts["weight"].append(weights)
                if (bad := ~((weights >= 0) & (weights <= WEIGHT_LIMIT))).any():
                    row = int(bad.argmax())
                    raise UserError(
                        f"data.keep={file!r}: the weight of {shorten(str(keys[row]))} is"
                        f" {weights[row]:g}, not a number from 0 to {WEIGHT_LIMIT:,.0f}: repair it"
                    )
            if "label" in batch.schema.names:
                labels = batch.column("label").cast(arrow.int64()).fill_null(_OWN).to_numpy()
                if (bad := (labels < _OWN) | (labels > 1_000_000)).any():
                    row = int(bad.argmax())
                    raise UserError(
                        f"data.keep={file!r}: the label of {shorten(str(keys[row]))} is"
                        f" {labels[row]}, not the number of a category: -1 is unknown, null keeps"
                        " the label of the source"
                    )
                parts["label"].append(labels.astype(np.int32))
            if "caption" in batch.schema.names:
                parts["caption"].append(batch.column("caption").cast(arrow.large_binary()))
    lengths = {name: sum(map(len, parts[name])) for name in parts}
    if mixed := [name for name, length in lengths.items() if length not in (0, count)]:
        raise UserError(
            f"data.keep: the column `{mixed[0]}` is in some files of {os.path.dirname(files[0])!r}"
            " and not in others: write them alike"
        )
    arrays: dict[str, Any] = {
        name: np.concatenate(parts[name])
        for name in ("hash", "weight", "label")
        if lengths[name] or name == "hash" and parts[name]
    }
    if lengths["caption"]:
        arrays["caption"] = arrow.chunked_array(parts["caption"])
    return {"hash": np.zeros(0, np.uint64), "first": first, "files": files, **arrays}


def _text(key: str | bytes | int) -> str:
    return key.decode("utf-8", "surrogateescape") if isinstance(key, bytes) else str(key)


def _key_at(files: Sequence[str], row: int) -> str:
    for file in files:
        for batch in _batches(file):
            if row < len(batch):
                return _text(batch.column("key")[row].as_py())
            row -= len(batch)
    return ""


def _match(source: DataSource, path: str, keep: dict[str, Any]) -> dict[str, np.ndarray]:
    """Finds the rows of a keep-list in a source; returns the arrays of `KeptSource`."""
    order = np.argsort(keep["hash"], kind="stable")
    ordered = keep["hash"][order]
    if (twice := np.flatnonzero(ordered[1:] == ordered[:-1])).size:
        rows = sorted(order[twice[0] : twice[0] + 2].tolist())
        raise UserError(
            f"data.keep={path!r} has the key {shorten(_key_at(keep['files'], rows[0]))} twice, in"
            f" rows {rows[0]:,} and {rows[1]:,}; {twice.size:,} rows repeat a key: give each key"
            " once, and `weight` for more"
        )
    hashes = base.source_key_hashes(source)
    place = np.searchsorted(ordered, hashes)
    place[place == len(ordered)] = 0
    found = ordered[place] == hashes if len(ordered) else np.zeros(len(hashes), bool)
    rows = order[place[found]]
    named = np.zeros(len(order), bool)
    named[rows] = True
    indices, weight = np.flatnonzero(found), keep.get("weight")
    if weight is not None:
        wanted = weight[rows] > 0
        indices, rows = indices[wanted], rows[wanted]
    if not len(indices):
        why = "all its weights there are 0" if found.any() else "none of its keys is there"
        example = base.source_key(source, 0) if len(source) else ""
        raise UserError(
            f"data.keep={path!r} keeps nothing of {source.name}: {why}; its keys are such as"
            f" {shorten(keep['first'])}, those of the source such as {shorten(example)}"
        )
    # as in `split_by_hash`: half the memory of large sources
    dtype = np.uint32 if len(source) < 1 << 32 else np.int64
    arrays: dict[str, np.ndarray] = {"indices": indices.astype(dtype)}
    if weight is not None and (weight[rows] != 1).any():
        arrays["weight"] = weight[rows].astype(np.float64)
    if "label" in keep and (keep["label"][rows] != _OWN).any():
        arrays["label"] = keep["label"][rows]
    if "caption" in keep:
        arrays |= _caption_arrays(keep["caption"], rows)
    digest = base.stable_digest(*(text for k in arrays for text in (k, arrays[k].tobytes())))
    return {
        **arrays,
        "digest": np.frombuffer(digest.encode(), np.uint8),
        "missing": np.array(len(named) - int(named.sum())),
        "listed": np.array(len(named)),
    }


def write_keep_list(
    path: str, keys: Sequence[str], /, **columns: np.ndarray | Sequence[Any]
) -> None:
    """Writes a Parquet file of keys and other columns of the same length. Keys that are no UTF-8
    are written as bytes.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_keep_list(f"{folder}/keep.parquet", ["a", "b"], weight=[1.0, 2.0])
    ...     print(os.listdir(folder))
    ['keep.parquet']
    """
    arrow = arrow_library()
    try:
        column = arrow.array(list(keys), arrow.string())
    except UnicodeEncodeError:
        raw = [key.encode("utf-8", "surrogateescape") for key in keys]
        column = arrow.array(raw, arrow.binary())
    table = arrow.table({"key": column, **columns})
    part = f"{path}.{os.urandom(8).hex()}.part"
    try:
        arrow.parquet.write_table(table, part, compression="zstd")
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.unlink(part)


def _caption_arrays(column: Any, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the captions of some rows as their bytes one after the other, up to the length that
    is used."""
    arrow = arrow_library()
    chosen = column.take(arrow.array(rows))
    cut = arrow.compute.binary_slice(chosen, 0, decode.CAPTION_LIMIT + 1)
    lengths = arrow.compute.binary_length(cut).fill_null(0).to_numpy()
    captioned = arrow.compute.is_valid(cut).to_numpy()
    texts = b"".join(text or b"" for text in cut.to_pylist())
    if not captioned.any():
        return {}
    return {
        "captioned": np.asarray(captioned, bool),
        "caption_end": np.cumsum(lengths).astype(np.int64),
        "captions": np.frombuffer(texts, np.uint8),
    }
