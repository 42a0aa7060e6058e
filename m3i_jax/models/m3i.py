"""The whole of M3I as one parameter tree, and thin functions of its parts (M3I sections 3.3 and 3.4).

    encoder            f_theta: one pass over the mixed input, both images in it
    decoder            f_psi of dense targets
    pool               attention pooling, shared by the two that follow
    category           linear, its columns are the category representations
    image_projection   linear without bias into the joint space of text
    text, logit_scale  the encoder of captions, and the logarithm of the inverse temperature

The first is what a run makes; all others are heads. `encode` takes the encoder's own tree, so that the momentum target is the same call;
the others take a tree that has their part in it. B rows, N cells, K tokens, D encoder width, W width of the part, C classes, E joint space.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.models import decoder, pooling, text, vit
from m3i_jax.models.layers import Dense, Params, draw, shapes_of

PARTS = ("encoder", "decoder", "pool", "category", "image_projection", "text", "logit_scale")
_INVERSE_TEMPERATURE = 1 / 0.07  # of CLIP at the start


def _category(classes: int) -> Dense:
    return Dense(classes, jnp.float32)


def _image_projection(model: schema.Model) -> Dense:
    return Dense(model.text.embed, jnp.float32, use_bias=False)


def init(config: schema.Config, rng: jax.Array, *, classes: int, vocabulary: int) -> dict[str, Any]:
    """All parameters of a run, float32. A part starts the same whether or not the others are there.

    Args:
      config: settings; `config.model` and `config.data.caption_length` are read.
      rng: key.
      classes: categories; 0: no category head.
      vocabulary: token ids; 0: no text tower.

    >>> shapes = jax.eval_shape(lambda key: init(schema.Config(), key, classes=1000, vocabulary=0), jax.random.key(0))
    >>> parameter_table(shapes)
    [('encoder', 85645824), ('decoder', 30713856), ('pool', 2366976), ('category', 769000)]
    """
    model, row = config.model, jnp.zeros((1, config.model.pool.width))
    keys = dict(zip(PARTS, jax.random.split(rng, len(PARTS)), strict=True))
    params: dict[str, Any] = {
        "encoder": vit.init(model, keys["encoder"]),
        "decoder": decoder.init(model, keys["decoder"]),
        "pool": pooling.init(model, keys["pool"]),
    }
    if classes:
        params["category"] = draw(keys["category"], shapes_of(_category(classes), row))
    if vocabulary:
        shapes = shapes_of(_image_projection(model), row)
        params["image_projection"] = draw(keys["image_projection"], shapes, {"kernel": model.pool.width**-0.5})
        params["text"] = text.init(model, keys["text"], vocabulary=vocabulary, length=config.data.caption_length)
        params["logit_scale"] = jnp.asarray(math.log(_INVERSE_TEMPERATURE), jnp.float32)
    return params


def parameter_table(params: Params) -> list[tuple[str, int]]:
    """(part, numbers in it) of every top-level part, of arrays or of their shapes.

    >>> parameter_table({"encoder": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}, "logit_scale": jnp.zeros(())})
    [('encoder', 9), ('logit_scale', 1)]
    """
    order = [part for part in PARTS if part in params] + sorted(set(params) - set(PARTS))
    return [(part, sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params[part]))) for part in order]


def encode(
    config: schema.Config, encoder: Params, patches_BxNxP: jax.Array, *, index: jax.Array | None = None, keep: jax.Array | None = None
) -> jax.Array:
    """Features [B, T, D] of every token, cls first: `vit.apply` on the grid of the configuration.

    Args:
      config: settings.
      encoder: `params["encoder"]`, or the momentum target.
      patches_BxNxP: as of `vit.patchify`.
      index: [B, K], cells that are read; None: all.
      keep: [B, L, 2], factors of stochastic depth; None: off.

    >>> config = schema.Config(data=schema.Data(image_size=32))
    >>> shapes = jax.eval_shape(lambda key: init(config, key, classes=0, vocabulary=0), jax.random.key(0))
    >>> jax.eval_shape(lambda p, x: encode(config, p, x), shapes["encoder"], jnp.zeros((2, 4, 768))).shape
    (2, 5, 768)
    """
    return vit.apply(config.model, encoder, patches_BxNxP, grid=config.grid, index_BxK=index, keep_BxLx2=keep)


def queries(config: schema.Config, params: Params, raw_xNx2W: jax.Array) -> jax.Array:
    """Decoder queries [B, N, W] or [N, W] of target positions: `decoder.queries`.

    >>> from m3i_jax.objective import positions
    >>> config = schema.Config(data=schema.Data(image_size=32))
    >>> shapes = jax.eval_shape(lambda key: init(config, key, classes=0, vocabulary=0), jax.random.key(0))
    >>> jax.eval_shape(lambda p: queries(config, p, positions.identity(config.grid, 768)), shapes).shape
    (4, 768)
    """
    return decoder.queries(config.model, params["decoder"], raw_xNx2W)


def decode(config: schema.Config, params: Params, z_BxKxD: jax.Array, index_BxK: jax.Array, query_BxNxW: jax.Array) -> jax.Array:
    """Predictions [B, N, D] of the dense targets of one image a row: `decoder.apply`.

    >>> config = schema.Config(data=schema.Data(image_size=32))
    >>> shapes = jax.eval_shape(lambda key: init(config, key, classes=0, vocabulary=0), jax.random.key(0))
    >>> z, index, query = jnp.zeros((3, 2, 768)), jnp.zeros((3, 2), int), jnp.zeros((4, 768))
    >>> jax.eval_shape(lambda p: decode(config, p, z, index, query), shapes).shape
    (3, 4, 768)
    """
    return decoder.apply(config.model, params["decoder"], z_BxKxD, index_BxK, query_BxNxW, grid=config.grid)


def pool(config: schema.Config, params: Params, x_BxKxD: jax.Array, mask_BxK: jax.Array | None = None) -> jax.Array:
    """One vector [B, W] of an image's own tokens: `pooling.apply`.

    >>> shapes = jax.eval_shape(lambda key: init(schema.Config(), key, classes=0, vocabulary=0), jax.random.key(0))
    >>> jax.eval_shape(lambda p: pool(schema.Config(), p, jnp.zeros((3, 98, 768))), shapes).shape
    (3, 768)
    """
    return pooling.apply(config.model, params["pool"], x_BxKxD, mask_BxK)


def category_logits(config: schema.Config, params: Params, pooled_BxW: jax.Array) -> jax.Array:
    """Logits [B, C] of the category posterior, float32: rounded logits would round the loss (M3I section 3.4).

    >>> shapes = jax.eval_shape(lambda key: init(schema.Config(), key, classes=10, vocabulary=0), jax.random.key(0))
    >>> jax.eval_shape(lambda p: category_logits(schema.Config(), p, jnp.zeros((3, 768))), shapes).shape
    (3, 10)
    """
    return _category(params["category"]["bias"].shape[-1]).apply({"params": params["category"]}, pooled_BxW)


def image_embedding(config: schema.Config, params: Params, pooled_BxW: jax.Array) -> jax.Array:
    """Image side [B, E] of the text posterior, float32, not normalised (M3I section 3.4).

    >>> shapes = jax.eval_shape(lambda key: init(schema.Config(), key, classes=0, vocabulary=9), jax.random.key(0))
    >>> jax.eval_shape(lambda p: image_embedding(schema.Config(), p, jnp.zeros((3, 768))), shapes).shape
    (3, 768)
    """
    return _image_projection(config.model).apply({"params": params["image_projection"]}, pooled_BxW)


def text_embedding(config: schema.Config, params: Params, tokens_BxL: jax.Array, length_B: jax.Array) -> jax.Array:
    """Caption side [B, E] of the text posterior, float32, not normalised: `text.apply`.

    >>> shapes = jax.eval_shape(lambda key: init(schema.Config(), key, classes=0, vocabulary=9), jax.random.key(0))
    >>> jax.eval_shape(lambda p: text_embedding(schema.Config(), p, jnp.zeros((3, 77), int), jnp.full(3, 5)), shapes).shape
    (3, 768)
    """
    return text.apply(config.model, params["text"], tokens_BxL, length_B)
