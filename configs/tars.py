"""Pre-train on tar files as img2dataset writes them, without unpacking: KEY.jpg, KEY.txt (caption), KEY.json (caption, label).

python -m m3i_jax.main --config configs/tars.py:path='DIR/*.tar' --workdir runs/mine
"""

from ml_collections import ConfigDict

from m3i_jax.config import default, own_data
from m3i_jax.models import presets


def get_config(path: str = "", model: str = "vit_s16", batch_size: int = 256, epochs: float = 400.0) -> ConfigDict:
    """path: glob of the tar files. model: vit_tiny, vit_s16, vit_b16, vit_l16 or vit_h14. batch_size: images a step. epochs: passes over
    the pictures."""
    config = default()
    config.model.update(presets.preset(model))
    config.data.source = "tars"
    config.data.path = path
    own_data(config, epochs=epochs, batch_size=batch_size)
    return config
