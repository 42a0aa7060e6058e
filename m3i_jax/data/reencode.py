"""Encodes images again, smaller, while a source is converted."""

import dataclasses
import io
import logging

import PIL
from PIL import Image

from m3i_jax.data import decode
from m3i_jax.data.sources.base import Record
from m3i_jax.errors import UserError, shorten

QUALITY = 90  # of JPEGs, if only a size is given
JPEG_SIDE = 65_500  # pixels; libjpeg writes no longer side
_MARGIN = 2  # a JPEG is decoded at no less than so many times the size
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Reencoding:
    """How images are stored: a pure function of their bytes, by Pillow.

    Attributes:
        size: longest allowed shorter side in pixels; larger images are scaled down (Lanczos). 0:
            any.
        quality: of the JPEG that every image becomes; 0: QUALITY for images that are scaled down,
            and the others keep their bytes.
        background: gray level under transparent pixels.
    """

    size: int = 0
    quality: int = 0
    background: int = 255

    def __bool__(self) -> bool:
        return bool(self.size or self.quality)

    def __call__(self, record: Record) -> Record:
        """Returns a record with the image encoded again. One that cannot be decoded keeps its
        bytes: it is counted and replaced when it is read. So does, with a warning, one that no JPEG
        can hold.

        >>> import numpy as np
        >>> record = Record("a", np.zeros((40, 80, 3), np.uint8), 3)
        >>> small = Reencoding(size=20)(record)
        >>> decode.decode_image(small.image).shape, small.label
        ((20, 40, 3), 3)
        >>> Reencoding(size=40)(record) is record
        True
        """
        if record.objects is not None or record.map is not None:
            raise ValueError("an image with annotations in pixels cannot be resized")
        try:
            opened = decode.open_image(record.image)
            short = min(opened.height, opened.width)
            smaller = 0 < self.size < short
            if not smaller and not self.quality:
                return record
            least = (float(opened.height), float(opened.width))
            target = (opened.width, opened.height)
            if smaller:
                height = max(1, round(opened.height * self.size / short))
                width = max(1, round(opened.width * self.size / short))
                least, target = (_MARGIN * height, _MARGIN * width), (width, height)
            if max(target) > JPEG_SIDE:
                _keep_bytes(record, f"a JPEG has at most {JPEG_SIDE:,} pixels a side", *target)
                return record
            image = opened.rgb(background=self.background, least=least)
            if image.size != target:
                image = image.resize(target, Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=self.quality or QUALITY)
        except decode.BadRecord:
            return record
        except OSError as error:  # of the encoder, not of a disk
            _keep_bytes(record, str(error), *target)
            return record
        return dataclasses.replace(record, image=buffer.getvalue())

    def plan(self) -> dict[str, object]:
        """What decides the bytes, for the plan of a conversion; {} if none are changed."""
        if not self:
            return {}
        return {**dataclasses.asdict(self), "pillow": PIL.__version__}


def _keep_bytes(record: Record, why: str, width: int, height: int) -> None:
    """Warns that a record keeps its bytes."""
    _log.warning(
        "warning: %s, %d x %d pixels, is not encoded again: %s",
        shorten(record.key),
        width,
        height,
        why,
    )


UNCHANGED = Reencoding()


def parse_reencoding(size: str, quality: str, background: int) -> Reencoding:
    """Returns what the flags --size and --quality ask for; "" is a flag that is not given.

    Raises:
        UserError: a value is no whole number of its range.

    >>> parse_reencoding("256", "", 255)
    Reencoding(size=256, quality=0, background=255)
    """
    numbers = {}
    for flag, text, least, most in (("size", size, 16, 8192), ("quality", quality, 1, 100)):
        if text and not (text.isascii() and text.isdigit() and least <= int(text) <= most):
            raise UserError(f"--{flag}={text[:60]}: is not a whole number from {least} to {most}")
        numbers[flag] = int(text or 0)
    return Reencoding(**numbers, background=background)
