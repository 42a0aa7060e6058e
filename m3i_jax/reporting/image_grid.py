"""Drawing for the figures of a run: tiles of one size, colours, text that fits, and an atomically
written PNG.

Images of at most SMALL pixels are enlarged by an integer factor without interpolation, so that
every pixel is one that the model reads; larger ones are reduced with an antialiased bicubic filter.
The
width of a tile is a multiple of the grid: maps of cells line up with the images beside them."""

import functools
import math
import os
import unicodedata

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from m3i_jax import run_files

TILE = 112  # approximate side of a tile, pixels
SMALL = 128  # images up to this side are never reduced
COARSE = 8  # maps of fewer cells a side are interpolated: squares would hide what they show
GAP, MARGIN = 8, 24
Color = tuple[int, int, int]
PAPER, FRAME, RULE = (252, 252, 250), (214, 214, 209), (228, 228, 224)
INK, MUTED = (38, 40, 44), (118, 121, 127)
# orange and blue differ for colour-blind readers too
OWN, PARTNER, HIDDEN = (228, 135, 62), (70, 118, 178), (224, 224, 220)

# besides ASCII, Pillow's font has these; other letters become similar ones, or "?"
GLYPHS = frozenset("©«°±´·»‘’“”…‹›⁄")
SPELT = str.maketrans(
    {
        **dict.fromkeys("–—−‐‑", "-"),
        "×": "x",
        "ß": "ss",
        "æ": "ae",
        "œ": "oe",
        "ø": "o",
        "Ø": "O",
        "ł": "l",
        "Ł": "L",
    }
)


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's built-in font: the same on every machine."""
    face = ImageFont.load_default(size)
    assert isinstance(face, ImageFont.FreeTypeFont)
    return face


def square_side(cells: int) -> int:
    """Returns the side of a square grid of cells.

    >>> square_side(196)
    14
    """
    side = math.isqrt(cells)
    if side * side != cells:
        raise ValueError(f"{cells} cells are not a square grid")
    return side


def side_of_tile(size: int, grid: int) -> int:
    """Returns the side in pixels of the tiles for images of side `size` with grid x grid cells:
    about TILE, and a multiple of the grid.

    >>> side_of_tile(224, 14), side_of_tile(384, 24), side_of_tile(32, 4)
    (112, 120, 128)
    """
    if size <= SMALL and size % grid == 0:
        return size * max(1, round(TILE / size))
    return grid * max(1, round(TILE / grid))


def image_tile(pixels_SxSx3: np.ndarray, side: int) -> Image.Image:
    """Returns an image, uint8, as a tile."""
    image, size = Image.fromarray(np.ascontiguousarray(pixels_SxSx3)), pixels_SxSx3.shape[0]
    integer = side % size == 0
    return image.resize(
        (side, side), Image.Resampling.NEAREST if integer else Image.Resampling.BICUBIC
    )


def upsample_cells(cells_Nx: np.ndarray, side: int) -> np.ndarray:
    """Returns cells [N, ...] of a row-major grid as an image [side, side, ...], each a uniform
    square.

    >>> upsample_cells(np.arange(4), 4)
    array([[0, 0, 1, 1],
           [0, 0, 1, 1],
           [2, 2, 3, 3],
           [2, 2, 3, 3]])
    """
    grid = square_side(len(cells_Nx))
    index = np.arange(side) * grid // side
    return cells_Nx.reshape(grid, grid, *cells_Nx.shape[1:])[index][:, index]


def color_tile(rgb_Nx3: np.ndarray, side: int) -> Image.Image:
    """Returns a map of cell colours, 0..1, as a tile: a square a cell, or, of fewer than COARSE x
    COARSE cells, interpolated between their centres, so that it can be compared with the image.

    >>> color_tile(np.eye(3)[[0, 0, 2, 2]], 8).getpixel((0, 4))
    (96, 0, 159)
    """
    return _map_tile((np.clip(rgb_Nx3, 0, 1) * 255).round().astype(np.uint8), side)


def _map_tile(colour_Nx3: np.ndarray, side: int) -> Image.Image:
    grid = square_side(len(colour_Nx3))
    if grid >= COARSE:
        return Image.fromarray(upsample_cells(colour_Nx3, side))
    cells = Image.fromarray(np.ascontiguousarray(colour_Nx3.reshape(grid, grid, 3)))
    return cells.resize((side, side), Image.Resampling.BILINEAR)


def mask_tile(
    mask_N: np.ndarray, side: int, own: Color = OWN, other: Color = PARTNER
) -> Image.Image:
    """Returns a mask as a tile (True: the own image), with grid lines if the cells are wide
    enough."""
    pixels = upsample_cells(
        np.where(mask_N[:, None], np.array(own, np.uint8), np.array(other, np.uint8)), side
    )
    cell = side // square_side(len(mask_N))
    if cell >= 6:  # narrower cells would be mostly line
        pixels[cell::cell] = PAPER
        pixels[:, cell::cell] = PAPER
    return Image.fromarray(pixels)


# colours from share 0 to 1
_HEAT = np.array(
    [(244, 244, 240), (252, 214, 140), (238, 134, 73), (178, 51, 92), (72, 20, 84)], np.float64
)


def heat_tile(share: float) -> Color:
    """Returns the colour of a share in 0..1, from light grey through orange to violet, with
    decreasing lightness.

    >>> heat_tile(0.0), heat_tile(1.0)
    ((244, 244, 240), (72, 20, 84))
    """
    r, g, b = _heat(np.array([share]))[0].tolist()
    return r, g, b


def _heat(share_N: np.ndarray) -> np.ndarray:
    at = np.clip(np.nan_to_num(share_N), 0, 1) * (len(_HEAT) - 1)
    return (
        np.stack([np.interp(at, np.arange(len(_HEAT)), channel) for channel in _HEAT.T], -1)
        .round()
        .astype(np.uint8)
    )


def weight_tile(weight_N: np.ndarray, side: int) -> Image.Image:
    """Returns a map of weights as a tile like those of `color_tile`; the largest has the darkest
    colour, 0 the lightest."""
    largest = np.nanmax(weight_N) if np.isfinite(weight_N).any() else 0
    return _map_tile(_heat(weight_N / largest if largest > 0 else np.zeros_like(weight_N)), side)


def ink_color(text: str) -> str:
    """Returns text on one line, with characters that the font has.

    >>> ink_color("Café – Straße\\nün 猫")
    'Cafe - Strasse un ?'
    """
    plain = unicodedata.normalize("NFKD", " ".join(text.split()).translate(SPELT))
    kept = (
        c if " " <= c <= "~" or c in GLYPHS else "?" for c in plain if not unicodedata.combining(c)
    )
    return "".join(kept)


def elide_text(text: str, width: float, face: ImageFont.FreeTypeFont) -> str:
    """Returns the text, or its longest beginning with an ellipsis that fits a width in pixels.

    >>> elide_text("a dog on a beach", 60, font(12))
    'a dog on…'
    """
    text = ink_color(text)
    if face.getlength(text) <= width:
        return text
    low, high = 0, len(text)  # the longest beginning that fits, by bisection
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (
            (middle, high)
            if face.getlength(text[:middle].rstrip() + "…") <= width
            else (low, middle - 1)
        )
    return text[:low].rstrip() + "…" if low else ""


def wrap_text(text: str, width: float, face: ImageFont.FreeTypeFont) -> list[str]:
    """Returns the text as lines that fit a width in pixels; a wider word gets its own line.

    >>> wrap_text("a dog on a beach", 60, font(12))
    ['a dog on a', 'beach']
    """
    lines: list[str] = []
    for word in ink_color(text).split():
        if lines and face.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


class ImageGrid:
    """A canvas for tiles and text; positions in pixels from the top left, of text at its
    baseline."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width, height), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def tile(self, x: int, y: int, tile: Image.Image) -> None:
        """Draw a tile with a hairline frame outside of it."""
        self.draw.rectangle((x - 1, y - 1, x + tile.width, y + tile.height), outline=FRAME)
        self.image.paste(tile, (x, y))

    def words(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 12,
        ink: Color = INK,
        width: float = math.inf,
        anchor: str = "ls",
    ) -> float:
        """Draw text on the baseline y, elided to a width; returns its width."""
        text = elide_text(text, width, font(size))
        self.draw.text((x, y), text, fill=ink, font=font(size), anchor=anchor)
        return font(size).getlength(text)

    def chip(self, x: int, y: int, colour: Color, size: int = 8) -> None:
        """Draw a small square of a colour on the baseline y, as a legend."""
        self.draw.rectangle((x, y - size, x + size - 1, y - 1), fill=colour)

    def rule(self, left: int, right: int, y: int) -> None:
        """Draw a horizontal hairline."""
        self.draw.line((left, y, right, y), fill=RULE)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a PNG atomically. Raises UserError if the file cannot be written."""
        with run_files.atomic_file(path) as temporary:
            self.image.save(temporary, format="PNG")
