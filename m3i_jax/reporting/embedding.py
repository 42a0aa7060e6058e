"""The embedding report: whom the features hold to be alike, and a 2-D map of all of them, as pictures."""

import colorsys
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from m3i_jax.errors import UserError
from m3i_jax.reporting import sheet
from m3i_jax.reporting.sheet import GAP, INK, MARGIN, MUTED, Colour

SIDE, HEAD, LINE = 720, 40, 17  # of the map; above it or the rows; a line of words
TOLD = 24  # classes named beside the map
NONE: Colour = (170, 172, 176)  # points without a class
RIGHT, WRONG = (64, 145, 92), (196, 70, 66)


def nearest(vectors_NxD: np.ndarray, rows_Q: Sequence[int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows [Q, K], cosines [Q, K]) of the vectors most alike to some of them, themselves left out, the most alike first.

    Args:
      vectors_NxD: L2-normalised.
      rows_Q: of those that are asked.
      count: K, at most N - 1.

    >>> nearest(np.array([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]]), [0], 2)[0].tolist()
    [[2, 1]]
    """
    asked = np.asarray(rows_Q, np.int64)
    cosine_QxN = vectors_NxD[asked] @ vectors_NxD.T
    cosine_QxN[np.arange(len(asked)), asked] = -np.inf
    found = np.argsort(-cosine_QxN, axis=1, kind="stable")[:, : min(count, len(vectors_NxD) - 1)]
    return found, np.take_along_axis(cosine_QxN, found, 1)


def agreement(vectors_NxD: np.ndarray, label_N: np.ndarray, chunk: int = 1024) -> float | None:
    """Share of the labelled vectors whose nearest labelled neighbour has their label; None if there are fewer than two.

    >>> agreement(np.eye(3)[[0, 0, 1]], np.array([5, 5, 6]))
    0.6666666666666666
    """
    x, label = vectors_NxD[label_N >= 0], label_N[label_N >= 0]
    if len(x) < 2:
        return None
    right = 0
    for at in range(0, len(x), chunk):
        rows = range(at, min(at + chunk, len(x)))
        right += int((label[nearest(x, rows, 1)[0][:, 0]] == label[rows]).sum())
    return right / len(x)


def flat(vectors_NxD: np.ndarray, how: str = "pca") -> np.ndarray:
    """A point [N, 2] for every vector: the first two principal components, or the layout of another package.

    Raises:
      UserError: a package is missing.

    >>> flat(np.array([[0.0, 0.0, 1.0], [2.0, 0.0, 1.0], [4.0, 0.0, 1.0]]))[:, 0].tolist()
    [-2.0, 0.0, 2.0]
    """
    centred = vectors_NxD - vectors_NxD.mean(0, dtype=np.float64)
    if how == "pca":
        _, axes = np.linalg.eigh(centred.T @ centred)
        axes_Dx2 = axes[:, ::-1][:, :2]
        strongest = np.take_along_axis(axes_Dx2, np.abs(axes_Dx2).argmax(0)[None], 0)
        points = centred @ (axes_Dx2 * np.where(strongest < 0, -1.0, 1.0))  # the sign of an axis means nothing: fixed
        return np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise UserError(f"config.evaluate.map: {how!r} needs {error.name}: pip install 'm3i-jax[maps]', or use 'pca'") from None
    perplexity = min(30.0, max(1.0, (len(centred) - 1) / 3))
    return TSNE(n_components=2, init="pca", perplexity=perplexity, random_state=0).fit_transform(centred.astype(np.float32))


def class_colour(number: int, count: int) -> Colour:
    """Colours of classes, all around the circle.

    >>> class_colour(0, 3) != class_colour(1, 3)
    True
    """
    value = (0.9, 0.65, 0.78)[number % 3]
    r, g, b = colorsys.hsv_to_rgb(number / max(count, 1), 0.75, value)
    return round(255 * r), round(255 * g), round(255 * b)


def write_map(path: str | os.PathLike[str], points_Nx2: np.ndarray, label_N: np.ndarray, names: Sequence[str], title: str) -> None:
    """A map as PNG: one dot a picture in the colour of its class, with the names of the classes at the side.

    >>> import tempfile
    >>> place = tempfile.mkdtemp() + "/map.png"
    >>> write_map(place, np.array([[0.0, 0.0], [1.0, 2.0]]), np.array([0, -1]), ["cat"], "two pictures")
    >>> os.path.exists(place)
    True
    """
    present = [label for label in range(len(names)) if (label_N == label).any()]
    side = 190 if present else 0
    page = sheet.Sheet(2 * MARGIN + SIDE + side, 2 * MARGIN + HEAD + SIDE)
    page.words(MARGIN, MARGIN + 14, title, size=14)
    low, high = points_Nx2.min(0), points_Nx2.max(0)
    span = np.where(high > low, high - low, 1.0)
    left, top, radius = MARGIN, MARGIN + HEAD, 3
    page.draw.rectangle((left, top, left + SIDE, top + SIDE), outline=sheet.FRAME)
    for (x, y), label in zip((points_Nx2 - low) / span, label_N.tolist(), strict=True):
        at_x, at_y = left + 8 + x * (SIDE - 16), top + 8 + (1 - y) * (SIDE - 16)
        ink = class_colour(present.index(label), len(present)) if label in present else NONE
        page.draw.ellipse((at_x - radius, at_y - radius, at_x + radius, at_y + radius), fill=ink)
    for row, label in enumerate(present[:TOLD]):
        y = top + 14 + row * LINE
        page.chip(left + SIDE + 16, y, class_colour(row, len(present)))
        page.words(left + SIDE + 30, y, names[label], width=side - 30)
    if len(present) > TOLD:
        page.words(left + SIDE + 30, top + 14 + TOLD * LINE, f"and {len(present) - TOLD} more", ink=MUTED)
    page.save(path)


def write_neighbours(
    path: str | os.PathLike[str],
    pictures: np.ndarray,
    rows: Sequence[tuple[int, Sequence[int]]],
    cosine_QxK: np.ndarray,
    words: Sequence[str],
    title: str,
) -> None:
    """A sheet as PNG: in every row a picture and those most alike to it, with their cosines and what they show.

    Args:
      path: the file.
      pictures: uint8 [P, S, S, 3], every picture that is shown.
      rows: (the picture asked, its neighbours), as numbers of `pictures`.
      cosine_QxK: of the neighbours.
      words: P strings, the class of each, empty where there is none.
      title: of the sheet.

    >>> import tempfile
    >>> place = tempfile.mkdtemp() + "/neighbours.png"
    >>> write_neighbours(place, np.zeros((2, 32, 32, 3), np.uint8), [(0, [1])], np.array([[0.5]]), ["cat", ""], "a title")
    >>> os.path.exists(place)
    True
    """
    side = sheet.tile_side(pictures.shape[1], 1) if pictures.shape[1] <= sheet.SMALL else sheet.TILE
    most = max(len(found) for _, found in rows)
    pitch = side + 2 * LINE + 10
    page = sheet.Sheet(2 * MARGIN + (most + 1) * (side + GAP) + GAP, 2 * MARGIN + HEAD + len(rows) * pitch)
    page.words(MARGIN, MARGIN + 14, title, size=14)
    for number, (asked, found) in enumerate(rows):
        y = MARGIN + HEAD + number * pitch
        for place, (picture, note) in enumerate([(asked, "")] + [(p, f"{c:.2f}") for p, c in zip(found, cosine_QxK[number], strict=True)]):
            x = MARGIN + place * (side + GAP) + (GAP if place else 0)
            tile: Image.Image = sheet.picture(pictures[picture], side)
            page.tile(x, y, tile)
            same = words[picture] == words[asked]
            ink = INK if not place or not words[asked] or not words[picture] else RIGHT if same else WRONG
            page.words(x, y + side + LINE - 3, words[picture], width=side, ink=ink)
            page.words(x, y + side + 2 * LINE - 5, note, size=11, ink=MUTED)
    page.save(path)
