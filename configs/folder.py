"""Pre-train on a folder of images. Sub-folders are categories if there are any; NAME.txt beside an
image is its caption.

    python -m m3i_jax.main --config configs/folder.py:path=DIR --workdir runs/folder

Learning rate, momentum, warm-up, crops and colours follow from the batch size, the length, and the
number and size of the images (m3i_jax/training/scaling.py); --mode=show prints them.
"""

from ml_collections import ConfigDict

from m3i_jax.config import default_config, scale_for_custom_data
from m3i_jax.models import presets


def get_config(
    path: str = "", model: str = "vit_s16", batch_size: int = 256, epochs: float = 400.0
) -> ConfigDict:
    """Settings of a run on a folder.

    Args:
      path: the folder.
      model: vit_tiny, _s16, _b16, _l16, _h14, internimage_pico, _t, _s, _b, _l, _xl, _h or _g.
      batch_size: images per step.
      epochs: passes over the folder.
    """
    config = default_config()
    presets.apply_preset(config, model)
    config.data.source = "folder"
    config.data.path = path
    scale_for_custom_data(config, epochs=epochs, batch_size=batch_size)
    return config
