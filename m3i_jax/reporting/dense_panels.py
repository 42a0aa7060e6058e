"""Sheets of images with objects or class maps: ground truth beside predictions, 1024 pixels wide.

Every class has one colour, the same in all figures. Objects are drawn after the image is enlarged,
so that lines and words stay sharp; words move so that they do not cover each other."""

import colorsys
import dataclasses
import functools
import os
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from m3i_jax.reporting import image_grid
from m3i_jax.reporting.image_grid import GAP, INK, MARGIN, MUTED, PAPER, Color

WIDTH = 1024  # pixels of a sheet
PAIR_SMALL = 176  # images up to this side are shown two pairs a row
LINE, HEAD, BETWEEN = 17, 30, 24  # pixels: line height, titles, between pairs
UNKNOWN = 255  # label of pixels that do not count
_UNKNOWN_COLOR, _WRONG, _RIGHT = (172, 172, 168), (206, 52, 60), (238, 238, 234)
_FILL, _MAP = 0.34, 0.68  # opacity of masks; of class maps
# the first classes: neighbours in the list differ in hue and lightness
_FIRST: tuple[Color, ...] = (
    (52, 118, 196), (240, 138, 44), (44, 156, 92), (206, 52, 60), (132, 92, 190), (24, 176, 190),
    (240, 196, 40), (226, 104, 168), (122, 84, 52), (132, 186, 52), (26, 68, 130), (250, 164, 138),
    (20, 108, 84), (168, 128, 222), (150, 34, 80), (116, 190, 240), (176, 144, 20), (96, 106, 116),
    (150, 216, 170), (196, 96, 40),
)  # fmt: skip


@functools.cache
def category_color(label: int) -> Color:
    """Returns the colour of a class, the same in every figure; the first 20 are chosen, the others
    have hues in steps of the golden angle, in three lightnesses.

    >>> category_color(0), category_color(0) == category_color(20)
    ((52, 118, 196), False)
    """
    if label < len(_FIRST):
        return _FIRST[label]
    number = label - len(_FIRST)
    light, saturation = ((0.46, 0.62), (0.64, 0.72), (0.30, 0.70))[number % 3]
    r, g, b = colorsys.hls_to_rgb(number * 0.381966 % 1, light, saturation)
    return round(255 * r), round(255 * g), round(255 * b)


def text_color(background: Color) -> Color:
    """White or dark ink, whichever is easier to read on a colour.

    >>> text_color((0, 0, 90)), text_color((250, 240, 60))
    ((255, 255, 255), (38, 40, 44))
    """
    r, g, b = background
    return (255, 255, 255) if 0.299 * r + 0.587 * g + 0.114 * b < 150 else INK


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawnObjects:
    """The objects of an image, or detections.

    Attributes:
      boxes: [n, 4], x0 y0 x1 y1 in pixels of the image.
      classes: int [n].
      scores: [n], for detections.
      masks: bool [H, W] of each, or None.
      crowd: bool [n]: drawn with dashed lines.
    """

    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray | None = None
    masks: Sequence[np.ndarray | None] | None = None
    crowd: np.ndarray | None = None


def shown_detections(found: DrawnObjects, *, score: float = 0.5, most: int = 12) -> DrawnObjects:
    """Returns the detections to draw, by descending score: at most `most` of at least `score`; if
    there are none, the three best.

    >>> found = DrawnObjects(boxes=np.zeros((4, 4)), classes=np.arange(4),
    ...                      scores=np.array([.1, .6, .9, .2]))
    >>> shown_detections(found).classes.tolist()
    [2, 1]
    """
    if found.scores is None:
        return found
    order = np.argsort(-found.scores, kind="stable")
    good = order[found.scores[order] >= score][:most]
    rows = good if len(good) else order[:3]
    return DrawnObjects(
        boxes=found.boxes[rows],
        classes=found.classes[rows],
        scores=found.scores[rows],
        masks=None if found.masks is None else [found.masks[row] for row in rows.tolist()],
        crowd=None if found.crowd is None else found.crowd[rows],
    )


def fitted_size(height: int, width: int, room: int, tallest: int = 0) -> tuple[int, int]:
    """Returns (width, height) of an image that is as wide as the room, or as high as `tallest` (0:
    1.25 times the room).

    >>> fitted_size(96, 128, 240), fitted_size(400, 100, 240)
    ((240, 180), (75, 300))
    """
    scale = min(room / width, (tallest or 1.25 * room) / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def objects_tile(
    image_HxWx3: np.ndarray,
    objects: DrawnObjects,
    names: Sequence[str],
    room: int,
) -> Image.Image:
    """Returns an image with its objects: translucent masks, boxes, names and scores.

    Args:
      image_HxWx3: uint8.
      objects: drawn in their order, the first on top.
      names: of the classes.
      room: width of the tile in pixels.

    >>> objects = DrawnObjects(boxes=np.array([[2, 2, 9, 9]]), classes=np.array([0]))
    >>> objects_tile(np.zeros((10, 20, 3), np.uint8), objects, ("cat",), 200).size
    (200, 100)
    """
    height, width = image_HxWx3.shape[:2]
    size = fitted_size(height, width, room)
    scale = size[0] / width, size[1] / height
    tile = _resized(image_HxWx3, size)
    rows = range(len(objects.boxes))[::-1]  # the first on top
    for row in rows:
        mask = objects.masks[row] if objects.masks is not None else None
        if mask is not None:
            tile = _fill_mask(tile, mask, category_color(int(objects.classes[row])))
    draw = ImageDraw.Draw(tile)
    corners = []
    for row in rows:
        x0, y0, x1, y1 = (
            float(edge) * scale[axis % 2] for axis, edge in enumerate(objects.boxes[row])
        )
        left, top = round(x0), round(y0)
        box = (left, top, max(round(x1) - 1, left + 2), max(round(y1) - 1, top + 2))
        crowd = objects.crowd is not None and bool(objects.crowd[row])
        _frame(draw, box, category_color(int(objects.classes[row])), dashed=crowd)
        corners.append((row, box, crowd))
    taken: list[tuple[float, float, float, float]] = []
    for row, box, crowd in reversed(corners):
        label = int(objects.classes[row])
        name = names[label] if 0 <= label < len(names) else str(label)
        words = name + (" (crowd)" if crowd else "")
        if objects.scores is not None:
            words += f" {objects.scores[row]:.2f}"
        _label(tile, draw, box, words, category_color(label), taken)
    return tile


def _resized(image_HxWx3: np.ndarray, size: tuple[int, int]) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(image_HxWx3)).convert("RGB")
    return image.resize(size, Image.Resampling.BICUBIC)


def _fill_mask(tile: Image.Image, mask_HxW: np.ndarray, color: Color) -> Image.Image:
    """Fill a mask translucently, with a line around it."""
    covers = Image.fromarray(np.asarray(mask_HxW, np.uint8) * 255)
    inside = np.asarray(covers.resize(tile.size, Image.Resampling.BILINEAR)) >= 128
    padded = np.pad(inside, 1)
    middle = padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
    share = np.where(inside, np.where(middle, _FILL, 0.95), 0.0)[..., None]
    pixels = np.asarray(tile) * (1 - share) + np.array(color) * share
    return Image.fromarray(pixels.round().astype(np.uint8))


def _frame(
    draw: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    color: Color,
    *,
    dashed: bool,
) -> None:
    """A box of two pixels with a light rim, visible on any image."""
    x0, y0, x1, y1 = box
    if not dashed:
        draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=PAPER)
        draw.rectangle(box, outline=color, width=2)
        return
    draw.rectangle(box, outline=PAPER, width=2)
    for start in range(x0, x1, 10):
        for y in (y0, y1 - 1):
            draw.rectangle((start, y, min(start + 5, x1), y + 1), fill=color)
    for start in range(y0, y1, 10):
        for x in (x0, x1 - 1):
            draw.rectangle((x, start, x + 1, min(start + 5, y1)), fill=color)


def _label(
    tile: Image.Image,
    draw: ImageDraw.ImageDraw,
    box: tuple[float, float, float, float],
    words: str,
    color: Color,
    taken: list[tuple[float, float, float, float]],
) -> None:
    """Words on a ground of the class's colour at the first free place of a box."""
    face = image_grid.font(12 if tile.width >= 300 else 11)
    words = image_grid.elide_text(words, tile.width - 6, face)
    width, height = face.getlength(words) + 6, 14
    x0, y0, x1, y1 = box
    places = [
        (x0 - 1, y0 - height),  # above
        (x0 - 1, y1 + 1),  # below
        (x1 - width + 1, y0 - height),
        (x1 - width + 1, y1 + 1),
        (x0 + 1, y0 + 1),  # inside
        (x0 + 1, y1 - height),
        (x1 - width, y0 + (y1 - y0) / 2),
        (x1 + 2, y0),  # beside
        (x0 - width - 2, y0),
        *((x0 - 1, y0 + step) for step in range(0, int(y1 - y0), height)),
        *((x1 + 2, y0 + step) for step in range(0, int(y1 - y0), height)),
    ]
    fitting = [
        (x, y) for x, y in places if x >= 0 and y >= 0 and x + width <= tile.width
        and y + height <= tile.height
    ]  # fmt: skip
    free = [
        (x, y)
        for x, y in fitting
        if not any(
            x < right and left < x + width and y < bottom and top < y + height
            for left, top, right, bottom in taken
        )
    ]
    x, y = (free or fitting or places)[0]
    x = min(max(x, 0), max(tile.width - width, 0))
    y = min(max(y, 0), max(tile.height - height, 0))
    taken.append((x, y, x + width, y + height))
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=color)
    draw.text((x + 3, y + height - 4), words, fill=text_color(color), font=face, anchor="ls")


def map_tile(image_HxWx3: np.ndarray, map_HxW: np.ndarray, room: int) -> Image.Image:
    """Returns a class map over its image in grey; unknown pixels are striped."""
    size = fitted_size(map_HxW.shape[0], map_HxW.shape[1], room)
    labels = np.asarray(Image.fromarray(map_HxW.astype(np.uint8)).resize(size, 0))
    palette = np.array([category_color(k) for k in range(256)], np.float64)
    grey = np.asarray(_resized(image_HxWx3, size).convert("L"), np.float64)[..., None]
    pixels = palette[labels] * _MAP + (0.55 * grey + 70) * (1 - _MAP)
    pixels = np.where((labels == UNKNOWN)[..., None], _stripes(*size), pixels)
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def _stripes(width: int, height: int) -> np.ndarray:
    """Diagonal stripes, [height, width, 3]."""
    diagonal = np.arange(height)[:, None] + np.arange(width)
    return np.where((diagonal // 4 % 2 == 1)[..., None], np.array(_UNKNOWN_COLOR), np.array(PAPER))


def error_tile(truth_HxW: np.ndarray, found_HxW: np.ndarray, room: int) -> Image.Image:
    """Returns where a class map is wrong (red); unknown pixels are striped."""
    size = fitted_size(truth_HxW.shape[0], truth_HxW.shape[1], room)
    pixels = np.where((truth_HxW == found_HxW)[..., None], np.array(_RIGHT), np.array(_WRONG))
    tile = np.asarray(Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.BOX))
    unknown = np.asarray(Image.fromarray((truth_HxW == UNKNOWN).astype(np.uint8)).resize(size, 0))
    return Image.fromarray(np.where(unknown[..., None] > 0, _stripes(*size), tile).astype(np.uint8))


@dataclasses.dataclass(frozen=True)
class _Block:
    """Tiles side by side with a line of words below."""

    tiles: list[Image.Image]
    words: str


def write_detection_sheet(
    path: str | os.PathLike[str],
    images: Sequence[np.ndarray],
    truth: Sequence[DrawnObjects],
    found: Sequence[DrawnObjects],
    *,
    names: Sequence[str],
    words: Sequence[str] = (),
    score: float = 0.5,
) -> None:
    """Write a PNG of images with their annotated objects on the left and detections on the right.

    Args:
      path: the file; its directory must exist.
      images: uint8 [H, W, 3] each, of any sizes.
      truth, found: of each image.
      names: of the classes.
      words: a line below each image, such as its key and its average precision.
      score: detections from this score on are drawn, at most twelve an image.

    Raises:
      UserError: the file cannot be written.
    """
    room = _room(images, 2)
    blocks = []
    for row, (image, given, detected) in enumerate(zip(images, truth, found, strict=True)):
        shown = shown_detections(detected, score=score)
        count = f"{len(given.boxes)} objects, {len(shown.boxes)} of {len(detected.boxes)} shown"
        blocks.append(
            _Block(
                [
                    objects_tile(image, given, names, room),
                    objects_tile(image, shown, names, room),
                ],
                " · ".join(filter(None, [words[row] if words else "", count])),
            )
        )
    titles = ["ground truth", f"scores from {score:g}, or the best 3"]
    _write(path, blocks, titles, room, [])


def write_object_sheet(
    path: str | os.PathLike[str],
    images: Sequence[np.ndarray],
    objects: Sequence[DrawnObjects],
    *,
    names: Sequence[str],
    words: Sequence[str] = (),
) -> None:
    """Write a PNG of images, beside each the same image with its annotated objects.

    Args:
      path: the file; its directory must exist.
      images: uint8 [H, W, 3] each, of any sizes.
      objects: of each image.
      names: of the classes.
      words: a line below each image, such as its key.

    Raises:
      UserError: the file cannot be written.
    """
    room = _room(images, 2)
    blocks = []
    for row, (image, given) in enumerate(zip(images, objects, strict=True)):
        height, width = image.shape[:2]
        plain = _resized(image, fitted_size(height, width, room))
        count = f"{len(given.boxes)} object" + "s" * (len(given.boxes) != 1)
        line = " · ".join(filter(None, [words[row] if words else "", count]))
        blocks.append(_Block([plain, objects_tile(image, given, names, room)], line))
    _write(path, blocks, ["augmented image", "objects"], room, [])


def write_map_sheet(
    path: str | os.PathLike[str],
    images: Sequence[np.ndarray],
    truth: Sequence[np.ndarray],
    found: Sequence[np.ndarray] | None,
    *,
    names: Sequence[str],
    words: Sequence[str] = (),
) -> None:
    """Write a PNG of images, their class maps, the predicted ones and where these are wrong, with a
    legend of the classes that occur.

    Args:
      path: the file; its directory must exist.
      images: uint8 [H, W, 3] each, of any sizes.
      truth, found: class maps [H, W] of each image; 255 in `truth` where unknown. Without `found`
        the sheet has no predictions.
      names: of the classes.
      words: a line below each image, such as its key and its mean IoU.

    Raises:
      UserError: the file cannot be written.
    """
    room = (WIDTH - 2 * MARGIN - 3 * GAP) // 4
    blocks, present = [], np.zeros(256, np.int64)
    for row, (image, given) in enumerate(zip(images, truth, strict=True)):
        present += np.bincount(given.reshape(-1), minlength=256)[:256]
        height, width = given.shape
        small = _resized(image, fitted_size(height, width, room))
        if found is None:
            tiles = [small, map_tile(image, given, room)]
            blocks.append(_Block(tiles, words[row] if words else ""))
            continue
        predicted = found[row]
        present += np.bincount(predicted.reshape(-1), minlength=256)[:256]
        known = np.where(given == UNKNOWN, UNKNOWN, predicted)
        tiles = [
            _resized(image, fitted_size(given.shape[0], given.shape[1], room)),
            map_tile(image, given, room),
            map_tile(image, predicted, room),
            error_tile(given, known, room),
        ]
        blocks.append(_Block(tiles, words[row] if words else ""))
    unknown, present[UNKNOWN] = present[UNKNOWN], 0
    shown = np.argsort(-present, kind="stable")
    legend = [
        (names[k] if k < len(names) else str(k), category_color(k))
        for k in shown[present[shown] > 0].tolist()
    ]
    if unknown:
        legend.append(("unknown, not counted", _UNKNOWN_COLOR))
    titles = ["image", "ground truth", "prediction", "wrong pixels"]
    _write(path, blocks, titles if found is not None else ["augmented image", "map"], room, legend)


def _room(images: Iterable[np.ndarray], tiles: int) -> int:
    """Width of a tile: small images two blocks a row, others one."""
    small = max((max(image.shape[:2]) for image in images), default=0) <= PAIR_SMALL
    if small:
        return ((WIDTH - 2 * MARGIN - BETWEEN) // 2 - (tiles - 1) * GAP) // tiles
    return (WIDTH - 2 * MARGIN - (tiles - 1) * GAP) // tiles


def _write(
    path: str | os.PathLike[str],
    blocks: list[_Block],
    titles: list[str],
    room: int,
    legend: list[tuple[str, Color]],
) -> None:
    """Lay blocks out in one or two columns, under titles, with a legend at the end."""
    block = len(titles) * (room + GAP) - GAP
    columns = max(1, (WIDTH - 2 * MARGIN + BETWEEN) // (block + BETWEEN))
    rows = [blocks[i : i + columns] for i in range(0, len(blocks), columns)]
    worded = LINE if any(each.words for each in blocks) else 0
    heights = [max(tile.height for each in row for tile in each.tiles) + worded for row in rows]
    keys = _legend_rows(legend)
    low = LINE * len(keys) + (GAP if keys else 0)
    page = image_grid.ImageGrid(WIDTH, 2 * MARGIN + HEAD + sum(heights) + GAP * 2 * len(rows) + low)
    for column in range(min(columns, len(blocks))):
        for number, title in enumerate(titles):
            x = MARGIN + column * (block + BETWEEN) + number * (room + GAP)
            page.words(x, MARGIN + 12, title, ink=MUTED, width=room)
    y = MARGIN + HEAD - 8
    for row, height in zip(rows, heights, strict=True):
        for column, each in enumerate(row):
            left = MARGIN + column * (block + BETWEEN)
            for number, tile in enumerate(each.tiles):
                page.tile(left + number * (room + GAP), y, tile)
            below = y + max(tile.height for tile in each.tiles) + LINE - 3
            page.words(left, below, each.words, size=11, ink=MUTED, width=block)
        y += height + 2 * GAP
    for number, key in enumerate(keys):
        for x, words, color in key:
            at = y + (number + 1) * LINE
            page.chip(x, at, color, 10)
            page.words(x + 15, at, words, size=12)
    page.save(path)


def _legend_rows(legend: Sequence[tuple[str, Color]]) -> list[list[tuple[int, str, Color]]]:
    """(x, words, colour) of a legend, in lines."""
    lines: list[list[tuple[int, str, Color]]] = []
    x = WIDTH
    for words, color in legend:
        shown = image_grid.elide_text(words, 220, image_grid.font(12))
        width = round(image_grid.font(12).getlength(shown)) + 33
        if x + width > WIDTH - MARGIN:
            lines.append([])
            x = MARGIN
        lines[-1].append((x, shown, color))
        x += width
    return lines
