"""The settings of augmentation: the first part of `schema`, which is where everybody imports them
from."""

import dataclasses

from m3i_jax.setting_limits import SHARE, STD, ListLimit, NumberLimit, option

VIEWS = NumberLimit(
    0, 1, natural=True, count=ListLimit(fewest=2, most=2, names="input view, target view")
)
OPEN_VIEWS = dataclasses.replace(VIEWS, count=dataclasses.replace(VIEWS.count, open=True))
OPEN_SHARE = dataclasses.replace(SHARE, open=-1)
RGB = ListLimit(fewest=3, most=3, names="of R, G and B")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """Photometric augmentation, on the device. Pairs are (input view, target view): SiameseIM's
    asymmetry."""

    jitter_p: float = option(
        0.8, "probability of colour jitter; -1: from the length (training/scaling.py)", OPEN_SHARE
    )
    brightness: float = option(0.4, "brightness factor range, 1 +- this", STD)
    contrast: float = option(0.4, "contrast factor range, 1 +- this", STD)
    saturation: float = option(0.2, "saturation factor range, 1 +- this", STD)
    hue: float = option(
        0.1,
        "hue shift range in turns, +- this, at most 0.5",
        NumberLimit(0, 0.5, natural=True, text="turns"),
    )
    grayscale_p: float = option(
        0.2, "probability of grayscale; -1: from the length (training/scaling.py)", OPEN_SHARE
    )
    blur_p: tuple[float, ...] = option(
        (1.0, 0.1),
        "probability of Gaussian blur: input view, target view; (): from the length",
        OPEN_VIEWS,
    )
    blur_sigma: tuple[float, ...] = option(
        (0.1, 2.0),
        "range of the blur's sigma in pixels; (): in proportion to image_size, 2 pixels of 224",
        NumberLimit(1e-3, 100, count=ListLimit(fewest=2, most=2, rising=True, open=True)),
    )
    solarize_p: tuple[float, ...] = option(
        (0.0, 0.2),
        "probability of solarization: input view, target view; (): from the length",
        OPEN_VIEWS,
    )
    erase_p: float = option(
        0.0,
        "probability that a box of the input view becomes noise, after normalisation "
        "(fine-tuning: 0.25); -1: from the length (training/scaling.py)",
        OPEN_SHARE,
    )
    mixup: float = option(
        0.0,
        "alpha of the Beta distribution of mixup's shares, for the form finetune; 0: none"
        " (fine-tuning: 0.8)",
        STD,
    )
    cutmix: float = option(
        0.0, "alpha of CutMix's, for the form finetune; 0: none (fine-tuning: 1)", STD
    )
    cutmix_switch: float = option(0.5, "with both, probability of CutMix", SHARE)
    blend_p: float = option(
        1.0,
        "probability that a pair of images is blended; -1: from the length (training/scaling.py)",
        OPEN_SHARE,
    )
    mean: tuple[float, ...] = option(
        (0.485, 0.456, 0.406), "subtracted from RGB in 0..1", NumberLimit(-1e3, 1e3, count=RGB)
    )
    std: tuple[float, ...] = option(
        (0.229, 0.224, 0.225),
        "divides RGB in 0..1 after the mean",
        NumberLimit(1e-3, 1e3, count=RGB),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandAugment:
    """RandAugment of fine-tuning, on the host: rand-m9-mstd0.5-inc1 with ops=2."""

    ops: int = option(0, "operations a view; 0: none", NumberLimit(0, 100))
    p: float = option(
        0.5, "probability of each; -1: from the length (training/scaling.py)", OPEN_SHARE
    )
    magnitude: float = option(9.0, "mean strength, 0..10", NumberLimit(0, 10, natural=True))
    deviation: float = option(0.5, "deviation of the strength", NumberLimit(0, 100))
