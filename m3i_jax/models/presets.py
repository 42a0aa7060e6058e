"""Sizes of the whole model by name: what of a configuration's `model` each of them changes.

    config = default()
    config.model.update(presets.PRESETS["vit_s16"])        # values not named here stay

`vit_b16` is the paper's (M3I Table 7). For the others the paper gives no decoder: it keeps 4 blocks and takes the encoder's width, but at
most the 1024 of the paper's largest model; pooled and text widths stay where the paper has them. `vit_tiny` is a toy for small machines.
"""

from typing import Any

Preset = dict[str, Any]


def _preset(*, patch_size: int, width: int, depth: int, heads: int, decoder: tuple[int, int], pool: tuple[int, int]) -> Preset:
    """`decoder` and `pool` are (width, heads)."""
    return {
        "encoder": {"patch_size": patch_size, "width": width, "depth": depth, "heads": heads},
        "decoder": {"width": decoder[0], "depth": 4, "heads": decoder[1]},
        "pool": {"width": pool[0], "heads": pool[1]},
    }


PRESETS: dict[str, Preset] = {
    "vit_tiny": _preset(patch_size=8, width=96, depth=4, heads=3, decoder=(96, 3), pool=(96, 3))
    | {"decoder": {"width": 96, "depth": 2, "heads": 3}, "text": {"width": 96, "depth": 2, "heads": 3, "embed": 96}, "dtype": "float32"},
    "vit_s16": _preset(patch_size=16, width=384, depth=12, heads=6, decoder=(384, 8), pool=(768, 16)),
    "vit_b16": _preset(patch_size=16, width=768, depth=12, heads=12, decoder=(768, 16), pool=(768, 16)),
    "vit_l16": _preset(patch_size=16, width=1024, depth=24, heads=16, decoder=(1024, 16), pool=(768, 16)),
    "vit_h14": _preset(patch_size=14, width=1280, depth=32, heads=16, decoder=(1024, 16), pool=(768, 16)),
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
