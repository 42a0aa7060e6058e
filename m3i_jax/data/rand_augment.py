"""RandAugment for fine-tuning, on the host with Pillow: the "9 / 0.5" of M3I's Table 8, which is
timm's `rand-m9-mstd0.5-inc1` (MAE, SiameseIM): two of fifteen operations, each applied with
probability 1/2, with strengths that increase with the magnitude.

The caller passes the uniforms of a view, so that they are keyed by stream position. Views are
mirrored later, on the device, and by timm before. Rotations, shears of rows and shifts are
symmetric, so that their distribution is the same; a shear of columns (`shear_y`) keeps the column
at the left in its place, which is at the right in a view that is then mirrored."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from m3i_jax import schema

WIDTH = 5  # uniforms per operation: which, whether, sign, and two for its magnitude
_Fill = tuple[int, int, int]  # gray levels of pixels outside the image
FILL = (124, 116, 104)  # ImageNet's mean
_MAX_MAGNITUDE = 10.0


def _affine(
    image: Image.Image, matrix: tuple[float, float, float, float, float, float], fill: _Fill
) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=fill
    )


def _enhance(
    kind: Callable[[Image.Image], ImageEnhance._Enhance],
) -> Callable[[Image.Image, float, float], Image.Image]:
    return lambda image, level, sign: kind(image).enhance(max(0.1, 1 + sign * 0.9 * level))


def _solarize_add(image: Image.Image, level: float, sign: float) -> Image.Image:
    add = min(128, int(110 * level))
    return image.point([min(255, i + add) if i < 128 else i for i in range(256)] * 3)


def _posterize(image: Image.Image, level: float, sign: float) -> Image.Image:
    # the highest magnitude keeps no bit, which Pillow's function refuses
    kept = ~(2 ** (8 - (4 - int(4 * level))) - 1)
    return image.point([i & kept & 255 for i in range(256)] * 3)


# name -> (image, level 0..1, sign -1 or 1) -> image; the level is the magnitude over 10
OPERATIONS: dict[str, Callable[..., Image.Image]] = {
    "auto_contrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    "invert": lambda image, level, sign: ImageOps.invert(image),
    "rotate": lambda image, level, sign, fill=FILL: image.rotate(
        sign * 30 * level, Image.Resampling.BICUBIC, fillcolor=fill
    ),
    "posterize": _posterize,
    "solarize": lambda image, level, sign: ImageOps.solarize(
        image, 256 - min(256, int(256 * level))
    ),
    "solarize_add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, level, sign, fill=FILL: _affine(
        image, (1, sign * 0.3 * level, 0, 0, 1, 0), fill
    ),
    "shear_y": lambda image, level, sign, fill=FILL: _affine(
        image, (1, 0, 0, sign * 0.3 * level, 1, 0), fill
    ),
    "translate_x": lambda image, level, sign, fill=FILL: _affine(
        image, (1, 0, sign * 0.45 * level * image.width, 0, 1, 0), fill
    ),
    "translate_y": lambda image, level, sign, fill=FILL: _affine(
        image, (1, 0, 0, 0, 1, sign * 0.45 * level * image.height), fill
    ),
}
# those that show pixels outside the image, and take their gray levels
_MOVES = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def draw_operations(
    u: Sequence[float], settings: schema.RandAugment
) -> list[tuple[str, float, float]]:
    """Draws the operations of a view as (name, level, sign), in order of application.

    Args:
      u: WIDTH uniforms in [0, 1) per operation.
      settings: number, probability and strength of the operations. Magnitudes are normal around
        `magnitude`, clipped to 0..10.

    >>> u = [0.99, 0.0, 0.0, 0.0, 0.0, 0.0, 0.9, 0.0, 0.0, 0.0]
    >>> draw_operations(u, schema.RandAugment(ops=2))
    [('translate_y', 0.9, -1.0)]
    """
    names, out = list(OPERATIONS), []
    for start in range(0, WIDTH * settings.ops, WIDTH):
        which, whether, sign, first, second = u[start : start + WIDTH]
        if whether < settings.p:
            # Box-Muller transform
            normal = math.sqrt(-2 * math.log(1 - first)) * math.cos(2 * math.pi * second)
            magnitude = min(
                max(settings.magnitude + settings.deviation * normal, 0.0), _MAX_MAGNITUDE
            )
            out.append(
                (
                    names[int(which * len(names))],
                    magnitude / _MAX_MAGNITUDE,
                    -1.0 if sign < 0.5 else 1.0,
                )
            )
    return out


def fill_levels(mean: Sequence[float]) -> tuple[int, ...]:
    """Returns the gray levels of pixels outside the image, those of the mean.

    >>> fill_levels(schema.Augment.mean) == FILL
    True
    """
    return tuple(min(255, round(255 * x)) for x in mean)


def apply_operations(
    pixels: np.ndarray,
    size: int,
    u: Sequence[float],
    settings: schema.RandAugment,
    *,
    mean: Sequence[float] = schema.Augment.mean,
) -> np.ndarray:
    """Applies drawn operations to a view, uint8 [size * size * 3], row-major RGB. Pixels outside
    the image have the `mean` of the normalization, as in timm.

    >>> gray, invert = np.full(4 * 4 * 3, 100, np.uint8), [2.5 / 15, 0.0, 0.0, 0.0, 0.0]
    >>> int(apply_operations(gray, 4, invert, schema.RandAugment(ops=1))[0])
    155
    """
    image = Image.frombuffer(
        "RGB", (size, size), np.ascontiguousarray(pixels).tobytes(), "raw", "RGB", 0, 1
    )
    fill = fill_levels(mean)
    for name, level, sign in draw_operations(u, settings):
        options = {"fill": fill} if name in _MOVES else {}
        image = OPERATIONS[name](image, level, sign, **options)
    return np.frombuffer(image.tobytes(), np.uint8)
