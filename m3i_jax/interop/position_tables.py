"""Position tables of other projects for another grid: the cells by `positions.resized`, a row for
cls as it is."""

import numpy as np

from m3i_jax.objective import positions


def resize_position_table(table_1xRxD: np.ndarray, grid: int, *, cls: bool) -> np.ndarray:
    """A position table for another grid and with, or without, a row for cls in front.

    Args:
      table_1xRxD: of a square grid, R = G * G or, with a row for cls, G * G + 1.
      grid: cells a side of the result.
      cls: whether the result has a row for cls. It is copied; where there was none it is zero.

    Returns:
      float32 [1, grid * grid + cls, D].

    Raises:
      ValueError: rows that are no square grid, with or without cls.

    >>> resize_position_table(np.ones((1, 5, 3)), 4, cls=True).shape, resize_position_table(np.ones((1, 4, 3)), 2, cls=True)[0, :2, 0].tolist()
    ((1, 17, 3), [0.0, 1.0])
    """
    rows, width = table_1xRxD.shape[1:]
    old = table_grid(rows)
    had = rows - old * old
    first = (
        np.asarray(table_1xRxD[:, :had], np.float32) if had else np.zeros((1, 1, width), np.float32)
    )
    cells = positions.resized(np.asarray(table_1xRxD[0, had:], np.float32), grid)[None]
    return np.concatenate([first, cells], 1) if cls else cells


def table_grid(rows: int) -> int:
    """Cells a side of a table with so many rows, cls among them or not.

    >>> table_grid(197), table_grid(196)
    (14, 14)
    """
    for count in (rows, rows - 1):
        side = round(count**0.5)
        if side > 0 and side * side == count:
            return side
    raise ValueError(f"a position table of {rows} rows is of no square grid")
