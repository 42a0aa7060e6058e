"""Decodes JPEGs with simplejpeg and cuts views with cykooz-resizer, which uses vector instructions.
Both belong to the extra `fast`.

Pillow and simplejpeg both use libjpeg-turbo and give the same pixels. simplejpeg packs three bytes
per pixel, as a batch needs them; Pillow uses four, which have to be repacked. Any file that is not
a plain, undamaged JPEG is left to Pillow, which alone decides what is a bad record."""

import functools
import importlib.util
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL
from PIL import Image

_LOCAL = threading.local()  # the resizer and the view of each thread
# cykooz-resizer reads Pillow's memory directly. This was tested with these versions of Pillow; with
# others the pixels are copied, with the same result.
_IN_PLACE = PIL.__version__.partition(".")[0] in ("13",)


@functools.cache
def is_installed(package: str) -> bool:
    """Returns whether one of the two packages is installed.

    >>> is_installed("no_such_package")
    False
    """
    return importlib.util.find_spec(package) is not None


class PackedImage:
    """An RGB image of three bytes per pixel, from which views are cut; see `decode_jpeg`.

    Attributes:
        size: (width, height) in pixels, as in Pillow.

    >>> if is_installed("cykooz_resizer"):
    ...     gray = PackedImage(np.full((30, 40, 3), 7, np.uint8))
    ...     assert gray.size == (40, 30) and (gray.cut((5.0, 0.0, 35.0, 30.0), 16) == 7).all()
    """

    def __init__(self, pixels_HxWx3: np.ndarray) -> None:
        import cykooz_resizer as c

        self.size = pixels_HxWx3.shape[1], pixels_HxWx3.shape[0]
        self._data = c.ImageData(*self.size, c.PixelType.U8x3, pixels_HxWx3.tobytes())

    def cut(self, window: Sequence[float], size: int) -> np.ndarray:
        """Cuts one view with antialiased bicubic interpolation.

        Args:
            window: (left, top, right, bottom) in pixels.
            size: side of the view in pixels, S.

        Returns:
            uint8 [S * S * 3], row-major RGB. The next view of this thread overwrites it.
        """
        import cykooz_resizer as c

        if getattr(_LOCAL, "size", None) != size:
            _LOCAL.size, _LOCAL.view = size, c.ImageData(size, size, c.PixelType.U8x3)
        run, bicubic = _resizer()
        run.resize(
            self._data,
            _LOCAL.view,
            c.ResizeOptions(bicubic, False, c.CropBox(*_inside(window, *self.size))),
        )
        return np.frombuffer(_LOCAL.view.get_buffer(), np.uint8)


def plain_jpeg_size(raw: bytes) -> tuple[int, int] | None:
    """Returns the (height, width) of a plain colour JPEG: one without EXIF, XMP or a second image,
    which could change its pixels.

    Args:
        raw: the bytes of a file.

    Returns:
        The size in pixels; None for any other file, which Pillow opens.

    >>> plain_jpeg_size(b"not an image") is None
    True
    """
    if (
        not raw.startswith(b"\xff\xd8\xff")
        or not is_installed("simplejpeg")
        or not is_installed("cykooz_resizer")
    ):
        return None
    offset, end = 2, len(raw) - 8
    # the segments before the first scan
    while offset < end and raw[offset] == 0xFF and (marker := raw[offset + 1]) != 0xDA:
        if marker == 0xE1 or (marker == 0xE2 and raw[offset + 4 : offset + 8] == b"MPF\0"):
            return None
        if marker == 0xFF:  # a fill byte
            offset += 1
            continue
        offset += 2 + (raw[offset + 2] << 8 | raw[offset + 3])
    if raw[offset : offset + 2] != b"\xff\xda":  # other bytes in between, which Pillow skips
        return None
    import simplejpeg

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(raw)
    except ValueError:
        return None
    return (height, width) if colours == "YCbCr" else None


def decode_jpeg(raw: bytes, height: int, width: int) -> PackedImage | None:
    """Decodes a colour JPEG at full size.

    Args:
        raw: the bytes of the file.
        height, width: in pixels, from `plain_jpeg_size`.

    Returns:
        The image; None if simplejpeg is not installed or reports an error or a warning.

    >>> decode_jpeg(b"not an image", 16, 16) is None
    True
    """
    if not is_installed("simplejpeg") or not is_installed("cykooz_resizer"):
        return None
    import simplejpeg

    try:
        pixels = simplejpeg.decode_jpeg(raw, "RGB")  # raises on warnings of libjpeg too
    except ValueError:
        return None
    return PackedImage(pixels) if pixels.shape == (height, width, 3) else None


def resize_region(image: Image.Image, window: Sequence[float], size: int) -> Image.Image:
    """Resizes a region of an RGB image of Pillow, as `Image.resize` does.

    Args:
        image: RGB.
        window: (left, top, right, bottom) in pixels of the image.
        size: side of the result in pixels.

    Returns:
        An RGB image of `size` x `size`.

    >>> if is_installed("cykooz_resizer"):
    ...     view = resize_region(Image.new("RGB", (40, 30)), (5.0, 0.0, 35.0, 30.0), 16)
    ...     assert view.size == (16, 16)
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
    """Returns (left, top, width, height), rounded so that no sum exceeds the edge of the image,
    which the resizer refuses."""
    left, top, right, bottom = window
    w, h = right - left, bottom - top
    return (
        left,
        top,
        math.nextafter(w, 0) if left + w > width else w,
        math.nextafter(h, 0) if top + h > height else h,
    )


def _resizer() -> tuple[Any, Any]:
    """Returns the resizer of this thread, and the filter."""
    if not hasattr(_LOCAL, "resizer"):
        import cykooz_resizer as c

        _LOCAL.resizer = c.Resizer(), c.ResizeAlg.convolution(c.FilterType.catmull_rom)
    return _LOCAL.resizer
