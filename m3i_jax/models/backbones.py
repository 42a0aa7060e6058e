"""The encoders that a run can have, behind one face: what the network, the plan of a step and the
optimizer ask of f_theta.

Another backbone is another value in `BACKBONES` and a section of its settings in `schema.Model`;
nothing else asks which one it is.

Every backbone reads an image as rows of patches, mixed or not, and gives one dense feature a patch,
cls first where there is one. A ViT drops the cells that are not read. A convolution cannot: it sees
a learned vector in their place, and only the features of the cells that are read go on (M3I section
3.4 mixes pixels, so that nothing has to be filled; method rows without a partner do).

B images, N patches, P = 3 p p numbers of a patch, K cells read, T tokens, D width, L layers of the
encoder."""

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import schema
from m3i_jax.models import intern_image, layers, scan_blocks, vit
from m3i_jax.models.layers import Params
from m3i_jax.objective import mixing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backbone:
    """What is asked of an encoder.

    init(model, rng, *, mask_token,     parameters; with the vector that stands for hidden cells if
         asked for; grid: cells a side, for a grid)                          learned position table
    apply(model, params, patches, ...)  features [B, T, D], with the arguments of `vit.apply`
    depth(model)                        layers, all in all below(model, path)
    layers above a parameter of the encoder, for layer-wise learning rates: a number, or one a layer
    of a stacked tree
    describe(model)                     a few words for reports attention(model, params, patches,
    what the last block's heads weigh the tokens with, [B, H, T, T], as `vit.last_attention`; None:
    *, grid)                  nothing in it attends
    drops                               cells that are not read cost nothing; otherwise they are
    filled isolates                            the images of a mixed input can be kept from seeing
    each other averages                            dense features can be a mean over the outputs of
    several last blocks"""

    init: Callable[..., Params]
    apply: Callable[..., jax.Array]
    depth: Callable[[schema.Model], int]
    below: Callable[[schema.Model, str], int | np.ndarray]
    describe: Callable[[schema.Model], str]
    attention: Callable[..., jax.Array] | None
    drops: bool
    isolates: bool
    averages: bool


def _below_vit(model: schema.Model, path: str) -> int | np.ndarray:
    depth = model.encoder.depth
    if path.startswith("blocks/"):
        return depth - np.arange(depth)
    return 0 if path.startswith("norm/") else depth + 1


VIT = Backbone(
    init=vit.init,
    apply=vit.apply,
    depth=lambda model: model.encoder.depth,
    below=_below_vit,
    describe=lambda model: f"{model.encoder.depth} blocks of {model.encoder.width}",
    attention=vit.last_attention,
    drops=True,
    isolates=True,
    averages=True,
)


def intern_image_config(model: schema.Model) -> intern_image.InternImageConfig:
    """InternImage as a run has it: its own settings, and patch size, width and drop path of the
    encoder. Where a patch is a cell of the last stage, its map is read as it is, without the
    fusion.

    >>> intern_image_config(schema.Model(encoder=schema.Encoder(width=1024, drop_path=0.2, drop_path_rule="uniform"))) == intern_image.InternImageConfig()
    True
    """
    own = {
        field.name: getattr(model.intern_image, field.name)
        for field in dataclasses.fields(schema.InternImage)
    }
    e = model.encoder
    net = intern_image.InternImageConfig(
        **own, fused=e.width, drop_path=e.drop_path, drop_path_rule=e.drop_path_rule
    )
    return net if e.patch_size == net.stride else dataclasses.replace(net, fused=0)


def _init_intern_image(
    model: schema.Model, rng: jax.Array, *, mask_token: bool = False, grid: int = 0
) -> Params:
    del grid
    return intern_image.init(intern_image_config(model), rng, mask_token=mask_token)


def _apply_intern_image(
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
    if blocks > 1:
        raise ValueError(
            "InternImage's layers differ in width and stride: there is no mean over the last of"
            " them"
        )
    if index_BxK is not None and hidden_BxN is not None:
        raise ValueError(
            "cells are not read (index_BxK) or replaced by the mask token (hidden_BxN), not both"
        )
    if index_BxK is not None:
        rows = jnp.arange(index_BxK.shape[0])[:, None]
        hidden_BxN = jnp.ones(patches_BxNxP.shape[:2], bool).at[rows, index_BxK].set(False)
    images = intern_image.unpatchify(patches_BxNxP, grid)
    settings = scan_blocks.block_kwargs(model)
    z_BxNxD = intern_image.apply(
        intern_image_config(model),
        params,
        images,
        keep_BxLx2=keep_BxLx2,
        hidden_BxN=hidden_BxN,
        dtype=model.dtype,
        **settings,
    )
    return z_BxNxD if index_BxK is None else mixing.gather(z_BxNxD, index_BxK)


def _below_intern_image(model: schema.Model, path: str) -> int | np.ndarray:
    """As InternImage is fine-tuned: every layer by itself through all stages; what leads from a
    stage to the next belongs to the first layer of the next; fusion, the norms between layers and
    the last stage's norm are not scaled."""
    depths = model.intern_image.depths
    total, first = sum(depths), np.cumsum([0, *depths])
    if path.startswith(("stem/", "mask_token")):
        return total - 1
    found = re.match(r"stage(\d)/(layers|down|norm)/", path)
    if not found:
        return 0
    stage = int(found[1])
    if found[2] == "layers":
        return total - 1 - np.arange(first[stage], first[stage + 1])
    return int(total - 1 - first[stage + 1]) if stage < 3 else 0


INTERN_IMAGE = Backbone(
    init=_init_intern_image,
    apply=_apply_intern_image,
    depth=lambda model: sum(model.intern_image.depths),
    below=_below_intern_image,
    describe=lambda model: (
        f"InternImage of {'+'.join(map(str, model.intern_image.depths))} layers from"
        f" {model.intern_image.width} channels"
    ),
    attention=None,
    drops=False,
    isolates=False,
    averages=False,
)

BACKBONES: dict[str, Backbone] = {"vit": VIT, "intern_image": INTERN_IMAGE}


def get_backbone(model: schema.Model) -> Backbone:
    """The backbone of these settings.

    >>> get_backbone(schema.Model()).describe(schema.Model())
    '12 blocks of 768'
    """
    return BACKBONES[model.backbone]


def backbone_drop_rates(model: schema.Model) -> np.ndarray:
    """Rate of stochastic depth of every layer, [L] float32.

    >>> backbone_drop_rates(schema.Model(encoder=schema.Encoder(depth=3, drop_path=0.25))).tolist()
    [0.0, 0.125, 0.25]
    """
    return layers.linear_drop_rates(
        get_backbone(model).depth(model), model.encoder.drop_path, model.encoder.drop_path_rule
    )
