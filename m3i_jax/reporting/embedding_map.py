"""The embedding report: nearest neighbours by features, and a 2-D map of all features."""

import colorsys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from m3i_jax.errors import UserError
from m3i_jax.reporting import image_grid
from m3i_jax.reporting.image_grid import Color

SIDE = 720  # of the map
LEGEND = 24  # classes in the legend
NONE: Color = (170, 172, 176)  # points without a class
_ROWS, _BLOCK = 1024, 1 << 26  # queries and cosines at a time, at most


def nearest_neighbors(
    vectors_NxD: np.ndarray,
    rows_Q: Sequence[int],
    count: int,
    poll: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (rows [Q, K], cosines [Q, K]) of the nearest neighbours of some vectors, without the
    vector itself, the nearest first; of equally near ones, the lowest row first.

    Args:
      vectors_NxD: L2-normalised.
      rows_Q: rows of the queries.
      count: K, at most N - 1.
      poll: called between blocks of queries; may raise.

    >>> nearest_neighbors(np.array([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]]), [0], 2)[0].tolist()
    [[2, 1]]
    """
    count = min(count, len(vectors_NxD) - 1)
    block = min(_ROWS, max(1, _BLOCK // len(vectors_NxD)))
    nearest = [np.zeros((0, count), np.int64)]
    cosines = [np.zeros((0, count), vectors_NxD.dtype)]
    for at in range(0, len(rows_Q), block):
        poll()
        query_B = np.asarray(rows_Q[at : at + block], np.int64)
        cosine_BxN = vectors_NxD[query_B] @ vectors_NxD.T
        cosine_BxN[np.arange(len(query_B)), query_B] = -np.inf
        nearest.append(_largest(cosine_BxN, count))
        cosines.append(np.take_along_axis(cosine_BxN, nearest[-1], 1))
    return np.concatenate(nearest), np.concatenate(cosines)


def _largest(cosine_QxN: np.ndarray, count: int) -> np.ndarray:
    """Columns [Q, K] of the largest values of each row, as of a stable descending sort, but in
    linear time."""
    if count == 1:
        return cosine_QxN.argmax(1)[:, None]
    out_QxK = np.zeros((len(cosine_QxN), count), np.int64)
    for out_K, cosine_N in zip(out_QxK, cosine_QxN, strict=True):
        least = np.partition(cosine_N, -count)[-count] if count else np.inf
        # with all that equal the smallest, of which a partition keeps any
        kept = np.flatnonzero(~(cosine_N < least))
        out_K[:] = kept[np.argsort(-cosine_N[kept], kind="stable")[:count]]
    return out_QxK


def neighbor_agreement(
    vectors_NxD: np.ndarray, label_N: np.ndarray, poll: Callable[[], None] = lambda: None
) -> float | None:
    """Returns the share of the labelled vectors whose nearest labelled neighbour has their label;
    None if there are fewer than two. `poll` is called between blocks of vectors and may raise.

    >>> neighbor_agreement(np.eye(3)[[0, 0, 1]], np.array([5, 5, 6]))
    0.6666666666666666
    """
    x, label = vectors_NxD[label_N >= 0], label_N[label_N >= 0]
    if len(x) < 2:
        return None
    nearest_N = nearest_neighbors(x, range(len(x)), 1, poll)[0][:, 0]
    return int((label[nearest_N] == label).sum()) / len(x)


def project_to_2d(vectors_NxD: np.ndarray, how: str = "pca") -> np.ndarray:
    """Returns points [N, 2] for the vectors: the first two principal components, or t-SNE of
    scikit-learn.

    Raises:
      UserError: scikit-learn is missing.

    >>> project_to_2d(np.array([[0.0, 0.0, 1.0], [2.0, 0.0, 1.0], [4.0, 0.0, 1.0]]))[:, 0].tolist()
    [-2.0, 0.0, 2.0]
    """
    centred = vectors_NxD - vectors_NxD.mean(0, dtype=np.float64)
    if how == "pca":
        _, axes = np.linalg.eigh(centred.T @ centred)
        axes_Dx2 = axes[:, ::-1][:, :2]
        strongest = np.take_along_axis(axes_Dx2, np.abs(axes_Dx2).argmax(0)[None], 0)
        # the sign of an axis is arbitrary: make the largest coordinate positive
        points = centred @ (axes_Dx2 * np.where(strongest < 0, -1.0, 1.0))
        return np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    perplexity = min(30.0, max(1.0, (len(centred) - 1) / 3))
    projection = tsne_class()(n_components=2, init="pca", perplexity=perplexity, random_state=0)
    return projection.fit_transform(centred.astype(np.float32))


def tsne_class() -> Any:
    """Returns the class `sklearn.manifold.TSNE`.

    Raises:
      UserError: scikit-learn is missing.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise UserError(
            f"config.evaluate.map: 'tsne' needs {error.name}: pip install 'm3i-jax[maps]', or use"
            " 'pca'"
        ) from None
    return TSNE


def class_color(number: int, count: int) -> Color:
    """Returns the colour of a class: hues evenly around the circle.

    >>> class_color(0, 3) != class_color(1, 3)
    True
    """
    value = (0.9, 0.65, 0.78)[number % 3]
    r, g, b = colorsys.hsv_to_rgb(number / max(count, 1), 0.75, value)
    return round(255 * r), round(255 * g), round(255 * b)


def embedding_image(
    points_Nx2: np.ndarray, label_N: np.ndarray, names: Sequence[str]
) -> tuple[Image.Image, list[tuple[str, Color]]]:
    """Returns a map with one dot for each image in the colour of its class, and its legend of at
    most LEGEND classes.

    >>> points = np.array([[0.0, 0.0], [1.0, 2.0]])
    >>> image, legend = embedding_image(points, np.array([0, -1]), ["cat"])
    >>> image.size, [name for name, _ in legend]
    ((720, 720), ['cat', 'no class'])
    """
    present = [label for label in range(len(names)) if (label_N == label).any()]
    image = Image.new("RGB", (SIDE, SIDE), image_grid.PAPER)
    draw = ImageDraw.Draw(image)
    low, high = points_Nx2.min(0), points_Nx2.max(0)
    span, radius = np.where(high > low, high - low, 1.0), 4
    colours = {label: class_color(row, len(present)) for row, label in enumerate(present)}
    for (x, y), label in zip((points_Nx2 - low) / span, label_N.tolist(), strict=True):
        at_x, at_y = 10 + x * (SIDE - 20), 10 + (1 - y) * (SIDE - 20)
        draw.ellipse(
            (at_x - radius, at_y - radius, at_x + radius, at_y + radius),
            fill=colours.get(label, NONE),
        )
    legend = [(names[label], colours[label]) for label in present[:LEGEND]]
    if len(present) > LEGEND:
        legend.append((f"and {len(present) - LEGEND} more", image_grid.PAPER))
    if present and not np.isin(label_N, present).all():
        legend.append(("no class", NONE))
    return image, legend
