"""A small M3I run on built-in shapes with category and caption: no download, two minutes on two CPU
cores.

The class of an image is its shape; colour, size, position, rotation and background are nuisance
variables. README.md has figures and images.
"""

from ml_collections import ConfigDict

from m3i_jax.config import default_config
from m3i_jax.errors import UserError
from m3i_jax.models import presets


def get_config(size: int = 40_000, steps: int = 0, model: str = "vit_tiny") -> ConfigDict:
    """Settings of the run.

    Args:
      size: images to render.
      steps: optimizer steps; 0: 420 for vit_tiny, 850 for internimage_pico, minutes each.
      model: vit_tiny or internimage_pico.
    """
    if model not in presets.TOYS:
        raise UserError(
            f"configs/quickstart.py: model={model} is not one of {', '.join(presets.TOYS)}; use"
            " configs/folder.py for others"
        )
    steps, every = (
        steps or (420 if model == "vit_tiny" else 850),
        (210 if model == "vit_tiny" else 425),
    )
    config = default_config()
    presets.apply_preset(config, model)
    if model == "vit_tiny":
        config.model.encoder.update({"width": 128, "depth": 3, "heads": 4})
    else:
        # At the heads' learning rate, the features collapse after 36 steps to a constant and the
        # zero border, with either group of losses alone. Adam steps that add up along the mean
        # input of a matrix would explain it, which was not verified.
        config.optim.encoder_lr = 0.1
        config.optim.fan_in_lr = 256  # convolutions have up to 1152 inputs
        # 2 x 2 cells; with cells of 8 pixels the run learns half as much
        config.data.mask_cell = 16
        config.objective.pairing = "halves"  # half as many inputs per step, so twice the steps
    config.model.encoder.drop_path = 0.0  # one pass over the data needs no regularization
    # A frozen random projection of 8 x 8 x 3 values to 128 would lose a third of them.
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
    # In proportion to the image: 2 pixels at 224 are 0.3 at 32.
    config.data.augment.blur_sigma = (0.1, 0.5)
    # In a run of minutes, the annotations lead.
    config.objective.gamma = 3.0 if model == "vit_tiny" else 2.0
    config.optim.lr = 2e-3
    config.optim.warmup_steps = 30 if model == "vit_tiny" else 60
    # For hundreds of steps; at 0.995 the target would stay near its initial values.
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
