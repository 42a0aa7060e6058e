"""A small M3I run on built-in shapes with category and caption: no download, two minutes on two CPU
cores.

The class of an image is its shape; colour, size, place, rotation and background are nuisance.
Figures and images: README.md."""

from ml_collections import ConfigDict

from m3i_jax.config import default_config
from m3i_jax.models import presets


def get_config(size: int = 40_000, steps: int = 0, model: str = "vit_tiny") -> ConfigDict:
    """size: images to render. steps: optimizer steps; 0: 420 of vit_tiny, 850 of internimage_pico,
    which take minutes. model: one of the two."""
    steps, every = (
        steps or (420 if model == "vit_tiny" else 850),
        (210 if model == "vit_tiny" else 425),
    )
    config = default_config()
    presets.apply_preset(config, model)
    if model == "vit_tiny":
        config.model.encoder.update({"width": 128, "depth": 3, "heads": 4})
    else:
        # At the rate of the heads a constant and the border of zeros are nearly all of the features
        # after 36 steps, by either group of losses alone. Steps of Adam that add up along the mean
        # of what a matrix reads would do that; it was not shown to be the cause.
        config.optim.encoder_lr = 0.1
        config.optim.fan_in_lr = 256  # of convolutions of up to 1152 inputs
        # two by two cells; with cells of 8 pixels it learns half as much
        config.data.mask_cell = 16
        config.objective.pairing = "halves"  # half as many inputs a step, so twice as many steps
    config.model.encoder.drop_path = 0.0  # one pass over the data: nothing to regularise
    # a random map of 8 x 8 x 3 numbers to 128 loses a third of them
    config.model.encoder.freeze_patch_embed = False
    config.model.decoder.depth = 1
    config.model.pool.update({"width": 128, "heads": 4})
    config.model.text.depth = 1
    config.data.source = "shapes"
    config.data.size = size
    config.data.image_size = 32
    config.data.crop_scale = (0.85, 1.0)  # smaller crops would often miss the shape
    config.data.caption_length = 20
    config.data.vocabulary_size = 512
    config.data.augment.blur_p = (0.5, 0.1)
    # in proportion to the image: 2 pixels of 224 are 0.3 of 32
    config.data.augment.blur_sigma = (0.1, 0.5)
    # minutes, not days: the annotations lead
    config.objective.gamma = 3.0 if model == "vit_tiny" else 2.0
    config.optim.lr = 2e-3
    config.optim.warmup_steps = 30 if model == "vit_tiny" else 60
    # of a run of hundreds of steps: 0.995 would keep the target at its start
    config.optim.ema = 0.98
    config.train.batch_size = 64
    config.train.steps = steps
    config.train.log_every = 30
    config.train.save_every = every // 2
    config.train.panel_every = every
    config.train.eval_every = every
    config.evaluate.train_limit = 1_500
    config.evaluate.query_limit = 1_000
    return config
