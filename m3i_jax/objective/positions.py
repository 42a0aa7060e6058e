"""Position embeddings: the sin-cos table, and target positions relative to the input view, from
which the decoder's queries are made (M3I Fig. 2, SiameseIM).

Boxes are `(top, left, height, width)` in pixels of the un-mirrored image; a view is cropped first
and then, if its flip is set, mirrored. Positions are in patches of the input view from its top-left
corner, so that equal views give exactly 0, 1, 2, ...

B pairs of views, G cells a side, N = G * G positions in row-major order, W width of an embedding, a
multiple of 4.

Each number x is embedded as `[sin(x w_k), cos(x w_k)]` with `w_k = 10000^(-k / (W / 4))`, k =
0..W/4-1; rows come before columns.

Position tables are resized to another grid by `resized`; `resize_position_table` keeps the row for
cls of an encoder's table."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# Factor of the logarithm of a size ratio, which makes ratios near 1 differ as much as neighbouring
# patches.
_SCALE = 10.0


def sincos_2d(grid: int, width: int) -> np.ndarray:
    """Fixed two-dimensional sine-cosine table, row first: `[sin(r w), cos(r w), sin(c w), cos(c
    w)]` (MoCo v3, SiameseIM).

    MAE's table has the two halves exchanged: column first.

    Args:
      grid: cells a side, G.
      width: W, a multiple of 4.

    Returns:
      float32 [G * G, W] numpy array, computed in float64; row-major cells. Tokens without a
      position (cls) use zeros.

    Raises:
      ValueError: a width that is not a positive multiple of 4, or no cells.

    >>> print(sincos_2d(2, 8)[2].round(4))
    [0.8415 0.01   0.5403 1.     0.     0.     1.     1.    ]
    """
    _check(grid, width)
    place_GxH = _embed_numpy(np.arange(grid, dtype=np.float64), width)
    row_GxGxH = np.broadcast_to(place_GxH[:, None], (grid, grid, width // 2))
    return (
        np.concatenate([row_GxGxH, row_GxGxH.swapaxes(0, 1)], -1)
        .reshape(grid * grid, width)
        .astype(np.float32)
    )


def bicubic_weights(old: int, new: int, *, antialias: bool = False) -> np.ndarray:
    """Returns the matrix [new, old] float64 that resizes one axis, as in `resized`.

    >>> bicubic_weights(3, 3).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    if antialias:
        stride = max(old / new, 1.0)
        centre = (np.arange(new) + 0.5) * old / new
        distance = np.abs(np.arange(old) + 0.5 - centre[:, None]) / stride
        near = 1.5 * distance**3 - 2.5 * distance**2 + 1
        far = -0.5 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
        return np.asarray(weights / weights.sum(1, keepdims=True))
    at = (np.arange(new) + 0.5) * old / new - 0.5
    first, weights = np.floor(at).astype(int), np.zeros((new, old))
    for tap in range(-1, 3):
        distance = np.abs(at - (first + tap))
        near = 1.25 * distance**3 - 2.25 * distance**2 + 1
        far = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        np.add.at(
            weights,
            (np.arange(new), np.clip(first + tap, 0, old - 1)),
            np.where(distance <= 1, near, far),
        )
    return weights


def resized(
    table_NxW: np.ndarray, grid: int | tuple[int, int], *, antialias: bool = False
) -> np.ndarray:
    """Returns a square position table resized to another number of cells by bicubic interpolation,
    for images of another size (MAE, DeiT).

    Equal to torch's bicubic: Keys' kernel with a = -0.75, no antialiasing, half-pixel centres and
    repeated borders. With `antialias`, to torch's bicubic with antialiasing: a = -0.5, a kernel as
    wide as a reduction asks for, and weights that sum to 1 inside the table.

    Args:
      table_NxW: one row per cell, row-major.
      grid: cells a side of the result, or its rows and columns.
      antialias: as DINOv2 resizes the learned table of an encoder with registers, and only that.

    Returns:
      float32 [rows * columns, W]; the input table if it already has that grid.

    >>> resized(np.arange(4, dtype=np.float32)[:, None], 2)[:, 0].tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    old = math.isqrt(len(table_NxW))
    rows, columns = grid if isinstance(grid, tuple) else (grid, grid)
    if (rows, columns) == (old, old):
        return table_NxW
    square = table_NxW.astype(np.float64).reshape(old, old, -1)
    weights = [bicubic_weights(old, n, antialias=antialias) for n in (rows, columns)]
    out: np.ndarray = np.einsum("ya,xb,abw->yxw", *weights, square, optimize=True)
    return out.reshape(rows * columns, -1).astype(np.float32)


def same_view_positions(grid: int, width: int) -> np.ndarray:
    """`relative_positions` of equal views: the absolute table, then the embedding of two size
    ratios of 1, zeros and ones.

    It is the same for every image, so the intra-view role needs one array, and one product with the
    decoder's linear layer, per batch.

    Args:
      grid: cells a side, G.
      width: W, a multiple of 4.

    Returns:
      float32 [G * G, 2 W] numpy array.

    Raises:
      ValueError: a width that is not a positive multiple of 4, or no cells.

    >>> raw = same_view_positions(2, 8)
    >>> raw.shape, raw[3, 8:].tolist()
    ((4, 16), [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    """
    table_NxW = sincos_2d(grid, width)
    ratio_W = np.tile(_embed_numpy(np.zeros(1), width)[0], 2).astype(np.float32)
    return np.concatenate([table_NxW, np.broadcast_to(ratio_W, table_NxW.shape)], -1)


def coordinates(
    box_in_Bx4: ArrayLike,
    flip_in_B: ArrayLike,
    box_out_Bx4: ArrayLike,
    flip_out_B: ArrayLike,
    grid: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns rows and columns of the target view's cells in patches of the input view (SiameseIM,
    for crop first and mirror afterwards).

    Args:
      box_in_Bx4: (top, left, height, width) of the input view, pixels of the un-mirrored image;
        height and width > 0.
      flip_in_B: whether the input view was mirrored after cropping.
      box_out_Bx4: box of the target view.
      flip_out_B: whether the target view was mirrored.
      grid: cells a side of both views, G.

    Returns:
      (y [B, G], x [B, G]) float32: y of the target's cell rows, x of its cell columns; cell n of an
      equal view is exactly n. A target outside the input view has coordinates below 0 or above G -
      1; mirrored against it, x falls with the column.

    Raises:
      ValueError: boxes that are not [B, 4] or flips that are not [B].

    >>> import jax.numpy as jnp
    >>> a, b = jnp.array([[10., 20., 100., 120.]]), jnp.array([[40., 200., 200., 150.]])
    >>> no, yes = jnp.array([False]), jnp.array([True])
    >>> y, x = coordinates(a, no, b, no, grid=2)
    >>> print(*(f"{value:.3f}" for value in [*y[0], *x[0]]))
    1.100 3.100 3.125 4.375
    >>> coordinates(a, no, a, yes, grid=2)[1].tolist()
    [[1.0, 0.0]]
    """
    a_Bx4, flip_a_B, b_Bx4, flip_b_B = _views(box_in_Bx4, flip_in_B, box_out_Bx4, flip_out_B)
    centre_G = jnp.arange(grid, dtype=jnp.float32) + 0.5

    def axis_coordinates(axis: int, flips: tuple[jax.Array, jax.Array] | None) -> jax.Array:
        start_a, start_b, size_a, size_b = (
            a_Bx4[:, axis, None],
            b_Bx4[:, axis, None],
            a_Bx4[:, axis + 2, None],
            b_Bx4[:, axis + 2, None],
        )
        step_BxG = jnp.broadcast_to(centre_G, (a_Bx4.shape[0], grid))
        if flips is not None:
            step_BxG = jnp.where(flips[1][:, None], grid - step_BxG, step_BxG)
        # Grid times the distance from the input view's edge, then from its own cell n: exact for
        # integer pixels, and 0 for equal views, which then have no rounding error of the division.
        reach_BxG = grid * (start_b - start_a) + size_b * step_BxG
        if flips is not None:
            reach_BxG = jnp.where(flips[0][:, None], grid * size_a - reach_BxG, reach_BxG)
        return (reach_BxG - size_a * centre_G) / size_a + (centre_G - 0.5)

    return axis_coordinates(0, None), axis_coordinates(1, (flip_a_B, flip_b_B))


def relative_parts(
    box_in_Bx4: ArrayLike,
    flip_in_B: ArrayLike,
    box_out_Bx4: ArrayLike,
    flip_out_B: ArrayLike,
    *,
    grid: int,
    width: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the parts of `relative_positions`: embedded rows, columns and size ratios.

    A linear map of the rows of `relative_positions` is the sum of linear maps of these parts, which
    have G + G + 1 rows instead of G * G.

    Args:
      as for `relative_positions`.

    Returns:
      (row [B, G, W / 2], column [B, G, W / 2], ratio [B, W]) float32, such that position (r, c) of
      `relative_positions` is `concatenate([row[:, r], column[:, c], ratio])`.

    Raises:
      ValueError: as for `relative_positions`.

    >>> import jax.numpy as jnp
    >>> box, flip = jnp.array([[0., 0., 64., 64.]]), jnp.array([False])
    >>> [part.shape for part in relative_parts(box, flip, box, flip, grid=2, width=8)]
    [(1, 2, 4), (1, 2, 4), (1, 8)]
    """
    _check(grid, width)
    y_BxG, x_BxG = coordinates(box_in_Bx4, flip_in_B, box_out_Bx4, flip_out_B, grid)
    a_Bx4, _, b_Bx4, _ = _views(box_in_Bx4, flip_in_B, box_out_Bx4, flip_out_B)
    ratio_Bx2 = _SCALE * jnp.log(b_Bx4[:, 2:] / a_Bx4[:, 2:])
    return _embed(y_BxG, width), _embed(x_BxG, width), _embed(ratio_Bx2, width).reshape(-1, width)


def relative_positions(
    box_in_Bx4: ArrayLike,
    flip_in_B: ArrayLike,
    box_out_Bx4: ArrayLike,
    flip_out_B: ArrayLike,
    *,
    grid: int,
    width: int,
) -> jax.Array:
    """Raw embedding of every target position relative to the input view: offset, scale and
    mirroring (M3I Fig. 2, SiameseIM).

    `[sin(y w), cos(y w), sin(x w), cos(x w), sin(h w), cos(h w), sin(v w), cos(v w)]`, W / 4
    numbers each, with (y, x) from `coordinates` and h, v ten times the natural logarithm of the
    target's height and width over the input's. Mirroring changes only x. A learned linear layer
    2 W -> W maps it to a decoder query.

    Args:
      box_in_Bx4: (top, left, height, width) of the input view, pixels of the un-mirrored image;
        height and width > 0.
      flip_in_B: whether the input view was mirrored after cropping.
      box_out_Bx4: box of the target view.
      flip_out_B: whether the target view was mirrored.
      grid: cells a side, G.
      width: W of the decoder, a multiple of 4.

    Returns:
      float32 [B, G * G, 2 W], row-major target positions. Keep it in float32 up to that
      layer: its phases exceed a hundred.

    Raises:
      ValueError: a width that is not a positive multiple of 4, no cells, boxes that are not [B, 4]
        or flips that are not [B].

    >>> import jax.numpy as jnp
    >>> a, b = jnp.array([[10., 20., 100., 120.]]), jnp.array([[40., 200., 200., 150.]])
    >>> no = jnp.array([False])
    >>> raw = relative_positions(a, no, b, no, grid=2, width=8)
    >>> print(*(f"{x:.4f}" for x in raw[0, 0, :4]))
    0.8912 0.0110 0.4536 0.9999
    """
    row_BxGxH, column_BxGxH, ratio_BxW = relative_parts(
        box_in_Bx4, flip_in_B, box_out_Bx4, flip_out_B, grid=grid, width=width
    )
    batch = ratio_BxW.shape[0]
    raw_BxGxGx2W = jnp.concatenate(
        [
            jnp.broadcast_to(row_BxGxH[:, :, None], (batch, grid, grid, width // 2)),
            jnp.broadcast_to(column_BxGxH[:, None], (batch, grid, grid, width // 2)),
            jnp.broadcast_to(ratio_BxW[:, None, None], (batch, grid, grid, width)),
        ],
        axis=-1,
    )
    return raw_BxGxGx2W.reshape(batch, grid * grid, 2 * width)


def _views(
    box_in: ArrayLike, flip_in: ArrayLike, box_out: ArrayLike, flip_out: ArrayLike
) -> tuple[jax.Array, ...]:
    boxes = [jnp.asarray(box).astype(jnp.float32) for box in (box_in, box_out)]
    flips = [jnp.asarray(flip).astype(bool) for flip in (flip_in, flip_out)]
    shapes = [x.shape for x in (boxes[0], flips[0], boxes[1], flips[1])]
    rows = shapes[0][:1]
    if shapes != [(*rows, 4), rows, (*rows, 4), rows]:
        raise ValueError(
            f"input box, input flip, target box and target flip have shapes {shapes}; they must be"
            " [B, 4], [B], [B, 4], [B]"
        )
    return boxes[0], flips[0], boxes[1], flips[1]


def _frequencies(width: int) -> np.ndarray:
    return 10000.0 ** (-np.arange(width // 4) / (width / 4))


def _embed_numpy(x: np.ndarray, width: int) -> np.ndarray:
    phase = x[..., None] * _frequencies(width)
    return np.concatenate([np.sin(phase), np.cos(phase)], -1)


def _embed(x: jax.Array, width: int) -> jax.Array:
    phase = x[..., None] * jnp.asarray(_frequencies(width), jnp.float32)
    return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], -1)


def _check(grid: int, width: int) -> None:
    if grid < 1:
        raise ValueError(f"grid is {grid}; it must be at least 1")
    if width < 4 or width % 4:
        raise ValueError(
            f"width is {width}; it must be a positive multiple of 4: sine and cosine of row and"
            " column"
        )


def resize_position_table(
    table_1xRxD: np.ndarray, grid: int, *, cls: bool, antialias: bool = False
) -> np.ndarray:
    """Returns a position table for another grid, with or without a first row for cls.

    Args:
      table_1xRxD: table of a square grid, R = G * G or, with a row for cls, G * G + 1.
      grid: cells a side of the result.
      cls: whether the result has a row for cls: copied from the table, or zeros.
      antialias: as of `resized`.

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
    old_cells = np.asarray(table_1xRxD[0, cls_rows:], np.float32)
    cells = resized(old_cells, grid, antialias=antialias)[None]
    return np.concatenate([first, cells], 1) if cls else cells


def table_grid(rows: int) -> int:
    """Returns cells a side of a table with this number of rows, with or without one for cls.

    >>> table_grid(197), table_grid(196)
    (14, 14)
    """
    for count in (rows, rows - 1):
        side = math.isqrt(count)
        if side > 0 and side * side == count:
            return side
    raise ValueError(f"a position table of {rows} rows is not that of a square grid")
