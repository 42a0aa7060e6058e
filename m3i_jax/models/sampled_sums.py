"""Weighted sums of samples of a map, the operation that DCNv3 and multi-scale deformable attention
share: every output of every group reads the group's channels bilinearly at P places, with zeros
outside, and adds what it reads with P weights.

The two differ in how places and weights follow from their arguments. That is `places` of a
`SampledSum`; the rest is here: the choice of a form for each platform, and the gradients, which
keep the arguments alone. The forms are those of `dcnv3.METHODS`.

B batch, C channels, G groups, D = C / G, P points, Q input cells, O outputs.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from m3i_jax import parallel
from m3i_jax.models import (
    dcnv3_cpu,
    dcnv3_dense,
    dcnv3_gpu,
    dcnv3_tpu,
    dcnv3_window_plan,
    dcnv3_windows,
)
from m3i_jax.models.dcnv3_dense import Samples, widen
from m3i_jax.objective.manual_axes import custom_vjp

_PART = 4096  # outputs that the plain form of a check computes at a time
_BAND = 2  # rows of a band and of its windows; more rows: fewer turns, more products with zeros


class Places(Protocol):
    """Makes places and weights of arrays. A hashable value, as it is a static argument."""

    def channels_last(self, *args: Any, **kwargs: Any) -> Samples:
        """Coordinates in pixels and weights, [B, O, G, P]."""

    def cells_last(self, *args: Any, **kwargs: Any) -> Samples:
        """The same, [B, G, P, O]; with `order`, in the order that it gives to arrays [B, O, ...].
        Only the places of calls with columns get one."""


class SampledSum(NamedTuple):
    """Static arguments of `sampled_sum`.

    Attributes:
      methods: (platform, method) pairs; the method of a platform without one is that of default.
      size: rows and columns of the map.
      out_rows: rows of the output, for bands; outputs that do not fill whole rows are padded.
      places: makes places and weights of the other arrays, [B, O, G, P, ...].
      columns: of the output where it is a map and neighbours sample neighbours; else 0.
    """

    methods: tuple[tuple[str, str], ...]
    size: tuple[int, int]
    out_rows: int
    places: Places
    columns: int = 0


def _cells_last(x_BxOxC: jax.Array, groups: int) -> jax.Array:
    b, o, c = x_BxOxC.shape
    return jnp.moveaxis(x_BxOxC, 1, 2).reshape(b, groups, c // groups, o)


def _channels_last(x_BxGxDxO: jax.Array) -> jax.Array:
    b, g, d, o = x_BxGxDxO.shape
    return jnp.moveaxis(x_BxGxDxO.reshape(b, g * d, o), 2, 1)


def _padded(call: SampledSum, method: str, at: Samples) -> Samples:
    """Samples [B, G, P, O] of whole rows where bands need them; the rest weighs nothing."""
    more = -at.y.shape[3] % call.out_rows if method == "band" else 0
    if not more:
        return at
    pad = lambda a, mode: jnp.pad(a, ((0, 0), (0, 0), (0, 0), (0, more)), mode=mode)
    return Samples(pad(at.y, "edge"), pad(at.x, "edge"), pad(at.m, "constant"))


def _by_platform(form: Callable[..., Any], call: SampledSum, *arrays: jax.Array) -> Any:
    """The form of the platform. Products with weights that are mostly zeros are no work of the
    model: at 1,536 pixels they would be an eighth of an InternImage-H."""
    forms = {platform: functools.partial(form, call, method) for platform, method in call.methods}
    with jax.named_scope("flops=0"):
        return (
            jax.lax.platform_dependent(*arrays, **forms)
            if len(set(call.methods)) > 1
            else forms["default"](*arrays)
        )


def _kernel(
    call: SampledSum, x_BxQxC: jax.Array, array_BxOxGxPxN: jax.Array
) -> tuple[Any, dict[str, Any], Callable[..., Samples]]:
    """The module of the platform's kernel, its settings, and the function that makes its samples of
    the arrays."""
    _, o, groups, points = array_BxOxGxPxN.shape[:4]
    like = groups, x_BxQxC.shape[2] // groups, points, x_BxQxC.dtype
    samples = call.places.cells_last
    if parallel.platform() in parallel.GPUS:
        return dcnv3_gpu, {"size": call.size, "interpret": False}, samples
    interpret = parallel.platform() != "tpu"
    if dcnv3_tpu.fits(call.size, *like):
        return dcnv3_tpu, {"size": call.size, "interpret": interpret}, samples
    plan = dcnv3_window_plan.plan_windows(call.size, o, call.columns, *like)
    if plan is None:
        raise ValueError(f"no kernel holds {groups} groups of {like[1]} channels side by side")
    if call.columns:
        samples = functools.partial(samples, order=plan.by_tile)
    return dcnv3_windows, {"plan": plan, "interpret": interpret}, samples


def _value(call: SampledSum, method: str, x_BxQxC: jax.Array, *arrays: jax.Array) -> jax.Array:
    if method == "fused":
        return dcnv3_cpu.forward(x_BxQxC, call.places.channels_last(*arrays), call.size)
    if method == "kernel":
        module, settings, samples = _kernel(call, x_BxQxC, arrays[0])
        run = functools.partial(module.forward, **settings)
        return parallel.per_device(run, x_BxQxC, samples(*arrays))
    # Without the barrier the compiler would transpose the coordinates again for every entry of the
    # matrix.
    at = jax.lax.optimization_barrier(call.places.cells_last(*arrays))
    if method == "gather":
        return gathered_sum(x_BxQxC, at, call.size)
    (_, groups, _, o), rows = at.y.shape, _BAND if method == "band" else 0
    y_BxGxDxO = dcnv3_dense.forward(
        _cells_last(x_BxQxC, groups), _padded(call, method, at), call.size, rows, call.out_rows
    )
    y_BxOxC = _channels_last(y_BxGxDxO)
    return y_BxOxC if y_BxOxC.shape[1] == o else y_BxOxC[:, :o]


def _gradients(
    call: SampledSum,
    method: str,
    x_BxQxC: jax.Array,
    *rest: jax.Array,
) -> tuple:
    *arrays, grad_BxOxC = rest
    if method == "kernel":
        module, settings, samples = _kernel(call, x_BxQxC, arrays[0])
        at, pull = jax.vjp(samples, *arrays)
        run = functools.partial(module.backward, **settings)
        dx, dat = parallel.per_device(run, x_BxQxC, at, grad_BxOxC)
        return (dx, *pull(dat))
    at, pull = jax.vjp(
        call.places.channels_last if method == "fused" else call.places.cells_last, *arrays
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
    at = jax.lax.optimization_barrier(at)
    if method == "gather":
        dx, dat = jax.vjp(lambda x, at: gathered_sum(x, at, call.size), x_BxQxC, at)[1](grad_BxOxC)
        return (dx, *pull(jax.lax.optimization_barrier(dat)))
    o, at, grad_BxGxDxO = at.y.shape[3], _padded(call, method, at), _cells_last(grad_BxOxC, groups)
    if more := at.y.shape[3] - o:
        grad_BxGxDxO = jnp.pad(grad_BxGxDxO, ((0, 0), (0, 0), (0, 0), (0, more)))
    dv, dat = dcnv3_dense.backward(
        _cells_last(x_BxQxC, groups), at, grad_BxGxDxO, call.size, rows, call.out_rows
    )
    if more:
        dat = Samples(*(a[..., :o] for a in dat))
    return (_channels_last(dv), *pull(jax.lax.optimization_barrier(dat)))


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def sampled_sum(call: SampledSum, x_BxQxC: jax.Array, *arrays: jax.Array) -> jax.Array:
    """The sums, [B, O, C] in the type of x, with gradients for x and the arrays.

    Args:
      call: what is static.
      x_BxQxC: the map, channels of a group side by side.
      arrays: what `call.places` reads.
    """
    return _by_platform(_value, call, x_BxQxC, *arrays)


sampled_sum.defvjp(
    lambda call, *arrays: (sampled_sum(call, *arrays), arrays),
    lambda call, residuals, grad: _by_platform(_gradients, call, *residuals, grad),
)


def kernel_fits(
    x_BxQxC: jax.Array,
    size: tuple[int, int],
    groups: int,
    points: int,
    outputs: int,
    *,
    is_map: bool = False,
) -> bool:
    """Whether the platform has a kernel for a sum, and it supports the shapes. `is_map`: whether
    the call has columns."""
    b, _, c = x_BxQxC.shape
    if parallel.kernels(b):
        like = groups, c // groups, points, x_BxQxC.dtype
        return dcnv3_tpu.fits(size, *like) or dcnv3_window_plan.supports(*like, is_map=is_map)
    rows = parallel.rows_of_device(b)
    return parallel.kernels(b, parallel.GPUS) and dcnv3_gpu.fits(
        size, c, groups * points, outputs, rows, x_BxQxC.dtype
    )


def kernel_is_trusted(
    call: SampledSum, bounds: tuple[tuple[float, float], ...], *arrays: jax.Array
) -> bool:
    """Whether the kernel may compute a sum on this platform (`parallel.trusted`).

    Args:
      call: static arguments, whatever its methods.
      bounds: (lowest, highest) of random numbers for each array, which try it.
      arrays: all arrays of the call, the map first.
    """
    call = call._replace(methods=(("default", "kernel"),))
    return parallel.trusted(
        parallel.KernelCall("sampled_sum", call, sampled_sum, _plain_sum, arrays, bounds)
    )


def _plain_sum(call: SampledSum, x_BxQxC: jax.Array, *arrays: jax.Array) -> jax.Array:
    """What the kernel must equal; a part of the outputs at a time, since the cells of a large map
    that all of them read are gigabytes."""
    at = call.places.cells_last(*arrays)
    b, g, p, o = at.y.shape
    if o <= _PART:
        return gathered_sum(x_BxQxC, at, call.size)
    more = ((0, 0), (0, 0), (0, 0), (0, -o % _PART))
    padded = Samples(*(jnp.pad(a, more) for a in at))  # weights of 0
    parts = Samples(*(jnp.moveaxis(a.reshape(b, g, p, -1, _PART), 3, 0) for a in padded))
    one = jax.checkpoint(lambda part: gathered_sum(x_BxQxC, part, call.size))
    y_NxBxOxC = jax.lax.map(one, parts)
    return jnp.moveaxis(y_NxBxOxC, 0, 1).reshape(b, -1, x_BxQxC.shape[2])[:, :o]


@jax.custom_vjp
def _inside(t: jax.Array) -> jax.Array:
    """Identity; a coordinate of -1 or less, which reads only the padding, gets no gradient."""
    return t


_inside.defvjp(lambda t: (t, t), lambda t, g: (jnp.where(t > -1, g, 0),))


def gathered_sum(x_BxQxC: jax.Array, at: Samples, size: tuple[int, int]) -> jax.Array:
    """The form `gather`, which JAX differentiates: [B, O, C] in the type of x.

    Args:
      x_BxQxC: the map.
      at: samples in pixels of the map, [B, G, P, O].
      size: its height and width.

    >>> at = Samples(*(jnp.full((1, 1, 1, 1), value) for value in (0.5, 1.0, 2.0)))
    >>> gathered_sum(jnp.arange(4.0).reshape(1, 4, 1), at, (2, 2)).item()
    4.0
    """
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
