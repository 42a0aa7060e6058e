"""Softmax attention of many heads, and its backward pass.

`attend` takes heads apart, [B, H, T, E], and keeps q, k, v and the attention weights in the compute
precision for the backward pass. `attend_columns` takes heads side by side, [B, T, H E], and calls
the Pallas kernels of `attention_tpu` or `attention_gpu`, which keep no weights.

B batch, Q query rows, T tokens, D = H E width, H heads, E width of a head; keys on a grid of R rows
and C columns, T = R C.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from m3i_jax import parallel
from m3i_jax.models import attention_gpu, attention_tpu
from m3i_jax.models.attention_tpu import MASKED_LOGIT, Columns
from m3i_jax.objective.manual_axes import custom_vjp

LogitBias = tuple[jax.Array, ...]
Relative = tuple[jax.Array, jax.Array, LogitBias]  # queries and keys, and the bias of their logits


@functools.partial(custom_vjp, nondiff_argnums=(5,))
def attend(
    q_BxHxQxE: jax.Array,
    k_BxHxTxE: jax.Array,
    v_BxHxTxE: jax.Array,
    where_BxT: jax.Array | None = None,
    bias: LogitBias = (),
    scale: float = 0.0,
) -> jax.Array:
    """Scaled dot-product attention, `softmax(q k' / sqrt(E) + bias) v`; q is scaled in its own
    type, logits and softmax are in float32.

    Args:
      q_BxHxQxE: queries.
      k_BxHxTxE, v_BxHxTxE: keys and values of the same type; values may have another width.
      where_BxT: bool, keys that count; None: all. A row without such a key gives the plain mean of
        all values.
      bias: float32 arrays that are added to the logits, each [B, H, Q, R, C] or with 1 for axes
        along which it does not change. So relative positions by row and column cost two small
        products, and no array of T numbers a query is made of them.
      scale: instead of 1 / sqrt(E).

    Returns:
      [B, H, Q, E] of the type of v.

    >>> q, v = jnp.zeros((1, 1, 1, 2)), jnp.array([[[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]]])
    >>> attend(q, v, v, jnp.array([[True, True, False]])).tolist()
    [[[[2.0, 3.0]]]]
    """
    return _attend_forward(q_BxHxQxE, k_BxHxTxE, v_BxHxTxE, where_BxT, bias, scale)[0]


def attention_weights(
    q_BxHxQxE: jax.Array,
    k_BxHxTxE: jax.Array,
    where_BxT: jax.Array | None = None,
    bias: LogitBias = (),
    scale: float = 0.0,
) -> jax.Array:
    """The weights of `attend`, [B, H, Q, T] float32: softmax(q k' / sqrt(E) + bias) over the
    keys that count.

    >>> q = jnp.zeros((1, 1, 1, 2))
    >>> attention_weights(q, jnp.ones((1, 1, 3, 2)), jnp.array([[True, True, False]])).tolist()
    [[[[0.5, 0.5, 0.0]]]]
    """
    scale = scale or q_BxHxQxE.shape[-1] ** -0.5
    q_BxHxQxE = (q_BxHxQxE.astype(jnp.float32) * scale).astype(q_BxHxQxE.dtype)
    logits_BxHxQxT = jnp.einsum(
        "bhqe,bhte->bhqt", q_BxHxQxE, k_BxHxTxE, preferred_element_type=jnp.float32
    )
    if bias:
        grid = jnp.broadcast_shapes(*(part.shape[3:] for part in bias))
        logits_BxHxQxRxC = logits_BxHxQxT.reshape(*logits_BxHxQxT.shape[:3], *grid)
        logits_BxHxQxT = sum(bias, logits_BxHxQxRxC).reshape(logits_BxHxQxT.shape)
    if where_BxT is not None:
        logits_BxHxQxT = jnp.where(where_BxT[:, None, None], logits_BxHxQxT, MASKED_LOGIT)
    return jax.nn.softmax(logits_BxHxQxT)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _BiasShapes:
    """What the backward pass needs of a bias: the shapes of its parts."""

    shapes: tuple[tuple[int, ...], ...]


def _attend_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, where: jax.Array | None, bias: LogitBias, scale: float
) -> tuple[jax.Array, Any]:
    weights_BxHxQxT = attention_weights(q, k, where, bias, scale).astype(v.dtype)
    shapes = _BiasShapes(tuple(part.shape for part in bias))
    return (
        jnp.einsum("bhqt,bhte->bhqe", weights_BxHxQxT, v),
        (q, k, v, weights_BxHxQxT, where, shapes),
    )


def _bias_gradients(dlogits_BxHxQxT: jax.Array, shapes: _BiasShapes) -> LogitBias:
    """Gradients of the logits, summed along the axes where a part of the bias does not change."""
    if not shapes.shapes:
        return ()
    grid = jnp.broadcast_shapes(*(shape[3:] for shape in shapes.shapes))
    whole = dlogits_BxHxQxT.reshape(*dlogits_BxHxQxT.shape[:3], *grid)
    return tuple(
        whole.sum([i for i in range(5) if shape[i] != whole.shape[i]], keepdims=True)
        for shape in shapes.shapes
    )


def _attend_backward(
    scale: float, residuals: Any, g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, LogitBias]:
    q, k, v, weights, where, shapes = residuals
    dv = jnp.einsum("bhqt,bhqe->bhte", weights, g)
    dweights = jnp.einsum("bhqe,bhte->bhqt", g, v, preferred_element_type=jnp.float32)
    wide = weights.astype(jnp.float32)
    dlogits = wide * (dweights - (wide * dweights).sum(-1, keepdims=True))
    if where is not None:
        dlogits = jnp.where(where[:, None, None], dlogits, 0)
    dbias = _bias_gradients(dlogits, shapes)
    dlogits = dlogits.astype(q.dtype)
    scale = scale or q.shape[-1] ** -0.5
    # In float32, as in the forward pass: 1 / sqrt(48) rounded to bfloat16 is 0.13 % too large.
    dq = jnp.einsum("bhqt,bhte->bhqe", dlogits, k, preferred_element_type=jnp.float32) * scale
    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    return (
        dq.astype(q.dtype),
        jnp.einsum("bhqt,bhqe->bhte", dlogits, scaled),
        dv,
        None,
        dbias,
    )


attend.defvjp(_attend_forward, _attend_backward)


def attention_kernel_fits(heads: int, arrays: tuple[jax.Array, ...]) -> bool:
    """Whether the platform has a kernel for the arguments of `attend_columns`."""
    (rows, queries, _), (_, tokens, _) = arrays[0].shape, arrays[-1].shape
    if parallel.kernels(rows):
        depth = arrays[-1].shape[2] // (4 - len(arrays)) // heads
        return attention_tpu.fits(queries, tokens, heads, depth, arrays[-1].dtype)
    return parallel.kernels(rows, parallel.GPUS) and attention_gpu.fits(
        arrays, heads, parallel.rows_of_device(rows)
    )


def _is_gpu() -> bool:
    return parallel.platform() in parallel.GPUS


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def attend_columns(
    heads: int, arrays: tuple[jax.Array, ...], where_BxT: jax.Array | None
) -> jax.Array:
    """`attend` by the kernel of the platform, of heads that are side by side: [B, Q, D]. Where it
    is differentiated, the result has the name `attended` of `scan_blocks.NAMES`.

    Args:
      heads: H.
      arrays: queries, keys and values in one array [B, T, 3 D]; or queries [B, Q, D], and keys and
        values [B, T, 2 D]; or an array each.
      where_BxT: as of `attend`.
    """
    return _forward(heads, arrays, where_BxT)[0]


def _forward(heads: int, arrays: tuple[jax.Array, ...], where_BxT: jax.Array | None) -> Any:
    """(the result,), and what the backward pass of a GPU needs."""
    if _is_gpu():
        run = functools.partial(attention_gpu.forward, heads, interpret=_interpret())
        return parallel.per_device(run, arrays, where_BxT)
    run = functools.partial(_kernel, heads, attention_tpu.forward)
    return (parallel.per_device(run, arrays, where_BxT),)


def _interpret() -> bool:
    return parallel.platform() == "cpu"


def _kernel(
    heads: int,
    run: Callable[..., Any],
    arrays: tuple[jax.Array, ...],
    where_BxT: jax.Array | None,
    *g_BxQxD: jax.Array,
) -> Any:
    width = arrays[-1].shape[2] // (4 - len(arrays))
    parts = [Columns(array, first) for array in arrays for first in range(0, array.shape[2], width)]
    return run(heads, width, *parts, where_BxT, *g_BxQxD, interpret=_interpret())


def _attend_columns_forward(
    heads: int, arrays: tuple[jax.Array, ...], where_BxT: jax.Array | None
) -> tuple[jax.Array, Any]:
    # The names are here, as a GPU's backward pass reads both: it would be kept twice if the result
    # got its name outside.
    made = tuple(checkpoint_name(each, "attended") for each in _forward(heads, arrays, where_BxT))
    return made[0], (arrays, where_BxT, made if len(made) > 1 else ())


def _attend_columns_backward(
    heads: int, residuals: Any, g_BxQxD: jax.Array
) -> tuple[tuple[jax.Array, ...], None]:
    arrays, where_BxT, made = residuals
    if made:
        run = functools.partial(attention_gpu.backward, heads, interpret=_interpret())
        return tuple(parallel.per_device(run, arrays, where_BxT, *made, g_BxQxD)), None
    dq, dk, dv = parallel.per_device(
        functools.partial(_kernel, heads, attention_tpu.backward), arrays, where_BxT, g_BxQxD
    )
    if len(arrays) == 1:
        return (jnp.concatenate([dq, dk, dv], 2),), None
    if len(arrays) == 3:
        return (dq, dk, dv), None
    return (dq, jnp.concatenate([dk, dv], 2)), None


attend_columns.defvjp(_attend_columns_forward, _attend_columns_backward)


def attend_plainly(
    heads: int, arrays: tuple[jax.Array, ...], where_BxT: jax.Array | None
) -> jax.Array:
    """`attend_columns` without the kernel."""
    q, k, v = (part for array in arrays for part in to_heads(array, _parts(array, arrays), heads))
    return from_heads(attend(q, k, v, where_BxT, (), q.shape[-1] ** -0.5))


def _parts(array: jax.Array, arrays: tuple[jax.Array, ...]) -> int:
    """Number of queries, keys and values that are side by side in one of the arrays."""
    return array.shape[2] * (4 - len(arrays)) // arrays[-1].shape[2]


def kernel_call(
    heads: int, arrays: tuple[jax.Array, ...], where_BxT: jax.Array | None
) -> parallel.KernelCall:
    """The call that `attend_columns` makes, for `parallel.trusted`."""
    bounds = ((-2.0, 2.0),) * (len(arrays) + (where_BxT is not None))
    return parallel.KernelCall(
        "attention", heads, attend_columns, attend_plainly, (arrays, where_BxT), bounds
    )


def to_heads(x_BxTxC: jax.Array, parts: int, heads: int) -> tuple[jax.Array, ...]:
    """Columns [part | head | E] of [B, T, parts * D] as `parts` arrays [B, H, T, E].

    >>> [part.shape for part in to_heads(jnp.zeros((2, 5, 24)), parts=3, heads=4)]
    [(2, 4, 5, 2), (2, 4, 5, 2), (2, 4, 5, 2)]
    """
    b, t, c = x_BxTxC.shape
    width = c // parts
    # lax.split, as in split_blocks: the gradient puts the parts side by side instead of adding
    # padded copies.
    columns = jax.lax.split(x_BxTxC, [width] * parts, axis=2)
    return tuple(part.reshape(b, t, heads, width // heads).swapaxes(1, 2) for part in columns)


def from_heads(x_BxHxTxE: jax.Array) -> jax.Array:
    """Inverse of `to_heads` for one part: [B, T, H * E].

    >>> from_heads(jnp.zeros((2, 4, 5, 3))).shape
    (2, 5, 12)
    """
    b, h, t, e = x_BxHxTxE.shape
    return x_BxHxTxE.swapaxes(1, 2).reshape(b, t, h * e)
