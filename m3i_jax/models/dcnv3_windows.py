"""The kernel of `dcnv3_tpu` for maps of any size: the map stays in HBM, and VMEM holds only the
part that a block of outputs samples.

A block of about 1,000 outputs reads the box of cells that its samples touch, a chunk of fixed size
at a time, the next one copied while this one is multiplied. Its tiles of 128 outputs multiply only
windows of their own boxes: a few rows and columns. One chunk is enough for usual offsets; the
samples decide at run time, so the result is exact for offsets of any size, and only large offsets
cost more. The gradient of the map is added in HBM, chunk by chunk in the order of the blocks,
always the same.

Chunks and windows that would end behind the map (or the chunk) begin earlier, and cells that
another one has counted get no weight; so nothing is read outside of the map.

B batch, G groups, C channels, P points, O output cells; R rows and V columns of a chunk, L lanes (a
block of channels), T outputs of a tile, K cells of a window."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from m3i_jax.models.dcnv3_dense import Samples, hat, sample_gradients, slope
from m3i_jax.models.dcnv3_tpu import group_lanes, like_rows, wide_product
from m3i_jax.models.dcnv3_window_plan import ALIGNED, LANES, WindowPlan

_FAR = -1e9  # a row or column that no sample is near


def _span(t_PxT: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The first row (or column) that a sample touches, and the one after the last; at least one, so
    that a NaN reaches the output."""
    first = jnp.floor(jnp.where(jnp.isnan(t_PxT), 0, jnp.clip(t_PxT, -1, size)))
    low, high = jnp.min(first).astype(jnp.int32), jnp.max(first).astype(jnp.int32) + 1
    return jnp.clip(low, 0, size - 1), jnp.clip(high, 0, size - 1) + 1


def _quotient_up(n: Any, step: int) -> jax.Array:
    return jax.lax.div(n + (step - 1), jnp.int32(step))


def _down(n: jax.Array) -> jax.Array:
    """The last multiple of `ALIGNED`."""
    return jax.lax.div(n, jnp.int32(ALIGNED)) * ALIGNED


class _Chunk(NamedTuple):
    """A chunk: its origin, and the first row and column that no other one counts."""

    row: jax.Array
    column: jax.Array
    first_row: jax.Array
    first_column: jax.Array


class _Kernel(NamedTuple):
    """What both passes share: the samples of a block and the tools to read the map.

    Attributes:
      y, x, m: samples of the block, [1, G, P, outputs].
      map: in HBM.
      boxes: of every tile of every group, [4, G * tiles], in SMEM.
      chunks: two parts of the map, [2, R, V, L].
      arrived: a semaphore for each.
      image, lane_block: which the block belongs to.
    """

    plan: WindowPlan
    y: Any
    x: Any
    m: Any
    map: Any
    boxes: Any
    chunks: Any
    arrived: Any
    image: jax.Array
    lane_block: jax.Array

    def place(self, at: _Chunk) -> tuple[Any, ...]:
        """Where a chunk is in a map in HBM."""
        from jax.experimental import pallas as pl

        (rows, columns), lanes = self.plan.chunk, self.plan.lanes
        return (
            self.image,
            pl.ds(at.row, rows),
            pl.ds(pl.multiple_of(at.column, ALIGNED), columns),
            pl.ds(pl.multiple_of(self.lane_block * lanes, lanes), lanes),
        )

    def number_of_groups(self) -> jax.Array:
        side_by_side, groups = self.plan.groups
        return jnp.minimum(side_by_side, groups - self.lane_block * side_by_side)

    def samples(self, g: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """y, x, m of a tile, [P, T]. Those outside stay there, at a finite distance, and a NaN is
        kept."""
        from jax.experimental import pallas as pl

        lanes = pl.ds(pl.multiple_of(t * LANES, LANES), LANES)
        y, x, m = (ref[0, g, :, lanes] for ref in (self.y, self.x, self.m))
        height, width = self.plan.padded
        near = lambda t, size: jnp.where(t < -2, -2.0, jnp.where(t > size + 1, size + 1.0, t))
        return near(y, height), near(x, width), m

    def each(self, body: Any) -> None:
        """`body(g, t)` for every group and tile."""
        tiles = self.plan.tiles[0] * self.plan.tiles[1]

        def step(i: jax.Array, _: None) -> None:
            g = jax.lax.div(i, jnp.int32(tiles))
            body(g, i - g * tiles)

        jax.lax.fori_loop(0, self.number_of_groups() * tiles, step, None)

    def store_boxes(self) -> tuple[jax.Array, ...]:
        """Store the boxes of all tiles; the one of the block."""
        tiles = self.plan.tiles[0] * self.plan.tiles[1]
        height, width = self.plan.padded

        def step(i: jax.Array, box: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            g = jax.lax.div(i, jnp.int32(tiles))
            y_PxT, x_PxT, _ = self.samples(g, i - g * tiles)
            own = (*_span(y_PxT, height), *_span(x_PxT, width))
            for side, value in enumerate(own):
                self.boxes[side, i] = value
            ends = jnp.minimum, jnp.maximum, jnp.minimum, jnp.maximum
            return tuple(end(a, b) for end, a, b in zip(ends, box, own, strict=True))

        start = tuple(map(jnp.int32, (height, 0, width, 0)))
        return jax.lax.fori_loop(0, self.number_of_groups() * tiles, step, start)

    def through_chunks(self, box: tuple[jax.Array, ...], body: Any) -> None:
        """`body(slot, chunk)` for every chunk of the box, whose cells are in `chunks[slot]`."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        top, bottom, left, right = box
        (height, width), (rows, columns) = self.plan.padded, self.plan.chunk
        left = _down(left)
        over = _quotient_up(right - left, columns)
        number = over * _quotient_up(bottom - top, rows)

        def chunk(i: jax.Array) -> _Chunk:
            down = jax.lax.div(i, over)
            row, column = top + down * rows, left + (i - down * over) * columns
            return _Chunk(
                jnp.minimum(row, height - rows), jnp.minimum(column, width - columns), row, column
            )

        def copy(i: jax.Array) -> Any:
            slot = jax.lax.rem(i, jnp.int32(2))
            return pltpu.make_async_copy(
                self.map.at[self.place(chunk(i))], self.chunks.at[slot], self.arrived.at[slot]
            )

        def step(i: jax.Array, _: None) -> None:
            pl.when(i + 1 < number)(lambda: copy(i + 1).start())
            copy(i).wait()
            body(jax.lax.rem(i, jnp.int32(2)), chunk(i))

        copy(jnp.int32(0)).start()
        jax.lax.fori_loop(0, number, step, None)

    def through_windows(
        self, at: _Chunk, g: jax.Array, t: jax.Array, columns: Any, body: Any, start: Any
    ) -> Any:
        """The carry after all windows of a tile in a chunk: `body(place, away, carry)` with the
        window's place in the chunk and the distances to its rows, between `columns(numbers)`, the
        numbers of its columns [V, 1], and `columns(None)`."""
        from jax.experimental import pallas as pl

        plan, (y_PxT, _, _) = self.plan, self.samples(g, t)
        (rows, wide), (high, broad) = plan.chunk, plan.window
        tile = g * (plan.tiles[0] * plan.tiles[1]) + t
        top, bottom, left, right = (self.boxes[side, tile] for side in range(4))
        top, bottom = jnp.maximum(top, at.first_row), jnp.minimum(bottom, at.row + rows)
        left, right = jnp.maximum(left, at.first_column), jnp.minimum(right, at.column + wide)
        down = jnp.maximum(_quotient_up(jnp.maximum(bottom - top, 0), high), 0)
        first = _down(jnp.maximum(left - at.column, 0))
        over = jnp.where(right > left, _quotient_up(right - at.column - first, broad), 0)

        def across(i: jax.Array, carry: Any) -> Any:
            own = first + i * broad
            begin = pl.multiple_of(jnp.minimum(own, wide - broad), ALIGNED)
            number = jax.lax.broadcasted_iota(jnp.int32, (broad, 1), 0) + (at.column + begin)
            counted = number >= jnp.maximum(left, at.column + own)
            columns(jnp.where(counted, number.astype(jnp.float32), _FAR))

            def along(k: jax.Array, carry: Any) -> Any:
                own = top - at.row + k * high
                begin_row = jnp.minimum(own, rows - high)
                numbers = [begin_row + r for r in range(high)]
                away = [
                    y_PxT - jnp.where(n >= own, (at.row + n).astype(jnp.float32), _FAR)
                    for n in numbers
                ]
                return body((pl.ds(begin_row, high), pl.ds(begin, broad)), away, carry)

            carry = jax.lax.fori_loop(0, down, along, carry)
            columns(None)
            return carry

        return jax.lax.fori_loop(0, jnp.where(down > 0, over, 0), across, start)

    def fill(self, matrix: Any, away: list[jax.Array], hats: Any) -> None:
        """The matrix of one window, [K, T]."""
        broad = self.plan.window[1]
        for r, t_PxT in enumerate(away):
            near = hat(t_PxT)
            total = sum(near[p : p + 1] * hats[p] for p in range(len(t_PxT)))
            matrix[r * broad : (r + 1) * broad] = total

    def read(self, slot: jax.Array, place: tuple[Any, Any]) -> jax.Array:
        """Cells of a window, [K, L]."""
        return self.chunks[(slot, *place)].reshape(self.plan.cells, self.plan.lanes)


def _tile_slices(plan: WindowPlan) -> list[tuple[slice, slice]]:
    """Where the tiles are in a block."""
    (high, broad), (down, over) = plan.tile, plan.tiles
    return [
        (slice(i * high, (i + 1) * high), slice(j * broad, (j + 1) * broad))
        for i in range(down)
        for j in range(over)
    ]


def _forward_kernel(
    y: Any, x: Any, m: Any, map_: Any, out: Any,
    boxes: Any, chunks: Any, arrived: Any, total: Any, matrix: Any, hats: Any, *, plan: WindowPlan,
) -> None:  # fmt: skip
    from jax.experimental import pallas as pl

    where = pl.program_id(0), pl.program_id(1)
    self = _Kernel(plan, y, x, m, map_, boxes, chunks, arrived, *where)
    total[...] = jnp.zeros_like(total)

    def chunk(slot: jax.Array, at: _Chunk) -> None:
        def tile(g: jax.Array, t: jax.Array) -> None:
            _, x_PxT, m_PxT = self.samples(g, t)

            def columns(number: jax.Array | None) -> None:
                if number is None:
                    return
                for p in range(len(x_PxT)):
                    hats[p] = m_PxT[p : p + 1] * hat(x_PxT[p : p + 1] - number)

            def add(place: tuple[Any, Any], away: list[jax.Array], sums: jax.Array) -> jax.Array:
                self.fill(matrix, away, hats)
                return sums + wide_product(matrix[...], self.read(slot, place), (0, 0), map_.dtype)

            zeros = jnp.zeros(total.shape[1:], jnp.float32)
            sums_TxL = self.through_windows(at, g, t, columns, add, zeros)
            total[t] += jnp.where(group_lanes(plan.lanes, g, plan.depth), sums_TxL, 0)

        self.each(tile)

    self.through_chunks(self.store_boxes(), chunk)
    for t, (rows, columns) in enumerate(_tile_slices(plan)):
        out[0, rows, columns] = total[t].reshape(*plan.tile, plan.lanes).astype(out.dtype)


def _store_gradient(grad: Any, grads: Any, plan: WindowPlan) -> None:
    """Store the outputs' gradients by tile, with zeros behind the last output."""
    from jax.experimental import pallas as pl

    (high, broad), lanes = plan.tile, plan.lanes
    left = plan.out[0] - pl.program_id(2) * plan.block[0]
    over = plan.out[1] - pl.program_id(3) * plan.block[1]
    for t, (rows, columns) in enumerate(_tile_slices(plan)):
        cells = grad[0, rows, columns].astype(jnp.float32).reshape(high * broad, lanes)
        cell = jax.lax.broadcasted_iota(jnp.int32, (high * broad, lanes), 0)
        row = jax.lax.div(cell, jnp.int32(broad))
        inside = (row < left - rows.start) & (cell - row * broad < over - columns.start)
        grads[t] = jnp.where(inside, cells, 0)


def _clear(dmap: Any, dchunk: Any, sent: Any, self: _Kernel) -> None:
    """Fill the gradient of the map with zeros."""
    from jax.experimental.pallas import tpu as pltpu

    (height, width), (rows, columns) = self.plan.padded, self.plan.chunk
    dchunk[...] = jnp.zeros_like(dchunk)
    over = -(-width // columns)

    def step(i: jax.Array, _: None) -> None:
        down = jax.lax.div(i, jnp.int32(over))
        row = jnp.minimum(down * rows, height - rows)
        column = jnp.minimum((i - down * over) * columns, width - columns)
        copy = pltpu.make_async_copy(
            dchunk, dmap.at[self.place(_Chunk(row, column, row, column))], sent.at[0]
        )
        copy.start()
        copy.wait()

    jax.lax.fori_loop(0, over * -(-height // rows), step, None)


def _backward_kernel(
    y: Any, x: Any, m: Any, grad: Any, map_: Any, dmap: Any, dy: Any, dx: Any, dm: Any,
    boxes: Any, chunks: Any, arrived: Any, grads: Any, matrix: Any, hats: Any, by_hat: Any,
    by_slope: Any, dchunk: Any, sent: Any, *, plan: WindowPlan,
) -> None:  # fmt: skip
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    where, points = (pl.program_id(0), pl.program_id(1)), range(y.shape[2])
    self = _Kernel(plan, y, x, m, map_, boxes, chunks, arrived, *where)
    pl.when((pl.program_id(2) == 0) & (pl.program_id(3) == 0))(
        lambda: _clear(dmap, dchunk, sent, self)
    )
    for each in (dy, dx, dm):
        each[...] = jnp.zeros_like(each)
    _store_gradient(grad, grads, plan)

    def chunk(slot: jax.Array, at: _Chunk) -> None:
        there = dmap.at[self.place(at)]
        read = pltpu.make_async_copy(there, dchunk, sent.at[0])
        read.start()
        read.wait()

        def tile(g: jax.Array, t: jax.Array) -> None:
            _, x_PxT, m_PxT = self.samples(g, t)
            # the other lanes are zeros, which add nothing to a sum over channels
            grad_TxL = jnp.where(group_lanes(plan.lanes, g, plan.depth), grads[t], 0)
            outputs = pl.ds(pl.multiple_of(t * LANES, LANES), LANES)
            numbers: list[jax.Array] = []

            def columns(number: jax.Array | None) -> None:
                if number is not None:
                    numbers[:] = [number]
                    for p in points:
                        hats[p] = m_PxT[p : p + 1] * hat(x_PxT[p : p + 1] - number)
                    by_hat[...] = jnp.zeros_like(by_hat)
                    by_slope[...] = jnp.zeros_like(by_slope)
                    return
                for p in points:
                    away = x_PxT[p : p + 1] - numbers[0]
                    near, steep, one = hat(away), slope(away), slice(p, p + 1)
                    dy[0, g, one, outputs] += (near * by_slope[p]).sum(0, keepdims=True)
                    dx[0, g, one, outputs] += (steep * by_hat[p]).sum(0, keepdims=True)
                    dm[0, g, one, outputs] += (near * by_hat[p]).sum(0, keepdims=True)

            def add(place: tuple[Any, Any], away: list[jax.Array], _: None) -> None:
                self.fill(matrix, away, hats)
                part = wide_product(matrix[...], grad_TxL, (1, 0), map_.dtype)
                dchunk[place] += part.reshape(*plan.window, plan.lanes)
                # from here on `matrix` is the gradient of the matrix
                matrix[...] = wide_product(self.read(slot, place), grad_TxL, (1, 1), map_.dtype)
                near, steep, broad = (
                    [hat(t) for t in away],
                    [slope(t) for t in away],
                    plan.window[1],
                )
                for p in points:
                    some = [matrix[r * broad : (r + 1) * broad] for r in range(len(away))]
                    by_hat[p] += sum(near[r][p : p + 1] * s for r, s in enumerate(some))
                    by_slope[p] += sum(steep[r][p : p + 1] * s for r, s in enumerate(some))

            self.through_windows(at, g, t, columns, add, None)

        self.each(tile)
        write = pltpu.make_async_copy(dchunk, there, sent.at[0])
        write.start()
        write.wait()

    self.through_chunks(self.store_boxes(), chunk)


def _run(
    kernel: Any, plan: WindowPlan, samples: list[jax.Array], grad: list[jax.Array], map_: jax.Array,
    *, interpret: bool,
) -> list[jax.Array]:  # fmt: skip
    """A kernel over images, blocks of channels and blocks of outputs.

    Args:
      samples: [B, G, P, O], by tile.
      grad: [B, I, J, C], for the backward pass.
      map_: [B, H, W, C].
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    b, g, points, o = samples[0].shape
    (down, over), lanes, (rows, columns) = plan.grid, plan.lanes, plan.chunk
    outputs, tiles = plan.block[0] * plan.block[1], plan.tiles[0] * plan.tiles[1]
    by_sample = pl.BlockSpec(
        (1, plan.groups[0], points, outputs), lambda b, j, s, t: (b, j, 0, s * over + t)
    )
    by_output = pl.BlockSpec((1, *plan.block, lanes), lambda b, j, s, t: (b, s, t, j))
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    by_column = pltpu.VMEM((points, plan.window[1], LANES), jnp.float32)
    scratch = [
        pltpu.SMEM((4, plan.groups[0] * tiles), jnp.int32),
        pltpu.VMEM((2, rows, columns, lanes), map_.dtype),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.VMEM((tiles, LANES, lanes), jnp.float32),
        pltpu.VMEM((plan.cells, LANES), jnp.float32),
        by_column,
    ]
    if grad:
        chunk = pltpu.VMEM((rows, columns, lanes), jnp.float32)
        scratch += [by_column, by_column, chunk, pltpu.SemaphoreType.DMA((1,))]
        like = [like_rows(map_.shape, jnp.float32, map_)]
        like += [like_rows(a.shape, jnp.float32, map_) for a in samples]
        out_specs = [in_hbm, *[by_sample] * 3]
    else:
        channels = g * plan.depth
        like = [like_rows((b, *plan.out, channels), map_.dtype, map_)]
        out_specs = [by_output]
    steps, size = b * plan.lane_blocks * down * over, rows * columns * lanes
    # a chunk a block; with its gradient, which is read and written, and before filled with zeros
    copied = steps * size * (map_.dtype.itemsize + (8 if grad else 0))
    copied += 4 * map_.size if grad else 0
    touched = -(-(plan.tile[0] + 2) // plan.window[0]) * -(-(plan.tile[1] + 2) // plan.window[1])
    blocked: list[Any] = [*samples, *grad, *(like[1:] if grad else like)]
    return pl.pallas_call(
        functools.partial(kernel, plan=plan),
        grid=(b, plan.lane_blocks, down, over),
        in_specs=[*[by_sample] * 3, *[by_output] * len(grad), in_hbm],
        out_specs=out_specs,
        out_shape=like,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            # of the lanes that are selected
            flops=2 * (2 if grad else 1) * b * o * g * plan.depth * touched * plan.cells,
            transcendentals=0,
            bytes_accessed=copied + sum(a.size * a.dtype.itemsize for a in blocked),
        ),
        interpret=interpret,
    )(*samples, *grad, map_)


def _whole_blocks(a_BxGxPxO: jax.Array, plan: WindowPlan) -> jax.Array:
    """Samples of more outputs, where there are not as many as in all blocks."""
    more = plan.outputs - a_BxGxPxO.shape[3]
    return (
        jnp.pad(a_BxGxPxO, ((0, 0), (0, 0), (0, 0), (0, more)), mode="edge") if more else a_BxGxPxO
    )


def _whole_map(x_BxQxC: jax.Array, plan: WindowPlan) -> jax.Array:
    """The map [B, H, W, C] in whole tiles of memory and blocks of lanes."""
    b, _, c = x_BxQxC.shape
    over, lanes = plan.padded[1] - plan.size[1], plan.lane_blocks * plan.lanes - c
    map_ = x_BxQxC.reshape(b, *plan.size, c)
    return jnp.pad(map_, ((0, 0), (0, 0), (0, over), (0, lanes))) if over or lanes else map_


def forward(
    x_BxQxC: jax.Array, at: Samples, plan: WindowPlan, *, interpret: bool = False
) -> jax.Array:
    """As `dcnv3_tpu.forward`, for maps of any size.

    Args:
      x_BxQxC, interpret: as there.
      at: samples in pixels of the input, [B, G, P, O] float32, in the order of `plan.by_tile`.
      plan: of `plan_windows`.

    >>> at = Samples(*(jnp.full((1, 1, 1, 1), value) for value in (0.5, 1.0, 2.0)))
    >>> from m3i_jax.models.dcnv3_window_plan import plan_windows
    >>> x, plan = jnp.arange(4.0).reshape(1, 4, 1), plan_windows((2, 2), 1, 0, 1, 1, 1, "float32")
    >>> forward(x, at, plan, interpret=True).item()  # twice the mean of cells 1 and 3
    4.0
    """
    samples = [_whole_blocks(a, plan) for a in at]
    (out,) = _run(
        _forward_kernel, plan, samples, [], _whole_map(x_BxQxC, plan), interpret=interpret
    )
    return out.reshape(out.shape[0], -1, out.shape[3])


def backward(
    x_BxQxC: jax.Array,
    at: Samples,
    grad_BxOxC: jax.Array,
    plan: WindowPlan,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, Samples]:
    """As `dcnv3_tpu.backward`, for maps of any size; arguments as of `forward`.

    >>> at = Samples(*(jnp.full((1, 1, 1, 1), value) for value in (0.5, 1.0, 2.0)))
    >>> from m3i_jax.models.dcnv3_window_plan import plan_windows
    >>> x, plan = jnp.arange(4.0).reshape(1, 4, 1), plan_windows((2, 2), 1, 0, 1, 1, 1, "float32")
    >>> dx, grad = backward(x, at, jnp.ones((1, 1, 1)), plan, interpret=True)
    >>> dx.ravel().tolist(), grad.y.item(), grad.m.item()
    ([0.0, 1.0, 0.0, 1.0], 4.0, 2.0)
    """
    (b, _, c), samples = x_BxQxC.shape, [_whole_blocks(a, plan) for a in at]
    grad, map_ = grad_BxOxC.reshape(b, *plan.out, c), _whole_map(x_BxQxC, plan)
    dmap, *parts = _run(_backward_kernel, plan, samples, [grad], map_, interpret=interpret)
    dx = dmap[:, :, : plan.size[1], :c].astype(x_BxQxC.dtype).reshape(x_BxQxC.shape)
    return dx, sample_gradients(at, Samples(*(a[..., : at.y.shape[3]] for a in parts)))
