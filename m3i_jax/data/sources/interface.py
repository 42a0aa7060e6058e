"""The interface of a data source, and what asks a source for the optional parts of it.

A source has random access: it knows how many records it holds and reads any of them. It decodes no
image. Sources hold paths and small arrays and never an open file, so they can be pickled to worker
processes. What a source ignores (hidden files, links out of its folder, damaged members) is counted
and listed in its description."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from m3i_jax.data.sources.digests import key_hash
from m3i_jax.data.sources.objects import Objects, ObjectTable


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One record as the source holds it.

    key: identifies the record in its source. image: encoded bytes, or RGB uint8 [height, width, 3].
    label: category, -1 if unknown. caption: None if absent. objects: None if the source annotates
    none. map: class of each pixel, 255 where unknown: a PNG, or uint8 [height, width].
    other_captions: further captions, which only the evaluation of retrieval reads."""

    key: str
    image: bytes | np.ndarray
    label: int = -1
    caption: str | bytes | None = None
    objects: Objects | None = dataclasses.field(default=None, repr=False)
    map: bytes | np.ndarray | None = dataclasses.field(default=None, repr=False)
    other_captions: tuple[str | bytes, ...] = dataclasses.field(default=(), repr=False)


@runtime_checkable
class DataSource(Protocol):
    """The methods and attributes that every source has.

    classes: names of the categories, by label. captions: whether any record has one. fingerprint():
    changes when the records or their order do.

    Optional, for speed: `__getitems__(indices)`, `key(i)`, `key_hashes()`, `caption(i)`, and if
    records have several, `caption_list(i)`; functions fall back to `__getitem__`. `extents()`: what
    the records are read from, [(file or directory, first record, end)]; two splits that share
    records are refused. `caption_digest()`: changes when captions do, of a source whose
    `fingerprint()` may not. Annotated sources: `object_table()`, `map_classes`, and for the
    tables of an evaluation `category_ids` and `frequencies`. Sources of sources: `identity()`,
    `part(holdout, part)`, `locate(seed, positions, attempt)`, `record_weights`,
    `cumulative_weights` and `epoch_size`, where an epoch has another number of samples than
    records. `names_its_classes`: see `registry.SourceKind`.
    `drop_single_class()` is called unless the source is a held-out split."""

    @property
    def name(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def captions(self) -> bool: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Record: ...
    def fingerprint(self) -> str: ...
    def description(self) -> str: ...


def read_items(source: DataSource, indices: Sequence[int]) -> list[Record]:
    """Reads several records, in one call if the source has `__getitems__`.

    >>> read_items(["a", "b", "c"], [2, 0])
    ['c', 'a']
    """
    read_batch = getattr(source, "__getitems__", None)
    return list(read_batch(indices)) if read_batch else [source[i] for i in indices]


def source_key(source: DataSource, index: int) -> str:
    """Returns the key of a record without reading it, or its index if the source has no `key`.

    >>> source_key(["a"], 0)
    '0'
    """
    key = getattr(source, "key", None)
    return key(index) if key else str(index)


def object_table(source: DataSource) -> ObjectTable | None:
    """Returns all annotated objects of a source, or None if it annotates none.

    >>> object_table([Record("a", b"")]) is None
    True
    """
    table = getattr(source, "object_table", None)
    return table() if table else None


def map_classes(source: DataSource) -> tuple[str, ...]:
    """Returns the names of the classes of a source's maps; () if it has no maps.

    >>> import types
    >>> map_classes(types.SimpleNamespace(map_classes=("sky",))), map_classes([])
    (('sky',), ())
    """
    return getattr(source, "map_classes", ())


def inner_sources(source: DataSource) -> list[DataSource]:
    """Returns the sources that a mixture, or a part of a source, is made of; [] for others.

    >>> import types
    >>> inner_sources(types.SimpleNamespace(source="one")), inner_sources([])
    (['one'], [])
    """
    inner = getattr(source, "source", None)
    return [*getattr(source, "sources", ()), *([] if inner is None else [inner])]


def source_key_hashes(source: DataSource) -> np.ndarray:
    """Returns `key_hash` of every key, uint64 [N].

    >>> int(source_key_hashes(["a"])[0]) == key_hash("0")
    True
    """
    if key_hashes := getattr(source, "key_hashes", None):
        return key_hashes()
    keys = (source_key(source, i) for i in range(len(source)))
    return np.fromiter(map(key_hash, keys), np.uint64, len(source))


def source_identity(source: DataSource) -> list[str]:
    """Describes a source for `data.txt`: name, number of images, fingerprint; a mixture has one
    line per source.

    >>> class Five:
    ...     name = "five"
    ...     def __len__(self): return 5
    ...     def fingerprint(self): return "0123456789abcdef"
    >>> source_identity(Five())
    ['five, 5 images, fingerprint 0123456789abcdef']
    """
    if identity := getattr(source, "identity", None):
        return identity()
    return [f"{source.name}, {len(source):,} images, fingerprint {source.fingerprint()}"]


def current_identity(text: str) -> str:
    """The text of a data.txt in today's words: version 0.1 has another word for images.

    >>> current_identity("source 1 = five, 5 pictures, fingerprint 0123456789abcdef")
    'source 1 = five, 5 images, fingerprint 0123456789abcdef'
    """
    return text.replace(" pictures, fingerprint ", " images, fingerprint ")
