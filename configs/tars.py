"""Pre-train on tar files in img2dataset's format, without unpacking them: KEY.jpg, KEY.txt
(caption), KEY.json (caption, label).

    python -m m3i_jax.main --config configs/tars.py:path='DIR/*.tar' --workdir runs/tars

Learning rate, momentum, warm-up, crops and colours follow from the batch size, the length, and the
number and size of the images (m3i_jax/training/scaling.py). --mode=show prints them for the numbers
that --config.data.size, .captions and .classes give, since it reads no data.
"""

from ml_collections import ConfigDict

from m3i_jax.config import default_config, scale_for_custom_data
from m3i_jax.models import presets


def get_config(
    path: str = "", model: str = "vit_s16", batch_size: int = 256, epochs: float = 400.0
) -> ConfigDict:
    """Settings of a run on tar files.

    Args:
      path: glob of the tar files.
      model: vit_tiny, _s16, _b16, _l16, _h14, internimage_pico, _t, _s, _b, _l, _xl, _h or _g.
      batch_size: images per step.
      epochs: passes over the images.
    """
    config = default_config()
    presets.apply_preset(config, model)
    config.data.source = "tars"
    config.data.path = path
    scale_for_custom_data(config, epochs=epochs, batch_size=batch_size)
    return config
