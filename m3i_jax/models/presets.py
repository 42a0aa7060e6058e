"""Sizes of the whole model by name: what of a configuration's `model` each of them changes.

    config = default()
    presets.apply_preset(config, "vit_s16")        # values not named here stay

`vit_b16` and `internimage_h` are the paper's (M3I Table 7). For the others the paper gives no
decoder: it keeps 4 blocks and takes the width of the dense features, but at most the 1024 of the
paper's largest model; pooled and text widths stay where the paper has them. `vit_tiny` and
`internimage_pico` are toys for small machines."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from m3i_jax import schema
from m3i_jax.models import intern_image

Preset = dict[str, Any]
_DEEP = 50  # layers; in one scan a stage they compile as four
CLIP = 5.0  # of the gradient norm, as InternImage is trained; a ViT keeps the 1 of SiameseIM


def _preset(
    *,
    patch_size: int,
    width: int,
    depth: int,
    heads: int,
    decoder: tuple[int, int],
    pool: tuple[int, int],
) -> Preset:
    """`decoder` and `pool` are (width, heads)."""
    return {
        "encoder": {"patch_size": patch_size, "width": width, "depth": depth, "heads": heads},
        "decoder": {"width": decoder[0], "depth": 4, "heads": decoder[1]},
        "pool": {"width": pool[0], "heads": pool[1]},
    }


def _intern_image(net: intern_image.InternImageConfig) -> Preset:
    heads = net.dense_width // 64  # as wide as the paper's 16 of 1024
    shared = {
        "patch_size": net.stride,
        "width": net.dense_width,
        "drop_path": net.drop_path,
        "drop_path_rule": net.drop_path_rule,
    }
    return {
        "backbone": "intern_image",
        "scan": sum(net.depths) >= _DEEP,
        "encoder": {**shared, "cls_token": False, "final_norm": False, "freeze_patch_embed": False},
        "intern_image": {
            field.name: getattr(net, field.name) for field in dataclasses.fields(schema.InternImage)
        },
        "decoder": {"width": net.dense_width, "depth": 4, "heads": heads},
        "pool": {"width": 768, "heads": heads},
    }


def _toy(preset: Preset, *, decoder: int, heads: int) -> Preset:
    small = {"width": decoder, "depth": 2, "heads": heads}
    return preset | {
        "decoder": small,
        "text": {"width": 96, "depth": 2, "heads": 3, "embed": 96},
        "dtype": "float32",
    }


TOYS = ("vit_tiny", "internimage_pico")
PRESETS: dict[str, Preset] = {
    "vit_tiny": _toy(
        _preset(patch_size=8, width=96, depth=4, heads=3, decoder=(96, 3), pool=(96, 3)),
        decoder=96,
        heads=3,
    ),
    "vit_s16": _preset(
        patch_size=16, width=384, depth=12, heads=6, decoder=(384, 8), pool=(768, 16)
    ),
    "vit_b16": _preset(
        patch_size=16, width=768, depth=12, heads=12, decoder=(768, 16), pool=(768, 16)
    ),
    "vit_l16": _preset(
        patch_size=16, width=1024, depth=24, heads=16, decoder=(1024, 16), pool=(768, 16)
    ),
    "vit_h14": _preset(
        patch_size=14, width=1280, depth=32, heads=16, decoder=(1024, 16), pool=(768, 16)
    ),
    **{name: _intern_image(net) for name, net in intern_image.PRESETS.items()},
}
PRESETS["internimage_pico"] = _toy(PRESETS["internimage_pico"], decoder=96, heads=3) | {
    "pool": {"width": 128, "heads": 4, "std": 0.0}
}


def preset(name: str) -> Preset:
    """The values of a size, for `config.model.update(...)`.

    Raises:
      KeyError: for an unknown name, with those that there are.

    >>> preset("vit_h14")["encoder"]["depth"]
    32
    """
    if name not in PRESETS:
        raise KeyError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def match_intern_image(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, Preset] | None:
    """Name and sizes of the InternImage that an encoder is, by names and shapes alone; its fusion
    of any width, or none (T to XL as their authors publish them).

    Args:
      shapes: {path below the encoder: shape}.

    >>> shapes = _shapes(dataclasses.replace(intern_image.PRESETS["internimage_s"], fused=0))
    >>> name, sizes = match_intern_image(shapes)
    >>> name, sizes["encoder"]["patch_size"], sizes["encoder"]["width"]
    ('internimage_s', 32, 640)
    """
    there = {path: tuple(shape) for path, shape in shapes.items() if path != "mask_token"}
    fused = there.get("fusion/shallow/bias") or (0,)
    for name, net in intern_image.PRESETS.items():
        net = dataclasses.replace(net, fused=fused[0])
        if there == _shapes(net):
            return name, _intern_image(net)
    return None


def _shapes(net: intern_image.InternImageConfig) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(
        intern_image.shapes(net), is_leaf=lambda node: isinstance(node, tuple)
    )
    return {"/".join(key.key for key in path): shape for path, shape in leaves}


def apply_preset(config: Any, name: str) -> None:
    """Give a ConfigDict the sizes of a preset, and the clipping that its kind of backbone is
    trained with.

    Raises:
      KeyError: for an unknown name, with those that there are.

    >>> from m3i_jax.config import default
    >>> config = default(); apply_preset(config, "internimage_h"); config.model.encoder.width, config.model.decoder.width, config.optim.clip
    (1024, 1024, 5.0)
    """
    config.model.update(preset(name))
    if config.model.backbone == "intern_image":
        config.optim.clip = CLIP
