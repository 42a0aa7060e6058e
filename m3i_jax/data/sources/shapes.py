"""Renders built-in images with classes and captions, so that every part of the framework runs
without a data set.

An image shows one shape, which is its class. Everything else is nuisance: colour, size, position,
rotation, colour and pattern of the background, small lines and blobs behind the shape. Colours are
paired by luminance, so that the shape is visible in gray too, and is brighter than its background
as
often as darker: pixels and simple statistics carry little information about the class, outlines
carry all of it.

The content (class, colours, pattern, size, caption) and the geometry are separate random streams,
so a caption needs no rendering."""

import functools
import math
from typing import NamedTuple, SupportsIndex

import numpy as np
from PIL import Image, ImageDraw

from m3i_jax import schema
from m3i_jax.data.sources.base import Record, stable_digest
from m3i_jax.data.sources.registry import SourceKind, register_source
from m3i_jax.errors import UserError
from m3i_jax.objective.rng import SHAPE, uniforms

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

_VERSION = 1  # of the images, part of the fingerprint; raise it when any image changes
_JITTER = 10  # largest change of a colour channel from image to image
_SCALE = 4  # supersampling factor, for antialiasing
_TILT = math.pi / 6  # largest rotation of a shape, in either direction
_MARKS = 3  # largest number of lines and blobs
GRAIN = 24  # cells per side of the speckled pattern
_CONTENT, _GEOMETRY, _LABELS, _SPECKS = range(4)  # parts of the random stream
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


def color_shades(name: str) -> np.ndarray:
    """Returns the two shades [2, 3] of a background: the colour, and one farther from middle gray
    (nearer for black and white)."""
    rgb = np.array(COLORS[name], float)
    other = {"black": rgb + 50, "white": rgb - 50}.get(
        name, rgb * 0.6 if _luminance(rgb) < 140 else rgb * 0.55 + 255 * 0.45
    )
    return np.stack([rgb, other])


_NAMES = tuple(COLORS)
_SHADES = {name: color_shades(name) for name in _NAMES}
GROUNDS = {
    name: tuple(
        g
        for g in _NAMES
        if np.abs(_luminance(_SHADES[g]) - _luminance(_SHADES[name][0])).min() >= CONTRAST
    )
    for name in _NAMES
}
"""Colour of a shape -> colours that its background may have."""


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
    """The content of an image, which its caption may describe."""

    label: int
    color: str
    ground: str
    pattern: str
    size: float  # diameter of the shape as a share of the side
    caption: str


class ShapesSource:
    """Images of shapes, rendered when they are read. An image depends on the seed and its index
    alone.

    Each eight consecutive images show all eight classes, in random order.

    Args:
        size: number of images.
        side: of an image in pixels, at least 16.
        seed: 0..2^64-1; another seed gives other images and other keys.

    Raises:
        UserError: the size is below 1.
        ValueError: the side or the seed is out of range.

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
        spec = self.what(i)
        return Record(f"shapes-{self.seed}-{i}", self._render(i, spec), spec.label, spec.caption)

    def key(self, index: SupportsIndex) -> str:
        return f"shapes-{self.seed}-{self._at(index)}"

    def caption(self, index: SupportsIndex) -> str:
        return self.what(index).caption

    def what(self, index: SupportsIndex) -> ShapeSpec:
        """Returns the content of image `index` without rendering it.

        >>> spec = ShapesSource(1000).what(7)
        >>> spec.color in COLORS, spec.ground in GROUNDS[spec.color], spec.pattern in PATTERNS
        (True, True, True)
        >>> 0.5 <= spec.size <= 0.85
        True
        """
        i = self._at(index)
        labels = np.argsort(self._uniforms(_LABELS, i // len(CLASSES), len(CLASSES)), kind="stable")
        u = self._uniforms(_CONTENT, i, 8).tolist()
        label, color = int(labels[i % len(CLASSES)]), _pick(_NAMES, u[0])
        ground, pattern, size = (
            _pick(GROUNDS[color], u[1]),
            _pick(PATTERNS, u[2]),
            0.5 + 0.35 * u[3],
        )
        # Every caption names the shape, half of them its colour, half of them the background, so
        # most captions differ by the shape.
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
        """Returns the mask of the shape of image `index`, uint8 [side, side]: 255 inside, 0
        outside, between them on the outline.

        >>> mask = ShapesSource(8, side=32).silhouette(0)
        >>> mask.shape, int(mask.max())
        ((32, 32), 255)
        """
        i = self._at(index)
        return np.array(self._shape(self.what(i), self._geometry(i)))

    def fingerprint(self) -> str:
        return stable_digest("shapes", _VERSION, self.size, self.side, self.seed)

    def description(self) -> str:
        details = f"{self.side} x {self.side} pixels, seed {self.seed}"
        return (
            f"{len(self):,} images in {self.name} ({details}), {len(CLASSES)} classes, captions for"
            " 100%"
        )

    def _at(self, index: SupportsIndex) -> int:
        return range(self.size)[index]  # supports negative indices, raises IndexError

    def _uniforms(self, part: int, first: int, width: int) -> np.ndarray:
        return uniforms(self.seed, SHAPE, first, 1, width, part=part)[0]

    def _geometry(self, i: int) -> list[float]:
        return self._uniforms(_GEOMETRY, i, 16 + 5 * _MARKS).tolist()

    def _render(self, i: int, spec: ShapeSpec) -> np.ndarray:
        u = self._geometry(i)
        first, second = _SHADES[spec.ground] + _shift(u[6:9])
        image = Image.new("RGB", (self.side, self.side), _rgb(first))
        image.paste(_rgb(second), mask=self._field(i, spec.pattern, *u[9:12]))
        # A mark has a colour that the background could have, so it does not hide the outline of the
        # shape.
        image.paste(
            _rgb(_SHADES[_pick(GROUNDS[spec.color], u[12])][0]), mask=self._marks(u[13], u[16:])
        )
        image.paste(_rgb(_SHADES[spec.color][0] + _shift(u[3:6])), mask=self._shape(spec, u))
        return np.array(image)

    def _shape(self, spec: ShapeSpec, u: list[float]) -> Image.Image:
        """Draws the mask of the shape, inside the image."""
        canvas, draw = self._canvas()
        side = self.side * _SCALE
        radius = spec.size * side / 2
        margin = radius + _SCALE
        x, y = (margin + v * (side - 2 * margin) for v in u[:2])
        draw_shape(draw, CLASSES[spec.label], x, y, radius, _TILT * (2 * u[2] - 1))
        return canvas.reduce(_SCALE)

    def _marks(self, count: float, u: list[float]) -> Image.Image:
        """Draws the mask of the small lines and blobs."""
        canvas, draw = self._canvas()
        side = self.side * _SCALE
        for m in range(int(count * (_MARKS + 1))):
            v = u[5 * m : 5 * m + 5]
            x, y, angle = v[0] * side, v[1] * side, 2 * math.pi * v[2]
            if v[3] < 0.6:
                length = (0.05 + 0.2 * v[4]) * side
                dx, dy = length * math.cos(angle), length * math.sin(angle)
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
        """Draws the mask of the second shade of a background."""
        cells = self._uniforms(_SPECKS, i, GRAIN**2) if pattern == "speckled" else None
        return pattern_mask(pattern, self.side, angle, period, phase, cells)


def draw_shape(
    draw: ImageDraw.ImageDraw, name: str, x: float, y: float, radius: float, angle: float
) -> None:
    """Fills the outline of a shape with 255, and its hole with 0.

    Args:
        draw: of an image in mode "L".
        name: one of CLASSES.
        x, y, radius: centre, and a circle around the shape, in pixels.
        angle: in radians.
    """
    c, s = math.cos(angle), math.sin(angle)
    if name in _POLYGONS:
        points = _POLYGONS[name] @ np.array([[c, s], [-s, c]]) * radius + (x, y)
        draw.polygon(points.ravel().tolist(), fill=255)
        return
    draw.circle((x, y), {"circle": 0.8, "ring": 0.95, "crescent": 1.0}[name] * radius, fill=255)
    if name == "ring":
        draw.circle((x, y), 0.55 * radius, fill=0)
    elif name == "crescent":
        draw.circle((x + 0.5 * c * radius, y + 0.5 * s * radius), 0.82 * radius, fill=0)


def pattern_mask(
    pattern: str,
    side: int,
    angle: float,
    period: float,
    phase: float,
    cells: np.ndarray | None = None,
) -> Image.Image:
    """Draws the share of the second shade of a background, 0..255.

    Args:
        pattern: one of PATTERNS.
        side: of the image in pixels.
        angle, period, phase: of the pattern, 0..1.
        cells: GRAIN x GRAIN numbers in 0..1; needed for "speckled".

    >>> pattern_mask("striped", 8, 0.0, 0.5, 0.0).size
    (8, 8)
    """
    if pattern == "plain":
        return Image.new("L", (side, side), int(64 * phase))
    if pattern == "speckled":
        grain = (np.asarray(cells) * 256).astype(np.uint8).reshape(GRAIN, GRAIN)
        return Image.fromarray(grain).resize((side, side), Image.Resampling.BILINEAR)
    y, x = _grid(side)
    c, s = np.float32(math.cos(2 * math.pi * angle)), np.float32(math.sin(2 * math.pi * angle))
    if pattern == "shaded":
        return _mask((x * c + y * s) / (abs(c) + abs(s)))
    # the period as a share of the side
    wave = {"striped": 0.1, "checkered": 0.16, "dotted": 0.12}[pattern] * (1 + period)
    frequency = np.float32(2 * math.pi / wave)
    along = (x * c + y * s) * frequency + np.float32(2 * math.pi * phase)
    if pattern == "striped":
        height = np.sin(along)
    else:
        across = (y * c - x * s) * frequency
        height = (
            np.sin(along) * np.sin(across)
            if pattern == "checkered"
            else np.cos(along) + np.cos(across) - np.float32(0.7)
        )
    # Edges are ramps about a pixel wide instead of steps, for antialiasing.
    return _mask(height * np.float32(wave * side / (2 * math.pi)))


@functools.lru_cache(maxsize=4)
def _grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns y [side, 1] and x [1, side] of pixel centres, as shares of the side, -0.5..0.5."""
    centres = ((np.arange(side) + 0.5) / side - 0.5).astype(np.float32)
    return centres[:, None], centres[None, :]


def _mask(height: np.ndarray) -> Image.Image:
    """Maps -0.5..0.5 linearly to 0..255, clipped."""
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


def _open(path: str, split: str, data: schema.Data, cache: str) -> ShapesSource:
    if path and not path.isdecimal():
        raise UserError(
            f"shapes:{path}: the built-in shapes have no path: give their number, such as"
            " shapes:10000"
        )
    return ShapesSource(int(path) if path else data.size, side=3 * data.image_size // 2)


register_source(SourceKind(name="shapes", open=_open, reads=("size",), splits=False))
