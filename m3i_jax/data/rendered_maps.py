"""Makes class maps of annotated objects, so that segmentation can be learned from them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from m3i_jax.data import decode
from m3i_jax.data.decode_map import UNLABELLED
from m3i_jax.data.sources import base
from m3i_jax.data.sources.base import DataSource, Record
from m3i_jax.data.sources.objects import Objects
from m3i_jax.data.sources.segmentations import decode_mask
from m3i_jax.errors import UserError

BACKGROUND = "background"  # class 0 of a rendered map


def with_maps(source: DataSource) -> DataSource:
    """Returns a source with maps: itself if it has them, else with maps of its objects.

    Raises:
        UserError: it has neither maps nor objects, or more classes than a map can hold.

    >>> from m3i_jax.data.sources.scenes import ScenesSource
    >>> source = ScenesSource(9)
    >>> with_maps(source) is source
    True
    """
    if base.map_classes(source):
        return source
    if base.object_table(source) is None:
        raise UserError(
            f"{source.name} has neither class maps nor objects: use data.source='maps', 'coco' or"
            " 'scenes' for segmentation"
        )
    if len(source.classes) >= UNLABELLED:
        raise UserError(
            f"{source.name} has {len(source.classes):,} classes, at most {UNLABELLED - 1} fit in a"
            " map beside the background: merge classes, or train detection"
        )
    return RenderedMaps(source)


class RenderedMaps(base.SubsetSource):
    """A source of objects with maps of them: class 0 is the background, class c + 1 the objects of
    class c."""

    def __init__(self, source: DataSource) -> None:
        super().__init__(source, np.arange(len(source)), "objects as maps", "rendered maps")
        self.map_classes = (BACKGROUND, *source.classes)
        if hasattr(source, "locate"):  # a mixture: its shares of the stream
            self.locate = source.locate

    def __getitem__(self, index: int) -> Record:
        return _with_map(super().__getitem__(index))

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        return [_with_map(record) for record in super().__getitems__(indices)]


def _with_map(record: Record) -> Record:
    if record.objects is None:
        return record
    height, width = record.objects.size
    if not height:
        try:
            opened = decode.open_image(record.image)
        except decode.BadRecord:  # the builder finds the same, and counts it
            return record
        height, width = opened.height, opened.width
    map_HxW = render_map(record.objects, height, width)
    return dataclasses.replace(record, map=map_HxW)


def render_map(objects: Objects, height: int, width: int) -> np.ndarray:
    """Returns the map of objects, uint8 [height, width]: 0 where no object is, else the class of
    the smallest object plus 1. Crowds count as their class; the box of an object without a usable
    mask is unlabelled.

    >>> from m3i_jax.data.sources.objects import empty_objects
    >>> render_map(empty_objects(), 1, 2).tolist()
    [[0, 0]]
    """
    map_HxW = np.zeros((height, width), np.uint8)
    for i in np.argsort(-objects.areas, kind="stable").tolist():
        segmentation = objects.segmentations[i]
        try:
            mask = None if segmentation is None else decode_mask(segmentation, height, width)
        except ValueError:
            mask = None
        if mask is not None:
            map_HxW[mask] = objects.classes[i] + 1
            continue
        x0, y0, x1, y1 = objects.boxes[i].clip(0, 1 << 24).tolist()
        map_HxW[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = UNLABELLED
    return map_HxW
