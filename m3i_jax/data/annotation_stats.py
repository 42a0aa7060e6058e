"""Statistics of annotated records: objects per image, their sizes and classes, crowds, masks;
shares of the classes and of unlabelled pixels of maps. Values that JSON can hold."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from m3i_jax import schema
from m3i_jax.data.annotated_batches import open_annotated, open_map_image
from m3i_jax.data.decode_map import UNLABELLED, decode_map
from m3i_jax.data.sources import base, segmentations

SMALL, LARGE = 32**2, 96**2  # pixels; COCO's limits of small and large objects
PER_IMAGE = (0, 1, 2, 3, 5, 8, 11, 21, 51, 101, 301)  # objects, lower edges
# side of a square of the same area in pixels, lower edges
OBJECT_SIDES = (0, 8, 16, 32, 64, 96, 128, 256, 512)
RARE, COMMON = 10, 100  # most images that show a rare, a common class (LVIS)


@dataclasses.dataclass(frozen=True, slots=True)
class AnnotationInfo:
    """The annotations of one record.

    classes, areas, without_mask: of its objects, crowds not counted, and how many have no mask;
    classes is None if its source annotates none. crowds, damaged: numbers of crowds, of masks that
    cannot be decoded. pixels: int64 [256], pixels of the map by class, 255 unlabelled; None without
    a map."""

    classes: np.ndarray | None = None
    areas: np.ndarray | None = None
    crowds: int = 0
    without_mask: int = 0
    damaged: int = 0
    pixels: np.ndarray | None = None


def inspect_annotations(record: base.Record, map_classes: int = 0) -> AnnotationInfo | None:
    """Decodes the annotations of a record as the builders of batches do; None if it has none.

    Args:
        record: whose image can be opened.
        map_classes: number of classes of its map.

    Raises:
        BadRecord: the annotations are those of an image of another size, or the map cannot be used.

    >>> import numpy as np
    >>> record = base.Record("a", np.zeros((20, 20, 3), np.uint8), map=np.zeros((20, 20), np.uint8))
    >>> inspect_annotations(record, 1).pixels[0].item()
    400
    """
    objects, pixels = record.objects, None
    if record.map is not None:
        map_HxW = decode_map(record.map, map_classes)
        open_map_image(record, (map_HxW.shape[0], map_HxW.shape[1]))
        pixels = np.bincount(map_HxW.ravel(), minlength=UNLABELLED + 1)
    if objects is None:
        return None if pixels is None else AnnotationInfo(pixels=pixels)
    opened, _ = open_annotated(record, objects.size)
    damaged = 0
    for segmentation in objects.segmentations:
        if isinstance(segmentation, segmentations.RunLengths):
            try:
                segmentations.decode_mask(segmentation, opened.height, opened.width)
            except ValueError:
                damaged += 1
    solid = ~objects.crowd
    return AnnotationInfo(
        objects.classes[solid],
        objects.areas[solid],
        int(objects.crowd.sum()),
        sum(s is None for s in objects.select(solid).segmentations),
        damaged,
        pixels,
    )


def annotation_stats(
    infos: Sequence[AnnotationInfo],
    *,
    classes: Sequence[str],
    map_classes: Sequence[str],
    geometry: schema.Geometry,
) -> dict[str, Any]:
    """Computes the statistics of the annotations of usable records.

    Args:
        infos: of the records.
        classes: names of the classes of objects.
        map_classes: names of the classes of maps.
        geometry: its `max_objects` says which objects a batch cuts.

    Returns:
        "objects" and "maps"; each {} if no record has such annotations.

    >>> info = AnnotationInfo(np.array([0, 0]), np.array([100.0, 5000.0]), crowds=1)
    >>> rule = schema.Geometry()
    >>> stats = annotation_stats([info], classes=("cat",), map_classes=(), geometry=rule)
    >>> stats["objects"]["sizes"], stats["objects"]["table"], stats["maps"]
    ([('small', 1), ('medium', 1), ('large', 0)], [('cat', 2, 1)], {})
    """
    return {
        "objects": _objects([i for i in infos if i.classes is not None], classes, geometry),
        "maps": _maps([i.pixels for i in infos if i.pixels is not None], map_classes),
    }


def _objects(
    infos: Sequence[AnnotationInfo], names: Sequence[str], geometry: schema.Geometry
) -> dict[str, Any]:
    if not infos:
        return {}
    lists = [i.classes for i in infos if i.classes is not None]
    counts = np.array([len(c) for c in lists])
    areas = np.concatenate([i.areas for i in infos if i.areas is not None])
    labels = np.concatenate(lists).astype(np.int64)
    objects = np.bincount(labels, minlength=len(names))
    images = np.bincount(
        np.concatenate([np.unique(c) for c in lists]).astype(np.int64), minlength=len(names)
    )
    rows = sorted(
        zip(names, objects.tolist(), images.tolist(), strict=False), key=lambda row: -row[1]
    )
    over = np.maximum(counts - geometry.max_objects, 0)
    return {
        "images": len(infos),
        "without_object": int((counts == 0).sum()),
        "objects": int(counts.sum()),
        "mean": round(float(counts.mean()), 2),
        "most": int(counts.max()),
        "per_image": _bars(counts, PER_IMAGE),
        "crowds": sum(i.crowds for i in infos),
        "without_mask": sum(i.without_mask for i in infos),
        "damaged": sum(i.damaged for i in infos),
        "sizes": [
            ("small", int((areas < SMALL).sum())),
            ("medium", int(((areas >= SMALL) & (areas < LARGE)).sum())),
            ("large", int((areas >= LARGE).sum())),
        ],
        "sides": _bars(np.sqrt(areas), OBJECT_SIDES),
        "max_objects": geometry.max_objects,
        "images_over": int((over > 0).sum()),
        "objects_over": int(over.sum()),
        "table": rows,
        "empty": [name for name, number, _ in rows if not number],
        "rare": int(((images > 0) & (images <= RARE)).sum()),
        "common": int(((images > RARE) & (images <= COMMON)).sum()),
        "frequent": int((images > COMMON).sum()),
    }


def _maps(pixels: Sequence[np.ndarray], names: Sequence[str]) -> dict[str, Any]:
    if not pixels:
        return {}
    counts_NxC = np.stack(pixels)
    total, unlabelled = counts_NxC.sum(1), counts_NxC[:, UNLABELLED]
    labelled = counts_NxC[:, : len(names)]
    share = labelled.sum(0) / max(int(labelled.sum()), 1)
    shown = (labelled > 0).sum(0)
    rows = sorted(
        zip(names, [round(float(s), 6) for s in share], shown.tolist(), strict=True),
        key=lambda row: -row[1],
    )
    return {
        "images": len(pixels),
        "unlabelled": round(float(unlabelled.sum() / max(int(total.sum()), 1)), 6),
        "all_unlabelled": int((unlabelled == total).sum()),
        "classes_per_image": round(float((labelled > 0).sum(1).mean()), 2),
        "one_class": int(((labelled > 0).sum(1) == 1).sum()),
        "table": rows,
        "empty": [name for name, _, number in rows if not number],
    }


def _bars(values: np.ndarray, edges: Sequence[int]) -> list[tuple[str, int]]:
    """Counts values between edges, without the empty bins at both ends."""
    bins = np.bincount(np.searchsorted(edges, values, "right") - 1, minlength=len(edges))
    names = [
        str(low) if high == low + 1 else f"{low}-{high - 1}"
        for low, high in zip(edges[:-1], edges[1:], strict=True)
    ] + [f"{edges[-1]} and more"]
    used = np.flatnonzero(bins)
    if not len(used):
        return []
    return list(zip(names, bins.tolist(), strict=True))[used[0] : used[-1] + 1]
