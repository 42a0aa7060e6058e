"""Pre-train on any sources together, each with its share of the samples; M3I mixes 427 million
captioned and 15 million labelled images.

python -m m3i_jax.main --config 'configs/mixture.py:sources=tars:/a/*.tar=427;folder:/b=15'
--workdir runs/mine

A source is KIND:PATH[@SPLIT[|HELD_OUT]][=WEIGHT], KIND one of folder, tars, array_record, tfds,
hugging_face, shapes. Without any weight, the shares are the numbers of images: one pass reads each
image once.

Rate, momentum, warm-up, crops and colours follow from the batch, the length, and the number and
size of the images (m3i_jax/training/scaling.py); --mode=show prints them."""

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
    """sources: separated by semicolons. class_space: shared (classes of one name are one) or
    separate. model: vit_tiny, _s16, _b16, _l16, _h14, internimage_pico, _t, _s, _b, _l, _xl, _h or
    _g. batch_size: images a step. epochs: passes, of as many samples as all sources have images."""
    config = default_config()
    presets.apply_preset(config, model)
    config.data.source = "mixture"
    config.data.mixture = tuple(source.strip() for source in sources.split(";") if source.strip())
    config.data.class_space = class_space
    scale_for_custom_data(config, epochs=epochs, batch_size=batch_size)
    return config
