"""Attention maps and dense features of single images, for figures."""

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

    features [B, N, D]: output of the encoder for every cell.
    pooling [B, N]: attention weights of the attention pooling, mean over its heads; if `pooled`.
    last [B, N]: attention weights of the last block, mean over its heads, from the cls token or,
      without one, from all tokens; if the backbone has attention.

    Args:
      config: settings of the run.
      pooled: whether the objective trains an attention pooling.
      params: with `encoder` and, if pooled, `pool`.
      views_BxSxSx3: images of the model's size.
    """
    model, first = config.model, int(config.model.encoder.cls_token)
    x_BxNxD = drop_cls(config, params, views_BxSxSx3)[:, first:]
    out = {"features": x_BxNxD.astype(jnp.float32)}
    if pooled:
        out["pooling"] = pooling.pooling_weights(model, params["pool"], x_BxNxD).mean(1)
    if attention := backbones.get_backbone(model).attention:
        weights_BxTxT = attention(
            model, params["encoder"], views.plain_patches(config, views_BxSxSx3), grid=config.grid
        ).mean(1)
        out["last"] = weights_BxTxT[:, 0, first:] if first else weights_BxTxT.mean(1)
    return out


def compile_maps(
    config: schema.Config, mesh: jax.sharding.Mesh, *, pooled: bool
) -> Callable[[Any, jax.Array], AttentionMaps]:
    """`attention_maps` as a compiled function of (params, views). Rows are split over the data axes
    of the mesh; results are replicated."""
    return parallel.Program(
        functools.partial(attention_maps, config, pooled),
        name="maps",
        out_shardings=parallel.replicated(mesh),
    )
