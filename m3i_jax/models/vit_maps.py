"""Maps of the vision transformer for dense tasks: images of any height and width, windows,
relative positions, layer scale, outputs of several blocks.

As in ViTDet (windows or decomposed relative positions) there is no cls token: the tree of a dense
run then lacks it, and the row of a learned position table that belongs to it is not read. Without
both, as in mmsegmentation's ViT, cls takes part in attention and is no part of the maps.

First values: relative tables are 0 and layer scale is `maps.layer_scale`, as in the references. All
else starts as in `vit.init`, Xavier-uniform. (From scratch ViTDet starts linear layers and position
table N(0, 0.02^2), truncated.)

B images, p pixels a patch, H W size of an image, h w of a map, S cells a side of a table, D width,
L blocks."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import schema
from m3i_jax.models import relative_bias, vit
from m3i_jax.models.layers import Params
from m3i_jax.models.map_blocks import MapBlock, run_map_blocks
from m3i_jax.models.scan_blocks import block_kwargs
from m3i_jax.objective import positions

_NO_MAPS = schema.Maps()


def keeps_cls(model: schema.Model, maps: schema.Maps) -> bool:
    """Returns whether the cls token, if the encoder has one, takes part in attention.

    >>> model = schema.Model()
    >>> keeps_cls(model, schema.Maps()), keeps_cls(model, schema.Maps(relative="decomposed"))
    (True, False)
    """
    return model.encoder.cls_token and not maps.window and maps.relative != "decomposed"


def map_prefix(model: schema.Model, maps: schema.Maps) -> int:
    """Returns tokens before those of the map: cls and, unless there are windows or relative
    positions, registers.

    >>> model = schema.Model(encoder=schema.Encoder(registers=4))
    >>> map_prefix(model, schema.Maps()), map_prefix(model, schema.Maps(window=7))
    (5, 0)
    """
    return int(keeps_cls(model, maps)) + _registers(model, maps)


def _registers(model: schema.Model, maps: schema.Maps) -> int:
    return 0 if maps.window or maps.relative != "none" else model.encoder.registers


def window_sides(model: schema.Model, maps: schema.Maps) -> list[int]:
    """Returns the side of the windows of every block in patches, 0 for the whole map.

    >>> encoder = schema.Encoder(depth=4)
    >>> window_sides(schema.Model(encoder=encoder), schema.Maps(window=14, global_blocks=(1, 3)))
    [14, 0, 14, 0]
    """
    blocks = range(model.encoder.depth)
    return [0 if block in maps.global_blocks else maps.window for block in blocks]


def map_strides(model: schema.Model, maps: schema.Maps) -> tuple[int, ...]:
    """Returns the stride of each map of `stages` in pixels.

    >>> map_strides(schema.Model(), schema.Maps(blocks=(5, 11)))
    (16, 16)
    """
    return (model.encoder.patch_size,) * max(len(maps.blocks), 1)


def init_maps(model: schema.Model, maps: schema.Maps, params: Params, *, size: int) -> Params:
    """Returns the encoder's parameters of a dense run, made of those of `vit.init`: with
    `blocks/gamma1` and `gamma2` [L, D] for layer scale; with `relative/block<l>` for relative
    positions, {rows, columns} [2 S - 1, D / heads] or {table} [(2 S - 1)^2, heads], three rows more
    with cls, S the side of the block's windows or that of the map; without `cls_token` and
    `registers` where they take no part. Layer scale that the encoder already has keeps its values.

    Args:
      model, maps: settings; `maps.blocks` and `maps.global_blocks` are below the depth.
      params: as of `vit.init`.
      size: side in pixels of the images of the run.

    >>> model = schema.Model(encoder=schema.Encoder(depth=2))
    >>> maps = schema.Maps(window=14, global_blocks=(1,), relative="decomposed", layer_scale=0.1)
    >>> tree = jax.eval_shape(
    ...     lambda key: init_maps(model, maps, vit.init(model, key), size=1024), jax.random.key(0)
    ... )
    >>> sorted(tree), tree["blocks"]["gamma1"].shape
    (['blocks', 'patch_embed', 'relative'], (2, 768))
    >>> [tree["relative"][block]["rows"].shape for block in ("block0", "block1")]
    [(27, 64), (127, 64)]
    """
    e, cls = model.encoder, keeps_cls(model, maps)
    unread = {"cls_token"} - ({"cls_token"} if cls else set())
    unread |= set() if _registers(model, maps) else {"registers"}
    out = {name: value for name, value in params.items() if name not in unread}
    if maps.layer_scale and not e.layer_scale:
        gamma_LxD = jnp.full((e.depth, e.width), maps.layer_scale, jnp.float32)
        out["blocks"] = {**out["blocks"], "gamma1": gamma_LxD, "gamma2": gamma_LxD}
    relative = {}
    for block, window in enumerate(window_sides(model, maps)):
        side, depth = window or size // e.patch_size, e.width // e.heads
        shapes = relative_bias.table_shapes(
            maps.relative, side, heads=e.heads, depth=depth, cls=cls
        )
        relative[f"block{block}"] = {
            name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()
        }
    return out if maps.relative == "none" else {**out, "relative": relative}


def stages(
    model: schema.Model,
    params: Params,
    images_BxHxWx3: jax.Array,
    *,
    maps: schema.Maps = _NO_MAPS,
    size: int,
    keep_BxLx2: jax.Array | None = None,
    before: Callable[[int, jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, ...]:
    """Returns the maps of the blocks `maps.blocks`, or that of the last one, [B, H / p, W / p, D]
    in `model.dtype`. The final norm, if the encoder has one, is applied to the last block's.

    Args:
      model: settings; as of `vit.apply`.
      params: as of `init_maps`, or of `vit.init` if `maps` are the defaults.
      images_BxHxWx3: normalised images of any height and width that are multiples of the patch.
      maps: settings.
      size: side in pixels of the images of the run, to which the positions belong unless
        `maps.image_size` (or `model.encoder.position_grid`) says otherwise; of another grid they
        are resized, bicubic.
      keep_BxLx2: stochastic depth as factors 0 or 1 / (1 - p) of attention and MLP; None: off.
      before: a function of the number of a map and [B, h, w, D], the input of the first block that
        only this map and later ones are made of; the block reads what it returns.

    Raises:
      ValueError: sides that are not multiples of the patch.

    >>> model = schema.Model(encoder=schema.Encoder(patch_size=4, width=8, depth=3, heads=2))
    >>> maps = schema.Maps(window=2, global_blocks=(2,), relative="decomposed", blocks=(0, 2))
    >>> def init(key):
    ...     return init_maps(model, maps, vit.init(model, key), size=16)
    >>> shapes, images = jax.eval_shape(init, jax.random.key(0)), jnp.zeros((2, 8, 12, 3))
    >>> call = lambda params: stages(model, params, images, maps=maps, size=16)
    >>> [x.shape for x in jax.eval_shape(call, shapes)]
    [(2, 2, 3, 8), (2, 2, 3, 8)]
    """
    e, cls = model.encoder, keeps_cls(model, maps)
    registers, prefix = _registers(model, maps), map_prefix(model, maps)
    grid = images_BxHxWx3.shape[1] // e.patch_size, images_BxHxWx3.shape[2] // e.patch_size
    patches_BxNxP = vit.patchify(images_BxHxWx3, e.patch_size)
    table_NxD = position_table(model, params, (maps.image_size or size) // e.patch_size, grid)
    own = dataclasses.replace(e, cls_token=cls, registers=registers)
    reads = dataclasses.replace(model, encoder=own)
    x_BxTxD = vit.embed_patches(reads, params, patches_BxNxP, table_NxD)
    block = vit.encoder_modules(model)[1]
    one = MapBlock(block=block, grid=grid, cls=cls, registers=registers)
    ends = maps.blocks or (e.depth - 1,)
    run = functools.partial(_run_blocks, model, one, params, windows=window_sides(model, maps))
    if before is None:
        outputs = run(x_BxTxD, 0, ends, keep_BxLx2=keep_BxLx2)
    else:
        outputs, first = (), 0
        for number, end in enumerate(ends):
            changed = before(number, x_BxTxD[:, prefix:].reshape(-1, *grid, e.width))
            changed = changed.reshape(len(x_BxTxD), -1, e.width)
            x_BxTxD = jnp.concatenate([x_BxTxD[:, :prefix], changed], 1)
            (x_BxTxD,) = run(x_BxTxD, first, (end,), keep_BxLx2=keep_BxLx2)
            outputs, first = (*outputs, x_BxTxD), end + 1
    if e.final_norm and (maps.blocks or (e.depth - 1,))[-1] == e.depth - 1:
        last_BxTxD = vit.apply_norm(e, params["norm"], outputs[-1])
        outputs = (*outputs[:-1], last_BxTxD)
    return tuple(x[:, prefix:].reshape(x.shape[0], *grid, e.width) for x in outputs)


def _run_blocks(
    model: schema.Model,
    one: MapBlock,
    params: Params,
    x_BxTxD: jax.Array,
    first: int,
    ends: tuple[int, ...],
    *,
    windows: Sequence[int],
    keep_BxLx2: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """The outputs of the blocks `ends`, of those from `first` on."""
    some, relative = slice(first, ends[-1] + 1), params.get("relative", {})
    blocks = params["blocks"]
    if some != slice(0, model.encoder.depth):
        blocks = jax.tree.map(lambda leaf: leaf[some], blocks)
    return run_map_blocks(
        one,
        blocks,
        {
            f"block{i - first}": relative[f"block{i}"]
            for i in range(some.start, some.stop)
            if f"block{i}" in relative
        },
        x_BxTxD,
        windows=windows[some],
        ends=[end - first for end in ends],
        keep_BxLx2=None if keep_BxLx2 is None else keep_BxLx2[:, some],
        **block_kwargs(model),
    )


def position_table(
    model: schema.Model, params: Params, trained: int, grid: tuple[int, int]
) -> np.ndarray | jax.Array:
    """Returns positions [N, D] of a grid of (rows, columns): of a learned table, resized from its
    own grid; otherwise resized from `trained` cells a side. Bicubic, as `positions.resized`.

    >>> model = schema.Model(encoder=schema.Encoder(width=8))
    >>> position_table(model, {}, 2, (2, 3)).shape
    (6, 8)
    """
    e = model.encoder
    if e.positions != "learned":
        base = dataclasses.replace(e, position_grid=e.position_grid or trained)
        return vit.fixed_positions(base, grid)
    table_NxD = params["positions"][0, int(e.cls_token) :]
    old = math.isqrt(len(table_NxD))
    if grid == (old, old):
        return table_NxD
    smooth = e.registers > 0  # as `vit.apply`
    rows, columns = (
        positions.bicubic_weights(old, n, antialias=smooth).astype(np.float32) for n in grid
    )
    square = table_NxD.reshape(old, old, -1)
    resized = jnp.einsum("ya,xb,abd->yxd", rows, columns, square, precision="highest")
    return resized.reshape(grid[0] * grid[1], -1)
