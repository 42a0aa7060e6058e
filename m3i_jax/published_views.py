"""How named methods were published to change the colours of their views and to mirror them, as
settings.

All settings of colour are named, so that a method keeps its own beside one whose views have none
(`form=clip+byol`). Crops are here where they are torchvision's, from 0.08 on; others are with the
other settings of a method in `published_settings`.
"""

from typing import Any

# Of methods whose views are cut and at most mirrored.
PLAIN = {
    "data.augment.jitter_p": 0.0,
    "data.augment.grayscale_p": 0.0,
    "data.augment.blur_p": (0.0, 0.0),
    "data.augment.solarize_p": (0.0, 0.0),
}


def _coloured(
    jitter: tuple[float, float, float, float],
    blur: tuple[float, ...],
    solarize: tuple[float, ...] = (0.0, 0.0),
) -> dict[str, Any]:
    """Settings of coloured views: jitter of brightness, contrast, saturation and hue with
    probability 0.8, gray with 0.2, and the probabilities of blur and of solarization by view."""
    names = ("brightness", "contrast", "saturation", "hue")
    return {
        "data.flip_p": 0.5,
        "data.augment.jitter_p": 0.8,
        **{f"data.augment.{name}": value for name, value in zip(names, jitter, strict=True)},
        "data.augment.grayscale_p": 0.2,
        "data.augment.blur_p": blur,
        "data.augment.solarize_p": solarize,
    }


_STRONG, _MILD = (0.8, 0.8, 0.8, 0.2), (0.4, 0.4, 0.4, 0.1)
_CROPS = {"data.crop_scale": (0.08, 1.0)}
BYOL = {**_CROPS, **_coloured((0.4, 0.4, 0.2, 0.1), (1.0, 0.1), (0.0, 0.2))}
DINO = _coloured((0.4, 0.4, 0.2, 0.1), (1.0, 0.1, 0.5), (0.0, 0.2, 0.0))
# Both views alike: MoCo v2 and its successors; SimCLR at strength 1; LeJEPA's README.
MOCO_V2 = _coloured(_MILD, (0.5, 0.5))
SLIP = {**_CROPS, **MOCO_V2}
SIMCLR = {**_CROPS, **_coloured(_STRONG, (0.5, 0.5))}
LEJEPA = _coloured((0.4, 0.4, 0.2, 0.1), (0.5, 0.5), (0.2, 0.2))
# BEiT's, which data2vec keeps: jitter of every image, without hue, and nothing else.
BEIT = {
    **_CROPS,
    **PLAIN,
    "data.augment.jitter_p": 1.0,
    "data.augment.brightness": 0.4,
    "data.augment.contrast": 0.4,
    "data.augment.saturation": 0.4,
    "data.augment.hue": 0.0,
}
# DeiT III: jitter of every image, without hue, and one of gray, solarization and blur (here each by
# itself).
THREE_AUGMENT = {
    **_CROPS,
    **_coloured((0.3, 0.3, 0.3, 0.0), (1 / 3, 1 / 3), (1 / 3, 1 / 3)),
    "data.augment.jitter_p": 1.0,
    "data.augment.grayscale_p": 1 / 3,
}
# big_vision's images with captions: the whole image is resized to a square. A box of as many pixels
# and another shape does not fit in, and after ten attempts the crop is the whole image.
WHOLE = {
    **PLAIN,
    "data.flip_p": 0.0,
    "data.crop_scale": (1.0, 1.0),
    "data.crop_ratio": (0.01, 100.0),
}
