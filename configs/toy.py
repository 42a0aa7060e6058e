"""M3I and single methods at toy scale, on a few thousand small images: minutes on one CPU core. The
runs of `tests/bench/tables`.

    python -m m3i_jax.main --workdir runs/toy \\
      --config 'configs/toy.py:source=tars,path=DIR/*.tar,form=m3i'

All methods share encoder, views, optimizer and pooling. From a named method's published settings,
only those that belong to its objective are used (masks, norms, decoder input), but not sizes, rates
and augmentation of a run of weeks. Evaluation reads the feature that the objective trains: the
pooling, the cls token (DINO and its successors), or the mean of the patch tokens.
"""

from ml_collections import ConfigDict

from m3i_jax import published_settings
from m3i_jax.config import apply_overrides, default_config
from m3i_jax.models import presets

# Prefixes of the published settings that belong to a method's objective.
METHOD_KEYS = (
    "data.mask",
    "model.encoder.final_norm",
    "model.decoder.norm",
    "model.decoder.projector_depth",
    "model.decoder.positions",
    "model.decoder.cls",
)


def get_config(
    form: str = "m3i",
    source: str = "tars",
    path: str = "",
    steps: int = 3500,
    batch_size: int = 32,
    gamma: float = 3.0,
) -> ConfigDict:
    """Settings of a toy run.

    Args:
      form: names joined by +.
      source, path: the images.
      steps: optimizer steps.
      batch_size: images per step.
      gamma: weight of the annotations.
    """
    config = default_config()
    presets.apply_preset(config, "vit_tiny")
    config.model.encoder.update(
        {"width": 64, "depth": 3, "heads": 2, "drop_path": 0.0, "freeze_patch_embed": False}
    )
    # Small: larger decoders take up to half of M3I's FLOPs instead of a third.
    config.model.decoder.update({"width": 32, "depth": 1, "heads": 1})
    # At 0.02 the pooled token would stay near zero for half of the run.
    config.model.pool.update({"width": 64, "heads": 2, "std": 0.0})
    config.model.text.update({"width": 64, "depth": 1, "heads": 2, "embed": 64})
    config.model.head.update({"hidden": 256, "width": 64, "prototypes": 64})

    config.data.source = source
    config.data.path = path
    config.data.holdout = 0.2
    config.data.image_size = 32
    config.data.crop_scale = (0.7, 1.0)  # the drawings fill the image
    config.data.caption_length = 12
    config.data.vocabulary_size = 512
    config.data.threads = 1
    # Colour distinguishes categories, and the run is too short for strong distortions.
    config.data.augment.update(
        {
            "jitter_p": 0.5,
            "brightness": 0.2,
            "contrast": 0.2,
            "saturation": 0.1,
            "hue": 0.02,
            "grayscale_p": 0.0,
        }
    )
    config.data.augment.update(
        {"blur_p": (0.5, 0.1), "blur_sigma": (0.1, 0.5), "solarize_p": (0.0, 0.0)}
    )

    config.objective.forms = tuple(form.split("+"))
    for name in config.objective.forms:
        settings = published_settings.SETTINGS.get(name, {})
        apply_overrides(
            config,
            [f"{key}={value}" for key, value in settings.items() if key.startswith(METHOD_KEYS)],
        )
    config.objective.gamma = gamma

    config.optim.lr = 2e-3
    config.optim.warmup_steps = min(30, steps)
    config.optim.weight_decay = 0.05
    config.optim.ema = 0.98  # for hundreds of steps
    config.train.batch_size = batch_size
    config.train.steps = steps
    config.train.log_every = 50
    config.train.save_every = max(steps, 1)
    config.train.panel_every = 0
    config.train.eval_every = 0
    config.evaluate.linear = True
    config.evaluate.crop = 1.0
    return config
