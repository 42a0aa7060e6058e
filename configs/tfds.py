"""Pre-train on a data set prepared by tensorflow-datasets (file format array_record or parquet),
without TensorFlow.

    python -m m3i_jax.main --config configs/tfds.py:name=food101 --workdir runs/tfds

Learning rate, momentum, warm-up, crops and colours follow from the batch size, the length, and the
number and size of the images (m3i_jax/training/scaling.py). --mode=show prints them for the numbers
that --config.data.size, .captions and .classes give, since it reads no data.
"""

from ml_collections import ConfigDict

from m3i_jax.config import default_config, scale_for_custom_data
from m3i_jax.models import presets


def get_config(
    name: str = "",
    directory: str = "",
    split: str = "train",
    holdout_split: str = "",
    model: str = "vit_s16",
    batch_size: int = 256,
    epochs: float = 400.0,
) -> ConfigDict:
    """Settings of a run on a TFDS data set.

    Args:
      name: name in TFDS, such as imagenet2012:5.1.0, or the directory of one version.
      directory: directory of the prepared data sets; empty: the default of TFDS.
      split: training split.
      holdout_split: split for evaluators; empty: a tenth of the training split.
      model: vit_tiny, _s16, _b16, _l16, _h14, internimage_pico, _t, _s, _b, _l, _xl, _h or _g.
      batch_size: images per step.
      epochs: passes over the split.
    """
    config = default_config()
    presets.apply_preset(config, model)
    config.data.source = "tfds"
    config.data.path = name
    config.data.directory = directory
    config.data.split = split
    config.data.holdout_split = holdout_split
    scale_for_custom_data(config, epochs=epochs, batch_size=batch_size)
    return config
