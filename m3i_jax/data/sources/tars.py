"""Reads images in tar files of img2dataset or WebDataset in place, without unpacking.

An index of the members is built once from the headers and the small JSON and label members, on
several threads, and mapped into memory from then on; an image is then one `pread`. Only regular
members with a known extension are read. Links, devices, absolute names and names with `..` are
skipped and counted, and so is a pickle, as a member of an unknown extension. Of a damaged or
truncated file the valid members are used. Tar files in a bucket (gs://, s3://, ...) are read
through fsspec: the headers once, then ranges, concurrently for a batch."""

import collections
import concurrent.futures
import glob
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from m3i_jax import progress
from m3i_jax.data import decode
from m3i_jax.data.sources import base, mapped_arrays, remote, tar_headers
from m3i_jax.data.sources.base import EXTENSIONS, FILE_LIMIT, Record
from m3i_jax.data.sources.registry import SourceKind, register_source
from m3i_jax.errors import UserError

VERSION = 3  # of the index; an index of another version is rebuilt
JSON_LIMIT = 1 << 20
_THREADS = 16  # that read headers: of files in a bucket, each request waits
_NONE, _TEXT, _JSON = 0, 1, 2  # where the caption of an image is stored
_log = logging.getLogger(__name__)


class TarSource:
    """The images of all tar files that match a glob, in the order of file names and then of
    members.

    Members with the same stem form a record: `KEY.jpg`, `KEY.txt` (caption), `KEY.json` (`caption`
    if there is no text, `label` if a whole number), `KEY.cls` (label). The key of a record is the
    stem, so equal keys of two tar files are in the same part of a split. Classes have no names;
    they are "0", "1", ... up to the highest label.

    Args:
        path: glob of tar files, or their directory; local or a URL of fsspec.
        cache: directory of the index; "" to build it at every start.

    Raises:
        UserError: no tar file matches, or none of them holds an image.

    >>> import io, tarfile, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with tarfile.open(f"{folder}/00000.tar", "w") as tar:
    ...         annotation = b'{"caption": "a cat", "label": 1}'
    ...         for name, content in (("7.jpg", b"..."), ("7.json", annotation)):
    ...             member = tarfile.TarInfo(name)
    ...             member.size = len(content)
    ...             tar.addfile(member, io.BytesIO(content))
    ...     source = TarSource(f"{folder}/*.tar")
    ...     print(source.classes, source[0])
    ('0', '1') Record(key='7', image=b'...', label=1, caption='a cat')
    """

    def __init__(self, path: str, *, cache: str = "") -> None:
        self.files = _match(path)
        self.name = f"tars {path!r}"
        self._signature = np.array([_file_state(file) for file in self.files], np.int64)
        names = [file if remote.is_remote(file) else os.path.realpath(file) for file in self.files]
        self._cache_path = (
            os.path.join(cache, f"tar_index_{base.stable_digest(*names)}.npz") if cache else ""
        )
        index = _load(self._cache_path, self._signature)
        if index is None:
            index = _build(self.files)
            if self._cache_path and _save(self._cache_path, self._signature, index):
                index = _load(self._cache_path, self._signature, verify=False) or index
        self._set_index(index)
        if not len(self):
            kinds = ", ".join(e[1:] for e in EXTENSIONS)
            files = (
                "the tar file that matches"
                if len(self.files) == 1
                else f"the {len(self.files):,} tar files that match"
            )
            raise UserError(
                f"{files} data.path={path!r} holds no image"
                f" ({kinds}){base.format_counts(self.ignored)}"
            )

    def _set_index(self, index: dict[str, np.ndarray]) -> None:
        self._index = index
        self.ignored = collections.Counter(json.loads(bytes(index["ignored"])))
        self.captions = bool((index["caption_kind"] != _NONE).any())
        highest = int(index["label"].max(initial=-1))
        self.classes = tuple(str(i) for i in range(highest + 1))

    def __getstate__(self) -> dict[str, Any]:
        # A worker process loads the index from its file if there is one; pickling it would need
        # twice the memory.
        state = self.__dict__.copy()
        if self._cache_path and os.path.exists(self._cache_path):
            del state["_index"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "_index" not in state:
            index = _load(self._cache_path, self._signature, verify=False)
            self._index = _build(self.files) if index is None else index

    def __len__(self) -> int:
        return len(self._index["shard"])

    def __getitem__(self, index: int) -> Record:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        x = self._index
        # read in the order of the files, returned in the order of `indices`
        ordered = sorted(set(indices), key=lambda i: (x["shard"][i], x["offset"][i]))
        ranges = [
            (self.files[x["shard"][i]], int(x["offset"][i]), int(x["size"][i])) for i in ordered
        ]
        captioned = [i for i in ordered if x["caption_kind"][i] != _NONE]
        contents = _read_ranges([*ranges, *(self._caption_range(i) for i in captioned)])
        captions = dict(zip(captioned, contents[len(ranges) :], strict=True))
        records = {
            i: Record(
                self.key(i),
                image,
                int(x["label"][i]),
                self._parse_caption(i, captions[i]) if i in captions else None,
            )
            for i, image in zip(ordered, contents, strict=False)
        }
        return [records[i] for i in indices]

    def key(self, index: int) -> str:
        ends = self._index["key_end"]
        raw = self._index["keys"][ends[index - 1] if index else 0 : ends[index]]
        return bytes(raw).decode("utf-8", "surrogateescape")

    def caption(self, index: int) -> str | bytes | None:
        """Reads a caption without its image, up to the length that is used."""
        if self._index["caption_kind"][index] == _NONE:
            return None
        return self._parse_caption(index, _read_ranges([self._caption_range(index)])[0])

    def _caption_range(self, index: int) -> tuple[str, int, int]:
        x = self._index
        limit = decode.CAPTION_LIMIT + 1 if x["caption_kind"][index] == _TEXT else JSON_LIMIT
        return (
            self.files[x["shard"][index]],
            int(x["caption_offset"][index]),
            min(int(x["caption_size"][index]), limit),
        )

    def _parse_caption(self, index: int, raw: bytes) -> str | bytes | None:
        return (
            raw if self._index["caption_kind"][index] == _TEXT else _parse_json(raw).get("caption")
        )

    def key_hashes(self) -> np.ndarray:
        return self._index["key_hash"]

    def fingerprint(self) -> str:
        return bytes(self._index["fingerprint"]).decode()

    def description(self) -> str:
        share = (
            f", captions for {(self._index['caption_kind'] != _NONE).mean():.0%}"
            if self.captions
            else ""
        )
        classes = f", {len(self.classes):,} classes" if self.classes else ""
        files = f"{len(self.files):,} tar file{'s' * (len(self.files) > 1)}"
        return (
            f"{len(self):,} images in {files} of"
            f" {self.name}{classes}{share}{base.format_counts(self.ignored)}"
        )


def _file_state(file: str) -> tuple[int, int]:
    """Returns two numbers that change when the file changes."""
    if remote.is_remote(file):
        size, stamp = remote.file_state(file)
        return size, base.key_hash(stamp) >> 1
    state = os.stat(file)
    return state.st_size, state.st_mtime_ns


def _read_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    if ranges and remote.is_remote(ranges[0][0]):
        return remote.read_ranges(ranges)
    return [base.read_byte_range(*args) for args in ranges]


def _match(path: str) -> list[str]:
    """Returns the tar files that match a glob, sorted; raises an error that names the files that
    are there instead."""
    if remote.is_remote(path):
        if urls := [file for file in remote.glob_urls(path) if file.lower().endswith(".tar")]:
            return urls
        raise UserError(
            f"no tar file matches data.path={path!r}: give a glob such as 'gs://BUCKET/DIR/*.tar',"
            " and check the access"
        )
    pattern = os.path.expanduser(path)
    pattern = os.path.join(pattern, "*.tar") if os.path.isdir(pattern) else pattern
    paths = sorted(glob.glob(pattern, recursive=True))
    files = [path for path in paths if path.lower().endswith(".tar") and os.path.isfile(path)]
    if files:
        return files
    folder = os.path.dirname(pattern) or "."
    if glob.has_magic(folder):
        raise UserError(f"no tar file matches data.path={path!r}: give a glob such as 'DIR/*.tar'")
    if not os.path.isdir(folder):
        raise UserError(
            f"no tar file matches data.path={path!r}: {base.missing_path_error(folder)}"
        )
    names = sorted(os.listdir(folder))
    tars = [name for name in names if name.lower().endswith(".tar")]
    packed = [
        name
        for name in names
        if name.lower().endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz"))
    ]
    if tars:
        count = f"{len(tars):,} .tar file{'s' * (len(tars) > 1)}"
        every = os.path.join(folder, "*.tar")
        hint = f"{folder!r} holds {count}, the first is {tars[0]!r}: did you mean {every!r}?"
    elif packed:
        hint = (
            f"{folder!r} holds {len(packed):,} compressed ones, which cannot be read in place:"
            " decompress them first"
        )
    else:
        hint = f"{folder!r} holds no .tar file"
    raise UserError(f"no tar file matches data.path={path!r}: {hint}")


def _parse_json(raw: bytes) -> dict[str, Any]:
    """Parses a JSON object; {} for anything else."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


class _Columns:
    """Builds the index: a list of arrays per column, one array per tar file, so that a member takes
    few bytes."""

    DTYPES = {
        "shard": np.int32,
        "offset": np.int64,
        "size": np.uint32,
        "label": np.int32,
        "caption_kind": np.uint8,
        "caption_offset": np.int64,
        "caption_size": np.uint32,
        "key_hash": np.uint64,
    }

    def __init__(self) -> None:
        self.parts: dict[str, list[np.ndarray]] = {name: [] for name in self.DTYPES}
        self.keys, self.lengths = bytearray(), [np.zeros(0, np.int64)]

    def add(self, shard: int, groups: dict[str, dict[str, Any]]) -> None:
        images = [
            (key.encode("utf-8", "surrogateescape"), group)
            for key, group in groups.items()
            if "size" in group
        ]
        for key, group in groups.items():
            group["key_hash"] = base.key_hash(key)
        for name, dtype in self.DTYPES.items():
            default = -1 if name == "label" else shard if name == "shard" else 0
            self.parts[name].append(
                np.array([group.get(name, default) for _, group in images], dtype)
            )
        self.keys += b"".join(key for key, _ in images)
        self.lengths.append(np.array([len(key) for key, _ in images], np.int64))

    def arrays(self, ignored: dict[str, int], names: Sequence[str] = ()) -> dict[str, np.ndarray]:
        columns = {name: np.concatenate(parts) for name, parts in self.parts.items()}
        columns["keys"], columns["key_end"] = (
            np.frombuffer(bytes(self.keys), np.uint8),
            np.concatenate(self.lengths).cumsum(),
        )
        columns["ignored"] = np.frombuffer(json.dumps(ignored).encode(), np.uint8)
        columns["fingerprint"] = np.frombuffer(_fingerprint(names, columns).encode(), np.uint8)
        return columns


def _fingerprint(names: Sequence[str], columns: dict[str, np.ndarray]) -> str:
    """Returns `base.stable_digest` of names and columns, without copies of the columns."""
    digest = hashlib.blake2b(digest_size=8)
    for name in names:
        raw = name.encode("utf-8", "surrogateescape")
        digest.update(len(raw).to_bytes(8, "little") + raw)
    for column in (
        *("shard", "offset", "size", "label", "caption_offset", "caption_size"),
        "keys",
    ):
        array = np.ascontiguousarray(columns[column])
        digest.update(array.nbytes.to_bytes(8, "little"))
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest()


def _build(files: list[str]) -> dict[str, np.ndarray]:
    columns, ignored = _Columns(), collections.Counter[str]()
    with concurrent.futures.ThreadPoolExecutor(min(_THREADS, len(files))) as pool:
        scans = [pool.submit(_scan, file) for file in files[: 2 * _THREADS]]
        opened = progress.track_progress(files, "indexing tar files", len(files), "files")
        try:
            for number, _ in enumerate(opened):
                groups, problems = scans[number].result()
                scans[number] = None  # type: ignore[call-overload]
                if number + 2 * _THREADS < len(files):  # few are held at a time
                    scans.append(pool.submit(_scan, files[number + 2 * _THREADS]))
                columns.add(number, groups)
                ignored.update(problems)
                if len(files) > 20 and number % (len(files) // 10) == 0:
                    _log.info("indexing tar files: %d of %d", number + 1, len(files))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return columns.arrays(ignored, [os.path.basename(file) for file in files])


def _scan(path: str) -> tuple[dict[str, dict[str, Any]], collections.Counter[str]]:
    """Returns the members of one tar file by stem, in the order in which the stems appear, and what
    is ignored."""
    groups: dict[str, dict[str, Any]] = {}
    problems = collections.Counter[str]()
    with remote.open_file(path) if remote.is_remote(path) else open(path, "rb") as file:
        for name, offset, size in tar_headers.tar_members(file, problems):
            stem, extension = os.path.splitext(name)
            extension = extension.lower()
            if any(
                part.startswith(".") and part != "." or part == "__MACOSX"
                for part in name.split("/")
            ):
                problems["hidden"] += 1
            elif extension in EXTENSIONS:
                group = groups.setdefault(stem, {})
                if "size" in group:
                    problems["images with the key of an earlier one"] += 1
                elif size > FILE_LIMIT:
                    problems["files over 256 MiB"] += 1
                else:
                    group.update(offset=offset, size=size)
            elif extension == ".txt":
                if 0 < size < FILE_LIMIT:  # has priority over the JSON, in any order of members
                    groups.setdefault(stem, {}).update(
                        caption_kind=_TEXT, caption_offset=offset, caption_size=size
                    )
            elif extension in (".json", ".cls"):
                if size > JSON_LIMIT:
                    problems["JSON over 1 MiB"] += 1
                    continue
                file.seek(offset)
                raw = file.read(size)
                value = (
                    _parse_json(raw)
                    if extension == ".json"
                    else {"label": int(raw) if raw.strip().isdigit() and size < 20 else raw}
                )
                group = groups.setdefault(stem, {})
                if value.get("label") is not None:
                    label = base.parse_label(value["label"])
                    problems["labels that are no category"] += label is None
                    if label is not None:
                        group["label"] = label
                caption = value.get("caption")
                if (
                    isinstance(caption, str)
                    and caption.strip()
                    and group.get("caption_kind") != _TEXT
                ):
                    group.update(caption_kind=_JSON, caption_offset=offset, caption_size=size)
            else:
                problems["other members"] += 1
    for problem in (*tar_headers.DAMAGE, *tar_headers.HOSTILE):
        if problems[problem]:
            _log.warning("%r: %d %s; the valid members are used", path, problems[problem], problem)
    problems["captions or labels without an image"] += sum(
        "size" not in group for group in groups.values()
    )
    return groups, problems


def _load(path: str, signature: np.ndarray, *, verify: bool = True) -> dict[str, np.ndarray] | None:
    """Maps a saved index if it is complete, of this version, and of files with the same sizes and
    times."""
    if not path or not os.path.exists(path):
        return None
    index = mapped_arrays.map_arrays(path, verify=verify)
    if index is None:
        _log.warning("the tar index %r is damaged and is rebuilt", path)
        return None
    if int(index.pop("version", -1)) != VERSION or not np.array_equal(
        index.pop("signature", np.zeros(0)), signature
    ):
        return None
    return index


def _save(path: str, signature: np.ndarray, index: dict[str, np.ndarray]) -> bool:
    try:
        base.save_arrays(path, version=VERSION, signature=signature, **index)
        return True
    except OSError as error:
        _log.warning(
            "the tar index cannot be saved to %r (%s); it will be rebuilt at the next start",
            path,
            error.strerror,
        )
        return False


register_source(
    SourceKind(
        name="tars",
        open=lambda path, split, data, cache: TarSource(base.split_path(path, split), cache=cache),
        path="the tar files, such as 'DIR/*.tar'",
        reads=("class_names",),
    )
)
