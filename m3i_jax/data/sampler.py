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

from m3i_jax.objective import masks

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 8


def hash64(*words: int | np.ndarray) -> np.ndarray:
    """Hashes integers to 64 bits, element by element: SplitMix64's finaliser, one word absorbed a
    turn.

    Args:
        *words: integers or integer arrays that broadcast against each other.

    Returns:
        uint64 array of the broadcast shape, at least one-dimensional.

    >>> hash64(1, 2).tolist() == hash64(1, 2).tolist(), hash64(1, 2).tolist() == hash64(2, 1).tolist()
    (True, False)
    """
    h = np.zeros(1, np.uint64)  # arrays wrap in silence, NumPy scalars would warn
    for word in words:
        h = h + _GOLDEN + np.asarray(word).astype(np.uint64)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h = h ^ (h >> np.uint64(31))
    return h


def permute(index: np.ndarray, size: np.ndarray | int, key: np.ndarray) -> np.ndarray:
    """Element `index` of a keyed permutation of 0..size-1, in constant time and memory.

    A Feistel network on an a x b grid of at least `size` cells (a = ceil(sqrt(size))); the few
    results beyond `size` walk on until they fall inside (Black and Rogaway, "Ciphers with arbitrary
    finite domains", cycle walking).

    Args:
        index: [R] integers in 0..size-1.
        size: elements, one number or [R].
        key: [R] or [1] uint64.

    Returns:
        int64 [R].

    >>> sorted(permute(np.arange(10), 10, hash64(7)).tolist()) == list(range(10))
    True
    """
    wide = [np.asarray(x).astype(np.uint64) for x in (index, size, key)]
    i, n, k = (np.array(x) for x in np.broadcast_arrays(*wide))
    a = np.ceil(np.sqrt(n.astype(np.float64))).astype(np.uint64)
    b, todo = (n + a - np.uint64(1)) // a, np.arange(i.size)
    while todo.size:
        rows, columns, keys = a[todo], b[todo], k[todo]
        left, right = i[todo] // columns, i[todo] % columns
        for turn in range(_ROUNDS):
            left, right = right, (left + hash64(keys, turn, right)) % rows
            rows, columns = columns, rows
        i[todo] = left * columns + right
        todo = todo[i[todo] >= n[todo]]
    return i.astype(np.int64)


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
    return permute(rank, size, hash64(seed, masks.RECORD, 0, epoch, attempt))


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
    slot = permute(slot, int(ends[-1]), hash64(seed, masks.CYCLE, cycle))
    source = np.searchsorted(ends, slot, side="right")
    share = np.asarray(parts, np.int64)[source]
    turn = cycle * share + slot - (ends[source] - share)  # how often the source had its turn before
    epoch, rank = np.divmod(turn, lengths[source])
    return source, permute(
        rank, lengths[source], hash64(seed, masks.RECORD, source, epoch, attempt)
    )


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
