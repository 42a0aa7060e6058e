"""Mask2Former (Cheng et al., CVPR 2022) for semantic segmentation: a pixel decoder, queries that
predict masks and their categories, and class maps as the sum of both.

B images, S predictions (before the first layer and after each), Q queries, K categories.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.models.dense.map_sampling import resize_bilinear
from m3i_jax.models.dense.masked_decoder import (
    QueryPredictions,
    decode_queries,
    masked_decoder_shapes,
    masked_decoder_values,
)
from m3i_jax.models.dense.pixel_decoder import decode_pixels, init_pixel_decoder
from m3i_jax.models.initializers import fill
from m3i_jax.models.layers import Params


def init(
    settings: schema.Segment | schema.Detect,
    channels: Mapping[int, int],
    classes: int,
    rng: jax.Array,
) -> tuple[Params, Params]:
    """Parameters {"pixel", "decoder"}; there are no statistics.

    Args:
      settings: `strides`, `width` and `mask2former` are read.
      channels: {stride: channels} of the maps.
      classes: categories.
      rng: key.

    Raises:
      ValueError: fewer than two strides, a width that is no multiple of 4 (sine positions) or that
        the attention heads do not divide.

    >>> settings, channels = schema.Segment(width=256), {4: 192, 8: 384, 16: 768, 32: 1536}
    >>> call = lambda key: init(settings, channels, 150, key)[0]
    >>> params = jax.eval_shape(call, jax.random.key(0))
    >>> sum(leaf.size for leaf in jax.tree.leaves(params))
    20287575
    """
    if len(settings.strides) < 2:
        raise ValueError(
            f"mask2former reads two or more maps, and the strides are {settings.strides}"
        )
    if settings.width % 4:
        raise ValueError(f"the width of mask2former must be a multiple of 4, not {settings.width}")
    of_pixels, of_queries = jax.random.split(rng)
    shapes = masked_decoder_shapes(settings, classes)
    return {
        "pixel": init_pixel_decoder(settings, channels, of_pixels),
        "decoder": fill(of_queries, shapes, masked_decoder_values),
    }, {}


def apply(
    settings: schema.Segment | schema.Detect, params: Params, maps: Mapping[int, jax.Array]
) -> QueryPredictions:
    """The predictions of the queries.

    Args:
      settings, params: as of `init`.
      maps: {stride: [B, H, W, C]}.

    >>> own = schema.Mask2Former(queries=6, heads=2, encoder_depth=1, depth=2, hidden=4)
    >>> settings = schema.Segment(strides=(4, 8), width=8, mask2former=own)
    >>> params, _ = init(settings, {4: 3, 8: 5}, 7, jax.random.key(0))
    >>> maps = {4: jnp.zeros((1, 4, 6, 3)), 8: jnp.zeros((1, 2, 3, 5))}
    >>> [x.shape for x in jax.eval_shape(lambda tree: apply(settings, tree, maps), params)]
    [(3, 1, 6, 8), (3, 1, 4, 6, 6)]
    """
    pixels = decode_pixels(settings, params["pixel"], maps)
    return decode_queries(settings, params["decoder"], pixels.maps, pixels.places, pixels.features)


def semantic_scores(
    classes_BxQxK1: jax.Array, masks_BxhxwxQ: jax.Array, size: tuple[int, int]
) -> jax.Array:
    """Score of every category at every pixel, float32 [B, H, W, K]: the sum over queries of the
    probability of the category times that of the mask, whose logits are resized first.

    >>> scores = semantic_scores(jnp.zeros((1, 2, 4)), jnp.zeros((1, 1, 1, 2)), (2, 2))
    >>> scores[0, 0, 0].tolist()
    [0.25, 0.25, 0.25]
    """
    masks = jax.nn.sigmoid(resize_bilinear(masks_BxhxwxQ.astype(jnp.float32), size))
    share = jax.nn.softmax(classes_BxQxK1.astype(jnp.float32))[..., :-1]
    return jnp.einsum("bhwq,bqk->bhwk", masks, share, precision=jax.lax.Precision.HIGHEST)
