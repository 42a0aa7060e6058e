"""Where the two views of an image are cut, and the cutting. Geometry only: colours are changed on
the device.

A box is (top, left, height, width) in pixels of the whole, un-mirrored image; a view that is
flipped is mirrored on the device.

Two resizers cut a view with the same antialiased bicubic filter: Pillow's, and one with vector
instructions, six times as fast (the package cykooz-resizer, in the extra `decode_fast`; the same
bytes on every processor). They differ by 0.3 gray levels on average, so which of them made a batch
is part of the identity of the stream. Which decoder read a JPEG is not: they give the same pixels.
"""

import functools
import importlib.metadata
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from m3i_jax.data import decode_fast
from m3i_jax.errors import UserError

WIDTH = 24  # uniforms a view needs at most, a multiple of four
Box = tuple[int, int, int, int]


def crop_box(
    u: Sequence[float],
    height: int,
    width: int,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """A random resized crop with torchvision's semantics: ten tries at area and aspect
    (log-uniform), then the central crop.

    Args:
        u: 22 numbers in [0, 1): area and aspect of each try, then top and left.
        height, width: of the image in pixels.
        scale: range of the crop's area as a share of the picture's.
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
    """The (height, width) at which an image may be decoded so that every box keeps `gap * size`
    pixels a side.

    >>> sufficient_size([(0, 0, 100, 200), (0, 0, 400, 400)], 400, 800, size=10, gap=3.0)
    (120.0, 120.0)
    """
    return (
        max(height * gap * size / box[2] for box in boxes),
        max(width * gap * size / box[3] for box in boxes),
    )


@functools.cache
def choose_resizer(wanted: str = "auto") -> str:
    """The resizer that a wish comes to on this machine: "pillow", or "fast" and the version that
    its pixels depend on.

    Args:
        wanted: "pillow"; "fast"; or "auto", which is fast where that is installed.

    Raises:
        UserError: "fast" is asked for and not installed.

    >>> choose_resizer("pillow"), choose_resizer("auto") in ("pillow", "fast 4")
    ('pillow', True)
    """
    if wanted.partition(" ")[0] not in ("auto", "pillow", "fast"):
        raise UserError(f"data.resizer={wanted!r} is no resizer: use 'auto', 'pillow' or 'fast'")
    installed = decode_fast.is_installed("cykooz_resizer")
    if wanted.startswith("fast") and not installed:
        raise UserError(
            "data.resizer='fast' needs the package cykooz-resizer: pip install 'm3i-jax[fast]', or"
            " use 'pillow'"
        )
    if wanted == "pillow" or not installed:
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
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Cuts one view: antialiased bicubic.

    Args: image: RGB, the whole image, perhaps decoded at a smaller scale; packed, it is always the
        fast resizer that cuts. box: (top, left, height, width) in pixels of the image at full
        scale. size: side of the view in pixels. height, width: of the image at full scale. by: a
        resizer, as `choose_resizer` names it. out: uint8 [size * size * 3] to fill and return;
        None: a new array.

    Returns:
        uint8 [size * size * 3], row-major RGB.

    >>> ramp = Image.fromarray(np.arange(32, dtype=np.uint8)[None, :, None].repeat(32, 0).repeat(3, 2))
    >>> cut_view(ramp, (0, 8, 16, 16), 16, height=32, width=32).reshape(16, 16, 3)[0, :3, 0].tolist()
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
        image.resize((size, size), Image.Resampling.BICUBIC, window)
        if by == "pillow"
        else decode_fast.resize_region(image, window, size)
    )
    pixels = np.frombuffer(view.tobytes(), np.uint8)
    if out is None:
        return pixels
    out[:] = pixels
    return out


def central_box(
    height: int, width: int, size: int, *, crop: float = 224 / 256
) -> tuple[float, float, float, float]:
    """The box of the usual evaluation view: the short side resized to size / crop, then the centre
    cut out.

    Args:
        height, width: of the image in pixels.
        size: side of the view in pixels.
        crop: share of the short side that is kept.

    Returns:
        (top, left, height, width) in pixels of the image, not whole numbers.

    >>> central_box(256, 512, 224)
    (16.0, 144.0, 224.0, 224.0)
    """
    short = round(size / crop)
    resized_h = short if height <= width else int(short * height / width)
    resized_w = short if width <= height else int(short * width / height)
    sy, sx = height / resized_h, width / resized_w
    return (
        round((resized_h - size) / 2) * sy,
        round((resized_w - size) / 2) * sx,
        size * sy,
        size * sx,
    )
