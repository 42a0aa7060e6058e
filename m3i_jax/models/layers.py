"""Layers that every transformer tower shares.

Dense layers multiply [B * T, D], so that no backend pads a short token axis. Layer norm, GELU and
attention have custom backward passes: autodiff would keep several float32 copies of every
activation, these keep the input (and two numbers a row), or q, k, v and the attention weights, in
the compute precision. None of them computes a matrix product twice, except where a kernel computes
the attention and keeps no weights (attention_tpu, attention_gpu). The tensors that the remat policy
`names` of scan_blocks may keep are named here.

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
from m3i_jax.models.attention import (
    Relative,
    attend,
    attend_columns,
    attention_kernel_fits,
    attention_weights,
    from_heads,
    kernel_call,
    to_heads,
)
from m3i_jax.models.cpu_codegen import matmul
from m3i_jax.models.gated import swiglu
from m3i_jax.models.norms import RMSNorm
from m3i_jax.models.rope import Rotation, turn_heads
from m3i_jax.objective.manual_axes import custom_vjp

Params = Mapping[str, Any]

# default of the layer norms here; the parameter-free norm of targets is in objective.losses
_EPS = 1e-6
_BATCH_EPS = 1e-5
_SHAPE = nn.initializers.zeros  # modules declare shapes; `initializers.init_params` sets values


@functools.partial(custom_vjp, nondiff_argnums=(0, 1))
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

    The statistics are those of this batch, over all devices. There are no running averages: a
    momentum target uses its own batch's too, as the public code of SiameseIM and MoCo v3 does in
    training.

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
    # erf is written differently than in the forward pass: the compiler would otherwise share it and
    # keep it in float32 between the passes.
    slope = 0.5 * (1 - jax.lax.erf(wide / -math.sqrt(2))) + wide * density
    return ((g.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU by its tanh approximation (Google's ViT and BERT), computed in float32; the type of x.

    >>> [round(float(y), 4) for y in gelu_tanh(jnp.array([-1.0, 0.0, 1.0]))]
    [-0.1588, 0.0, 0.8412]
    """
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def quick_gelu(x: jax.Array) -> jax.Array:
    """`x * sigmoid(1.702 x)` (CLIP), computed in float32; the type of x.

    >>> [round(float(y), 4) for y in quick_gelu(jnp.array([-1.0, 0.0, 1.0]))]
    [-0.1542, 0.0, 0.8458]
    """
    wide = x.astype(jnp.float32)
    return (wide * jax.nn.sigmoid(1.702 * wide)).astype(x.dtype)


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

        def run(gather: Any, params: Params, x: jax.Array, *_: Any) -> jax.Array:
            return matmul(x, gather(params)[path][:, columns].astype(self.dtype))

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
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
}
GATED = "swiglu"  # the activation with two input matrices


def norm_of(kind: str, eps: float = _EPS) -> Callable[..., nn.Module]:
    """What makes the norm of a kind: layer, rms or batch, whose epsilon is fixed.

    >>> norm_of("rms", 1e-5)(name="norm").eps
    1e-05
    """
    if kind == "batch":
        return BatchNorm
    return functools.partial(RMSNorm if kind == "rms" else LayerNorm, eps)


class Attention(nn.Module):
    """Multi-head self-attention. The columns of qkv are [q | k | v], each head after head, as in
    timm's checkpoints. With `qk_norm`, the kind of a norm, queries and keys are normalised over the
    width of a head by `norm_q` and `norm_k`, which all heads share, before they are turned."""

    heads: int
    dtype: Any
    qk_norm: str = ""
    eps: float = _EPS

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        where_BxT: jax.Array | None,
        rows: slice | None,
        weights: bool = False,
        relative: Callable[[jax.Array, jax.Array], Relative] | None = None,
        rotation: Rotation | None = None,
    ) -> jax.Array:
        """Output of the layer.

        Args:
          x_BxTxD, where_BxT, rows: as of `Block`.
          weights: return the attention weights, [B, H, Q, T], instead of the output.
          relative: relative positions, a function of queries and keys [B, H, T, E]: what takes
            their place, and what is added to the logits, as of `attention.attend`.
          rotation: of all tokens, as of `rope.axial_rotation`; None: queries and keys are not
            turned.
        """
        b, tokens, width = x_BxTxD.shape

        def change(which: str, array: jax.Array, rotation: Rotation | None) -> jax.Array:
            heads = array.reshape(b, array.shape[1], self.heads, width // self.heads)
            if self.qk_norm:
                heads = norm_of(self.qk_norm, self.eps)(name=f"norm_{which}")(heads)
            if rotation is not None:
                heads = turn_heads(heads, rotation)
            return heads.reshape(array.shape)

        qkv = Dense(3 * width, self.dtype, name="qkv")
        if rows is None:
            arrays: tuple[jax.Array, ...] = (checkpoint_name(qkv(x_BxTxD), "qkv"),)
        else:
            q_BxQxD = checkpoint_name(qkv(x_BxTxD[:, rows], slice(0, width)), "qkv")
            arrays = (q_BxQxD, checkpoint_name(qkv(x_BxTxD, slice(width, None)), "qkv"))
        if self.qk_norm or rotation is not None:
            q_BxQxD, k_BxTxD, v_BxTxD = (
                part
                for array in arrays
                for part in jax.lax.split(array, [width] * (array.shape[2] // width), axis=2)
            )
            of_rows = rotation
            if rotation is not None and rows is not None:
                of_rows = rotation[0][:, rows], rotation[1][:, rows]
            arrays = change("q", q_BxQxD, of_rows), change("k", k_BxTxD, rotation), v_BxTxD
        # one token, the shape that parameters are made with, is no work for a kernel
        possible = tokens > 1 and not weights and relative is None
        if (
            possible
            and attention_kernel_fits(self.heads, arrays)
            and parallel.trusted(kernel_call(self.heads, arrays, where_BxT))
        ):
            attended_BxTxD = attend_columns(self.heads, arrays, where_BxT)
        else:
            q, k, v = (
                part
                for array in arrays
                for part in to_heads(array, array.shape[2] // width, self.heads)
            )
            if weights:
                return attention_weights(q, k, where_BxT)
            q, k, added = relative(q, k) if relative else (q, k, ())
            attended_BxTxD = checkpoint_name(
                from_heads(attend(q, k, v, where_BxT, added, (width // self.heads) ** -0.5)),
                "attended",
            )
        return Dense(width, self.dtype, name="out")(attended_BxTxD)


class Mlp(nn.Module):
    """Two dense layers with a GELU between them: exact, or the form that imported weights were
    trained with. With `swiglu` a third, `gate`, reads the input too."""

    hidden: int
    dtype: Any
    activation: str = "gelu"

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        h_BxTxF = checkpoint_name(Dense(self.hidden, self.dtype, name="fc1")(x_BxTxD), "fc1")
        if self.activation == GATED:
            gate_BxTxF = Dense(self.hidden, self.dtype, name="gate")(x_BxTxD)
            h_BxTxF = swiglu(checkpoint_name(gate_BxTxF, "gate"), h_BxTxF)
        else:
            h_BxTxF = _ACTIVATIONS[self.activation](h_BxTxF)
        return Dense(x_BxTxD.shape[-1], self.dtype, name="fc2")(h_BxTxF)


class Block(nn.Module):
    """Pre-norm transformer block: `x += keep * gamma1 * Attention(norm(x)); x += keep * gamma2 *
    MLP(norm(x))`. Norm: layer, rms, or batch (SiameseIM). Without `layer_scale` there is no gamma.
    `rope`: base of the periods of rotary positions, of which the caller gives the rotation; 0: it
    has none."""

    heads: int
    hidden: int
    dtype: Any
    norm: str = "layer"
    eps: float = _EPS
    activation: str = "gelu"
    qk_norm: bool = False
    layer_scale: bool = False
    rope: float = 0.0

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        keep_Bx2: jax.Array | None = None,
        where_BxT: jax.Array | None = None,
        rows: slice | None = None,
        weights: bool = False,
        rotation: Rotation | None = None,
    ) -> jax.Array:
        """Output of the block, or the weights of its attention.

        Args:
          x_BxTxD: the residual stream.
          keep_Bx2: factors of the (attention, MLP) branch; None: 1.
          where_BxT: bool, keys that count; None: all.
          rows: token rows to compute; the others are keys and values only. Not with batch norm,
            whose norm2 takes its statistics from all rows.
          weights: return the attention weights, [B, H, Q, T], and stop there.
          rotation: of all tokens, as of `rope.axial_rotation`; None: none.
        """
        norm, attention, mlp = block_parts(self)

        def add(n: int, x_BxTxD: jax.Array, branch_BxTxD: jax.Array) -> jax.Array:
            gamma_D = (
                self.param(f"gamma{n}", _SHAPE, (x_BxTxD.shape[-1],)) if self.layer_scale else None
            )
            keep_B = None if keep_Bx2 is None else keep_Bx2[:, n - 1]
            return add_branch(x_BxTxD, branch_BxTxD, keep_B, gamma_D)

        h_BxTxD = attention(name="attention")(
            norm(name="norm1")(x_BxTxD), where_BxT, rows, weights, rotation=rotation
        )
        if weights:
            return h_BxTxD
        x_BxTxD = checkpoint_name(
            add(1, x_BxTxD if rows is None else x_BxTxD[:, rows], h_BxTxD), "middle"
        )
        return add(2, x_BxTxD, mlp(name="mlp")(norm(name="norm2")(x_BxTxD)))


def block_parts(one: Block) -> tuple[Any, Any, Any]:
    """What makes the norms, the attention and the MLP of a block.

    >>> norm, attention, mlp = block_parts(block(8, 2, 4.0, "float32"))
    >>> mlp().hidden
    32
    """
    return (
        norm_of(one.norm, one.eps),
        functools.partial(
            Attention, one.heads, one.dtype, one.norm if one.qk_norm else "", one.eps
        ),
        functools.partial(Mlp, one.hidden, one.dtype, one.activation),
    )


def add_branch(
    x_BxTxD: jax.Array,
    branch_BxTxD: jax.Array,
    keep_B: jax.Array | None = None,
    gamma_D: jax.Array | None = None,
) -> jax.Array:
    """`x + keep * gamma * branch` in the type of x, whose factors are 1 where they are None.

    >>> add_branch(jnp.ones((1, 1, 2)), jnp.ones((1, 1, 2)), None, jnp.array([0.5, 2])).tolist()
    [[[1.5, 3.0]]]
    """
    if keep_B is None and gamma_D is None:
        return x_BxTxD + branch_BxTxD
    # In float32: 1 / (1 - p) rounded to bfloat16 would scale every kept branch by the same wrong
    # factor.
    wide_BxTxD = branch_BxTxD.astype(jnp.float32)
    if gamma_D is not None:
        wide_BxTxD *= gamma_D
    if keep_B is not None:
        wide_BxTxD *= keep_B[:, None, None].astype(jnp.float32)
    return (x_BxTxD.astype(jnp.float32) + wide_BxTxD).astype(x_BxTxD.dtype)


def block(
    width: int,
    heads: int,
    mlp_ratio: float,
    dtype: str,
    norm: str = "layer",
    *,
    eps: float = _EPS,
    activation: str = "gelu",
    **options: Any,
) -> Block:
    """The block of a tower. `norm`: layer or rms, with this `eps`, or batch. `activation`: gelu,
    gelu_tanh, quick_gelu or swiglu. `options`: further fields of `Block`.

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
        **options,
    )


def linear_drop_rates(depth: int, rate: float, rule: str = "linear") -> np.ndarray:
    """Drop probability of the branches of each of `depth` layers, [L] float32: `rate * l / (L -
    1)`, or with the rule uniform the same everywhere (M3I Table 7).

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
    """`x` plus rows of a table: all in order, or those of `index_BxT`. In the precision of x.

    >>> table = np.array([[1.0], [2.0], [3.0]])
    >>> add_positions(jnp.zeros((1, 2, 1)), table, jnp.array([[2, 0]])).tolist()
    [[[3.0], [1.0]]]
    """
    table = jnp.asarray(table_NxD, x_BxTxD.dtype)
    return x_BxTxD + (table if index_BxT is None else table[index_BxT])
