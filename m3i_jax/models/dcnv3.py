"""DCNv3, the operator of InternImage (Wang et al., 2023, Eq. 2), as a pure function with gradients.

Every output pixel of every group samples its group's channels bilinearly at P points that the
network chooses, and adds them with softmax weights. There are four exact forms:

dense    products with the matrix of bilinear weights, for whole maps or bands (`dcnv3_dense`)
kernel   the same without that matrix in HBM, for TPUs (`dcnv3_tpu`)
fused    a loop that reads the four cells around each sample where it adds them, for CPUs
         (`dcnv3_cpu`)
gather   one gather of those cells, packed side by side (as Scenic's deformable attention), which
         JAX differentiates: the reference

The fastest depends on the size of the map and the platform; `choose` is that rule. Coordinates and
weights are float32 for every precision of the input. The caller applies the softmax.

B batch, H W input size, I J output size, C channels, G groups, D = C / G, P points, O = I J.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import parallel
from m3i_jax.models import dcnv3_cpu, dcnv3_dense, dcnv3_tpu
from m3i_jax.models.dcnv3_dense import Samples, widen

METHODS = ("auto", "dense", "band", "kernel", "fused", "gather")
_BAND = 2  # rows of a band and of its windows; more rows: fewer turns, more products with zeros


def points(kernel: int, dilation: int = 1, *, remove_center: bool = False) -> np.ndarray:
    """Undisplaced sampling points (x, y) of the kernel around its centre, [P, 2], the column the
    slow index.

    Raises:
      ValueError: the centre of an even kernel.

    >>> points(3)[:4].tolist()
    [[-1, -1], [-1, 0], [-1, 1], [0, -1]]
    >>> len(points(3, remove_center=True)), points(2, 2).tolist()
    (8, [[-1, -1], [-1, 1], [1, -1], [1, 1]])
    """
    line = np.arange(kernel) * dilation - dilation * (kernel - 1) // 2
    grid = np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    if not remove_center:
        return grid
    if kernel % 2 == 0:
        raise ValueError(f"a kernel of {kernel} has no centre to remove; it must be odd")
    return np.delete(grid, kernel * kernel // 2, 0)


def output_size(
    size: int, *, kernel: int = 3, stride: int = 1, pad: int = 1, dilation: int = 1
) -> int:
    """Rows (or columns) of the output for `size` rows (or columns) of the input.

    >>> output_size(12), output_size(12, stride=2)
    (12, 6)
    """
    return (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1


def choose(height: int, width: int, platform: str = "default") -> str:
    """The fastest method for an input of this size, as measured with `python -m tests.bench.dcnv3`;
    for TPUs by the bytes that it counts.

    The dense matrix has H W entries for every output where the other forms read 4 P D numbers;
    bands compute only the rows that samples touch, but loop. On matrix units products are fastest:
    up to 14 x 14 cells the plain one, above it bands. On a CPU they are fastest for the smallest
    maps only. On a TPU the kernel moves a quarter to a half of their bytes.

    >>> choose(12, 12), choose(48, 48), choose(48, 48, "cpu"), choose(48, 48, "tpu")
    ('dense', 'band', 'fused', 'kernel')
    """
    if platform == "tpu":
        return "kernel"
    if platform == "cpu":
        return "dense" if height * width <= 49 else "fused"
    return "dense" if height * width <= 200 else "band"


class _Call(NamedTuple):
    """Static arguments of a call.

    Attributes:
      methods: (platform, method) pairs.
      size, out: rows and columns of input and output.
      step: stride, and coordinate of the first output.
      scale: `offset_scale`.
      grid: undisplaced points [P, 2].
    """

    methods: tuple[tuple[str, str], ...]
    size: tuple[int, int]
    out: tuple[int, int]
    step: tuple[int, int]
    scale: float
    grid: tuple[tuple[int, int], ...]


def _rest_positions(call: _Call, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every undisplaced point of every output, [O, P]."""
    (stride, shift), grid = call.step, np.asarray(call.grid)
    rows, columns = (
        stride * index + shift
        for index in np.divmod(np.arange(call.out[0] * call.out[1]), call.out[1])
    )
    down, over = (call.scale * grid[:, i] for i in (1, 0))
    return (rows[:, None] + down).astype(dtype), (columns[:, None] + over).astype(dtype)


def _samples_channels_last(call: _Call, offset: jax.Array, mask: jax.Array) -> Samples:
    """Coordinates and weights [B, O, G, P] from [B, O, G, P, 2] and [B, O, G, P]."""
    dtype = widen(offset.dtype)
    rest_y, rest_x = (rest[:, None] for rest in _rest_positions(call, dtype))
    y, x = offset[..., 1].astype(dtype), offset[..., 0].astype(dtype)
    return Samples(call.scale * y + rest_y, call.scale * x + rest_x, mask.astype(dtype))


def _samples(call: _Call, offset: jax.Array, mask: jax.Array) -> Samples:
    """Coordinates and weights [B, G, P, O]: output cells last, where they fill vector registers."""
    dtype = widen(offset.dtype)
    b, o, g, p, _ = offset.shape
    rest_y, rest_x = (rest.T for rest in _rest_positions(call, dtype))
    moved = jnp.transpose(offset, (0, 2, 4, 3, 1)).astype(dtype)
    weight = jnp.moveaxis(mask.reshape(b, o, -1), 1, 2).reshape(b, g, p, o).astype(dtype)
    return Samples(
        call.scale * moved[:, :, 1] + rest_y, call.scale * moved[:, :, 0] + rest_x, weight
    )


def _cells_last(x_BxOxC: jax.Array, groups: int) -> jax.Array:
    b, o, c = x_BxOxC.shape
    return jnp.moveaxis(x_BxOxC, 1, 2).reshape(b, groups, c // groups, o)


def _channels_last(x_BxGxDxO: jax.Array) -> jax.Array:
    b, g, d, o = x_BxGxDxO.shape
    return jnp.moveaxis(x_BxGxDxO.reshape(b, g * d, o), 2, 1)


def _by_platform(form: Callable[..., Any], call: _Call, *arrays: jax.Array) -> Any:
    forms = {platform: functools.partial(form, call, method) for platform, method in call.methods}
    return (
        jax.lax.platform_dependent(*arrays, **forms)
        if len(set(call.methods)) > 1
        else forms["default"](*arrays)
    )


def _value(
    call: _Call, method: str, x_BxQxC: jax.Array, offset: jax.Array, mask: jax.Array
) -> jax.Array:
    if method == "fused":
        return dcnv3_cpu.forward(x_BxQxC, _samples_channels_last(call, offset, mask), call.size)
    if method == "kernel":
        run = functools.partial(
            dcnv3_tpu.forward, size=call.size, interpret=parallel.platform() != "tpu"
        )
        return parallel.per_device(run, x_BxQxC, _samples(call, offset, mask))
    # Without the barrier the compiler would transpose the coordinates again for every entry of the
    # matrix.
    at, rows = (
        jax.lax.optimization_barrier(_samples(call, offset, mask)),
        (_BAND if method == "band" else 0),
    )
    return _channels_last(
        dcnv3_dense.forward(_cells_last(x_BxQxC, at.y.shape[1]), at, call.size, rows, call.out[0])
    )


def _gradients(
    call: _Call,
    method: str,
    x_BxQxC: jax.Array,
    offset: jax.Array,
    mask: jax.Array,
    grad_BxOxC: jax.Array,
) -> tuple:
    at, pull = jax.vjp(
        functools.partial(_samples_channels_last if method == "fused" else _samples, call),
        offset,
        mask,
    )
    if method == "fused":
        run = functools.partial(dcnv3_cpu.backward, size=call.size)
        # It merges images, groups and rows of cells into one axis, which the partitioner cannot
        # split.
        per_device = parallel.is_single_device(x_BxQxC.shape[0])
        dx, dat = (
            parallel.per_device(run, x_BxQxC, at, grad_BxOxC)
            if per_device
            else run(x_BxQxC, at, grad_BxOxC)
        )
        return (dx, *pull(dat))
    groups, rows = at.y.shape[1], _BAND if method == "band" else 0
    if method == "kernel":
        run = functools.partial(
            dcnv3_tpu.backward, size=call.size, interpret=parallel.platform() != "tpu"
        )
        dx, dat = parallel.per_device(run, x_BxQxC, at, grad_BxOxC)
        return (dx, *pull(dat))
    at = jax.lax.optimization_barrier(at)
    dv, dat = dcnv3_dense.backward(
        _cells_last(x_BxQxC, groups),
        at,
        _cells_last(grad_BxOxC, groups),
        call.size,
        rows,
        call.out[0],
    )
    return (_channels_last(dv), *pull(jax.lax.optimization_barrier(dat)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _operator(call: _Call, x_BxQxC: jax.Array, offset: jax.Array, mask: jax.Array) -> jax.Array:
    return _by_platform(_value, call, x_BxQxC, offset, mask)


_operator.defvjp(
    lambda call, *arrays: (_operator(call, *arrays), arrays),
    lambda call, residuals, grad: _by_platform(_gradients, call, *residuals, grad),
)


@jax.custom_vjp
def _inside(t: jax.Array) -> jax.Array:
    """Identity; a coordinate of -1 or less, which reads only the padding, gets no gradient."""
    return t


_inside.defvjp(lambda t: (t, t), lambda t, g: (jnp.where(t > -1, g, 0),))


def _gather(x_BxQxC: jax.Array, at: Samples, size: tuple[int, int]) -> jax.Array:
    height, width = size
    # the points of an output side by side, as they are summed
    at = Samples(*(jnp.swapaxes(a, 2, 3) for a in at))
    b, g, o, p = at.y.shape
    d = x_BxQxC.shape[2] // g
    # One ring of zeros before and two behind: every coordinate in [-1, size] has its four cells;
    # everything beyond is zero.
    y, x = jnp.clip(_inside(at.y), -1, height), jnp.clip(_inside(at.x), -1, width)
    row, column = jnp.floor(y), jnp.floor(x)
    below, right = y - row, x - column
    v = jnp.pad(x_BxQxC.reshape(b, height, width, g, d), ((0, 0), (1, 2), (1, 2), (0, 0), (0, 0)))
    packed = jnp.concatenate([v[:, :-1, :-1], v[:, :-1, 1:], v[:, 1:, :-1], v[:, 1:, 1:]], -1)
    packed_BxGxQx4D = packed.reshape(b, -1, g, 4 * d).swapaxes(1, 2)
    index = ((row + 1) * (width + 2) + column + 1).astype(jnp.int32).reshape(b, g, o * p, 1)
    cells = jnp.take_along_axis(packed_BxGxQx4D, index, 2, mode="clip").reshape(b, g, o, p, 4, d)
    weight = (
        jnp.stack(
            [(1 - below) * (1 - right), (1 - below) * right, below * (1 - right), below * right], -1
        )
        * at.m[..., None]
    )
    weight = weight.astype(x_BxQxC.dtype)
    precision = None if cells.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    out = jnp.einsum(
        "bgopk,bgopkd->bogd",
        weight,
        cells,
        precision=precision,
        preferred_element_type=widen(cells.dtype),
    )
    return out.reshape(b, o, g * d).astype(x_BxQxC.dtype)


def dcnv3(
    x_BxHxWxC: jax.Array,
    offset_BxIxJxGxPx2: jax.Array,
    mask_BxIxJxGxP: jax.Array,
    *,
    kernel: int = 3,
    stride: int = 1,
    pad: int = 1,
    dilation: int = 1,
    groups: int,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    method: str = "auto",
) -> jax.Array:
    """Deformable convolution v3: `y[i, j, g] = sum_p mask[p] * x_g(position of p)`, bilinear, zero
    outside.

    Point p of output (i, j) has column `stride j - pad + c + offset_scale (points[p, 0] +
    offset[p, 0])`, and the row is the same with i and [1]; c = dilation (kernel - 1) // 2. x,
    offset and mask get gradients; at an integer coordinate the offset's is the one to the right.

    Args:
      x_BxHxWxC: input, channels of a group side by side.
      offset_BxIxJxGxPx2: displacement (x, y) of every point in pixels before `offset_scale`; P =
        kernel^2, less one without the centre, in the order of `points`. The last three axes may be
        merged.
      mask_BxIxJxGxP: weight of every point, after InternImage's softmax over P. The last two axes
        may be merged.
      kernel, stride, pad, dilation: as of a convolution; pad in pixels on every side.
      groups: G.
      offset_scale: factor of the points and of the offsets (2 in InternImage-L and XL).
      remove_center: omit the middle point.
      method: dense, band (dense over the rows that samples touch), kernel, fused, gather, or auto:
        that of `choose`. The numbers are equal to rounding. The kernel runs on TPUs in bfloat16 or
        float32, elsewhere interpreted; auto takes it where every device computes its own rows: on
        one device, in a mesh set with jax.set_mesh, or inside shard_map.

    Returns:
      [B, I, J, C] in the type of x.

    Raises:
      ValueError: shapes that do not fit each other, or an unknown method.

    >>> x = jnp.arange(9.0).reshape(1, 3, 3, 1)
    >>> offset, mask = jnp.zeros((1, 3, 3, 1, 9, 2)), jnp.full((1, 3, 3, 1, 9), 1 / 9)
    >>> dcnv3(x, offset, mask, groups=1)[0, 1, 1].tolist()  # the mean of the neighbourhood
    [4.0]
    >>> round(float(dcnv3(x, offset + 0.5, mask, groups=1, method="gather")[0, 0, 0, 0]), 3)
    2.222
    """
    b, height, width, c = x_BxHxWxC.shape
    shape = {"kernel": kernel, "stride": stride, "pad": pad, "dilation": dilation}
    out = output_size(height, **shape), output_size(width, **shape)
    grid = points(kernel, dilation, remove_center=remove_center)
    if c % groups:
        raise ValueError(f"{c} channels do not divide into {groups} groups")
    if method not in METHODS:
        raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
    for name, array, last in (("offset", offset_BxIxJxGxPx2, 2), ("mask", mask_BxIxJxGxP, 1)):
        expected = (b, *out, groups, len(grid), 2)[: 4 + last]
        if array.shape[:3] != expected[:3] or np.prod(array.shape[3:]) != np.prod(expected[3:]):
            raise ValueError(
                f"{name} has shape {array.shape}; for an input of {x_BxHxWxC.shape} and these"
                f" settings it must be {expected}"
            )
    offset = offset_BxIxJxGxPx2.reshape(b, -1, groups, len(grid), 2)
    mask = mask_BxIxJxGxP.reshape(b, -1, groups, len(grid))
    use_kernel = parallel.kernels(b) and dcnv3_tpu.fits(
        (height, width), groups, c // groups, len(grid), x_BxHxWxC.dtype
    )
    platforms = {"cpu": "cpu", "default": "tpu" if use_kernel else "default"}
    methods = {
        name: choose(height, width, p) if method == "auto" else method
        for name, p in platforms.items()
    }
    call = _Call(
        methods=tuple(methods.items()),
        size=(height, width),
        out=out,
        step=(stride, dilation * (kernel - 1) // 2 - pad),
        scale=offset_scale,
        grid=tuple(map(tuple, grid.tolist())),
    )
    x_BxQxC = x_BxHxWxC.reshape(b, -1, c)
    if method == "gather":
        y_BxOxC = _gather(
            x_BxQxC, jax.lax.optimization_barrier(_samples(call, offset, mask)), (height, width)
        )
    else:
        y_BxOxC = _operator(call, x_BxQxC, offset, mask)
    return y_BxOxC.reshape(b, *out, c)
