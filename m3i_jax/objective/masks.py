"""Draws masks on the host, in numpy alone: which cells of an input show which image, the mask m of
M3I section 3.4.

True = the cell shows the row's own image (i), False = the partner's (j). Every row has exactly
`hidden` False cells, so that shapes on the device are static. Masks are blockwise (BEiT's
generator, as M3I's Table 7 asks), uniform, or show one block: those of I-JEPA, with several blocks
to predict that they do not show, and those of CAPI.

A mask is a pure function of (seed, stream position of the sample), see `rng`: a sample has the same
mask on any number of hosts and workers and after any restart, and another one every epoch."""

import math

import numpy as np

from m3i_jax.objective import rng
from m3i_jax.objective.rng import MASK, SWAP, TOPUP, UNIFORM, random_words, uniforms

_U64 = np.uint64
_TRIES = 32  # tries that one part of a stream holds: 99 masks in 100 need no second part
_AHEAD = 4  # tries looked at together; only the speed depends on it
# rectangles in a row that did not fit, before single cells fill what is missing (BEiT)
_GIVE_UP = 10
_TILT = math.log(1 / 0.3)  # the aspect ratio of a rectangle is log-uniform in 0.3 .. 1 / 0.3 (BEiT)
_CELL = _U64(4095)  # low bits of a sort key that hold the cell: 64 x 64 at most
MOST_BLOCKS = 16
_CAPI_TILT = 2 * np.log(2.0)  # CAPI: the aspect ratio is log-uniform in 1/2 .. 2
# uniform numbers of a sample: shape, place and end of each block
_BLOCK_WIDTH = 4 * (MOST_BLOCKS + 1)


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
    """Returns masks of uniformly drawn cells with an exact count (MAE's random masking).

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
    """Returns the same masks on a grid of smaller patches: a cell becomes `factor` x `factor` of
    them (SimMIM's cells of 32 pixels).

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


def block_cells(grid: int, share: float) -> int:
    """Returns the number of cells of a target block: `share` of the grid, at least one.

    >>> block_cells(14, 0.175)
    34
    """
    return max(1, round(share * grid * grid))


def inverse_block(seed: int, first: int, rows: int, *, grid: int, hidden: int) -> np.ndarray:
    """Returns masks that show one block of cells, which goes on at the other side where it leaves
    the grid, so that every cell is visible equally often (CAPI).

    The block is a rectangle, of an aspect ratio that is log-uniform in 1/2..2 as far as the grid
    has room, at a uniform place; its last row is cut to the count.

    Args:
      seed: of the run, 0 <= seed < 2^64.
      first: stream position of the first row, >= 0.
      rows: number of samples.
      grid: cells a side.
      hidden: cells that are not shown, 0..grid^2 - 1.

    Returns:
      bool [rows, grid * grid], row-major cells, True = visible; exactly `hidden` False a row.

    Raises:
      ValueError: a number out of its range.

    Source: Darcet et al. 2025, "Cluster and Predict Latent Patches for Improved Masked Image
    Modeling", section 3; facebookresearch/capi.

    >>> for row in inverse_block(0, 5, 1, grid=5, hidden=18)[0].reshape(5, 5):
    ...     print("".join("-#"[int(cell)] for cell in row))
    -----
    -####
    -###-
    -----
    -----
    """
    count = grid * grid - hidden
    if not 0 <= hidden < grid * grid:
        raise ValueError(f"hidden is {hidden} of {grid * grid} cells; one cell must be visible")
    u = rng.uniforms(seed, rng.BLOCKS, first, rows, 3)
    tall = np.sqrt(count * np.exp((u[:, 0] - 0.5) * _CAPI_TILT))
    height = np.rint(tall).astype(np.int64).clip(-(-count // grid), min(grid, count))
    width = -(-count // height)[:, None]
    top, left = ((u[:, k] * grid).astype(np.int64)[:, None] for k in (1, 2))
    inside = np.arange(count)
    row, column = (top + inside // width) % grid, (left + inside % width) % grid
    mask = np.zeros((rows, grid * grid), bool)
    np.put_along_axis(mask, row * grid + column, True, axis=1)
    return mask


def multi_block(
    seed: int,
    first: int,
    rows: int,
    *,
    grid: int,
    hidden: int,
    blocks: int = 4,
    share: float = 0.175,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns masks that show part of one large block, and target blocks that it does not show
    (I-JEPA).

    A target block has `block_cells` cells: a rectangle of aspect ratio 3/4 to 3/2 at a uniform
    place, cut to the count in its last or first row. The context is a square of 85 to 100 % of the
    grid at a uniform place, without the cells of any target block; it is cut to `grid^2 - hidden`
    cells from its first or its last row, as a coin says. Where it has fewer, other cells that no
    target block has complete it. So all shapes are static, and each row depends on its position
    alone; in the public code, sizes are drawn once for a batch and the smallest context cuts all
    others.

    Args:
      seed: of the run, 0 <= seed < 2^64.
      first: stream position of the first row, >= 0.
      rows: number of samples.
      grid: cells a side.
      hidden: cells that are not shown; at least `blocks` times `block_cells`.
      blocks: target blocks of an image, 1..16.
      share: area of a target block as a share of the grid; I-JEPA draws 0.15 to 0.2.

    Returns:
      (bool [rows, grid * grid], row-major cells, True = visible; int32 [rows, blocks, K], the cells
      of each target block, ascending).

    Raises:
      ValueError: a number out of its range, or target blocks that leave too few cells to show.

    Source: Assran et al. 2023, "Self-Supervised Learning from Images with a Joint-Embedding
    Predictive Architecture", section 3 and appendix A.1.

    >>> mask, cells = multi_block(0, 0, 2, grid=8, hidden=48)
    >>> mask.sum(1).tolist(), cells.shape
    ([16, 16], (2, 4, 11))
    >>> bool(np.take_along_axis(mask, cells.reshape(2, -1), 1).any())
    False
    """
    count = block_cells(grid, share)
    if not 1 <= blocks <= MOST_BLOCKS:
        raise ValueError(f"blocks is {blocks}; an image has 1..{MOST_BLOCKS} target blocks")
    if not blocks * count <= hidden < grid * grid:
        raise ValueError(
            f"hidden is {hidden} of {grid * grid} cells; {blocks} target blocks of {count} need at"
            f" least {blocks * count}, and one cell must be visible"
        )
    u = rng.uniforms(seed, rng.BLOCKS, first, rows, _BLOCK_WIDTH)
    of_blocks = u[:, : 4 * blocks].reshape(rows, blocks, 4)
    tall = np.sqrt(count * (0.75 + 0.75 * of_blocks[..., 0]))
    height = np.rint(tall).astype(np.int64).clip(-(-count // grid), min(grid, count))
    width = -(-count // height)
    top = (of_blocks[..., 1] * (grid - height + 1)).astype(np.int64)
    left = (of_blocks[..., 2] * (grid - width + 1)).astype(np.int64)
    inside = np.arange(count)
    row, column = inside // width[..., None], inside % width[..., None]
    cells = (top[..., None] + row) * grid + left[..., None] + column
    turned = grid * grid - 1 - cells[..., ::-1]  # by 180 degrees, so that no corner is left out
    cells = np.where(of_blocks[..., 3:] < 0.5, cells, turned)

    of_context = u[:, 4 * MOST_BLOCKS :]
    side = np.rint(grid * np.sqrt(0.85 + 0.15 * of_context[:, 0])).astype(np.int64)
    top, left = ((of_context[:, k] * (grid - side + 1)).astype(np.int64) for k in (1, 2))
    y, x = (axis.ravel() for axis in np.indices((grid, grid)))
    in_context = (
        (y >= top[:, None])
        & (y < (top + side)[:, None])
        & (x >= left[:, None])
        & (x < (left + side)[:, None])
    )
    in_target = np.zeros((rows, grid * grid), bool)
    np.put_along_axis(in_target, cells.reshape(rows, -1), True, axis=1)
    order = np.where(of_context[:, 3:4] < 0.5, np.arange(grid * grid), np.arange(grid * grid)[::-1])
    # the context in order, then the other cells that no block has, then the blocks
    rank = order + grid * grid * (2 * in_target + ~(in_context | in_target))
    mask = np.zeros((rows, grid * grid), bool)
    chosen = np.argsort(rank, axis=1)[:, : grid * grid - hidden]
    np.put_along_axis(mask, chosen, True, axis=1)
    return mask, cells.astype(np.int32)
