"""Renders built-in scenes with boxes, masks and class maps, so that segmentation and detection run
without a data set.

A scene shows up to six of the built-in shapes before a patterned background. Shapes reach out of
the image and hide each other; classes are as frequent as 1 / rank. One scene in twenty shows no
shape; one in ten has a heap of small shapes, annotated as a crowd; one in seven has a gray panel,
which the map leaves unlabelled as it does the blended pixels of an outline. Masks and map are
exact: they come from the layers that the image is composed of."""

import dataclasses
import functools
import math
from typing import SupportsIndex

import numpy as np
from PIL import Image, ImageDraw

from m3i_jax import schema
from m3i_jax.data.sources import segmentations, shapes
from m3i_jax.data.sources.base import Record, stable_digest
from m3i_jax.data.sources.objects import Objects, ObjectTable, empty_objects
from m3i_jax.data.sources.registry import SourceKind, register_source
from m3i_jax.errors import UserError
from m3i_jax.objective.rng import SCENE, uniforms

MAP_CLASSES = shapes.CLASSES + tuple(f"{pattern} ground" for pattern in shapes.PATTERNS)
UNLABELLED = 255
LEAST_PIXELS = 16  # of an annotated object; smaller ones are in the map alone

_VERSION = 1  # of the scenes, part of the fingerprint; raise it when any scene changes
_SCALE = 4  # supersampling factor, for antialiasing
_MOST = 6  # shapes of a scene
_HEAP = 10  # shapes of a crowd
_WEIGHTS = 1 / np.arange(1, len(shapes.CLASSES) + 1)
_CONTENT, _SPECKS = range(2)  # parts of the random stream
_WIDTH = 16 + 6 * _MOST + 4 * _HEAP  # random numbers of the content
_TILT = math.pi / 6


@dataclasses.dataclass(frozen=True, slots=True)
class SceneLayer:
    """A shape of a scene. `x`, `y` and `radius` are in pixels; a layer of the heap is part of the
    crowd."""

    label: int
    color: str
    x: float
    y: float
    radius: float
    angle: float
    heap: bool


class ScenesSource:
    """Scenes, rendered when they are read. A scene depends on the seed and its index alone.

    `classes` are those of the objects; `map_classes` those of the map, which begin with them.

    Args:
        size: number of scenes.
        side: of the longer side of a scene in pixels, at least 32. Half of the scenes are square,
            the others lie or stand, 4 : 3.
        seed: 0..2^64-1; another seed gives other scenes and other keys.

    Raises:
        UserError: the size is below 1.
        ValueError: the side or the seed is out of range.

    >>> record = ScenesSource(100)[7]
    >>> record.key, record.image.shape, record.map.shape
    ('scenes-0-7', (96, 72, 3), (96, 72))
    >>> [shapes.CLASSES[label] for label in record.objects.classes]
    ['square', 'crescent', 'circle', 'heart', 'circle', 'triangle']
    """

    def __init__(self, size: int, side: int = 96, seed: int = 0) -> None:
        if size < 1:
            raise UserError(
                f"data.size={size} renders no image, and data.source='scenes' has no others: give a"
                " number such as 2000"
            )
        if side < 32 or not 0 <= seed < 2**64:
            raise ValueError(
                f"side {side}, seed {seed}: a side is at least 32 pixels, a seed 0..2^64-1"
            )
        self.size, self.side, self.seed = size, side, seed
        self.name, self.classes, self.captions = "scenes", shapes.CLASSES, False
        self.map_classes = MAP_CLASSES

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: SupportsIndex) -> Record:
        i = self._at(index)
        image, objects, map_HxW = self._render(i)
        return Record(self.key(i), image, objects=objects, map=map_HxW)

    def key(self, index: SupportsIndex) -> str:
        return f"scenes-{self.seed}-{self._at(index)}"

    def object_table(self) -> ObjectTable:
        """Returns the objects of all scenes, those that are hidden included."""
        return _object_table(self.size, self.side, self.seed)

    def fingerprint(self) -> str:
        return stable_digest("scenes", _VERSION, self.size, self.side, self.seed)

    def description(self) -> str:
        return (
            f"{len(self):,} images in {self.name} ({self.side} pixels, seed {self.seed}),"
            f" {len(self.classes)} classes of objects, {len(MAP_CLASSES)} of the map"
        )

    def layers(self, index: SupportsIndex) -> list[SceneLayer]:
        """Returns the shapes of a scene without rendering it, the hindmost first.

        >>> [layer.label for layer in ScenesSource(100).layers(7)]
        [1, 6, 0, 7, 0, 2]
        """
        i = self._at(index)
        u = self._content(i)
        height, width = self._shape(u)
        ground = _pick(shapes.PATTERNS, u[1]), self._ground(u)
        colors = tuple(c for c in shapes.COLORS if ground[1] in shapes.GROUNDS[c])
        found: list[SceneLayer] = []
        if u[5] < 0.1:
            label, color = _class(u[6]), _pick(colors, u[7])
            middle = width * (0.2 + 0.6 * u[8]), height * (0.2 + 0.6 * u[9])
            for h in range(_HEAP):
                v = u[16 + 6 * _MOST + 4 * h :]
                x, y = (m + 0.3 * self.side * (w - 0.5) for m, w in zip(middle, v, strict=False))
                found.append(
                    SceneLayer(label, color, x, y, 0.055 * self.side, _TILT * (2 * v[2] - 1), True)
                )
        for m in range(0 if u[3] < 0.05 else 1 + int(_MOST * u[4])):
            v = u[16 + 6 * m :]
            radius = self.side * 0.09 * 3.4 ** v[2]  # diameters of 0.18 to 0.61 of the side
            angle = _TILT * (2 * v[3] - 1)
            found.append(
                SceneLayer(
                    _class(v[4]),
                    _pick(colors, v[5]),
                    width * v[0],
                    height * v[1],
                    radius,
                    angle,
                    False,
                )
            )
        return found

    def _at(self, index: SupportsIndex) -> int:
        return range(self.size)[index]  # supports negative indices, raises IndexError

    def _content(self, i: int) -> list[float]:
        return uniforms(self.seed, SCENE, i, 1, _WIDTH, part=_CONTENT)[0].tolist()

    def _shape(self, u: list[float]) -> tuple[int, int]:
        short = 3 * self.side // 4
        lies, stands = (short, self.side), (self.side, short)
        return (self.side, self.side) if u[0] < 0.5 else lies if u[0] < 0.75 else stands

    def _ground(self, u: list[float]) -> str:
        return _pick(tuple(shapes.COLORS), u[2])

    def _render(self, i: int) -> tuple[np.ndarray, Objects, np.ndarray]:
        u = self._content(i)
        height, width = self._shape(u)
        pattern = _pick(shapes.PATTERNS, u[1])
        specks = None
        if pattern == "speckled":
            specks = uniforms(self.seed, SCENE, i, 1, shapes.GRAIN**2, part=_SPECKS)[0]
        first, second = shapes.color_shades(self._ground(u))
        image = Image.new("RGB", (self.side, self.side), _rgb(first))
        image.paste(
            _rgb(second), mask=shapes.pattern_mask(pattern, self.side, u[10], u[11], u[12], specks)
        )
        image = image.crop((0, 0, width, height))
        stuff = len(shapes.CLASSES) + shapes.PATTERNS.index(pattern)
        map_HxW = np.full((height, width), stuff, np.uint8)
        if u[13] < 1 / 7:
            left, top = int(0.7 * width * u[14]), int(0.7 * height * u[15])
            right, bottom = left + 3 * width // 10, top + 3 * height // 10
            image.paste((128, 128, 128), (left, top, right, bottom))
            map_HxW[top:bottom, left:right] = UNLABELLED
        owner = np.full((height, width), -1, np.int32)  # the layer that is in front
        layers = self.layers(i)
        for number, layer in enumerate(layers):
            _paint(image, layer, number, map_HxW, owner)
        return np.array(image), _annotate(layers, owner), map_HxW


def _paint(
    image: Image.Image, layer: SceneLayer, number: int, map_HxW: np.ndarray, owner: np.ndarray
) -> None:
    """Draws a layer in front of a scene, its map and the numbers of its layers."""
    height, width = map_HxW.shape
    side = 2 * math.ceil(layer.radius) + 4
    left, top = math.floor(layer.x) - side // 2, math.floor(layer.y) - side // 2
    patch = Image.new("L", (side * _SCALE,) * 2)
    shapes.draw_shape(
        ImageDraw.Draw(patch),
        shapes.CLASSES[layer.label],
        (layer.x - left) * _SCALE,
        (layer.y - top) * _SCALE,
        layer.radius * _SCALE,
        layer.angle,
    )
    alpha = Image.new("L", (width, height))
    alpha.paste(patch.reduce(_SCALE), (left, top))
    image.paste(_rgb(shapes.color_shades(layer.color)[0]), mask=alpha)
    alpha_HxW = np.asarray(alpha)
    map_HxW[alpha_HxW > 0] = UNLABELLED  # blended
    map_HxW[alpha_HxW == 255] = layer.label
    owner[alpha_HxW >= 128] = number


def _annotate(layers: list[SceneLayer], owner: np.ndarray) -> Objects:
    """Returns the objects of the visible layers; the heap is one, a crowd."""
    groups: list[list[int]] = [[n] for n, layer in enumerate(layers) if not layer.heap]
    if heap := [n for n, layer in enumerate(layers) if layer.heap]:
        groups.append(heap)
    rows = []
    for numbers in groups:
        mask = np.isin(owner, numbers)
        if (area := int(mask.sum())) < LEAST_PIXELS:
            continue
        layer = layers[numbers[0]]
        rows.append((segmentations.tight_box(mask), layer.label, layer.heap, mask, area))
    if not rows:
        return empty_objects(owner.shape)  # type: ignore[arg-type]
    boxes, labels, heaps, masks, areas = zip(*rows, strict=True)
    return Objects(
        np.array(boxes, np.float32),
        np.array(labels, np.int32),
        np.array(heaps, bool),
        tuple(map(segmentations.encode_mask, masks)),
        np.array(areas, np.float64),
        np.arange(len(rows), dtype=np.int64),
        owner.shape,  # type: ignore[arg-type]
    )


@functools.lru_cache(maxsize=4)
def _object_table(size: int, side: int, seed: int) -> ObjectTable:
    source = ScenesSource(size, side, seed)
    rows = []
    for i in range(size):
        layers = source.layers(i)
        rows += [(i, layer.label, False) for layer in layers if not layer.heap]
        rows += [(i, layer.label, True) for layer in layers if layer.heap][:1]
    records, classes, crowd = np.array(rows, np.int64).reshape(-1, 3).T
    return ObjectTable(records, classes.astype(np.int32), crowd.astype(bool))


def _class(u: float) -> int:
    return int(np.searchsorted(_WEIGHTS.cumsum() / _WEIGHTS.sum(), u, side="right"))


def _pick(options: tuple[str, ...], u: float) -> str:
    return options[int(u * len(options))]


def _rgb(color: np.ndarray) -> tuple[int, int, int]:
    r, g, b = np.clip(np.rint(color), 0, 255).astype(int).tolist()
    return r, g, b


def _open(path: str, split: str, data: schema.Data, cache: str) -> ScenesSource:
    if path and not path.isdecimal():
        raise UserError(
            f"scenes:{path}: the built-in scenes have no path: give their number, such as"
            " scenes:2000"
        )
    return ScenesSource(int(path) if path else data.size, side=max(32, data.image_size))


register_source(SourceKind(name="scenes", open=_open, reads=("size",), splits=False))
