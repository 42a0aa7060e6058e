"""Builds the index of the members of tar files once, from their headers and the small JSON and
label members, in parts that several processes or hosts may write, and keeps it on disk.

Only regular members with a known extension are listed. Links, devices, absolute names and names
with `..` are skipped and counted, and so is a pickle, as a member of an unknown extension. Of a
damaged or truncated file the valid members are listed. A part is a pure function of PART tar files;
a complete one is renamed into place, so a build that was stopped goes on, and the index has the
same bytes whoever wrote the parts."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from m3i_jax import progress
from m3i_jax.data.sources import base, mapped_arrays, remote, tar_headers
from m3i_jax.data.sources.base import EXTENSIONS, FILE_LIMIT
from m3i_jax.data.sources.captions import caption_texts
from m3i_jax.errors import UserError

VERSION = 5  # of the index; an index of another version is rebuilt
PART = 64  # tar files of a part
JSON_LIMIT = 1 << 20
UNREADABLE_JSON = "JSON that cannot be read"  # a kind of ignored members
_BLANK = 512  # bytes of a text that may be all white space
NO_CAPTION, TEXT, JSON = 0, 1, 2  # where the caption of an image is stored
# Threads that read headers: of files in a bucket, each request waits; more than 8 of them are
# faster than one core parses.
_THREADS = 8
_DTYPES = {
    "shard": np.int32,
    "offset": np.int64,
    "size": np.uint32,
    "label": np.int32,
    "caption_offset": np.int64,
    "caption_size": np.uint32,
    "keys": np.uint8,  # the bytes of all keys
    "key_end": np.int64,
    "caption_kind": np.uint8,
    "key_hash": np.uint64,
}
_IDENTITY = ("shard", "offset", "size", "label", "caption_offset", "caption_size", "keys")
Arrays = dict[str, np.ndarray]
Reader = Callable[[str], np.ndarray]  # name of a column -> that column of a part
_log = logging.getLogger(__name__)


def signature(files: Sequence[str], known: Mapping[str, remote.State | None]) -> np.ndarray:
    """Returns two numbers per file that change when the file changes, int64 [F, 2]."""
    if files and remote.is_remote(files[0]):
        states = [
            (size, base.key_hash(stamp) >> 1) for size, stamp in remote.file_states(files, known)
        ]
    else:
        states = [(state.st_size, state.st_mtime_ns) for state in map(os.stat, files)]
    return np.array(states, np.int64)


@dataclasses.dataclass(frozen=True)
class IndexBuilder:
    """Builds or loads the index of some tar files. Picklable; called with the number of a part, it
    writes that part and returns the number of its records.

    Attributes:
        files: paths or URLs, sorted.
        states: see `signature`.
        path: file of the index, whose name tells files and states apart; "" to keep it in memory.
    """

    files: Sequence[str]
    states: np.ndarray
    path: str = ""

    def parts(self) -> int:
        """Returns the number of parts."""
        return -(-len(self.files) // PART)

    def missing(self) -> list[int]:
        """Returns the parts that are not written yet."""
        return [part for part in range(self.parts()) if not self._is_written(part)]

    def load(self, *, verify: bool = True) -> Arrays | None:
        """Maps a saved index if it is complete, of this version, and of files with the same sizes
        and times.

        Args:
            verify: compare the checksums, which reads the file once.
        """
        if not self.path or not os.path.exists(self.path):
            return None
        index = mapped_arrays.map_arrays(self.path, verify=verify)
        if index is None:
            _log.warning("the tar index %r is damaged and is rebuilt", self.path)
            return None
        return index if _matches(index, self.states) else None

    def __call__(self, part: int) -> int:
        arrays = self._scan_part(part, lambda: None)
        base.save_arrays(self._part_path(part), **arrays)
        return len(arrays["shard"])

    def build(self) -> Arrays:
        """Builds the index from the parts that are there and those that are missing, in this
        process, and saves it if there is a path. A directory that cannot be written is a
        warning."""
        spills = bool(self.path) and self.parts() > 1
        files = iter(
            progress.track_progress(self.files, "indexing tar files", len(self.files), "files")
        )
        readers: list[Reader] = []
        for part in range(self.parts()):
            if spills and self._is_written(part):
                readers.append(self._part_reader(part))
                continue
            arrays = self._scan_part(part, lambda: next(files, None))
            if len(self.files) > PART:
                _log.info("indexing tar files: %d of %d", (part + 1) * PART, len(self.files))
            spills = spills and self._try_to_save(self._part_path(part), **arrays)
            readers.append(self._part_reader(part) if spills else arrays.__getitem__)
        next(files, None)
        if self.path:
            with self._warn_unsaved():
                self._write(readers)
            if (index := self.load(verify=False)) is not None:
                self._remove_parts()
                return index
        return {
            column.name: np.concatenate([np.zeros(0, column.dtype), *column.blocks])
            for column in self._merged(readers)
        }

    def finish(self) -> bool:
        """Writes the index from its parts. Returns whether it is complete: False while parts are
        missing."""
        if self.load(verify=False) is not None:
            return True
        if self.missing():  # or another host wrote the index meanwhile and removed its parts
            return self.load(verify=False) is not None
        try:
            self._write([self._part_reader(part) for part in range(self.parts())])
            self._remove_parts()
        except OSError as error:  # another host wrote the index and removed its parts
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            return self.load(verify=False) is not None
        return True

    def _write(self, readers: Sequence[Reader]) -> None:
        mapped_arrays.write_columns(self.path, self._merged(readers))

    def _remove_parts(self) -> None:
        shutil.rmtree(f"{self.path}.parts", ignore_errors=True)

    def _merged(self, readers: Sequence[Reader]) -> Iterator[mapped_arrays.Column]:
        """Yields the columns of the index, whose blocks are consumed in order: one part of one
        column is in memory at a time."""
        names = [os.path.basename(file).encode("utf-8", "surrogateescape") for file in self.files]
        digest = hashlib.blake2b(digest_size=8)  # equal to `base.stable_digest` of all
        for raw in names:
            digest.update(len(raw).to_bytes(8, "little") + raw)
        lengths = [read("lengths") for read in readers]
        records, keys = (sum(int(each[column]) for each in lengths) for column in (0, 1))
        for name, dtype in _DTYPES.items():
            count = keys if name == "keys" else records
            hashed = digest if name in _IDENTITY else None
            if hashed:
                hashed.update((count * np.dtype(dtype).itemsize).to_bytes(8, "little"))
            yield mapped_arrays.Column(name, dtype, count, _blocks(readers, name, hashed, lengths))
        ignored = collections.Counter[str]()
        for read in readers:
            ignored.update(json.loads(bytes(read("ignored"))))
        for name, text in (("ignored", json.dumps(ignored)), ("fingerprint", digest.hexdigest())):
            array = np.frombuffer(text.encode(), np.uint8)
            yield mapped_arrays.Column(name, np.uint8, len(array), iter([array]))
        for name, array in (("version", np.array([VERSION])), ("signature", self.states.ravel())):
            yield mapped_arrays.Column(name, np.int64, len(array), iter([array]))

    def _scan_part(self, part: int, count: Callable[[], Any]) -> Arrays:
        rows = range(part * PART, min((part + 1) * PART, len(self.files)))
        scanned: list[Arrays] = []
        ignored = collections.Counter[str]()
        pool = concurrent.futures.ThreadPoolExecutor(min(_THREADS, len(rows)))
        try:
            for arrays, problems in pool.map(_scan, rows, [self.files[row] for row in rows]):
                scanned.append(arrays)
                ignored.update(problems)
                count()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        columns = {name: np.concatenate([each[name] for each in scanned]) for name in _DTYPES}
        columns["key_end"] = columns["key_end"].cumsum()
        return {
            **columns,
            "lengths": np.array([len(columns["shard"]), len(columns["keys"])]),
            "ignored": np.frombuffer(json.dumps(ignored).encode(), np.uint8),
            "version": np.array([VERSION]),
            "signature": self.states[rows.start : rows.stop].ravel(),
        }

    def _part_path(self, part: int) -> str:
        return os.path.join(f"{self.path}.parts", f"{part:05d}.npz")

    def _is_written(self, part: int) -> bool:
        arrays = mapped_arrays.map_arrays(self._part_path(part), verify=False)
        return _matches(arrays, self.states[part * PART : (part + 1) * PART])

    def _part_reader(self, part: int) -> Reader:
        path = self._part_path(part)
        return lambda name: _read_column(path, name)

    def _try_to_save(self, path: str, **arrays: np.ndarray) -> bool:
        with self._warn_unsaved():
            base.save_arrays(path, **arrays)
            return True
        return False

    @contextlib.contextmanager
    def _warn_unsaved(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            _log.warning(
                "the tar index cannot be saved to %r (%s); it will be rebuilt at the next start",
                self.path,
                error.strerror,
            )


def _matches(index: Arrays | None, states: np.ndarray) -> bool:
    return (
        index is not None
        and int(np.ravel(index.get("version", -1))[0]) == VERSION
        and np.array_equal(np.ravel(index.get("signature", np.zeros(0))), states.ravel())
    )


def _read_column(path: str, name: str) -> np.ndarray:
    """Reads a column of a part and compares its checksum."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
            file.read(1)  # zipfile compares the checksum at the end
            return array
    except (zipfile.BadZipFile, ValueError) as error:
        raise UserError(
            f"{path!r} is damaged ({error}): remove it and run the same command again"
        ) from error


def _blocks(
    readers: Sequence[Reader], name: str, digest: Any, lengths: Sequence[np.ndarray]
) -> Iterator[np.ndarray]:
    """Yields a column part by part; `key_end` counts on from the parts before."""
    before = 0
    for read, (_, keys) in zip(readers, lengths, strict=True):
        block = read(name)
        if name == "key_end":
            block, before = block + before, before + int(keys)
        if digest:
            digest.update(np.ascontiguousarray(block).view(np.uint8).data)
        yield block


def parse_json(raw: bytes) -> dict[str, Any] | None:
    """Parses a JSON object; None for anything else.

    >>> parse_json(b'{"label": 1}'), parse_json(b"[")
    ({'label': 1}, None)
    """
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def json_captions(value: dict[str, Any]) -> tuple[str | bytes, ...]:
    """Returns the texts of `caption` or `captions` in a JSON object, each a text or a list.

    >>> json_captions({"caption": "a cat"}), json_captions({"captions": ["a cat", " ", "one cat"]})
    (('a cat',), ('a cat', 'one cat'))
    """
    texts = caption_texts(value.get("caption")) or caption_texts(value.get("captions"))
    return tuple(text for text in texts if text.strip())


def _scan(number: int, path: str) -> tuple[Arrays, collections.Counter[str]]:
    """Returns the columns of one tar file, in the order in which the stems appear (`key_end`: the
    lengths of the keys), and what is ignored."""
    groups, problems = _members(path)
    images = [
        (key.encode("utf-8", "surrogateescape"), group)
        for key, group in groups.items()
        if "size" in group
    ]
    columns: dict[str, Any] = {name: [] for name in _DTYPES}
    for key, group in images:
        defaults = {"shard": number, "label": -1, "key_end": len(key)}
        defaults["key_hash"] = base.key_hash(key.decode("utf-8", "surrogateescape"))
        for name, column in columns.items():
            column.append(group.get(name, defaults.get(name, 0)))
    arrays = {name: np.array(columns[name], dtype) for name, dtype in _DTYPES.items()}
    arrays["keys"] = np.frombuffer(b"".join(key for key, _ in images), np.uint8)
    return arrays, problems


def _add_text(group: dict[str, Any], file: BinaryIO, offset: int, size: int) -> None:
    """Adds a text to a sample. It has priority over the JSON, in any order of members, unless it is
    blank."""
    group["blank"] = size <= _BLANK and not tar_headers.read_at(file, offset, size).strip()
    if not group["blank"] or "caption_kind" not in group:
        group.update(caption_kind=TEXT, caption_offset=offset, caption_size=size)


def _members(path: str) -> tuple[dict[str, dict[str, Any]], collections.Counter[str]]:
    """Returns the members of one tar file by stem, in the order in which the stems appear, and what
    is ignored."""
    groups: dict[str, dict[str, Any]] = {}
    problems = collections.Counter[str]()
    # A second member of the same name begins another sample of its key, and later ones are of that:
    # the first image is paired with no caption or label among them.
    seen, repeated = set[str](), set[str]()
    with remote.open_file(path) if remote.is_remote(path) else open(path, "rb") as file:
        for name, offset, size in tar_headers.tar_members(file, problems):
            stem, extension = os.path.splitext(name)
            extension = extension.lower()
            if any(
                part.startswith(".") and part != "." or part == "__MACOSX"
                for part in name.split("/")
            ):
                problems["hidden"] += 1
                continue
            if again := stem + extension in seen:
                repeated.add(stem)
            seen.add(stem + extension)
            if extension in EXTENSIONS:
                group = groups.setdefault(stem, {})
                if "size" in group or again:
                    problems["images with the key of an earlier one"] += 1
                elif size > FILE_LIMIT:
                    problems["files over 256 MiB"] += 1
                else:
                    group.update(offset=offset, size=size)
            elif stem in repeated and extension in (".txt", ".json", ".cls"):
                problems["captions or labels with the key of an earlier one"] += 1
            elif extension == ".txt":
                if 0 < size < FILE_LIMIT:
                    _add_text(groups.setdefault(stem, {}), file, offset, size)
            elif extension in (".json", ".cls"):
                if size > JSON_LIMIT:
                    problems["JSON over 1 MiB"] += 1
                    continue
                raw = tar_headers.read_at(file, offset, size)
                value = (
                    parse_json(raw)
                    if extension == ".json"
                    else {"label": int(raw) if raw.strip().isdigit() and size < 20 else raw}
                )
                group = groups.setdefault(stem, {})
                if value is None:
                    problems[UNREADABLE_JSON] += 1
                    continue
                if value.get("label") is not None:
                    label = base.parse_label(value["label"])
                    problems["labels that are not a category"] += label is None
                    if label is not None:
                        group["label"] = label
                if json_captions(value) and (group.get("caption_kind") != TEXT or group["blank"]):
                    group.update(caption_kind=JSON, caption_offset=offset, caption_size=size)
            else:
                problems["other members"] += 1
    for problem in (*tar_headers.DAMAGE, *tar_headers.HOSTILE):
        if problems[problem]:
            _log.warning("%r: %d %s; the valid members are used", path, problems[problem], problem)
    for kind in tar_headers.COMPRESSED:
        if problems[tar_headers.compressed_by(kind)]:
            _log.warning("%r is compressed by %s: none of its members is used", path, kind)
    problems["captions or labels without an image"] += sum(
        "size" not in group for group in groups.values()
    )
    return groups, problems
