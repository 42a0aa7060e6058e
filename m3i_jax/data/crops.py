"""Draws the boxes of the two views of an image, and cuts the views. Colours and flips are applied
on the device.

A box is (top, left, height, width) in pixels of the full, un-mirrored image.

Two resizers cut a view with the same antialiased bicubic filter: Pillow, and cykooz-resizer (extra
`fast`), which uses vector instructions, is six times as fast and gives the same bytes on every
processor. They differ by 0.3 gray levels on average, so the resizer is part of the identity of the
stream. The decoder of a JPEG is not: both give the same pixels."""

import functools
import importlib.metadata
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from m3i_jax.data import decode_fast
from m3i_jax.errors import UserError

_NAMES = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
FILTERS = {name: Image.Resampling[name.upper()] for name in _NAMES}
WIDTH = 24  # uniforms per view, a multiple of four
Box = tuple[int, int, int, int]


def crop_box(
    u: Sequence[float],
    height: int,
    width: int,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """Draws the box of a random resized crop as torchvision does: ten attempts at an area and a
    log-uniform aspect ratio, then the central crop.

    Args:
        u: 22 uniforms in [0, 1): area and aspect ratio of each attempt, then top and left.
        height, width: of the image in pixels.
        scale: range of the area of the crop as a share of the image.
        ratio: range of width over height.

    Returns:
        (top, left, height, width) in pixels, inside the image.

    >>> crop_box([0.5] * 22, 100, 100)
    (14, 14, 73, 73)
    >>> crop_box([0.5] * 22, 20, 1000, scale=(1.0, 1.0))
    (0, 486, 20, 27)
    """
    low, span = math.log(ratio[0]), math.log(ratio[1] / ratio[0])
    for t in range(0, 20, 2):
        area, aspect = (
            height * width * (scale[0] + u[t] * (scale[1] - scale[0])),
            math.exp(low + span * u[t + 1]),
        )
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w
    w, h = (
        max(1, min(width, round(height * ratio[1]))),
        max(1, min(height, round(width / ratio[0]))),
    )
    return (height - h) // 2, (width - w) // 2, h, w


def sufficient_size(
    boxes: Sequence[Box], height: int, width: int, size: int, gap: float
) -> tuple[float, float]:
    """Returns the (height, width) at which an image may be decoded so that every box keeps
    `gap * size` pixels per side.

    >>> sufficient_size([(0, 0, 100, 200), (0, 0, 400, 400)], 400, 800, size=10, gap=3.0)
    (120.0, 120.0)
    """
    return (
        max(height * gap * size / box[2] for box in boxes),
        max(width * gap * size / box[3] for box in boxes),
    )


@functools.cache
def choose_resizer(setting: str = "auto") -> str:
    """Returns the resizer of a setting on this machine: "pillow", or "fast" and the major version,
    on which its pixels depend.

    Args:
        setting: "pillow"; "fast"; or "auto", which is fast if that is installed.

    Raises:
        UserError: the setting is "fast" and cykooz-resizer is not installed.

    >>> choose_resizer("pillow"), choose_resizer("auto") in ("pillow", "fast 4")
    ('pillow', True)
    """
    if setting.partition(" ")[0] not in ("auto", "pillow", "fast"):
        raise UserError(
            f"data.resizer={setting!r} is not a resizer: use 'auto', 'pillow' or 'fast'"
        )
    installed = decode_fast.is_installed("cykooz_resizer")
    if setting.startswith("fast") and not installed:
        raise UserError(
            "data.resizer='fast' needs the package cykooz-resizer: pip install 'm3i-jax[fast]', or"
            " use 'pillow'"
        )
    if setting == "pillow" or not installed:
        return "pillow"
    return f"fast {importlib.metadata.version('cykooz-resizer').partition('.')[0]}"


def cut_view(
    image: Image.Image | decode_fast.PackedImage,
    box: Sequence[float],
    size: int,
    *,
    height: int,
    width: int,
    by: str = "pillow",
    interpolation: str = "bicubic",
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Cuts one view with interpolation, antialiased but for nearest.

    Args:
        image: RGB, the full image, possibly decoded at a smaller scale. A packed one is always cut
            by the fast resizer.
        box: (top, left, height, width) in pixels of the image at full scale.
        size: side of the view in pixels.
        height, width: of the image at full scale.
        by: a resizer, as `choose_resizer` names it.
        interpolation: bicubic, or, by Pillow alone, another of FILTERS.
        out: uint8 [size * size * 3] to fill and return; None for a new array.

    Returns:
        uint8 [size * size * 3], row-major RGB.

    >>> columns = np.arange(32, dtype=np.uint8)[None, :, None]
    >>> ramp = Image.fromarray(columns.repeat(32, 0).repeat(3, 2))
    >>> view = cut_view(ramp, (0, 8, 16, 16), 16, height=32, width=32)
    >>> view.reshape(16, 16, 3)[0, :3, 0].tolist()
    [8, 9, 10]
    """
    top, left, h, w = box
    reduced_w, reduced_h = image.size
    sy, sx = reduced_h / height, reduced_w / width
    window = (left * sx, top * sy, min((left + w) * sx, reduced_w), min((top + h) * sy, reduced_h))
    if isinstance(image, decode_fast.PackedImage):
        pixels = image.cut(window, size)
        if out is None:
            return pixels.copy()
        out[:] = pixels
        return out
    view = (
        image.resize((size, size), FILTERS[interpolation], window)
        if by == "pillow"
        else decode_fast.resize_region(image, window, size)
    )
    pixels = np.frombuffer(view.tobytes(), np.uint8)
    if out is None:
        return pixels
    out[:] = pixels
    return out


def central_box(
    height: int, width: int, size: int, *, crop: float = 224 / 256, squash: bool = False
) -> tuple[float, float, float, float]:
    """Returns the box of the usual evaluation view: the short side resized to size / crop, then a
    centre crop.

    Args:
        height, width: of the image in pixels.
        size: side of the view in pixels.
        crop: share of the short side that is kept.
        squash: both sides are resized to size / crop.

    Returns:
        (top, left, height, width) in pixels of the image, floats.

    >>> central_box(256, 512, 224)
    (16.0, 144.0, 224.0, 224.0)
    >>> central_box(256, 512, 224, squash=True)
    (16.0, 32.0, 224.0, 448.0)
    """
    short = round(size / crop)
    resized_h = short if squash or height <= width else int(short * height / width)
    resized_w = short if squash or width <= height else int(short * width / height)
    sy, sx = height / resized_h, width / resized_w
    return (
        round((resized_h - size) / 2) * sy,
        round((resized_w - size) / 2) * sx,
        size * sy,
        size * sx,
    )
