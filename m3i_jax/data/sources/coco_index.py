"""Reads a file of annotations in COCO's form (COCO, LVIS, Objects365, own files) once, into flat
arrays. What cannot be used is left out and counted by reason; what is odd and used is counted, too.

The arrays of an index, with N images, A annotations and K categories:
    image_id int64 [N]; size int32 [N, 2], height and width, 0 if unknown; name_end int64 [N] into
    names uint8; annotation_end int64 [N]; negative_end, inexhaustive_end int64 [N] into negative
    and inexhaustive int32 (LVIS)
    box float32 [A, 4], x0 y0 x1 y1; class int32 [A]; crowd bool [A]; area float64 [A];
    annotation_id int64 [A]; part_end int64 [A] into point_end; run_end int64 [A] into runs uint8
    point_end int64 of each polygon into points [., 2], which are hundredths of a pixel as int32 if
    that is exact, else float64
    texts uint8: JSON of the categories and of the counts; content uint8: hash of the file"""

import collections
import hashlib
import json
import os
from typing import Any, NoReturn

import numpy as np

from m3i_jax.data.sources import segmentations
from m3i_jax.errors import UserError, shorten

VERSION = 2  # of the index; an index of another version is rebuilt
JSON_LIMIT = 8 << 30  # bytes; Python needs about ten times as much for the parsed file
_ID_LIMIT = 2**63
Counts = collections.Counter[str]
# sizes that version 1 took for unknown, so that masks were lost
REPAIRED = ("image sizes not written as whole numbers", "image sizes taken from run lengths")


def build_index(path: str) -> dict[str, np.ndarray]:
    """Reads a file of annotations.

    Args:
        path: the JSON file.

    Returns:
        The arrays that the head of this module lists.

    Raises:
        UserError: the file is not JSON in COCO's form, or cannot be understood in only one way: an
            id that is no whole number, or two images or categories of one id.
    """
    raw = _read(path)
    content = hashlib.blake2b(raw, digest_size=16).digest()
    document = _parse(path, raw)
    del raw
    ignored, noted = Counts(), Counts()
    categories = _categories(path, document.pop("categories"))
    images = _images(path, document.pop("images"), ignored, noted)
    rows = _Rows(images, {category["id"]: i for i, category in enumerate(categories)})
    per_image: list[list[dict[str, Any]]] = [[] for _ in images]
    numbers = {image["id"]: i for i, image in enumerate(images)}
    for annotation in document.pop("annotations"):
        image = annotation.get("image_id") if isinstance(annotation, dict) else None
        if not isinstance(annotation, dict):
            ignored["annotations that are not JSON objects"] += 1
        elif type(image) is not int or image not in numbers:
            ignored["annotations of an image that is not listed"] += 1
        else:
            per_image[numbers[image]].append(annotation)
    for number, annotations in enumerate(per_image):
        rows.add(number, annotations, ignored, noted)
        per_image[number] = []
    noted["images without an object"] += rows.empty()
    return {**rows.arrays(categories, ignored, noted), "content": np.frombuffer(content, np.uint8)}


def _read(path: str) -> bytes:
    size = os.path.getsize(path)
    if size > JSON_LIMIT:
        raise UserError(
            f"{path}: {size / 2**30:.1f} GiB of annotations, at most {JSON_LIMIT >> 30} GiB are"
            " read: split the file"
        )
    with open(path, "rb") as file:
        return file.read()


def _parse(path: str, raw: bytes) -> dict[str, Any]:
    def refuse(why: str, remedy: str = "give a file of annotations in COCO's form") -> NoReturn:
        raise UserError(f"{path}: {why}; {remedy}")

    try:
        document = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        refuse(f"is not UTF-8 text (byte {error.start:,})", "save it as UTF-8")
    except RecursionError:
        refuse("is nested too deep")
    except ValueError as error:
        refuse(f"is not JSON ({error})")
    if not isinstance(document, dict):
        refuse(f"holds a JSON {type(document).__name__}, not an object")
    for name in ("images", "annotations", "categories"):
        if not isinstance(document.get(name), list):
            has = ", ".join(sorted(map(shorten, document))[:8])
            refuse(f"has no list {name!r} (it has: {has or 'nothing'})")
    if not document["images"]:
        refuse("lists no image")
    if not document["categories"]:
        refuse("lists no category")
    return document


def _categories(path: str, entries: list[Any]) -> list[dict[str, Any]]:
    """Returns the categories by id, with what training and evaluation need of them."""
    found: dict[int, dict[str, Any]] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not _is_id(entry.get("id")):
            raise UserError(
                f"{path}: {shorten(entry)} is not a category: it needs a whole number 'id'"
            )
        name = entry.get("name", str(entry["id"]))
        text = str(name).encode("utf-8", "replace").decode()  # half of a character is no text
        category = {"id": entry["id"], "name": text}
        if entry.get("frequency") in ("r", "c", "f"):
            category["frequency"] = entry["frequency"]
        if _is_id(entry.get("image_count")) and entry["image_count"] >= 0:
            category["image_count"] = entry["image_count"]
        before = found.setdefault(category["id"], category)
        if before["name"] != category["name"]:
            raise UserError(
                f"{path}: the categories {before['name']!r} and {category['name']!r} have the same"
                f" id {category['id']}: give each its own"
            )
    return [found[number] for number in sorted(found)]


def _images(path: str, entries: list[Any], ignored: Counts, noted: Counts) -> list[dict[str, Any]]:
    """Returns the images in the order of the file."""
    found: dict[int, dict[str, Any]] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not _is_id(entry.get("id")):
            raise UserError(
                f"{path}: {shorten(entry)} is not an image: it needs a whole number 'id'"
            )
        name = entry.get("file_name")
        if not isinstance(name, str) or not name:
            # LVIS 1.0 has the address alone; its last two parts are folder and file
            url = entry.get("coco_url")
            name = "/".join(url.split("/")[-2:]) if isinstance(url, str) else ""
        if not name or "\0" in name or not _is_encodable(name):
            ignored["images without a file name"] += 1
            continue
        stated = [entry.get(side) for side in ("height", "width")]
        size = tuple(map(_side, stated))
        noted[REPAIRED[0]] += all(size) and any(type(side) is not int for side in stated)
        image = {
            "id": entry["id"],
            "name": name,
            "size": size if all(size) else (0, 0),
            "negative": entry.get("neg_category_ids"),
            "inexhaustive": entry.get("not_exhaustive_category_ids"),
        }
        before = found.setdefault(image["id"], image)
        if before is image:
            continue
        if before["name"] != name:
            raise UserError(
                f"{path}: the images {before['name']!r} and {name!r} have the same id"
                f" {image['id']}: give each its own, and the annotations as well"
            )
        ignored["images that are listed twice"] += 1
    if not found:
        raise UserError(f"{path}: no image has a 'file_name' or 'coco_url'; add them")
    return list(found.values())


def _is_encodable(name: str) -> bool:
    """Returns whether a name can be that of a file: JSON can hold half of a character."""
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _is_id(value: Any) -> bool:
    return type(value) is int and -_ID_LIMIT <= value < _ID_LIMIT


def _side(value: Any) -> int:
    """Returns a side of an image, which may be written as 640, 640.0 or "640"; 0 if it is none."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 9:
        value = int(value)
    if type(value) not in (int, float) or not 0 < value < 1 << 24 or value != int(value):
        return 0
    return int(value)


def _size_of_runs(annotations: list[dict[str, Any]]) -> tuple[int, int]:
    """Returns the size that the first usable run lengths state, (0, 0) if there are no such."""
    for annotation in annotations:
        mask = annotation.get("segmentation")
        if isinstance(mask, dict) and _runs(mask, (0, 0), Counts()):
            return _side(mask["size"][0]), _side(mask["size"][1])
    return 0, 0


class _Rows:
    """The annotations of all images, in the order of the images, as growing columns."""

    def __init__(self, images: list[dict[str, Any]], classes: dict[int, int]) -> None:
        self.images, self.classes = images, classes
        self.ids: set[int] = set()
        self.columns: dict[str, list[Any]] = {
            name: []
            for name in ("box", "class", "crowd", "area", "annotation_id", "part_end", "run_end")
        }
        self.annotation_end: list[int] = []
        self.points: list[np.ndarray] = []
        self.runs = bytearray()

    def empty(self) -> int:
        """Returns the number of images without an annotation."""
        return int((np.diff([0, *self.annotation_end]) == 0).sum())

    def add(
        self, number: int, annotations: list[dict[str, Any]], ignored: Counts, noted: Counts
    ) -> None:
        """Adds the annotations of an image."""
        if not self.images[number]["size"][0]:  # without it, run lengths have no rows
            self.images[number]["size"] = _size_of_runs(annotations)
            noted[REPAIRED[1]] += self.images[number]["size"][0] > 0
        size = self.images[number]["size"]
        for annotation in annotations:
            category = annotation.get("category_id")
            if type(category) is not int or category not in self.classes:
                ignored["annotations of a category that is not listed"] += 1
                continue
            parts, runs = self._segmentation(annotation.get("segmentation"), size, noted)
            box = _box(annotation.get("bbox"), parts, runs, size, ignored, noted)
            if box is None:
                continue
            identity: Any = annotation.get("id")
            if not _is_id(identity) or identity in self.ids:
                noted["annotations without an id of their own"] += 1
                identity = -1 if not _is_id(identity) else identity
            self.ids.add(identity)
            if not parts and not runs:
                noted["objects without a mask"] += 1
            self.points += parts
            self.runs += runs
            area: Any = annotation.get("area")
            x0, y0, x1, y1 = box
            self.columns["box"].append(box)
            self.columns["class"].append(self.classes[category])
            self.columns["crowd"].append(annotation.get("iscrowd") in (1, True))
            self.columns["area"].append(
                float(area) if _is_number(area) and area >= 0 else (x1 - x0) * (y1 - y0)
            )
            self.columns["annotation_id"].append(identity)
            self.columns["part_end"].append(len(self.points))
            self.columns["run_end"].append(len(self.runs))
        self.annotation_end.append(len(self.columns["box"]))

    def _segmentation(
        self, value: Any, size: tuple[int, int], noted: Counts
    ) -> tuple[list[np.ndarray], bytes]:
        """Returns the polygons, or the compressed run lengths, of an annotation; neither if it has
        none that can be used."""
        if isinstance(value, dict):
            return [], _runs(value, size, noted)
        if not isinstance(value, list):
            if value is not None:
                noted["masks of an unknown form"] += 1
            return [], b""
        parts = []
        for polygon in value:
            points = _points(polygon)
            if points is None:
                noted["polygons without three points"] += 1
            elif size[0] and not _touches(points, size):
                noted["polygons outside of the image"] += 1
            else:
                parts.append(points)
        return parts, b""

    def arrays(
        self, categories: list[dict[str, Any]], ignored: Counts, noted: Counts
    ) -> dict[str, np.ndarray]:
        """Returns the arrays of the index."""
        names = [image["name"].encode("utf-8", "surrogateescape") for image in self.images]
        types = {
            "box": np.float32,
            "class": np.int32,
            "crowd": bool,
            "area": np.float64,
        }
        found = {
            name: np.array(column, types.get(name, np.int64))
            for name, column in self.columns.items()
        }
        found["box"] = found["box"].reshape(-1, 4)
        for name in ("negative", "inexhaustive"):
            lists = [self._class_list(image[name], noted) for image in self.images]
            found[name] = np.array([c for row in lists for c in row], np.int32)
            found[f"{name}_end"] = np.cumsum([len(row) for row in lists], dtype=np.int64)
        points = np.concatenate([np.zeros((0, 2)), *self.points])
        hundredths = np.rint(points * 100)
        exact = (hundredths / 100 == points).all() and np.abs(hundredths).max(initial=0) < 2**31
        texts = {"categories": categories, "ignored": ignored, "noted": noted}
        return {
            **found,
            "image_id": np.array([image["id"] for image in self.images], np.int64),
            "size": np.array([image["size"] for image in self.images], np.int32),
            "names": np.frombuffer(b"".join(names), np.uint8),
            "name_end": np.cumsum([len(name) for name in names], dtype=np.int64),
            "annotation_end": np.array(self.annotation_end, np.int64),
            "point_end": np.cumsum([len(part) for part in self.points], dtype=np.int64),
            "points": hundredths.astype(np.int32) if exact else points,
            "runs": np.frombuffer(bytes(self.runs), np.uint8),
            "texts": np.frombuffer(json.dumps(texts).encode(), np.uint8),
            "version": np.array(VERSION),
        }

    def _class_list(self, value: Any, noted: Counts) -> list[int]:
        """Returns the classes of a list of category ids."""
        ids = value if isinstance(value, list) else []
        known = [self.classes[c] for c in ids if type(c) is int and c in self.classes]
        noted["entries of LVIS's lists of unknown categories"] += len(ids) - len(known)
        return known


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e18 < value < 1e18  # no NaN, no infinity


def _points(polygon: Any) -> np.ndarray | None:
    """Returns the points of a polygon, float64 [n, 2], or None if it is none."""
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return None
    if not all(type(value) in (int, float) for value in polygon):
        return None
    try:
        points = np.array(polygon, np.float64).reshape(-1, 2)
    except OverflowError:  # a whole number of hundreds of digits
        return None
    return points if np.isfinite(points).all() and np.abs(points).max() < 1e9 else None


def _touches(points: np.ndarray, size: tuple[int, int]) -> bool:
    low, high = points.min(0), points.max(0)
    return bool(low[0] < size[1] and low[1] < size[0] and (high > 0).all())


def _runs(value: dict[str, Any], size: tuple[int, int], noted: Counts) -> bytes:
    """Returns the compressed run lengths of a mask, b"" if they cannot be used."""
    stated, counts = value.get("size"), value.get("counts")
    sides = tuple(map(_side, stated)) if isinstance(stated, list) else ()
    if len(sides) != 2 or not all(sides):
        noted["run lengths without a size"] += 1
        return b""
    if size[0] and sides != size:
        noted["run lengths of an image of another size"] += 1
        return b""
    try:
        if isinstance(counts, list):
            if not all(type(run) is int and 0 <= run < 1 << 32 for run in counts):
                raise ValueError("no run lengths")
            runs = np.array(counts, np.int64)
            encoded = segmentations.encode_counts(runs)
        elif isinstance(counts, str):
            encoded = counts.encode()
            runs = segmentations.decode_counts(encoded)
        else:
            raise ValueError("no run lengths")
        if int(runs.sum()) != sides[0] * sides[1]:
            raise ValueError("too few or too many")
    except ValueError:
        noted["damaged run lengths"] += 1
        return b""
    return encoded


def _box(
    value: Any,
    parts: list[np.ndarray],
    runs: bytes,
    size: tuple[int, int],
    ignored: Counts,
    noted: Counts,
) -> tuple[float, float, float, float] | None:
    """Returns x0 y0 x1 y1 of an annotation's box, of its mask if it has no box, or None."""
    if isinstance(value, list) and len(value) == 4 and all(map(_is_number, value)):
        x, y, w, h = map(float, value)
        box = (x, y, x + w, y + h)
        if w <= 0 or h <= 0:
            ignored["boxes of no area"] += 1
            return None
    elif parts:
        noted["boxes taken from the mask"] += 1
        low, high = np.min([p.min(0) for p in parts], 0), np.max([p.max(0) for p in parts], 0)
        box = (*low.tolist(), *high.tolist())
    elif runs and size[0]:
        noted["boxes taken from the mask"] += 1
        mask = segmentations.decode_mask(segmentations.RunLengths(runs, size), *size)
        box = segmentations.tight_box(mask)
    else:
        ignored["annotations without a box"] += 1
        return None
    if box[2] <= box[0] or box[3] <= box[1]:
        ignored["boxes of no area"] += 1
        return None
    if size[0]:
        height, width = size
        if box[0] >= width or box[1] >= height or box[2] <= 0 or box[3] <= 0:
            ignored["boxes outside of the image"] += 1
            return None
        # a pixel, since many files count pixels from 1 or include the last one
        if min(box[0], box[1]) < -1 or box[2] > width + 1 or box[3] > height + 1:
            noted["boxes that reach out of the image by more than a pixel"] += 1
    return box
