"""The extra `fast`: JPEGs decoded by simplejpeg and views cut by cykooz-resizer, which uses vector
instructions.

Both decoders have libjpeg-turbo inside and give the same pixels. What differs is how they lie in
memory: simplejpeg's are packed, three bytes a pixel, as a batch wants them, Pillow's have a fourth
byte that is to be removed again. Whatever is no clean JPEG is Pillow's: its verdict on broken files
is the only one."""

import functools
import importlib.util
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL
from PIL import Image

_OWN = threading.local()  # a resizer and a view of each thread
# It reads the pixels of an image where Pillow keeps them. With a Pillow that this was not tried
# with, they are copied: the same result.
_IN_PLACE = PIL.__version__.partition(".")[0] in ("13",)


@functools.cache
def is_installed(package: str) -> bool:
    """Whether one of the two packages is here.

    >>> is_installed("no_such_package")
    False
    """
    return importlib.util.find_spec(package) is not None


class PackedImage:
    """An RGB image of three bytes a pixel, to cut views from. Made by `decode_jpeg`.

    Attributes:
        size: (width, height) in pixels, as of a Pillow image.

    >>> if is_installed("cykooz_resizer"):
    ...     gray = PackedImage(np.full((30, 40, 3), 7, np.uint8))
    ...     assert gray.size == (40, 30) and (gray.cut((5.0, 0.0, 35.0, 30.0), 16) == 7).all()
    """

    def __init__(self, pixels_HxWx3: np.ndarray) -> None:
        import cykooz_resizer as c

        self.size = pixels_HxWx3.shape[1], pixels_HxWx3.shape[0]
        self._data = c.ImageData(*self.size, c.PixelType.U8x3, pixels_HxWx3.tobytes())

    def cut(self, window: Sequence[float], size: int) -> np.ndarray:
        """Cuts one view: antialiased bicubic.

        Args:
            window: (left, top, right, bottom) in pixels.
            size: side of the view in pixels, S.

        Returns:
            uint8 [S * S * 3], row-major RGB: of this thread, and overwritten by its next view.
        """
        import cykooz_resizer as c

        if getattr(_OWN, "size", None) != size:
            _OWN.size, _OWN.view = size, c.ImageData(size, size, c.PixelType.U8x3)
        run, bicubic = _resizer()
        run.resize(
            self._data,
            _OWN.view,
            c.ResizeOptions(bicubic, False, c.CropBox(*_inside(window, *self.size))),
        )
        return np.frombuffer(_OWN.view.get_buffer(), np.uint8)


def plain_jpeg_size(raw: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG of colours that says nothing about itself which would change its
    pixels: no EXIF, XMP or second image.

    Args:
        raw: the bytes of a file.

    Returns:
        Its size in pixels; None for any other file, for Pillow to look at.

    >>> plain_jpeg_size(b"no picture") is None
    True
    """
    if (
        not raw.startswith(b"\xff\xd8\xff")
        or not is_installed("simplejpeg")
        or not is_installed("cykooz_resizer")
    ):
        return None
    at, end = 2, len(raw) - 8
    # its segments, up to the first scan
    while at < end and raw[at] == 0xFF and (marker := raw[at + 1]) != 0xDA:
        if marker == 0xE1 or (marker == 0xE2 and raw[at + 4 : at + 8] == b"MPF\0"):
            return None
        at += 2 + (raw[at + 2] << 8 | raw[at + 3])
    import simplejpeg

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(raw)
    except ValueError:
        return None
    return (height, width) if colours == "YCbCr" else None


def decode_jpeg(raw: bytes, height: int, width: int) -> PackedImage | None:
    """Decodes a JPEG of colours at full size.

    Args:
        raw: the bytes of the file.
        height, width: in pixels, as its header was read before.

    Returns:
        The image; None if simplejpeg is not installed or finds anything odd about the file.

    >>> decode_jpeg(b"no picture", 16, 16) is None
    True
    """
    if not is_installed("simplejpeg") or not is_installed("cykooz_resizer"):
        return None
    import simplejpeg

    try:
        pixels = simplejpeg.decode_jpeg(raw, "RGB")  # strict: a warning of libjpeg is an error here
    except ValueError:
        return None
    return PackedImage(pixels) if pixels.shape == (height, width, 3) else None


def resize_region(image: Image.Image, window: Sequence[float], size: int) -> Image.Image:
    """`Image.resize` of a part of an RGB image of Pillow.

    Args:
        image: RGB.
        window: (left, top, right, bottom) in its pixels.
        size: side of the result in pixels.

    Returns:
        An RGB image of `size` x `size`.

    >>> if is_installed("cykooz_resizer"):
    ...     assert resize_region(Image.new("RGB", (40, 30)), (5.0, 0.0, 35.0, 30.0), 16).size == (16, 16)
    """
    import cykooz_resizer as c

    run, bicubic = _resizer()
    options = c.ResizeOptions(bicubic, False, c.CropBox(*_inside(window, *image.size)))
    if _IN_PLACE:
        view = Image.new("RGB", (size, size), None)
        run.resize_pil(image, view, options)
        return view
    packed = c.ImageData(size, size, c.PixelType.U8x3)
    run.resize(c.ImageData(*image.size, c.PixelType.U8x3, image.tobytes()), packed, options)
    return Image.frombytes("RGB", (size, size), packed.get_buffer())


def _inside(window: Sequence[float], width: int, height: int) -> tuple[float, float, float, float]:
    """(left, top, width, height) whose sums do not round above the edge, which would be refused."""
    left, top, right, bottom = window
    w, h = right - left, bottom - top
    return (
        left,
        top,
        math.nextafter(w, 0) if left + w > width else w,
        math.nextafter(h, 0) if top + h > height else h,
    )


def _resizer() -> tuple[Any, Any]:
    """(resizer of this thread's own, the filter)."""
    if not hasattr(_OWN, "resizer"):
        import cykooz_resizer as c

        _OWN.resizer = c.Resizer(), c.ResizeAlg.convolution(c.FilterType.catmull_rom)
    return _OWN.resizer
