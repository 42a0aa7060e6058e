"""Randomness on the host, in numpy alone: uniform numbers and permutations as pure functions of
(seed, purpose, stream position).

A sample gets the same numbers on any number of hosts and workers and after any restart, and other
numbers every epoch. `uniforms` draws what a sample needs (crops, masks, captions, rendered shapes
and scenes); `hash64` and `permute` order the records."""

import numpy as np

# Purposes: the second word of the key, so that no two uses of randomness share a stream. Each
# purpose has one width (see `uniforms`). The numbers are part of every run: never renumber them.
CROP = 0
MASK = 1
TOPUP = 2
SWAP = 3
CYCLE = 4
RECORD = 5
UNIFORM = 6
CAPTION = 7
SHAPE = 8
SPLIT = 9
COLOR = 10
DROP_PATH = 11
RAND_AUGMENT = 12
SCENE = 13
GEOMETRY = 14
BUCKET = 15
SMALL_CROP = 16
BLOCKS = 17
REGION = 18
SPARE = range(19, 256)
"""Purposes that this project does not use: for projects that import `uniforms`."""

_U64 = np.uint64
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 8  # of the Feistel network


def uniforms(
    seed: int, purpose: int, first: int, rows: int, width: int, *, part: int = 0
) -> np.ndarray:
    """Draws uniform random numbers for consecutive samples; row r is a function of (seed, purpose,
    part, first + r) alone.

    One Philox generator makes all rows: its counter is the stream position times the blocks that a
    sample takes. Numbers of one width are independent. Calls that differ in nothing but the width
    overlap, so give every purpose one width.

    Args:
      seed: of the run, 0 <= seed < 2^64.
      purpose: what the numbers are for, 0 <= purpose < 256: a constant of this module, or one of
        `SPARE`.
      first: stream position of the first row, >= 0.
      rows: number of samples.
      width: numbers per sample.
      part: continues a stream whose length is not known in advance, >= 0.

    Returns:
      float64 [rows, width] in [0, 1), multiples of 2^-53. Every version of numpy gives the same
      numbers, since numpy keeps Philox's stream.

    Raises:
      ValueError: a number is out of its range.

    >>> a = uniforms(0, CROP, first=10, rows=4, width=3)
    >>> b = uniforms(0, CROP, first=12, rows=1, width=3)
    >>> a.shape, bool((a[2] == b[0]).all())
    ((4, 3), True)
    """
    return (random_words(seed, purpose, first, rows, width, part) >> _U64(11)) * 2.0**-53


def random_words(
    seed: int, purpose: int, first: int, rows: int, width: int, part: int = 0
) -> np.ndarray:
    """Draws the uint64 [rows, width] that `uniforms` turns into floats.

    >>> random_words(0, CROP, first=10, rows=4, width=3).dtype
    dtype('uint64')
    """
    if not (
        0 <= seed < 2**64
        and 0 <= purpose < 256
        and first >= 0
        and rows >= 0
        and width >= 1
        and 0 <= part < 2**56
    ):
        raise ValueError(
            f"seed {seed}, purpose {purpose}, first {first}, rows {rows}, width {width}, part"
            f" {part}: a seed is 0..2^64-1, a purpose 0..255, a width at least 1 and the others at"
            " least 0"
        )
    blocks = -(-width // 4)  # Philox makes four words per count
    generator = np.random.Philox(
        key=np.array([seed, purpose + (part << 8)], _U64), counter=int(first) * blocks
    )
    return generator.random_raw(rows * blocks * 4).reshape(rows, blocks * 4)[:, :width]


def hash64(*words: int | np.ndarray) -> np.ndarray:
    """Hashes integers to 64 bits, element by element: SplitMix64's finaliser, which absorbs one
    word per round.

    Args:
        *words: integers or integer arrays that broadcast against each other.

    Returns:
        uint64 array of the broadcast shape, at least one-dimensional.

    >>> [int(hash64(*words)[0]) >> 60 for words in ((1, 2), (1, 2), (2, 1))]
    [11, 11, 14]
    """
    h = np.zeros(1, np.uint64)  # arrays wrap without the warning that NumPy scalars give
    for word in words:
        h = h + _GOLDEN + np.asarray(word).astype(np.uint64)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h = h ^ (h >> np.uint64(31))
    return h


def permute(index: np.ndarray, size: np.ndarray | int, key: np.ndarray) -> np.ndarray:
    """Returns element `index` of a keyed permutation of 0..size-1, in constant time and memory.

    The permutation is a Feistel network on an a x b grid of at least `size` cells
    (a = ceil(sqrt(size))). It is applied again to the few results beyond `size` until they fall
    inside (cycle walking; Black and Rogaway, "Ciphers with arbitrary finite domains").

    Args:
        index: [R] integers in 0..size-1.
        size: elements, one number or [R].
        key: [R] or [1] uint64.

    Returns:
        int64 [R].

    >>> sorted(permute(np.arange(10), 10, hash64(7)).tolist()) == list(range(10))
    True
    """
    words = [np.asarray(x).astype(np.uint64) for x in (index, size, key)]
    i, n, k = (np.array(x) for x in np.broadcast_arrays(*words))
    a = np.ceil(np.sqrt(n.astype(np.float64))).astype(np.uint64)
    b = (n + a - np.uint64(1)) // a
    pending = np.arange(i.size)
    while pending.size:
        rows, columns, keys = a[pending], b[pending], k[pending]
        left, right = i[pending] // columns, i[pending] % columns
        for turn in range(_ROUNDS):
            left, right = right, (left + hash64(keys, turn, right)) % rows
            rows, columns = columns, rows
        i[pending] = left * columns + right
        pending = pending[i[pending] >= n[pending]]
    return i.astype(np.int64)
