"""Vision transformer: f_theta of the paper with a ViT backbone (M3I Table 7; SiameseIM's variant).

Patch embedding, fixed sine-cosine positions, a cls token whose position is zero, pre-norm blocks
and, unlike MAE, no final norm by default. The patch embedding may stay at its random start (MoCo
v3, SiameseIM), without a gradient. A learned position table, with a row for the cls token, a norm
after the embedding, other GELUs and another eps are for weights of other projects (timm, CLIP).

B images, S pixels a side (H, W if not square), p pixels a patch, N patches, P = 3 p p, K tokens
kept, T tokens with cls, D width, L blocks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import schema
from m3i_jax.models.initializers import init_blocks, init_params, shapes_of
from m3i_jax.models.layers import Block, Dense, Params, add_positions, block, norm_of
from m3i_jax.models.rope import Rotation, axial_rotation
from m3i_jax.models.scan_blocks import block_kwargs, run_blocks, split_blocks
from m3i_jax.objective import losses, mixing, positions

FIXED = ("sincos", "sincos_columns")  # positions that are a table which is not trained


def patchify(images_BxSxSx3: jax.Array, patch: int) -> jax.Array:
    """Returns images as rows of patches: [B, N, P], patches row-major, inside one (row, column,
    channel).

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
        raise ValueError(
            f"images have shape {images_BxSxSx3.shape}; height and width must be multiples of the"
            f" patch, {patch}"
        )
    split = images_BxSxSx3.reshape(b, height // patch, patch, width // patch, patch, channels)
    return split.swapaxes(2, 3).reshape(b, -1, patch * patch * channels)


def encoder_modules(model: schema.Model) -> tuple[Dense, Block]:
    """Returns the patch embedding and the block of these settings.

    >>> encoder_modules(schema.Model())[1].hidden
    3072
    """
    e = model.encoder
    one = block(
        e.width,
        e.heads,
        e.mlp_ratio,
        model.dtype,
        e.norm,
        eps=e.norm_eps,
        activation=e.activation,
        qk_norm=e.qk_norm,
        layer_scale=e.layer_scale > 0,
        rope=e.rope_base if e.positions == "rope" else 0.0,
    )
    return Dense(e.width, jnp.dtype(model.dtype)), one


def token_prefix(encoder: schema.Encoder) -> int:
    """Returns tokens before the patches inside the encoder: cls and registers.

    >>> token_prefix(schema.Encoder(registers=4))
    5
    """
    return int(encoder.cls_token) + encoder.registers


def without_registers(encoder: schema.Encoder, z_BxTxD: jax.Array) -> jax.Array:
    """Returns tokens of a block as everything outside the encoder reads them: cls, then the
    patches.

    >>> without_registers(schema.Encoder(registers=2), jnp.arange(5).reshape(1, 5, 1)).ravel()
    Array([0, 3, 4], dtype=int32)
    """
    if not encoder.registers:
        return z_BxTxD
    patches_BxNxD = z_BxTxD[:, token_prefix(encoder) :]
    if not encoder.cls_token:
        return patches_BxNxD
    return jnp.concatenate([z_BxTxD[:, :1], patches_BxNxD], 1)


def apply_norm(encoder: schema.Encoder, params: Params, z_BxTxD: jax.Array) -> jax.Array:
    """Returns the norm of the encoder's kind, with these parameters.

    >>> encoder = schema.Encoder(norm="rms")
    >>> apply_norm(encoder, {"scale": jnp.ones(2)}, jnp.array([[7.0, 1.0]])).round(1).tolist()
    [[1.399..., 0.200...]]
    """
    return norm_of(encoder.norm, encoder.norm_eps)().apply({"params": params}, z_BxTxD)


def _rotation(
    model: schema.Model, grid: int, index_BxK: jax.Array | None = None
) -> Rotation | None:
    e = model.encoder
    if e.positions != "rope":
        return None
    return axial_rotation(
        grid, e.width // e.heads, e.rope_base, prefix=token_prefix(e), index_BxK=index_BxK
    )


def position_size(config: Any) -> int:
    """Returns the side in pixels of the images for which an encoder has its positions: those of its
    first training, of which tables for other images are resized.

    Args:
      config: settings of a run, or those that a file of weights implies.

    >>> position_size(schema.Config(data=schema.Data(image_size=384)))
    384
    >>> encoder = schema.Encoder(position_grid=14)
    >>> position_size(schema.Config(model=schema.Model(encoder=encoder)))
    224
    """
    e = config.model.encoder
    fixed = e.position_grid * e.patch_size if e.positions in FIXED else 0
    return fixed or config.dense.maps.image_size or config.data.image_size


def fixed_positions(encoder: schema.Encoder, grid: int | tuple[int, int]) -> np.ndarray:
    """Returns the position table [N, D] of an encoder whose positions are not learned:
    `positions.sincos_2d`, or with the rule sincos_columns MAE's, whose halves are exchanged. With
    `position_grid` it is the table of that grid, resized. With the rule rope nothing is added:
    zeros.

    Args:
      encoder: settings.
      grid: patches a side; with `position_grid` also (rows, columns).

    >>> tables = [
    ...     fixed_positions(schema.Encoder(width=8, positions=rule), 2)
    ...     for rule in ("sincos", "sincos_columns")
    ... ]
    >>> [table[2, [0, 4]].round(2).tolist() for table in tables]
    [[0.84..., 0.0], [0.0, 0.84...]]
    """
    if encoder.positions == "rope":
        rows, columns = (grid, grid) if isinstance(grid, int) else grid
        return np.zeros((rows * columns, encoder.width), np.float32)
    base = encoder.position_grid or (grid if isinstance(grid, int) else grid[0])
    table_NxD = positions.resized(positions.sincos_2d(base, encoder.width), grid)
    if encoder.positions == "sincos_columns":
        return np.roll(table_NxD, encoder.width // 2, -1)
    return table_NxD


def init(model: schema.Model, rng: jax.Array, *, mask_token: bool = False, grid: int = 0) -> Params:
    """Returns the initial parameters: `patch_embed`, `cls_token` [1, 1, D] if there is one,
    `registers` [1, R, D] if there are any, `positions` [1, T, D] if they are learned, T without
    registers, `embedding_norm` if there is one, `blocks` stacked on [L, ...], `norm` if there is
    one.

    Dense layers are Xavier-uniform on their two-dimensional shapes, the patch embedding as a [P, D]
    matrix; biases 0, tokens N(0, 0.02^2).

    Args:
      model: settings; `model.encoder` is read.
      rng: key.
      mask_token: add `mask_token` [1, 1, D], which stands for hidden cells. The others start the
        same without it.
      grid: patches a side, for a learned position table.

    >>> params = jax.eval_shape(lambda key: init(schema.Model(), key), jax.random.key(0))
    >>> sorted(params), params["patch_embed"]["kernel"].shape
    (['blocks', 'cls_token', 'patch_embed'], (768, 768))
    """
    e = model.encoder
    patch, one = encoder_modules(model)
    of_stem, of_blocks = jax.random.split(rng)
    stem: dict[str, Any] = {"patch_embed": shapes_of(patch, jnp.zeros((1, 3 * e.patch_size**2)))}
    if e.cls_token:
        stem["cls_token"] = jax.ShapeDtypeStruct((1, 1, e.width), jnp.float32)
    if e.final_norm:
        stem["norm"] = shapes_of(norm_of(e.norm)(), jnp.zeros((1, e.width)))
    gammas = {"gamma1": e.layer_scale, "gamma2": e.layer_scale}
    params = {
        **init_params(of_stem, stem, {"cls_token": 0.02}),
        "blocks": init_blocks(one, of_blocks, width=e.width, depth=e.depth, values=gammas),
    }
    if e.embedding_norm:
        params["embedding_norm"] = init_params(
            of_stem, shapes_of(norm_of(e.norm)(), jnp.zeros((1, e.width)))
        )
    if e.registers:
        rows = {"registers": jax.ShapeDtypeStruct((1, e.registers, e.width), jnp.float32)}
        params |= init_params(jax.random.fold_in(of_stem, 3), rows, {"registers": 0.02})
    if e.positions == "learned":
        table = {
            "positions": jax.ShapeDtypeStruct((1, grid * grid + e.cls_token, e.width), jnp.float32)
        }
        params |= init_params(jax.random.fold_in(of_stem, 2), table, {"positions": 0.02})
    if mask_token:
        shape = {"mask_token": jax.ShapeDtypeStruct((1, 1, e.width), jnp.float32)}
        params |= init_params(jax.random.fold_in(of_stem, 1), shape, {"mask_token": 0.02})
    return params


def apply(
    model: schema.Model,
    params: Params,
    patches_BxNxP: jax.Array,
    *,
    grid: int,
    index_BxK: jax.Array | None = None,
    keep_BxLx2: jax.Array | None = None,
    hidden_BxN: jax.Array | None = None,
    blocks: int = 1,
) -> jax.Array:
    """Returns features of every token.

    Args:
      model: settings; `model.encoder`, `model.dtype` and those of `scan_blocks.block_kwargs` are
        read.
      params: as of `init`; the momentum target is another tree of the same kind.
      patches_BxNxP: normalised pixels, as of `patchify`.
      grid: patches a side, N = grid * grid.
      index_BxK: int, the cells to read; the others are dropped before the embedding (SiameseIM,
        MAE). None: all.
      keep_BxLx2: stochastic depth as factors 0 or 1 / (1 - p) of attention and MLP; None: off, as
        in the target.
      hidden_BxN: bool, cells whose patch embedding is replaced by the mask token, at their
        positions (BEiT, data2vec). None: none.
      blocks: above 1, the result is the mean over the outputs of this many last blocks, each
        layer-normalised without scale and offset, and there is no final norm (data2vec's target).

    Returns:
      [B, T, D] in `model.dtype`, T = N or K, plus one for cls, which comes first; no registers. A
      mean over blocks is float32.

    Raises:
      ValueError: patches that are not grid * grid, cells both dropped and replaced, or more blocks
        than the encoder has.

    >>> model = schema.Model(encoder=schema.Encoder(patch_size=4, width=8, depth=2, heads=2))
    >>> shapes = jax.eval_shape(lambda key: init(model, key), jax.random.key(0))
    >>> patches, index = jnp.zeros((2, 9, 48)), jnp.array([[0, 4], [1, 8]])
    >>> call = lambda params: apply(model, params, patches, grid=3, index_BxK=index)
    >>> jax.eval_shape(call, shapes).shape
    (2, 3, 8)
    """
    z_BxTxD = _embed_square(model, params, patches_BxNxP, grid, index_BxK, hidden_BxN)
    turn = _rotation(model, grid, index_BxK)
    if blocks > 1:
        return without_registers(
            model.encoder,
            _mean_of_last(model, params["blocks"], z_BxTxD, keep_BxLx2, blocks, turn),
        )
    _, one = encoder_modules(model)
    z_BxTxD = run_blocks(
        one,
        params["blocks"],
        z_BxTxD,
        keep_BxLx2=keep_BxLx2,
        rotation=turn,
        **block_kwargs(model),
    )
    z_BxTxD = without_registers(model.encoder, z_BxTxD)
    if not model.encoder.final_norm:
        return z_BxTxD
    return apply_norm(model.encoder, params["norm"], z_BxTxD)


def last_attention(
    model: schema.Model, params: Params, patches_BxNxP: jax.Array, *, grid: int
) -> jax.Array:
    """Returns attention weights of every head of the last block, [B, H, T, T] float32: of every
    token (row) over all, cls first where there is one. Registers are cut off: their weight is what
    is missing to a sum of 1.

    Arguments as of `apply`.

    >>> model = schema.Model(encoder=schema.Encoder(patch_size=4, width=8, depth=1, heads=2))
    >>> params = jax.jit(lambda: init(model, jax.random.key(0)))()
    >>> weights = last_attention(model, params, jnp.zeros((1, 4, 48)), grid=2)
    >>> weights[0, :, 0].sum(-1).round(3).tolist()
    [1.0, 1.0]
    """
    _, one = encoder_modules(model)
    z_BxTxD, depth = _embed_square(model, params, patches_BxNxP, grid), model.encoder.depth
    before, last = (
        split_blocks(params["blocks"], [depth - 1, 1]) if depth > 1 else (None, params["blocks"])
    )
    turn = _rotation(model, grid)
    if before is not None:
        z_BxTxD = run_blocks(one, before, z_BxTxD, rotation=turn, **block_kwargs(model))
    params = jax.tree.map(lambda leaf: leaf[0], last)
    weights_BxHxTxT = one.apply({"params": params}, z_BxTxD, weights=True, rotation=turn)
    e = model.encoder
    if not e.registers:
        return weights_BxHxTxT
    seen = np.r_[: int(e.cls_token), token_prefix(e) : z_BxTxD.shape[1]]
    return weights_BxHxTxT[:, :, seen][..., seen]


def _embed_square(
    model: schema.Model,
    params: Params,
    patches_BxNxP: jax.Array,
    grid: int,
    index_BxK: jax.Array | None = None,
    hidden_BxN: jax.Array | None = None,
) -> jax.Array:
    """Input of the first block, of patches on the grid that the positions belong to."""
    if patches_BxNxP.shape[1] != grid * grid:
        raise ValueError(
            f"patches have shape {patches_BxNxP.shape}; a grid of {grid} has {grid * grid} of them"
            " on axis 1"
        )
    if index_BxK is not None and hidden_BxN is not None:
        raise ValueError(
            "cells are dropped (index_BxK) or replaced by the mask token (hidden_BxN), not both"
        )
    if model.encoder.positions == "learned":
        table_NxD = params["positions"][0, int(model.encoder.cls_token) :]
        if len(table_NxD) != grid * grid:  # of a view of another size
            eye_NxN, smooth = np.eye(len(table_NxD), dtype=np.float32), model.encoder.registers > 0
            resize_NxM = positions.resized(eye_NxN, grid, antialias=smooth)
            table_NxD = jnp.matmul(resize_NxM, table_NxD, precision="highest")
    else:
        table_NxD = fixed_positions(model.encoder, grid)
    return embed_patches(model, params, patches_BxNxP, table_NxD, index_BxK, hidden_BxN)


def embed_patches(
    model: schema.Model,
    params: Params,
    patches_BxNxP: jax.Array,
    table_NxD: np.ndarray | jax.Array,
    index_BxK: jax.Array | None = None,
    hidden_BxN: jax.Array | None = None,
) -> jax.Array:
    """Returns the input of the first block: patch embedding, mask tokens, positions, cls token,
    registers, norm.

    Args:
      model, params, patches_BxNxP, index_BxK, hidden_BxN: as of `apply`.
      table_NxD: positions of all cells.

    Returns:
      [B, T, D] in `model.dtype`, with registers after cls.
    """
    e = model.encoder
    patch, _ = encoder_modules(model)
    embed_params = params["patch_embed"]
    if e.freeze_patch_embed:
        embed_params = jax.lax.stop_gradient(embed_params)
    read = patches_BxNxP if index_BxK is None else mixing.gather(patches_BxNxP, index_BxK)
    z_BxTxD = patch.apply({"params": embed_params}, read)
    if hidden_BxN is not None:
        z_BxTxD = jnp.where(
            hidden_BxN[..., None], params["mask_token"].astype(z_BxTxD.dtype), z_BxTxD
        )
    if e.positions != "rope":
        z_BxTxD = add_positions(z_BxTxD, table_NxD, index_BxK)
    if e.registers:
        rows_BxRxD = jnp.broadcast_to(
            params["registers"].astype(z_BxTxD.dtype), (z_BxTxD.shape[0], e.registers, e.width)
        )
        z_BxTxD = jnp.concatenate([rows_BxRxD, z_BxTxD], 1)
    if e.cls_token:
        cls_1x1xD = params["cls_token"]
        if e.positions == "learned":
            cls_1x1xD = cls_1x1xD + params["positions"][:, :1]
        cls_Bx1xD = jnp.broadcast_to(
            cls_1x1xD.astype(z_BxTxD.dtype), (z_BxTxD.shape[0], 1, e.width)
        )
        z_BxTxD = jnp.concatenate([cls_Bx1xD, z_BxTxD], 1)
    if e.embedding_norm:
        z_BxTxD = apply_norm(e, params["embedding_norm"], z_BxTxD)
    return z_BxTxD


def _mean_of_last(
    model: schema.Model,
    stacked: Params,
    z_BxTxD: jax.Array,
    keep_BxLx2: jax.Array | None,
    count: int,
    rotation: Rotation | None,
) -> jax.Array:
    """Mean over the normalised outputs of the last `count` blocks, float32."""
    depth = model.encoder.depth
    if count > depth:
        raise ValueError(f"an encoder of {depth} blocks has no mean over its last {count}")
    _, one = encoder_modules(model)

    def run(z: jax.Array, layers: Any) -> jax.Array:
        params, keep_LxBx2 = layers
        keep = None if keep_LxBx2 is None else keep_LxBx2.swapaxes(0, 1)
        return run_blocks(one, params, z, keep_BxLx2=keep, rotation=rotation, **block_kwargs(model))

    def step(
        carry: tuple[jax.Array, jax.Array], layer: Any
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        z = run(carry[0], jax.tree.map(lambda leaf: leaf[None], layer))
        return (z, carry[1] + losses.layer_normalize(z)), None

    layers = (stacked, None if keep_BxLx2 is None else keep_BxLx2.swapaxes(0, 1))
    last = layers
    if count < depth:
        first, last = split_blocks(layers, [depth - count, count])
        z_BxTxD = run(z_BxTxD, first)
    carry = (z_BxTxD, jnp.zeros(z_BxTxD.shape, jnp.float32))
    if model.scan:
        carry, _ = jax.lax.scan(step, carry, last)
    else:
        for layer in split_blocks(last, [1] * count):
            carry, _ = step(carry, jax.tree.map(lambda leaf: leaf[0], layer))
    return carry[1] / count
