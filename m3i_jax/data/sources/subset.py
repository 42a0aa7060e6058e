"""A part of a source as a source, and the parts that a hash of the keys decides on."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from m3i_jax.data.sources import captions
from m3i_jax.data.sources.digests import stable_digest
from m3i_jax.data.sources.interface import (
    DataSource,
    Record,
    map_classes,
    object_table,
    read_items,
    source_key,
    source_key_hashes,
)
from m3i_jax.data.sources.objects import ObjectTable


class SubsetSource:
    """A subset of a source, with the same classes: record i of the subset is record `indices[i]` of
    the source."""

    def __init__(self, source: DataSource, indices: np.ndarray, subset: str, identity: str) -> None:
        self.source, self.indices, self.subset, self._identity = source, indices, subset, identity
        self.name, self.classes, self.captions = (
            f"{source.name} ({subset})",
            source.classes,
            source.captions,
        )
        self.map_classes = map_classes(source)
        self.names_its_classes = bool(getattr(source, "names_its_classes", False))
        self.class_ids: tuple[str, ...] = getattr(source, "class_ids", ())
        weights = getattr(source, "record_weights", None)  # see `sampler.records_at`
        self.record_weights: np.ndarray | None = None if weights is None else weights[indices]

    def __getstate__(self) -> dict[str, Any]:
        # A worker process draws by the cumulative weights alone.
        state = self.__dict__.copy()
        if state.get("record_weights") is not None:
            state["cumulative_weights"] = self.cumulative_weights
            del state["record_weights"]
        return state

    @functools.cached_property
    def cumulative_weights(self) -> np.ndarray | None:
        return None if self.record_weights is None else np.cumsum(self.record_weights)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.source[int(self.indices[index])]

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        return read_items(self.source, self.indices[np.asarray(indices, np.int64)].tolist())

    def key(self, index: int) -> str:
        return source_key(self.source, int(self.indices[index]))

    def key_hashes(self) -> np.ndarray:
        return source_key_hashes(self.source)[self.indices]

    def caption(self, index: int) -> str | bytes | None:
        return captions.source_caption(self.source, int(self.indices[index]))

    def caption_list(self, index: int) -> tuple[str | bytes, ...]:
        return captions.source_captions(self.source, int(self.indices[index]))

    def object_table(self) -> ObjectTable | None:
        table = object_table(self.source)
        return table.subset(self.indices) if table else None

    def fingerprint(self) -> str:
        return stable_digest(self.source.fingerprint(), self._identity)

    def description(self) -> str:
        return f"{len(self):,} of {self.source.description()} ({self.subset})"


def split_by_hash(source: DataSource, holdout: float, part: str) -> DataSource:
    """Returns the training or the held-out part of a source, chosen by a hash of each record's key.

    Adding images moves none of the others to another part, and equal keys stay together.

    Args:
        source: to split; a mixture is split source by source.
        holdout: share of the records to hold out, 0..1.
        part: "train" or "held_out".

    Raises:
        ValueError: `part` is neither.

    >>> class Ten:
    ...     name, classes, captions = "ten", (), False
    ...     def __len__(self): return 10
    ...     def __getitem__(self, i): return Record(str(i), b"")
    >>> [len(split_by_hash(Ten(), 0.3, part)) for part in ("train", "held_out")]
    [7, 3]
    """
    if part not in ("train", "held_out"):
        raise ValueError(f"part must be 'train' or 'held_out', not {part!r}")
    # the weights of a mixture then hold for each part
    if split_sources := getattr(source, "part", None):
        return split_sources(holdout, part)
    held_out = source_key_hashes(source) / 2.0**64 < holdout
    # 442 million records: 1.8 GB instead of 3.5
    index_type = np.uint32 if len(source) < 1 << 32 else np.int64
    indices = np.flatnonzero(held_out == (part == "held_out")).astype(index_type)
    return SubsetSource(source, indices, part, f"{part} {holdout!r}")
