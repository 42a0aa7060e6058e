"""RandAugment of fine-tuning on the host, with Pillow: the operations and strengths that M3I's
Table 8 names "9 / 0.5", which are those of `rand-m9-mstd0.5-inc1` (MAE, SiameseIM): two of fifteen
operations, each with probability a half, magnitudes that grow with the number.

The draws of a view are numbers from outside, so that they belong to the position in the stream.
Views are mirrored afterwards, on the device: the same distribution as before them, for rotations,
shears and shifts go to either side as often."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from m3i_jax import schema

WIDTH = 5  # uniforms an operation needs: which, whether, sign, and two for its magnitude
FILL = (124, 116, 104)  # ImageNet's mean in gray levels: what comes in from outside the image
_MOST = 10.0


def _affine(
    image: Image.Image, matrix: tuple[float, float, float, float, float, float]
) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL
    )


def _enhance(
    kind: Callable[[Image.Image], ImageEnhance._Enhance],
) -> Callable[[Image.Image, float, float], Image.Image]:
    return lambda image, level, sign: kind(image).enhance(max(0.1, 1 + sign * 0.9 * level))


def _solarize_add(image: Image.Image, level: float, sign: float) -> Image.Image:
    add = min(128, int(110 * level))
    return image.point([min(255, i + add) if i < 128 else i for i in range(256)] * 3)


def _posterize(image: Image.Image, level: float, sign: float) -> Image.Image:
    # of the highest magnitude no bit, which Pillow's own function refuses
    kept = ~(2 ** (8 - (4 - int(4 * level))) - 1)
    return image.point([i & kept & 255 for i in range(256)] * 3)


# name -> (image, level 0..1, sign -1 or 1) -> image; the level is the magnitude over 10
OPERATIONS: dict[str, Callable[[Image.Image, float, float], Image.Image]] = {
    "auto_contrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    "invert": lambda image, level, sign: ImageOps.invert(image),
    "rotate": lambda image, level, sign: image.rotate(
        sign * 30 * level, Image.Resampling.BICUBIC, fillcolor=FILL
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
    "shear_x": lambda image, level, sign: _affine(image, (1, sign * 0.3 * level, 0, 0, 1, 0)),
    "shear_y": lambda image, level, sign: _affine(image, (1, 0, 0, sign * 0.3 * level, 1, 0)),
    "translate_x": lambda image, level, sign: _affine(
        image, (1, 0, sign * 0.45 * level * image.width, 0, 1, 0)
    ),
    "translate_y": lambda image, level, sign: _affine(
        image, (1, 0, 0, 0, 1, sign * 0.45 * level * image.height)
    ),
}


def draw_operations(
    u: Sequence[float], settings: schema.RandAugment
) -> list[tuple[str, float, float]]:
    """The operations of a view as (name, level, sign), in their order; those that chance leaves out
    are not among them.

    Args: u: WIDTH uniforms in [0, 1) an operation. settings: how many, how likely, how strong.
      Magnitudes are normal about `magnitude`, cut to 0..10.

    >>> draw_operations([0.99, 0.0, 0.0, 0.0, 0.0, 0.0, 0.9, 0.0, 0.0, 0.0], schema.RandAugment(ops=2))
    [('translate_y', 0.9, -1.0)]
    """
    names, out = list(OPERATIONS), []
    for at in range(0, WIDTH * settings.ops, WIDTH):
        which, whether, sign, first, second = u[at : at + WIDTH]
        if whether < settings.p:
            # Box and Muller
            normal = math.sqrt(-2 * math.log(1 - first)) * math.cos(2 * math.pi * second)
            magnitude = min(max(settings.magnitude + settings.deviation * normal, 0.0), _MOST)
            out.append(
                (names[int(which * len(names))], magnitude / _MOST, -1.0 if sign < 0.5 else 1.0)
            )
    return out


def apply_operations(
    pixels: np.ndarray, size: int, u: Sequence[float], settings: schema.RandAugment
) -> np.ndarray:
    """A view [size * size * 3] uint8, row-major RGB, after its operations.

    >>> gray = np.full(4 * 4 * 3, 100, np.uint8)
    >>> int(apply_operations(gray, 4, [2.5 / 15, 0.0, 0.0, 0.0, 0.0], schema.RandAugment(ops=1))[0])      # invert
    155
    """
    image = Image.frombuffer(
        "RGB", (size, size), np.ascontiguousarray(pixels).tobytes(), "raw", "RGB", 0, 1
    )
    for name, level, sign in draw_operations(u, settings):
        image = OPERATIONS[name](image, level, sign)
    return np.frombuffer(image.tobytes(), np.uint8)
