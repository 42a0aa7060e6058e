"""The gradient of a depth-wise convolution's kernel and bias on a GPU, as a Pallas kernel for
Triton.

Each of its K^2 numbers a channel is a sum over all cells, of the gradient times the input shifted.
XLA merges two such sums into a pass, so that a side of 5 reads both maps thirteen times, compiled
for an H100. Here a program keeps all sums of some channels in registers while it goes through the
cells of some images, and reads each from HBM once; XLA adds up what the programs give, in an order
that is always the same.

B images, H W size of the maps, C channels, K side of the kernel, N cells of a step."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from m3i_jax import parallel

_CELLS = 4  # of a step, along a row: that many partial sums of each number
_CHANNELS = 128  # of a program
_PROGRAMS = 1024  # aimed at: enough for all cores
_WARPS = 4
_LARGEST = 5  # side: 26 sums of four cells and 128 channels are 104 registers of a thread


class _Sizes(NamedTuple):
    """Static sizes. images: of a program."""

    batch: int
    height: int
    width: int
    channels: int
    side: int
    images: int

    @property
    def parts(self) -> int:
        return -(-self.batch // self.images)

    @property
    def tiles(self) -> int:
        return -(-self.channels // _CHANNELS)


def fits(shape: tuple[int, ...], side: int, dtype: Any) -> bool:
    """Whether the kernel supports maps of that shape on a device, and a side.

    >>> fits((64, 12, 12, 1280), 5, "bfloat16"), fits((64, 12, 12, 1280), 7, "bfloat16")
    (True, False)
    """
    size = shape[0] * shape[1] * shape[2] * shape[3]
    known = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float32)
    return known and side <= _LARGEST and size < 2**31


def _kernel(x: Any, g: Any, out: Any, *, sizes: _Sizes) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    number = pl.program_id(0)
    part = jax.lax.div(number, jnp.int32(sizes.tiles))
    tile = number - part * sizes.tiles
    channel = tile * _CHANNELS + jnp.arange(_CHANNELS)[None]
    steps, reach = -(-sizes.width // _CELLS), sizes.side // 2
    cell = jnp.arange(_CELLS)[:, None]

    def load(ref: Any, image: Any, row: Any, column: Any) -> jax.Array:
        inside = (row >= 0) & (row < sizes.height) & (column >= 0) & (column < sizes.width)
        there = inside & (channel < sizes.channels) & (image < sizes.batch)
        index = ((image * sizes.height + row) * sizes.width + column) * sizes.channels + channel
        return triton.load(ref.at[index], mask=there, other=0).astype(jnp.float32)

    def add(step: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        line = jax.lax.div(step, jnp.int32(steps))
        column = (step - line * steps) * _CELLS + cell
        image = jax.lax.div(line, jnp.int32(sizes.height))
        row = line - image * sizes.height
        image = part * sizes.images + image
        g_NxC = load(g, image, row, column)
        shifts = [(i - reach, j - reach) for i in range(sizes.side) for j in range(sizes.side)]
        new = [load(x, image, row + i, column + j) * g_NxC for i, j in shifts]
        return tuple(total + each for total, each in zip(sums, [*new, g_NxC], strict=True))

    count = sizes.side**2 + 1
    start = tuple(jnp.zeros((_CELLS, _CHANNELS), jnp.float32) for _ in range(count))
    turns = sizes.images * sizes.height * steps
    for tap, total in enumerate(jax.lax.fori_loop(0, turns, add, start)):
        index = (part * count + tap) * sizes.channels + channel[0]
        triton.store(out.at[index], total.sum(0), mask=channel[0] < sizes.channels)


def _sums(x_BxHxWxC: jax.Array, g_BxHxWxC: jax.Array, side: int, images: int) -> jax.Array:
    """[P, K^2 + 1, C] float32, of P parts of so many images."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    b, h, w, c = x_BxHxWxC.shape
    sizes, count = _Sizes(b, h, w, c, side, images), side**2 + 1
    like = jax.typeof(x_BxHxWxC).manual_axis_type
    flat = (sizes.parts * count * sizes.channels,)
    sums = pl.pallas_call(
        functools.partial(_kernel, sizes=sizes),
        grid=(sizes.parts * sizes.tiles,),
        out_shape=jax.ShapeDtypeStruct(flat, jnp.float32, manual_axis_type=like),
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
        cost_estimate=pl.CostEstimate(
            flops=0,  # of products of matrices
            transcendentals=0,
            bytes_accessed=2 * x_BxHxWxC.size * x_BxHxWxC.dtype.itemsize + 4 * flat[0],
        ),
        interpret=parallel.platform() == "cpu",
    )(x_BxHxWxC.reshape(-1), g_BxHxWxC.reshape(-1))
    return sums.reshape(sizes.parts, count, sizes.channels)


def kernel_gradient(
    x_BxHxWxC: jax.Array, g_BxHxWxC: jax.Array, side: int
) -> tuple[jax.Array, jax.Array]:
    """Gradients of kernel [K, K, C] and bias [C] of a depth-wise convolution with stride 1 and zero
    padding, float32. On a CPU it is interpreted.

    Args:
      x_BxHxWxC: its input; every device its own rows.
      g_BxHxWxC: gradient of its result.
      side: K, odd.

    >>> ones = jnp.ones((2, 3, 3, 1))
    >>> kernel, bias = kernel_gradient(ones, ones, 3)
    >>> kernel[..., 0].tolist(), bias.tolist()
    ([[8.0, 12.0, 8.0], [12.0, 18.0, 12.0], [8.0, 12.0, 8.0]], [18.0])
    """

    def of_device(x_BxHxWxC: jax.Array, g_BxHxWxC: jax.Array) -> jax.Array:
        b, *_, c = x_BxHxWxC.shape
        images = max(1, b * -(-c // _CHANNELS) // _PROGRAMS)
        return _sums(x_BxHxWxC, g_BxHxWxC, side, images).sum(0, keepdims=True)

    total = parallel.per_device(of_device, x_BxHxWxC, g_BxHxWxC).sum(0)
    return total[:-1].reshape(side, side, -1), total[-1]


def _each_image(side: int, x_BxHxWxC: jax.Array, g_BxHxWxC: jax.Array) -> jax.Array:
    """The kernel's sums of every image, [B, (K^2 + 1) C], to compare; without gradients."""
    x_BxHxWxC, g_BxHxWxC = jax.lax.stop_gradient((x_BxHxWxC, g_BxHxWxC))
    return _sums(x_BxHxWxC, g_BxHxWxC, side, 1).reshape(len(x_BxHxWxC), -1)


def _each_image_plainly(side: int, x_BxHxWxC: jax.Array, g_BxHxWxC: jax.Array) -> jax.Array:
    """What `_each_image` must equal."""
    x_BxHxWxC, g_BxHxWxC = jax.lax.stop_gradient((x_BxHxWxC, g_BxHxWxC))
    (_, h, w, _), reach = x_BxHxWxC.shape, side // 2
    padded = jnp.pad(x_BxHxWxC, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    taps = [padded[:, i : i + h, j : j + w] for i in range(side) for j in range(side)]
    sums = [(tap * g_BxHxWxC).sum((1, 2)) for tap in (*taps, jnp.ones_like(x_BxHxWxC))]
    return jnp.concatenate(sums, 1)


def is_trusted(x_BxHxWxC: jax.Array, side: int) -> bool:
    """Whether the platform is a GPU, and the kernel fits the maps and may be used there."""
    b, *rest = x_BxHxWxC.shape
    if not parallel.kernels(b, parallel.GPUS):
        return False
    if not fits((parallel.rows_of_device(b), *rest), side, x_BxHxWxC.dtype):
        return False
    arrays, bounds = (x_BxHxWxC, x_BxHxWxC), ((-1.0, 1.0), (-1.0, 1.0))
    return parallel.trusted(
        parallel.KernelCall("depthwise", side, _each_image, _each_image_plainly, arrays, bounds)
    )
