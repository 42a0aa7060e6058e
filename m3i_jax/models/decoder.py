"""Decoder of dense targets, f_psi of the paper: predicts every position of a target view from an
image's own visible tokens.

The input is one sequence of K visible tokens, at their absolute positions, and N queries: a mask
token plus a learned map of the target position relative to the input view (M3I section 3.4, Table
7; SiameseIM). Blocks attend over all of it; a linear map of the residual stream is the prediction.
The last block computes only the N query rows, as no other row is read.

Options of other methods: blocks between the embedding and the positions, which the target encoder
then has too, and batch norm (SiameseIM); the cls token as one more visible token (SiameseIM, MAE);
queries at absolute positions and a head for pixels (MAE).

B images, K visible tokens, N target positions, D encoder width, W decoder width, P = 3 p p numbers
of a patch."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.models.initializers import init_blocks, init_params, shapes_of
from m3i_jax.models.layers import Block, Dense, LayerNorm, Params, add_positions, block
from m3i_jax.models.scan_blocks import block_kwargs, run_blocks
from m3i_jax.objective import positions


def _modules(model: schema.Model) -> tuple[Dense, Dense, Block]:
    """(map to the decoder's width, map to the width of dense features, block)."""
    d, dtype = model.decoder, jnp.dtype(model.dtype)
    features = d.width if d.projector_depth else model.encoder.width
    return (
        Dense(d.width, dtype),
        Dense(features, dtype),
        block(d.width, d.heads, d.mlp_ratio, model.dtype, d.norm),
    )


def _pixel_head(model: schema.Model) -> Dense:
    return Dense(3 * model.encoder.patch_size**2, jnp.dtype(model.dtype))


def init(model: schema.Model, rng: jax.Array, *, of: Iterable[str] = ("tokens",)) -> Params:
    """Returns the initial parameters: `embed` [D, W], `mask_token` [1, 1, W], `position_map` [2 W,
    W] unless positions are absolute, `blocks` stacked on [L, ...], `projector` stacked the same way
    if it has blocks, and the heads: `head` [W, D] of tokens ([W, W] behind a projector),
    `pixel_norm` and `pixel_head` [W, P].

    Dense layers are Xavier-uniform with zero biases, the mask token N(0, 0.02^2). The first values
    of a part do not depend on which other parts exist.

    Args:
      model: settings.
      rng: key.
      of: predictions: tokens, pixels or both.

    >>> params = jax.eval_shape(lambda key: init(schema.Model(), key), jax.random.key(0))
    >>> params["position_map"]["kernel"].shape
    (1536, 768)
    >>> pixels = lambda key: init(schema.Model(), key, of=("pixels",))
    >>> sorted(jax.eval_shape(pixels, jax.random.key(0)))
    ['blocks', 'embed', 'mask_token', 'pixel_head', 'pixel_norm', 'position_map']
    """
    d, of, width = model.decoder, tuple(of), model.decoder.width
    embed, unembed, one = _modules(model)
    of_ends, of_blocks = jax.random.split(rng)
    row = jnp.zeros((1, width))
    ends = {
        "embed": shapes_of(embed, jnp.zeros((1, model.encoder.width))),
        "mask_token": jax.ShapeDtypeStruct((1, 1, width), jnp.float32),
        "position_map": shapes_of(embed, jnp.zeros((1, 2 * width))),
        "head": shapes_of(unembed, row),
    }
    # all are drawn, so that the values of one do not depend on the others
    params: dict[str, Any] = dict(init_params(of_ends, ends, {"mask_token": 0.02}))
    if "tokens" not in of:
        del params["head"]
    if d.positions == "absolute":
        del params["position_map"]
    if "pixels" in of:
        shapes = {
            "pixel_norm": shapes_of(LayerNorm(), row),
            "pixel_head": shapes_of(_pixel_head(model), row),
        }
        params |= init_params(jax.random.fold_in(of_ends, 1), shapes)
    if d.projector_depth:
        params["projector"] = init_blocks(
            one, jax.random.fold_in(of_blocks, 1), width=width, depth=d.projector_depth
        )
    return {**params, "blocks": init_blocks(one, of_blocks, width=width, depth=d.depth)}


def decoder_queries(model: schema.Model, params: Params, raw_xNx2W: jax.Array) -> jax.Array:
    """Returns queries of target positions: the mask token plus a learned map of their raw
    embedding.

    With `decoder.positions=absolute` they are the mask token plus the first W numbers of the raw
    embedding, without a map. For equal views those are the rows of the fixed table (MAE's decoder);
    for other views they are sines and cosines of the position in patches of the input view, without
    its size.

    Args:
      model: settings.
      params: as of `init`.
      raw_xNx2W: [B, N, 2 W] of `positions.relative_positions`, or [N, 2 W] of
        `positions.same_view_positions`, which is mapped once for the batch. It gets no gradient.

    Returns:
      [B, N, W] or [N, W] in `model.dtype`.

    >>> model = schema.Model(decoder=schema.Decoder(width=8, depth=1, heads=2))
    >>> shapes = jax.eval_shape(lambda key: init(model, key), jax.random.key(0))
    >>> raw = positions.same_view_positions(2, 8)
    >>> jax.eval_shape(lambda params: decoder_queries(model, params, raw), shapes).shape
    (4, 8)
    """
    raw_xNx2W = jax.lax.stop_gradient(jnp.asarray(raw_xNx2W))
    if model.decoder.positions == "absolute":
        mapped_xNxW = raw_xNx2W[..., : model.decoder.width].astype(model.dtype)
    else:
        embed, _, _ = _modules(model)
        mapped_xNxW = embed.apply({"params": params["position_map"]}, raw_xNx2W)
    return mapped_xNxW + params["mask_token"].reshape(-1).astype(mapped_xNxW.dtype)


def project_targets(model: schema.Model, params: Params, z_BxTxD: jax.Array) -> jax.Array:
    """Returns features in the space that a decoder with a projector reads and predicts: embedding,
    then the projector's blocks (SiameseIM).

    The target goes through the momentum copies of both, with every token of its clean view, cls
    included; the caller drops cls afterwards.

    Args:
      model: settings.
      params: a tree with `embed` and `projector`; not read without a projector.
      z_BxTxD: features of every token.

    Returns:
      [B, T, W] in `model.dtype`; without a projector z itself, which is then the target.

    >>> decoder = schema.Decoder(width=8, depth=1, heads=2, projector_depth=2)
    >>> model = schema.Model(encoder=schema.Encoder(width=12), decoder=decoder)
    >>> shapes = jax.eval_shape(lambda key: init(model, key), jax.random.key(0))
    >>> part = {name: shapes[name] for name in ("embed", "projector")}
    >>> z = jnp.zeros((3, 5, 12))
    >>> jax.eval_shape(lambda params: project_targets(model, params, z), part).shape
    (3, 5, 8)
    """
    return _project(model, params, z_BxTxD) if model.decoder.projector_depth else z_BxTxD


def _project(model: schema.Model, params: Params, z_BxTxD: jax.Array) -> jax.Array:
    embed, _, one = _modules(model)
    x_BxTxW = embed.apply({"params": params["embed"]}, z_BxTxD)
    if model.decoder.projector_depth:
        x_BxTxW = run_blocks(one, params["projector"], x_BxTxW, **block_kwargs(model))
    return x_BxTxW


def apply(
    model: schema.Model,
    params: Params,
    z_BxKxD: jax.Array,
    index_BxK: jax.Array,
    query_BxNxW: jax.Array,
    *,
    grid: int,
    cls_BxD: jax.Array | None = None,
) -> jax.Array:
    """Decoder output of every query, the input of `prediction_head`.

    Args:
      model: settings; `model.decoder`, `model.encoder.width`, `model.dtype` and those of
        `scan_blocks.block_kwargs` are read.
      params: as of `init`.
      z_BxKxD: encoder features of the image's own visible tokens, without cls.
      index_BxK: int, the cells of those tokens.
      query_BxNxW: as of `decoder_queries`, one per position to predict: all of them, or gathered
        rows (MAE predicts at hidden cells only). [N, W]: the same queries for every image.
      grid: cells a side of the input view.
      cls_BxD: feature of the cls token, one more visible token without a position. None: it is not
        read, as where two images share it.

    Returns:
      [B, N, W] in `model.dtype`, the residual stream of the query rows.

    Raises:
      ValueError: tokens and indices that do not match.

    >>> decoder = schema.Decoder(width=8, depth=2, heads=2)
    >>> model = schema.Model(encoder=schema.Encoder(width=12), decoder=decoder)
    >>> shapes = jax.eval_shape(lambda key: init(model, key), jax.random.key(0))
    >>> z, index, query = jnp.zeros((3, 2, 12)), jnp.zeros((3, 2), int), jnp.zeros((4, 8))
    >>> call = lambda params: apply(model, params, z, index, query, grid=2)
    >>> jax.eval_shape(call, shapes).shape
    (3, 4, 8)
    """
    if z_BxKxD.shape[:2] != index_BxK.shape:
        raise ValueError(
            f"tokens have shape {z_BxKxD.shape} and indices {index_BxK.shape}; they must be [B, K,"
            " D] and [B, K]"
        )
    _, _, one = _modules(model)
    first = 0 if cls_BxD is None else 1  # rows before the patches
    if cls_BxD is not None:
        z_BxKxD = jnp.concatenate([cls_BxD[:, None].astype(z_BxKxD.dtype), z_BxKxD], 1)
    own_BxTxW = _project(model, params, z_BxKxD)
    placed_BxKxW = add_positions(
        own_BxTxW[:, first:], positions.sincos_2d(grid, model.decoder.width), index_BxK
    )
    query_BxNxW = jnp.broadcast_to(
        query_BxNxW.astype(own_BxTxW.dtype), (own_BxTxW.shape[0], *query_BxNxW.shape[-2:])
    )
    x_BxTxW = jnp.concatenate([own_BxTxW[:, :first], placed_BxKxW, query_BxNxW], 1)
    query_rows = slice(own_BxTxW.shape[1], None)
    return run_blocks(one, params["blocks"], x_BxTxW, rows=query_rows, **block_kwargs(model))


def prediction_head(
    model: schema.Model, params: Params, rows_BxNxW: jax.Array, of: str
) -> jax.Array:
    """Returns predictions from the rows of `apply`.

    Args:
      model: settings.
      params: as of `init`.
      rows_BxNxW: as of `apply`.
      of: tokens, a linear map of the residual stream without a norm (SiameseIM); or pixels, a norm
        and a linear map (MAE).

    Returns:
      in `model.dtype`: [B, N, D] of tokens, [B, N, W] of tokens behind a projector, [B, N, P] of
      pixels.

    >>> decoder = schema.Decoder(width=8, depth=2, heads=2)
    >>> model = schema.Model(encoder=schema.Encoder(width=12), decoder=decoder)
    >>> both = lambda key: init(model, key, of=("tokens", "pixels"))
    >>> shapes = jax.eval_shape(both, jax.random.key(0))
    >>> pixels = lambda params: prediction_head(model, params, jnp.zeros((3, 4, 8)), "pixels")
    >>> jax.eval_shape(pixels, shapes).shape
    (3, 4, 768)
    """
    if of == "tokens":
        _, unembed, _ = _modules(model)
        return unembed.apply({"params": params["head"]}, rows_BxNxW)
    if of == "pixels":
        return _pixel_head(model).apply(
            {"params": params["pixel_head"]},
            LayerNorm().apply({"params": params["pixel_norm"]}, rows_BxNxW),
        )
    raise ValueError(f"the decoder has no head for {of!r}: it predicts tokens or pixels")
