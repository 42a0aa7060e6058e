"""What a setting is, and the settings of augmentation: the first part of `schema`, which is where
everybody imports them from."""

import dataclasses
from typing import Any


def option(default: Any, text: str, *choices: Any) -> Any:
    """A field with a help line and, where only some values make sense, those values."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


def section(cls: type) -> Any:
    """A field that holds a whole sub-tree of settings."""
    return dataclasses.field(default_factory=cls)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """Photometric augmentation, on the device. Pairs are (input view, target view): SiameseIM's
    asymmetry."""

    jitter_p: float = option(0.8, "probability of colour jitter")
    brightness: float = option(0.4, "brightness factor range, 1 +- this")
    contrast: float = option(0.4, "contrast factor range, 1 +- this")
    saturation: float = option(0.2, "saturation factor range, 1 +- this")
    hue: float = option(0.1, "hue shift range in turns, +- this, at most 0.5")
    grayscale_p: float = option(0.2, "probability of grayscale")
    blur_p: tuple[float, ...] = option(
        (1.0, 0.1), "probability of Gaussian blur: input view, target view"
    )
    blur_sigma: tuple[float, ...] = option((0.1, 2.0), "range of the blur's sigma in pixels")
    solarize_p: tuple[float, ...] = option(
        (0.0, 0.2), "probability of solarization: input view, target view"
    )
    erase_p: float = option(
        0.0,
        "probability that a box of the input view becomes noise, after normalisation (fine-tuning:"
        " 0.25)",
    )
    mixup: float = option(
        0.0,
        "alpha of the Beta distribution of mixup's shares, for the form finetune; 0: none"
        " (fine-tuning: 0.8)",
    )
    cutmix: float = option(
        0.0, "alpha of CutMix's, for the form finetune; 0: none (fine-tuning: 1)"
    )
    cutmix_switch: float = option(0.5, "with both, probability of CutMix")
    blend_p: float = option(1.0, "probability that a pair of images is blended at all")
    mean: tuple[float, ...] = option((0.485, 0.456, 0.406), "subtracted from RGB in 0..1")
    std: tuple[float, ...] = option((0.229, 0.224, 0.225), "divides RGB in 0..1 after the mean")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandAugment:
    """RandAugment of fine-tuning, on the host: rand-m9-mstd0.5-inc1 with ops=2."""

    ops: int = option(0, "operations a view; 0: none")
    p: float = option(0.5, "probability of each")
    magnitude: float = option(9.0, "mean strength, 0..10")
    deviation: float = option(0.5, "deviation of the strength")
