"""Which cells of a mixed input show which image: the mask m of M3I section 3.4, drawn on the host,
in numpy alone.

True = the cell shows the row's own image (i), False = the partner's (j). Every row has exactly
`hidden` False cells, so that shapes on the device are static. Masks are blockwise (BEiT's
generator, as M3I's Table 7 asks) or uniform.

A mask is a pure function of (seed, stream position of the sample), see `rng`: a sample has the same
mask on any number of hosts and workers and after any restart, and another one every epoch."""

import math

import numpy as np

from m3i_jax.objective.rng import MASK, SWAP, TOPUP, UNIFORM, random_words, uniforms

_U64 = np.uint64
_TRIES = 32  # tries that one part of a stream holds: 99 masks in 100 need no second part
_AHEAD = 4  # tries looked at together; only the speed depends on it
# rectangles in a row that did not fit, before single cells fill what is missing (BEiT)
_GIVE_UP = 10
_TILT = math.log(1 / 0.3)  # the aspect ratio of a rectangle is log-uniform in 0.3 .. 1 / 0.3 (BEiT)
_CELL = _U64(4095)  # low bits of a sort key that hold the cell: 64 x 64 at most


def blockwise(
    seed: int,
    first: int,
    rows: int,
    *,
    grid: int,
    hidden: int,
    min_block: int | None = None,
    swap: bool = True,
) -> np.ndarray:
    """Blockwise masks with an exact count: rectangles until full, then single cells (BEiT;
    SiameseIM for the exact count).

    While cells are missing, draw a rectangle whose area is uniform between `min_block` and the
    number that is missing, whose aspect ratio is log-uniform in 0.3..1/0.3 and whose position is
    uniform; take it if it is smaller than the grid in both directions and hides at least one new
    cell and not too many. After ten failures in a row, uniformly drawn single cells make up the
    count (in three masks of ten, usually one to three cells).

    Rectangles prefer the centre: of 98 of 14 x 14 cells, the four in the middle are hidden in 86 %
    of the masks, a corner in 7 %. Therefore, if exactly half of the cells is hidden, the roles are
    swapped with probability 1/2, sample by sample: every cell then shows either image equally
    often.

    Args:
      seed: of the run, 0 <= seed < 2^64.
      first: stream position of the first row, >= 0.
      rows: number of samples.
      grid: cells a side, 1..64.
      hidden: number of cells that show the partner, 0..grid^2; 98 of 14 x 14 in the paper
        ("blockwise", 50 %).
      min_block: smallest area of a rectangle; None: BEiT's 16 of 196 cells, scaled to the grid.
      swap: False leaves the roles as drawn also at one half.

    Returns:
      bool [rows, grid * grid], row-major cells, True = own; exactly `hidden` False a row.

    Raises:
      ValueError: a number out of its range.

    >>> mask = blockwise(seed=0, first=0, rows=2, grid=6, hidden=18)
    >>> (~mask).sum(1).tolist()
    [18, 18]
    >>> for row in mask[1].reshape(6, 6):
    ...     print("".join("-#"[int(cell)] for cell in row))
    ######
    -#####
    -##---
    -#----
    ##----
    ##----
    """
    _check(grid, hidden)
    if min_block is not None and min_block < 1:
        raise ValueError(f"min_block is {min_block}; a rectangle has at least 1 cell")
    cells, count = _rectangles(
        seed, first, rows, grid, hidden, min_block or max(1, round(16 * grid * grid / 196))
    )
    mask = (
        (cells[:, :, None] >> np.arange(grid).astype(_U64) & _U64(1))
        .astype(bool)
        .reshape(rows, grid * grid)
    )
    short = np.flatnonzero(count < hidden)
    if short.size:
        missing = hidden - count[short]
        cell = _shuffled(seed, TOPUP, first, rows, mask, short)[:, : missing.max()]
        mask[short[:, None], cell] |= np.arange(cell.shape[1]) < missing[:, None]
    if swap and 2 * hidden == grid * grid:
        return mask ^ (uniforms(seed, SWAP, first, rows, 1) < 0.5)
    return ~mask


def _rectangles(
    seed: int, first: int, rows: int, grid: int, hidden: int, least: int
) -> tuple[np.ndarray, np.ndarray]:
    """(uint64 [rows, grid], a bit a cell; int [rows], cells a row): rectangles alone, for all
    unfinished masks at a time.

    A mask takes its tries in the order of its stream. `_AHEAD` of them are computed together and
    the first that fits is taken: the next one starts behind it, so what is drawn is what one try
    after the other would draw."""
    cells, state = np.zeros((rows, grid), _U64), np.zeros((3, rows), np.int64)
    count, used, failures = state
    line, ahead, live = np.arange(grid), np.arange(_AHEAD), np.arange(rows if hidden else 0)
    tries = np.empty((rows, 0, 4))
    while live.size:
        if used[live].max() + _AHEAD > tries.shape[1]:
            more = uniforms(
                seed, MASK, first, rows, 4 * _TRIES, part=tries.shape[1] // _TRIES
            ).reshape(rows, _TRIES, 4)
            tries = np.concatenate([tries, more], 1)
        area_u, tilt_u, top_u, left_u = np.moveaxis(
            tries[live[:, None], used[live, None] + ahead], 2, 0
        )
        room = hidden - count[live, None]
        # Where less is missing than the smallest block, the range of areas runs backwards, as in
        # BEiT: blocks up to the smallest.
        side, tall = np.sqrt(least + area_u * (room - least)), np.exp((tilt_u - 0.5) * _TILT)
        height, width = np.rint(side * tall).astype(np.int64), np.rint(side / tall).astype(np.int64)
        fits = (height < grid) & (width < grid)
        top = (top_u * (grid - height + 1)).astype(np.int64)
        left = (left_u * (grid - width + 1)).astype(np.int64)
        # A word is a row of the grid: a rectangle is an OR of equal words, its new cells a
        # population count.
        word = ((_U64(1) << np.where(fits, width, 0).astype(_U64)) - _U64(1)) << np.where(
            fits, left, 0
        ).astype(_U64)
        below = line - top[..., None]
        fresh = ((below >= 0) & (below < height[..., None])) * word[..., None] & ~cells[live, None]
        new = np.bitwise_count(fresh).sum(-1, dtype=np.int64)
        good = (new > 0) & (new <= room) & (failures[live, None] + ahead < _GIVE_UP)
        row, pick = np.arange(live.size), good.argmax(1)
        hit = good[row, pick]
        cells[live] |= fresh[row, pick] * hit[:, None]
        count[live] += new[row, pick] * hit
        used[live] += np.where(hit, pick + 1, _AHEAD)
        failures[live] = (failures[live] + _AHEAD) * ~hit
        live = live[(count[live] < hidden) & (failures[live] < _GIVE_UP)]
    return cells, count


def _shuffled(
    seed: int, purpose: int, first: int, rows: int, taken: np.ndarray, which: np.ndarray
) -> np.ndarray:
    """int [which, cells]: a random order of the cells of some rows, those already taken last. Sorts
    words whose low bits are the cell."""
    size = taken.shape[1]
    words = random_words(seed, purpose, first, rows, size)[which]
    keys = words & ~(_CELL | _U64(1 << 63)) | np.arange(size).astype(_U64)
    ordered = np.sort(keys | taken[which].astype(_U64) << _U64(63), axis=1)
    return np.asarray(ordered & _CELL, np.int64)


def uniform(seed: int, first: int, rows: int, *, grid: int, hidden: int) -> np.ndarray:
    """Masks of uniformly drawn cells with an exact count (MAE's random masking).

    Args:
      seed: of the run, 0 <= seed < 2^64.
      first: stream position of the first row, >= 0.
      rows: number of samples.
      grid: cells a side, 1..64.
      hidden: number of cells that show the partner, 0..grid^2.

    Returns:
      bool [rows, grid * grid], row-major cells, True = own; exactly `hidden` False a row.

    Raises:
      ValueError: a number out of its range.

    >>> mask = uniform(seed=0, first=0, rows=3, grid=4, hidden=6)
    >>> mask.shape, (~mask).sum(1).tolist()
    ((3, 16), [6, 6, 6])
    """
    _check(grid, hidden)
    mask = np.ones((rows, grid * grid), bool)
    order = _shuffled(seed, UNIFORM, first, rows, ~mask, np.arange(rows))
    np.put_along_axis(mask, order[:, :hidden], False, axis=1)
    return mask


def upsample_masks(mask: np.ndarray, factor: int) -> np.ndarray:
    """The same masks on a grid of smaller patches: a cell becomes `factor` x `factor` of them
    (SimMIM's cells of 32 pixels).

    Args:
      mask: bool [rows, G * G], row-major cells.
      factor: patches a side of a cell.

    Returns:
      bool [rows, (G * factor)^2].

    >>> mask = upsample_masks(np.array([[True, False, False, True]]), 2)[0]
    >>> mask.reshape(4, 4).astype(int).tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    """
    if factor == 1:
        return mask
    grid = math.isqrt(mask.shape[1])
    return mask.reshape(-1, grid, grid).repeat(factor, 1).repeat(factor, 2).reshape(len(mask), -1)


def _check(grid: int, hidden: int) -> None:
    if not 1 <= grid <= 64:
        raise ValueError(f"grid is {grid}; it must lie in 1..64: a row of cells is one 64-bit word")
    if not 0 <= hidden <= grid * grid:
        raise ValueError(
            f"hidden is {hidden}; a grid of {grid} x {grid} has 0..{grid * grid} cells to hide"
        )
