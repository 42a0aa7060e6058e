"""Named methods at full size: published settings in runs of configs/forms.py."""

import pathlib
from typing import Any

import jax
import pytest

from m3i_jax import config as configuration
from m3i_jax import schema
from m3i_jax.models import pooling
from m3i_jax.objective import published

FORMS = pathlib.Path(__file__).parents[2] / "configs/forms.py"


def test_small_views_have_whole_patches() -> None:
    """As DINOv2's: 96 pixels for patches of 16, 98 for those of 14."""
    sizes = [{v.size for v in recipe(f"dino{more}").small_views} for more in ("", ",model=vit_h14")]
    assert sizes == [{96}, {98}]


def recipe(form: str) -> schema.Config:
    return configuration.resolve(configuration.load_config(f"{FORMS}:form={form}"))


_BEIT = {"strength": (0.4, 0.4, 0.4, 0.0), "gray": 0.0}
_BYOL = {"strength": (0.4, 0.4, 0.2, 0.1), "jitter": 0.8, "gray": 0.2, "crop": (0.08, 1.0)}
_BLUR_OF_BYOL = {"blur": (1.0, 0.1), "solarize": (0.0, 0.2)}
_STRONG = {"strength": (0.8, 0.8, 0.8, 0.2), "jitter": 0.8, "gray": 0.2}  # of SimCLR, 1.0
_MOCO_V2 = {"strength": (0.4, 0.4, 0.4, 0.1), "blur": (0.5, 0.5), "solarize": (0.0, 0.0)}
_YFCC = {"warmup": 1, "b2": 0.98, "lowest": 1e-5, "clip": 0.0, "positions": "learned"}
_RESNET = {"warmup": 10, "clip": 0.0, "drop_path": 0.0}
_DINO = {
    "rate": 8e-3,
    "b2": 0.999,
    "decay": 0.04,
    "clip": 3.0,
    "blur": (1.0, 0.1, 0.5),
    "solarize": (0.0, 0.2, 0.0),
    "strength": (0.4, 0.4, 0.2, 0.1),
    "positions": "learned",
    "last_norm": True,
    "encoder": "ema",
}
_BIG_VISION = {
    "decay": 1e-4 / 1e-3,  # is multiplied by the schedule, not by the peak of 1e-3, as AdamW's is
    "rate": 1e-3,
    "lowest": 0.0,
    "clip": 1.0,
    "flip": 0.0,
    "jitter": 0.0,
    "crop": (1.0, 1.0),
    "positions": "learned",
    "tokens": (65, 32_000),
}

NUMBERS = (
    "epochs",
    "rate",
    "lowest",
    "decay",
    "ema",
    "gray",
    "snapshots",
    "rise",
)  # others exactly
# Golden: the public commands and configurations, rates at 4,096 images; the file that a value is of
# is in a comment where it is not the one that the method's terms name. BYOL's 0.996 is for 1,000
# epochs; SLIP trains CLIP without flips and colour augmentation.
PUBLISHED: dict[str, dict[str, Any]] = {
    "mae": {
        "epochs": 1600,
        "warmup": 40,
        "rate": 1.5e-4 * 16,
        "decay": 0.05,
        "b2": 0.95,
        "clip": 0.0,
        "crop": (0.2, 1.0),
        "flip": 0.5,
        "jitter": 0.0,
    },
    "data2vec": {
        "epochs": 800,
        "warmup": 10,
        "rate": 2e-3 * 2,
        "clip": 3.0,
        "jitter": 1.0,
        "blur": (0.0, 0.0),
        "scale": 1e-4,
        "drop_path": 0.25,
        **_BEIT,
    },
    "feature_distillation": {
        "epochs": 300,
        "warmup": 10,
        "rate": 1.2e-3 * 2,
        "lowest": 2e-5 * 2,
        "clip": 3.0,
        "jitter": 0.0,
        "scale": 0.1,
        "last_norm": True,
        "drop_path": 0.2,
    },
    "distill": {"jitter": 0.0, "drop_path": 0.0},
    "byol": {"epochs": 1000, "ema": 0.996, **_BYOL, **_BLUR_OF_BYOL, **_RESNET},
    "moco_v3": {
        "epochs": 300,
        "ema": 0.99,
        "warmup": 40,
        "rate": 1.5e-4 * 16,
        "decay": 0.1,
        "b2": 0.999,
        "clip": 0.0,
        "last_norm": True,
        **_BYOL,
        **_BLUR_OF_BYOL,
    },
    "simclr": {
        "epochs": 1000,
        "crop": (0.08, 1.0),
        "blur": (0.5, 0.5),
        "solarize": (0.0, 0.0),
        **_STRONG,
        **_RESNET,
    },
    "barlow_twins": {"epochs": 1000, **_BYOL, **_BLUR_OF_BYOL, **_RESNET},
    "densecl": {"epochs": 200, "crop": (0.2, 1.0), **_MOCO_V2, **_RESNET, "warmup": 0},
    "msn": {
        "epochs": 800,
        "warmup": 15,
        "rate": 1e-3 * 4,
        "decay": 0.04,
        "clip": 3.0,
        "crop": (0.3, 1.0),
        "drop_path": 0.0,
        "last_norm": True,
        "positions": "learned",
        "encoder": "ema",
        **_MOCO_V2,
    },
    # a batch of 512 with 0.996, down to 1e-6
    "dino": {"epochs": 100, "warmup": 10, "ema": 0.968, "lowest": 8e-6, **_DINO},
    # of 1,024
    "ibot": {
        "epochs": 800,
        "ema": 0.984,
        "lowest": 4e-6,
        "warmup": 10,
        "rise": 0.0375,
        "crop": (0.25, 1.0),
        **_DINO,
    },
    # of 2,048, in epochs of 1,250 steps, twice through ImageNet each; the rate by the root
    "dinov2": {
        **_DINO,
        "epochs": 200,
        "warmup": 20,
        "rate": 0.004 * (2048 / 1024) ** 0.5 * 2,
        "lowest": 2e-6,
        "ema": 0.984,
        "rise": 0.3,
        "scale": 1e-5,
        "crop": (0.32, 1.0),
        "drop_path": 0.3,
    },
    "ijepa": {
        "epochs": 300,
        "warmup": 40,
        "rate": 1e-3 * 2,
        "lowest": 1e-6 * 2,
        "flip": 0.0,
        "ema": 0.992,
        "encoder": "ema",
        "b2": 0.999,
        "decay": 0.04,
        "clip": 0.0,
        "crop": (0.3, 1.0),
        "jitter": 0.0,
    },
    # pretrain.yaml and gram_anchor.yaml of the 7 B run: 5e-5 * 4 * (4096 / 1024)^(1/2)
    "dinov3_gram": {
        "epochs": 400,
        "rate": 5e-5 * 4 * 2,
        "decay": 0.04,
        "b2": 0.99,
        "ema": 0.994,
        "flip": 0.0,
        "eps": 1e-5,
        "drop_path": 0.4,
        "clip": 30.0,
        "positions": "rope",
        "encoder": "ema",
        "snapshots": (0.83333, 0.84167, 0.85, 0.85833),
        "rise": 0.08333,
    },
    # 16,384 images; at the end of the cosine, cut at 0.8, cos(0.8 pi) = -0.80902
    "capi": {
        "epochs": 57.7,
        "rate": 2.5e-4,
        "lowest": 2.5e-4 * 0.09549,
        "decay": 0.1,
        "ema": 0.99975,
        "encoder": "ema",
        "warmup": 5.77,
        "clip": 0.0,
        "crop": (0.6, 1.0),
        "drop_path": 0.2,
    },
    "siamese_im": {
        "epochs": 1600,
        "warmup": 40,
        "rate": 6.25e-5 * 16,
        "decay": 0.05,
        "ema": 0.995,
        "clip": 1.0,
        "drop_path": 0.0,
        "last_norm": False,
        **_BYOL,
        **_BLUR_OF_BYOL,
    },
    "clip": {
        **_YFCC,
        "epochs": 25,
        "rate": 5e-4,
        "flip": 0.0,
        "decay": 0.5,
        "crop": (0.5, 1.0),
        "tokens": (77, 49_408),
    },
    "slip": {
        "epochs": 25,
        "rate": 3e-3,
        "flip": 0.5,
        "decay": 0.1,
        "crop": (0.08, 1.0),
        "last_norm": True,
        **_YFCC,
        **_MOCO_V2,
    },
    "deit": {
        "epochs": 800,
        "warmup": 5,
        "decay": 0.05,
        "jitter": 1.0,
        "strength": (0.3, 0.3, 0.3, 0.0),
        "gray": 0.333333,
        "scale": 1e-4,
        "positions": "learned",
        "last_norm": False,  # the pooling has it
        "smoothing": 0.0,
    },
    "milan": {
        "epochs": 400,
        "warmup": 40,
        "rate": 1.5e-4 * 16,
        "crop": (0.2, 1.0),
        "jitter": 0.0,
        "gray": 0.0,
        "clip": 0.0,
        "drop_path": 0.0,
        "last_norm": True,
    },
    "vicreg": {"epochs": 1000, **_BYOL, **_BLUR_OF_BYOL, **_RESNET},
    # its README, and MINIMAL.md for warm-up, stochastic depth and b2
    "lejepa": {
        "epochs": 100,
        "warmup": 1,
        "rate": 5e-4,
        "lowest": 5e-7,
        "decay": 0.05,
        "drop_path": 0.1,
        "crop": (0.3, 1.0),
        "blur": (0.5, 0.5),
        "solarize": (0.2, 0.2),
        "strength": (0.4, 0.4, 0.2, 0.1),
        "b2": 0.999,
    },
    "simdino": {"epochs": 100, "warmup": 10, "ema": 0.968, "lowest": 8e-6, **_DINO},
    "siglip": {"epochs": 4, "b2": 0.95, **_BIG_VISION},
    "siglip2": {"epochs": 4, "last_norm": True, **_BIG_VISION},
    "cap": {"epochs": 3, "b2": 0.999, "warmup": 0.0819, **_BIG_VISION},
    "cappa": {"epochs": 3, "b2": 0.999, "warmup": 0.0819, **_BIG_VISION},
    "locca": {"epochs": 3, "b2": 0.999, "warmup": 0.0819, **_BIG_VISION},
    "coca": {
        "epochs": 5,
        "warmup": 0.1,
        "rate": 8e-4,
        "decay": 0.01,
        "b2": 0.999,
        "jitter": 0.0,
        "tokens": (65, 64_000),
    },
    "tips": {"epochs": 400, "last_norm": True, "positions": "learned", "tokens": (66, 32_000)},
}


@pytest.mark.parametrize("name", published.PUBLISHED)
def test_a_named_method_has_the_recipe_it_was_published_with(name: str) -> None:
    config = recipe(name)
    a, o = config.data.augment, config.optim
    found = {
        "epochs": config.train.epochs,
        "rate": o.lr,
        "warmup": o.warmup_epochs,
        "decay": o.weight_decay,
        "b2": o.b2,
        "lowest": o.min_lr,
        "clip": o.clip,
        "ema": o.ema,
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
        "positions": config.model.encoder.positions,
        "smoothing": config.objective.label_smoothing,
        "snapshots": config.objective.snapshot_at,
        "tokens": (config.data.caption_length, config.data.vocabulary_size),
        "encoder": config.evaluate.encoder,
    }
    for key, expected in PUBLISHED[name].items():
        value = found[key]
        assert value == pytest.approx(expected, rel=1e-4) if key in NUMBERS else value == expected


@pytest.mark.parametrize("name", ["byol", "moco_v3", "vicreg", "siamese_im", "dino", "simclr"])
def test_a_method_keeps_its_views_beside_one_without(name: str) -> None:
    """The views of CLIP are not mirrored and have no colours, and half of the image or more; beside
    them and without its own, byol would compare views that hardly differ."""
    alone, joined = recipe(name).data, recipe(f"clip+{name}").data
    assert (joined.augment, joined.flip_p) == (alone.augment, 0.5)
    assert joined.crop_scale == alone.crop_scale
    assert joined.augment.jitter_p == 0.8


@pytest.mark.parametrize("name", ["clip", "slip", "tips", "deit"])
def test_one_linear_map_follows_the_pooled_cls(name: str) -> None:
    """That to the classes or to the space of the captions. SLIP's SimCLR and the prototypes of TIPS
    read cls after a last norm of the encoder, so that captions have two norms, as `left_out`
    says."""
    config = recipe(name)
    made = jax.eval_shape(lambda key: pooling.init(config.model, key), jax.random.key(0))
    assert config.model.pool.kind == "cls" and set(made) == {"norm"}
    assert config.model.pooled == config.model.encoder.width
    two = config.model.encoder.final_norm
    assert two == (name in ("slip", "tips"))
    assert two == ("the pooling has a second one" in published.PUBLISHED[name].left_out)


def test_the_papers_forms_keep_the_recipe_of_its_ablations() -> None:
    config = recipe("k")
    assert (config.train.epochs, config.optim.warmup_epochs) == (400, 40)
