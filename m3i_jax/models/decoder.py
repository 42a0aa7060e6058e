"""Decoder of dense targets, f_psi of the paper: what an image's own visible tokens say about every
position of a target view.

One sequence of K visible tokens, at their absolute positions, and N queries, which are a mask token
plus a learned map of where the target position lies relative to the input view (M3I section 3.4,
Table 7; SiameseIM). Blocks attend over all of it; a linear map of the residual stream is the
prediction. Only the N query rows of the last block are ever read, so only those are computed there.

Options of its ancestors: blocks between the embedding and the positions, which the target encoder
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


def _parts(model: schema.Model) -> tuple[Dense, Dense, Block]:
    """(a map to the decoder's width, a map to the width of dense features, the block)."""
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
    """Parameters: `embed` [D, W], `mask_token` [1, 1, W], `position_map` [2 W, W] unless positions
    are absolute, `blocks` stacked on [L, ...], `projector` stacked likewise if it has any, and the
    heads: `prediction_head` [W, D] of tokens ([W, W] behind a projector), `pixel_norm` and
    `pixel_head` [W, P].

    Dense layers are Xavier-uniform with zero biases, the mask token N(0, 0.02^2). A part starts the
    same whatever else there is.

    Args:
      model: settings.
      rng: key.
      of: what is predicted, tokens, pixels or both.

    >>> params = jax.eval_shape(lambda key: init(schema.Model(), key), jax.random.key(0))
    >>> params["position_map"]["kernel"].shape
    (1536, 768)
    >>> sorted(jax.eval_shape(lambda key: init(schema.Model(), key, of=("pixels",)), jax.random.key(0)))
    ['blocks', 'embed', 'mask_token', 'pixel_head', 'pixel_norm', 'position_map']
    """
    d, of, width = model.decoder, tuple(of), model.decoder.width
    inwards, outwards, one = _parts(model)
    of_ends, of_blocks = jax.random.split(rng)
    row = jnp.zeros((1, width))
    ends = {
        "embed": shapes_of(inwards, jnp.zeros((1, model.encoder.width))),
        "mask_token": jax.ShapeDtypeStruct((1, 1, width), jnp.float32),
        "position_map": shapes_of(inwards, jnp.zeros((1, 2 * width))),
        "head": shapes_of(outwards, row),
    }
    # all of them, so that none starts differently without another
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
    """Queries of target positions: the mask token plus a learned map of their raw embedding.

    With `decoder.positions=absolute` it is the mask token plus the first W numbers of the raw
    embedding, without a map. For equal views those are exactly the fixed table, row by row (MAE's
    decoder); for other views they are sines and cosines of where the position lies in patches of
    the input view, without its size.

    Args: model: settings. params: as of `init`. raw_xNx2W: [B, N, 2 W] of
      `positions.relative_positions`, or [N, 2 W] of `positions.same_view_positions`, which is
      mapped once for the batch. No gradient flows into it.

    Returns:
      [B, N, W] or [N, W] in `model.dtype`.

    >>> model = schema.Model(decoder=schema.Decoder(width=8, depth=1, heads=2))
    >>> shapes = jax.eval_shape(lambda key: init(model, key), jax.random.key(0))
    >>> jax.eval_shape(lambda params: decoder_queries(model, params, positions.same_view_positions(2, 8)), shapes).shape
    (4, 8)
    """
    raw_xNx2W = jax.lax.stop_gradient(jnp.asarray(raw_xNx2W))
    if model.decoder.positions == "absolute":
        mapped_xNxW = raw_xNx2W[..., : model.decoder.width].astype(model.dtype)
    else:
        inwards, _, _ = _parts(model)
        mapped_xNxW = inwards.apply({"params": params["position_map"]}, raw_xNx2W)
    return mapped_xNxW + params["mask_token"].reshape(-1).astype(mapped_xNxW.dtype)


def project_targets(model: schema.Model, params: Params, z_BxTxD: jax.Array) -> jax.Array:
    """Features in the space that a decoder with a projector reads and predicts: embedding, then the
    projector's blocks (SiameseIM).

    The target goes through the momentum copy of both, with every token of its clean view and cls
    among them; drop that one afterwards.

    Args:
      model: settings.
      params: a tree with `embed` and `projector`; not read if there is no projector.
      z_BxTxD: features of every token.

    Returns:
      [B, T, W] in `model.dtype`; without a projector z itself: the features are the target then.

    >>> model = schema.Model(encoder=schema.Encoder(width=12), decoder=schema.Decoder(width=8, depth=1, heads=2, projector_depth=2))
    >>> shapes = jax.eval_shape(lambda key: init(model, key), jax.random.key(0))
    >>> part = {name: shapes[name] for name in ("embed", "projector")}
    >>> jax.eval_shape(lambda params: project_targets(model, params, jnp.zeros((3, 5, 12))), part).shape
    (3, 5, 8)
    """
    return _project(model, params, z_BxTxD) if model.decoder.projector_depth else z_BxTxD


def _project(model: schema.Model, params: Params, z_BxTxD: jax.Array) -> jax.Array:
    inwards, _, one = _parts(model)
    x_BxTxW = inwards.apply({"params": params["embed"]}, z_BxTxD)
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
    """What the decoder makes of every query; `prediction_head` makes predictions of it.

    Args: model: settings; `model.decoder`, `model.encoder.width`, `model.dtype` and those of
      `scan_blocks.block_kwargs` are read. params: as of `init`. z_BxKxD: encoder features of the
      image's own visible tokens, without cls. index_BxK: int, the cells of those tokens.
      query_BxNxW: as of `decoder_queries`, as many as there are positions to predict: of every
      position, or gathered rows of some (MAE predicts at hidden cells only). [N, W] stands for the
      same queries in every row.
      grid: cells a side of the input view.
      cls_BxD: feature of the cls token, one more visible token without a position. None: it is not
          read, as where two images share it.

    Returns:
      [B, N, W] in `model.dtype`, the residual stream of the query rows.

    Raises:
      ValueError: tokens and indices that do not match.

    >>> model = schema.Model(encoder=schema.Encoder(width=12), decoder=schema.Decoder(width=8, depth=2, heads=2))
    >>> shapes = jax.eval_shape(lambda key: init(model, key), jax.random.key(0))
    >>> z, index, query = jnp.zeros((3, 2, 12)), jnp.array([[0, 3], [1, 2], [0, 1]]), jnp.zeros((4, 8))
    >>> jax.eval_shape(lambda params: apply(model, params, z, index, query, grid=2), shapes).shape
    (3, 4, 8)
    """
    if z_BxKxD.shape[:2] != index_BxK.shape:
        raise ValueError(
            f"tokens have shape {z_BxKxD.shape} and indices {index_BxK.shape}; they must be [B, K,"
            " D] and [B, K]"
        )
    _, _, one = _parts(model)
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
    wanted = slice(own_BxTxW.shape[1], None)
    return run_blocks(one, params["blocks"], x_BxTxW, rows=wanted, **block_kwargs(model))


def prediction_head(
    model: schema.Model, params: Params, rows_BxNxW: jax.Array, of: str
) -> jax.Array:
    """Predictions from the rows of `apply`.

    Args: model: settings. params: as of `init`. rows_BxNxW: as of `apply`. of: tokens, a linear map
      of the residual stream without a norm (SiameseIM); or pixels, a norm and a linear map (MAE).

    Returns: in `model.dtype`, [B, N, D] of tokens, [B, N, W] of tokens behind a projector, [B, N,
      P] of pixels.

    >>> model = schema.Model(encoder=schema.Encoder(width=12), decoder=schema.Decoder(width=8, depth=2, heads=2))
    >>> shapes = jax.eval_shape(lambda key: init(model, key, of=("tokens", "pixels")), jax.random.key(0))
    >>> [jax.eval_shape(lambda p, of=of: prediction_head(model, p, jnp.zeros((3, 4, 8)), of), shapes).shape for of in ("tokens", "pixels")]
    [(3, 4, 12), (3, 4, 768)]
    """
    if of == "tokens":
        _, outwards, _ = _parts(model)
        return outwards.apply({"params": params["head"]}, rows_BxNxW)
    if of == "pixels":
        return _pixel_head(model).apply(
            {"params": params["pixel_head"]},
            LayerNorm().apply({"params": params["pixel_norm"]}, rows_BxNxW),
        )
    raise ValueError(f"the decoder has no head for {of!r}: it predicts tokens or pixels")
