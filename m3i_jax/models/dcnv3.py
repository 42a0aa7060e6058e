"""DCNv3, the operator of InternImage (Wang et al., 2023, Eq. 2), as a pure function with gradients.

Every output pixel of every group samples its group's channels bilinearly at P points that the
network chooses, and adds them with softmax weights. There are four exact forms:

dense    products with the matrix of bilinear weights, for whole maps or bands (`dcnv3_dense`)
kernel   the same without that matrix in HBM, for TPUs (`dcnv3_tpu`; `dcnv3_windows` for maps that
         VMEM cannot hold) and GPUs (`dcnv3_gpu`)
fused    a loop that reads the four cells around each sample where it adds them, for CPUs
         (`dcnv3_cpu`)
gather   one gather of those cells, packed side by side (as Scenic's deformable attention), which
         JAX differentiates: the reference

The fastest depends on the size of the map and the platform; `choose` is that rule. Coordinates and
weights are float32 for every precision of the input. The caller applies the softmax.

B batch, H W input size, I J output size, C channels, G groups, D = C / G, P points, O = I J.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax.models.dcnv3_dense import Samples, widen
from m3i_jax.models.sampled_sums import (
    SampledSum,
    gathered_sum,
    kernel_fits,
    kernel_is_trusted,
    sampled_sum,
)

# of random numbers that try map, offsets and weights
_BOUNDS = (-2.0, 2.0), (-2.0, 2.0), (0.0, 0.5)
METHODS = ("auto", "dense", "band", "kernel", "fused", "gather")


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


class _Displaced(NamedTuple):
    """Where DCNv3 samples: the undisplaced points of every output, and their displacements.

    Attributes:
      out: rows and columns of the output.
      step: stride, and coordinate of the first output.
      scale: `offset_scale`.
      grid: undisplaced points [P, 2].
    """

    out: tuple[int, int]
    step: tuple[int, int]
    scale: float
    grid: tuple[tuple[int, int], ...]

    def _rest_positions(self, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of every undisplaced point of every output, [O, P]."""
        (stride, shift), grid = self.step, np.asarray(self.grid)
        rows, columns = (
            stride * index + shift
            for index in np.divmod(np.arange(self.out[0] * self.out[1]), self.out[1])
        )
        down, over = (self.scale * grid[:, i] for i in (1, 0))
        return (rows[:, None] + down).astype(dtype), (columns[:, None] + over).astype(dtype)

    def channels_last(self, offset: jax.Array, mask: jax.Array) -> Samples:
        """Coordinates and weights [B, O, G, P] from [B, O, G, P, 2] and [B, O, G, P]."""
        dtype = widen(offset.dtype)
        rest_y, rest_x = (rest[:, None] for rest in self._rest_positions(dtype))
        y, x = offset[..., 1].astype(dtype), offset[..., 0].astype(dtype)
        return Samples(self.scale * y + rest_y, self.scale * x + rest_x, mask.astype(dtype))

    def cells_last(
        self, offset: jax.Array, mask: jax.Array, order: Callable[[Any], Any] | None = None
    ) -> Samples:
        """Coordinates and weights [B, G, P, O]: output cells last, where they fill vector
        registers. With `order`, a function of arrays [B, O, ...], in that order."""
        dtype = widen(offset.dtype)
        rest_y, rest_x = (rest.T for rest in self._rest_positions(dtype))
        if order:
            rest_y, rest_x = (order(rest.T[None])[0].T for rest in (rest_y, rest_x))
            offset, mask = order(offset), order(mask)
        b, o, g, p, _ = offset.shape
        moved = jnp.transpose(offset, (0, 2, 4, 3, 1))
        weight = jnp.moveaxis(mask.reshape(b, o, -1), 1, 2).reshape(b, g, p, o)
        if order:  # else XLA reorders what it has widened, twice the bytes
            moved, weight = jax.lax.optimization_barrier((moved, weight))
        moved, weight = moved.astype(dtype), weight.astype(dtype)
        return Samples(
            self.scale * moved[:, :, 1] + rest_y, self.scale * moved[:, :, 0] + rest_x, weight
        )


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
        that of `choose`. The numbers are equal to rounding. The kernel runs on TPUs and GPUs in
        bfloat16 or float32, elsewhere interpreted; auto takes it where every device computes its
        own rows: on one device, in a mesh set with jax.set_mesh, or inside shard_map.

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
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    for name, array, last in (("offset", offset_BxIxJxGxPx2, 2), ("mask", mask_BxIxJxGxP, 1)):
        expected = (b, *out, groups, len(grid), 2)[: 4 + last]
        if array.shape[:3] != expected[:3] or np.prod(array.shape[3:]) != np.prod(expected[3:]):
            raise ValueError(
                f"{name} has shape {array.shape}; for an input of {x_BxHxWxC.shape} and these"
                f" settings it must be {expected}"
            )
    offset = offset_BxIxJxGxPx2.reshape(b, -1, groups, len(grid), 2)
    mask = mask_BxIxJxGxP.reshape(b, -1, groups, len(grid))
    places = _Displaced(
        out=out,
        step=(stride, dilation * (kernel - 1) // 2 - pad),
        scale=offset_scale,
        grid=tuple(map(tuple, grid.tolist())),
    )
    x_BxQxC, size = x_BxHxWxC.reshape(b, -1, c), (height, width)
    call = SampledSum((("default", method),), size, out[0], places, out[1])
    if method == "auto":
        use_kernel = kernel_fits(
            x_BxQxC, size, groups, len(grid), offset.shape[1], is_map=True
        ) and kernel_is_trusted(call, _BOUNDS, x_BxQxC, offset, mask)
        default = "kernel" if use_kernel else choose(height, width)
        call = call._replace(methods=(("cpu", choose(height, width, "cpu")), ("default", default)))
    if method == "gather":
        y_BxOxC = gathered_sum(
            x_BxQxC,
            jax.lax.optimization_barrier(places.cells_last(offset, mask)),
            (height, width),
        )
    else:
        y_BxOxC = sampled_sum(call, x_BxQxC, offset, mask)
    return y_BxOxC.reshape(b, *out, c)
