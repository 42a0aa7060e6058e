"""Which record stands at which position of the stream: a closed form, so a restart anywhere, on any
number of hosts, replays nothing.

Every epoch is its own keyed permutation of the source. A record that cannot be used is replaced by
drawing again under a key that holds the number of the attempt: the replacement depends on the
position alone, never on what a worker happened to read before.

A mixture of sources is a cycle of slots: source s owns parts[s] of them, and every cycle deals them
out in another order. How often a source had its turn before a position is therefore arithmetic too,
and with it the epoch and the record."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from m3i_jax.objective.rng import CYCLE, RECORD, hash64, permute


def sample_index(seed: int, positions: np.ndarray, size: int, attempt: int = 0) -> np.ndarray:
    """The record at each position of the stream over a source of `size` records; every epoch visits
    each record once.

    Args:
        seed: of the run.
        positions: [R] samples seen before the wanted one.
        size: records of the source.
        attempt: 0, or how often a draw for this position was refused already.

    Returns:
        int64 [R], indices of records.

    >>> first = sample_index(0, np.arange(6), 6)
    >>> sorted(first.tolist()), sample_index(0, np.arange(3, 6), 6).tolist() == first[3:].tolist()
    ([0, 1, 2, 3, 4, 5], True)
    """
    epoch, rank = np.divmod(np.asarray(positions, np.int64), size)
    return permute(rank, size, hash64(seed, RECORD, 0, epoch, attempt))


def sample_mixture_index(
    seed: int, positions: np.ndarray, sizes: Sequence[int], parts: Sequence[int], attempt: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The source and the record at each position of a mixture; a replacement is drawn from the same
    source.

    Args:
        seed: of the run.
        positions: [R] samples seen before the wanted one.
        sizes: records of each source.
        parts: whole numbers; source s gives parts[s] of every sum(parts) samples.
        attempt: 0, or how often a draw for this position was refused already.

    Returns:
        (source, record), int64 [R] each. With one source, the records are those of `sample_index`.

    >>> source, record = sample_mixture_index(0, np.arange(8), [100, 2], [3, 1])
    >>> np.bincount(source).tolist(), np.bincount(source[:4]).tolist(), sorted(record[source == 1].tolist())
    ([6, 2], [3, 1], [0, 1])
    """
    ends, lengths = np.cumsum(np.asarray(parts, np.int64)), np.asarray(sizes, np.int64)
    cycle, slot = np.divmod(np.asarray(positions, np.int64), ends[-1])
    slot = permute(slot, int(ends[-1]), hash64(seed, CYCLE, cycle))
    source = np.searchsorted(ends, slot, side="right")
    share = np.asarray(parts, np.int64)[source]
    turn = cycle * share + slot - (ends[source] - share)  # how often the source had its turn before
    epoch, rank = np.divmod(turn, lengths[source])
    return source, permute(rank, lengths[source], hash64(seed, RECORD, source, epoch, attempt))


def records_at(source: Any, seed: int, positions: np.ndarray, attempt: int = 0) -> np.ndarray:
    """The record of a source at each position of the stream: a mixture has an order of its own, all
    else that of `sample_index`.

    >>> records_at("abc", 0, np.arange(3)).tolist() == sample_index(0, np.arange(3), 3).tolist()
    True
    """
    own = getattr(source, "locate", None)
    return (
        own(seed, positions, attempt)
        if own
        else sample_index(seed, positions, len(source), attempt)
    )
