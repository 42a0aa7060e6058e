"""Decoder of captions: predicts the tokens of a caption from those of its image.

Learned token and position tables, pre-norm blocks of self-attention over the tokens, of attention
to all patches of the image and of an MLP, a final norm, and logits. A token sees those before it;
in a parallel caption (CapPa) every input is a mask token and sees all others. As in CapPa, blocks
have no biases, tables are not tied to the logits, and these start at 0.

R captions, L their length, start and end included, N patches, D encoder width, W decoder width, H
heads, V token ids.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from m3i_jax import parallel, schema
from m3i_jax.models.attention import (
    attend,
    attend_columns,
    attention_kernel_fits,
    from_heads,
    kernel_call,
    to_heads,
)
from m3i_jax.models.attention_tpu import MASKED_LOGIT
from m3i_jax.models.initializers import init_params, shapes_of
from m3i_jax.models.layers import Dense, LayerNorm, Params, gelu_tanh, layer_norm
from m3i_jax.models.scan_blocks import block_kwargs, run_blocks

_SHAPE = nn.initializers.zeros


class ScaleNorm(nn.Module):
    """`layer_norm` with a scale and no offset."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", _SHAPE, (x.shape[-1],))
        return layer_norm(x, scale, jnp.zeros_like(scale))


class CaptionBlock(nn.Module):
    """`x += Attention(norm(x)); x += CrossAttention(norm(x), image); x += MLP(norm(x))`, without
    biases."""

    heads: int
    hidden: int
    dtype: Any
    norm: str = "layer"  # as of `layers.Block`

    @nn.compact
    def __call__(
        self,
        x_RxLxW: jax.Array,
        keep: None = None,
        where: None = None,
        rows: None = None,
        rotation: None = None,
        context: Any = None,
    ) -> jax.Array:
        """Output of the block.

        Args:
          x_RxLxW: the residual stream.
          keep, where, rows, rotation: not used; those of `layers.Block`.
          context: (tokens of the image [R, N, D], bool [R], captions in which every token sees all
            others, or None).
        """
        memory_RxNxD, parallel_R = context
        width, steps = x_RxLxW.shape[2], x_RxLxW.shape[1]

        def dense(features: int, name: str, x: jax.Array) -> jax.Array:
            return Dense(features, self.dtype, use_bias=False, name=name)(x)

        hidden_RxLxL = jnp.triu(jnp.ones((steps, steps), bool), 1)[None]
        if parallel_R is not None:
            hidden_RxLxL = hidden_RxLxL & ~parallel_R[:, None, None]
        bias = jnp.where(hidden_RxLxL, MASKED_LOGIT, 0.0)[:, None, :, None]
        qkv = checkpoint_name(dense(3 * width, "qkv", ScaleNorm(name="norm1")(x_RxLxW)), "qkv")
        attended = from_heads(attend(*to_heads(qkv, 3, self.heads), None, (bias,)))
        x_RxLxW += dense(width, "attention_out", checkpoint_name(attended, "attended"))

        query = checkpoint_name(dense(width, "query", ScaleNorm(name="norm2")(x_RxLxW)), "qkv")
        key_value = checkpoint_name(dense(2 * width, "key_value", memory_RxNxD), "qkv")
        attended = self._read(query, key_value)
        x_RxLxW = checkpoint_name(x_RxLxW + dense(width, "cross_out", attended), "middle")

        h = checkpoint_name(dense(self.hidden, "fc1", ScaleNorm(name="norm3")(x_RxLxW)), "fc1")
        return x_RxLxW + dense(width, "fc2", gelu_tanh(h))

    def _read(self, query_RxLxW: jax.Array, key_value_RxNx2W: jax.Array) -> jax.Array:
        """Attention of the tokens to the image."""
        arrays = query_RxLxW, key_value_RxNx2W
        # one token, the shape that parameters are made with, is no work for a kernel
        if (
            key_value_RxNx2W.shape[1] > 1
            and attention_kernel_fits(self.heads, arrays)
            and parallel.trusted(kernel_call(self.heads, arrays, None))
        ):
            return attend_columns(self.heads, arrays, None)
        (q,), (k, v) = (
            to_heads(query_RxLxW, 1, self.heads),
            to_heads(key_value_RxNx2W, 2, self.heads),
        )
        return checkpoint_name(from_heads(attend(q, k, v)), "attended")


def _block(model: schema.Model) -> CaptionBlock:
    c = model.captioner
    return CaptionBlock(c.heads, round(c.width * c.mlp_ratio), jnp.dtype(model.dtype))


def init(model: schema.Model, rng: jax.Array, *, vocabulary: int, length: int) -> Params:
    """Parameters: `token_table` [V + 1, W], whose last row is the mask token, `positions` [L - 1,
    W], `blocks` stacked on [layers, ...], `norm`, `logits` [W, V] with a bias.

    Tables are N(0, 1) and N(0, 1 / W), logits 0, matrices of attention N(0, 1 / inputs), those of
    the MLP Xavier-uniform.

    Args:
      model: settings; `model.captioner` and the width of the encoder are read.
      rng: key.
      vocabulary: V, token ids.
      length: largest number of tokens of a caption, start and end included.

    >>> call = lambda key: init(schema.Model(), key, vocabulary=1000, length=64)
    >>> shapes = jax.eval_shape(call, jax.random.key(0))
    >>> shapes["token_table"].shape, shapes["positions"].shape, shapes["logits"]["kernel"].shape
    ((1001, 768), (63, 768), (768, 1000))
    """
    c, features = model.captioner, model.encoder.width
    of_ends, of_blocks = jax.random.split(rng)
    row, unit = jnp.zeros((1, c.width)), c.width**-0.5
    ends = {
        "token_table": jax.ShapeDtypeStruct((vocabulary + 1, c.width), jnp.float32),
        "positions": jax.ShapeDtypeStruct((length - 1, c.width), jnp.float32),
        "norm": shapes_of(LayerNorm(), row),
        "logits": shapes_of(Dense(vocabulary, jnp.float32), row),
    }
    tables = {"token_table": 1.0, "positions": unit, "logits/kernel": 0.0}
    context = jnp.zeros((1, 1, features)), None
    shapes = shapes_of(_block(model), jnp.zeros((1, 1, c.width)), None, None, None, None, context)
    normal = {"qkv/kernel": unit, "query/kernel": unit, "out/kernel": unit}
    normal["key_value/kernel"] = features**-0.5
    return {
        **init_params(of_ends, ends, tables),
        "blocks": jax.lax.map(
            lambda key: init_params(key, shapes, normal), jax.random.split(of_blocks, c.depth)
        ),
    }


def apply(
    model: schema.Model,
    params: Params,
    tokens_RxL: jax.Array,
    memory_RxNxD: jax.Array,
    parallel_R: jax.Array | None = None,
) -> jax.Array:
    """Logits of the tokens of captions after the first.

    Args:
      model: settings; `model.captioner`, `model.dtype` and those of `scan_blocks.block_kwargs` are
        read.
      params: as of `init`.
      tokens_RxL: ids of whole captions, start first. L may be shorter than at `init`.
      memory_RxNxD: encoder tokens of the image of each caption.
      parallel_R: bool, captions whose tokens are predicted at once; None: none.

    Returns:
      [R, L - 1, V] float32; place t has the logits of token t + 1.

    Raises:
      ValueError: more tokens than positions, or captions without an image.

    >>> model = schema.Model(
    ...     encoder=schema.Encoder(width=12), captioner=schema.Captioner(width=8, depth=2, heads=2)
    ... )
    >>> shapes = jax.eval_shape(
    ...     lambda key: init(model, key, vocabulary=10, length=6), jax.random.key(0)
    ... )
    >>> tokens, image = jnp.zeros((3, 6), int), jnp.zeros((3, 4, 12))
    >>> jax.eval_shape(lambda params: apply(model, params, tokens, image), shapes).shape
    (3, 5, 10)
    """
    longest, steps = params["positions"].shape[0], tokens_RxL.shape[1] - 1
    if steps > longest:
        raise ValueError(f"tokens have shape {tokens_RxL.shape}; there are {longest} positions")
    if tokens_RxL.shape[0] != memory_RxNxD.shape[0]:
        raise ValueError(
            f"{tokens_RxL.shape[0]} captions and {memory_RxNxD.shape[0]} images: one a caption"
        )
    mask_token, dtype = params["token_table"].shape[0] - 1, jnp.dtype(model.dtype)
    inputs_RxL = tokens_RxL[:, :-1]
    if parallel_R is not None:
        inputs_RxL = jnp.where(parallel_R[:, None], mask_token, inputs_RxL)
    x_RxLxW = params["token_table"][inputs_RxL] + params["positions"][:steps]
    x_RxLxW = run_blocks(
        _block(model),
        params["blocks"],
        x_RxLxW.astype(dtype),
        context=(memory_RxNxD, parallel_R),
        **block_kwargs(model),
    )
    x_RxLxW = LayerNorm().apply({"params": params["norm"]}, x_RxLxW)
    kernel_WxV = params["logits"]["kernel"].astype(dtype)
    logits_RxLxV = jnp.einsum(
        "rlw,wv->rlv", x_RxLxW, kernel_WxV, preferred_element_type=jnp.float32
    )
    return logits_RxLxV + params["logits"]["bias"]
