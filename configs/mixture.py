"""Pre-train on a mixture of sources, each with its share of the samples. M3I mixes 427 million
captioned and 15 million labelled images.

    python -m m3i_jax.main --workdir runs/mixture \\
      --config 'configs/mixture.py:sources=tars:/a/*.tar=427;folder:/b=15'

A source is KIND:PATH[@SPLIT[|HELD_OUT]][=WEIGHT], with KIND one of folder, tars, array_record,
tfds, hugging_face, coco, shapes, scenes. Without weights, the shares are proportional to the
numbers of images, and one pass reads each image once.

Learning rate, momentum, warm-up, crops and colours follow from the batch size, the length, and the
number and size of the images (m3i_jax/training/scaling.py). --mode=show prints them for the numbers
that --config.data.size, .captions and .classes give, since it reads no data.
"""

from ml_collections import ConfigDict

from m3i_jax.config import default_config, scale_for_custom_data
from m3i_jax.models import presets


def get_config(
    sources: str = "",
    class_space: str = "shared",
    model: str = "vit_s16",
    batch_size: int = 256,
    epochs: float = 400.0,
) -> ConfigDict:
    """Settings of a run on a mixture.

    Args:
      sources: sources, separated by semicolons.
      class_space: shared (classes of equal name are one class) or separate.
      model: vit_tiny, _s16, _b16, _l16, _h14, internimage_pico, _t, _s, _b, _l, _xl, _h or _g.
      batch_size: images per step.
      epochs: passes; one has as many samples as all sources have images.
    """
    config = default_config()
    presets.apply_preset(config, model)
    config.data.source = "mixture"
    config.data.mixture = tuple(source.strip() for source in sources.split(";") if source.strip())
    config.data.class_space = class_space
    scale_for_custom_data(config, epochs=epochs, batch_size=batch_size)
    return config
