"""Sizes of the whole model by name: the settings of `model` that each of them changes.

    config = default_config()
    presets.apply_preset(config, "vit_s16")        # settings that it does not name stay

The values are fields of the backbones. `vit_b16` and `internimage_h` are the paper's (M3I Table 7).
For other sizes the paper gives no decoder: they keep 4 blocks and take the width of the dense
features, but at most the 1024 of the paper's largest model; pooled and text widths stay the
paper's. `vit_tiny` and `internimage_pico` are toys for small machines."""

from typing import Any

from m3i_jax.models import backbones

TOYS = ("vit_tiny", "internimage_pico")


def preset_names() -> list[str]:
    """Returns names of all presets, those of registered backbones included.

    >>> "vit_b16" in preset_names() and "internimage_h" in preset_names()
    True
    """
    return [name for each in backbones.registered_backbones().values() for name in each.presets]


def preset(name: str) -> dict[str, Any]:
    """Returns the settings of a size, for `config.model.update(...)`.

    Raises:
      KeyError: an unknown name; with the known ones.

    >>> preset("vit_h14")["encoder"]["depth"]
    32
    """
    for kind, backbone in backbones.registered_backbones().items():
        if name in backbone.presets:
            return {"backbone": kind, **backbone.presets[name]}
    raise KeyError(f"there is no preset {name!r}; known are {', '.join(preset_names())}")


def apply_preset(config: Any, name: str) -> None:
    """Give a ConfigDict the sizes of a preset, and the gradient clipping of its backbone's recipe
    if it has one.

    Raises:
      KeyError: as of `preset`.

    >>> from m3i_jax.config import default_config
    >>> config = default_config(); apply_preset(config, "internimage_h")
    >>> config.model.encoder.width, config.model.decoder.width, config.optim.clip
    (1024, 1024, 5.0)
    """
    config.model.update(preset(name))
    clip = backbones.get_backbone(config.model).clip
    if clip is not None:
        config.optim.clip = clip
