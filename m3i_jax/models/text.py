"""Text tower: the encoder of captions, BERT-Base in size (M3I section 4), trained from scratch
together with the image tower.

Learned token and position tables, bidirectional pre-norm blocks that attend to real tokens only, a
final norm, one token or the mean of all as the caption, and a projection to the joint space. The
length tells real tokens from padding, not the id: the padding id 0 is also a piece of a word.

B captions, L tokens, W width, E joint space.
"""

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.models.initializers import init_blocks, init_params, shapes_of
from m3i_jax.models.layers import Block, Dense, LayerNorm, Params, block
from m3i_jax.models.scan_blocks import block_kwargs, run_blocks


def _modules(model: schema.Model) -> tuple[Block, Dense]:
    t = model.text
    return block(t.width, t.heads, t.mlp_ratio, model.dtype), Dense(
        t.embed, jnp.float32, use_bias=False
    )


def init(model: schema.Model, rng: jax.Array, *, vocabulary: int, length: int) -> Params:
    """Returns the initial parameters: `token_table` [V, W], `positions` [L, W], `blocks` stacked on
    [layers, ...], `norm`, `projection` [W, E] without bias.

    Initialised as CLIP's text tower: tables N(0, 0.02^2) and N(0, 0.01^2), matrices normal and
    scaled by width and depth, biases 0.

    Args:
      model: settings; `model.text` is read.
      rng: key.
      vocabulary: V, token ids.
      length: largest number of tokens of a caption, start and end included.

    >>> call = lambda key: init(schema.Model(), key, vocabulary=1024, length=77)
    >>> shapes = jax.eval_shape(call, jax.random.key(0))
    >>> shapes["token_table"].shape, shapes["positions"].shape
    ((1024, 768), (77, 768))
    """
    t = model.text
    one, projection = _modules(model)
    of_ends, of_blocks = jax.random.split(rng)
    row, unit = jnp.zeros((1, t.width)), t.width**-0.5
    ends = {
        "token_table": jax.ShapeDtypeStruct((vocabulary, t.width), jnp.float32),
        "positions": jax.ShapeDtypeStruct((length, t.width), jnp.float32),
        "norm": shapes_of(LayerNorm(), row),
        "projection": shapes_of(projection, row),
    }
    branch = unit * (2 * t.depth) ** -0.5  # 2 L branches add up to one unit of variance
    normal = {
        "qkv/kernel": unit,
        "out/kernel": branch,
        "fc1/kernel": (2 * t.width) ** -0.5,
        "fc2/kernel": branch,
    }
    return {
        **init_params(
            of_ends, ends, {"token_table": 0.02, "positions": 0.01, "projection/kernel": unit}
        ),
        "blocks": init_blocks(one, of_blocks, width=t.width, depth=t.depth, normal=normal),
    }


def apply(
    model: schema.Model, params: Params, tokens_BxL: jax.Array, length_B: jax.Array
) -> jax.Array:
    """Returns embeddings of captions, not normalised.

    Args:
      model: settings; `model.text`, `model.dtype` and those of `scan_blocks.block_kwargs` are read.
      params: as of `init`.
      tokens_BxL: int ids; those from `length` on are ignored. L may be shorter than the position
        table.
      length_B: int, real tokens of each caption, start and end included. Length 0 is read as 1, so
        that the result is finite; its loss has weight 0.

    Returns:
      [B, E] float32: the projection is computed in float32.

    Raises:
      ValueError: more tokens than positions.

    >>> model = schema.Model(text=schema.Text(width=8, depth=2, heads=2, embed=4))
    >>> call = lambda key: init(model, key, vocabulary=10, length=6)
    >>> shapes = jax.eval_shape(call, jax.random.key(0))
    >>> tokens, length = jnp.array([[8, 3, 9, 0, 0, 0]]), jnp.array([3])
    >>> jax.eval_shape(lambda params: apply(model, params, tokens, length), shapes).shape
    (1, 4)
    """
    t = model.text
    longest, steps = params["positions"].shape[0], tokens_BxL.shape[1]
    if steps > longest:
        raise ValueError(f"tokens have shape {tokens_BxL.shape}; there are {longest} positions")
    one, projection = _modules(model)
    length_B = jnp.maximum(length_B, 1)
    real_BxL = jnp.arange(steps) < length_B[:, None]
    x_BxLxW = params["token_table"][tokens_BxL] + params["positions"][:steps]
    # the last block computes only the row of the caption token, if that is the same in every row
    caption_rows = slice(0, 1) if t.pool == "first" else None
    x_BxLxW = x_BxLxW.astype(model.dtype)
    x_BxLxW = run_blocks(
        one, params["blocks"], x_BxLxW, where_BxT=real_BxL, rows=caption_rows, **block_kwargs(model)
    )
    if t.pool == "last":
        x_BxLxW = jnp.take_along_axis(
            x_BxLxW, jnp.clip(length_B - 1, 0, steps - 1)[:, None, None], 1
        )
    x_BxLxW = LayerNorm().apply({"params": params["norm"]}, x_BxLxW.astype(jnp.float32))
    if t.pool == "mean":
        caption_BxW = jnp.where(real_BxL[..., None], x_BxLxW, 0).sum(1) / real_BxL.sum(1)[:, None]
    else:
        caption_BxW = x_BxLxW[:, 0]
    return projection.apply({"params": params["projection"]}, caption_BxW)
