"""DCNv3 as matrix products: the bilinear weights of all samples form one matrix of products of hat
functions.

A sample at (y, x) weights input cell (q, r) by hat(y - q) hat(x - r) with hat(t) = max(1 - |t|, 0),
which covers zero padding too. The matrix of a group, [input cells, output cells], is the sum over
its points of modulated hats; the output is one product with it, the gradient of the input another,
and the gradient of the matrix, read at the samples, gives those of offsets and modulation. There is
no scatter, and the backward pass keeps only the arguments.

Maps are multiplied as a whole or in bands: with `rows`, output rows are taken a few at a time and
multiplied only with the input rows that their samples touch. The offsets decide at run time which
those are, so the result is exact for offsets of any size, and only large offsets cost more.

B batch, G groups, D channels of a group, P points, Q input cells, O output cells, R rows of a
window."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax.objective.manual_axes import vary_like


class Samples(NamedTuple):
    """Coordinates in pixels and modulation of all samples, [B, G, P, O], float32 or wider."""

    y: jax.Array
    x: jax.Array
    m: jax.Array


def widen(dtype: Any) -> Any:
    """Precision of coordinates, weights and sums: float32, or float64 where the input is.

    >>> widen(jnp.bfloat16)
    dtype('float32')
    """
    return jnp.promote_types(dtype, jnp.float32)


def _einsum(terms: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Product in the type of the input, sums wide. float32 is not rounded to bfloat16, the default
    of TPUs."""
    precision = None if a.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jnp.einsum(
        terms, a, b.astype(a.dtype), precision=precision, preferred_element_type=widen(a.dtype)
    )


def _cells(height: int, width: int, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.divmod(np.arange(height * width), width)
    return rows.astype(dtype)[:, None], columns.astype(dtype)[:, None]


def hat(t: jax.Array) -> jax.Array:
    """Bilinear weight of a cell at a distance of t pixels along one axis.

    >>> print(hat(jnp.array([0.0, -0.25, 1.5])))
    [1.   0.75 0.  ]
    """
    return jnp.maximum(1 - jnp.abs(t), 0)


def slope(t: jax.Array) -> jax.Array:
    """Derivative of the hat; at integers the one to the right, as of the floor.

    >>> print(slope(jnp.array([-1.0, -0.5, 0.0, 1.0])))
    [ 1.  1. -1.  0.]
    """
    return jnp.where((t >= 0) & (t < 1), -1.0, jnp.where((t >= -1) & (t < 0), 1.0, 0.0)).astype(
        t.dtype
    )


def _columns(at: Samples, width: int) -> jax.Array:
    """The modulated hats of the columns, [B, G, P, W, O], stored because every row uses them."""
    hats = at.m[:, :, :, None] * hat(
        at.x[:, :, :, None] - np.arange(width, dtype=at.x.dtype)[:, None]
    )
    return jax.lax.optimization_barrier(hats)


def _weights(
    y_BxGxPxO: jax.Array, columns_BxGxPxWxO: jax.Array, height: int, dtype: Any
) -> jax.Array:
    """The matrix [B, G, Q, O], in the precision of the product. The hats of the rows are not
    stored."""
    b, g, points, width, o = columns_BxGxPxWxO.shape
    rows = np.arange(height, dtype=y_BxGxPxO.dtype)[:, None, None]
    total: Any = 0.0
    for p in range(points):
        total += hat(y_BxGxPxO[:, :, p, None, None] - rows) * columns_BxGxPxWxO[:, :, p, None]
    return jnp.asarray(total, dtype).reshape(b, g, height * width, o)


def _read_by_index(slopes_BxGxQxO: jax.Array, at: Samples, height: int, width: int) -> Samples:
    """Gradient of the matrix at every sample, its derivatives by y and x and its value, from the
    four cells around each."""
    # a large coordinate would overflow as an integer
    top, left = jnp.clip(at.y, -2, height + 1), jnp.clip(at.x, -2, width + 1)
    row, column = jnp.floor(top).astype(jnp.int32), jnp.floor(left).astype(jnp.int32)
    below, right = top - jnp.floor(top), left - jnp.floor(left)

    def cell(down: int, over: int) -> jax.Array:
        y, x = row + down, column + over
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        index = jnp.clip(y, 0, height - 1) * width + jnp.clip(x, 0, width - 1)
        return jnp.where(
            inside, jnp.take_along_axis(slopes_BxGxQxO, index, 2, mode="promise_in_bounds"), 0
        )

    a, b, c, d = cell(0, 0), cell(0, 1), cell(1, 0), cell(1, 1)
    upper, lower = a + right * (b - a), c + right * (d - c)
    return Samples(
        lower - upper, (1 - below) * (b - a) + below * (d - c), upper + below * (lower - upper)
    )


def _read_by_sum(slopes_BxGxQxO: jax.Array, at: Samples, height: int, width: int) -> Samples:
    """As `_read_by_index`, by sums over all cells: for platforms with a slow gather."""
    rows, columns = _cells(height, width, at.y.dtype)
    sums = []
    for p in range(at.y.shape[2]):
        down, over = at.y[:, :, p, None] - rows, at.x[:, :, p, None] - columns
        hat_y, hat_x = hat(down), hat(over)
        parts = slope(down) * hat_x, hat_y * slope(over), hat_y * hat_x
        sums.append([(slopes_BxGxQxO * part).sum(2) for part in parts])
    return Samples(*(jnp.stack(part, 2) for part in zip(*sums, strict=True)))


def _read(slopes_BxGxQxO: jax.Array, at: Samples, height: int, width: int) -> Samples:
    forms = {
        name: functools.partial(form, height=height, width=width)
        for name, form in (("tpu", _read_by_sum), ("default", _read_by_index))
    }
    return jax.lax.platform_dependent(slopes_BxGxQxO, at, **forms)


def sample_gradients(at: Samples, read: Samples) -> Samples:
    """Gradients of the samples from the matrix's gradient at each: its derivatives by y and x, and
    its value.

    A coordinate of -1 or less gets none: it reads only the padding, as in the published operator.

    >>> at = Samples(*(jnp.array([value]) for value in (0.5, -1.0, 2.0)))
    >>> read = Samples(*[jnp.ones(1)] * 3)
    >>> [a.item() for a in sample_gradients(at, read)]
    [2.0, 0.0, 1.0]
    """
    return Samples(
        read.y * jnp.where(at.y > -1, at.m, 0), read.x * jnp.where(at.x > -1, at.m, 0), read.m
    )


def _window(v_BxGxDxQ: jax.Array, row: Any, rows: int, width: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(v_BxGxDxQ, row * width, rows * width, 3)


def _bands(at: Samples, height: int, rows: int, out_rows: int) -> tuple[Samples, jax.Array]:
    """Samples by band of output rows, [T, B, G, P, O / T], and the input rows [T, 2] that each band
    touches."""
    tiles = next(n for n in range(max(1, out_rows // rows), out_rows + 1) if out_rows % n == 0)
    b, g, p, o = at.y.shape
    split = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(b, g, p, tiles, o // tiles), 3, 0), at)
    floor = jnp.floor(split.y)
    first, last = floor.min((1, 2, 3, 4)), floor.max((1, 2, 3, 4)) + 2
    # otherwise the band is multiplied with every row, so that a NaN reaches the output
    finite = jnp.isfinite(first) & jnp.isfinite(last)
    span = jnp.stack([jnp.where(finite, first, 0), jnp.where(finite, last, height)], -1)
    return split, jnp.clip(span, 0, height).astype(jnp.int32)


def _through(span: jax.Array, rows: int, body: Any, start: Any) -> Any:
    """`body(row, carry)` for every window of rows from span[0] up to span[1]."""
    step = lambda state: (state[0] + rows, body(state[0], state[1]))
    # For profiling.flops: turns for a band as high as a window and a 3 x 3 kernel without offsets.
    with jax.named_scope(f"turns={-(-(rows + 3) // rows)}"):
        return jax.lax.while_loop(lambda state: state[0] < span[1], step, (span[0], start))[1]


def forward(
    v_BxGxDxQ: jax.Array, at: Samples, size: tuple[int, int], rows: int = 0, out_rows: int = 0
) -> jax.Array:
    """Modulated sum of samples, [B, G, D, O] in the type of v.

    Args:
      v_BxGxDxQ: the input, cells last.
      at: samples in pixels of the input.
      size: its height and width; Q is their product.
      rows: 0: the matrix of the whole map; else output and input rows are taken about that many at
        a time.
      out_rows: rows of the output, for bands.

    >>> at = Samples(*(jnp.full((1, 1, 1, 1), value) for value in (0.5, 1.0, 2.0)))
    >>> v = jnp.arange(4.0).reshape(1, 1, 1, 4)
    >>> forward(v, at, (2, 2)).item()  # twice the mean of cells 1 and 3
    4.0
    """
    (height, width), dtype = size, v_BxGxDxQ.dtype
    if not rows:
        return _einsum(
            "bgdq,bgqo->bgdo", v_BxGxDxQ, _weights(at.y, _columns(at, width), height, dtype)
        ).astype(dtype)
    padded = jnp.pad(v_BxGxDxQ, ((0, 0), (0, 0), (0, 0), (0, rows * width)))
    split, spans = _bands(at, height, rows, out_rows)
    b, g, d, _ = v_BxGxDxQ.shape

    def band(tile: tuple[Samples, jax.Array]) -> jax.Array:
        samples, span = tile
        columns = _columns(samples, width)

        def add(row: Any, total: jax.Array) -> jax.Array:
            weights = _weights(samples.y - row, columns, rows, dtype)
            return total + _einsum("bgdq,bgqo->bgdo", _window(padded, row, rows, width), weights)

        start = jnp.zeros((b, g, d, samples.y.shape[-1]), widen(dtype))
        return _through(span, rows, add, vary_like(start, (padded, tile))).astype(dtype)

    return jnp.moveaxis(jax.lax.map(band, (split, spans)), 0, 3).reshape(b, g, d, -1)


def backward(
    v_BxGxDxQ: jax.Array,
    at: Samples,
    grad_BxGxDxO: jax.Array,
    size: tuple[int, int],
    rows: int = 0,
    out_rows: int = 0,
) -> tuple[jax.Array, Samples]:
    """Gradients of the input, and of the samples' coordinates and modulation. Arguments as of
    `forward`.

    >>> at = Samples(*(jnp.full((1, 1, 1, 1), value) for value in (0.5, 1.0, 2.0)))
    >>> dv, grad = backward(jnp.arange(4.0).reshape(1, 1, 1, 4), at, jnp.ones((1, 1, 1, 1)), (2, 2))
    >>> dv.ravel().tolist(), grad.y.item(), grad.m.item()
    ([0.0, 1.0, 0.0, 1.0], 4.0, 2.0)
    """
    (height, width), dtype = size, v_BxGxDxQ.dtype
    if not rows:
        dv = _einsum(
            "bgdo,bgqo->bgdq", grad_BxGxDxO, _weights(at.y, _columns(at, width), height, dtype)
        )
        read = _read(_einsum("bgdq,bgdo->bgqo", v_BxGxDxQ, grad_BxGxDxO), at, height, width)
    else:
        padded = jnp.pad(v_BxGxDxQ, ((0, 0), (0, 0), (0, 0), (0, rows * width)))
        split, spans = _bands(at, height, rows, out_rows)
        b, g, d, o = grad_BxGxDxO.shape
        grads = jnp.moveaxis(grad_BxGxDxO.reshape(b, g, d, len(spans), -1), 3, 0)

        def band(
            dv: jax.Array, tile: tuple[Samples, jax.Array, jax.Array]
        ) -> tuple[jax.Array, Samples]:
            samples, span, grad = tile
            columns = _columns(samples, width)

            def add(row: Any, carry: tuple[jax.Array, Samples]) -> tuple[jax.Array, Samples]:
                dv, read = carry
                local, part = samples._replace(y=samples.y - row), _window(padded, row, rows, width)
                part_dv = _einsum("bgdo,bgqo->bgdq", grad, _weights(local.y, columns, rows, dtype))
                dv = jax.lax.dynamic_update_slice_in_dim(
                    dv, _window(dv, row, rows, width) + part_dv, row * width, 3
                )
                more = _read(_einsum("bgdq,bgdo->bgqo", part, grad), local, rows, width)
                return dv, jax.tree.map(jnp.add, read, more)

            return _through(span, rows, add, (dv, jax.tree.map(jnp.zeros_like, samples)))

        start, xs = jnp.zeros(padded.shape, widen(dtype)), (split, spans, grads)
        dv, parts = jax.lax.scan(band, vary_like(start, (padded, xs)), xs)
        dv = dv[..., : height * width]
        read = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 3).reshape(b, g, -1, o), parts)
    return dv.astype(dtype), sample_gradients(at, read)
