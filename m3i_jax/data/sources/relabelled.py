"""Sources whose labels, objects or class maps are numbers of another list of classes, as of a
held-out part."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from m3i_jax.data.decode import BadRecord
from m3i_jax.data.decode_map import UNLABELLED, decode_map
from m3i_jax.data.sources import base
from m3i_jax.data.sources.base import DataSource, Record
from m3i_jax.data.sources.captions import source_caption, source_captions
from m3i_jax.data.sources.objects import ObjectTable
from m3i_jax.errors import UserError


class RelabelledSource:
    """A source with its labels renumbered to another list of classes; labels of classes that are
    not in the list become -1.

    Args:
        source: to renumber.
        classes: the new list.
        ids: what identifies the classes of the source, and those of the list; (): their names.
            Readable names depend on which classes a source has: see `readable_class_names`.

    >>> class Two:
    ...     name, classes, captions = "two", ("cat", "eel"), False
    ...     def __len__(self): return 2
    ...     def __getitem__(self, i): return Record(str(i), b"", i)
    >>> source = RelabelledSource(Two(), ("ant", "bee", "cat"))
    >>> [source[i].label for i in range(2)]
    [2, -1]
    """

    def __init__(
        self, source: DataSource, classes: Sequence[str], ids: Sequence[Sequence[str]] = ()
    ) -> None:
        theirs, ours = ids or (source.classes, classes)
        number = {name: i for i, name in enumerate(ours)}
        if base.map_classes(source):
            raise UserError(
                f"{source.name} has class maps of other classes than the training part: give both"
                " the same file of class names (data.class_names)"
            )
        self.source, self.name, self.captions = source, source.name, source.captions
        self.classes = tuple(classes)
        self.class_ids = tuple(ours) if ids else ()
        self._table = np.array([number.get(name, -1) for name in theirs], np.int32)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        return relabel_record(self.source[index], self._table)

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        return [
            relabel_record(record, self._table) for record in base.read_items(self.source, indices)
        ]

    def key(self, index: int) -> str:
        return base.source_key(self.source, index)

    def caption(self, index: int) -> str | bytes | None:
        return source_caption(self.source, index)

    def caption_list(self, index: int) -> tuple[str | bytes, ...]:
        return source_captions(self.source, index)

    def object_table(self) -> ObjectTable | None:
        table = base.object_table(self.source)
        return table.relabel(self._table) if table else None

    def fingerprint(self) -> str:
        return base.stable_digest(self.source.fingerprint(), *self.classes)

    def description(self) -> str:
        return self.source.description()


def relabel_record(record: Record, table: np.ndarray) -> Record:
    """Replaces the label of a record by its entry in the table, or -1 if it has none, and the
    classes of its objects.

    >>> [relabel_record(Record("a", b"", label), np.array([5, 7])).label for label in (1, 2)]
    [7, -1]
    """
    label = int(table[record.label]) if 0 <= record.label < len(table) else -1
    if record.objects is not None:
        record = dataclasses.replace(record, objects=record.objects.relabel(table))
    return record if label == record.label else dataclasses.replace(record, label=label)


class RelabelledMaps(base.SubsetSource):
    """A source with its class maps renumbered to another list of classes, by name; pixels of
    classes that are not in the list become unlabelled.

    Args:
        source: with maps.
        classes: the new list, at most 254.

    Raises:
        UserError: the new list leaves no number for pixels whose class the source lacks.

    >>> class One:
    ...     name, classes, captions, map_classes = "one", (), False, ("sea", "sky", "eel")
    ...     def __len__(self): return 1
    ...     def __getitem__(self, i): return Record("a", b"", map=np.array([[0, 1, 2, 255, 3]]))
    >>> RelabelledMaps(One(), ("sky", "ant", "sea"))[0].map.tolist()  # 3: a class that One lacks
    [[2, 0, 255, 255, 254]]
    """

    def __init__(self, source: DataSource, classes: Sequence[str]) -> None:
        if len(classes) >= UNLABELLED:
            raise UserError(
                f"{source.name}: its class maps cannot be renumbered to {len(classes)} classes, as"
                f" at most {UNLABELLED - 1} leave a number for pixels of unknown classes; give data"
                " with the classes of the run in the same order"
            )
        identity = base.stable_digest("maps of the classes", *classes)
        super().__init__(source, np.arange(len(source)), "classes renumbered", identity)
        theirs, number = base.map_classes(source), {name: i for i, name in enumerate(classes)}
        self.map_classes = tuple(classes)
        # a number without a class stays one, beyond all that a map may have: a bad record
        self._table = np.full(UNLABELLED + 1, UNLABELLED - 1, np.uint8)
        self._table[: len(theirs)] = [number.get(name, UNLABELLED) for name in theirs]
        self._table[UNLABELLED] = UNLABELLED

    def __getitem__(self, index: int) -> Record:
        return self._relabel(super().__getitem__(index))

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        return [self._relabel(record) for record in super().__getitems__(indices)]

    def _relabel(self, record: Record) -> Record:
        if record.map is None:
            return record
        try:
            map_HxW = decode_map(record.map, UNLABELLED)
        except BadRecord:  # the builder of batches finds the same, and counts it
            return record
        return dataclasses.replace(record, map=self._table[map_HxW])
