"""DCNv3 as matrix products on a TPU, as a Pallas kernel: the matrix of `dcnv3_dense` is computed in
VMEM, where the product reads it.

XLA computes the matrix of bilinear weights, [input cells, output cells] for every group of every
image, element by element, nine points each, and stores it in HBM where VMEM is too small. This
kernel computes a window of about 128 input cells at a time in VMEM and multiplies it; it skips
windows that no sample of a tile of outputs touches.

The rows of a window are its slow axis, columns lie across sublanes and outputs along lanes. So only
the column weights of a sample fill vectors, once per tile; the row weights are one number per
output, and so are the sums over rows that the backward pass takes before those over columns.
Channels stay in place, as many groups side by side as fill the lanes: the product is taken of all
of them, which costs no more, and the lanes of its group are selected.

B batch, G groups, C channels, D = C / G, P points, Q input cells, O output cells; V columns of a
row, padded to eight; K cells of a window."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from m3i_jax.models.dcnv3_dense import Samples, hat, sample_gradients, slope
from m3i_jax.parallel.chips import LEAST_SCRATCHPAD

_LANES = 128
_ONE_TILE = 256  # up to so many outputs are one tile; of more, a tile has _LANES
_BYTES = LEAST_SCRATCHPAD * 29 // 32  # of VMEM; the rest covers what is not counted


class _Shape(NamedTuple):
    """Static sizes of a kernel: the map, its padded row, rows of a window, channels of a group."""

    height: int
    width: int
    columns: int
    rows: int
    depth: int

    @property
    def cells(self) -> int:
        """Cells of a window."""
        return self.rows * self.columns

    @property
    def padded_cells(self) -> int:
        """Cells of the map in whole windows."""
        return -(-self.height // self.rows) * self.cells

    def touched(self, tile: int) -> int:
        """Cells that a tile of outputs reads without offsets: its rows, one before and one behind,
        in whole windows."""
        windows = -(-(-(-tile // self.width) + 2) // self.rows)
        return min(windows * self.rows, self.height) * self.width

    @property
    def padded(self) -> bool:
        """Whether the map has to be padded to consist of windows; sixteen rows of bfloat16 are one
        tile of memory."""
        return (
            self.columns != self.width
            or self.cells % 16 > 0
            or self.padded_cells != self.height * self.width
        )


def _shape(size: tuple[int, int], depth: int) -> _Shape:
    columns = size[1] + -size[1] % 8
    return _Shape(*size, columns, min(size[0], max(1, _LANES // columns)), depth)


def _side_by_side(groups: int, depth: int) -> int:
    """Number of groups that fill the lanes; all groups where no number does."""
    return next(
        (n for n in range(1, groups) if groups % n == 0 and n * depth % _LANES == 0), groups
    )


def fits(size: tuple[int, int], groups: int, depth: int, points: int, dtype: Any) -> bool:
    """Whether VMEM can hold a map of this size, and the kernel supports its type.

    >>> fits((48, 48), 10, 32, 9, jnp.bfloat16), fits((512, 512), 10, 32, 9, jnp.bfloat16)
    (True, False)
    >>> fits((12, 12), 10, 32, 9, jnp.float16)
    False
    """
    if dtype not in (jnp.bfloat16, jnp.float32):
        return False
    shape, lanes = _shape(size, depth), -(-_side_by_side(groups, depth) * depth // _LANES) * _LANES
    # The gradient in float32, the map too if its rows are padded; and map and gradient, double
    # buffered.
    maps = shape.padded_cells * lanes * (4 + 4 * shape.padded + 4 * jnp.dtype(dtype).itemsize)
    # and three numbers per point, column and output
    return maps + 3 * 4 * points * shape.columns * _LANES <= _BYTES


def _windows(y_PxO: jax.Array, shape: _Shape) -> tuple[jax.Array, jax.Array]:
    """The first window that a sample touches, and the one after the last; at least one, so that a
    NaN reaches the output."""
    first = jnp.floor(jnp.where(jnp.isnan(y_PxO), 0, jnp.clip(y_PxO, -1, shape.height)))
    edges = (
        jnp.clip(edge.astype(jnp.int32), 0, shape.height - 1) // shape.rows
        for edge in (jnp.min(first), jnp.max(first) + 1)
    )
    low, high = edges
    return low, high + 1


def wide_product(a: jax.Array, b: jax.Array, over: tuple[int, int], dtype: Any) -> jax.Array:
    """Product over these axes of two matrices, in the type, with sums in float32.

    >>> wide_product(jnp.ones((2, 3)), jnp.ones((3, 1)), (1, 0), jnp.float32).ravel().tolist()
    [3.0, 3.0]
    """
    precision = None if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    dims = ((over[0],), (over[1],)), ((), ())
    return jax.lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        dims,
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _by_column(form: Any, x_1xO: jax.Array, shape: _Shape) -> jax.Array:
    """A function of the distance to every column, [V, O]."""
    return form(
        x_1xO
        - jax.lax.broadcasted_iota(jnp.int32, (shape.columns, x_1xO.shape[1]), 0).astype(
            jnp.float32
        )
    )


def _distances(y_PxO: jax.Array, window: jax.Array, shape: _Shape) -> list[jax.Array]:
    """Distances to the rows of a window, [P, O] each."""
    return [y_PxO - (window * shape.rows + r).astype(jnp.float32) for r in range(shape.rows)]


def _row(r: int, shape: _Shape) -> slice:
    return slice(r * shape.columns, (r + 1) * shape.columns)


def _fill_matrix(matrix: Any, away: list[jax.Array], hats: Any, shape: _Shape) -> None:
    """The matrix of one window, [K, O]."""
    for r, t_PxO in enumerate(away):
        near = hat(t_PxO)
        matrix[_row(r, shape)] = sum(near[p : p + 1] * hats[p] for p in range(len(t_PxO)))


def _window_slice(window: jax.Array, shape: _Shape) -> Any:
    from jax.experimental import pallas as pl

    return pl.ds(pl.multiple_of(window * shape.cells, 8 if shape.padded else 16), shape.cells)


def _store_padded(map_: Any, v: Any, shape: _Shape) -> None:
    """Store the map with padded rows, for all tiles."""
    if not shape.padded:
        return
    map_[...] = jnp.zeros_like(map_)
    for r in range(shape.height):
        map_[r * shape.columns : r * shape.columns + shape.width] = v[
            0, r * shape.width : (r + 1) * shape.width
        ].astype(jnp.float32)


def _read(map_: Any, v: Any, window: jax.Array, shape: _Shape) -> jax.Array:
    """Cells of a window, [K, C]."""
    cells = _window_slice(window, shape)
    return map_[cells] if shape.padded else v[0, cells]


def group_lanes(lanes: int, g: jax.Array, depth: int) -> jax.Array:
    """Mask of the group's lanes, [1, lanes].

    >>> group_lanes(6, 1, 2).astype(int).tolist()
    [[0, 0, 1, 1, 0, 0]]
    """
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, lanes), 1)
    return (lane >= g * depth) & (lane < (g + 1) * depth)


def _forward_kernel(
    y: Any, x: Any, m: Any, v: Any, out: Any, matrix: Any, hats: Any, map_: Any, *, shape: _Shape
) -> None:
    from jax.experimental import pallas as pl

    pl.when(pl.program_id(2) == 0)(lambda: _store_padded(map_, v, shape))

    def group(g: jax.Array, out_OxC: jax.Array) -> jax.Array:
        y_PxO, x_PxO, m_PxO = y[0, g], x[0, g], m[0, g]
        for p in range(len(y_PxO)):
            hats[p] = m_PxO[p : p + 1] * _by_column(hat, x_PxO[p : p + 1], shape)

        def add(window: jax.Array, total_OxC: jax.Array) -> jax.Array:
            _fill_matrix(matrix, _distances(y_PxO, window, shape), hats, shape)
            return total_OxC + wide_product(
                matrix[...], _read(map_, v, window, shape), (0, 0), v.dtype
            )

        sums_OxC = jax.lax.fori_loop(*_windows(y_PxO, shape), add, jnp.zeros_like(out_OxC))
        return jnp.where(group_lanes(out_OxC.shape[1], g, shape.depth), sums_OxC, out_OxC)

    out[0] = jax.lax.fori_loop(0, y.shape[1], group, jnp.zeros(out.shape[1:], jnp.float32)).astype(
        out.dtype
    )


def _backward_kernel(
    y: Any, x: Any, m: Any, grad: Any, v: Any, dv: Any, dy: Any, dx: Any, dm: Any,
    matrix: Any, hats: Any, map_: Any, dmap: Any, by_hat: Any, by_slope: Any, *, shape: _Shape,
) -> None:  # fmt: skip
    from jax.experimental import pallas as pl

    tile, points = pl.program_id(2), range(y.shape[2])

    @pl.when(tile == 0)
    def _() -> None:
        _store_padded(map_, v, shape)
        dmap[...] = jnp.zeros_like(dmap)

    def group(g: jax.Array, _: None) -> None:
        y_PxO, x_PxO, m_PxO = y[0, g], x[0, g], m[0, g]
        # the other lanes are zeros, which add nothing to a sum over channels
        grad_OxC = jnp.where(
            group_lanes(grad.shape[2], g, shape.depth), grad[0].astype(jnp.float32), 0
        )
        for p in points:
            hats[p] = m_PxO[p : p + 1] * _by_column(hat, x_PxO[p : p + 1], shape)
        by_hat[...], by_slope[...] = jnp.zeros_like(by_hat), jnp.zeros_like(by_slope)

        def add(window: jax.Array, _: None) -> None:
            cells, away = _window_slice(window, shape), _distances(y_PxO, window, shape)
            _fill_matrix(matrix, away, hats, shape)
            dmap[cells] += wide_product(matrix[...], grad_OxC, (1, 0), v.dtype)
            # from here on `matrix` is the gradient of the matrix
            matrix[...] = wide_product(_read(map_, v, window, shape), grad_OxC, (1, 1), v.dtype)
            near, steep = [hat(t) for t in away], [slope(t) for t in away]
            for p in points:
                some = [matrix[_row(r, shape)] for r in range(shape.rows)]
                by_hat[p] += sum(near[r][p : p + 1] * s for r, s in enumerate(some))
                by_slope[p] += sum(steep[r][p : p + 1] * s for r, s in enumerate(some))

        jax.lax.fori_loop(*_windows(y_PxO, shape), add, None)
        for p in points:
            near, steep = (_by_column(form, x_PxO[p : p + 1], shape) for form in (hat, slope))
            dy[0, g, p : p + 1] = (near * by_slope[p]).sum(0, keepdims=True)
            dx[0, g, p : p + 1] = (steep * by_hat[p]).sum(0, keepdims=True)
            dm[0, g, p : p + 1] = (near * by_hat[p]).sum(0, keepdims=True)

    jax.lax.fori_loop(0, y.shape[1], group, None)

    @pl.when(tile == pl.num_programs(2) - 1)
    def _() -> None:
        for r in range(shape.height):
            row = dmap[r * shape.columns : r * shape.columns + shape.width]
            dv[0, r * shape.width : (r + 1) * shape.width] = row.astype(dv.dtype)


def _run(
    kernel: Any,
    shape: _Shape,
    samples: list[jax.Array],
    outputs: list[jax.Array],
    map_: jax.Array,
    like: dict[str, list[Any]],
    *,
    maps: int,
    sums: int,
    products: int,
    interpret: bool,
) -> list[jax.Array]:
    """A kernel over images, blocks of channels and tiles of outputs.

    Args:
      samples: [B, G, P, O].
      outputs: [B, O, C].
      map_: [B, Q, C].
      like: the results, by kind of array.
      maps, sums: further scratch arrays as large as the map, and [P, V, O].
      products: number of products with each window.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (b, g, points, o), channels = samples[0].shape, map_.shape[2]
    tile, groups = o if o <= _ONE_TILE else _LANES, _side_by_side(g, shape.depth)
    lanes = groups * shape.depth
    spec = {
        "samples": pl.BlockSpec((1, groups, points, tile), lambda i, j, k: (i, j, 0, k)),
        "outputs": pl.BlockSpec((1, tile, lanes), lambda i, j, k: (i, k, j)),
        "map": pl.BlockSpec((1, map_.shape[1], lanes), lambda i, j, k: (i, 0, j)),
    }
    inputs = {"samples": samples, "outputs": outputs, "map": [map_]}
    arrays, outs = ([a for group in kinds.values() for a in group] for kinds in (inputs, like))
    by_column = points, shape.columns, tile
    scratch = [
        (shape.cells, tile),
        by_column,
        (shape.padded_cells if shape.padded else 8, lanes),
        *[(shape.padded_cells, lanes)] * maps,
        *[by_column] * sums,
    ]
    return pl.pallas_call(
        functools.partial(kernel, shape=shape),
        grid=(b, channels // lanes, o // tile),
        in_specs=[spec[kind] for kind, group in inputs.items() for _ in group],
        out_specs=[spec[kind] for kind, group in like.items() for _ in group],
        out_shape=outs,
        scratch_shapes=[pltpu.VMEM(size, jnp.float32) for size in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            # of the lanes that are selected
            flops=2 * products * b * shape.touched(tile) * o * channels,
            transcendentals=0,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in (*arrays, *outs)),
        ),
        interpret=interpret,
    )(*arrays)


def _pad_outputs(a: jax.Array, axis: int, mode: str = "constant") -> jax.Array:
    """Pad the outputs to whole tiles."""
    o = a.shape[axis]
    return (
        a
        if o <= _ONE_TILE
        else jnp.pad(a, [(0, -o % _LANES if i == axis else 0) for i in range(a.ndim)], mode=mode)
    )


def _tiles(at: Samples) -> list[jax.Array]:
    """Padded outputs have the coordinates of the last one and weight 0."""
    return [_pad_outputs(at.y, 3, "edge"), _pad_outputs(at.x, 3, "edge"), _pad_outputs(at.m, 3)]


def like_rows(shape: tuple[int, ...], dtype: Any, rows: jax.Array) -> jax.ShapeDtypeStruct:
    """A result that varies over the devices of a mesh as these rows do."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(rows).manual_axis_type)


def forward(
    x_BxQxC: jax.Array, at: Samples, size: tuple[int, int], *, interpret: bool = False
) -> jax.Array:
    """Modulated sum of samples, [B, O, C] in the type of x.

    Args:
      x_BxQxC: the input, bfloat16 or float32.
      at: samples in pixels of the input, [B, G, P, O] float32.
      size: its height and width; Q is their product.
      interpret: run interpreted, on any platform.

    >>> at = Samples(*(jnp.full((1, 1, 1, 1), value) for value in (0.5, 1.0, 2.0)))
    >>> x = jnp.arange(4.0).reshape(1, 4, 1)
    >>> forward(x, at, (2, 2), interpret=True).item()  # twice the mean of cells 1 and 3
    4.0
    """
    (b, _, c), samples = x_BxQxC.shape, _tiles(at)
    like = {"outputs": [like_rows((b, samples[0].shape[3], c), x_BxQxC.dtype, x_BxQxC)]}
    shape = _shape(size, c // at.y.shape[1])
    (out,) = _run(
        _forward_kernel,
        shape,
        samples,
        [],
        x_BxQxC,
        like,
        maps=0,
        sums=0,
        products=1,
        interpret=interpret,
    )
    return out[:, : at.y.shape[3]]


def backward(
    x_BxQxC: jax.Array,
    at: Samples,
    grad_BxOxC: jax.Array,
    size: tuple[int, int],
    *,
    interpret: bool = False,
) -> tuple[jax.Array, Samples]:
    """Gradients of the input, and of the samples' coordinates and modulation. Arguments as of
    `forward`.

    >>> at = Samples(*(jnp.full((1, 1, 1, 1), value) for value in (0.5, 1.0, 2.0)))
    >>> x, one = jnp.arange(4.0).reshape(1, 4, 1), jnp.ones((1, 1, 1))
    >>> dx, grad = backward(x, at, one, (2, 2), interpret=True)
    >>> dx.ravel().tolist(), grad.y.item(), grad.m.item()
    ([0.0, 1.0, 0.0, 1.0], 4.0, 2.0)
    """
    samples, outputs = _tiles(at), [_pad_outputs(grad_BxOxC, 1)]
    like = {
        "map": [like_rows(x_BxQxC.shape, x_BxQxC.dtype, x_BxQxC)],
        "samples": [like_rows(a.shape, jnp.float32, x_BxQxC) for a in samples],
    }
    shape = _shape(size, x_BxQxC.shape[2] // at.y.shape[1])
    dx, *parts = _run(
        _backward_kernel,
        shape,
        samples,
        outputs,
        x_BxQxC,
        like,
        maps=1,
        sums=2,
        products=2,
        interpret=interpret,
    )
    return dx, sample_gradients(at, Samples(*(a[..., : at.y.shape[3]] for a in parts)))
