"""Named methods at full size: published settings in runs of configs/forms.py."""

import pathlib
from typing import Any

import pytest

from m3i_jax import config as configuration
from m3i_jax import schema
from m3i_jax.objective import published

FORMS = pathlib.Path(__file__).parents[2] / "configs/forms.py"


def test_small_views_have_whole_patches() -> None:
    """As DINOv2's: 96 pixels for patches of 16, 98 for those of 14."""
    sizes = [{v.size for v in recipe(f"dino{more}").small_views} for more in ("", ",model=vit_h14")]
    assert sizes == [{96}, {98}]


def recipe(form: str) -> schema.Config:
    return configuration.resolve(configuration.load_config(f"{FORMS}:form={form}"))


_BEIT = {"strength": (0.4, 0.4, 0.4, 0.0), "gray": 0.0}
_STRONG = {"strength": (0.8, 0.8, 0.8, 0.2), "jitter": 0.8, "gray": 0.2}  # of SimCLR, 1.0
_MOCO_V2 = {"strength": (0.4, 0.4, 0.4, 0.1), "blur": (0.5, 0.5), "solarize": (0.0, 0.0)}
_YFCC = {"warmup": 1, "b2": 0.98, "lowest": 1e-5, "clip": 0.0}

# Golden: the public recipes. BYOL's 0.996 is for 1,000 epochs; SLIP trains CLIP without flips and
# colour augmentation.
PUBLISHED: dict[str, dict[str, Any]] = {
    "mae": {"epochs": 1600, "flip": 0.5, "jitter": 0.0},
    "data2vec": {"epochs": 800, "warmup": 10, "jitter": 1.0, "blur": (0.0, 0.0), **_BEIT},
    "feature_distillation": {"epochs": 300, "warmup": 10, "jitter": 0.0},
    "byol": {"epochs": 1000, "ema": 0.996, "blur": (1.0, 0.1)},
    "moco_v3": {
        "epochs": 300,
        "ema": 0.99,
        "warmup": 40,
        "b2": 0.999,
        "clip": 0.0,
        "last_norm": True,
    },
    "simclr": {"epochs": 1000, "blur": (0.5, 0.5), "solarize": (0.0, 0.0), **_STRONG},
    "barlow_twins": {"epochs": 1000, "solarize": (0.0, 0.2)},
    "densecl": {"epochs": 200, "crop": (0.2, 1.0), **_MOCO_V2},
    "msn": {
        "epochs": 800,
        "warmup": 15,
        "crop": (0.3, 1.0),
        "drop_path": 0.0,
        "last_norm": True,
        **_MOCO_V2,
    },
    "dino": {"epochs": 100, "ema": 0.984, "blur": (1.0, 0.1, 0.5), "decay": 0.04, "b2": 0.999},
    "ibot": {
        "epochs": 800,
        "ema": 0.984,
        "solarize": (0.0, 0.2, 0.0),
        "warmup": 10,
        "rise": 0.0375,
    },
    "dinov2": {"epochs": 100, "ema": 0.984, "warmup": 10, "b2": 0.999, "rise": 0.3, "scale": 1e-5},
    "ijepa": {"epochs": 300, "warmup": 40, "flip": 0.0, "ema": 0.992, "b2": 0.999},
    "dinov3_gram": {
        "epochs": 400,
        "decay": 0.04,
        "b2": 0.99,
        "ema": 0.999,
        "flip": 0.0,
        "eps": 1e-5,
    },
    "capi": {"epochs": 57.7, "decay": 0.1, "ema": 0.99975, "warmup": 5.77, "clip": 0.0},
    "siamese_im": {"epochs": 1600, "warmup": 40, "decay": 0.05},
    "clip": {"epochs": 25, "flip": 0.0, "decay": 0.5, **_YFCC},
    "slip": {"epochs": 25, "flip": 0.5, "decay": 0.1, **_YFCC, **_MOCO_V2},
    "deit": {"epochs": 800, "warmup": 40},
    "milan": {
        "epochs": 400,
        "warmup": 40,
        "crop": (0.2, 1.0),
        "jitter": 0.0,
        "gray": 0.0,
        "clip": 0.0,
        "drop_path": 0.0,
    },
    "vicreg": {"epochs": 1000, "blur": (1.0, 0.1), "solarize": (0.0, 0.2)},
    "lejepa": {"epochs": 800, "warmup": 1, "solarize": (0.2, 0.2), "b2": 0.999, **_STRONG},
    "simdino": {"epochs": 100, "decay": 0.04, "ema": 0.968, "warmup": 10, "b2": 0.999},
    # big_vision multiplies decay by the schedule, not by the peak rate of 1e-3, as AdamW does
    "siglip2": {"epochs": 4, "decay": 1e-4 / 1e-3, "flip": 0.0, "jitter": 0.0, "last_norm": True},
    "cap": {"epochs": 3, "decay": 1e-4 / 1e-3, "b2": 0.999, "flip": 0.0, "jitter": 0.0},
    "cappa": {"epochs": 3, "decay": 1e-4 / 1e-3, "b2": 0.999, "flip": 0.0, "jitter": 0.0},
    "locca": {"epochs": 3, "decay": 1e-4 / 1e-3, "b2": 0.999, "flip": 0.0, "jitter": 0.0},
    "coca": {"epochs": 5, "decay": 0.01, "b2": 0.999, "jitter": 0.0},
    "tips": {"epochs": 400, "last_norm": True},
    "siglip": {"epochs": 4, "decay": 1e-4 / 1e-3, "b2": 0.95, "flip": 0.0, "jitter": 0.0},
}


@pytest.mark.parametrize("name", published.PUBLISHED)
def test_a_named_method_has_the_recipe_it_was_published_with(name: str) -> None:
    config = recipe(name)
    a, o = config.data.augment, config.optim
    found = {
        "epochs": config.train.epochs,
        "warmup": o.warmup_epochs,
        "decay": o.weight_decay,
        "b2": o.b2,
        "lowest": o.min_lr,
        "clip": o.clip,
        "ema": round(o.ema, 6),  # rescaling rounds
        "flip": config.data.flip_p,
        "jitter": a.jitter_p,
        "strength": (a.brightness, a.contrast, a.saturation, a.hue),
        "gray": a.grayscale_p,
        "crop": config.data.crop_scale,
        "blur": a.blur_p,
        "solarize": a.solarize_p,
        "rise": config.objective.target_temperature_rise,
        "scale": config.model.encoder.layer_scale,
        "eps": config.model.encoder.norm_eps,
        "last_norm": config.model.encoder.final_norm,
        "drop_path": config.model.encoder.drop_path,
    }
    assert {key: found[key] for key in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize("name", ["byol", "moco_v3", "vicreg", "siamese_im", "dino", "simclr"])
def test_a_method_keeps_its_views_beside_one_without(name: str) -> None:
    """The views of CLIP are not mirrored and have no colours, and half of the image or more; beside
    them and without its own, byol would compare views that hardly differ."""
    alone, joined = recipe(name).data, recipe(f"clip+{name}").data
    assert (joined.augment, joined.flip_p) == (alone.augment, 0.5)
    assert joined.crop_scale == alone.crop_scale
    assert joined.augment.jitter_p == 0.8


def test_the_papers_forms_keep_the_recipe_of_its_ablations() -> None:
    config = recipe("k")
    assert (config.train.epochs, config.optim.warmup_epochs) == (400, 40)
