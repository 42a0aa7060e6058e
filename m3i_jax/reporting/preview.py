"""A contact sheet of a batch, to be looked at before anything is trained on it: are the pictures, crops, masks, labels and captions right?

Partners stand side by side. A mask has the colour of the image that a cell shows, so that it can be checked against the mixed input.
"""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from m3i_jax.reporting import sheet
from m3i_jax.reporting.sheet import GAP, MARGIN, MUTED, OWN, PARTNER

BETWEEN = 36  # pixels between partners
HEAD, LINE, AFTER = 26, 17, 22  # titles; a line of words; below a row
COLUMNS = ("input view", "target view", "mask", "mixed input")


def mixed(views_RxSxSx3: np.ndarray, mask_RxN: np.ndarray) -> np.ndarray:
    """The mixed inputs of a batch (M3I section 3.4): own image where the mask is True, else row r ^ 1; R must be even.

    >>> views = np.stack([np.full((2, 2, 3), 10, np.uint8), np.full((2, 2, 3), 20, np.uint8)])
    >>> mixed(views, np.array([[True, False, False, True], [True] * 4]))[0, :, :, 0]
    array([[10, 20],
           [20, 10]], dtype=uint8)
    """
    rows, size = views_RxSxSx3.shape[:2]
    own = np.stack([sheet.enlarge(mask_N, size) for mask_N in np.asarray(mask_RxN, bool)])
    return np.where(own[..., None], views_RxSxSx3, views_RxSxSx3[np.arange(rows) ^ 1])


def write(path: str | os.PathLike[str], batch: Mapping[str, np.ndarray], *, captions: Sequence[str], classes: Sequence[str]) -> None:
    """Write a contact sheet as PNG: two partners a row; of each both views, mask, mixed input, label and caption.

    Args:
      path: the file; its directory must exist.
      batch: uint8 [R, 2, S, S, 3] "views", bool [R, N] "mask", int [R] "label" (-1: none). If R is odd, the last has no partner: its mixed
        input is left out.
      captions: R strings, empty where there is none.
      classes: names of the categories.

    Raises:
      UserError: if the file cannot be written.

    >>> import tempfile
    >>> batch = {"views": np.zeros((2, 2, 32, 32, 3), np.uint8), "mask": np.ones((2, 4), bool), "label": np.array([0, -1])}
    >>> place = tempfile.mkdtemp() + "/preview.png"
    >>> write(place, batch, captions=["a cat", ""], classes=("cat",))
    >>> os.path.exists(place)
    True
    """
    views, mask_RxN = batch["views"], np.asarray(batch["mask"], bool)
    rows, size = views.shape[0], views.shape[2]
    side = sheet.tile_side(size, sheet.grid_of(mask_RxN.shape[1]))
    names = [classes[label] if 0 <= label < len(classes) else "" for label in batch["label"]]
    paired = rows // 2 * 2
    inputs = mixed(views[:paired, 0], mask_RxN[:paired]) if paired else views[:0, 0]

    block = len(COLUMNS) * (side + GAP) - GAP
    lines = int(any(names)) + int(any(captions))
    pitch = side + lines * LINE + AFTER
    page = sheet.Sheet(2 * MARGIN + 2 * block + BETWEEN, MARGIN + HEAD + (rows + 1) // 2 * pitch - AFTER + MARGIN)
    for row in range(rows):
        second = row % 2
        own, other = (PARTNER, OWN) if second else (OWN, PARTNER)
        left, top = MARGIN + second * (block + BETWEEN), MARGIN + HEAD + row // 2 * pitch
        tiles = [sheet.picture(views[row, 0], side), sheet.picture(views[row, 1], side), sheet.mask(mask_RxN[row], side, own, other)]
        tiles += [sheet.picture(inputs[row], side)] if row < len(inputs) else []
        for column, tile in enumerate(tiles):
            x = left + column * (side + GAP)
            page.tile(x, top, tile)
            if row < 2:
                indent = 0 if column else 13
                if not column:
                    page.chip(x, top - 9, own)
                page.words(x + indent, top - 9, COLUMNS[column], width=side - indent)
        y = top + side - 1
        if any(names):
            y += LINE
            page.words(left, y, names[row] or "no label", ink=sheet.INK if names[row] else MUTED, width=block)
        if any(captions):
            page.words(left, y + LINE, captions[row], ink=MUTED, width=block)
    page.save(path)
