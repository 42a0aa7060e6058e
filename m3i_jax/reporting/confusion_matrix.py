"""Confusion of classes: the matrix as an image, and the most frequent errors."""

import dataclasses

import numpy as np
from PIL import Image

from m3i_jax.reporting import image_grid

MOST, PAIRS = 24, 10  # classes in the matrix; listed pairs
CELL, WORDS = 22, 116  # pixels of a cell; of the class names


@dataclasses.dataclass(frozen=True)
class ConfusionCounts:
    """The K cells of a confusion matrix that are not 0: true class, predicted class, count, each
    [K]."""

    true: np.ndarray
    guessed: np.ndarray
    count: np.ndarray


def count_confusions(label_Q: np.ndarray, guess_Q: np.ndarray) -> ConfusionCounts:
    """Counts of pairs of label and prediction; sparse, since there may be tens of thousands of
    classes.

    >>> count_confusions(np.array([0, 0, 1]), np.array([1, 1, 1]))
    ConfusionCounts(true=array([0, 1]), guessed=array([1, 1]), count=array([2, 1]))
    """
    pairs, count = np.unique(np.stack([label_Q, guess_Q]), axis=1, return_counts=True)
    return ConfusionCounts(pairs[0], pairs[1], count)


def shown_classes(counts: ConfusionCounts, most: int = MOST) -> list[int]:
    """Returns the classes to show, in the order of their indices: all that occur, or the `most`
    with the most errors, as label or prediction.

    >>> shown_classes(count_confusions(np.array([0, 0, 1, 2]), np.array([0, 2, 1, 2])), most=2)
    [0, 2]
    """
    classes = np.union1d(counts.true, counts.guessed)
    wrong = counts.true != counts.guessed
    errors = np.zeros(len(classes), np.int64)
    for side in (counts.true, counts.guessed):
        np.add.at(errors, np.searchsorted(classes, side[wrong]), counts.count[wrong])
    return sorted(classes[np.argsort(-errors, kind="stable")[:most]].tolist())


def row_shares(counts: ConfusionCounts, classes: list[int]) -> np.ndarray:
    """Returns [c, c + 1]: the share of a class's images (row) predicted as each of the classes, and
    as any other.

    >>> counts = count_confusions(np.array([0, 0, 1, 2]), np.array([0, 2, 1, 2]))
    >>> row_shares(counts, [0, 1]).tolist()
    [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]
    """
    row_of = {one: row for row, one in enumerate(classes)}
    counts_CxG = np.zeros((len(classes), len(classes) + 1))
    for true, guessed, count in zip(
        counts.true.tolist(), counts.guessed.tolist(), counts.count.tolist(), strict=True
    ):
        if true in row_of:
            counts_CxG[row_of[true], row_of.get(guessed, len(classes))] += count
    return counts_CxG / np.maximum(counts_CxG.sum(1, keepdims=True), 1)


def confused_pairs(counts: ConfusionCounts, most: int = PAIRS) -> list[tuple[int, int, float]]:
    """Returns (class, predicted class, share of its images) of the most frequent errors.

    >>> confused_pairs(count_confusions(np.array([0, 0, 1]), np.array([1, 0, 1])))
    [(0, 1, 0.5)]
    """
    wrong = np.flatnonzero(counts.true != counts.guessed)
    chosen = wrong[np.argsort(-counts.count[wrong], kind="stable")][:most]
    total = {
        one: int(counts.count[counts.true == one].sum())
        for one in set(counts.true[chosen].tolist())
    }
    return [
        (int(t), int(g), int(n) / total[t])
        for t, g, n in zip(
            *(x[chosen].tolist() for x in (counts.true, counts.guessed, counts.count)), strict=True
        )
    ]


def confusion_image(share_CxG: np.ndarray, names: list[str], others: bool) -> Image.Image:
    """Returns the matrix as an image: one row for each class, one column for each prediction in the
    same order and, with `others`, one for all other classes."""
    columns = [*names, "any other"] if others else names
    side = max(CELL, 200 // max(len(names), 1))
    room = min(
        WORDS,
        12
        + round(max(image_grid.font(12).getlength(image_grid.ink_color(name)) for name in columns)),
    )
    paper = image_grid.ImageGrid(room + side * len(columns) + 1, room + side * len(names) + 1)
    for row, name in enumerate(names):
        paper.words(room - 8, room + row * side + side // 2 + 4, name, width=room - 10, anchor="rs")
        for column, share in enumerate(share_CxG[row, : len(columns)]):
            x, y = room + column * side, room + row * side
            paper.draw.rectangle(
                (x, y, x + side - 2, y + side - 2), fill=image_grid.heat_tile(share)
            )
    upright = image_grid.ImageGrid(room, side * len(columns))
    for column, name in enumerate(columns):
        upright.words(4, column * side + side // 2 + 4, name, width=room - 10)
    paper.image.paste(upright.image.rotate(90, expand=True), (room, 0))
    return paper.image
