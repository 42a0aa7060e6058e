"""Transformer parts that every tower shares.

Dense layers work on flattened [B * T, D], so that no backend pads a short token axis. Layer norm,
GELU and attention have backward passes of their own: autodiff would keep several float32 copies of
every activation, these keep the input (and two numbers a row), or q, k, v and the attention
weights, in the compute precision. No matrix product is computed twice for it, except on TPUs, where
a kernel computes the attention of blocks and keeps no weights (attention_kernel). What `names` in
models.stacked may keep has a name here.

B batch, T tokens, Q query rows, D width, H heads, E = D / H, L blocks.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from m3i_jax import parallel
from m3i_jax.models import activations, attention_tpu
from m3i_jax.models.attention_tpu import NEVER, Columns
from m3i_jax.models.matmul import matmul

Params = Mapping[str, Any]

# of every layer norm here that is not told another one; the targets' parameter-free one is in
# objective.posterior
_EPS = 1e-6
_BATCH_EPS = 1e-5
_SHAPE = nn.initializers.zeros  # modules only declare shapes; `initializers.init_params` fills them


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _norm(
    over: str, eps: float, x_xD: jax.Array, scale_D: jax.Array, bias_D: jax.Array
) -> jax.Array:
    return _norm_forward(over, eps, x_xD, scale_D, bias_D)[0]


def _mean(over: str, x_xD: jax.Array) -> jax.Array:
    if over == "channels":
        return x_xD.mean(-1, keepdims=True)
    return parallel.mean_over_devices(x_xD.mean(tuple(range(x_xD.ndim - 1)), keepdims=True))


def _norm_forward(
    over: str, eps: float, x_xD: jax.Array, scale_D: jax.Array, bias_D: jax.Array
) -> tuple[jax.Array, Any]:
    wide_xD = x_xD.astype(jnp.float32)
    mean = _mean(over, wide_xD)
    rstd = jax.lax.rsqrt(_mean(over, jnp.square(wide_xD - mean)) + eps)
    y_xD = (wide_xD - mean) * rstd * scale_D + bias_D
    return y_xD.astype(x_xD.dtype), (x_xD, mean, rstd, scale_D)


def _norm_backward(
    over: str, eps: float, kept: Any, g_xD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x_xD, mean, rstd, scale_D = kept
    g = g_xD.astype(jnp.float32)
    unit_xD = (x_xD.astype(jnp.float32) - mean) * rstd
    rows = tuple(range(g.ndim - 1))
    inner_xD = g * scale_D
    along = _mean(over, inner_xD * unit_xD)
    dx_xD = rstd * (inner_xD - _mean(over, inner_xD) - unit_xD * along)
    return (
        dx_xD.astype(x_xD.dtype),
        (g * unit_xD).sum(rows).astype(scale_D.dtype),
        g.sum(rows).astype(scale_D.dtype),
    )


_norm.defvjp(_norm_forward, _norm_backward)


def layer_norm(
    x_xD: jax.Array, scale_D: jax.Array, bias_D: jax.Array, eps: float = _EPS
) -> jax.Array:
    """Affine layer normalisation over the last axis, computed in float32.

    Args:
      x_xD: [..., D], any float type.
      scale_D, bias_D: float32 [D].

    Returns:
      the shape and type of x.

    >>> print(layer_norm(jnp.array([[1.0, 3.0]]), jnp.ones(2), jnp.zeros(2)).round(3))
    [[-1.  1.]]
    """
    return _norm("channels", eps, x_xD, scale_D, bias_D)


def batch_norm(
    x_xD: jax.Array, scale_D: jax.Array, bias_D: jax.Array, eps: float = _BATCH_EPS
) -> jax.Array:
    """Affine normalisation of every channel by mean and (biased) variance over all leading axes,
    computed in float32.

    The statistics are always those of this batch: nothing runs along, and a momentum target uses
    its own batch's too, as the public code of SiameseIM and MoCo v3 does in training. Of a batch
    that is sharded over devices they are those of the whole of it.

    Args:
      x_xD: [..., D], any float type.
      scale_D, bias_D: float32 [D].

    Returns:
      the shape and type of x.

    >>> print(batch_norm(jnp.array([[1.0, 5.0], [3.0, 5.0]]), jnp.ones(2), jnp.zeros(2)).round(3))
    [[-1.  0.]
     [ 1.  0.]]
    """
    return _norm("rows", eps, x_xD, scale_D, bias_D)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, `x * Phi(x)` with the normal distribution function by erf, computed in float32
    (5e-7 off at worst); the type of x.

    >>> print(gelu(jnp.array([-1.0, 0.0, 1.0])).round(4))
    [-0.1587  0.      0.8413]
    """
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide / math.sqrt(2)))).astype(x.dtype)


def _gelu_backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * jnp.square(wide)) / math.sqrt(2 * math.pi)
    # Not as the forward pass writes it: the compiler would see the same erf in both, and keep it in
    # float32 from there to here.
    slope = 0.5 * (1 - jax.lax.erf(wide / -math.sqrt(2))) + wide * density
    return ((g.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


@jax.custom_vjp
def attend(
    q_BxHxQxE: jax.Array,
    k_BxHxTxE: jax.Array,
    v_BxHxTxE: jax.Array,
    where_BxT: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention, `softmax(q k' / sqrt(E)) v`; q is scaled in its own type,
    logits and softmax are in float32.

    Args: q_BxHxQxE: queries, any number of them. k_BxHxTxE, v_BxHxTxE: keys and values of the same
      type. where_BxT: bool, keys that count; None: all. A row in which none counts gets the plain
      mean of all values.

    Returns:
      [B, H, Q, E] of the type of v.

    >>> q, v = jnp.zeros((1, 1, 1, 2)), jnp.array([[[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]]])
    >>> attend(q, v, v, jnp.array([[True, True, False]])).tolist()
    [[[[2.0, 3.0]]]]
    """
    return _attend_forward(q_BxHxQxE, k_BxHxTxE, v_BxHxTxE, where_BxT)[0]


def attention_weights(
    q_BxHxQxE: jax.Array, k_BxHxTxE: jax.Array, where_BxT: jax.Array | None = None
) -> jax.Array:
    """What `attend` weighs the values with, [B, H, Q, T] float32: softmax(q k' / sqrt(E)) over the
    keys that count.

    >>> q = jnp.zeros((1, 1, 1, 2))
    >>> attention_weights(q, jnp.ones((1, 1, 3, 2)), jnp.array([[True, True, False]])).tolist()
    [[[[0.5, 0.5, 0.0]]]]
    """
    q_BxHxQxE = (q_BxHxQxE.astype(jnp.float32) * q_BxHxQxE.shape[-1] ** -0.5).astype(
        q_BxHxQxE.dtype
    )
    logits_BxHxQxT = jnp.einsum(
        "bhqe,bhte->bhqt", q_BxHxQxE, k_BxHxTxE, preferred_element_type=jnp.float32
    )
    if where_BxT is not None:
        logits_BxHxQxT = jnp.where(where_BxT[:, None, None], logits_BxHxQxT, NEVER)
    return jax.nn.softmax(logits_BxHxQxT)


def _attend_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, where: jax.Array | None
) -> tuple[jax.Array, Any]:
    weights_BxHxQxT = attention_weights(q, k, where).astype(v.dtype)
    return jnp.einsum("bhqt,bhte->bhqe", weights_BxHxQxT, v), (q, k, v, weights_BxHxQxT, where)


def _over_queries(weights_BxHxQxT: jax.Array, x_BxHxQxE: jax.Array) -> jax.Array:
    """Sum of x over queries, [B, H, T, E]. The small factor is turned, so that a processor
    multiplies the large one as it lies: the product with both factors summed over rows takes two to
    three times as long."""
    return jnp.einsum("bheq,bhqt->bhet", x_BxHxQxE.swapaxes(2, 3), weights_BxHxQxT).swapaxes(2, 3)


def _attend_backward(kept: Any, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, weights, where = kept
    dv = _over_queries(weights, g)
    dweights = jnp.einsum("bhqe,bhte->bhqt", g, v, preferred_element_type=jnp.float32)
    wide = weights.astype(jnp.float32)
    dlogits = wide * (dweights - (wide * dweights).sum(-1, keepdims=True))
    if where is not None:
        dlogits = jnp.where(where[:, None, None], dlogits, 0)
    dlogits = dlogits.astype(q.dtype)
    scale = q.shape[-1] ** -0.5
    return (
        jnp.einsum("bhqt,bhte->bhqe", dlogits, k) * scale,
        _over_queries(dlogits, q * scale),
        dv,
        None,
    )


attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_columns(
    heads: int, arrays: tuple[jax.Array, ...], where_BxT: jax.Array | None
) -> jax.Array:
    """`attend` of heads that lie side by side, [B, Q, D], by the kernel. arrays: queries, keys and
    values side by side in one array [B, T, 3 D], or queries [B, Q, D] alone and the others [B, T, 2
    D]."""
    return parallel.per_device(
        functools.partial(_kernel, heads, attention_tpu.forward), arrays, where_BxT
    )


def _kernel(
    heads: int,
    run: Callable[..., Any],
    arrays: tuple[jax.Array, ...],
    where_BxT: jax.Array | None,
    *g_BxQxD: jax.Array,
) -> Any:
    width = arrays[-1].shape[2] // (4 - len(arrays))
    parts = [Columns(array, first) for array in arrays for first in range(0, array.shape[2], width)]
    return run(heads, width, *parts, where_BxT, *g_BxQxD, interpret=parallel.platform() != "tpu")


def _attend_columns_backward(
    heads: int, kept: Any, g_BxQxD: jax.Array
) -> tuple[tuple[jax.Array, ...], None]:
    arrays, where_BxT = kept
    dq, dk, dv = parallel.per_device(
        functools.partial(_kernel, heads, attention_tpu.backward), arrays, where_BxT, g_BxQxD
    )
    if len(arrays) == 1:
        return (jnp.concatenate([dq, dk, dv], 2),), None
    return (dq, jnp.concatenate([dk, dv], 2)), None


_attend_columns.defvjp(
    lambda heads, *kept: (_attend_columns(heads, *kept), kept), _attend_columns_backward
)


class Dense(nn.Module):
    """`x W + b` in `dtype` on [..., in] as one [rows, in] matrix; parameters `kernel` [in, out] and
    `bias` [out], float32."""

    features: int
    dtype: Any
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, columns: slice = slice(None)) -> jax.Array:
        kernel = self.param("kernel", _SHAPE, (x.shape[-1], self.features))
        path = "/".join((*self.path, "kernel"))

        def run(opened: Any, params: Params, x: jax.Array, *_: Any) -> jax.Array:
            return matmul(x, opened(params)[path][:, columns].astype(self.dtype))

        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        y = parallel.with_fsdp_gather(run, {path: kernel}, rows, dtype=self.dtype, stacked=False)
        if self.use_bias:
            y += self.param("bias", _SHAPE, (self.features,))[columns].astype(self.dtype)
        return y.reshape(*x.shape[:-1], -1)


class LayerNorm(nn.Module):
    """`layer_norm` with its parameters `scale` and `bias`, float32."""

    eps: float = _EPS

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1],)
        return layer_norm(
            x, self.param("scale", _SHAPE, shape), self.param("bias", _SHAPE, shape), self.eps
        )


class BatchNorm(nn.Module):
    """`batch_norm` with its parameters `scale` and `bias`, float32."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1],)
        return batch_norm(x, self.param("scale", _SHAPE, shape), self.param("bias", _SHAPE, shape))


_ACTIVATIONS: dict[str, Any] = {
    "gelu": gelu,
    "gelu_tanh": activations.gelu_tanh,
    "quick_gelu": activations.quick_gelu,
}


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


class Attention(nn.Module):
    """Multi-head self-attention. The columns of qkv are [q | k | v], each head after head, as in
    timm's checkpoints."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        where_BxT: jax.Array | None,
        rows: slice | None,
        weights: bool = False,
    ) -> jax.Array:
        """`weights`: give what the values are weighed with, [B, H, Q, T], and not what comes of
        it."""
        b, tokens, width = x_BxTxD.shape
        qkv = Dense(3 * width, self.dtype, name="qkv")
        if rows is None:
            arrays: tuple[jax.Array, ...] = (checkpoint_name(qkv(x_BxTxD), "qkv"),)
        else:
            q_BxQxD = checkpoint_name(qkv(x_BxTxD[:, rows], slice(0, width)), "qkv")
            arrays = (q_BxQxD, checkpoint_name(qkv(x_BxTxD, slice(width, None)), "qkv"))
        small = attention_tpu.fits(
            arrays[0].shape[1], tokens, self.heads, width // self.heads, jnp.dtype(self.dtype)
        )
        if small and not weights and parallel.kernels(b):
            attended_BxTxD = _attend_columns(self.heads, arrays, where_BxT)
        else:
            q, k, v = (
                part
                for array in arrays
                for part in to_heads(array, array.shape[2] // width, self.heads)
            )
            if weights:
                return attention_weights(q, k, where_BxT)
            attended_BxTxD = from_heads(attend(q, k, v, where_BxT))
        attended_BxTxD = checkpoint_name(attended_BxTxD, "attended")
        return Dense(width, self.dtype, name="out")(attended_BxTxD)


class Mlp(nn.Module):
    """Two dense layers with a GELU between them, the exact one or what imported weights were
    trained with."""

    hidden: int
    dtype: Any
    activation: str = "gelu"

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        h_BxTxF = checkpoint_name(Dense(self.hidden, self.dtype, name="fc1")(x_BxTxD), "fc1")
        return Dense(x_BxTxD.shape[-1], self.dtype, name="fc2")(
            _ACTIVATIONS[self.activation](h_BxTxF)
        )


class Block(nn.Module):
    """Pre-norm transformer block: `x += keep * Attention(norm(x)); x += keep * MLP(norm(x))`. Norm:
    layer, or batch (SiameseIM)."""

    heads: int
    hidden: int
    dtype: Any
    norm: str = "layer"
    eps: float = _EPS
    activation: str = "gelu"

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        keep_Bx2: jax.Array | None = None,
        where_BxT: jax.Array | None = None,
        rows: slice | None = None,
        weights: bool = False,
    ) -> jax.Array:
        """`where_BxT`: keys that count. `rows`: the only token rows that are wanted; the others
        serve as keys and values alone. Not with
        batch norm: norm2 takes its statistics from all rows. `weights`: give those of the
        attention, [B, H, Q, T], and stop there."""
        norm: Any = functools.partial(LayerNorm, self.eps) if self.norm == "layer" else BatchNorm
        h_BxTxD = Attention(self.heads, self.dtype, name="attention")(
            norm(name="norm1")(x_BxTxD), where_BxT, rows, weights
        )
        if weights:
            return h_BxTxD
        x_BxTxD = checkpoint_name(
            _add(x_BxTxD if rows is None else x_BxTxD[:, rows], h_BxTxD, keep_Bx2, 0), "middle"
        )
        h_BxTxD = Mlp(self.hidden, self.dtype, self.activation, name="mlp")(
            norm(name="norm2")(x_BxTxD)
        )
        return _add(x_BxTxD, h_BxTxD, keep_Bx2, 1)


def _add(
    x_BxTxD: jax.Array, branch_BxTxD: jax.Array, keep_Bx2: jax.Array | None, which: int
) -> jax.Array:
    if keep_Bx2 is None:
        return x_BxTxD + branch_BxTxD
    # In float32: 1 / (1 - p) rounded to bfloat16 would scale every kept branch by the same wrong
    # factor.
    keep_Bx1x1 = keep_Bx2[:, which, None, None].astype(jnp.float32)
    return (x_BxTxD.astype(jnp.float32) + keep_Bx1x1 * branch_BxTxD.astype(jnp.float32)).astype(
        x_BxTxD.dtype
    )


def block(
    width: int,
    heads: int,
    mlp_ratio: float,
    dtype: str,
    norm: str = "layer",
    *,
    eps: float = _EPS,
    activation: str = "gelu",
) -> Block:
    """The block of a tower with these settings; `norm` is layer, with this `eps`, or batch;
    `activation` gelu, gelu_tanh or quick_gelu.

    >>> block(768, 12, 4.0, "bfloat16").hidden
    3072
    """
    return Block(
        heads=heads,
        hidden=round(width * mlp_ratio),
        dtype=jnp.dtype(dtype),
        norm=norm,
        eps=eps,
        activation=activation,
    )


def linear_drop_rates(depth: int, rate: float, rule: str = "linear") -> np.ndarray:
    """Probability with which the branches of each of `depth` layers are dropped, [L] float32: `rate
    * l / (L - 1)`, or, by the rule uniform, the same everywhere (M3I Table 7).

    >>> linear_drop_rates(3, 0.25).tolist(), linear_drop_rates(2, 0.25, "uniform").tolist()
    ([0.0, 0.125, 0.25], [0.25, 0.25])
    """
    return (
        np.full(depth, rate, np.float32)
        if rule == "uniform"
        else np.linspace(0, rate, depth, dtype=np.float32)
    )


def add_positions(
    x_BxTxD: jax.Array, table_NxD: np.ndarray | jax.Array, index_BxT: jax.Array | None = None
) -> jax.Array:
    """`x` plus the rows of a table: all of them in order, or each token's own. In the precision of
    x.

    >>> add_positions(jnp.zeros((1, 2, 1)), np.array([[1.0], [2.0], [3.0]]), jnp.array([[2, 0]])).tolist()
    [[[3.0], [1.0]]]
    """
    table = jnp.asarray(table_NxD, x_BxTxD.dtype)
    return x_BxTxD + (table if index_BxT is None else table[index_BxT])
