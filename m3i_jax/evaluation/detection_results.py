"""Annotated objects and detections of one image, in the pixels of the original image, and their
conversions: masks to run lengths (RLE), detections to COCO's JSON, results of all hosts to a list.

Masks stay encoded: one full-size mask is in memory at a time. Polygons are drawn by pycocotools,
which is imported when it is needed (extra `dense`).

Mask logits of the whole input (Mask2Former) of stride s are resized to the input, cut to the
content, resized to the original image, and then compared with 0, both steps bilinear. Both are one
product from either side, of which only the rows and columns are computed that the mask can reach.
"""

import dataclasses
import functools
import itertools
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from m3i_jax import parallel
from m3i_jax.data.sources import segmentations
from m3i_jax.data.sources.base import DataSource
from m3i_jax.data.sources.objects import Objects, empty_objects
from m3i_jax.errors import UserError

Rle = dict[str, Any]  # {"size": [height, width], "counts": text}, COCO's compressed form


@dataclasses.dataclass(frozen=True, kw_only=True)
class CategoryTable:
    """The K categories of a data set.

    Attributes:
      names: by class, 0..K-1.
      ids: ids of the classes in the annotation file, which need not be contiguous; (): class + 1.
      frequency: LVIS's "r", "c" or "f" of each class (1 to 10, 11 to 100, or more images of
        training); (): none.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...] = ()
    frequency: tuple[str, ...] = ()

    def original(self, label: int) -> int:
        """Returns the id of a class in the annotation file.

        >>> CategoryTable(names=("a", "b"), ids=(3, 90)).original(1)
        90
        """
        return self.ids[label] if self.ids else label + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTruth:
    """The annotated objects of an image; M of them.

    Attributes:
      image: id of the image, as in the annotation file.
      size: (height, width) in pixels.
      boxes: float [M, 4], x0 y0 x1 y1 in pixels.
      classes: int [M], 0..K-1.
      crowd: bool [M]: regions that are ignored, as COCO's `iscrowd`.
      area: float [M], in pixels; decides whether an object is small, medium or large.
      masks: RLE of each object, None where it has no mask.
      record: index in the source, by which the image can be read again; -1: none.
      negative: LVIS: classes that are verified to be absent.
      not_exhaustive: LVIS: classes of which not all objects are annotated.
    """

    image: int | str
    size: tuple[int, int]
    boxes: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray
    area: np.ndarray
    masks: Sequence[Rle | None]
    record: int = -1
    negative: tuple[int, ...] = ()
    not_exhaustive: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageDetections:
    """The detections of an image; D of them, in the order of the model.

    Attributes:
      boxes: float [D, 4], x0 y0 x1 y1 in pixels of the original image.
      scores: float [D].
      classes: int [D], 0..K-1.
      masks: RLE of each detection; None: the model predicts no masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: Sequence[Rle] | None = None


@dataclasses.dataclass(frozen=True)
class DetectionResult:
    """An image with its objects and its detections."""

    truth: ImageTruth
    found: ImageDetections

    @property
    def image(self) -> int | str:
        """The id of the image."""
        return self.truth.image


def mask_tools() -> Any:
    """Returns the module `pycocotools.mask`.

    Raises:
      UserError: it is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError:
        raise UserError(
            "evaluating detection needs pycocotools, which is not installed: pip install"
            " 'm3i-jax[dense]'"
        ) from None
    return mask


def mask_to_rle(mask_HxW: np.ndarray) -> Rle:
    """Returns a binary mask as compressed RLE.

    >>> mask_to_rle(np.eye(3, dtype=np.uint8))
    {'size': [3, 3], 'counts': '013000'}
    """
    runs = segmentations.encode_mask(mask_HxW)
    return _text({"size": runs.size, "counts": runs.counts})


def rle_to_mask(rle: Rle) -> np.ndarray:
    """Returns the mask, bool [H, W], of an RLE.

    >>> rle_to_mask(mask_to_rle(np.eye(2, dtype=np.uint8))).astype(int).tolist()
    [[1, 0], [0, 1]]
    """
    height, width = rle["size"]
    runs = segmentations.decode_counts(rle["counts"].encode("ascii"))
    return segmentations.mask_of_runs(runs, height, width)


def segmentation_to_rle(segmentation: Any, size: tuple[int, int]) -> Rle | None:
    """Returns a mask of an annotation as compressed RLE, None if it is absent or empty.

    Polygons are drawn by pycocotools, whose pixels along an outline are those of COCO's own
    evaluation.

    Args:
      segmentation: `Polygons` or `RunLengths` of a record, or what a COCO file has: a list of
        polygons, an RLE with a list of counts, or a compressed RLE.
      size: (height, width) of the image.

    >>> square = [[0, 0, 2, 0, 2, 2, 0, 2]]
    >>> int(rle_to_mask(segmentation_to_rle(square, (4, 4))).sum())
    4
    >>> segmentation_to_rle([], (4, 4)) is None
    True
    """
    if isinstance(segmentation, segmentations.RunLengths):
        return _text({"size": segmentation.size, "counts": segmentation.counts})
    if isinstance(segmentation, segmentations.Polygons):
        segmentation = [part.reshape(-1).tolist() for part in segmentation.parts]
    if segmentation is None or len(segmentation) == 0:
        return None
    if isinstance(segmentation, Mapping) and not isinstance(segmentation["counts"], list):
        return _text(segmentation)
    tools, (height, width) = mask_tools(), size
    if isinstance(segmentation, Mapping):
        return _text(tools.frPyObjects(dict(segmentation), height, width))
    return _text(tools.merge(tools.frPyObjects(list(segmentation), height, width)))


def image_truth(objects: Objects | None, *, record: int, size: tuple[int, int]) -> ImageTruth:
    """Returns the ground truth of a record.

    Args:
      objects: of the record; None: it has none.
      record: index of the record in its source; the image's id where the source has no ids.
      size: (height, width) of the image as it was decoded.
    """
    objects = empty_objects() if objects is None else objects
    return ImageTruth(
        image=objects.image if objects.image >= 0 else record,
        record=record,
        size=size,
        boxes=np.asarray(objects.boxes, np.float64),
        classes=np.asarray(objects.classes, np.int64),
        crowd=np.asarray(objects.crowd, bool),
        area=np.asarray(objects.areas, np.float64),
        masks=[segmentation_to_rle(each, size) for each in objects.segmentations],
        negative=tuple(objects.negative.tolist()),
        not_exhaustive=tuple(objects.inexhaustive.tolist()),
    )


def category_table(source: DataSource, names: Sequence[str] | None = None) -> CategoryTable:
    """Returns the categories of a source, with the ids of its annotation file and LVIS's
    frequencies where it has them.

    Args:
      source: of annotated images.
      names: of the classes that a run predicts; None: of the source. A class that the file does not
        list gets the next free id.
    """
    holder: Any = source
    while not hasattr(holder, "category_ids") and hasattr(holder, "source"):
        holder = holder.source  # of a subset, or of one with other numbers of its classes
    names, theirs = tuple(source.classes if names is None else names), tuple(holder.classes)
    ids, frequency = getattr(holder, "category_ids", ()), getattr(holder, "frequencies", ())
    place = {name: i for i, name in enumerate(theirs)}
    at = [i if theirs[i : i + 1] == (name,) else place.get(name) for i, name in enumerate(names)]
    free = itertools.count(int(max(ids, default=0)) + 1)
    return CategoryTable(
        names=names,
        ids=tuple(next(free) if i is None else int(ids[i]) for i in at if len(ids)),
        frequency=tuple("r" if i is None else frequency[i] for i in at if all(frequency or [0])),
    )


def _text(rle: Mapping[str, Any]) -> Rle:
    counts = rle["counts"]
    return {
        "size": [int(n) for n in rle["size"]],
        "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
    }


def paste_mask(mask_mxm: np.ndarray, box_4: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns the mask of a detection in its image: at each pixel centre, the bilinear sample of
    the predicted map, zeros outside of it, at least 0.5 (detectron2's).

    The map has its samples at ((j + .5) / m) of the box. Both directions are small matrices, which
    are built for the pixels of the box alone.

    Args:
      mask_mxm: probabilities in the frame of the box.
      box_4: x0 y0 x1 y1 in pixels; may reach beyond the image; x1 > x0 and y1 > y0.
      size: (height, width) of the image.

    Returns:
      uint8 [height, width] of 0 and 1.

    >>> box = np.array([1, 0, 3, 2])
    >>> paste_mask(np.ones((28, 28)), box, (3, 4)).tolist()
    [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    """
    out = np.zeros(size, np.uint8)
    x0, y0, x1, y1 = (float(edge) for edge in box_4)
    map_mxm = np.asarray(mask_mxm, np.float32)
    rows, y_RxM = _reads(y0, y1, map_mxm.shape[0], size[0])
    columns, x_CxM = _reads(x0, x1, map_mxm.shape[1], size[1])
    if rows.start < rows.stop and columns.start < columns.stop:
        out[rows, columns] = y_RxM @ map_mxm @ x_CxM.T >= 0.5
    return out


def _reads(low: float, high: float, cells: int, length: int) -> tuple[slice, np.ndarray]:
    """(pixels near a box along one axis, weights [pixels, cells] of their bilinear samples). Any
    other pixel reads less than half of a cell, so its value is below 0.5."""
    first = min(max(int(np.floor(low)) - 1, 0), length)
    last = min(max(int(np.ceil(high)) + 1, first), length)
    centre = np.arange(first, last, dtype=np.float32) + np.float32(0.5)
    at = (centre - np.float32(low)) / np.float32(high - low) * cells - np.float32(0.5)
    hats = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(cells, dtype=np.float32)))
    return slice(first, last), hats


def original_detections(
    outputs: Mapping[str, np.ndarray],
    *,
    content: tuple[float, float],
    size: tuple[int, int],
) -> ImageDetections:
    """Returns detections of a model on one resized and padded image, in pixels of the original
    image.

    Boxes are scaled by size / content, clipped to the image, and dropped if they are empty then;
    masks are pasted into the image.

    Args:
      outputs: of one image: boxes [D, 4], scores [D], classes [D]; may have valid [D] (rows that
        count) and masks [D, m, m] (probabilities in the frame of the box), or mask_logits [D, h, w]
        of the padded input and mask_stride, from which boxes are then made, too.
      content: (height, width) of the resized image without its padding.
      size: (height, width) of the original image.

    >>> outputs = {"boxes": np.array([[0., 0, 4, 4], [9, 9, 9, 12]])}
    >>> outputs |= {"scores": np.array([.9, .8]), "classes": np.array([1, 0])}
    >>> original_detections(outputs, content=(8, 8), size=(16, 24)).boxes.tolist()
    [[0.0, 0.0, 12.0, 8.0]]
    """
    height, width = size
    ratio = np.array([width / content[1], height / content[0]] * 2, np.float32)
    boxes = np.asarray(outputs["boxes"], np.float32) * ratio
    boxes = np.clip(boxes, 0, np.array([width, height] * 2, np.float32))
    keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    if "valid" in outputs:
        keep &= np.asarray(outputs["valid"], bool)
    masks = None
    if "mask_logits" in outputs:
        inner = (int(content[0]), int(content[1]))
        boxes, keep, masks = _masks_of_logits(outputs, keep, inner, size)
    elif "masks" in outputs:
        masks = [
            mask_to_rle(paste_mask(outputs["masks"][row], boxes[row], size))
            for row in np.flatnonzero(keep)
        ]
    return ImageDetections(
        boxes=boxes[keep],
        scores=np.asarray(outputs["scores"], np.float32)[keep],
        classes=np.asarray(outputs["classes"], np.int64)[keep],
        masks=masks,
    )


def _masks_of_logits(
    outputs: Mapping[str, np.ndarray],
    keep: np.ndarray,
    content: tuple[int, int],
    size: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray, list[Rle]]:
    """The boxes around masks at the size of the image, which detections have pixels, and these."""
    boxes, keep, masks = np.zeros((len(keep), 4), np.float32), keep.copy(), []
    stride = int(outputs["mask_stride"])
    for row in np.flatnonzero(keep):
        mask = resized_mask(outputs["mask_logits"][row], stride, content=content, size=size)
        boxes[row] = segmentations.tight_box(mask)
        keep[row] = mask.any()
        if keep[row]:
            masks.append(mask_to_rle(mask))
    return boxes, keep, masks


def to_xywh(boxes_Nx4: np.ndarray) -> list[list[float]]:
    """Returns boxes x0 y0 x1 y1 as COCO's x, y, width, height.

    >>> to_xywh(np.array([[1.0, 2.0, 4.0, 6.0]]))
    [[1.0, 2.0, 3.0, 4.0]]
    """
    boxes = np.asarray(boxes_Nx4, np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()


def json_detections(
    results: Iterable[DetectionResult], categories: CategoryTable, kind: str
) -> list[dict[str, Any]]:
    """Returns detections in the form that COCO's and LVIS's own tools read, with the ids of the
    annotation file, sorted by image.

    Entries of masks have no box: with one, pycocotools takes the areas of the boxes, and AP by size
    is that of boxes.

    Args:
      results: of all images.
      categories: of the data set.
      kind: "bbox" or "segm".
    """
    rows = []
    for result in sort_results(results):
        found = result.found
        shapes: Sequence[Any] = to_xywh(found.boxes) if kind == "bbox" else found.masks or []
        name = "bbox" if kind == "bbox" else "segmentation"
        rows += [
            {
                "image_id": result.image,
                "category_id": categories.original(label),
                name: shape,
                "score": score,
            }
            for label, shape, score in zip(
                found.classes.tolist(), shapes, found.scores.tolist(), strict=True
            )
        ]
    return rows


def sort_results(results: Iterable[DetectionResult]) -> list[DetectionResult]:
    """Returns results in the order of their image ids, so that no number depends on the hosts.

    Raises:
      ValueError: an image occurs twice.
    """
    rows = sorted(results, key=lambda result: (isinstance(result.image, str), result.image))
    for a, b in zip(rows, rows[1:], strict=False):
        if a.image == b.image:
            raise ValueError(f"image {a.image!r} was evaluated twice")
    return rows


def gather_results(results: Sequence[DetectionResult]) -> list[DetectionResult]:
    """Returns the results of all hosts, on every host, sorted by image; a collective."""
    own = zlib.compress(json.dumps([_pack(result) for result in results]).encode(), 1)
    rows = [
        _unpack(row)
        for content in parallel.gather_bytes("detections", own)
        for row in json.loads(zlib.decompress(content))
    ]
    return sort_results(rows)


def _pack(result: DetectionResult) -> dict[str, Any]:
    return {
        part: {
            field.name: value.tolist() if isinstance(value, np.ndarray) else value
            for field in dataclasses.fields(each)
            for value in [getattr(each, field.name)]
        }
        for part, each in (("truth", result.truth), ("found", result.found))
    }


def _unpack(row: dict[str, Any]) -> DetectionResult:
    def arrays(part: dict[str, Any]) -> dict[str, Any]:
        count = len(part["classes"])
        return part | {
            name: np.array(part[name], dtype).reshape(count, *shape)
            for name, dtype, shape in _ARRAYS
            if name in part
        }

    truth, found = arrays(row["truth"]), arrays(row["found"])
    truth |= {name: tuple(truth[name]) for name in ("size", "negative", "not_exhaustive")}
    return DetectionResult(ImageTruth(**truth), ImageDetections(**found))


# as of annotations: boxes decide ties
_ARRAYS: tuple[tuple[str, Any, tuple[int, ...]], ...] = (
    ("boxes", np.float64, (4,)),
    ("scores", np.float64, ()),
    ("classes", np.int64, ()),
    ("crowd", bool, ()),
    ("area", np.float64, ()),
)


@functools.lru_cache(maxsize=64)
def axis_weights(cells: int, stride: int, content: int, size: int) -> np.ndarray:
    """Returns weights [size, cells] from the cells of an axis to the pixels of the original image.

    >>> axis_weights(2, 1, 2, 4).tolist()
    [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """
    up = _bilinear_weights(cells, cells * stride)[:content]
    weights = (_bilinear_weights(content, size) @ up).astype(np.float32)
    weights.flags.writeable = False
    return weights


def _bilinear_weights(size: int, out: int) -> np.ndarray:
    """Weights [out, size] of bilinear resizing without a wider filter, aligned at the borders."""
    place = np.clip((np.arange(out) + 0.5) * (size / out) - 0.5, 0, size - 1)
    low = np.floor(place).astype(np.int64)
    weights = np.zeros((out, size))
    np.add.at(weights, (np.arange(out), low), 1 - (place - low))
    np.add.at(weights, (np.arange(out), np.minimum(low + 1, size - 1)), place - low)
    return weights


def resized_mask(
    logits_hxw: np.ndarray, stride: int, *, content: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """Returns a mask at the size of the original image, bool [H, W].

    Args:
      logits_hxw: of the padded input, at that stride.
      stride: pixels of the input per cell.
      content: (height, width) of the input without its padding.
      size: (height, width) of the original image.

    >>> resized_mask(np.array([[-1.0, 1.0]]), 1, content=(1, 2), size=(1, 4)).tolist()
    [[False, False, True, True]]
    """
    out = np.zeros(size, bool)
    used = logits_hxw > 0
    if not used.any():
        return out
    pixels, cells, weights = [], [], []
    for axis in (0, 1):
        all_weights = axis_weights(logits_hxw.shape[axis], stride, content[axis], size[axis])
        reached = (all_weights[:, used.any(1 - axis)] > 0).any(1)
        rows = np.flatnonzero(reached)
        if not len(rows):
            return out  # only in the padding
        pixels.append(slice(rows[0], rows[-1] + 1))
        read = np.flatnonzero((all_weights[pixels[axis]] > 0).any(0))
        cells.append(slice(read[0], read[-1] + 1))
        weights.append(all_weights[pixels[axis], cells[axis]])
    values = weights[0] @ logits_hxw[cells[0], cells[1]].astype(np.float32) @ weights[1].T
    out[pixels[0], pixels[1]] = values > 0
    return out
