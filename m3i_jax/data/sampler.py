"""Maps stream positions to records in closed form, so a restart at any position, on any number of
hosts, replays nothing.

Every epoch is a keyed permutation of the source. A bad record is replaced by another draw, whose
key contains the number of the attempt: the replacement depends on the position alone, not on what a
worker read before.

A mixture of sources is a cycle of slots: source s owns shares[s] of them, and every cycle permutes
them anew. The number of slots of a source before a position, and with it the epoch and the record,
is therefore a closed form too."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from m3i_jax.data import repeat_factors
from m3i_jax.objective.rng import CYCLE, RECORD, hash64, permute


def sample_index(seed: int, positions: np.ndarray, size: int, attempt: int = 0) -> np.ndarray:
    """Returns the record at each position of the stream over a source of `size` records. Every
    epoch visits each record once.

    Args:
        seed: of the run.
        positions: [R] stream positions, in samples.
        size: records of the source.
        attempt: number of draws for this position that were refused.

    Returns:
        int64 [R], indices of records.

    >>> first = sample_index(0, np.arange(6), 6)
    >>> sorted(first.tolist()), sample_index(0, np.arange(3, 6), 6).tolist() == first[3:].tolist()
    ([0, 1, 2, 3, 4, 5], True)
    """
    epoch, rank = np.divmod(np.asarray(positions, np.int64), size)
    return permute(rank, size, hash64(seed, RECORD, 0, epoch, attempt))


def sample_mixture_index(
    seed: int,
    positions: np.ndarray,
    sizes: Sequence[int],
    shares: Sequence[int],
    attempt: int = 0,
    weights: Sequence[np.ndarray | None] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the source and the record at each position of a mixture. A replacement is drawn from
    the same source.

    Args:
        seed: of the run.
        positions: [R] stream positions, in samples.
        sizes: records of each source.
        shares: whole numbers; source s gives shares[s] of every sum(shares) samples.
        attempt: number of draws for this position that were refused.
        weights: of each source the cumulative weights of its records, or None; see
            `repeat_factors.records_at_weighted`.

    Returns:
        (source, record), int64 [R] each. With one source, the records are those of `sample_index`.

    >>> source, record = sample_mixture_index(0, np.arange(8), [100, 2], [3, 1])
    >>> np.bincount(source).tolist(), np.bincount(source[:4]).tolist()
    ([6, 2], [3, 1])
    >>> sorted(record[source == 1].tolist())
    [0, 1]
    """
    ends, lengths = np.cumsum(np.asarray(shares, np.int64)), np.asarray(sizes, np.int64)
    cycle, slot = np.divmod(np.asarray(positions, np.int64), ends[-1])
    slot = permute(slot, int(ends[-1]), hash64(seed, CYCLE, cycle))
    source = np.searchsorted(ends, slot, side="right")
    share = np.asarray(shares, np.int64)[source]
    count = cycle * share + slot - (ends[source] - share)  # samples of this source before this one
    epoch, rank = np.divmod(count, lengths[source])
    record = permute(rank, lengths[source], hash64(seed, RECORD, source, epoch, attempt))
    for number, cumulative in enumerate(weights):
        if cumulative is not None and (rows := source == number).any():
            record[rows] = repeat_factors.records_at_weighted(
                cumulative, seed, count[rows], attempt, number
            )
    return source, record


def records_at(source: Any, seed: int, positions: np.ndarray, attempt: int = 0) -> np.ndarray:
    """Returns the record of a source at each position of the stream: `source.locate` of a mixture,
    by the weights of its records if it has them, else `sample_index`.

    >>> records_at("abc", 0, np.arange(3)).tolist() == sample_index(0, np.arange(3), 3).tolist()
    True
    """
    if locate := getattr(source, "locate", None):
        return locate(seed, positions, attempt)
    if (ends := getattr(source, "cumulative_weights", None)) is not None:
        return repeat_factors.records_at_weighted(ends, seed, positions, attempt)
    return sample_index(seed, positions, len(source), attempt)


def spread_records(size: int, limit: int) -> list[int]:
    """Returns at most `limit` of `size` records, ascending: one drawn from each of as many equal
    parts of the source, always the same ones. A constant stride would leave out classes of a source
    that lists its classes in turn.

    >>> spread_records(3, 4), [record // 5 for record in spread_records(20, 4)]
    ([0, 1, 2], [0, 1, 2, 3])
    """
    count = min(limit, size)
    ends = np.arange(count + 1, dtype=np.int64) * size // max(count, 1)
    offset = hash64(0, RECORD, np.arange(count)) % np.diff(ends).astype(np.uint64)
    return (ends[:-1] + offset.astype(np.int64)).tolist()


def epoch_size(source: Any) -> int:
    """Returns the number of samples of an epoch of a source: of its records, or the sum of their
    weights, rounded up; of a mixture the sum of those of its sources.

    >>> epoch_size("abc")
    3
    """
    if (size := getattr(source, "epoch_size", None)) is not None:
        return int(size)
    ends = getattr(source, "cumulative_weights", None)
    return len(source) if ends is None else repeat_factors.weighted_epoch_size(ends)
