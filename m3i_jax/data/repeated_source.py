"""A source whose images of rare categories come more often in the stream, by LVIS's repeat
factors."""

import numpy as np

from m3i_jax.data import repeat_factors
from m3i_jax.data.sources import base
from m3i_jax.data.sources.base import DataSource
from m3i_jax.errors import UserError


class RepeatedSource(base.SubsetSource):
    """The records of a source, of which record i is at a share of the positions of the stream in
    proportion to `factors[i]`, times its weight in the source if it has one."""

    def __init__(self, source: DataSource, factors: np.ndarray, part: str) -> None:
        super().__init__(source, np.arange(len(source)), part, part)
        self.factors = factors
        self._ends = np.cumsum(
            factors if self.record_weights is None else factors * self.record_weights
        )

    def locate(self, seed: int, positions: np.ndarray, attempt: int = 0) -> np.ndarray:
        """Returns the record at each position of the stream, int64 [R]; see
        `repeat_factors.records_at_weighted`."""
        return repeat_factors.records_at_weighted(self._ends, seed, positions, attempt)


def repeat_rare(source: DataSource, threshold: float) -> RepeatedSource:
    """Returns a source with repeat factors of its objects, crowds not counted.

    Args:
        source: records with objects.
        threshold: share of the images from which a category is not rare; LVIS: 0.001.

    Raises:
        UserError: the source has no table of its objects, or is a mixture, whose order is its own.

    >>> from m3i_jax.data.sources.scenes import ScenesSource
    >>> source = repeat_rare(ScenesSource(100), 0.5)
    >>> source.factors.min().item(), source.factors.max().round(3).item()
    (1.0, 1.961)
    """
    table = base.object_table(source)
    if table is None or hasattr(source, "locate"):
        why = "has no table of objects" if table is None else "orders its records itself"
        raise UserError(
            f"dense.geometry.repeat={threshold}: {source.name} {why}: set it to 0, or use"
            " data.source='coco'"
        )
    count, classes = len(source), len(source.classes)
    records, labels = table.records[~table.crowd], table.classes[~table.crowd]
    ends = np.cumsum(np.bincount(records, minlength=count))
    lists = np.split(labels, ends[:-1])
    shares = table.records_per_class(classes) / max(count, 1)
    factors = repeat_factors.repeat_factors(shares, lists, threshold)
    more = int((factors > 1).sum())
    part = f"{more:,} images of rare categories are repeated, threshold {threshold}"
    return RepeatedSource(source, factors, part)
