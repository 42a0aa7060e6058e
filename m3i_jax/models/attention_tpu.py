"""Softmax attention on a TPU, as a Pallas kernel: the attention weights exist only in VMEM.

XLA moves the weights through HBM in three types, and transposes heads before and after. A grid step
of this kernel is an image and as many heads side by side as fill the lanes, read in place from the
columns of the projection. The backward pass recomputes the weights from queries and keys: one
product more, which counts as hardware FLOPs and not as model FLOPs.

B batch, Q query rows, T tokens, M columns, C = H E channels of H heads, E of a head.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from m3i_jax.parallel.chips import LEAST_SCRATCHPAD

_LANES = 128
_SCORES = 2**19  # largest number of queries times keys, padded
_MAX_HEADS = 16  # heads side by side; the kernel unrolls over them
# its weight is exactly 0 beside any real logit; rows without a key get uniform weights, not NaN
MASKED_LOGIT = -1e30


class Columns(NamedTuple):
    """Channels [B, T, C] of an array that start at column `first`."""

    array: jax.Array
    first: int


def _side_by_side(heads: int, depth: int) -> int:
    """Number of heads that fill whole lanes; 0: no number does."""
    return next(
        (
            n
            for n in range(1, min(heads, _MAX_HEADS) + 1)
            if heads % n == 0 and n * depth % _LANES == 0
        ),
        0,
    )


def fits(queries: int, tokens: int, heads: int, depth: int, dtype: Any) -> bool:
    """Whether the kernel supports attention of this size and type. Where only many heads together
    fill whole lanes (depth 80 of ViT-H), the largest number of tokens is smaller.

    >>> bf16 = jnp.bfloat16
    >>> fits(197, 197, 12, 64, bf16), fits(294, 294, 16, 48, bf16), fits(197, 197, 3, 64, bf16)
    (True, True, False)
    >>> fits(257, 257, 16, 80, bf16), fits(577, 577, 16, 80, bf16)
    (True, False)
    """
    if dtype not in (jnp.bfloat16, jnp.float32):
        return False
    padded, lanes = (
        (queries + -queries % 8) * (tokens + -tokens % _LANES),
        _side_by_side(heads, depth) * depth,
    )
    # A grid step of the backward pass holds six score arrays in float32 and, double-buffered,
    # three arrays like the queries and four like the keys.
    used = 6 * 4 * padded + 2 * jnp.dtype(dtype).itemsize * lanes * (3 * queries + 4 * tokens)
    return padded <= _SCORES and lanes > 0 and used <= LEAST_SCRATCHPAD


def _product(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
    precision = None if a.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    dims = ((over[0],), (over[1],)), ((), ())
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _weights(
    q_QxE: jax.Array, k_TxE: jax.Array, where_1xT: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Scaled queries, and the weights in their type."""
    q_QxE = (q_QxE.astype(jnp.float32) * q_QxE.shape[1] ** -0.5).astype(q_QxE.dtype)
    logits_QxT = _product(q_QxE, k_TxE, (1, 1))
    if where_1xT is not None:
        logits_QxT = jnp.where(where_1xT > 0, logits_QxT, MASKED_LOGIT)
    raised_QxT = jnp.exp(logits_QxT - logits_QxT.max(1, keepdims=True))
    return q_QxE, (raised_QxT / raised_QxT.sum(1, keepdims=True)).astype(q_QxE.dtype)


def _heads(block: Any, depth: int) -> list[slice]:
    return [slice(at, at + depth) for at in range(0, block.shape[2], depth)]


def _forward_kernel(*refs: Any, depth: int, masked: bool) -> None:
    q, k, v, *where, out = refs
    for at in _heads(q, depth):
        _, weights_QxT = _weights(q[0, :, at], k[0, :, at], where[0][0] if masked else None)
        out[0, :, at] = _product(weights_QxT, v[0, :, at], (1, 0)).astype(out.dtype)


def _backward_kernel(*refs: Any, depth: int, masked: bool) -> None:
    q, k, v, g, *where, dq, dk, dv = refs
    for at in _heads(q, depth):
        k_TxE, g_QxE = k[0, :, at], g[0, :, at]
        q_QxE, weights_QxT = _weights(q[0, :, at], k_TxE, where[0][0] if masked else None)
        dv[0, :, at] = _product(weights_QxT, g_QxE, (0, 0)).astype(dv.dtype)
        dweights_QxT, wide_QxT = (
            _product(g_QxE, v[0, :, at], (1, 1)),
            weights_QxT.astype(jnp.float32),
        )
        dlogits_QxT = wide_QxT * (dweights_QxT - (wide_QxT * dweights_QxT).sum(1, keepdims=True))
        if masked:
            dlogits_QxT = jnp.where(where[0][0] > 0, dlogits_QxT, 0)
        dlogits_QxT = dlogits_QxT.astype(q_QxE.dtype)
        dq[0, :, at] = (_product(dlogits_QxT, k_TxE, (1, 0)) * depth**-0.5).astype(dq.dtype)
        dk[0, :, at] = _product(dlogits_QxT, q_QxE, (0, 0)).astype(dk.dtype)


def _run(
    kernel: Any,
    heads: int,
    channels: int,
    inputs: list[Columns],
    where_BxT: jax.Array | None,
    rows: list[int],
    products: tuple[int, int],
    interpret: bool,
) -> list[jax.Array]:
    """Runs a kernel over images and groups of heads.

    Args:
      inputs: arrays and their columns.
      rows: of the results [B, rows, C].
      products: of [Q, T] with C: (those of the model, those that the kernel computes).
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    depth = channels // heads
    lanes, q, k = _side_by_side(heads, depth) * depth, inputs[0].array, inputs[1].array

    def columns(rows: int, first: int = 0) -> Any:
        return pl.BlockSpec((1, rows, lanes), lambda i, j: (i, 0, first // lanes + j))

    like = jax.typeof(q).manual_axis_type
    outs = [
        jax.ShapeDtypeStruct((q.shape[0], n, channels), q.dtype, manual_axis_type=like)
        for n in rows
    ]
    arrays, specs = (
        [each.array for each in inputs],
        [columns(each.array.shape[1], each.first) for each in inputs],
    )
    if where_BxT is not None:
        arrays.append(where_BxT.astype(jnp.float32)[:, None])
        specs.append(pl.BlockSpec((1, 1, where_BxT.shape[1]), lambda i, j: (i, 0, 0)))
    moved = (
        q.dtype.itemsize
        * channels
        * q.shape[0]
        * sum([*(each.array.shape[1] for each in inputs), *rows])
    )
    each = 2 * q.shape[0] * q.shape[1] * k.shape[1] * channels
    run = pl.pallas_call(
        functools.partial(kernel, depth=depth, masked=where_BxT is not None),
        grid=(q.shape[0], channels // lanes),
        in_specs=specs,
        out_specs=[columns(n) for n in rows],
        out_shape=outs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=products[1] * each,
            transcendentals=q.shape[0] * heads * q.shape[1] * k.shape[1],
            bytes_accessed=moved,
        ),
        interpret=interpret,
    )
    with jax.named_scope(f"flops={products[0] * each}"):  # for reporting.flops
        return run(*arrays)


def forward(
    heads: int,
    channels: int,
    q: Columns,
    k: Columns,
    v: Columns,
    where_BxT: jax.Array | None,
    *,
    interpret: bool,
) -> jax.Array:
    """`softmax(q k' / sqrt(E)) v` of every head, [B, Q, C] in the type of q, as `attention.attend`
    computes it.

    >>> x = jnp.ones((1, 3, 384)).at[0, 2, 256:].set(4.0)  # [q | k | v]; the third value is 4
    >>> parts = (Columns(x, first) for first in (0, 128, 256))
    >>> forward(2, 128, *parts, None, interpret=True)[0, 0, :2].tolist()
    [2.0, 2.0]
    """
    (out,) = _run(
        _forward_kernel,
        heads,
        channels,
        [q, k, v],
        where_BxT,
        [q.array.shape[1]],
        (2, 2),
        interpret,
    )
    return out


def backward(
    heads: int,
    channels: int,
    q: Columns,
    k: Columns,
    v: Columns,
    where_BxT: jax.Array | None,
    g_BxQxC: jax.Array,
    *,
    interpret: bool,
) -> list[jax.Array]:
    """Gradients of queries [B, Q, C], keys and values [B, T, C].

    >>> x = jnp.ones((1, 3, 384))
    >>> parts = (Columns(x, first) for first in (0, 128, 256))
    >>> dq, dk, dv = backward(2, 128, *parts, None, jnp.ones((1, 3, 128)), interpret=True)
    >>> dq.any().item(), dv[0, 0, 0].round(3).item()  # equal keys weigh equally
    (False, 1.0)
    """
    rows = [q.array.shape[1], k.array.shape[1], v.array.shape[1]]
    return _run(
        _backward_kernel,
        heads,
        channels,
        [q, k, v, Columns(g_BxQxC, 0)],
        where_BxT,
        rows,
        (4, 5),
        interpret,
    )
