"""Decoder of dense targets, f_psi of the paper: what an image's own visible tokens say about every position of a target view.

One sequence of K visible tokens, at their absolute positions, and N queries, which are a mask token plus a learned map of where the target
position lies relative to the input view (M3I section 3.4, Table 7; SiameseIM). Blocks attend over all of it; a linear map of the residual
stream is the prediction. Only the N query rows of the last block are ever read, so only those are computed there.

B images, K visible tokens, N target positions, D encoder width, W decoder width.
"""

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.models.layers import Block, Dense, Params, add_positions, block, draw, init_blocks, run_blocks, shapes_of
from m3i_jax.objective import positions


def _parts(model: schema.Model) -> tuple[Dense, Dense, Block]:
    """(a map to the decoder's width, a map back to the encoder's, the block)."""
    d, dtype = model.decoder, jnp.dtype(model.dtype)
    return Dense(d.width, dtype), Dense(model.encoder.width, dtype), block(d.width, d.heads, d.mlp_ratio, model.dtype)


def init(model: schema.Model, rng: jax.Array) -> Params:
    """Parameters: `embed` [D, W], `mask_token` [1, 1, W], `position_map` [2 W, W], `blocks` stacked on [L, ...], `head` [W, D].

    Dense layers are Xavier-uniform with zero biases, the mask token N(0, 0.02^2).

    >>> params = jax.eval_shape(lambda key: init(schema.Model(), key), jax.random.key(0))
    >>> params["position_map"]["kernel"].shape
    (1536, 768)
    """
    width = model.decoder.width
    inwards, outwards, one = _parts(model)
    of_ends, of_blocks = jax.random.split(rng)
    ends = {
        "embed": shapes_of(inwards, jnp.zeros((1, model.encoder.width))),
        "mask_token": jax.ShapeDtypeStruct((1, 1, width), jnp.float32),
        "position_map": shapes_of(inwards, jnp.zeros((1, 2 * width))),
        "head": shapes_of(outwards, jnp.zeros((1, width))),
    }
    return {**draw(of_ends, ends, {"mask_token": 0.02}), "blocks": init_blocks(one, of_blocks, width=width, depth=model.decoder.depth)}


def queries(model: schema.Model, params: Params, raw_xNx2W: jax.Array) -> jax.Array:
    """Queries of target positions: the mask token plus a learned map of their raw embedding.

    Args:
      model: settings.
      params: as of `init`.
      raw_xNx2W: [B, N, 2 W] of `positions.relative`, or [N, 2 W] of `positions.identity`, which is mapped once for the batch. No gradient
        flows into it.

    Returns:
      [B, N, W] or [N, W] in `model.dtype`.

    >>> model = schema.Model(decoder=schema.Decoder(width=8, depth=1, heads=2))
    >>> shapes = jax.eval_shape(lambda key: init(model, key), jax.random.key(0))
    >>> jax.eval_shape(lambda params: queries(model, params, positions.identity(2, 8)), shapes).shape
    (4, 8)
    """
    inwards, _, _ = _parts(model)
    mapped = inwards.apply({"params": params["position_map"]}, jax.lax.stop_gradient(jnp.asarray(raw_xNx2W)))
    return mapped + params["mask_token"].reshape(-1).astype(mapped.dtype)


def apply(model: schema.Model, params: Params, z_BxKxD: jax.Array, index_BxK: jax.Array, query_BxNxW: jax.Array, *, grid: int) -> jax.Array:
    """Predicted target features at every target position.

    Args:
      model: settings; `model.decoder`, `model.encoder.width`, `model.dtype`, `model.scan` and `model.remat` are read.
      params: as of `init`.
      z_BxKxD: encoder features of the image's own visible tokens, without cls: two images share that one.
      index_BxK: int, the cells of those tokens.
      query_BxNxW: as of `queries`; [N, W] stands for the same queries in every row.
      grid: cells a side of the input view.

    Returns:
      [B, N, D] in `model.dtype`.

    Raises:
      ValueError: tokens and indices that do not match.

    >>> model = schema.Model(encoder=schema.Encoder(width=12), decoder=schema.Decoder(width=8, depth=2, heads=2))
    >>> shapes = jax.eval_shape(lambda key: init(model, key), jax.random.key(0))
    >>> z, index, query = jnp.zeros((3, 2, 12)), jnp.array([[0, 3], [1, 2], [0, 1]]), jnp.zeros((4, 8))
    >>> jax.eval_shape(lambda params: apply(model, params, z, index, query, grid=2), shapes).shape
    (3, 4, 12)
    """
    if z_BxKxD.shape[:2] != index_BxK.shape:
        raise ValueError(f"tokens have shape {z_BxKxD.shape} and indices {index_BxK.shape}; they must be [B, K, D] and [B, K]")
    inwards, outwards, one = _parts(model)
    table_NxW = positions.sincos_2d(grid, model.decoder.width)
    own_BxKxW = add_positions(inwards.apply({"params": params["embed"]}, z_BxKxD), table_NxW, index_BxK)
    query_BxNxW = jnp.broadcast_to(query_BxNxW.astype(own_BxKxW.dtype), (own_BxKxW.shape[0], *query_BxNxW.shape[-2:]))
    x_BxTxW = jnp.concatenate([own_BxKxW, query_BxNxW], 1)
    wanted = slice(own_BxKxW.shape[1], None)
    x_BxNxW = run_blocks(one, params["blocks"], x_BxTxW, rows=wanted, scan=model.scan, remat=model.remat)
    return outwards.apply({"params": params["head"]}, x_BxNxW)
