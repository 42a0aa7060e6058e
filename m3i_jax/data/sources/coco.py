"""Reads images with annotated objects from a directory and a JSON file in COCO's form: COCO, LVIS,
Objects365, own files; with polygons, run lengths or boxes alone.

The file is parsed once; an index of it is kept beside those of other sources. Images are found by
listing the directory: file names of a JSON file often lack a folder (COCO), or have one too many
(Objects365)."""

import collections
import dataclasses
import json
import logging
import os
import re
import sys
import urllib.parse
from typing import Any

import numpy as np

from m3i_jax import schema
from m3i_jax.data.sources import base, coco_index, folder
from m3i_jax.data.sources.base import Record
from m3i_jax.data.sources.objects import Objects, ObjectTable
from m3i_jax.data.sources.registry import SourceKind, SplitFolders, register_source
from m3i_jax.data.sources.segmentations import Polygons, RunLengths, Segmentation
from m3i_jax.errors import UserError

SAMPLE = 256  # images by which the folder of all is found
_log = logging.getLogger(__name__)


class CocoSource:
    """The images of a file of annotations that are in a directory, in the order of the file. The
    key of a record is the file name in the annotations; its objects are in the order of the file.

    Args:
        path: directory of the images, or one above it.
        annotations: the JSON file.
        cache: directory of the index; "" to parse the file at every start.

    Attributes:
        classes: names of the categories, by ascending id.
        category_ids: int64 [K], ids of the classes in the file.
        frequencies: of each class, "r", "c" or "f"; "" if the file has none (LVIS has).
        image_counts: int64 [K], training images that show a class, as the file states them (LVIS),
            else counted.
        annotations: path of the JSON file.
        ignored, noted: counts of what was left out, and of what was odd and is used.

    Raises:
        UserError: see `coco_index.build_index`; or none of the images is in the directory, or
            several folders of it have files of these names.
    """

    captions = False

    def __init__(self, path: str, annotations: str, *, cache: str = "") -> None:
        self.path, self.annotations = os.path.expanduser(path), os.path.expanduser(annotations)
        if not os.path.isdir(self.path):
            raise UserError(
                f"data.path={path!r} is not a directory: {base.missing_path_error(self.path)}; give"
                " the directory that holds the images"
            )
        if not os.path.isfile(self.annotations):
            raise UserError(
                f"data.annotations={annotations!r} is not a file:"
                f" {base.missing_path_error(self.annotations)}; give the JSON file of annotations"
            )
        self.name = f"coco {os.path.basename(self.annotations)!r}"
        self.note = ""
        state = os.stat(self.annotations)
        self._signature = (state.st_size, state.st_mtime_ns)
        digest = base.stable_digest(os.path.realpath(self.annotations))
        self._cache_path = os.path.join(cache, f"coco_index_{digest}.npz") if cache else ""
        self._index = self._load() or self._build()
        texts = json.loads(bytes(self._index["texts"]))
        self.ignored = collections.Counter(texts["ignored"])
        self.noted = collections.Counter(texts["noted"])
        self._describe_categories(texts["categories"])
        self._find_images()

    def _describe_categories(self, categories: list[dict[str, Any]]) -> None:
        self.classes = tuple(category["name"] for category in categories)
        self.category_ids = np.array([category["id"] for category in categories], np.int64)
        self.frequencies = tuple(category.get("frequency", "") for category in categories)
        stated = [category.get("image_count", -1) for category in categories]
        counted = self._all_objects().records_per_class(len(categories))
        self.image_counts = counted if min(stated) < 0 else np.array(stated, np.int64)

    def _load(self) -> dict[str, np.ndarray] | None:
        index = base.load_arrays(self._cache_path) if self._cache_path else None
        if index is None or int(index.get("version", -1)) != coco_index.VERSION:
            return None
        return index if tuple(index["signature"].tolist()) == self._signature else None

    def _build(self) -> dict[str, np.ndarray]:
        _log.info("reading the annotations of %s", self.annotations)
        index = coco_index.build_index(self.annotations)
        index["signature"] = np.array(self._signature, np.int64)
        if self._cache_path:
            try:
                base.save_arrays(self._cache_path, **index)
            except OSError as error:
                _log.warning("the index of %s cannot be kept: %s", self.annotations, error)
        return index

    def _find_images(self) -> None:
        """Finds the files of the images in the directory, or else beside the annotations."""
        names = [self._name(i) for i in range(len(self._index["image_id"]))]
        beside = os.path.realpath(os.path.dirname(self.annotations))
        below = os.path.relpath(beside, os.path.realpath(self.path)).replace(os.sep, "/")
        counts: collections.Counter[str] = collections.Counter()
        listing = _sizes(self.path, counts)
        place = _find_place(names, listing, below, self)
        if place is None and below.startswith(".."):
            paths = {path for name in names for path in _paths(name)}
            others = {f: n for f, n in _sizes(beside, collections.Counter()).items() if f in paths}
            if place := _find_place(names, others, ".", self):
                _log.warning(
                    "%s: none of its images is in data.path=%r; those beside the file are read",
                    self.annotations,
                    self.path,
                )
                self.path, listing = beside, others
                counts.clear()
        self.ignored.update(counts)
        if place is None:
            links = ", not links" if counts[folder.OUTSIDE] else ""
            raise UserError(
                f"{self.annotations}: lists {len(names):,} images, such as {names[0]!r}, of which"
                f" none is in data.path={self.path!r} ({len(listing):,} files"
                f"{base.format_counts(self.ignored)}): give the directory that holds them{links}"
            )
        self._place = place
        files = [self._file(name) for name in names]
        present = np.array([file in listing for file in files])
        self._records = np.flatnonzero(present)
        self.ignored["images whose file is missing"] = int((~present).sum())
        sizes = [listing[files[i]] for i in self._records.tolist()]
        # a run on other files resumes with the index of another version
        version = 2 if any(self.noted[kind] for kind in coco_index.REPAIRED) else 1
        self._fingerprint = base.stable_digest(
            "coco", version, self._index["content"].tobytes(), present.tobytes(), *sizes
        )

    def _file(self, name: str) -> str:
        place = self._place
        parts = _paths(name)[name in place.addresses].split("/")
        return "/".join([*([place.prefix] if place.prefix else []), *parts[place.strip :]])

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
            self._index = self._load() or coco_index.build_index(self.annotations)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        number = int(self._records[index])
        name = self._name(number)
        image = base.read_byte_range(os.path.join(self.path, self._file(name)))
        return Record(name, image, objects=self._objects(number))

    def key(self, index: int) -> str:
        return self._name(int(self._records[index]))

    def extents(self) -> list[tuple[str, int, int]]:
        files = (self._file(self._name(number)) for number in self._records.tolist())
        return [(os.path.join(self.path, file), 0, sys.maxsize) for file in files]

    def objects(self, index: int) -> Objects:
        """Returns the objects of a record without reading its image."""
        return self._objects(int(self._records[index]))

    def object_table(self) -> ObjectTable:
        return self._all_objects().subset(self._records)

    def _all_objects(self) -> ObjectTable:
        """The objects of all images of the file, also of those that are not in the directory."""
        x = self._index
        count = np.diff(x["annotation_end"], prepend=0)
        masked = (np.diff(x["part_end"], prepend=0) > 0) | (np.diff(x["run_end"], prepend=0) > 0)
        records = np.repeat(np.arange(len(count)), count)
        return ObjectTable(records, x["class"], x["crowd"], masked)

    def _name(self, number: int) -> str:
        return bytes(_span(self._index, "name", "names", number)).decode("utf-8", "surrogateescape")

    def _objects(self, number: int) -> Objects:
        x = self._index
        first = int(x["annotation_end"][number - 1]) if number else 0
        rows = slice(first, int(x["annotation_end"][number]))
        size = (int(x["size"][number, 0]), int(x["size"][number, 1]))
        return Objects(
            x["box"][rows],
            x["class"][rows],
            x["crowd"][rows],
            tuple(self._segmentation(row, size) for row in range(rows.start, rows.stop)),
            x["area"][rows],
            x["annotation_id"][rows],
            size,
            int(x["image_id"][number]),
            _span(x, "negative", "negative", number),
            _span(x, "inexhaustive", "inexhaustive", number),
        )

    def _segmentation(self, row: int, size: tuple[int, int]) -> Segmentation | None:
        x = self._index
        if len(runs := _span(x, "run", "runs", row)):
            return RunLengths(runs.tobytes(), size)
        first, last = int(x["part_end"][row - 1]) if row else 0, int(x["part_end"][row])
        parts = tuple(_span(x, "point", "points", part) for part in range(first, last))
        if x["points"].dtype == np.int32:
            parts = tuple(part / 100 for part in parts)
        return Polygons(parts) if parts else None

    def fingerprint(self) -> str:
        return self._fingerprint

    def description(self) -> str:
        table = self.object_table()
        crowds = int(table.crowd.sum())
        noted = "".join(
            f"; {count:,} {kind}" for kind, count in sorted(self.noted.items()) if count
        )
        note = f"; {self.note}" if self.note else ""
        return (
            f"{len(self):,} images in {self.name}, {len(self.classes):,} classes,"
            f" {len(table.classes) - crowds:,} objects and {crowds:,} crowds"
            f"{base.format_counts(self.ignored)}{noted}{note}"
        )


def _span(index: dict[str, np.ndarray], end: str, values: str, number: int) -> np.ndarray:
    """Returns the values of entry `number` of a ragged array."""
    ends = index[f"{end}_end"]
    return index[values][int(ends[number - 1]) if number else 0 : int(ends[number])]


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where the files of images are: how many leading folders of their names are left out, the
    folder of the directory that then holds them, and the names that are addresses."""

    strip: int
    prefix: str
    addresses: frozenset[str]


def _paths(name: str) -> tuple[str, str]:
    """Returns the path that the name of an image is, and the one that it is as an address, such as
    Label Studio's.

    >>> _paths("/data/local-files/?d=a/my%20image.jpg")[1]
    'a/my image.jpg'
    """
    address = urllib.parse.unquote(name.rpartition("?d=")[2])
    return name.replace("\\", "/"), address.replace("\\", "/")


def _sizes(directory: str, ignored: collections.Counter[str]) -> dict[str, int]:
    """Returns {path: size} of the files of a directory."""
    return {name: stat.st_size for name, stat in folder.files(directory, ignored)}


def _find_place(
    names: list[str], listing: dict[str, int], below: str, source: CocoSource
) -> _Place | None:
    """Finds where a directory has the images: the place with most of some of them, or one in the
    folder of the annotations with at least half as many. None if none of the images is there.

    Args:
        names: of the images in the annotations.
        listing: the files of the directory.
        below: folder of the annotations, relative to the directory.
        source: of the annotations, for messages.

    Raises:
        UserError: several folders have all of them and none of the folders is named by the file of
            annotations.
    """
    files = {file.rpartition("/")[2] for file in listing}
    # of many images a few may be on this disk: those decide
    here, addresses = [], set()
    for name in names:
        plain, address = (path.split("/") for path in _paths(name))
        if plain[-1] in files:
            here.append(plain)
        elif address[-1] in files:
            here.append(address)
            addresses.add(name)
    if not here:
        return None
    sample = here[:: -(-len(here) // SAMPLE)]
    folders = {""}
    for file in listing:
        while file := file.rpartition("/")[0]:
            if file in folders:
                break
            folders.add(file)
    found: list[tuple[int, int, str]] = []
    for strip in range(max(map(len, sample))):
        tails = ["/".join(parts[strip:]) for parts in sample if len(parts) > strip]
        for prefix in folders:
            start = f"{prefix}/" if prefix else ""
            if hits := sum(start + tail in listing for tail in tails):
                found.append((hits, -strip, prefix))
    inside = [f for f in found if f"{f[2]}/".startswith(f"{below}/")]
    if inside and 2 * max(inside)[0] >= max(found)[0]:
        found = inside
    most, strip, _ = max(found)
    best = [prefix for hits, stripped, prefix in found if (hits, stripped) == (most, strip)]
    if len(best) > 1:
        stem = os.path.splitext(os.path.basename(source.annotations))[0]
        named = [p for p in best if re.search(rf"(^|_){re.escape(p.rpartition('/')[2])}$", stem)]
        if not named:
            raise UserError(
                f"data.path={source.path!r} has several folders with images of the names in"
                f" {source.annotations} ({', '.join(sorted(best)[:4])}): give the one of these"
                " images, or put the file of annotations into it"
            )
        best = [max(named, key=len)]
    return _Place(-strip, best[0], frozenset(addresses))


def annotation_files(path: str) -> SplitFolders | None:
    """Finds the files of training and held-out annotations below a directory: the only JSON file of
    it or of its folder annotations/, or the one with "train" in its name, with that of the same
    name and "val" as the held-out one.

    Args:
        path: the directory.

    Returns:
        Paths below the directory, or None if it has no or one JSON file.

    Raises:
        UserError: several files could be meant.

    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for name in ("instances_train2017.json", "instances_val2017.json", "captions.json"):
    ...         _ = pathlib.Path(root, name).write_text("{}")
    ...     files = annotation_files(root)
    >>> files.train, files.held_out
    ('instances_train2017.json', 'instances_val2017.json')
    """
    names = _json_files(path)
    if len(names) < 2:
        return None
    trains = [n for n in names if "train" in os.path.basename(n).lower()]
    instances = [n for n in trains if os.path.basename(n).startswith("instances")]
    chosen = instances if len(instances) == 1 else trains
    if len(chosen) != 1:
        raise UserError(
            f"data.path={path!r} has several files of annotations ({', '.join(names[:5])}): set"
            " data.annotations to the one to train on, and data.holdout_annotations if there is one"
            " to hold out"
        )
    train = chosen[0]
    folder_name, file = os.path.split(train)
    held_out = os.path.join(folder_name, re.sub("(?i)train", "val", file))
    held_out = held_out if held_out in names and held_out != train else ""
    held = f", {held_out} is held out" if held_out else ""
    return SplitFolders(train, held_out, f"files of annotations by name: {train} is used{held}")


def _json_files(path: str) -> list[str]:
    names = []
    for below in ("", "annotations"):
        directory = os.path.join(os.path.expanduser(path), below)
        entries = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
        names += [os.path.join(below, n) for n in entries if n.lower().endswith(".json")]
    return names


def _find_annotations(path: str, split: str) -> str:
    """Returns the file of annotations that data.path and data.annotations name; "" if neither names
    one. Raises UserError: see `annotation_files`."""
    if not split:
        files = annotation_files(path)
        split = files.train if files else next(iter(_json_files(path)), "")
    if not split:
        return ""
    annotations = base.split_path(path, split)
    if not os.path.isfile(annotations) and os.path.isfile(os.path.expanduser(split)):
        return split  # of the working directory
    return annotations


def _locate(path: str, split: str) -> str:
    return _find_annotations(path, split) or path


def _open(path: str, split: str, data: schema.Data, cache: str) -> CocoSource:
    if annotations := _find_annotations(path, split):
        return CocoSource(path, annotations, cache=cache)
    raise UserError(
        f"data.annotations is empty, and data.path={path!r} has no JSON file: give the file of"
        " annotations"
    )


register_source(
    SourceKind(
        name="coco",
        open=_open,
        path="the directory that holds the images",
        reads=("annotations",),
        find_splits=annotation_files,
        locate=_locate,
    )
)
