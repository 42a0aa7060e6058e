"""Relative positions in attention on a map, from tables of parameters.

`decomposed` (ViTDet): a table of rows and one of columns, [2 S - 1, E] each, shared by the heads:
logit[(y, x), (k, l)] = q k' / sqrt(E) + q Rh[y - k + S - 1] + q Rw[x - l + S - 1], q unscaled in
the last two. With q' = [q / sqrt(E), q Rh', q Rw'] and k' = [k, one-hot row, one-hot column] that
is plain attention. It is the faster way where R + C <= E (a CPU, 12 x 12 cells of 32: 58 % of the
time). On a larger map the longer keys would cost more than they save (64 x 64 cells of 64: three
times the products of the logits), so `attention.attend` adds the two terms to the logits.

`table` (BEiT, mmsegmentation): one number per offset and head, [(2 S - 1)^2, H], row offsets first,
of the query minus the key; with a cls token three more: cls to a cell, a cell to cls, cls to cls.

S cells a side for which a table was made; of another map it is resized, linearly. B batch, H heads,
E width of a head, n m cells a side of a map, N = n m cells, Q = T tokens, R C rows and columns.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax.models.attention import Relative
from m3i_jax.models.layers import Params


def table_shapes(
    rule: str, side: int, *, heads: int, depth: int, cls: bool
) -> dict[str, tuple[int, ...]]:
    """Returns shapes of the tables of a block.

    Args:
      rule: none, decomposed or table.
      side: cells a side of the map on which the block attends, S.
      heads: H.
      depth: width of a head, E.
      cls: whether there is a cls token.

    >>> table_shapes("decomposed", 14, heads=12, depth=64, cls=False)
    {'rows': (27, 64), 'columns': (27, 64)}
    >>> table_shapes("table", 32, heads=12, depth=64, cls=True)
    {'table': (3972, 12)}
    """
    offsets = 2 * side - 1
    if rule == "decomposed":
        return {"rows": (offsets, depth), "columns": (offsets, depth)}
    return {"table": (offsets**2 + 3 * cls, heads)} if rule == "table" else {}


def relative_positions_of(
    tables: Params, grid: tuple[int, int], *, cls: bool
) -> Callable[[jax.Array, jax.Array], Relative] | None:
    """Returns relative positions on a map, as `layers.Attention` takes them: a function of queries
    and keys [B, H, T, E] before the queries are scaled; None for no tables.

    Args:
      tables: of one block, with the names of `table_shapes`.
      grid: rows and columns of the map.
      cls: whether the first token is cls.

    >>> tables = {"rows": jnp.zeros((5, 8)), "columns": jnp.zeros((5, 8))}
    >>> q, k, bias = relative_positions_of(tables, (2, 3), cls=False)(*jnp.zeros((2, 1, 4, 6, 8)))
    >>> q.shape, k.shape, bias
    ((1, 4, 6, 13), (1, 4, 6, 13), ())
    """
    if "table" in tables:
        bias_HxTxT = _table_bias(tables["table"], grid, cls=cls)
        return lambda q, k: (q, k, (bias_HxTxT[None, :, :, :, None],))
    if "rows" not in tables:
        return None
    rows_nxnxE, columns_mxmxE = (
        by_offset(resize_offsets(tables[name], n))
        for name, n in zip(("rows", "columns"), grid, strict=True)
    )

    def decomposed(q_BxHxTxE: jax.Array, k_BxHxTxE: jax.Array) -> Relative:
        b, h, t, e = q_BxHxTxE.shape
        on_map = q_BxHxTxE.reshape(b, h, *grid, e)

        def product(equation: str, table: jax.Array) -> jax.Array:
            out = jnp.einsum(
                equation, on_map, table.astype(on_map.dtype), preferred_element_type=jnp.float32
            )
            return out.reshape(b, h, t, -1)

        by_row = product("bhyxe,yke->bhyxk", rows_nxnxE)
        by_column = product("bhyxe,xle->bhyxl", columns_mxmxE)
        if sum(grid) > e:
            return q_BxHxTxE, k_BxHxTxE, (by_row[..., None], by_column[..., None, :])
        longer = (part.astype(q_BxHxTxE.dtype) * math.sqrt(e) for part in (by_row, by_column))
        places_TxP = jnp.asarray(_places(grid), k_BxHxTxE.dtype)
        ones_BxHxTxP = jnp.broadcast_to(places_TxP, (b, h, *places_TxP.shape))
        return (
            jnp.concatenate([q_BxHxTxE, *longer], -1),
            jnp.concatenate([k_BxHxTxE, ones_BxHxTxP], -1),
            (),
        )

    return decomposed


def _places(grid: tuple[int, int]) -> np.ndarray:
    """One-hot row and column of every cell, [N, R + C]."""
    n, m = grid
    return np.concatenate([np.eye(n).repeat(m, 0), np.tile(np.eye(m), (n, 1))], 1)


def by_offset(table: jax.Array) -> jax.Array:
    """Maps [2 n - 1, ...] -> [n, n, ...]: entry (y, k) is that of the offset y - k, y - k + n - 1.

    By copies, a reshape and a slice, so that the gradient is a sum in a fixed order and no scatter.

    >>> by_offset(jnp.arange(5)).tolist()
    [[2, 1, 0], [3, 2, 1], [4, 3, 2]]
    """
    n = (table.shape[0] + 1) // 2
    rest = table.shape[1:]
    # a row of 2 n numbers, read with a stride of 2 n - 1, moves by one from line to line
    line = jnp.concatenate([table[::-1], table[:1]])
    lines = jnp.broadcast_to(line, (n, *line.shape)).reshape(-1, *rest)
    return lines[: n * (2 * n - 1)].reshape(n, 2 * n - 1, *rest)[:, n - 1 :]


def resize_offsets(table: jax.Array, n: int, axis: int = 0) -> jax.Array:
    """Returns a table of 2 S - 1 offsets for n cells a side: [2 n - 1, ...], float32, linear,
    half-pixel centres, no antialiasing (torch's `interpolate`).

    >>> resize_offsets(jnp.array([0.0, 3.0, 6.0]), 3).round(1).tolist()
    [0.0, 1.2, 3.0, 4.8, 6.0]
    """
    old, new = table.shape[axis], 2 * n - 1
    if old == new:
        return table
    at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old))).astype(np.float32)
    resized = jnp.tensordot(weights, table, (1, axis), precision="highest")
    return jnp.moveaxis(resized, 0, axis)


def resize_table(name: str, table: jax.Array, rows: int) -> jax.Array:
    """Returns a table of a block for a map of another size, as it would be read there.

    Args:
      name: of `table_shapes`: rows, columns or table.
      table: as there.
      rows: of the result.

    Raises:
      ValueError: the numbers of rows are not those of tables of the same kind.

    >>> resize_table("rows", jnp.ones((27, 64)), 127).shape
    (127, 64)
    >>> resize_table("table", jnp.ones((28, 12)), 52).shape
    (52, 12)
    """
    if name != "table":
        return resize_offsets(table, (rows + 1) // 2)
    (old, cls), (new, new_cls) = _sides(len(table)), _sides(rows)
    if not old or not new or cls != new_cls:
        raise ValueError(
            f"a table of relative positions with {len(table)} rows cannot become one with {rows}"
        )
    square = table[: old * old].reshape(old, old, -1)
    for axis in (0, 1):
        square = resize_offsets(square, (new + 1) // 2, axis)
    return jnp.concatenate([square.reshape(new * new, -1), table[old * old :]])


def _sides(rows: int) -> tuple[int, bool]:
    """Offsets a side of a table with so many rows, or 0, and whether three are for cls."""
    for more in (0, 3):
        side = math.isqrt(max(rows - more, 0))
        if side % 2 and side * side == rows - more:
            return side, more == 3
    return 0, False


def _table_bias(table_RxH: jax.Array, grid: tuple[int, int], *, cls: bool) -> jax.Array:
    """[H, T, T] of a table, cls first."""
    (n, m), cells, heads = grid, grid[0] * grid[1], table_RxH.shape[1]
    offsets = len(table_RxH) - 3 * cls
    side = math.isqrt(offsets)
    if side * side != offsets:
        raise ValueError(
            f"a table of relative positions has shape {table_RxH.shape}; with cls={cls} it must"
            f" have (2 S - 1)^2{' + 3' if cls else ''} rows"
        )
    square = table_RxH[:offsets].reshape(side, side, heads)
    square = resize_offsets(resize_offsets(square, n), m, axis=1)
    bias_nxnxPxH = by_offset(square)
    bias_mxmxnxnxH = by_offset(jnp.moveaxis(bias_nxnxPxH, 2, 0))
    bias_HxNxN = bias_mxmxnxnxH.transpose(4, 2, 0, 3, 1).reshape(heads, cells, cells)
    if not cls:
        return bias_HxNxN
    to_cell, to_cls, itself = table_RxH[offsets:, :, None, None]
    first = jnp.concatenate([itself, jnp.broadcast_to(to_cell, (heads, 1, cells))], 2)
    others = jnp.concatenate([jnp.broadcast_to(to_cls, (heads, cells, 1)), bias_HxNxN], 2)
    return jnp.concatenate([first, others], 1)
