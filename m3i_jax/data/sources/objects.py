"""The annotated objects of an image."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from m3i_jax.data.sources.segmentations import Segmentation


def _none() -> np.ndarray:
    return np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True, slots=True)
class Objects:
    """n annotated objects of an image, with their masks still encoded.

    Attributes:
        boxes: float32 [n, 4], x0 y0 x1 y1 in continuous pixels of the image.
        classes: int32 [n], indices into the classes of the source.
        crowd: bool [n], whether a box is around many objects of a class, which no detection is
            wrong in.
        segmentations: of each object, or None where it has no mask.
        areas: float64 [n], pixels of the object as the annotation states them, else of its box.
        ids: int64 [n], of the annotations in their file.
        size: (height, width) of the image as the annotation states it; (0, 0) if it does not.
        image: id of the image in its file, -1 if it has none.
        negative: int32, LVIS: classes that the image is known not to show.
        inexhaustive: int32, LVIS: classes of which not every object is annotated.
    """

    boxes: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray
    segmentations: Sequence[Segmentation | None]
    areas: np.ndarray
    ids: np.ndarray
    size: tuple[int, int] = (0, 0)
    image: int = -1
    negative: np.ndarray = dataclasses.field(default_factory=_none)
    inexhaustive: np.ndarray = dataclasses.field(default_factory=_none)

    def __len__(self) -> int:
        return len(self.boxes)

    def select(self, keep: np.ndarray) -> "Objects":
        """Returns the objects of a bool mask or of indices, in that order.

        >>> empty_objects().select(np.zeros(0, bool)).boxes.shape
        (0, 4)
        """
        numbers = np.arange(len(self))[keep]
        return dataclasses.replace(
            self,
            boxes=self.boxes[numbers],
            classes=self.classes[numbers],
            crowd=self.crowd[numbers],
            segmentations=tuple(self.segmentations[i] for i in numbers.tolist()),
            areas=self.areas[numbers],
            ids=self.ids[numbers],
        )

    def relabel(self, table: np.ndarray) -> "Objects":
        """Returns the objects with class c replaced by `table[c]`; those of -1 are left out.

        >>> len(empty_objects().relabel(np.array([1, -1])))
        0
        """
        table = np.asarray(table, np.int32)
        kept = self.select(table[self.classes] >= 0)
        negative, inexhaustive = (table[c] for c in (self.negative, self.inexhaustive))
        return dataclasses.replace(
            kept,
            classes=table[kept.classes],
            negative=negative[negative >= 0],
            inexhaustive=inexhaustive[inexhaustive >= 0],
        )


def empty_objects(size: tuple[int, int] = (0, 0)) -> Objects:
    """Returns no objects.

    >>> len(empty_objects())
    0
    """
    return Objects(
        np.zeros((0, 4), np.float32),
        np.zeros(0, np.int32),
        np.zeros(0, bool),
        (),
        np.zeros(0, np.float64),
        np.zeros(0, np.int64),
        size,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class ObjectTable:
    """All annotated objects of a source, without their geometry; what `object_table()` of an
    annotated source returns.

    Attributes:
        records: int64 [A], index of the record of each object, ascending.
        classes: int32 [A].
        crowd: bool [A].
        masked: bool [A], whether it has a mask; None: unknown.
    """

    records: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray
    masked: np.ndarray | None = None

    def subset(self, indices: np.ndarray) -> "ObjectTable":
        """Returns the table of the records `indices`, numbered in that order.

        >>> table = ObjectTable(np.array([0, 2, 2]), np.array([5, 6, 7]), np.zeros(3, bool))
        >>> part = table.subset(np.array([2, 1]))
        >>> part.records.tolist(), part.classes.tolist()
        ([0, 0], [6, 7])
        """
        indices = np.asarray(indices, np.int64)
        first = np.searchsorted(self.records, indices, side="left")
        count = np.searchsorted(self.records, indices, side="right") - first
        rows = np.repeat(first - count.cumsum() + count, count) + np.arange(count.sum())
        records = np.repeat(np.arange(len(indices)), count)
        return dataclasses.replace(self._select(rows), records=records)

    def relabel(self, table: np.ndarray) -> "ObjectTable":
        """Returns the objects with class c replaced by `table[c]`; those of -1 are left out."""
        classes = np.asarray(table)[self.classes].astype(np.int32)
        return dataclasses.replace(self, classes=classes)._select(classes >= 0)

    def _select(self, rows: np.ndarray) -> "ObjectTable":
        masked = None if self.masked is None else self.masked[rows]
        return ObjectTable(self.records[rows], self.classes[rows], self.crowd[rows], masked)

    def objects_per_record(self, count: int) -> np.ndarray:
        """Returns the number of objects of each of `count` records, crowds not counted, int64."""
        return np.bincount(self.records[~self.crowd], minlength=count)

    def records_per_class(self, count: int) -> np.ndarray:
        """Returns the number of records that show each of `count` classes, crowds not counted,
        int64.

        >>> table = ObjectTable(np.array([0, 0, 2]), np.array([1, 1, 1]), np.zeros(3, bool))
        >>> table.records_per_class(3).tolist()
        [0, 2, 0]
        """
        solid = ~self.crowd
        pairs = np.unique(self.records[solid] * count + self.classes[solid])
        return np.bincount(pairs % count, minlength=count)
