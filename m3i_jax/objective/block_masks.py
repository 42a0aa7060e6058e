"""Masks whose visible cells are one block: those of I-JEPA, with several blocks to predict that it
does not show, and those of CAPI. Drawn on the host, in numpy alone, as pure functions of (seed,
stream position)."""

import numpy as np

from m3i_jax.objective import rng

MOST_BLOCKS = 16
_TILT = 2 * np.log(2.0)  # CAPI: the aspect ratio is log-uniform in 1/2 .. 2
_WIDTH = 4 * (MOST_BLOCKS + 1)  # uniform numbers of a sample: shape, place and end of each block


def block_cells(grid: int, share: float) -> int:
    """Number of cells of a target block: `share` of the grid, at least one.

    >>> block_cells(14, 0.175)
    34
    """
    return max(1, round(share * grid * grid))


def inverse_block(seed: int, first: int, rows: int, *, grid: int, hidden: int) -> np.ndarray:
    """Masks that show one block of cells, which goes on at the other side where it leaves the grid,
    so that every cell is visible equally often (CAPI).

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
    tall = np.sqrt(count * np.exp((u[:, 0] - 0.5) * _TILT))
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
    """Masks that show part of one large block, and target blocks that it does not show (I-JEPA).

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
    u = rng.uniforms(seed, rng.BLOCKS, first, rows, _WIDTH)
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
