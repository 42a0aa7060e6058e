"""The settings that named methods were published with, and which of them a configuration changes.

`objective/published.py` has the methods' terms; `configs/forms.py` combines terms and settings into
recipes. The settings are here rather than there because an installed package without configs/ needs
them too, to log where a run differs from the publication. They are those of the method's public
code, where there is any, and of a ViT-B/16 or ResNet-50 on ImageNet-1K, where a comment does not
name another model. Images keep 224 pixels, also of methods that train on 192 (DeiT III), 256 or
288.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

from m3i_jax import config as configuration
from m3i_jax import published_caption_settings, published_rates, published_views, schema

# The encoder that its authors evaluate.
_OF_EMA = {"evaluate.encoder": "ema"}

# Of DINO and its successors.
_DINO = {
    "model.encoder.positions": "learned",
    "model.encoder.final_norm": True,
    "model.encoder.freeze_patch_embed": False,
    "model.head.hidden": 2048,
    "model.head.width": 256,
    "model.head.prototypes": 65_536,
    **published_views.DINO,
    **_OF_EMA,
}

# Images per step that learning rates and momentum of a method are given for, and above which they
# stay, if not 4,096. SigLIP's paper has one rate from 512 images on.
RATE_BATCH = {"capi": 16_384, "lejepa": 256, "siglip": 512}

# {method: {dotted key: value}}; learning rates and momentum at this batch. The constraint and the
# temperature of assignments to prototypes are in the terms: as settings, those of one row would
# also change the assignments of every row that it is joined with.
SETTINGS: dict[str, dict[str, Any]] = {
    "mae": {
        "data.mask": "uniform",
        "data.mask_ratio": 0.75,
        "data.crop_scale": (0.2, 1.0),
        "model.encoder.final_norm": True,
        "model.encoder.drop_path": 0.0,
        "model.encoder.freeze_patch_embed": False,
        "model.decoder.width": 512,
        "model.decoder.depth": 8,
        "model.decoder.positions": "absolute",
        "model.decoder.cls": "yes",
        **published_rates.MAE,
        "train.epochs": 1600.0,
        **published_views.PLAIN,
    },
    "data2vec": {
        "data.mask_ratio": 120 / 196,
        **published_views.BEIT,
        "model.encoder.layer_scale": 1e-4,
        "model.encoder.final_norm": True,
        "model.encoder.drop_path": 0.25,
        "model.encoder.freeze_patch_embed": False,
        **published_rates.DATA2VEC,
        "train.epochs": 800.0,
    },
    "feature_distillation": {  # of a CLIP teacher
        "model.encoder.layer_scale": 0.1,
        "model.encoder.final_norm": True,
        "model.encoder.drop_path": 0.2,
        "model.encoder.freeze_patch_embed": False,
        **published_rates.FEATURE_DISTILLATION,
        "train.epochs": 300.0,
        **published_views.PLAIN,
    },
    "distill": {  # rates and length are not published for AdamW
        "model.encoder.drop_path": 0.0,
        "model.encoder.freeze_patch_embed": False,
        **published_views.PLAIN,
    },
    "byol": {
        **published_views.BYOL,
        "model.encoder.freeze_patch_embed": False,
        **published_rates.RESNET,
        "optim.ema": 0.996,
        "train.epochs": 1000.0,
    },
    "moco_v3": {
        **published_views.BYOL,
        "model.encoder.drop_path": 0.0,
        "model.encoder.final_norm": True,
        "optim.lr": 2.4e-3,
        "optim.b2": 0.999,
        "optim.decayed": "all",
        "optim.clip": 0.0,
        "optim.warmup_epochs": 40.0,
        "optim.ema": 0.99,
        "train.epochs": 300.0,
    },
    "simclr": {
        **published_views.SIMCLR,
        "model.encoder.freeze_patch_embed": False,
        "model.head.hidden": 2048,
        "model.head.width": 128,
        **published_rates.RESNET,
        "train.epochs": 1000.0,
    },
    "barlow_twins": {
        **published_views.BYOL,
        "model.encoder.freeze_patch_embed": False,
        "model.head.hidden": 8192,
        "model.head.width": 8192,
        **published_rates.RESNET,
        "train.epochs": 1000.0,
    },
    "densecl": {
        "data.crop_scale": (0.2, 1.0),
        "model.encoder.freeze_patch_embed": False,
        "model.head.hidden": 2048,
        "model.head.width": 128,
        **published_rates.DENSECL,
        "train.epochs": 200.0,
        **published_views.MOCO_V2,
    },
    # ViT-S
    "msn": {
        "data.mask": "uniform",
        "data.mask_ratio": 0.15,
        "data.crop_scale": (0.3, 1.0),
        "model.encoder.positions": "learned",
        "model.encoder.drop_path": 0.0,
        "model.encoder.final_norm": True,
        "model.encoder.freeze_patch_embed": False,
        "model.head.hidden": 2048,
        "model.head.width": 256,
        **published_rates.MSN,
        **_OF_EMA,
        "train.epochs": 800.0,
        **published_views.MOCO_V2,
    },
    # ViT-S, its default command
    "dino": {
        "data.crop_scale": (0.4, 1.0),
        "data.small_views": ("8 x 96 at 0.05-0.4",),
        "model.encoder.drop_path": 0.1,
        **_DINO,
        **published_rates.DINO,
        "train.epochs": 100.0,
    },
    "ibot": {
        "data.crop_scale": (0.25, 1.0),
        "data.small_views": ("10 x 96 at 0.05-0.25",),
        "data.mask_ratio": 0.3,
        "model.encoder.drop_path": 0.1,
        **_DINO,
        "model.head.prototypes": 8192,
        "objective.target_temperature_rise": 30 / 800,
        **published_rates.IBOT,
        "optim.freeze_prototypes": 1 / 800,
        "train.epochs": 800.0,
    },
    # ViT-L on ImageNet-1K, vitl16_short
    "dinov2": {
        "data.crop_scale": (0.32, 1.0),
        "data.small_views": ("8 x 96 at 0.05-0.32",),
        "data.mask_ratio": 0.3,
        "model.encoder.drop_path": 0.3,
        "model.encoder.drop_path_rule": "uniform",
        "model.encoder.layer_scale": 1e-5,
        **_DINO,
        "objective.target_temperature_rise": 0.3,
        **published_rates.DINOV2,
        "optim.layer_decay": 0.9,
    },
    # ViT-H
    "ijepa": {
        "data.mask": "multi_block",
        "data.mask_ratio": 0.75,
        "data.crop_scale": (0.3, 1.0),
        "data.flip_p": 0.0,
        "model.encoder.cls_token": False,
        "model.encoder.final_norm": True,
        "model.encoder.drop_path": 0.0,
        "model.encoder.freeze_patch_embed": False,
        "model.decoder.width": 384,
        "model.decoder.depth": 12,
        "model.decoder.heads": 16,  # as many as its encoder
        "model.decoder.positions": "absolute",
        **published_rates.IJEPA,
        **_OF_EMA,
        "train.epochs": 300.0,
        **published_views.PLAIN,
    },
    "siamese_im": {
        **published_views.BYOL,
        "data.mask_ratio": 118 / 196,
        "model.decoder.width": 768,
        "model.decoder.depth": 4,
        "model.decoder.heads": 16,
        "model.decoder.positions": "relative",
        "model.decoder.norm": "batch",
        "model.decoder.projector_depth": 2,
        "model.decoder.cls": "yes",
        "model.encoder.drop_path": 0.0,
        "model.encoder.final_norm": False,
        "model.encoder.freeze_patch_embed": True,
        **published_rates.SIAMESE_IM,
        "train.epochs": 1600.0,
    },
    # DeiT III
    "deit": {
        **published_views.THREE_AUGMENT,
        "model.encoder.positions": "learned",
        "model.encoder.layer_scale": 1e-4,
        "model.encoder.drop_path": 0.2,
        "model.encoder.drop_path_rule": "uniform",
        "model.encoder.freeze_patch_embed": False,
        "model.pool.kind": "cls",  # whose norm is the last
        "model.pool.projection": False,
        "model.category_std": 0.02,
        "objective.label_smoothing": 0.0,
        **published_rates.DEIT,
        "train.epochs": 800.0,
    },
    "milan": {
        "data.mask": "uniform",
        "data.mask_ratio": 0.75,
        "data.crop_scale": (0.2, 1.0),
        **published_views.PLAIN,
        "model.encoder.final_norm": True,
        "model.encoder.drop_path": 0.0,
        "model.encoder.freeze_patch_embed": False,
        "model.decoder.width": 512,
        "model.decoder.depth": 8,
        "model.decoder.positions": "absolute",
        "model.decoder.cls": "yes",
        **published_rates.MAE,
        "train.epochs": 400.0,
    },
    "vicreg": {
        **published_views.BYOL,
        "model.encoder.freeze_patch_embed": False,
        "model.head.hidden": 8192,
        "model.head.width": 8192,
        **published_rates.RESNET,
        "train.epochs": 1000.0,
    },
    # Views (of 98 pixels, for patches of 14), rate and length of the README; head and stochastic
    # depth of the minimal example.
    "lejepa": {
        "data.crop_scale": (0.3, 1.0),
        "data.small_views": ("6 x 96 at 0.05-0.3",),
        "model.encoder.positions": "learned",
        "model.encoder.freeze_patch_embed": False,
        "model.encoder.drop_path": 0.1,
        "model.head.hidden": 2048,
        "model.head.width": 16,
        **published_rates.LEJEPA,
        "train.epochs": 100.0,
        **published_views.LEJEPA,
    },
    "simdino": {
        "data.crop_scale": (0.4, 1.0),
        "data.small_views": ("10 x 96 at 0.05-0.4",),
        "model.encoder.drop_path": 0.1,
        **{key: value for key, value in _DINO.items() if "prototypes" not in key},
        **{key: value for key, value in published_rates.DINO.items() if "prototypes" not in key},
        "train.epochs": 100.0,
    },
    # Those of its 7 B run that a joined row does not decide. The Gram stage began at the first
    # snapshot, after 1 M of 1.2 M steps, and took three more, 10,000 apart.
    "dinov3_gram": {
        "objective.snapshot_at": (100 / 120, 101 / 120, 102 / 120, 103 / 120),
        "objective.target_temperature_rise": 100 / 1200,
        "data.crop_scale": (0.32, 1.0),
        "data.flip_p": 0.0,
        "data.mask_ratio": 0.3,
        "model.encoder.positions": "rope",
        "model.encoder.registers": 4,
        "model.encoder.layer_scale": 1e-5,
        "model.encoder.norm_eps": 1e-5,
        "model.encoder.final_norm": True,
        "model.encoder.drop_path": 0.4,
        "model.encoder.drop_path_rule": "uniform",
        "model.encoder.freeze_patch_embed": False,
        "optim.freeze_prototypes": 5 / 1200,
        **published_rates.DINOV3,
        **_OF_EMA,
    },
    # ViT-L on LVD-142M
    "capi": {
        "data.mask": "inverse_block",
        "data.mask_ratio": 0.65,
        "data.crop_scale": (0.6, 1.0),
        "model.encoder.norm": "rms",
        "model.encoder.norm_eps": 1e-5,
        "model.encoder.final_norm": True,
        "model.encoder.positions": "rope",
        "model.encoder.registers": 16,
        "model.encoder.cls_token": False,
        "model.encoder.drop_path": 0.2,
        "model.encoder.drop_path_rule": "uniform",
        "model.encoder.freeze_patch_embed": False,
        "model.decoder.depth": 12,
        "model.head.prototypes": 16_384,
        **published_rates.CAPI,
        **_OF_EMA,
        "train.epochs": 57.7,
        **published_views.PLAIN,
    },
    **published_caption_settings.SETTINGS,
}


def settings_at(name: str, batch_size: int) -> dict[str, Any]:
    """Returns the published settings of a method, learning rates and momentum rescaled to a batch
    by `config.rescale`; {} for a name without settings.

    >>> [settings_at("capi", batch)["optim.lr"] for batch in (4096, 16_384, 40_000)]
    [0.00025, 0.001, 0.001]
    """
    settings, config = SETTINGS.get(name, {}), configuration.default_config()
    config.train.batch_size = RATE_BATCH.get(name, config.train.batch_size)
    rates = [key for key in ("optim.lr", "optim.min_lr", "optim.ema") if key in settings]
    config.update_from_flattened_dict({key: settings[key] for key in rates})
    configuration.rescale(config, batch_size)
    return settings | {key: _at(config, key) for key in rates}


def published_differences(config: schema.Config) -> dict[str, list[str]]:
    """Returns {named method of the objective: ["KEY VALUE instead of PUBLISHED" for every
    difference]}.

    Learning rates and momentum also count as published after `config.rescale` to the batch.

    >>> config = schema.Config(objective=schema.Objective(forms=("m3i", "byol")))
    >>> published_differences(config)["byol"][0]
    'model.encoder.freeze_patch_embed True instead of False'
    """
    return {
        name: differences
        for name in config.objective.forms
        if (differences := list(_differences(config, name)))
    }


def _differences(config: schema.Config, name: str) -> Iterator[str]:
    rescaled = settings_at(name, config.train.batch_size)
    overridden = {
        "train.epochs": ("train.steps", 0),
        "optim.warmup_epochs": ("optim.warmup_steps", -1),
    }
    for key, published in SETTINGS.get(name, {}).items():
        value = _at(config, key)
        if key in overridden and (steps := _at(config, overridden[key][0])) != overridden[key][1]:
            yield f"{overridden[key][0]} {steps} instead of {key} {_short(published)}"
        elif not (_equal(value, published) or _equal(value, rescaled[key])):
            yield f"{key} {_short(value)} instead of {_short(published)}"


def _at(config: Any, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return bool(a == b)


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def unpublished_settings_note(config: schema.Config) -> str:
    """Returns a log line about named methods that are trained with other settings than published;
    "" if there are none.

    >>> unpublished_settings_note(schema.Config())
    ''
    """
    differences = published_differences(config)
    if not differences:
        return ""
    methods = "; ".join(f"{name}: {', '.join(lines)}" for name, lines in differences.items())
    recipe = "+".join(config.objective.forms)
    return (
        f"settings differ from the published ones, which configs/forms.py:form={recipe} sets:"
        f" {methods}"
    )
