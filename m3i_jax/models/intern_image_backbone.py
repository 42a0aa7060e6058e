"""InternImage as a backbone: sizes, checks, layers, names in its authors' files.

B images, N patches, P = 3 p p numbers of a patch, K cells read, D width, L layers."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.models import intern_image, scan_blocks
from m3i_jax.models.backbone import Backbone, as_toy
from m3i_jax.models.intern_image import InternImageConfig
from m3i_jax.models.layers import Params
from m3i_jax.models.transfer import IMAGENET, DenseRates, Finetuning, Reference
from m3i_jax.objective import mixing

_SCAN_FROM = 50  # layers; in one scan per stage they compile as four
_WHERE = "for model.backbone=intern_image"
_NO_MAPS = schema.Maps()


def intern_image_config(model: schema.Model) -> InternImageConfig:
    """Returns the net's settings in a run: its own section, and width and drop path of
    `model.encoder`. Where the patch is a cell of the last stage, the dense features are that
    stage's map, without the fusion.

    >>> encoder = schema.Encoder(width=1024, drop_path=0.2, drop_path_rule="uniform")
    >>> intern_image_config(schema.Model(encoder=encoder)) == InternImageConfig()
    True
    """
    own = {
        field.name: getattr(model.intern_image, field.name)
        for field in dataclasses.fields(schema.InternImage)
    }
    e = model.encoder
    net = InternImageConfig(
        **own, fused=e.width, drop_path=e.drop_path, drop_path_rule=e.drop_path_rule
    )
    return net if e.patch_size == net.stride else dataclasses.replace(net, fused=0)


def _init(
    model: schema.Model, rng: jax.Array, *, mask_token: bool = False, grid: int = 0
) -> Params:
    del grid
    return intern_image.init(intern_image_config(model), rng, mask_token=mask_token)


def _apply(
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
            "InternImage's layers differ in width and stride: their outputs cannot be averaged"
        )
    if index_BxK is not None and hidden_BxN is not None:
        raise ValueError(
            "cells are not read (index_BxK) or replaced by the mask token (hidden_BxN), not both"
        )
    if index_BxK is not None:
        rows = jnp.arange(index_BxK.shape[0])[:, None]
        hidden_BxN = jnp.ones(patches_BxNxP.shape[:2], bool).at[rows, index_BxK].set(False)
    z_BxNxD = intern_image.apply(
        intern_image_config(model),
        params,
        intern_image.unpatchify(patches_BxNxP, grid),
        keep_BxLx2=keep_BxLx2,
        hidden_BxN=hidden_BxN,
        dtype=model.dtype,
        **scan_blocks.block_kwargs(model),
    )
    return z_BxNxD if index_BxK is None else mixing.gather(z_BxNxD, index_BxK)


def _stages(
    model: schema.Model,
    params: Params,
    images_BxHxWx3: jax.Array,
    *,
    maps: schema.Maps = _NO_MAPS,
    size: int,
    keep_BxLx2: jax.Array | None = None,
    before: Callable[[int, jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, ...]:
    """The maps at the ends of the four stages, at strides 4 to 32 of the published sizes."""
    del maps, size  # there are no positions, and nothing to choose
    return tuple(
        intern_image.feature_maps(
            intern_image_config(model),
            params,
            images_BxHxWx3,
            keep_BxLx2=keep_BxLx2,
            dtype=model.dtype,
            before=before,
            **scan_blocks.block_kwargs(model),
        )
    )


def _map_strides(model: schema.Model, maps: schema.Maps) -> tuple[int, ...]:
    del maps
    first = math.prod(model.intern_image.stem_strides)
    return tuple(first * 2**stage for stage in range(4))


def _init_maps(model: schema.Model, maps: schema.Maps, params: Params, *, size: int) -> Params:
    """Without the fusion, which no map reads."""
    del model, maps, size
    return {name: value for name, value in params.items() if name != "fusion"}


def _layers_above(model: schema.Model, path: str) -> int | np.ndarray:
    """As InternImage is fine-tuned: layers are counted through all stages; a downsampling and the
    norm before it count with the first layer after them; the fusion, the norms between layers and
    the last stage's norm are not scaled."""
    depths = model.intern_image.depths
    total, first = sum(depths), np.cumsum([0, *depths])
    if path.startswith(("stem/", "mask_token")):
        return total - 1
    match = re.match(r"stage(\d)/(layers|down|norm)/", path)
    if not match:
        return 0
    stage = int(match[1])
    if match[2] == "layers":
        return total - 1 - np.arange(first[stage], first[stage + 1])
    return int(total - 1 - first[stage + 1]) if stage < 3 else 0


def _map_layers_above(model: schema.Model, path: str) -> int | np.ndarray:
    """As InternImage's detectors and segmenters are trained, which count by names: the head is the
    uppermost layer, the stem is two below the first layer; the last stage's norm counts with the
    first of its layers, and the norms between layers with as many layers of the stage as they are
    norms."""
    net = model.intern_image
    total, first = sum(net.depths), np.cumsum([0, *net.depths])
    if path.startswith("stem/"):
        return total + 1
    if path.startswith("stage2/extra_norms/"):
        return total - first[2] - np.arange(net.depths[2] // net.extra_norm)
    if path.startswith("stage3/norm/"):
        return int(total - first[3])
    return _layers_above(model, path) + bool(re.match(r"stage\d/(layers|down|norm)/", path))


def _require(condition: bool, key: str, value: object, why: str) -> None:
    if not condition:
        raise UserError(f"config.model.{key}: {value!r} {why}")


def _validate(config: schema.Config) -> None:
    _validate_encoder(config.model.encoder)
    _validate_section(config.model.intern_image)
    _validate_maps(config.dense.maps)
    net, e = config.model.intern_image, config.model.encoder
    stride, deepest = 4 * math.prod(net.stem_strides), 8 * net.width
    _require(
        e.patch_size == stride or (e.patch_size, e.width) == (2 * stride, deepest),
        "encoder.patch_size",
        e.patch_size,
        f"must be {stride} {_WHERE}: the stride of its third stage; or {2 * stride}, that of its"
        f" last, and model.encoder.width {deepest}",
    )
    sides = [("image_size", config.data.image_size)]
    sides += [("small_views", group.size) for group in config.small_views]
    for key, size in sides:
        if size % (unit := _side_unit(config.model)):
            raise UserError(
                f"config.data.{key}: {size!r} must be a multiple of {unit} {_WHERE}: the stride of"
                " its last stage"
            )


def _side_unit(model: schema.Model) -> int:
    return 8 * math.prod(model.intern_image.stem_strides)


def _validate_encoder(e: schema.Encoder) -> None:
    plain = schema.Encoder()
    for key in (
        "depth",
        "heads",
        "mlp_ratio",
        "positions",
        "rope_base",
        "registers",
        "norm",
        "embedding_norm",
        "qk_norm",
        "layer_scale",
        "norm_eps",
        "activation",
        "position_grid",
    ):
        value, default = getattr(e, key), getattr(plain, key)
        why = (
            f"is a setting of the ViT and has no effect {_WHERE}, whose settings are"
            f" model.intern_image; leave it at {default}"
        )
        _require(value == default, f"encoder.{key}", value, why)
    for key, what in {
        "cls_token": "cls token",
        "final_norm": "norm after its features",
        "freeze_patch_embed": "patch embedding",
    }.items():
        why = f"must be false {_WHERE}: it has no {what}"
        _require(not getattr(e, key), f"encoder.{key}", True, why)


def _validate_maps(maps: schema.Maps) -> None:
    for field in dataclasses.fields(schema.Maps):
        value, default = getattr(maps, field.name), getattr(_NO_MAPS, field.name)
        if value != default and not field.name.startswith("composite"):
            raise UserError(
                f"config.dense.maps.{field.name}: {value!r} is a setting of the ViT and has no"
                f" effect {_WHERE}, whose maps are those of its four stages; leave it at {default}"
            )


def _validate_section(net: schema.InternImage) -> None:
    _require(
        net.width % 2 == 0,
        "intern_image.width",
        net.width,
        "must be an even number: the stem starts with half",
    )
    widths = tuple(net.width * 2**i for i in range(4))
    divides = all(w % g == 0 for w, g in zip(widths, net.groups, strict=True))
    why = f"must divide the channels of the stages, {widths}"
    _require(divides, "intern_image.groups", net.groups, why)
    _require(net.kernel % 2 == 1, "intern_image.kernel", net.kernel, "must be odd")


def _preset(net: InternImageConfig) -> dict[str, Any]:
    heads = net.dense_width // 64  # heads as wide as the paper's 16 of 1024
    return {
        "backbone": "intern_image",
        "scan": sum(net.depths) >= _SCAN_FROM,
        "encoder": {
            "patch_size": net.stride,
            "width": net.dense_width,
            "drop_path": net.drop_path,
            "drop_path_rule": net.drop_path_rule,
            "cls_token": False,
            "final_norm": False,
            "freeze_patch_embed": False,
        },
        "intern_image": {
            field.name: getattr(net, field.name) for field in dataclasses.fields(schema.InternImage)
        },
        "decoder": {"width": net.dense_width, "depth": 4, "heads": heads},
        "pool": {"width": 768, "heads": heads},
    }


PRESETS = {name: _preset(net) for name, net in intern_image.PRESETS.items()}
PRESETS["internimage_pico"] = as_toy(PRESETS["internimage_pico"], decoder=96, heads=3) | {
    "pool": {"width": 128, "heads": 4, "std": 0.0}
}


def match_preset(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, dict[str, Any]] | None:
    """Name and sizes of the published InternImage with these parameters, by paths and shapes; its
    fusion of any width, or none (T to XL as their authors publish them), and with layer scale if it
    has some (T in its authors' detectors and segmenters).

    Args:
      shapes: {path below the encoder: shape}.

    >>> shapes = _shapes(dataclasses.replace(intern_image.PRESETS["internimage_s"], fused=0))
    >>> name, sizes = match_preset(shapes)
    >>> name, sizes["encoder"]["patch_size"], sizes["encoder"]["width"]
    ('internimage_s', 32, 640)
    """
    source = {path: tuple(shape) for path, shape in shapes.items() if path != "mask_token"}
    fused = source.get("fusion/shallow/bias") or (0,)
    scaled = any(path.endswith("/gamma1") for path in source)
    for name, net in intern_image.PRESETS.items():
        scale = net.layer_scale or float(scaled)
        net = dataclasses.replace(net, fused=fused[0], layer_scale=scale)
        if source == _shapes(net):
            return name, _preset(net)
    return None


def _shapes(net: InternImageConfig) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(
        intern_image.shapes(net), is_leaf=lambda node: isinstance(node, tuple)
    )
    return {"/".join(key.key for key in path): shape for path, shape in leaves}


def _recognize(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    match = match_preset(shapes)
    if match is None:
        return None
    name, sizes = match
    return {
        **dataclasses.asdict(schema.Encoder()),
        "image_size": schema.Data().image_size,
        **sizes["encoder"],
        **{key: sizes[key] for key in ("backbone", "scan", "intern_image")},
        "preset": name,
    }


def _without_fusion(model: schema.Model) -> str:
    return (
        "read its last stage as it is, by config.model.encoder.patch_size="
        f"{2 * model.encoder.patch_size} and width={8 * model.intern_image.width}, as"
        " configs/transfer/probe.py:from= does"
    )


# In the paper, H: 30 epochs [P]; the rest as in its authors' configurations with layer decay [R],
# without mixup and CutMix. Those of the results in their tables have one rate for all layers. The
# head pools the mean of the features, as for a ViT, whereas the authors keep the attention pooling
# of their pre-training. Stochastic depth is that of L and G; of XL and H, and of T, S and B [C],
# which are not published fine-tuned, 0.2.
_CLIP = 5.0
_FINETUNING = Finetuning(
    reference=Reference(lr=2e-5, batch=512, samples=30.0 * IMAGENET, most=1e-3),
    epochs=30.0,
    warmup_epochs=2.0,
    drop_path=lambda model: {160: 0.1, 512: 0.4}.get(model.intern_image.width, 0.2),
    settings={
        "optim.layer_decay": 0.9,
        "optim.weight_decay": 0.05,
        "optim.offset_lr": 0.1,
        "optim.center_lr": 0.1,
        "optim.clip": _CLIP,
        "optim.min_lr": 0.0,
        "objective.label_smoothing": 0.3,
        "data.augment.mixup": 0.0,
        "data.augment.cutmix": 0.0,
        "data.augment.erase_p": 0.0,
    },
)
# By the channels of the first stage: T, S, B, L, XL, H, G [R]. There is no published detector with
# an FPN on H and G, and no DINO on S, B and XL; their layer decays are those of their neighbours
# [C]. With an FPN, L and XL have those of its Cascade R-CNN of 12 epochs, whose longer run has 0.9
# and, for XL, a drop path of 0.6. UperNet of L and above has a smaller rate and clipping.
_UPERNET: dict[str, Any] = {"pixel_lr": 0.2, "pixel_clip": 0.1}
_LARGE: dict[str, Any] = {"pixels": 0.95, "queries": 0.94, "large": True, **_UPERNET}
_DENSE_RATES = {
    64: DenseRates(drop_path=0.2, pixel_lr=0.6),
    80: DenseRates(drop_path=0.3, pixel_lr=0.6),
    112: DenseRates(drop_path=0.4, pixel_lr=0.6),
    160: DenseRates(drop_path=0.4, boxes=0.94, pixels=0.94, **_UPERNET),
    192: DenseRates(drop_path=0.4, boxes=0.94, pixels=0.94, **_UPERNET),
    320: DenseRates(drop_path=0.5, boxes=0.94, **_LARGE),
    512: DenseRates(drop_path=0.5, boxes=0.94, **_LARGE),
}


def _dense_rates(model: schema.Model) -> DenseRates | None:
    """Those of the largest published size that is not larger; None for one smaller than all."""
    sizes = [width for width in _DENSE_RATES if width <= model.intern_image.width]
    return _DENSE_RATES[max(sizes)] if sizes else None


INTERN_IMAGE = Backbone(
    init=_init,
    apply=_apply,
    depth=lambda model: sum(model.intern_image.depths),
    layers_above=_layers_above,
    map_layers_above=_map_layers_above,
    describe=lambda model: (
        f"InternImage of {'+'.join(map(str, model.intern_image.depths))} layers from"
        f" {model.intern_image.width} channels"
    ),
    stages=_stages,
    map_strides=_map_strides,
    init_maps=_init_maps,
    side_unit=_side_unit,
    validate=_validate,
    sections=("intern_image",),
    presets=PRESETS,
    clip=_CLIP,
    finetuning=_FINETUNING,
    dense_rates=_dense_rates,
    dense_settings={"optim.offset_lr": 1.0},  # [R]
    lr_settings=(("dcn/offsets/", "offset_lr"), ("dcn/center/", "center_lr")),
    sharding_rules=(
        # columns are groups, as those of DCNv3's input are
        (r"(dcn/(offsets|mask|center)|fusion/(deep|shallow))/kernel$", ("fsdp", "tensor")),
        (r"depthwise/kernel$", ()),  # small, and computed with in float32
    ),
    layout="intern_image",
    recognize=_recognize,
    shape_settings=("patch_size", "width"),
    init_settings=("layer_scale", "mlp_std"),
    added_parameters=("mask_token", "fusion/"),
    stem_parameters=("stem", "mask_token"),
    without_added=_without_fusion,
)
