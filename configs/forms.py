"""Any row of the paper's Tables 1 and 3, any named method, and any combination of them.

    python -m m3i_jax.main --config configs/forms.py:form=a,size=tiny --workdir runs/a
    python -m m3i_jax.main --config configs/forms.py:form=sim,model=internimage_pico --workdir RUN
    python -m m3i_jax.main --config configs/forms.py:form=mim+clip,size=b --workdir runs/both \\
      --config.data.source=folder --config.data.path=DIR

The letters a to l, ic and wsp use the recipe of the paper's ablations; a named method uses this
recipe with its published settings.
"""

import dataclasses

from ml_collections import ConfigDict

from m3i_jax import published_settings, schema
from m3i_jax.config import apply_overrides, default_config, rescale
from m3i_jax.models import presets
from m3i_jax.objective import terms

SIZES = {"tiny": "vit_tiny", "s": "vit_s16", "b": "vit_b16", "l": "vit_l16"}


def get_config(
    form: str = "m3i", size: str = "b", model: str = "", batch_size: int = 0, epochs: float = 0.0
) -> ConfigDict:
    """Settings of a run of one or more objectives.

    Args:
      form: names or letters joined by +.
      size: size of a ViT: tiny, s, b or l.
      model: a preset instead of `size`: vit_h14 or internimage_pico, _t, _s, _b, _l, _xl, _h or _g;
        pico runs at the tiny scale.
      batch_size: images per step; 0: 4,096, or 64 at the tiny scale.
      epochs: 0: as published, 400 for the paper's ablations; the tiny scale always runs 400 steps,
        unless --config.train.steps is given.
    """
    if size not in SIZES:
        raise ValueError(f"size {size!r} is not one of {', '.join(SIZES)}")
    config, model = default_config(), model or SIZES[size]
    presets.apply_preset(config, model)
    tiny = model in presets.TOYS
    names = tuple(terms.LETTERS.get(name, name) for name in form.split("+"))
    config.objective.forms = names
    config.train.epochs = 400.0  # M3I section 4.2
    batch_size = batch_size or (64 if tiny else 4096)
    rescale(config, batch_size)
    published = {name: published_settings.settings_at(name, batch_size) for name in names}
    for settings in published.values():
        apply_overrides(config, [f"{key}={value}" for key, value in settings.items()])
    if not config.model.encoder.cls_token:
        config.model.decoder.cls = "auto"  # of a joined method that has one
    if epochs:
        config.train.epochs = epochs
    if epochs or not any("optim.warmup_epochs" in settings for settings in published.values()):
        config.optim.warmup_epochs = min(config.optim.warmup_epochs, 0.1 * config.train.epochs)
    if tiny:
        _tiny(config)
    patch = config.model.encoder.patch_size
    config.data.small_views = tuple(_fit(view, patch) for view in config.data.small_views)
    if tiny:
        config.optim.lr = 2e-3
        config.optim.ema = min(config.optim.ema, 0.98)  # for hundreds of steps
    return config


def _fit(view: str, patch: int) -> str:
    """Small views with sides of whole patches: 98 pixels instead of 96 for patches of 14."""
    group = schema.parse_view_group(view)
    size = max(1, round(group.size / patch)) * patch
    return str(dataclasses.replace(group, size=size))


def _tiny(config: ConfigDict) -> None:
    """Scale a run down to built-in shapes of 32 pixels and minutes on two CPU cores. Heads and
    decoders are small, since published widths would dominate the model."""
    config.data.update(
        {
            "source": "shapes",
            "size": 40_000,
            "image_size": 32,
            "caption_length": 20,
            "vocabulary_size": 512,
        }
    )
    if config.data.regions:  # shapes have captions, scenes boxes
        config.data.update({"source": "mixture", "mixture": ("shapes:20000", "scenes:20000")})
        config.data.update({"caption_length": 32, "vocabulary_size": 1024})
    if config.data.small_views:
        config.data.small_views = ("4 x 16 at 0.3-0.6",)
    # Smaller crops would often miss the shape.
    config.data.crop_scale = (max(config.data.crop_scale[0], 0.6), 1.0)
    config.data.augment.blur_sigma = (0.1, 0.5)
    config.model.encoder.drop_path = 0.0
    config.model.encoder.freeze_patch_embed = False
    config.model.decoder.update({"width": 96, "depth": 1, "heads": 3})
    config.model.text.depth = 1
    config.model.captioner.depth = 1
    config.model.head.update({"hidden": 256, "width": 64, "prototypes": 64})
    config.optim.warmup_steps = 30
    config.train.steps = 400
    config.train.log_every = 25
    config.train.save_every = 200
    config.train.panel_every = 200
    config.train.eval_every = 0
    config.evaluate.train_limit = 1_500
    config.evaluate.query_limit = 1_000
