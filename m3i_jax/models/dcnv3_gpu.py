"""Sums of samples on a GPU, as Pallas kernels for Triton: what is read stays in registers.

XLA stores the four cells around every sample, or the matrix of bilinear weights, and moves 7 to 90
times the bytes that these kernels move (compiled for an H100, maps of 56 x 56 to 304 x 504). Here a
program of the forward pass has some outputs of one group and reads the cells of one point after the
other; one of the gradients of places and weights the same.

The gradient of the map needs neither atomic additions nor sorting, so that equal runs have equal
bits: a program has a tile of the map's cells, goes through the tiles of outputs between the first
and the last whose samples touch its rows, leaves out those that touch none of its cells, and
multiplies the bilinear weights between its cells and the others' samples, made in registers, with
their gradients.

B batch, G groups, C channels, D = C / G, P points, Q input cells, O outputs, T outputs of a tile, K
cells of a tile."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from m3i_jax.models.dcnv3_dense import Samples, hat, sample_gradients

_TILE = 64  # outputs of a tile, and cells of a tile
_WARPS = 4


class _Sizes(NamedTuple):
    """Static sizes of a call. depth: D; lanes: the power of two from it up, as Triton's arrays."""

    height: int
    width: int
    groups: int
    points: int
    outputs: int
    depth: int

    @property
    def cells(self) -> int:
        return self.height * self.width

    @property
    def lanes(self) -> int:
        return max(16, 1 << (self.depth - 1).bit_length())  # least depth of a product

    @property
    def tiles(self) -> int:
        return -(-self.outputs // _TILE)


def fits(
    size: tuple[int, int], channels: int, points: int, outputs: int, rows: int, dtype: Any
) -> bool:
    """Whether the kernels support a call: its type, and arrays that 32 bits index.

    >>> fits((304, 504), 320, 9, 304 * 504, 4, jnp.bfloat16), fits((8, 8), 32, 9, 64, 1, "float16")
    (True, False)
    """
    largest = rows * max(size[0] * size[1] * channels, outputs * max(channels, 2 * points))
    return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float32) and largest < 2**31


def _program(tiles: int) -> tuple[jax.Array, jax.Array]:
    """The tile and the group, counted over all images, of this program. The grid has one axis:
    CUDA's others end at 65,535, which groups of a large batch exceed."""
    from jax.experimental import pallas as pl

    number = pl.program_id(0)
    return jax.lax.rem(number, jnp.int32(tiles)), jax.lax.div(number, jnp.int32(tiles))


def _load(ref: Any, index: jax.Array, mask: jax.Array) -> jax.Array:
    from jax.experimental.pallas import triton

    return triton.load(ref.at[index], mask=mask, other=0)


def _lanes(sizes: _Sizes) -> tuple[jax.Array, jax.Array]:
    """The channels of a group, [1, D], and which of them there are."""
    lane = jnp.arange(sizes.lanes)[None]
    return lane, lane < sizes.depth


class _Point(NamedTuple):
    """Samples of one point: coordinates, weights, and whether a coordinate is no number; [T]."""

    y: jax.Array
    x: jax.Array
    m: jax.Array
    undefined: jax.Array


def _point(places: tuple[Any, ...], sizes: _Sizes, group: Any, p: Any, tile: Any) -> _Point:
    """Point p of a tile of outputs, from arrays of B G P O numbers; `group` is that of all images.
    Coordinates far outside are those of the padding, where they fit an integer."""
    output = tile * _TILE + jnp.arange(_TILE)
    index, there = (group * sizes.points + p) * sizes.outputs + output, output < sizes.outputs
    y, x, m = (_load(ref, index, there) for ref in places)
    undefined = (y != y) | (x != x)
    y = jnp.where(undefined, -2, jnp.minimum(jnp.maximum(y, -2), sizes.height + 1))
    x = jnp.where(undefined, -2, jnp.minimum(jnp.maximum(x, -2), sizes.width + 1))
    return _Point(y, x, m, undefined)


def _corner(point: _Point, sizes: _Sizes, down: int, over: int) -> tuple[jax.Array, ...]:
    """Of one of the four cells around each sample: index, whether the map has it, and the shares of
    its row and column; [T]."""
    top, left = jnp.floor(point.y), jnp.floor(point.x)
    row, column = top.astype(jnp.int32) + down, left.astype(jnp.int32) + over
    inside = (row >= 0) & (row < sizes.height) & (column >= 0) & (column < sizes.width)
    below, right = point.y - top, point.x - left
    return (
        row * sizes.width + column,
        inside,
        below if down else 1 - below,
        right if over else 1 - right,
    )


def _read(v: Any, sizes: _Sizes, group: Any, cell: jax.Array, inside: jax.Array) -> jax.Array:
    """Channels of a cell of each output, float32 [T, D], zeros outside the map."""
    lane, there = _lanes(sizes)
    image = group // sizes.groups
    first = (image * sizes.cells + cell) * sizes.groups + group % sizes.groups
    index = first[:, None] * sizes.depth + lane
    return _load(v, index, inside[:, None] & there).astype(jnp.float32)


def _of_outputs(sizes: _Sizes, group: Any, tile: Any) -> tuple[jax.Array, jax.Array]:
    """Index of the channels of every output of a tile in [B, O, G, D], and which there are;
    [T, D]."""
    lane, there = _lanes(sizes)
    output = tile * _TILE + jnp.arange(_TILE)
    first = (group // sizes.groups * sizes.outputs + output) * sizes.groups + group % sizes.groups
    return first[:, None] * sizes.depth + lane, (output < sizes.outputs)[:, None] & there


def _forward_kernel(y: Any, x: Any, m: Any, v: Any, out: Any, *, sizes: _Sizes) -> None:
    from jax.experimental.pallas import triton

    tile, group = _program(sizes.tiles)

    def add(p: jax.Array, total_TxD: jax.Array) -> jax.Array:
        point = _point((y, x, m), sizes, group, p, tile)
        for down in (0, 1):
            for over in (0, 1):
                cell, inside, by_row, by_column = _corner(point, sizes, down, over)
                weight = by_row * by_column * point.m
                total_TxD += weight[:, None] * _read(v, sizes, group, cell, inside)
        return jnp.where(point.undefined[:, None], jnp.nan, total_TxD)

    start = jnp.zeros((_TILE, sizes.lanes), jnp.float32)
    index, there = _of_outputs(sizes, group, tile)
    total_TxD = jax.lax.fori_loop(0, sizes.points, add, start)
    triton.store(out.at[index], total_TxD.astype(out.dtype), mask=there)


def _places_kernel(
    y: Any, x: Any, m: Any, v: Any, grad: Any, dy: Any, dx: Any, dm: Any, *, sizes: _Sizes
) -> None:
    """Of every sample what it would read, and the derivatives of that by its row and column."""
    from jax.experimental.pallas import triton

    tile, group = _program(sizes.tiles)
    grad_TxD = _load(grad, *_of_outputs(sizes, group, tile)).astype(jnp.float32)
    output = tile * _TILE + jnp.arange(_TILE)

    def write(p: jax.Array, _: None) -> None:
        point = _point((y, x, m), sizes, group, p, tile)
        by_y, by_x, value = (jnp.zeros(_TILE, jnp.float32) for _ in range(3))
        for down in (0, 1):
            for over in (0, 1):
                cell, inside, by_row, by_column = _corner(point, sizes, down, over)
                read = jnp.sum(_read(v, sizes, group, cell, inside) * grad_TxD, 1)
                by_y += (1 if down else -1) * by_column * read
                by_x += (1 if over else -1) * by_row * read
                value += by_row * by_column * read
        index = (group * sizes.points + p) * sizes.outputs + output
        for ref, values in ((dy, by_y), (dx, by_x), (dm, value)):
            triton.store(
                ref.at[index],
                jnp.where(point.undefined, jnp.nan, values),
                mask=output < sizes.outputs,
            )

    jax.lax.fori_loop(0, sizes.points, write, None)


def _map_kernel(
    y: Any, x: Any, m: Any, grad: Any, spans: Any, first: Any, last: Any, dv: Any, *,
    sizes: _Sizes, dtype: Any
) -> None:  # fmt: skip
    """The gradient of a tile of cells of one group.

    Args:
      spans: the cells that each tile of outputs touches: lowest and highest row and column,
        [B G, tiles, 4].
      first, last: tiles of outputs that may touch a tile of cells, [B G, tiles of cells].
    """
    from jax.experimental.pallas import triton

    tiles_of_cells = -(-sizes.cells // _TILE)
    of_cells, group = _program(tiles_of_cells)
    cell = of_cells * _TILE + jnp.arange(_TILE)
    row, column = cell // sizes.width, cell % sizes.width
    top, bottom = (
        of_cells * _TILE // sizes.width,
        (of_cells * _TILE + _TILE - 1) // sizes.width,
    )
    one_row = top == bottom
    left = jnp.where(one_row, of_cells * _TILE % sizes.width, 0)
    right = jnp.where(one_row, left + _TILE - 1, sizes.width)

    def add(tile: jax.Array, total_KxD: jax.Array) -> jax.Array:
        span = [spans[(group * sizes.tiles + tile) * 4 + i] for i in range(4)]
        touches = (span[1] >= top) & (span[0] <= bottom) & (span[3] >= left) & (span[2] <= right)

        def product(total_KxD: jax.Array) -> jax.Array:
            def weigh(p: jax.Array, weights_KxT: jax.Array) -> jax.Array:
                point = _point((y, x, m), sizes, group, p, tile)
                near = hat(point.y[None] - row[:, None].astype(jnp.float32)) * hat(
                    point.x[None] - column[:, None].astype(jnp.float32)
                )
                return weights_KxT + jnp.where(point.undefined, jnp.nan, point.m)[None] * near

            start = jnp.zeros((_TILE, _TILE), jnp.float32)
            weights_KxT = jax.lax.fori_loop(0, sizes.points, weigh, start)
            grad_TxD = _load(grad, *_of_outputs(sizes, group, tile))
            precision = None if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
            return total_KxD + jax.lax.dot_general(
                weights_KxT.astype(dtype),
                grad_TxD.astype(dtype),
                (((1,), (0,)), ((), ())),
                precision=precision,
                preferred_element_type=jnp.float32,
            )

        return jax.lax.cond(touches, product, lambda total: total, total_KxD)

    index = group * tiles_of_cells + of_cells
    start = jnp.zeros((_TILE, sizes.lanes), jnp.float32)
    total_KxD = jax.lax.fori_loop(first[index], last[index], add, start)
    lane, there = _lanes(sizes)
    image = group // sizes.groups
    place = (image * sizes.cells + cell) * sizes.groups + group % sizes.groups
    triton.store(
        dv.at[place[:, None] * sizes.depth + lane],
        total_KxD.astype(dv.dtype),
        mask=(cell < sizes.cells)[:, None] & there,
    )


def _spans(at: Samples, sizes: _Sizes) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The arguments `spans`, `first` and `last` of `_map_kernel`. A tile with an undefined
    coordinate touches every cell."""
    b, g, p, o = at.y.shape
    pad = ((0, 0), (0, 0), (0, 0), (0, sizes.tiles * _TILE - o))
    tiled = lambda a: jnp.pad(a, pad, mode="edge").reshape(b * g, p, sizes.tiles, _TILE)
    undefined = tiled(jnp.isnan(at.y) | jnp.isnan(at.x))
    everything = undefined.any((1, 3))

    def edges(a: jax.Array, limit: int) -> tuple[jax.Array, jax.Array]:
        cell = jnp.floor(jnp.clip(jnp.where(undefined, 0, tiled(a)), -2, limit + 1))
        low, high = cell.min((1, 3)), cell.max((1, 3)) + 1
        return (
            jnp.where(everything, 0, low).astype(jnp.int32),
            jnp.where(everything, limit, high).astype(jnp.int32),
        )

    (top, bottom), (left, right) = edges(at.y, sizes.height), edges(at.x, sizes.width)
    starts = jnp.arange(-(-sizes.cells // _TILE)) * _TILE
    low, high = starts // sizes.width, (starts + _TILE - 1) // sizes.width
    touch = (bottom[:, None] >= low[:, None]) & (top[:, None] <= high[:, None])  # [B G, K, tiles]
    number = jnp.arange(sizes.tiles, dtype=jnp.int32)
    first = jnp.where(touch, number, sizes.tiles).min(2)
    last = jnp.where(touch, number + 1, 0).max(2)
    return jnp.stack([top, bottom, left, right], -1), first, last


def _call(
    kernel: Any, programs: int, out: list[jax.ShapeDtypeStruct], arrays: list[jax.Array],
    interpret: bool,
) -> list[jax.Array]:  # fmt: skip
    """A kernel over flat arrays, which it indexes itself."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    vma = jax.typeof(arrays[0]).manual_axis_type
    flat = [jax.ShapeDtypeStruct((each.size,), each.dtype, manual_axis_type=vma) for each in out]
    made = pl.pallas_call(
        kernel,
        grid=(programs,),
        out_shape=flat,
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
    )(*(a.reshape(-1) for a in arrays))
    return [a.reshape(each.shape) for a, each in zip(made, out, strict=True)]


def _sizes(x_BxQxC: jax.Array, at: Samples, size: tuple[int, int]) -> _Sizes:
    _, groups, points, outputs = at.y.shape
    return _Sizes(*size, groups, points, outputs, x_BxQxC.shape[2] // groups)


def forward(
    x_BxQxC: jax.Array, at: Samples, size: tuple[int, int], *, interpret: bool = False
) -> jax.Array:
    """Weighted sum of samples, [B, O, C] in the type of x.

    Args:
      x_BxQxC: the map, bfloat16 or float32.
      at: samples in pixels of the map, [B, G, P, O] float32.
      size: its height and width; Q is their product.
      interpret: run interpreted, on any platform.

    >>> at = Samples(*(jnp.full((1, 1, 1, 1), value) for value in (0.5, 1.0, 2.0)))
    >>> x = jnp.arange(4.0).reshape(1, 4, 1)
    >>> forward(x, at, (2, 2), interpret=True).item()  # twice the mean of cells 1 and 3
    4.0
    """
    sizes, b = _sizes(x_BxQxC, at, size), len(x_BxQxC)
    out = jax.ShapeDtypeStruct((b, sizes.outputs, x_BxQxC.shape[2]), x_BxQxC.dtype)
    return _call(
        functools.partial(_forward_kernel, sizes=sizes),
        sizes.tiles * b * sizes.groups,
        [out],
        [*at, x_BxQxC],
        interpret,
    )[0]


def backward(
    x_BxQxC: jax.Array,
    at: Samples,
    grad_BxOxC: jax.Array,
    size: tuple[int, int],
    *,
    interpret: bool = False,
) -> tuple[jax.Array, Samples]:
    """Gradients of the map, and of the samples' coordinates and weights. Arguments as of `forward`.

    >>> at = Samples(*(jnp.full((1, 1, 1, 1), value) for value in (0.5, 1.0, 2.0)))
    >>> x, one = jnp.arange(4.0).reshape(1, 4, 1), jnp.ones((1, 1, 1))
    >>> dx, grad = backward(x, at, one, (2, 2), interpret=True)
    >>> dx.ravel().tolist(), grad.y.item(), grad.m.item()
    ([0.0, 1.0, 0.0, 1.0], 4.0, 2.0)
    """
    sizes, b = _sizes(x_BxQxC, at, size), len(x_BxQxC)
    rows = b * sizes.groups
    parts = _call(
        functools.partial(_places_kernel, sizes=sizes),
        sizes.tiles * rows,
        [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in at],
        [*at, x_BxQxC, grad_BxOxC],
        interpret,
    )
    (dx,) = _call(
        functools.partial(_map_kernel, sizes=sizes, dtype=x_BxQxC.dtype),
        -(-sizes.cells // _TILE) * rows,
        [jax.ShapeDtypeStruct(x_BxQxC.shape, x_BxQxC.dtype)],
        [*at, grad_BxOxC, *_spans(at, sizes)],
        interpret,
    )
    return dx, sample_gradients(at, Samples(*parts))
