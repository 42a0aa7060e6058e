"""Reads images with class maps from a directory in ADE20k's layout: images/ and annotations/, with
the same folders in both, and for every image a PNG of the same name whose pixels are classes.

0 and 255 are unlabelled and x is class x - 1, as in ADE20k; with data.map_unlabelled=255, 255 alone
is unlabelled and x is class x, as in VOC and the train ids of Cityscapes. Class names, the first
that of class 0, are those of objectInfo150.txt or classes.txt beside the two folders, or of
data.class_names; without such a file, all maps are read once for the highest class."""

import collections
import concurrent.futures
import json
import logging
import os

import numpy as np

from m3i_jax import progress, schema
from m3i_jax.data import decode_map
from m3i_jax.data.decode import BadRecord
from m3i_jax.data.sources import base, folder
from m3i_jax.data.sources.base import EXTENSIONS, Record
from m3i_jax.data.sources.registry import SourceKind, SplitFolders, register_source
from m3i_jax.errors import UserError

IMAGES, MAPS = "images", "annotations"
NAMES = ("objectInfo150.txt", "classes.txt")
_MAP_EXTENSIONS = (".png", ".bmp", ".tif", ".tiff")
_log = logging.getLogger(__name__)


class MapsSource:
    """The images of a directory that have a map. Keys are paths relative to images/SPLIT.

    Args:
        path: the directory that holds images/ and annotations/.
        split: folder of both, "" for all; or another directory of this layout, an absolute path.
        names: file of class names; "" to look for one beside the two folders.
        cache: directory in which the highest class is kept, where no file names the classes.
        unlabelled: number of pixels without a class, see `data.map_unlabelled`.

    Raises:
        UserError: a folder is missing or both are one, no image has a map, or a map cannot hold
            all classes.
    """

    captions, names_its_classes = False, True

    def __init__(
        self, path: str, split: str = "", *, names: str = "", cache: str = "", unlabelled: int = 0
    ) -> None:
        outer = os.path.expanduser(path)
        root, split = _find_root(path, split)
        # numbers of another directory mean what those of data.path mean
        named_in = dict.fromkeys((root, outer))
        path = path if root == outer else root
        self.image_root, self.map_root = (
            os.path.join(root, part, split).rstrip("/") for part in (IMAGES, MAPS)
        )
        for part in (self.image_root, self.map_root):
            if not os.path.isdir(part):
                raise UserError(
                    f"data.path={path!r}: {base.missing_path_error(part)}; data.source='maps' reads"
                    f" {IMAGES}/ and {MAPS}/ with the same folders in both"
                )
        if os.path.realpath(self.image_root) == os.path.realpath(self.map_root):
            raise UserError(
                f"data.path={path!r}: its split {split!r} of {IMAGES}/ and that of {MAPS}/ are the"
                " same directory, whose maps would be the images: give a folder below both, or the"
                f" full path of a directory that holds {IMAGES}/ and {MAPS}/"
            )
        self.name, self.note, self.unnamed = f"maps {os.path.join(path, split)!r}", "", ""
        self.ignored: collections.Counter[str] = collections.Counter()
        images = _files(self.image_root, EXTENSIONS, self.ignored)
        maps = _files(self.map_root, _MAP_EXTENSIONS, self.ignored)
        self._files = [(*images[stem], *maps[stem]) for stem in sorted(images.keys() & maps.keys())]
        self.ignored["images without a map"] = len(images) - len(self._files)
        self.ignored["maps without an image"] = len(maps) - len(self._files)
        if not self._files:
            raise UserError(
                f"no image in {self.image_root!r} has a map of its name in"
                f" {self.map_root!r}{base.format_counts(self.ignored)}: put NAME.png there for"
                " NAME.jpg"
            )
        self._first = 0 if unlabelled else 1  # the number of class 0
        numbering = [f"classes from {self._first}"] if unlabelled else []
        self._fingerprint = base.stable_digest("maps", *map(repr, self._files), *numbering)
        lists = (os.path.join(top, name) for top in named_in for name in NAMES)
        file = names or next(filter(os.path.isfile, lists), "")
        self.classes = read_class_list(file) if file else self._numbers(root, cache)
        if len(self.classes) > (most := decode_map.UNLABELLED - self._first):
            raise UserError(
                f"{file or self.map_root}: {len(self.classes):,} classes, at most {most} fit in a"
                f" map beside {unlabelled} for unlabelled: merge classes"
            )
        if self._first and self.classes[:1] and self.classes[0].strip("_").lower() == "background":
            _log.warning(
                "%s: the first class, %r, is number 1 of the maps, as 0 is unlabelled; where 0 is"
                " the background, set data.map_unlabelled=255",
                file,
                self.classes[0],
            )

    def extents(self) -> list[tuple[str, int, int]]:
        return [(os.path.realpath(self.image_root), 0, len(self))]

    @property
    def map_classes(self) -> tuple[str, ...]:
        return self.classes

    def _numbers(self, root: str, cache: str) -> tuple[str, ...]:
        """Returns the numbers of the classes, from the highest in the maps of all splits.

        Raises:
            UserError: no pixel of any map has a class.
        """
        top = os.path.join(root, MAPS)
        files = sorted(_files(top, _MAP_EXTENSIONS, collections.Counter()).values())
        digest = base.stable_digest(*map(repr, files))
        path = os.path.join(cache, f"map_classes_{digest}.npz") if cache else ""
        kept = base.load_arrays(path) if path else None
        highest = int(kept["highest"]) if kept else -1
        if highest < self._first:
            highest = self._read_highest(top, [name for name, _ in files])
            if path:
                try:
                    base.save_arrays(path, highest=np.array(highest))
                except OSError as error:
                    _log.warning("the number of classes cannot be kept: %s", error)
        self.unnamed = "; no file names the classes"
        return tuple(map(str, range(self._first, highest + 1)))

    def _read_highest(self, top: str, names: list[str]) -> int:
        """Reads all maps for the highest number of a class."""
        _log.info("reading %d maps for the number of their classes", len(names))
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            read = pool.map(_highest, (os.path.join(top, name) for name in names))
            found = list(progress.track_progress(read, "reading maps", len(names), "maps"))
        if (highest := max(number for number, _ in found)) >= self._first:
            return highest
        unread = [(name, why) for name, (_, why) in zip(names, found, strict=True) if why]
        which = "0 or 255, both unlabelled" if self._first else "255, unlabelled"
        wrong = [f"all pixels are {which}"] if len(unread) < len(names) else []
        if unread:
            name, why = unread[0]
            wrong.append(
                f"{len(unread):,} of {len(names):,} maps cannot be read, as {name!r}: {why}"
            )
        remedy = ", or set data.map_unlabelled=255 if 0 is a class" if self._first else ""
        raise UserError(
            f"{top}: {'; '.join(wrong)}; write one channel with classes from {self._first}{remedy}"
        )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        name = self._files[index][0]
        image = base.read_byte_range(os.path.join(self.image_root, name))
        encoded = base.read_byte_range(os.path.join(self.map_root, self._files[index][2]))
        return Record(name, image, map=shift_classes(encoded, self._first))

    def key(self, index: int) -> str:
        return self._files[index][0]

    def fingerprint(self) -> str:
        return self._fingerprint

    def description(self) -> str:
        note = f"; {self.note}" if self.note else ""
        return (
            f"{len(self):,} images in {self.name}, {len(self.classes):,} classes of the"
            f" map{base.format_counts(self.ignored)}{self.unnamed}{note}"
        )


def _find_root(path: str, split: str) -> tuple[str, str]:
    """Returns the directory that holds images/ and annotations/, and the folder of both to read."""
    split = os.path.expanduser(split)
    # below images/ and annotations/, an absolute path would be the root of both
    return (split, "") if os.path.isabs(split) else (os.path.expanduser(path), split)


def _locate(path: str, split: str) -> str:
    root, split = _find_root(path, split)
    return os.path.join(root, IMAGES, split)


def _highest(path: str) -> tuple[int, str]:
    """Returns the highest number in a map but 255, -1 if it has no other; and why the map cannot be
    read, "" if it can."""
    try:
        numbers = decode_map.read_map(base.read_byte_range(path))
    except BadRecord as error:
        return -1, error.detail
    labelled = numbers[numbers != decode_map.UNLABELLED]
    return int(labelled.max()) if labelled.size else -1, ""


def shift_classes(encoded: bytes, first: int = 1) -> bytes | np.ndarray:
    """Returns a map in which the number `first` is class 0, and what is unlabelled 255; the bytes
    themselves if they are no map, which is a bad record to the builder of batches.

    >>> shift_classes(b"no map")
    b'no map'
    """
    try:
        numbers = decode_map.read_map(encoded)
    except BadRecord:
        return encoded
    # 0 - 1 wraps to 255, and 255 stays
    return np.where(numbers == decode_map.UNLABELLED, numbers, numbers - np.uint8(first))


def read_class_list(path: str) -> tuple[str, ...]:
    """Reads class names, in the order of the classes: one a line, a JSON list, or the last column
    of ADE20k's objectInfo150.txt, of whose synonyms the first is taken.

    Raises:
        UserError: the file cannot be read or names no class.
    """
    try:
        with open(os.path.expanduser(path), encoding="utf-8-sig") as file:
            text = file.read()
        if path.endswith(".json"):
            names = json.loads(text)
            if not isinstance(names, list):
                raise ValueError("is not a list")
        else:
            names = [line.strip() for line in text.rstrip().splitlines()]
            if "" in names:
                raise ValueError(
                    f"line {names.index('') + 1} is blank, and line k names the k-th class"
                )
            if names and names[0].startswith("Idx"):
                names = [line.split("\t")[-1].split(",")[0].strip() for line in names[1:]]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not a list of class names ({error}); give a text file with a name per line"
        ) from error
    if not names:
        raise UserError(f"{path}: names no class; give a text file with a name per line")
    return tuple(map(str, names))


def _files(
    root: str, extensions: tuple[str, ...], ignored: collections.Counter[str]
) -> dict[str, tuple[str, int]]:
    """Returns (relative path, size) by stem of the files with some extensions; of two files with
    one stem, the first by name."""
    found: dict[str, tuple[str, int]] = {}
    for name, stat in sorted(folder.files(root, ignored)):
        stem, extension = os.path.splitext(name)
        if extension.lower() not in extensions:
            ignored["other files"] += 1
        elif stem in found:
            ignored["files of the same name with another extension"] += 1
        else:
            found[stem] = (name, stat.st_size)
    return found


def find_map_splits(path: str) -> SplitFolders | None:
    """Finds the splits of ADE20k's layout: images/training (or train) and images/validation (val,
    or else test) with the same folders of annotations/; None if images/ has no such folders.

    Raises:
        UserError: there are folders for one split under two names, or none to train on.
    """
    root = os.path.join(os.path.expanduser(path), IMAGES)
    entries = sorted(os.listdir(root)) if os.path.isdir(root) else []
    roles: dict[str, list[str]] = collections.defaultdict(list)
    for name in entries:
        if os.path.isdir(os.path.join(root, name)) and (role := folder.ROLES.get(name.casefold())):
            roles[role].append(name)
    if not roles:
        return None
    double = next((names for names in roles.values() if len(names) > 1), None)
    if double or not roles["train"]:
        what = f"{' and '.join(double)} for one split" if double else "no train/ or training/"
        raise UserError(
            f"data.path={path!r}: {IMAGES}/ has {what}: set data.split to the folder to train on,"
            " and data.holdout_split if there is one to hold out"
        )
    train = roles["train"][0]
    held_out = next(iter([*roles["val"], *roles["test"]]), "")
    held = f"{held_out}/ is held out" if held_out else "data.holdout of it is held out"
    return SplitFolders(
        train, held_out, f"splits by the names of sub-folders: {train}/ is trained on, {held}"
    )


def _open(path: str, split: str, data: schema.Data, cache: str) -> MapsSource:
    return MapsSource(
        path, split, names=data.class_names, cache=cache, unlabelled=data.map_unlabelled
    )


register_source(
    SourceKind(
        name="maps",
        open=_open,
        path="the directory that holds images/ and annotations/",
        reads=("class_names", "map_unlabelled"),
        find_splits=find_map_splits,
        locate=_locate,
    )
)
