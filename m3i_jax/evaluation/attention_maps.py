"""Where an encoder looks and what it tells apart: attention and dense features of single images, to
be shown."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax import parallel, schema
from m3i_jax.evaluation.feature_extraction import drop_cls
from m3i_jax.models import backbones, pooling
from m3i_jax.training import views

AttentionMaps = dict[str, jax.Array]


def attention_maps(
    config: schema.Config, pooled: bool, params: Any, views_BxSxSx3: jax.Array
) -> AttentionMaps:
    """Maps over the cells of clean uint8 views, float32.

    features [B, N, D]: the encoder's, of every cell.
    pooling [B, N]: what the attention pooling weighs the cells with, mean over its heads, if
    `pooled`.
    last [B, N]: what the last block does, where something in the encoder attends, mean over its
      heads: of the cls token, or, without one, of all tokens.

    Args:
      config: the run's settings.
      pooled: whether the objective trains an attention pooling.
      params: with `encoder` and, if pooled, `pool`.
      views_BxSxSx3: images of the model's size.
    """
    model, first = config.model, int(config.model.encoder.cls_token)
    x_BxNxD = drop_cls(config, params, views_BxSxSx3)[:, first:]
    out = {"features": x_BxNxD.astype(jnp.float32)}
    if pooled:
        out["pooling"] = pooling.pooling_weights(model, params["pool"], x_BxNxD).mean(1)
    if look := backbones.get_backbone(model).attention:
        weights_BxTxT = look(
            model, params["encoder"], views.plain_patches(config, views_BxSxSx3), grid=config.grid
        ).mean(1)
        out["last"] = weights_BxTxT[:, 0, first:] if first else weights_BxTxT.mean(1)
    return out


def compile_maps(
    config: schema.Config, mesh: jax.sharding.Mesh, *, pooled: bool
) -> Callable[[Any, jax.Array], AttentionMaps]:
    """`attention_maps` as a function of (params, views), whose rows are split over the data axes of
    a mesh and whose results are whole everywhere."""
    return parallel.Program(
        functools.partial(attention_maps, config, pooled),
        name="maps",
        out_shardings=parallel.replicated(mesh),
    )
