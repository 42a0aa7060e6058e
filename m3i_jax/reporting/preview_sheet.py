"""A contact sheet of a batch, to check images, crops, masks, labels and captions before training.

Partners are side by side. A cell of the mask has the colour of the image that it shows, so that the
mask can be compared with the mixed input; without mixing, hidden cells are grey. The original has
the frames of its two views, with a notch at the view's left edge: on the right if it is
mirrored."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from m3i_jax.reporting import image_grid
from m3i_jax.reporting.image_grid import GAP, HIDDEN, MARGIN, MUTED, OWN, PARTNER

BETWEEN = 36  # pixels between partners
HEAD, LINE, AFTER = 26, 17, 22  # pixels: titles, line height, space below a row
COLUMNS = ("input view", "target view", "mask", "mixed input")
BOXES = ((24, 144, 96), (196, 58, 148))  # frames of the input and of the target view


def mix_images(views_RxSxSx3: np.ndarray, mask_RxN: np.ndarray) -> np.ndarray:
    """Returns the mixed inputs of a batch (M3I section 3.4): the own image where the mask is True,
    else that of row r ^ 1; R must be even.

    >>> views = np.stack([np.full((2, 2, 3), 10, np.uint8), np.full((2, 2, 3), 20, np.uint8)])
    >>> mix_images(views, np.array([[True, False, False, True], [True] * 4]))[0, :, :, 0]
    array([[10, 20],
           [20, 10]], dtype=uint8)
    """
    rows, size = views_RxSxSx3.shape[:2]
    own = np.stack(
        [image_grid.upsample_cells(mask_N, size) for mask_N in np.asarray(mask_RxN, bool)]
    )
    return np.where(own[..., None], views_RxSxSx3, views_RxSxSx3[np.arange(rows) ^ 1])


def frame_boxes(
    original_HxWx3: np.ndarray, box_2x4: np.ndarray, flip_2: np.ndarray, side: int
) -> Image.Image:
    """Returns an image fitted into a tile, with the frames of its views.

    Args:
      original_HxWx3: uint8, in its final orientation.
      box_2x4: top, left, height, width of both views, or of the first one, in pixels of the image.
      flip_2: whether they are mirrored.
      side: of the tile in pixels.

    >>> boxes, flip = np.array([[0, 0, 20, 20], [5, 5, 10, 10]]), np.array([False, True])
    >>> frame_boxes(np.zeros((20, 40, 3), np.uint8), boxes, flip, 64).size
    (64, 64)
    """
    height, width = original_HxWx3.shape[:2]
    scale = side / max(height, width)
    fitted = max(1, round(width * scale)), max(1, round(height * scale))
    at = (side - fitted[0]) // 2, (side - fitted[1]) // 2
    tile = Image.new("RGB", (side, side), image_grid.PAPER)
    tile.paste(
        Image.fromarray(np.ascontiguousarray(original_HxWx3)).resize(
            fitted, Image.Resampling.BICUBIC
        ),
        at,
    )
    draw = ImageDraw.Draw(tile)
    for (top, left, h, w), mirrored, colour in zip(
        np.asarray(box_2x4, float), flip_2, BOXES[: len(box_2x4)], strict=True
    ):
        x0, y0, x1, y1 = (
            at[0] + left * scale,
            at[1] + top * scale,
            at[0] + (left + w) * scale - 1,
            at[1] + (top + h) * scale - 1,
        )
        x1, y1 = max(x0, x1), max(y0, y1)
        # a light rim, visible on any image
        draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=image_grid.PAPER)
        draw.rectangle((x0, y0, x1, y1), outline=colour, width=2)
        edge, middle, inwards = (x1, (y0 + y1) / 2, -5) if mirrored else (x0, (y0 + y1) / 2, 5)
        draw.polygon(
            [(edge, middle - 4), (edge, middle + 4), (edge + inwards, middle)], fill=colour
        )
    return tile


def write_preview(
    path: str | os.PathLike[str],
    batch: Mapping[str, np.ndarray],
    *,
    captions: Sequence[str],
    classes: Sequence[str],
    originals: Sequence[np.ndarray] = (),
    blended: np.ndarray | None = None,
    columns: Sequence[str] = COLUMNS,
    halves: bool = False,
) -> None:
    """Write a contact sheet as PNG: two partners in each row, with the original and its crops,
    `columns`, label and caption of each.

    Args:
      path: the file; its directory must exist.
      batch: uint8 [R, 2, S, S, 3] "views", bool [R, N] "mask", int [R] "label" (-1: none); with
        originals also float [R, 2, 4] "box" and bool [R, 2] "flip". If R is odd, the last row has
        no partner and no mixed input.
      captions: R strings, empty where absent.
      classes: names of the categories.
      originals: R images uint8 [H, W, 3] at their full size, shown with the frames of the views; or
        none.
      blended: uint8 [R, S, S, 3], inputs of an objective that blends images: shown instead of
        target view, mask and mixed input.
      columns: those of COLUMNS that the objective reads, in their order.
      halves: two partners make one mixed input, that of the first: the second has no mask and no
        mixed input.

    Raises:
      UserError: the file cannot be written.

    >>> import tempfile
    >>> batch = {"views": np.zeros((2, 2, 32, 32, 3), np.uint8), "mask": np.ones((2, 4), bool)}
    >>> batch["label"] = np.array([0, -1])
    >>> path = tempfile.mkdtemp() + "/preview.png"
    >>> write_preview(path, batch, captions=["a cat", ""], classes=("cat",))
    >>> os.path.exists(path)
    True
    """
    views, mask_RxN = batch["views"], np.asarray(batch["mask"], bool)
    rows, size = views.shape[0], views.shape[2]
    side = image_grid.side_of_tile(size, image_grid.square_side(mask_RxN.shape[1]))
    names = [classes[label] if 0 <= label < len(classes) else "" for label in batch["label"]]
    paired = rows // 2 * 2
    inputs = mix_images(views[:paired, 0], mask_RxN[:paired]) if paired else views[:0, 0]

    shown = tuple(columns) if blended is None else (COLUMNS[0], "blended input")
    count = 2 if "target view" in shown else 1
    columns = ("original", *shown) if len(originals) else shown
    chips = dict(zip(COLUMNS, BOXES, strict=False)) if len(originals) else {}
    block = len(columns) * (side + GAP) - GAP
    lines = int(any(names)) + int(any(captions))
    pitch = side + lines * LINE + AFTER
    page = image_grid.ImageGrid(
        2 * MARGIN + 2 * block + BETWEEN, MARGIN + HEAD + (rows + 1) // 2 * pitch - AFTER + MARGIN
    )
    for row in range(rows):
        second = row % 2
        own, other = (PARTNER, OWN) if second else (OWN, PARTNER)
        left, top = MARGIN + second * (block + BETWEEN), MARGIN + HEAD + row // 2 * pitch
        tiles = (
            [
                frame_boxes(
                    originals[row], batch["box"][row, :count], batch["flip"][row, :count], side
                )
            ]
            if len(originals)
            else []
        )
        by_name = {
            "input view": image_grid.image_tile(views[row, 0], side),
            "target view": image_grid.image_tile(views[row, 1], side),
        }
        by_name["mask"] = image_grid.mask_tile(
            mask_RxN[row], side, own, other if "mixed input" in shown else HIDDEN
        )
        images = {
            "mixed input": inputs[row : row + 1],
            "blended input": inputs[:0] if blended is None else blended[row : row + 1],
        }
        by_name |= {
            name: image_grid.image_tile(each[0], side) for name, each in images.items() if len(each)
        }
        if halves and second:
            del by_name["mask"]
            by_name.pop("mixed input", None)
        tiles += [by_name[name] for name in shown if name in by_name]
        for column, tile in enumerate(tiles):
            x = left + column * (side + GAP)
            page.tile(x, top, tile)
            if row < 2:
                colour = chips.get(columns[column], None if column else own)
                indent = 13 if colour else 0
                if colour:
                    page.chip(x, top - 9, colour)
                page.words(x + indent, top - 9, columns[column], width=side - indent)
        y = top + side - 1
        if any(names):
            y += LINE
            page.words(
                left,
                y,
                names[row] or "no label",
                ink=image_grid.INK if names[row] else MUTED,
                width=block,
            )
        if any(captions):
            page.words(left, y + LINE, captions[row], ink=MUTED, width=block)
    page.save(path)
