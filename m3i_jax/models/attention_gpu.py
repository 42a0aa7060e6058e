"""Softmax attention on a GPU, as Pallas kernels for Triton: the attention weights exist only in
registers.

XLA moves the weights through HBM in three types, and transposes heads before and after. A program
of the forward pass has a tile of the queries of one head, read in place from the columns of the
projection, and goes through the tiles of keys with a running maximum and sum; it also writes the
logarithm of the sum for the backward pass. A program of the backward pass makes the gradients of a
tile of keys and values and of a tile of queries, and adds nothing to what another writes, so that
equal runs have equal bits.

cuDNN's flash attention adds gradients in any order, wants heads apart, and refuses a bias with an
odd number of tokens in training, such as 196 patches and a cls token; it is not used.

B batch, Q query rows, T tokens, H heads, E width of a head, N rows of a tile, C columns of an
array. Further: FlashAttention-2, arXiv 2307.08691."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from m3i_jax.models.attention_tpu import MASKED_LOGIT

_TILE = 64  # queries of a tile, and keys of a tile
_LARGEST = 128  # width of a head, as a power of two
_LOG2E = math.log2(math.e)


class _Part(NamedTuple):
    """Where queries, keys or values are: the number of an array, its columns C, the first one."""

    array: int
    columns: int
    first: int


class _Sizes(NamedTuple):
    """Static sizes of a call. depth: E; lanes: the power of two from it up, as Triton's arrays."""

    queries: int
    tokens: int
    heads: int
    depth: int

    @property
    def lanes(self) -> int:
        return max(16, 1 << (self.depth - 1).bit_length())  # least depth of a product


def fits(arrays: tuple[Any, ...], heads: int, rows: int) -> bool:
    """Whether the kernels support attention of arrays as of `attention.attend_columns`, of which a
    device has that many rows: their type, the width of a head, and 32 bits as an index.

    >>> qkv = lambda tokens, width, dtype: (jax.ShapeDtypeStruct((8, tokens, 3 * width), dtype),)
    >>> fits(qkv(197, 1024, "bfloat16"), 16, 8), fits(qkv(4097, 1280, "bfloat16"), 16, 8)
    (True, True)
    >>> fits(qkv(197, 1024, "float16"), 16, 8), fits(qkv(197, 1024, "bfloat16"), 4, 8)
    (False, False)
    """
    sizes = _sizes(arrays, heads)
    types = {jnp.dtype(array.dtype) for array in arrays}
    known = types in ({jnp.dtype("bfloat16")}, {jnp.dtype("float32")})
    largest = max(rows * math.prod(array.shape[1:]) for array in arrays)
    return known and sizes.lanes <= _LARGEST and largest < 2**31


def _parts(arrays: tuple[Any, ...]) -> list[_Part]:
    """Queries, keys and values."""
    width = _width(arrays)
    return [
        _Part(number, array.shape[2], first)
        for number, array in enumerate(arrays)
        for first in range(0, array.shape[2], width)
    ]


def _width(arrays: tuple[Any, ...]) -> int:
    return arrays[-1].shape[2] // (4 - len(arrays))


def _sizes(arrays: tuple[Any, ...], heads: int) -> _Sizes:
    return _Sizes(arrays[0].shape[1], arrays[-1].shape[1], heads, _width(arrays) // heads)


def _program(sizes: _Sizes, tiles: int) -> tuple[Any, Any, Any]:
    """Image, head and tile of this program. The grid has one axis: CUDA's others are shorter than
    the heads of a large batch."""
    from jax.experimental import pallas as pl

    number = pl.program_id(0)
    head = jax.lax.div(number, jnp.int32(tiles))
    image = jax.lax.div(head, jnp.int32(sizes.heads))
    return image, head - image * sizes.heads, number - head * tiles


class _Place(NamedTuple):
    """The rows of a tile in an array: indices [N, E], which of them there are, [N, E] and [N]."""

    indices: jax.Array
    there: jax.Array
    rows: jax.Array


def _place(part: _Part, sizes: _Sizes, image: Any, head: Any, tile: Any, rows: int) -> _Place:
    row, lane = tile * _TILE + jnp.arange(_TILE), jnp.arange(sizes.lanes)[None]
    first = (image * rows + row) * part.columns + part.first + head * sizes.depth
    there = row < rows
    return _Place(first[:, None] + lane, there[:, None] & (lane < sizes.depth), there)


def _numbers(sizes: _Sizes, image: Any, head: Any, tile: Any) -> tuple[jax.Array, jax.Array]:
    """Indices in [B, Q, H] of a number of each query of a tile, and which there are; [N]."""
    row = tile * _TILE + jnp.arange(_TILE)
    return (image * sizes.queries + row) * sizes.heads + head, row < sizes.queries


def _load(ref: Any, index: jax.Array, there: jax.Array) -> jax.Array:
    from jax.experimental.pallas import triton

    return triton.load(ref.at[index], mask=there, other=0)


def _store(ref: Any, place: _Place, values: jax.Array) -> None:
    from jax.experimental.pallas import triton

    triton.store(ref.at[place.indices], values.astype(ref.dtype), mask=place.there)


def _product(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
    precision = None if a.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    dims = ((over[0],), (over[1],)), ((), ())
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _keys_that_count(where: list[Any], sizes: _Sizes, image: Any, place: _Place, tile: Any) -> Any:
    """[N] bool of a tile of keys. where: () or a float32 array [B, T] and the factors [B]."""
    if not where:
        return place.rows
    token = tile * _TILE + jnp.arange(_TILE)
    return _load(where[0], image * sizes.tokens + token, place.rows) > 0


def _scale(where: list[Any], sizes: _Sizes, image: Any) -> Any:
    """Factor of the logits, to base 2. That of an image without keys is 0, so that its weights are
    equal."""
    return (where[1][image] if where else 1.0) * (sizes.depth**-0.5 * _LOG2E)


def _forward_kernel(*refs: Any, sizes: _Sizes, parts: list[_Part], masked: bool) -> None:
    from jax.experimental.pallas import triton

    *inputs, out, total = refs
    where = inputs[-2:] if masked else []
    image, head, tile = _program(sizes, -(-sizes.queries // _TILE))
    of_q, of_k, of_v = parts
    scale = _scale(where, sizes, image)
    at = _place(of_q, sizes, image, head, tile, sizes.queries)
    q_QxE = _load(inputs[of_q.array], at.indices, at.there)

    def add(keys: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        highest_Q, sum_Q, out_QxE = sums
        place = _place(of_k, sizes, image, head, keys, sizes.tokens)
        k_TxE = _load(inputs[of_k.array], place.indices, place.there)
        counts_T = _keys_that_count(where, sizes, image, place, keys)
        logits_QxT = _product(q_QxE, k_TxE, (1, 1)) * scale
        logits_QxT = jnp.where(counts_T[None], logits_QxT, MASKED_LOGIT)
        now_Q = jnp.maximum(highest_Q, logits_QxT.max(1))
        raised_QxT, shrink_Q = jnp.exp2(logits_QxT - now_Q[:, None]), jnp.exp2(highest_Q - now_Q)
        place = _place(of_v, sizes, image, head, keys, sizes.tokens)
        v_TxE = _load(inputs[of_v.array], place.indices, place.there)
        new_QxE = _product(raised_QxT.astype(v_TxE.dtype), v_TxE, (1, 0))
        return (
            now_Q,
            sum_Q * shrink_Q + raised_QxT.sum(1),
            out_QxE * shrink_Q[:, None] + new_QxE,
        )

    start = (
        jnp.full(_TILE, 2 * MASKED_LOGIT, jnp.float32),
        jnp.zeros(_TILE, jnp.float32),
        jnp.zeros((_TILE, sizes.lanes), jnp.float32),
    )
    highest_Q, sum_Q, out_QxE = jax.lax.fori_loop(0, -(-sizes.tokens // _TILE), add, start)
    like_q = _Part(0, sizes.heads * sizes.depth, 0)
    place = _place(like_q, sizes, image, head, tile, sizes.queries)
    _store(out, place, out_QxE / sum_Q[:, None])
    index, there = _numbers(sizes, image, head, tile)
    triton.store(total.at[index], highest_Q + jnp.log2(sum_Q), mask=there)


def _turns(tile: Any, tiles: int, other_tiles: int) -> Any:
    """Turns of a loop over the other tiles for one of `tiles`; none for one that is not there."""
    if tiles >= other_tiles:
        return other_tiles
    return jax.lax.select(tile < tiles, jnp.int32(other_tiles), jnp.int32(0))


def _backward_kernel(*refs: Any, sizes: _Sizes, parts: list[_Part], masked: bool) -> None:
    """`parts` are also those of the gradients, which are arrays like the inputs."""
    count = parts[-1].array + 1
    inputs, grads = refs[: len(refs) - count], refs[len(refs) - count :]
    arrays, (g, total, delta), where = (
        inputs[:count],
        inputs[count : count + 3],
        list(inputs[count + 3 :]),
    )
    query_tiles, key_tiles = -(-sizes.queries // _TILE), -(-sizes.tokens // _TILE)
    image, head, tile = _program(sizes, max(query_tiles, key_tiles))
    of_q, of_k, of_v = parts
    of_g = _Part(0, sizes.heads * sizes.depth, 0)
    scale = _scale(where, sizes, image)

    def load(part: _Part, ref: Any, tile: Any, rows: int) -> tuple[jax.Array, _Place]:
        place = _place(part, sizes, image, head, tile, rows)
        return _load(ref, place.indices, place.there), place

    def of_queries(tile: Any) -> tuple[jax.Array, ...]:
        index, there = _numbers(sizes, image, head, tile)
        return (
            load(of_q, arrays[of_q.array], tile, sizes.queries)[0],
            load(of_g, g, tile, sizes.queries)[0],
            _load(total, index, there),
            _load(delta, index, there),
        )

    k_TxE, at_k = load(of_k, arrays[of_k.array], tile, sizes.tokens)
    v_TxE, at_v = load(of_v, arrays[of_v.array], tile, sizes.tokens)
    counts_T = _keys_that_count(where, sizes, image, at_k, tile)

    def add_to_keys(tile: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        q_QxE, g_QxE, total_Q, delta_Q = of_queries(tile)
        logits_TxQ = _product(k_TxE, q_QxE, (1, 1)) * scale
        weights_TxQ = jnp.exp2(jnp.where(counts_T[:, None], logits_TxQ, MASKED_LOGIT) - total_Q)
        dweights_TxQ = _product(v_TxE, g_QxE, (1, 1))
        dlogits_TxQ = weights_TxQ * (dweights_TxQ - delta_Q[None])
        return (
            sums[0] + _product(dlogits_TxQ.astype(q_QxE.dtype), q_QxE, (1, 0)),
            sums[1] + _product(weights_TxQ.astype(g_QxE.dtype), g_QxE, (1, 0)),
        )

    zeros = jnp.zeros((_TILE, sizes.lanes), jnp.float32)
    turns = _turns(tile, key_tiles, query_tiles)
    dk_TxE, dv_TxE = jax.lax.fori_loop(0, turns, add_to_keys, (zeros, zeros))
    _store(grads[of_k.array], at_k, dk_TxE * (scale / _LOG2E))
    _store(grads[of_v.array], at_v, dv_TxE)

    q_QxE, g_QxE, total_Q, delta_Q = of_queries(tile)
    at_q = _place(of_q, sizes, image, head, tile, sizes.queries)

    def add_to_queries(keys: Any, dq_QxE: jax.Array) -> jax.Array:
        k_TxE, place = load(of_k, arrays[of_k.array], keys, sizes.tokens)
        v_TxE, _ = load(of_v, arrays[of_v.array], keys, sizes.tokens)
        counts_T = _keys_that_count(where, sizes, image, place, keys)
        logits_QxT = _product(q_QxE, k_TxE, (1, 1)) * scale
        logits_QxT = jnp.where(counts_T[None], logits_QxT, MASKED_LOGIT)
        weights_QxT = jnp.exp2(logits_QxT - total_Q[:, None])
        dlogits_QxT = weights_QxT * (_product(g_QxE, v_TxE, (1, 1)) - delta_Q[:, None])
        return dq_QxE + _product(dlogits_QxT.astype(k_TxE.dtype), k_TxE, (1, 0))

    turns = _turns(tile, query_tiles, key_tiles)
    dq_QxE = jax.lax.fori_loop(0, turns, add_to_queries, zeros)
    _store(grads[of_q.array], at_q, dq_QxE * (scale / _LOG2E))


def _bytes(arrays: list[jax.ShapeDtypeStruct]) -> int:
    return sum(array.size * array.dtype.itemsize for array in arrays)


def _run(
    kernel: Any,
    heads: int,
    arrays: tuple[jax.Array, ...],
    more: list[jax.Array],
    where_BxT: jax.Array | None,
    outs: list[jax.ShapeDtypeStruct],
    products: tuple[int, int],
    interpret: bool,
) -> list[jax.Array]:
    """Runs a kernel over flat arrays, which it indexes itself.

    Args:
      more: further inputs.
      products: of [Q, T] with E: (those of the model, those that the kernel computes).
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    sizes, batch = _sizes(arrays, heads), arrays[0].shape[0]
    inputs = [*arrays, *more]
    if where_BxT is not None:
        some_B = where_BxT.any(1)
        inputs += [(where_BxT | ~some_B[:, None]).astype(jnp.float32), some_B.astype(jnp.float32)]
    longest = sizes.queries if kernel is _forward_kernel else max(sizes.queries, sizes.tokens)
    like = jax.typeof(arrays[0]).manual_axis_type
    flat = [
        jax.ShapeDtypeStruct((math.prod(out.shape),), out.dtype, manual_axis_type=like)
        for out in outs
    ]
    each = 2 * batch * sizes.queries * sizes.tokens * heads * sizes.depth
    run = pl.pallas_call(
        functools.partial(kernel, sizes=sizes, parts=_parts(arrays), masked=where_BxT is not None),
        grid=(-(-longest // _TILE) * heads * batch,),
        out_shape=flat,
        compiler_params=triton.CompilerParams(
            num_warps=4 if sizes.lanes <= 64 else 8, num_stages=2
        ),
        cost_estimate=pl.CostEstimate(
            flops=products[1] * each,
            transcendentals=batch * heads * sizes.queries * sizes.tokens,
            bytes_accessed=sum(array.nbytes for array in inputs) + _bytes(flat),
        ),
        interpret=interpret,
    )
    # for profiling.flops and profiling.hlo
    with (
        jax.named_scope(f"computed={products[1] * each}"),
        jax.named_scope(f"flops={products[0] * each}"),
    ):
        made = run(*(array.reshape(-1) for array in inputs))
    return [array.reshape(out.shape) for array, out in zip(made, outs, strict=True)]


def forward(
    heads: int,
    arrays: tuple[jax.Array, ...],
    where_BxT: jax.Array | None,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`softmax(q k' / sqrt(E)) v` of every head, [B, Q, H E] in the type of q, and the logarithm to
    base 2 of the sum of each softmax, [B, Q, H] float32, which the backward pass needs.

    Args:
      heads: H.
      arrays, where_BxT: as of `attention.attend_columns`.
      interpret: run interpreted, on any platform.

    >>> x = jnp.ones((1, 3, 96)).at[0, 2, 64:].set(4.0)  # [q | k | v]; the third value is 4
    >>> forward(2, (x,), None, interpret=True)[0][0, 0, :2].tolist()
    [2.0, 2.0]
    """
    sizes, q = _sizes(arrays, heads), arrays[0]
    outs = [
        jax.ShapeDtypeStruct((q.shape[0], sizes.queries, _width(arrays)), q.dtype),
        jax.ShapeDtypeStruct((q.shape[0], sizes.queries, heads), jnp.float32),
    ]
    made = _run(_forward_kernel, heads, arrays, [], where_BxT, outs, (2, 2), interpret)
    return made[0], made[1]


def backward(
    heads: int,
    arrays: tuple[jax.Array, ...],
    where_BxT: jax.Array | None,
    out_BxQxD: jax.Array,
    total_BxQxH: jax.Array,
    g_BxQxD: jax.Array,
    *,
    interpret: bool = False,
) -> list[jax.Array]:
    """Gradients of the arrays.

    Args:
      out_BxQxD, total_BxQxH: of `forward`.
      g_BxQxD: gradient of the output.

    >>> x = jnp.ones((1, 3, 96))
    >>> out, total = forward(2, (x,), None, interpret=True)
    >>> [dx] = backward(2, (x,), None, out, total, jnp.ones((1, 3, 32)), interpret=True)
    >>> dx[..., :32].any().item(), dx[0, 0, 64].round(3).item()  # equal keys weigh equally
    (False, 1.0)
    """
    # of each query, what all its weights together change
    wide = out_BxQxD.astype(jnp.float32) * g_BxQxD.astype(jnp.float32)
    delta_BxQxH = wide.reshape(*total_BxQxH.shape, -1).sum(-1)
    outs = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
    more = [g_BxQxD, total_BxQxH, delta_BxQxH]
    return _run(_backward_kernel, heads, arrays, more, where_BxT, outs, (4, 7), interpret)
