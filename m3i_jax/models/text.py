"""Text tower: the encoder of caption targets, BERT-Base in size (M3I section 4), trained from
scratch together with the image tower.

Learned token and position tables, bidirectional pre-norm blocks that attend to real tokens only, a
final norm, one token or the mean of all as the caption, and a projection to the joint space. What
is real is told by the length, never by the id: the padding id 0 is also a piece of a word.

B captions, L tokens, W width, E joint space.
"""

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.models.initializers import init_blocks, init_params, shapes_of
from m3i_jax.models.layers import Block, Dense, LayerNorm, Params, block
from m3i_jax.models.scan_blocks import block_kwargs, run_blocks


def _parts(model: schema.Model) -> tuple[Block, Dense]:
    t = model.text
    return block(t.width, t.heads, t.mlp_ratio, model.dtype), Dense(
        t.embed, jnp.float32, use_bias=False
    )


def init(model: schema.Model, rng: jax.Array, *, vocabulary: int, length: int) -> Params:
    """Parameters: `token_table` [V, W], `positions` [L, W], `blocks` stacked on [layers, ...],
    `norm`, `projection` [W, E] without bias.

    Initialised as CLIP's text tower: tables N(0, 0.02^2) and N(0, 0.01^2), matrices normal and
    scaled by width and depth, biases 0.

    Args:
      model: settings; `model.text` is read.
      rng: key.
      vocabulary: V, token ids.
      length: most tokens a caption has, start and end included.

    >>> shapes = jax.eval_shape(lambda key: init(schema.Model(), key, vocabulary=1024, length=77), jax.random.key(0))
    >>> shapes["token_table"].shape, shapes["positions"].shape
    ((1024, 768), (77, 768))
    """
    t = model.text
    one, projection = _parts(model)
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
    """Embeddings of captions, not normalised.

    Args: model: settings; `model.text`, `model.dtype` and those of `scan_blocks.block_kwargs` are
      read. params: as of `init`. tokens_BxL: int ids; those from `length` on may be anything. L may
      be shorter than the position table. length_B: int, real tokens of each caption, start and end
      included. One of length 0 counts as its first token: finite, and never used.

    Returns:
      [B, E] float32: the projection is computed in float32.

    Raises:
      ValueError: more tokens than positions.

    >>> model = schema.Model(text=schema.Text(width=8, depth=2, heads=2, embed=4))
    >>> shapes = jax.eval_shape(lambda key: init(model, key, vocabulary=10, length=6), jax.random.key(0))
    >>> jax.eval_shape(lambda params: apply(model, params, jnp.array([[8, 3, 9, 0, 0, 0]]), jnp.array([3])), shapes).shape
    (1, 4)
    """
    t = model.text
    room, steps = params["positions"].shape[0], tokens_BxL.shape[1]
    if steps > room:
        raise ValueError(f"tokens have shape {tokens_BxL.shape}; there are only {room} positions")
    one, projection = _parts(model)
    length_B = jnp.maximum(length_B, 1)
    real_BxL = jnp.arange(steps) < length_B[:, None]
    x_BxLxW = params["token_table"][tokens_BxL] + params["positions"][:steps]
    # Of the last block only the row that stands for the caption is read, where that is the same row
    # in every caption.
    wanted = slice(0, 1) if t.pool == "first" else None
    x_BxLxW = x_BxLxW.astype(model.dtype)
    x_BxLxW = run_blocks(
        one, params["blocks"], x_BxLxW, where_BxT=real_BxL, rows=wanted, **block_kwargs(model)
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
