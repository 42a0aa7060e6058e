"""Decodes a record to RGB pixels and clean text. All rules about bad or unusual input are here.

An image with too many pixels, or too few to crop, is refused by its header before it is decoded.
The others become 8-bit RGB in the orientation of their EXIF tag: transparency is composed over a
plain background, palettes are looked up, 16-bit gray is scaled (not clipped), CMYK is converted
(JPEGs store it inverted, as Adobe does), and an animation gives its first frame. Embedded colour
profiles are not applied."""

import codecs
import concurrent.futures
import contextlib
import dataclasses
import html
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from PIL import Image, ImageFile

from m3i_jax.data import decode_fast
from m3i_jax.data.sources import base
from m3i_jax.data.sources.base import DataSource, Record
from m3i_jax.data.sources.captions import source_caption
from m3i_jax.errors import UnreachableError, UnreadableError

EMPTY, UNDECODABLE, TRUNCATED, TOO_SMALL, TOO_LARGE, UNREADABLE, UNREACHABLE = REASONS = (
    "empty",
    "undecodable",
    "truncated",
    "too_small",
    "too_large",
    "unreadable",
    "unreachable",  # the disk or store does not answer
)
MIN_SIDE = 16  # pixels
PIXEL_LIMIT = 64_000_000
CAPTION_LIMIT = 8192  # bytes; 77 tokens need far less
_CAPTION_THREADS = 32
CAPTION_CHUNK = 1024  # records whose captions are read at a time
# A JPEG is decoded at 1/2, 1/4 or 1/8 only if each crop keeps this many times the pixels per side
# of its view.
GAP = 3.0
# Pillow's other formats are disabled; some of them run external programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_T = Image.Transpose
_TRANSPOSES = {
    2: _T.FLIP_LEFT_RIGHT,
    3: _T.ROTATE_180,
    4: _T.FLIP_TOP_BOTTOM,
    5: _T.TRANSPOSE,
    6: _T.ROTATE_270,
    7: _T.TRANSVERSE,
    8: _T.ROTATE_90,
}
_SWAPS_SIDES = (_T.TRANSPOSE, _T.ROTATE_270, _T.TRANSVERSE, _T.ROTATE_90)
_ORIENTATION = 0x0112  # EXIF tag
# Pillow exports a view in one chunk; this saves 3 % of the pipeline's time.
ImageFile.MAXBLOCK = max(ImageFile.MAXBLOCK, 1 << 18)
# PIXEL_LIMIT refuses such images. Appended: filters of the program that imports this come first.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, append=True)


_Read = TypeVar("_Read")


class BadRecord(Exception):
    """The bytes of a record are not a usable image. `reason` is one of REASONS, `detail` the cause.

    >>> BadRecord("too_small", "5000 x 3 pixels").reason
    'too_small'
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@contextlib.contextmanager
def replaceable(missing: str) -> Iterator[None]:
    """Converts an UnreadableError of the block to a BadRecord if `data.missing` is "replace".

    Args:
        missing: "stop" or "replace"; see `schema.Data.missing`.

    Raises:
        BadRecord: a file cannot be read, with "replace".
        UnreadableError: a file cannot be read, with "stop".

    >>> with replaceable("replace"):
    ...     base.read_byte_range("/gone.jpg")
    Traceback (most recent call last):
    m3i_jax.data.decode.BadRecord: unreadable: '/gone.jpg' cannot be read (No such file or ...
    """
    try:
        yield
    except UnreadableError as error:
        if missing == "stop":
            raise
        away = isinstance(error, UnreachableError)
        raise BadRecord(UNREACHABLE if away else UNREADABLE, str(error)) from error


def read_records(
    source: DataSource, indices: Sequence[int], missing: str
) -> list[Record | BadRecord]:
    """Reads several records in the order of their indices. With missing="replace", a BadRecord
    stands for each that cannot be read any more.

    Raises:
        UnreadableError: a record cannot be read, with missing="stop".

    >>> read_records([Record("a", b"x")], [0, 0], "stop")[1].key
    'a'
    """
    try:
        with replaceable(missing):
            return list(base.read_items(source, indices))
    except BadRecord as error:
        if len(indices) == 1:
            return [error]
    return [record for index in indices for record in read_records(source, [index], missing)]


def sample_captions(
    source: DataSource, limit: int = 200_000, *, missing: str = "stop"
) -> Iterator[str | bytes]:
    """Yields the captions of at most `limit` records, evenly spread over the source, always the
    same ones, as `read_captions` does it.

    Raises:
        UnreadableError: a caption cannot be read, with missing="stop"; else it is left out.

    >>> list(sample_captions([Record(str(i), b"", caption=f"number {i}") for i in range(9)], 3))
    ['number 0', 'number 3', 'number 6']
    """

    def read(index: int) -> str | bytes | None:
        with contextlib.suppress(BadRecord), replaceable(missing):
            return source_caption(source, index)
        return None

    indices = range(0, len(source), -(-len(source) // limit))
    for start in range(0, len(indices), CAPTION_CHUNK):
        for caption in read_captions(read, indices[start : start + CAPTION_CHUNK]):
            if caption is not None:
                yield caption


def read_captions(read: Callable[[int], _Read], indices: Sequence[int]) -> list[_Read]:
    """Returns `read` of each record, in order. It is called on several threads, since captions in a
    bucket take a request each.

    >>> read_captions(str, range(3))
    ['0', '1', '2']
    """
    with concurrent.futures.ThreadPoolExecutor(_CAPTION_THREADS) as pool:
        return list(pool.map(read, indices))


@dataclasses.dataclass
class DecodedImage:
    """An open image whose header was accepted. `height` and `width` are those after `transpose`,
    the rotation of its EXIF tag."""

    image: Image.Image
    transpose: Image.Transpose | None
    height: int
    width: int

    def rgb(
        self, *, background: int = 255, least: tuple[float, float] = (math.inf, math.inf)
    ) -> Image.Image:
        """Decodes to RGB in the final orientation.

        Args:
            background: gray level 0..255 under transparent pixels.
            least: (height, width) that suffice. For speed, a JPEG may be decoded at a smaller
                scale, but not below this.

        Returns:
            An RGB image, `height` x `width` or smaller with the same proportions.

        Raises:
            BadRecord: "truncated" or "undecodable".
        """
        try:
            if self.transpose in _SWAPS_SIDES:
                least = least[::-1]
            if self.image.format in ("JPEG", "MPO") and max(least) < math.inf:
                self.image.draft(None, (math.ceil(least[1]), math.ceil(least[0])))  # type: ignore[arg-type]
            image = _rgb(self.image, background)
            return image if self.transpose is None else image.transpose(self.transpose)
        except Exception as error:  # Pillow's readers raise many types for a damaged file
            raise _as_bad_record(error) from error


@dataclasses.dataclass
class PlainJpeg:
    """A JPEG that `decode_fast.plain_jpeg_size` accepts, not opened by Pillow. `rgb` returns the
    same pixels as Pillow, packed, and is faster."""

    raw: bytes
    height: int
    width: int

    def rgb(
        self, *, background: int = 255, least: tuple[float, float] = (math.inf, math.inf)
    ) -> Image.Image | decode_fast.PackedImage:
        """See `DecodedImage.rgb`, to which this falls back for damaged files and smaller scales."""
        reduced = (
            max(least) < math.inf
            and self.height >= 2 * math.ceil(least[0])
            and self.width >= 2 * math.ceil(least[1])
        )
        packed = None if reduced else decode_fast.decode_jpeg(self.raw, self.height, self.width)
        return packed or open_image(self.raw).rgb(background=background, least=least)


def open_image(image: bytes | np.ndarray) -> DecodedImage:
    """Opens an encoded image, or wraps decoded pixels, and checks the header.

    Args:
        image: the bytes of a JPEG, PNG, WebP, GIF, BMP or TIFF file, or a uint8 array [height,
            width, 3].

    Returns:
        The image; `DecodedImage.rgb` decodes its pixels.

    Raises:
        BadRecord: the bytes are not an image, or the image has more than 64 million pixels or a
            side below 16.

    >>> open_image(np.zeros((20, 30, 3), np.uint8)).width
    30
    >>> open_image(b"<html>")
    Traceback (most recent call last):
    m3i_jax.data.decode.BadRecord: undecodable: cannot identify the format
    """
    transpose = None
    try:
        if isinstance(image, np.ndarray):
            opened = Image.fromarray(image)
        elif not image:
            raise BadRecord(EMPTY, "no bytes")
        else:
            opened = Image.open(io.BytesIO(image), formats=_FORMATS)
        _check(*opened.size)
        if opened.format is not None:
            transpose = _exif_transpose(opened)
    except BadRecord:
        raise
    except Image.UnidentifiedImageError as error:
        raise BadRecord(UNDECODABLE, "cannot identify the format") from error
    except Exception as error:
        raise _as_bad_record(error) from error
    width, height = opened.size
    if transpose in _SWAPS_SIDES:
        height, width = width, height
    return DecodedImage(opened, transpose, height, width)


def wrap_pixels(pixels: np.ndarray) -> DecodedImage:
    """Returns decoded pixels, uint8 [height, width, 3], as an open image. Unlike those of records,
    which crops are cut from, they may have any size.

    >>> wrap_pixels(np.zeros((1, 30, 3), np.uint8)).width
    30
    """
    return DecodedImage(Image.fromarray(pixels), None, *pixels.shape[:2])


def open_jpeg_fast(image: bytes | np.ndarray) -> DecodedImage | PlainJpeg:
    """Opens an image as `open_image` does, or as a PlainJpeg if that is possible.

    >>> open_jpeg_fast(np.zeros((20, 30, 3), np.uint8)).width
    30
    """
    if isinstance(image, np.ndarray) or (size := decode_fast.plain_jpeg_size(image)) is None:
        return open_image(image)
    _check(size[1], size[0])
    return PlainJpeg(image, *size)


def decode_image(image: bytes | np.ndarray, *, background: int = 255) -> np.ndarray:
    """Decodes an image at full size.

    Args:
        image: see `open_image`.
        background: gray level 0..255 under transparent pixels.

    Returns:
        uint8 [height, width, 3], RGB.

    Raises:
        BadRecord: see `open_image` and `DecodedImage.rgb`.

    >>> decode_image(np.full((16, 16, 3), 7, np.uint8)).shape
    (16, 16, 3)
    """
    return np.array(open_image(image).rgb(background=background))


def _check(width: int, height: int) -> None:
    if width * height > PIXEL_LIMIT:
        raise BadRecord(TOO_LARGE, f"{width} x {height} pixels")
    if min(width, height) < MIN_SIDE:
        raise BadRecord(TOO_SMALL, f"{width} x {height} pixels")


def _as_bad_record(error: Exception) -> BadRecord:
    if isinstance(error, Image.DecompressionBombError):
        return BadRecord(TOO_LARGE, str(error))
    truncated = isinstance(error, EOFError) or "truncated" in str(error).lower()
    reason = TRUNCATED if truncated else UNDECODABLE
    return BadRecord(reason, f"{type(error).__name__}: {error}"[:200])


def _exif_transpose(image: Image.Image) -> Image.Transpose | None:
    """Returns the rotation that is still to be made, after loading what has to be loaded for it."""
    if image.format in ("PNG", "TIFF"):
        # a PNG may store the orientation behind its pixels; Pillow rotates a TIFF itself
        image.load()
    if image.format == "TIFF":
        return None
    try:
        return _TRANSPOSES.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # the EXIF block is damaged: the image is used without rotation
        return None


def convert_to_rgb(image: Image.Image, *, background: int = 255) -> Image.Image:
    """Converts an image of Pillow as `open_image` and `DecodedImage.rgb` do, EXIF rotation
    included, without their limits on its size.

    Raises:
        BadRecord: the file behind it cannot be decoded.

    >>> convert_to_rgb(Image.new("LA", (3, 2), (0, 0))).getpixel((0, 0))
    (255, 255, 255)
    """
    try:
        transpose = _exif_transpose(image)
    except Exception as error:  # Pillow's readers raise many types for a damaged file
        raise _as_bad_record(error) from error
    return DecodedImage(image, transpose, *image.size[::-1]).rgb(background=background)


def _rgb(image: Image.Image, background: int) -> Image.Image:
    """Converts an image of any mode of Pillow to RGB."""
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return image  # convert would copy
    # older versions of Pillow open 16-bit PNGs as "I"
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return _gray(image, 0, 65535, np.uint32)
    if image.mode in ("I", "F"):
        # 32-bit integers and floats have no defined white, so the range of the image is stretched.
        ends = [(float(band.min()), float(band.max())) for band in _bands(image)]
        low, high = float(np.min(ends)), float(np.max(ends))  # NaN if any pixel is
        if not math.isfinite(high - low):
            raise ValueError("some pixels are not finite")
        return _gray(image, low, max(high - low, 1e-300), np.float64)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, (background,) * 3)
        canvas.paste(image, mask=image)
        return canvas
    return image.convert("RGB")


def _gray(image: Image.Image, low: float, white: float, dtype: type) -> Image.Image:
    """Scales pixels of `low` to `low` + `white` to gray of 0 to 255, band by band to limit the
    memory."""
    out = Image.new("L", image.size)
    top = 0
    for band in _bands(image):
        pixels: np.ndarray = band.astype(dtype)
        pixels = (pixels - low if low else pixels) * 255
        gray = np.clip(np.rint(pixels / white), 0, 255).astype(np.uint8)
        out.paste(Image.fromarray(gray), (0, top))
        top += len(band)
    return out.convert("RGB")


def _bands(image: Image.Image) -> Iterator[np.ndarray]:
    """Yields the rows of a single-channel image, about a million pixels at a time."""
    rows = max(1, (1 << 20) // image.width)
    for top in range(0, image.height, rows):
        yield np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))


_SPACE = re.compile(r"\s+")
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decode_caption(caption: bytes) -> tuple[str, bool]:
    """Decodes the part of a caption that is used: UTF-8, or UTF-16 with a byte order mark.

    Returns:
        (text, whether all bytes of the part have a character); where not, U+FFFD stands for them.

    >>> decode_caption(b"caf\\xc3\\xa9"), decode_caption(b"caf\\xe9")
    (('café', True), ('caf\ufffd', False))
    """
    kept = caption[:CAPTION_LIMIT]
    decoder = codecs.getincrementaldecoder("utf-16" if kept.startswith(_UTF_16) else "utf-8")
    # the limit may cut a character in two, which is left out
    final = len(kept) == len(caption)
    try:
        return decoder("strict").decode(kept, final), True
    except UnicodeDecodeError:
        return decoder("replace").decode(kept, final), False


def clean_caption(caption: str | bytes | None) -> str | None:
    """Cleans a caption as CLIP's tokenizer does, without its lower-casing.

    Bytes that are no text become U+FFFD (`decode_caption`), NULs are removed, text beyond 8 KiB is
    cut, wrongly decoded text is repaired (ftfy), HTML entities are resolved twice (web captions are
    often escaped twice), and white space is collapsed.

    Args:
        caption: as the source holds it.

    Returns:
        The text on one line, or None if nothing is left.

    >>> clean_caption(b"  a &amp;lt;b&amp;gt; cat\\x00\\n on a  mat "), clean_caption(b" \\n")
    ('a <b> cat on a mat', None)
    >>> clean_caption("don\\u2019t")
    "don't"
    """
    if caption is None:
        return None
    import ftfy

    text = decode_caption(caption)[0] if isinstance(caption, bytes) else caption[:CAPTION_LIMIT]
    text = html.unescape(html.unescape(ftfy.fix_text(text.replace("\0", ""))))
    # A lone surrogate cannot be encoded.
    text = text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")
    return _SPACE.sub(" ", text).strip() or None
