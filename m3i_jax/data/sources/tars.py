"""Reads images in tar files of img2dataset or WebDataset in place, without unpacking.

An index of the members is built once (`tar_index`) and mapped into memory from then on; an image is
then one `pread`. Tar files in a bucket (gs://, s3://, ...) are read through fsspec, by ranges,
concurrently for a batch; an image and its caption are one request."""

import collections
import glob
import itertools
import json
import operator
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from m3i_jax.data import decode
from m3i_jax.data.sources import base, remote, tar_index
from m3i_jax.data.sources.base import EXTENSIONS, Record
from m3i_jax.data.sources.captions import first_and_others
from m3i_jax.data.sources.registry import SourceKind, register_source
from m3i_jax.data.sources.tar_headers import COMPRESSED, compressed_by
from m3i_jax.data.sources.tar_index import JSON_LIMIT, NO_CAPTION, TEXT
from m3i_jax.errors import UserError

_GAP = 2048  # bytes between an image and its caption: padding, and headers of the member


class TarSource:
    """The images of all tar files that match a glob, in the order of file names and then of
    members.

    Members with the same stem form a record: `KEY.jpg`, `KEY.txt` (caption), `KEY.json` (`caption`
    or `captions`, a text or a list, if no text says anything; `label` if a whole number), `KEY.cls`
    (label). The key of a record is the stem, up to the last dot (WebDataset's ends at the first),
    so equal keys of two tar files are in the same part of a split. Classes have no names;
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

    extents = base.whole_files

    def __init__(self, path: str, *, cache: str = "") -> None:
        self.name = f"tars {path!r}"
        self._builder = builder = index_builder(path, cache=cache)
        self.files = builder.files
        self._set_index(builder.load() or builder.build())
        links = _links(self.files, builder.states)
        self.linked = int(np.isin(self._index["shard"], links).sum()) if links else 0
        if not len(self):
            kinds = ", ".join(e[1:] for e in EXTENSIONS)
            files = (
                "the tar file that matches"
                if len(self.files) == 1
                else f"the {len(self.files):,} tar files that match"
            )
            packed = any(self.ignored[compressed_by(kind)] for kind in COMPRESSED)
            raise UserError(
                f"{files} data.path={path!r} holds no image"
                f" ({kinds}){base.format_counts(self.ignored)}"
                + ("; decompress them first" if packed else "")
            )

    def _set_index(self, index: dict[str, np.ndarray]) -> None:
        self._index = index
        self.ignored = collections.Counter(json.loads(bytes(index["ignored"])))
        self.captions = bool((index["caption_kind"] != NO_CAPTION).any())
        highest = int(index["label"].max(initial=-1))
        self.classes = tuple(str(i) for i in range(highest + 1))

    def __getstate__(self) -> dict[str, Any]:
        # A worker process loads the index from its file if there is one; pickling it would need
        # twice the memory.
        state = self.__dict__.copy()
        if self._builder.path and os.path.exists(self._builder.path):
            del state["_index"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "_index" not in state:
            self._index = self._builder.load(verify=False) or self._builder.build()

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
        captioned = [i for i in ordered if x["caption_kind"][i] != NO_CAPTION]
        contents = _read_ranges([*ranges, *(self._caption_range(i) for i in captioned)])
        captions = dict(zip(captioned, contents[len(ranges) :], strict=True))
        records = {}
        for i, image in zip(ordered, contents, strict=False):
            texts = self._parse_captions(i, captions[i]) if i in captions else ()
            caption, others = first_and_others(texts)
            label = int(x["label"][i])
            records[i] = Record(self.key(i), image, label, caption, other_captions=others)
        return [records[i] for i in indices]

    def key(self, index: int) -> str:
        ends = self._index["key_end"]
        raw = self._index["keys"][ends[index - 1] if index else 0 : ends[index]]
        return bytes(raw).decode("utf-8", "surrogateescape")

    def caption(self, index: int) -> str | bytes | None:
        """Reads a caption without its image, up to the length that is used."""
        return next(iter(self.caption_list(index)), None)

    def caption_list(self, index: int) -> tuple[str | bytes, ...]:
        if self._index["caption_kind"][index] == NO_CAPTION:
            return ()
        return self._parse_captions(index, _read_ranges([self._caption_range(index)])[0])

    def _caption_range(self, index: int) -> tuple[str, int, int]:
        x = self._index
        limit = decode.CAPTION_LIMIT + 1 if x["caption_kind"][index] == TEXT else JSON_LIMIT
        return (
            self.files[x["shard"][index]],
            int(x["caption_offset"][index]),
            min(int(x["caption_size"][index]), limit),
        )

    def _parse_captions(self, index: int, raw: bytes) -> tuple[str | bytes, ...]:
        if self._index["caption_kind"][index] == TEXT:
            return (raw,)
        return tar_index.json_captions(tar_index.parse_json(raw) or {})

    def key_hashes(self) -> np.ndarray:
        return self._index["key_hash"]

    def fingerprint(self) -> str:
        return bytes(self._index["fingerprint"]).decode()

    def description(self) -> str:
        share = (
            f", captions for {(self._index['caption_kind'] != NO_CAPTION).mean():.0%}"
            if self.captions
            else ""
        )
        classes = f", {len(self.classes):,} classes" if self.classes else ""
        files = f"{len(self.files):,} tar file{'s' * (len(self.files) > 1)}"
        return (
            f"{len(self):,} images in {files} of {self.name}{classes}{share}"
            f"{base.format_links(self.linked)}{base.format_counts(self.ignored)}"
        )


def _read_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    if ranges and remote.is_remote(ranges[0][0]):
        return remote.read_ranges(ranges)
    return base.read_joined(ranges, _GAP, _read_requests)


def _read_requests(requests: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Reads (path, start, end), sorted; opens each file once, which is a request of a network
    disk."""
    contents: list[bytes] = []
    for path, of_file in itertools.groupby(requests, key=operator.itemgetter(0)):
        contents += base.read_byte_ranges(path, [(start, end - start) for _, start, end in of_file])
    return contents


def _links(files: Sequence[str], states: np.ndarray) -> list[int]:
    """Returns the numbers of local files that are links to another one, or links to the same."""
    if remote.is_remote(files[0]):
        return []
    _, inverse, counts = np.unique(states, axis=0, return_inverse=True, return_counts=True)
    # a link has the size and the time of its target, so that few paths are resolved
    alike = np.flatnonzero(counts[inverse.ravel()] > 1).tolist()
    own = {number: os.path.realpath(files[number]) for number in alike}
    # of links to one file that is not matched itself, all but one
    first: dict[str, int] = {}
    for number in sorted(alike, key=lambda number: os.path.islink(files[number])):
        first.setdefault(own[number], number)
    return [number for number in alike if first[own[number]] != number]


def index_builder(path: str, *, cache: str = "") -> tar_index.IndexBuilder:
    """Returns what builds or loads the index of the tar files that match a glob.

    Args:
        path: glob of tar files, or their directory; local or a URL of fsspec.
        cache: directory of the index; "" for none.

    Raises:
        UserError: no tar file matches.
    """
    known = _match(path)
    files = list(known)
    names = [file if remote.is_remote(file) else os.path.realpath(file) for file in files]
    states = tar_index.signature(files, known)
    # Hosts that have the files on disks of their own may share the directory: copies under one path
    # have other times, so each has its own index.
    digest = base.stable_digest(*names, states.tobytes())
    saved = os.path.join(cache, f"tar_index_{digest}.npz") if cache else ""
    return tar_index.IndexBuilder(files, states, saved)


def _match(path: str) -> dict[str, remote.State | None]:
    """Returns the tar files that match a glob, sorted, with their states where known; raises an
    error that names the files that are there instead."""
    if remote.is_remote(path):
        urls = remote.glob_urls(path)
        if urls := {url: urls[url] for url in urls if url.lower().endswith(".tar")}:
            return urls
        raise UserError(
            f"no tar file matches data.path={path!r}: give a glob such as 'gs://BUCKET/DIR/*.tar',"
            " and check the access"
        )
    pattern = os.path.expanduser(path)
    pattern = os.path.join(pattern, "*.tar") if os.path.isdir(pattern) else pattern
    paths = sorted(glob.glob(pattern, recursive=True))
    files = [path for path in paths if path.lower().endswith(".tar") and base.is_file(path)]
    if files:
        return dict.fromkeys(files)
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
        count = f"{len(packed):,} compressed tar file{'s' * (len(packed) > 1)}"
        hint = f"{folder!r} holds {count}, and these cannot be read in place: decompress them first"
    else:
        hint = f"{folder!r} holds no .tar file"
    raise UserError(f"no tar file matches data.path={path!r}: {hint}")


register_source(
    SourceKind(
        name="tars",
        open=lambda path, split, data, cache: TarSource(base.split_path(path, split), cache=cache),
        path="the tar files, such as 'DIR/*.tar'",
        reads=("class_names",),
    )
)
