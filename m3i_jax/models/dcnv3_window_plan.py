"""Sizes of the kernel of `dcnv3_windows`: blocks of outputs, and chunks and windows of the map.

B batch, O output cells."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from m3i_jax.parallel.chips import LEAST_SCRATCHPAD

LANES = 128
ALIGNED = 16  # columns of a tile of bfloat16 in memory
_BYTES = LEAST_SCRATCHPAD * 3 // 4  # of VMEM; the rest covers what is not counted


class WindowPlan(NamedTuple):
    """Static sizes of a kernel.

    Attributes:
      size: rows and columns of the map.
      depth: channels of a group.
      groups: groups side by side in the lanes of a block; all of them.
      out: rows and columns of the output; one row where it is not a map.
      block, tile: outputs of a block and of a tile, in rows and columns.
      chunk, window: cells of a chunk and of a window, in rows and columns.
    """

    size: tuple[int, int]
    depth: int
    groups: tuple[int, int]
    out: tuple[int, int]
    block: tuple[int, int]
    tile: tuple[int, int]
    chunk: tuple[int, int]
    window: tuple[int, int]

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and columns of the map in whole tiles of memory."""
        return self.size[0], _up(self.size[1], ALIGNED)

    @property
    def lanes(self) -> int:
        return self.groups[0] * self.depth

    @property
    def lane_blocks(self) -> int:
        return -(-self.groups[1] // self.groups[0])

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks of the output, down and over."""
        return -(-self.out[0] // self.block[0]), -(-self.out[1] // self.block[1])

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles of a block, down and over."""
        return self.block[0] // self.tile[0], self.block[1] // self.tile[1]

    @property
    def outputs(self) -> int:
        """Outputs of all blocks."""
        return math.prod(self.grid) * math.prod(self.block)

    @property
    def cells(self) -> int:
        """Cells of a window."""
        return math.prod(self.window)

    def by_tile(self, a_BxOxN: Any) -> Any:
        """An array [B, O, ...] in the order of blocks and tiles, where the output is a map; with
        zeros for outputs that fill the blocks, or if it is numpy's, copies of the last ones."""
        if self.out[0] == 1:
            return a_BxOxN
        (b, _, *rest), (down, over) = a_BxOxN.shape, self.grid
        (i, j), (high, broad) = self.tiles, self.tile
        more = [
            (0, n * size - out)
            for n, size, out in zip(self.grid, self.block, self.out, strict=True)
        ]
        cells = a_BxOxN.reshape(b, *self.out, -1)
        if any(n for _, n in more):
            width = ((0, 0), *more, (0, 0))
            constants = isinstance(cells, np.ndarray)
            cells = np.pad(cells, width, mode="edge") if constants else jnp.pad(cells, width)
        split = cells.reshape(b, down, i, high, over, j, broad, -1)
        return split.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, -1, *rest)

    def bytes(self, points: int, itemsize: int) -> int:
        """VMEM of the backward pass."""
        lanes, padded = -(-self.lanes // LANES) * LANES, points + -points % 8
        outputs, cells = math.prod(self.block), math.prod(self.chunk)
        samples = 6 * 2 * 4 * self.groups[0] * padded * outputs  # six arrays, double buffered
        gradient = (2 * itemsize + 4) * outputs * lanes
        chunks = (2 * itemsize + 4) * cells * lanes
        return samples + gradient + chunks + 4 * LANES * (self.cells + 3 * points * self.window[1])


def _up(n: int, step: int) -> int:
    return n + -n % step


def _side_by_side(groups: int, depth: int) -> int:
    """Groups in the lanes of a block: as many as fill them, or all."""
    if groups * depth <= LANES or (LANES % depth and depth % LANES):
        return groups
    return max(1, LANES // depth)


def plan_windows(
    size: tuple[int, int], out: int, columns: int, groups: int, depth: int, points: int, dtype: Any
) -> WindowPlan | None:
    """The sizes for a map, or None where VMEM cannot hold them.

    Args:
      size: rows and columns of the map.
      out: number of outputs.
      columns: of them in a row where neighbours sample neighbours; 0 where they have no order.
      groups, depth: groups of all channels, and channels of one.
      points: samples of an output in a group.
      dtype: of the map.

    >>> plan = plan_windows((304, 504), 304 * 504, 504, 10, 32, 9, jnp.bfloat16)
    >>> plan.block, plan.tile, plan.chunk, plan.window
    ((16, 64), (4, 32), (24, 96), (4, 48))
    """
    height, width = size[0], _up(size[1], ALIGNED)
    tile, window = ((4, 32), (4, 48)) if columns else ((1, LANES), (2, 80))
    shape = (out // columns, columns) if columns else (1, out)
    window = min(window[0], height), min(window[1], width)
    for outputs, cells in ((1024, 2304), (512, 1536), (256, 1024), (128, 512)):
        wide = (64 if outputs > 128 else 32) if columns else outputs
        block = min(outputs // wide, _up(shape[0], tile[0])), min(wide, _up(shape[1], tile[1]))
        across = min(width, 96 if columns else 256)
        chunk = max(window[0], min(height, cells // across)), across
        plan = WindowPlan(
            size,
            depth,
            (_side_by_side(groups, depth), groups),
            shape,
            block,
            tile,
            chunk,
            window,
        )
        if plan.bytes(points, jnp.dtype(dtype).itemsize) <= _BYTES:
            return plan
    return None


def supports(groups: int, depth: int, points: int, dtype: Any, *, is_map: bool = True) -> bool:
    """Whether the kernel takes this type, and VMEM this many groups side by side.

    Args:
      groups, depth, points, dtype: as of `plan_windows`.
      is_map: whether the output is a map; of one without an order, windows are wider.

    >>> supports(10, 32, 9, jnp.bfloat16), supports(10, 32, 9, jnp.float16)
    (True, False)
    """
    types = jnp.bfloat16, jnp.float32
    large = (2**15, 2**15), 2**30, 2**15 * is_map  # every large map has the same sizes
    return dtype in types and plan_windows(*large, groups, depth, points, dtype) is not None
