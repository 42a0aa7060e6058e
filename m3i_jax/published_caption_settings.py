"""The settings that named methods with captions were published with: a part of
`published_settings.SETTINGS`."""

from typing import Any

from m3i_jax import published_rates, published_views

# CLIP's and SLIP's runs on YFCC, in SLIP's code.
_YFCC = {
    "data.vocabulary_size": 49_408,
    "model.encoder.positions": "learned",
    "model.encoder.drop_path": 0.0,
    "model.encoder.freeze_patch_embed": False,
    "model.pool.kind": "cls",
    "model.pool.projection": False,
    "model.text.pool": "last",
    "model.text.width": 512,
    "model.text.heads": 8,
    "model.text.embed": 512,
    **published_rates.YFCC,
}

# SigLIP's and SigLIP 2's. 40 B images; of the 10 B of WebLI, SigLIP reads those with English text,
# whose number is not published. 20,000 steps of warm-up are SigLIP 2's.
_SIGLIP = {
    "data.caption_length": 65,  # 64 are read
    "data.vocabulary_size": 32_000,
    "model.encoder.positions": "learned",
    "model.encoder.activation": "gelu_tanh",
    "model.encoder.drop_path": 0.0,
    "model.encoder.freeze_patch_embed": False,
    "model.pool.query": "learned",
    "model.text.pool": "last",
    "optim.warmup_epochs": 0.0655,
    "train.epochs": 4.0,
    **published_rates.BIG_VISION,
}

# CapPa's of 366,500 steps of 8,192 images, 3 B of them; how many times that is through its part of
# WebLI, 1 B in LocCa's paper, is not checked against its own.
_CAPPA = {
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
    **published_views.WHOLE,
}

# Learning rates and momentum at `published_settings.RATE_BATCH`. Those of captioners, 1e-3 and 8e-4
# at 8,192 to 65,536 images, are kept down to 4,096.
SETTINGS: dict[str, dict[str, Any]] = {
    "clip": {
        "data.crop_scale": (0.5, 1.0),
        "data.flip_p": 0.0,
        **published_views.PLAIN,
        "optim.lr": 5e-4,
        "optim.weight_decay": 0.5,
        **_YFCC,
    },
    "slip": {
        **published_views.SLIP,
        "model.encoder.final_norm": True,
        "objective.weighting": "fixed",
        **_YFCC,
        "optim.lr": 3e-3,
        "optim.weight_decay": 0.1,
    },
    "siglip": {**_SIGLIP, **published_views.WHOLE, "optim.lr": 1e-3},
    "cap": _CAPPA,
    "cappa": _CAPPA,
    "locca": {**_CAPPA, "data.regions": True},
    # Batches of 65,536, half JFT and half ALIGN: in 500,000 steps 5 epochs of the one and 10 of the
    # other; here all are of one set. Crops, mirroring and the length of captions are not published.
    "coca": {
        "data.crop_scale": (0.5, 1.0),
        "data.flip_p": 0.0,
        "data.caption_length": 65,
        "data.vocabulary_size": 64_000,
        "model.encoder.drop_path": 0.0,
        "model.encoder.freeze_patch_embed": False,
        "model.pool.query": "learned",
        "model.text.pool": "last",
        "model.captioner.depth": 12,
        "optim.schedule": "wsd",  # linear to 0 from the end of the warm-up on
        "optim.decay_share": 1.0,
        "optim.lr": 8e-4,
        "optim.b2": 0.999,
        "optim.weight_decay": 0.01,
        "optim.warmup_epochs": 0.1,
        "train.epochs": 5.0,
        **published_views.PLAIN,
    },
    # 0.25 (small views + 0.25 hidden cells) beside 1 of the pairs and 1 of the captions. Head and
    # small views are DINO's; its paper refers to SILC's, which is not checked.
    "siglip2": {
        "model.encoder.cls_token": True,  # also after locca, which has none
        "data.crop_scale": (1.0, 1.0),
        "data.flip_p": 0.0,
        **published_views.PLAIN,
        "data.small_views": ("8 x 96 at 0.05-0.4",),
        "model.encoder.final_norm": True,
        "model.head.hidden": 2048,
        "model.head.width": 256,
        "model.head.prototypes": 65_536,
        "objective.weighting": "fixed",
        "objective.gamma": 6.4,
        "optim.ema_schedule": "constant",
        **_SIGLIP,
    },
    # 1 of the pairs, 1 of small views, 2 of hidden cells. Its public code has no training; hidden
    # cells and prototypes are of notes on the paper, the rest of the head and small views DINO's.
    "tips": {
        "data.mask": "uniform",
        "data.mask_ratio": 0.75,
        "data.small_views": ("6 x 96 at 0.05-0.4",),
        "data.caption_length": 66,  # 64 between those of start and end
        "data.vocabulary_size": 32_000,
        "model.encoder.positions": "learned",
        "model.encoder.activation": "gelu_tanh",
        "model.encoder.drop_path": 0.0,
        "model.encoder.final_norm": True,
        "model.encoder.freeze_patch_embed": False,
        "model.pool.kind": "cls",
        "model.pool.projection": False,
        "model.text.pool": "mean",
        "model.head.hidden": 2048,
        "model.head.width": 256,
        "model.head.prototypes": 32_768,
        "objective.weighting": "fixed",
        "objective.gamma": 1 / 3,
    },
}
