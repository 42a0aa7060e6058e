"""From the bytes of a record to RGB pixels and clean text: every rule about bad or odd input stands
here and nowhere else.

An image is refused by its header before it is decoded (too many pixels, or too few to crop). What
is left comes out as 8-bit RGB in the orientation its EXIF tag asks for: transparency over a plain
background, palettes looked up, 16-bit gray scaled (not clipped), CMYK converted (JPEGs hold it
inverted, as Adobe writes it), the first frame of an animation. Embedded colour profiles are not
applied."""

import contextlib
import dataclasses
import html
import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageFile

from m3i_jax.data import decode_fast
from m3i_jax.data.sources import base
from m3i_jax.data.sources.base import DataSource, Record
from m3i_jax.errors import UnreadableError

EMPTY, UNDECODABLE, TRUNCATED, TOO_SMALL, TOO_LARGE, UNREADABLE = REASONS = (
    "empty",
    "undecodable",
    "truncated",
    "too_small",
    "too_large",
    "unreadable",
)
LEAST_SIDE = 16  # pixels
PIXEL_LIMIT = 64_000_000
CAPTION_LIMIT = 8192  # bytes; 77 tokens need far less
# a JPEG is decoded at 1/2, 1/4 or 1/8 only while what is cut from it keeps this many times the
# pixels asked for, a side
GAP = 3.0
# Pillow knows more, some of which run other programs
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_T = Image.Transpose
_TURNS = {
    2: _T.FLIP_LEFT_RIGHT,
    3: _T.ROTATE_180,
    4: _T.FLIP_TOP_BOTTOM,
    5: _T.TRANSPOSE,
    6: _T.ROTATE_270,
    7: _T.TRANSVERSE,
    8: _T.ROTATE_90,
}
_ORIENTATION = 0x0112
# a view leaves Pillow in one piece: 3 % of the whole pipeline
ImageFile.MAXBLOCK = max(ImageFile.MAXBLOCK, 1 << 18)
# PIXEL_LIMIT refuses such images already
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadRecord(Exception):
    """A record whose bytes are no usable image. `reason` is one of REASONS; `detail`, as the
    message, says more.

    >>> BadRecord("too_small", "5000 x 3 pixels").reason
    'too_small'
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@contextlib.contextmanager
def replaceable(missing: str) -> Iterator[None]:
    """What cannot be read any more within the block is a bad record where `data.missing` says so.

    Args:
        missing: "stop" or "replace", as `schema.Data.missing`.

    Raises:
        BadRecord: "unreadable", with "replace".
        Unreadable: as it came, with "stop".

    >>> with replaceable("replace"):
    ...     base.read_byte_range("/gone.jpg")
    Traceback (most recent call last):
    m3i_jax.data.decode.BadRecord: unreadable: '/gone.jpg' cannot be read (No such file or directory) although it could when the run ...
    """
    try:
        yield
    except UnreadableError as error:
        if missing == "stop":
            raise
        raise BadRecord(UNREADABLE, str(error)) from error


def read_records(
    source: DataSource, indices: Sequence[int], missing: str
) -> list[Record | BadRecord]:
    """Reads several records, in the order of their indices; with missing="replace", what cannot be
    read any more is a BadRecord there.

    Raises:
        Unreadable: with missing="stop".

    >>> read_records([Record("a", b"x")], [0, 0], "stop")[1].key
    'a'
    """
    try:
        with replaceable(missing):
            return list(base.read_items(source, indices))
    except BadRecord as error:
        if len(indices) == 1:
            return [error]
    return [found for index in indices for found in read_records(source, [index], missing)]


def sample_captions(
    source: DataSource, limit: int = 200_000, *, missing: str = "stop"
) -> Iterator[str | bytes]:
    """Captions of at most `limit` records, evenly spread over the source, always the same ones.

    Raises:
        Unreadable: with missing="stop"; else what cannot be read any more is left out.

    >>> list(sample_captions([Record(str(i), b"", caption=f"number {i}") for i in range(9)], 3))
    ['number 0', 'number 3', 'number 6']
    """
    for i in range(0, len(source), -(-len(source) // limit)):
        caption = None
        with contextlib.suppress(BadRecord), replaceable(missing):
            caption = base.source_caption(source, i)
        if caption is not None:
            yield caption


@dataclasses.dataclass
class DecodedImage:
    """An opened image whose header is accepted. `height` and `width` are those after the EXIF
    rotation."""

    image: Image.Image
    turn: Image.Transpose | None
    height: int
    width: int

    def rgb(
        self, *, background: int = 255, least: tuple[float, float] = (math.inf, math.inf)
    ) -> Image.Image:
        """Decodes to RGB in its final orientation.

        Args: background: gray level 0..255 under transparent pixels. least: (height, width) that
            suffice: a JPEG may be decoded at a smaller scale, for speed, but not below this.

        Returns:
            An RGB image, `height` x `width` or smaller with the same proportions.

        Raises:
            BadRecord: "truncated" or "undecodable".
        """
        try:
            if self.turn is not None and self.turn in (
                _T.TRANSPOSE,
                _T.ROTATE_270,
                _T.TRANSVERSE,
                _T.ROTATE_90,
            ):
                least = least[::-1]
            if self.image.format in ("JPEG", "MPO") and max(least) < math.inf:
                self.image.draft(None, (math.ceil(least[1]), math.ceil(least[0])))  # type: ignore[arg-type]
            image = _rgb(self.image, background)
            return image if self.turn is None else image.transpose(self.turn)
        except Exception as error:  # a damaged file makes Pillow's readers fail in any way: struct, zlib, index, type, ...
            raise _bad(error) from error


@dataclasses.dataclass
class PlainJpeg:
    """A JPEG that `decode_fast.plain_jpeg_size` accepts and Pillow has not opened. `rgb` gives the
    pixels that it would give, packed, sooner."""

    raw: bytes
    height: int
    width: int

    def rgb(
        self, *, background: int = 255, least: tuple[float, float] = (math.inf, math.inf)
    ) -> Image.Image | decode_fast.PackedImage:
        """See `Picture.rgb`, which has the last word about a broken file, and decodes at a smaller
        scale."""
        reduced = (
            max(least) < math.inf
            and self.height >= 2 * math.ceil(least[0])
            and self.width >= 2 * math.ceil(least[1])
        )
        packed = None if reduced else decode_fast.decode_jpeg(self.raw, self.height, self.width)
        return packed or open_image(self.raw).rgb(background=background, least=least)


def open_image(image: bytes | np.ndarray) -> DecodedImage:
    """Opens an encoded image, or wraps one that is decoded already, and applies every rule that
    needs only its header.

    Args: image: the bytes of a JPEG, PNG, WebP, GIF, BMP or TIFF file, or a uint8 array [height,
        width, 3].

    Returns:
        The image; its pixels are decoded by `Picture.rgb`.

    Raises: BadRecord: the bytes are no image, or one of more than 64 million pixels or with a side
        below 16.

    >>> open_image(np.zeros((20, 30, 3), np.uint8)).width
    30
    >>> open_image(b"<html>")
    Traceback (most recent call last):
    m3i_jax.data.decode.BadRecord: undecodable: cannot identify the format
    """
    turn = None
    try:
        if isinstance(image, np.ndarray):
            opened = Image.fromarray(image)
        elif not image:
            raise BadRecord(EMPTY, "no bytes")
        else:
            opened = Image.open(io.BytesIO(image), formats=_FORMATS)
        _check(*opened.size)
        if opened.format in ("PNG", "TIFF"):
            # the orientation may stand behind the pixels of a PNG; Pillow itself turns a TIFF
            opened.load()
        if opened.format is not None and opened.format != "TIFF":
            turn = _turn(opened)
    except BadRecord:
        raise
    except Image.UnidentifiedImageError as error:
        raise BadRecord(UNDECODABLE, "cannot identify the format") from error
    except Exception as error:
        raise _bad(error) from error
    width, height = opened.size
    if turn in (_T.TRANSPOSE, _T.ROTATE_270, _T.TRANSVERSE, _T.ROTATE_90):
        height, width = width, height
    return DecodedImage(opened, turn, height, width)


def open_jpeg_fast(image: bytes | np.ndarray) -> DecodedImage | PlainJpeg:
    """`open_image` for who can use packed pixels.

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
        BadRecord: see `open_image` and `Picture.rgb`.

    >>> decode_image(np.full((16, 16, 3), 7, np.uint8)).shape
    (16, 16, 3)
    """
    return np.array(open_image(image).rgb(background=background))


def _check(width: int, height: int) -> None:
    if width * height > PIXEL_LIMIT:
        raise BadRecord(TOO_LARGE, f"{width} x {height} pixels")
    if min(width, height) < LEAST_SIDE:
        raise BadRecord(TOO_SMALL, f"{width} x {height} pixels")


def _bad(error: Exception) -> BadRecord:
    if isinstance(error, Image.DecompressionBombError):
        return BadRecord(TOO_LARGE, str(error))
    cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
    return BadRecord(TRUNCATED if cut else UNDECODABLE, f"{type(error).__name__}: {error}"[:200])


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a broken EXIF block costs its image nothing but the rotation
        return None


def _rgb(image: Image.Image, background: int) -> Image.Image:
    """Any mode of Pillow to RGB."""
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return image  # convert would copy
    # the latter in older versions of Pillow
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return _gray(image, 0, 65535, np.uint32)
    if image.mode in ("I", "F"):
        # 32-bit integers and floats have no agreed white: the image's own range is stretched.
        ends = [(float(band.min()), float(band.max())) for band in _bands(image)]
        low, high = float(np.min(ends)), float(np.max(ends))  # NaN, if there is one
        if not math.isfinite(high - low):
            raise ValueError("pixels that are not finite")
        return _gray(image, low, max(high - low, 1e-300), np.float64)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        under = Image.new("RGB", image.size, (background,) * 3)
        under.paste(image, mask=image)
        return under
    return image.convert("RGB")


def _gray(image: Image.Image, low: float, white: float, kind: type) -> Image.Image:
    """Pixels of `low` to `low` + `white` as gray of 0 to 255, a band at a time: wide numbers of a
    whole image would fill the memory."""
    out = Image.new("L", image.size)
    top = 0
    for band in _bands(image):
        wide: np.ndarray = band.astype(kind)
        wide = (wide - low if low else wide) * 255
        out.paste(
            Image.fromarray(np.clip(np.rint(wide / white), 0, 255).astype(np.uint8)), (0, top)
        )
        top += len(band)
    return out.convert("RGB")


def _bands(image: Image.Image) -> Iterator[np.ndarray]:
    """The pixels of an image of one channel, about a million at a time, from top to bottom."""
    rows = max(1, (1 << 20) // image.width)
    for top in range(0, image.height, rows):
        yield np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))


_SPACE = re.compile(r"\s+")


def clean_caption(caption: str | bytes | None) -> str | None:
    """A caption as it was meant: decoded, repaired and on one line (the cleaning of CLIP's
    tokenizer, before its lower-casing).

    Bytes that are no UTF-8 become U+FFFD, NULs vanish, more than 8 KiB are cut off, wrongly decoded
    text is repaired (ftfy), HTML entities are resolved (twice, as web captions are often escaped
    twice), white space collapses.

    Args:
        caption: what the source holds.

    Returns:
        The text, or None if nothing is left.

    >>> clean_caption(b"  a &amp;lt;b&amp;gt; cat\\x00\\n on a  mat "), clean_caption(b" \\n"), clean_caption("don\\u2019t")
    ('a <b> cat on a mat', None, "don't")
    """
    if caption is None:
        return None
    import ftfy

    if isinstance(caption, bytes):
        whole = caption[:CAPTION_LIMIT]
        text = whole.decode("utf-8", "replace")
        # a character cut in two is no defect of the caption
        text = text.rstrip("\ufffd") if len(caption) > len(whole) else text
    else:
        text = caption[:CAPTION_LIMIT]
    text = html.unescape(html.unescape(ftfy.fix_text(text.replace("\0", ""))))
    # A lone surrogate is no text and cannot be encoded again.
    text = text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")
    return _SPACE.sub(" ", text).strip() or None
