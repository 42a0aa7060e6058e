"""Position tables of other projects, resized to another grid by `positions.resized`; the row for
cls is kept."""

import numpy as np

from m3i_jax.objective import positions


def resize_position_table(table_1xRxD: np.ndarray, grid: int, *, cls: bool) -> np.ndarray:
    """A position table for another grid, with or without a first row for cls.

    Args:
      table_1xRxD: table of a square grid, R = G * G or, with a row for cls, G * G + 1.
      grid: cells a side of the result.
      cls: whether the result has a row for cls: copied from the table, or zeros.

    Returns:
      float32 [1, grid * grid + cls, D].

    Raises:
      ValueError: the number of rows is not that of a square grid, with or without cls.

    >>> resize_position_table(np.ones((1, 5, 3)), 4, cls=True).shape
    (1, 17, 3)
    >>> resize_position_table(np.ones((1, 4, 3)), 2, cls=True)[0, :2, 0].tolist()
    [0.0, 1.0]
    """
    rows, width = table_1xRxD.shape[1:]
    old = table_grid(rows)
    cls_rows = rows - old * old
    first = np.zeros((1, 1, width), np.float32)
    if cls_rows:
        first = np.asarray(table_1xRxD[:, :cls_rows], np.float32)
    cells = positions.resized(np.asarray(table_1xRxD[0, cls_rows:], np.float32), grid)[None]
    return np.concatenate([first, cells], 1) if cls else cells


def table_grid(rows: int) -> int:
    """Cells a side of a table with this number of rows, with or without one for cls.

    >>> table_grid(197), table_grid(196)
    (14, 14)
    """
    for count in (rows, rows - 1):
        side = round(count**0.5)
        if side > 0 and side * side == count:
            return side
    raise ValueError(f"a position table of {rows} rows is not that of a square grid")
