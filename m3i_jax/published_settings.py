"""The settings that named methods were published with, and which of them a configuration changes.

`objective/published.py` has the methods' terms; `configs/forms.py` combines terms and settings into
recipes. The settings are here rather than there because an installed package without configs/ needs
them too, to log where a run differs from the publication.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

from m3i_jax import config as configuration
from m3i_jax import published_rates, published_views, schema

# Of DINO and its successors.
_DINO = {
    "model.encoder.freeze_patch_embed": False,
    "model.head.hidden": 2048,
    "model.head.width": 256,
    "model.head.prototypes": 65_536,
    **published_rates.DINO,
    **published_views.DINO,
}

# SigLIP's on the 10 B images of WebLI, 32,768 a step; warm-up of 20,000 steps.
_SIGLIP = {
    "data.flip_p": 0.0,
    "data.caption_length": 64,
    "model.encoder.positions": "learned",
    "model.encoder.activation": "gelu_tanh",
    "model.encoder.drop_path": 0.0,
    "model.encoder.freeze_patch_embed": False,
    "model.pool.query": "learned",
    "model.text.pool": "last",
    "optim.warmup_epochs": 0.0655,
    "train.epochs": 4.0,
    **published_rates.BIG_VISION,
    **published_views.PLAIN,
}

# CapPa's of 366,500 steps of 8,192 images, 3 B of them; how many times that is through its part of
# WebLI, 1 B, is not checked against the paper.
_CAPPA = {
    "data.crop_scale": (1.0, 1.0),
    "data.flip_p": 0.0,
    "data.caption_length": 65,  # 64 are predicted
    "data.vocabulary_size": 32_000,
    "model.encoder.cls_token": False,
    "model.encoder.positions": "learned",
    "model.encoder.final_norm": True,
    "model.encoder.activation": "gelu_tanh",
    "model.encoder.drop_path": 0.0,
    "model.encoder.freeze_patch_embed": False,
    "optim.b2": 0.999,
    "optim.warmup_epochs": 0.0819,
    "train.epochs": 3.0,
    **published_rates.BIG_VISION,
    **published_views.PLAIN,
}

# Images per step that learning rates and momentum of a method are given for, if not 4,096.
RATE_BATCH = {"capi": 16_384}

# {method: {dotted key: value}}; learning rates and momentum at this batch. Those of captioners and
# siglip, 1e-3 and 8e-4 at 8,192 to 65,536 images, are kept down to 4,096.
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
        "model.encoder.final_norm": True,
        "model.encoder.drop_path": 0.25,
        "model.encoder.freeze_patch_embed": False,
        **published_rates.DATA2VEC,
        "train.epochs": 800.0,
    },
    "feature_distillation": {
        "model.encoder.drop_path": 0.2,
        "model.encoder.freeze_patch_embed": False,
        **published_rates.FEATURE_DISTILLATION,
        "train.epochs": 300.0,
        **published_views.PLAIN,
    },
    "byol": {
        **published_views.BYOL,
        "model.encoder.freeze_patch_embed": False,
        "optim.ema": 0.996,
        "train.epochs": 1000.0,
    },
    "moco_v3": {
        **published_views.BYOL,
        "model.encoder.drop_path": 0.0,
        "model.encoder.final_norm": True,
        "optim.lr": 2.4e-3,
        "optim.b2": 0.999,
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
        "train.epochs": 1000.0,
    },
    "barlow_twins": {
        **published_views.BYOL,
        "model.encoder.freeze_patch_embed": False,
        "model.head.hidden": 8192,
        "model.head.width": 8192,
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
    "msn": {
        "data.mask": "uniform",
        "data.mask_ratio": 0.15,
        "data.crop_scale": (0.3, 1.0),
        "model.encoder.drop_path": 0.0,
        "model.encoder.final_norm": True,
        "model.encoder.freeze_patch_embed": False,
        "model.head.hidden": 2048,
        "model.head.width": 256,
        **published_rates.MSN,
        "train.epochs": 800.0,
        **published_views.MOCO_V2,
    },
    # given for 1,024 images; here at 4,096, by the linear rule of its command
    "dino": {
        "data.crop_scale": (0.4, 1.0),
        "data.small_views": ("8 x 96 at 0.05-0.4",),
        "model.encoder.drop_path": 0.1,
        "model.encoder.final_norm": True,
        **_DINO,
        "optim.lr": 8e-3,
        "train.epochs": 100.0,
    },
    "ibot": {
        "data.crop_scale": (0.25, 1.0),
        "data.small_views": ("10 x 96 at 0.05-0.25",),
        "data.mask_ratio": 0.3,
        "model.encoder.drop_path": 0.1,
        "model.encoder.final_norm": True,
        **_DINO,
        "model.head.prototypes": 8192,
        # its command of 800 epochs; the code's default is 0.04 for images
        "objective.target_temperature": (0.04, 0.07),
        "objective.target_temperature_rise": 30 / 800,
        "optim.freeze_prototypes": 1 / 800,
        "optim.lr": 8e-3,
        "train.epochs": 800.0,
    },
    "dinov2": {
        "data.crop_scale": (0.32, 1.0),
        "data.small_views": ("8 x 96 at 0.05-0.32",),
        "data.mask_ratio": 0.3,
        "model.encoder.drop_path": 0.3,
        "model.encoder.drop_path_rule": "uniform",
        "model.encoder.layer_scale": 1e-5,
        "model.encoder.final_norm": True,
        **_DINO,
        "optim.lr": 8e-3,
        "optim.layer_decay": 0.9,
        "train.epochs": 100.0,
    },
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
        "model.decoder.heads": 16,
        "model.decoder.positions": "absolute",
        "optim.lr": 2e-3,
        "optim.b2": 0.999,
        "optim.min_lr": 1e-6,
        "optim.warmup_epochs": 40.0,
        "optim.warmup_start": 0.2,
        "optim.ema": 0.992,  # of 2,048 images: 0.996
        "optim.weight_decay": 0.04,
        "optim.clip": 0.0,
        "train.epochs": 300.0,
        **published_views.PLAIN,
    },
    "siamese_im": {
        **published_views.BYOL,
        "data.mask_ratio": 118 / 196,
        "model.decoder.norm": "batch",
        "model.decoder.projector_depth": 2,
        "model.decoder.cls": "yes",
        "model.encoder.drop_path": 0.0,
        "optim.weight_decay": 0.05,
        "optim.clip": 1.0,
        "train.epochs": 1600.0,
    },
    "clip": {
        "data.crop_scale": (0.5, 1.0),
        "model.encoder.drop_path": 0.0,
        "model.encoder.freeze_patch_embed": False,
        "model.pool.kind": "cls",
        "model.text.pool": "last",
        "optim.lr": 5e-4,
        "optim.weight_decay": 0.5,
        "data.flip_p": 0.0,
        **published_views.PLAIN,
        **published_rates.YFCC,
    },
    "slip": {
        **published_views.SLIP,
        "model.encoder.drop_path": 0.0,
        "model.encoder.freeze_patch_embed": False,
        "model.pool.kind": "cls",
        "model.text.pool": "last",
        "objective.weighting": "fixed",
        "optim.lr": 3e-3,
        **published_rates.YFCC,
    },
    "deit": {
        "model.encoder.drop_path": 0.2,
        "model.encoder.drop_path_rule": "uniform",
        "model.encoder.freeze_patch_embed": False,
        "model.encoder.final_norm": True,
        "model.pool.kind": "cls",
        "optim.weight_decay": 0.05,
        "train.epochs": 800.0,
    },
    "milan": {
        "data.mask": "uniform",
        "data.mask_ratio": 0.75,
        "data.crop_scale": (0.2, 1.0),
        **published_views.PLAIN,
        "model.encoder.drop_path": 0.0,
        "model.encoder.freeze_patch_embed": False,
        **published_rates.MAE,
        "train.epochs": 400.0,
    },
    "vicreg": {
        **published_views.BYOL,
        "model.encoder.freeze_patch_embed": False,
        "model.head.hidden": 8192,
        "model.head.width": 8192,
        "train.epochs": 1000.0,
    },
    # the minimal example: 2e-3 at 256 images; width and epochs are those of its Imagenette run,
    # not of ImageNet
    "lejepa": {
        "data.crop_scale": (0.3, 1.0),
        "data.small_views": ("6 x 96 at 0.05-0.3",),
        "model.encoder.freeze_patch_embed": False,
        "model.encoder.drop_path": 0.0,
        "model.head.hidden": 2048,
        "model.head.width": 16,
        "optim.lr": 3.2e-2,
        "optim.b2": 0.999,
        "optim.weight_decay": 0.05,
        "optim.warmup_epochs": 1.0,
        "optim.clip": 0.0,
        "train.epochs": 800.0,
        **published_views.LEJEPA,
    },
    # DINO's recipe, 5e-4 for every 256 images; 0.996 at the 512 images of its command
    "simdino": {
        "data.crop_scale": (0.4, 1.0),
        "data.small_views": ("10 x 96 at 0.05-0.4",),
        "model.encoder.drop_path": 0.1,
        "model.encoder.final_norm": True,
        **{key: value for key, value in _DINO.items() if "prototypes" not in key},
        "optim.lr": 8e-3,
        "optim.ema": 0.968,
        "train.epochs": 100.0,
    },
    # those of its 7 B run that a joined row does not decide; 4e-4 and 0.999 a step of 4,096 images.
    # It ran 1 M steps before the first snapshot and took the others 10,000 apart.
    "dinov3_gram": {
        "objective.snapshot_at": (0.96, 0.97, 0.98, 0.99),
        "data.crop_scale": (0.32, 1.0),
        "data.flip_p": 0.0,
        "data.mask_ratio": 0.3,
        "model.encoder.positions": "rope",
        "model.encoder.registers": 4,
        "model.encoder.layer_scale": 1e-5,
        "model.encoder.norm_eps": 1e-5,
        "model.encoder.final_norm": True,
        "model.encoder.freeze_patch_embed": False,
        "optim.schedule": "constant",
        "optim.lr": 4e-4,
        "optim.b2": 0.99,
        "optim.weight_decay": 0.04,
        "optim.clip": 30.0,
        "optim.layer_decay": 0.98,
        "optim.ema": 0.999,
        "optim.ema_schedule": "constant",
    },
    # on LVD-142M; the lowest rate is that at 0.8 of the cosine
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
        "optim.lr": 1e-3,
        "optim.min_lr": 1.04e-4,
        "optim.clip": 0.0,
        "optim.weight_decay": 0.1,
        "optim.ema": 0.999,
        "optim.warmup_epochs": 5.77,
        "train.epochs": 57.7,
        **published_views.PLAIN,
    },
    "siglip": {"data.crop_scale": (0.5, 1.0), "data.vocabulary_size": 32_000, **_SIGLIP},
    "cap": _CAPPA,
    "cappa": _CAPPA,
    "locca": {**_CAPPA, "data.regions": True},
    # 500,000 steps of 65,536 images, about five times through JFT and ALIGN; recalled, not checked
    # against the paper: rate, decay and length
    "coca": {
        "data.crop_scale": (0.5, 1.0),
        "data.flip_p": 0.0,
        "data.caption_length": 65,
        "data.vocabulary_size": 64_000,
        "model.encoder.drop_path": 0.0,
        "model.encoder.freeze_patch_embed": False,
        "model.pool.query": "learned",
        "model.text.pool": "last",
        "model.captioner.depth": 6,
        "optim.lr": 8e-4,
        "optim.b2": 0.999,
        "optim.weight_decay": 0.01,
        "optim.warmup_epochs": 0.1,
        "train.epochs": 5.0,
        **published_views.PLAIN,
    },
    # 0.25 (small views + 0.25 hidden cells) beside 1 of the pairs and 1 of the captions; the sizes
    # of small views are DINO's, not checked against the paper
    "siglip2": {
        "model.encoder.cls_token": True,  # also after locca, which has none
        "data.crop_scale": (1.0, 1.0),
        "data.small_views": ("8 x 96 at 0.05-0.4",),
        "model.encoder.final_norm": True,
        "model.head.hidden": 2048,
        "model.head.width": 256,
        "objective.weighting": "fixed",
        "objective.gamma": 6.4,
        "optim.ema_schedule": "constant",
        **_SIGLIP,
    },
    # 1 of the pairs, 1 of small views, 2 of hidden cells; crops of small views are DINO's, not
    # checked against its code
    "tips": {
        "data.small_views": ("6 x 96 at 0.05-0.4",),
        "model.encoder.drop_path": 0.0,
        "model.encoder.final_norm": True,
        "model.encoder.freeze_patch_embed": False,
        "model.pool.kind": "cls",
        "model.text.pool": "mean",
        "model.head.hidden": 2048,
        "model.head.width": 256,
        "objective.weighting": "fixed",
        "objective.gamma": 1 / 3,
    },
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
