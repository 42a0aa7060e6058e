"""Vision transformer: f_theta of the paper with a ViT backbone (M3I Table 7; SiameseIM's variant).

Patch embedding, fixed sine-cosine positions, a cls token whose position is zero, pre-norm blocks and, unlike MAE, no final norm by default.
The patch embedding may stay at its random start (MoCo v3, SiameseIM): no gradient reaches it then.

B images, S pixels a side, p pixels a patch, N patches, P = 3 p p, K tokens kept, T tokens with cls, D width, L blocks.
"""

from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.models.layers import Block, Dense, LayerNorm, Params, add_positions, block, draw, init_blocks, run_blocks, shapes_of
from m3i_jax.objective import mixing, positions


def patchify(images_BxSxSx3: jax.Array, patch: int) -> jax.Array:
    """Pictures as rows of patches: [B, N, P], patches row-major, inside one (row, column, channel).

    Args:
      images_BxSxSx3: [B, S, S, C] of any type.
      patch: pixels a side, p.

    Raises:
      ValueError: sides that are not multiples of the patch.

    >>> patchify(jnp.arange(16).reshape(1, 4, 4, 1), 2)[0].tolist()
    [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    """
    b, height, width, channels = images_BxSxSx3.shape
    if height % patch or width % patch:
        raise ValueError(f"images have shape {images_BxSxSx3.shape}; height and width must be multiples of the patch, {patch}")
    split = images_BxSxSx3.reshape(b, height // patch, patch, width // patch, patch, channels)
    return split.swapaxes(2, 3).reshape(b, -1, patch * patch * channels)


def _parts(model: schema.Model) -> tuple[Dense, Block]:
    e = model.encoder
    return Dense(e.width, jnp.dtype(model.dtype)), block(e.width, e.heads, e.mlp_ratio, model.dtype)


def init(model: schema.Model, rng: jax.Array) -> Params:
    """Parameters: `patch_embed`, `cls_token` [1, 1, D] if there is one, `blocks` stacked on [L, ...], `norm` if there is one.

    Dense layers are Xavier-uniform on their two-dimensional shapes, the patch embedding as a [P, D] matrix; biases 0, cls N(0, 0.02^2).

    >>> params = jax.eval_shape(lambda key: init(schema.Model(), key), jax.random.key(0))
    >>> sorted(params), params["patch_embed"]["kernel"].shape
    (['blocks', 'cls_token', 'patch_embed'], (768, 768))
    """
    e = model.encoder
    embed, one = _parts(model)
    of_stem, of_blocks = jax.random.split(rng)
    stem: dict[str, Any] = {"patch_embed": shapes_of(embed, jnp.zeros((1, 3 * e.patch_size**2)))}
    if e.cls_token:
        stem["cls_token"] = jax.ShapeDtypeStruct((1, 1, e.width), jnp.float32)
    if e.final_norm:
        stem["norm"] = shapes_of(LayerNorm(), jnp.zeros((1, e.width)))
    return {**draw(of_stem, stem, {"cls_token": 0.02}), "blocks": init_blocks(one, of_blocks, width=e.width, depth=e.depth)}


def apply(
    model: schema.Model,
    params: Params,
    patches_BxNxP: jax.Array,
    *,
    grid: int,
    index_BxK: jax.Array | None = None,
    keep_BxLx2: jax.Array | None = None,
) -> jax.Array:
    """Features of every token.

    Args:
      model: settings; `model.encoder`, `model.dtype`, `model.scan` and `model.remat` are read.
      params: as of `init`; the momentum target is another tree of the same kind.
      patches_BxNxP: normalised pixels, as of `patchify`.
      grid: patches a side, N = grid * grid.
      index_BxK: int, the cells that are read; the others are dropped before the embedding (SiameseIM, MAE). None: all.
      keep_BxLx2: stochastic depth as factors 0 or 1 / (1 - p), attention and MLP; None: off, as in the target.

    Returns:
      [B, T, D] in `model.dtype`, T = N or K, plus one: cls comes first.

    Raises:
      ValueError: patches that are not grid * grid.

    >>> model = schema.Model(encoder=schema.Encoder(patch_size=4, width=8, depth=2, heads=2))
    >>> shapes = jax.eval_shape(lambda key: init(model, key), jax.random.key(0))
    >>> patches, index = jnp.zeros((2, 9, 48)), jnp.array([[0, 4], [1, 8]])
    >>> jax.eval_shape(lambda params: apply(model, params, patches, grid=3, index_BxK=index), shapes).shape
    (2, 3, 8)
    """
    if patches_BxNxP.shape[1] != grid * grid:
        raise ValueError(f"patches have shape {patches_BxNxP.shape}; a grid of {grid} has {grid * grid} of them on axis 1")
    e = model.encoder
    embed, one = _parts(model)
    of_embed = jax.lax.stop_gradient(params["patch_embed"]) if e.freeze_patch_embed else params["patch_embed"]
    shown = patches_BxNxP if index_BxK is None else mixing.gather(patches_BxNxP, index_BxK)
    z_BxTxD = add_positions(embed.apply({"params": of_embed}, shown), positions.sincos_2d(grid, e.width), index_BxK)
    if e.cls_token:
        cls_Bx1xD = jnp.broadcast_to(params["cls_token"].astype(z_BxTxD.dtype), (z_BxTxD.shape[0], 1, e.width))
        z_BxTxD = jnp.concatenate([cls_Bx1xD, z_BxTxD], 1)
    z_BxTxD = run_blocks(one, params["blocks"], z_BxTxD, keep_BxLx2=keep_BxLx2, scan=model.scan, remat=model.remat)
    return LayerNorm().apply({"params": params["norm"]}, z_BxTxD) if e.final_norm else z_BxTxD
