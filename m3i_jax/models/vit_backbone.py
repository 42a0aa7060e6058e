"""The vision transformer of `vit` as a backbone: sizes, checks, layers, names in other projects."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.models import vit, vit_maps
from m3i_jax.models.backbone import Backbone, as_toy
from m3i_jax.models.transfer import Finetuning


def _validate(config: schema.Config) -> None:
    e = config.model.encoder
    if e.width % e.heads:
        raise UserError(f"config.model.encoder.heads: {e.heads!r} must divide the width {e.width}")
    if e.positions == "rope" and e.width // e.heads % 4:
        raise UserError(
            "config.model.encoder.positions: 'rope' needs heads whose width is a multiple of 4, and"
            f" {e.heads} heads of width {e.width} have {e.width // e.heads}; change one of them"
        )
    maps = config.dense.maps
    for key, blocks in (("global_blocks", maps.global_blocks), ("blocks", maps.blocks)):
        if beyond := [block for block in blocks if block >= e.depth]:
            raise UserError(
                f"config.dense.maps.{key}: block {beyond[0]} is beyond the last, {e.depth - 1};"
                " give numbers below model.encoder.depth"
            )


def _layers_above(model: schema.Model, path: str) -> int | np.ndarray:
    depth = model.encoder.depth
    if path.startswith("blocks/"):
        return depth - np.arange(depth)
    if path.startswith("relative/"):
        return depth - int(path.split("/")[1].removeprefix("block"))
    return 0 if path.startswith("norm/") else depth + 1


def _recognize(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """Sizes are in the file's own settings; a published position table is stored, so learned."""
    is_vit = "patch_embed/kernel" in shapes
    return {"backbone": "vit", "positions": "learned"} if is_vit else None


def _fixed_arrays(model: schema.Model, grid: int) -> dict[str, np.ndarray]:
    """The position table, with zeros for cls, unless it is a parameter or there is none."""
    e = model.encoder
    if e.positions in ("learned", "rope"):
        return {}
    cls_row = np.zeros((int(e.cls_token), e.width), np.float32)
    return {"positions": np.concatenate([cls_row, vit.fixed_positions(e, grid)])[None]}


def _card(model: schema.Model) -> list[tuple[str, str]]:
    e = model.encoder
    no_norm = "none: features are the residual stream after the last block"
    return [
        ("attention", f"{e.heads} heads, MLP x {e.mlp_ratio:g}"),
        (
            "positions",
            e.positions
            + (", cls token" if e.cls_token else ", no cls token")
            + (f", {e.registers} registers" if e.registers else ""),
        ),
        ("final norm", ("LayerNorm", "RMSNorm")[e.norm == "rms"] if e.final_norm else no_norm),
    ]


def _preset(
    *,
    patch_size: int,
    width: int,
    depth: int,
    heads: int,
    decoder: tuple[int, int],
    pool: tuple[int, int],
) -> dict[str, Any]:
    """`decoder` and `pool` are (width, heads)."""
    return {
        "encoder": {"patch_size": patch_size, "width": width, "depth": depth, "heads": heads},
        "decoder": {"width": decoder[0], "depth": 4, "heads": decoder[1]},
        "pool": {"width": pool[0], "heads": pool[1]},
    }


_TINY = _preset(patch_size=8, width=96, depth=4, heads=3, decoder=(96, 3), pool=(96, 3))
PRESETS: dict[str, dict[str, Any]] = {
    "vit_tiny": as_toy(_TINY, decoder=96, heads=3),
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
}


def _finetuning_drop_path(model: schema.Model) -> float:
    depth = model.encoder.depth
    return 0.3 if depth >= 32 else 0.2 if depth >= 24 else 0.1


# settings that change the shapes of the parameters of few published encoders
_OPTIONS = ("registers", "norm", "qk_norm", "layer_scale")

VIT = Backbone(
    init=vit.init,
    apply=vit.apply,
    depth=lambda model: model.encoder.depth,
    layers_above=_layers_above,
    describe=lambda model: f"{model.encoder.depth} blocks of {model.encoder.width}",
    stages=vit_maps.stages,
    map_strides=vit_maps.map_strides,
    init_maps=vit_maps.init_maps,
    attention=vit.last_attention,
    can_drop_tokens=True,
    can_isolate=True,
    can_average_blocks=True,
    has_cls_token=True,
    resizes_positions=True,
    reads_maps=True,
    validate=_validate,
    presets=PRESETS,
    # of L and H as MAE, whose length and rate for them (50 epochs, 4e-3) are not the paper's
    finetuning=Finetuning(
        layer_decay=lambda model: 0.75 if model.encoder.depth >= 24 else 0.65,
        drop_path=_finetuning_drop_path,
    ),
    scans_from=12,
    layout="vit",
    recognize=_recognize,
    shape_settings=(
        "patch_size",
        "width",
        "depth",
        "mlp_ratio",
        "cls_token",
        "final_norm",
        "embedding_norm",
        *_OPTIONS,
    ),
    silent_settings=("heads", "activation", "norm_eps", "rope_base"),
    map_parameters=("relative/", "blocks/gamma1", "blocks/gamma2"),
    stem_parameters=("patch_embed", "positions", "cls_token", "registers", "embedding_norm"),
    fixed_arrays=_fixed_arrays,
    card=_card,
)
