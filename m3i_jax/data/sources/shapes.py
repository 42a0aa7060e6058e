"""Built-in images with categories and captions, so that every part of the framework runs where
there is no data set.

An image shows one shape, and the shape is the category. All else is nuisance: colour, size, place,
rotation, the background's colour and pattern, small lines and blobs behind the shape. Colours are
paired by luminance, so that the shape is visible also in gray, and brighter than its background as
often as darker: pixels and simple statistics say little about the category, outlines say
everything.

What an image shows (category, colours, pattern, size, caption) and where are separate streams of
randomness: a caption costs no rendering."""

import functools
import math
from typing import NamedTuple, SupportsIndex

import numpy as np
from PIL import Image, ImageDraw

from m3i_jax.data.sources.base import Record, stable_digest
from m3i_jax.errors import UserError
from m3i_jax.objective.masks import SHAPE, uniforms

CLASSES = ("circle", "square", "triangle", "star", "cross", "ring", "crescent", "heart")
PATTERNS = ("plain", "shaded", "striped", "checkered", "dotted", "speckled")
COLORS = {
    "red": (205, 30, 35),
    "orange": (245, 140, 30),
    "yellow": (248, 220, 60),
    "green": (30, 135, 55),
    "cyan": (60, 200, 215),
    "blue": (25, 55, 190),
    "purple": (110, 35, 150),
    "pink": (250, 150, 195),
    "brown": (100, 58, 28),
    "white": (245, 245, 245),
    "gray": (120, 120, 120),
    "black": (25, 25, 25),
}
# least difference of luminance (0..255) between a shape and either shade of its background, before
# jitter
CONTRAST = 60

_VERSION = 1  # of the images, part of the fingerprint: raise it when any of them changes
_JITTER = 10  # a colour's channels differ by at most this from image to image
_SCALE = 4  # drawn so many times larger, then averaged: antialiasing
_TILT = math.pi / 6  # a shape is turned by at most this, either way
_MARKS = 3  # lines and blobs at most
_GRAIN = 24  # cells a side of the speckled pattern
_WHAT, _WHERE, _DEAL, _SPECKS = range(4)  # parts of the random stream
_TEMPLATES = (
    "{thing} on {ground} background",
    "{thing} in front of {ground} background",
    "a picture of {thing} on {ground} background",
    "there is {thing} on {ground} background",
    "{ground} background with {thing}",
    "{ground} background, and on it {thing}",
)
_SHORT = ("{thing}", "a picture of {thing}", "there is {thing}")


def _luminance(rgb: np.ndarray) -> np.ndarray:
    return rgb @ np.array([0.299, 0.587, 0.114])


def _shades(name: str) -> np.ndarray:
    """Two shades [2, 3] of a background: the colour, and one away from middle gray (towards it for
    black and white)."""
    rgb = np.array(COLORS[name], float)
    other = {"black": rgb + 50, "white": rgb - 50}.get(
        name, rgb * 0.6 if _luminance(rgb) < 140 else rgb * 0.55 + 255 * 0.45
    )
    return np.stack([rgb, other])


_NAMES = tuple(COLORS)
_SHADES = {name: _shades(name) for name in _NAMES}
GROUNDS = {
    name: tuple(
        g
        for g in _NAMES
        if np.abs(_luminance(_SHADES[g]) - _luminance(_SHADES[name][0])).min() >= CONTRAST
    )
    for name in _NAMES
}
"""For every colour of a shape the colours that its background may have."""


def _corners(radii: tuple[float, ...]) -> np.ndarray:
    angle = 2 * np.pi * np.arange(len(radii)) / len(radii)
    return np.array(radii)[:, None] * np.stack([np.sin(angle), -np.cos(angle)], -1)


def _cross(arm: float = 0.32) -> np.ndarray:
    quarter = np.array([(arm, -1.0), (arm, -arm), (1.0, -arm)])
    turns = [np.array([[c, -s], [s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
    return np.concatenate([quarter @ turn.T for turn in turns]) / math.hypot(1, arm)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    points = np.stack([16 * np.sin(t) ** 3, y - 1.3], -1)
    return points / np.hypot(*points.T).max()


_POLYGONS = {
    "square": _corners((0.95,) * 4),
    "triangle": _corners((1.0,) * 3),
    "star": _corners((1.0, 0.42) * 5),
    "cross": _cross(),
    "heart": _heart(),
}


class ShapeSpec(NamedTuple):
    """What an image shows: all that its caption may tell."""

    label: int
    color: str
    ground: str
    pattern: str
    size: float  # diameter of the shape as a share of the side
    caption: str


class ShapesSource:
    """Pictures of shapes, rendered when they are read; the same for the same seed and index,
    whatever the size and the order of reading.

    In every eight consecutive images every category occurs once, in random order.

    Args:
        size: number of images.
        side: of an image in pixels, at least 16.
        seed: 0..2^64-1; another seed gives other images, with other keys.

    Raises:
        UserError: there is nothing to render.
        ValueError: side or seed out of its range.

    >>> source = ShapesSource(1000)
    >>> record = source[7]
    >>> record.key, record.image.shape, source.classes[record.label]
    ('shapes-0-7', (96, 96, 3), 'square')
    >>> record.caption == source.caption(7), source.classes[record.label] in record.caption
    (True, True)
    """

    def __init__(self, size: int, side: int = 96, seed: int = 0) -> None:
        if size < 1:
            raise UserError(
                f"data.size={size} renders no image, and data.source='shapes' has no others: give a"
                " number such as 10000"
            )
        if side < 16 or not 0 <= seed < 2**64:
            raise ValueError(
                f"side {side}, seed {seed}: a side is at least 16 pixels, a seed 0..2^64-1"
            )
        self.size, self.side, self.seed = size, side, seed
        self.name, self.classes, self.captions = "shapes", CLASSES, True

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: SupportsIndex) -> Record:
        i = self._at(index)
        what = self.what(i)
        return Record(f"shapes-{self.seed}-{i}", self._render(i, what), what.label, what.caption)

    def key(self, index: SupportsIndex) -> str:
        return f"shapes-{self.seed}-{self._at(index)}"

    def caption(self, index: SupportsIndex) -> str:
        return self.what(index).caption

    def what(self, index: SupportsIndex) -> ShapeSpec:
        """What image `index` shows, without rendering it.

        >>> what = ShapesSource(1000).what(7)
        >>> what.color in COLORS, what.ground in GROUNDS[what.color], what.pattern in PATTERNS, 0.5 <= what.size <= 0.85
        (True, True, True, True)
        """
        i = self._at(index)
        deal = np.argsort(self._uniforms(_DEAL, i // len(CLASSES), len(CLASSES)), kind="stable")
        u = self._uniforms(_WHAT, i, 8).tolist()
        label, color = int(deal[i % len(CLASSES)]), _pick(_NAMES, u[0])
        ground, pattern, size = (
            _pick(GROUNDS[color], u[1]),
            _pick(PATTERNS, u[2]),
            0.5 + 0.35 * u[3],
        )
        # Every caption names the shape, half of them its colour, half the background: what tells
        # most captions apart is the shape.
        words = f"{color} {CLASSES[label]}" if u[6] < 0.5 else CLASSES[label]
        if u[4] < 0.5:
            words = (
                f"{'small' if size < 0.6 else 'large' if size > 0.75 else 'medium-sized'} {words}"
            )
        caption = _pick(_TEMPLATES if u[7] < 0.5 else _SHORT, u[5]).format(
            thing=_a(words), ground=_a(f"{pattern} {ground}")
        )
        return ShapeSpec(label, color, ground, pattern, size, caption)

    def silhouette(self, index: SupportsIndex) -> np.ndarray:
        """uint8 [side, side]: 255 where image `index` shows its shape, 0 where it shows background,
        between them on the outline.

        >>> mask = ShapesSource(8, side=32).silhouette(0)
        >>> mask.shape, int(mask.max())
        ((32, 32), 255)
        """
        i = self._at(index)
        return np.array(self._shape(self.what(i), self._where(i)))

    def fingerprint(self) -> str:
        return stable_digest("shapes", _VERSION, self.size, self.side, self.seed)

    def description(self) -> str:
        about = f"{self.side} x {self.side} pixels, seed {self.seed}"
        return (
            f"{len(self):,} images in {self.name} ({about}), {len(CLASSES)} classes, captions for"
            " 100%"
        )

    def _at(self, index: SupportsIndex) -> int:
        return range(self.size)[index]  # counts negative indices from the end, raises IndexError

    def _uniforms(self, part: int, first: int, width: int) -> np.ndarray:
        return uniforms(self.seed, SHAPE, first, 1, width, part=part)[0]

    def _where(self, i: int) -> list[float]:
        return self._uniforms(_WHERE, i, 16 + 5 * _MARKS).tolist()

    def _render(self, i: int, what: ShapeSpec) -> np.ndarray:
        u = self._where(i)
        first, second = _SHADES[what.ground] + _shift(u[6:9])
        picture = Image.new("RGB", (self.side, self.side), _rgb(first))
        picture.paste(_rgb(second), mask=self._field(i, what.pattern, *u[9:12]))
        # A mark has a colour that the background could have had: it must not hide the shape's
        # outline.
        picture.paste(
            _rgb(_SHADES[_pick(GROUNDS[what.color], u[12])][0]), mask=self._marks(u[13], u[16:])
        )
        picture.paste(_rgb(_SHADES[what.color][0] + _shift(u[3:6])), mask=self._shape(what, u))
        return np.array(picture)

    def _shape(self, what: ShapeSpec, u: list[float]) -> Image.Image:
        """The silhouette, at a place that keeps it inside the image."""
        canvas, draw = self._canvas()
        name, side = CLASSES[what.label], self.side * _SCALE
        radius = what.size * side / 2
        margin = radius + _SCALE
        x, y = (margin + v * (side - 2 * margin) for v in u[:2])
        turn = _TILT * (2 * u[2] - 1)
        c, s = math.cos(turn), math.sin(turn)
        if name in _POLYGONS:
            points = _POLYGONS[name] @ np.array([[c, s], [-s, c]]) * radius + (x, y)
            draw.polygon(points.ravel().tolist(), fill=255)
            return canvas.reduce(_SCALE)
        draw.circle((x, y), {"circle": 0.8, "ring": 0.95, "crescent": 1.0}[name] * radius, fill=255)
        if name == "ring":
            draw.circle((x, y), 0.55 * radius, fill=0)
        elif name == "crescent":
            draw.circle((x + 0.5 * c * radius, y + 0.5 * s * radius), 0.82 * radius, fill=0)
        return canvas.reduce(_SCALE)

    def _marks(self, count: float, u: list[float]) -> Image.Image:
        """The mask of small lines and blobs."""
        canvas, draw = self._canvas()
        side = self.side * _SCALE
        for m in range(int(count * (_MARKS + 1))):
            v = u[5 * m : 5 * m + 5]
            x, y, angle = v[0] * side, v[1] * side, 2 * math.pi * v[2]
            if v[3] < 0.6:
                dx, dy = (
                    (0.05 + 0.2 * v[4]) * side * math.cos(angle),
                    (0.05 + 0.2 * v[4]) * side * math.sin(angle),
                )
                draw.line(
                    (x - dx, y - dy, x + dx, y + dy),
                    fill=255,
                    width=round((0.01 + 0.02 * v[4]) * side),
                )
            else:
                rx, ry = (0.015 + 0.035 * v[4]) * side, (0.015 + 0.035 * v[2]) * side
                draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=255)
        return canvas.reduce(_SCALE)

    def _canvas(self) -> tuple[Image.Image, ImageDraw.ImageDraw]:
        canvas = Image.new("L", (self.side * _SCALE,) * 2)
        return canvas, ImageDraw.Draw(canvas)

    def _field(
        self, i: int, pattern: str, angle: float, period: float, phase: float
    ) -> Image.Image:
        """The mask of a background's second shade."""
        if pattern == "plain":
            return Image.new("L", (self.side, self.side), int(64 * phase))
        if pattern == "speckled":
            cells = (
                (self._uniforms(_SPECKS, i, _GRAIN**2) * 256)
                .astype(np.uint8)
                .reshape(_GRAIN, _GRAIN)
            )
            return Image.fromarray(cells).resize((self.side, self.side), Image.Resampling.BILINEAR)
        y, x = _grid(self.side)
        c, s = np.float32(math.cos(2 * math.pi * angle)), np.float32(math.sin(2 * math.pi * angle))
        if pattern == "shaded":
            return _mask((x * c + y * s) / (abs(c) + abs(s)))
        # a period, as a share of the side
        wave = {"striped": 0.1, "checkered": 0.16, "dotted": 0.12}[pattern] * (1 + period)
        turn = np.float32(2 * math.pi / wave)
        along = (x * c + y * s) * turn + np.float32(2 * math.pi * phase)
        if pattern == "striped":
            height = np.sin(along)
        else:
            across = (y * c - x * s) * turn
            height = (
                np.sin(along) * np.sin(across)
                if pattern == "checkered"
                else np.cos(along) + np.cos(across) - np.float32(0.7)
            )
        # Edges are ramps about a pixel wide instead of steps: antialiasing.
        return _mask(height * np.float32(wave * self.side / (2 * math.pi)))


@functools.lru_cache(maxsize=4)
def _grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres as shares of the side, -0.5..0.5: [side, 1] and [1, side]."""
    at = ((np.arange(side) + 0.5) / side - 0.5).astype(np.float32)
    return at[:, None], at[None, :]


def _mask(height: np.ndarray) -> Image.Image:
    """-0.5 and less: 0, 0.5 and more: 255."""
    return Image.fromarray(
        np.clip(height * np.float32(255) + np.float32(128), 0, 255).astype(np.uint8)
    )


def _pick(options: tuple[str, ...], u: float) -> str:
    return options[int(u * len(options))]


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _shift(u: list[float]) -> np.ndarray:
    return _JITTER * (2 * np.array(u) - 1)


def _rgb(color: np.ndarray) -> tuple[int, int, int]:
    r, g, b = np.clip(np.rint(color), 0, 255).astype(int).tolist()
    return r, g, b
