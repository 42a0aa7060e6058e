"""Figures of dense tasks: precision-recall curves, tables of classes, confusion, worst images. Each
function returns a `Figure` (or an image of one), which `figures.write_figure` writes."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from m3i_jax.reporting import confusion_matrix, dense_panels, image_grid
from m3i_jax.reporting.confusion_matrix import ConfusionCounts
from m3i_jax.reporting.dense_panels import DrawnObjects, category_color
from m3i_jax.reporting.figures import Figure, FigureLine, FigureRow, FigureTile
from m3i_jax.reporting.image_grid import INK, MUTED, PAPER, RULE, Color

CHART = (440, 330)  # pixels of a chart of curves
SHOWN = 8  # classes with a curve of their own colour
TABLE = 40  # classes in a table
TILE, MAP_TILE = 236, 172  # pixels of a tile of a worst image; of one with maps
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 10, 10, 38
_FAINT, _SOFT = (206, 208, 206), 3  # other classes; factor of antialiasing
_ROW, _NAME, _COUNT, _VALUE, _BAR, _PAD = 18, 178, 76, 92, 46, 8  # pixels of a table


def precision_recall_image(curves_KxR: np.ndarray, colored: Sequence[int]) -> Image.Image:
    """Draws precision over recall: the mean of the classes in black, some in their colours, the
    others faint.

    Args:
      curves_KxR: precision at R recalls from 0 to 1; NaN for a class without objects.
      colored: classes in their colour.

    >>> precision_recall_image(np.ones((2, 101)), [0]).size
    (440, 330)
    """
    width, height = CHART
    page = image_grid.ImageGrid(width, height)
    right, bottom = width - _RIGHT, height - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return _LEFT + x * (right - _LEFT), bottom - y * (bottom - _TOP)

    large = Image.new("RGB", (width * _SOFT, height * _SOFT), PAPER)
    draw = ImageDraw.Draw(large)

    def line(points: list[tuple[float, float]], color: Color, thick: float) -> None:
        scaled = [(x * _SOFT, y * _SOFT) for x, y in points]
        draw.line(scaled, fill=color, width=round(thick * _SOFT), joint="curve")

    ticks = np.linspace(0, 1, 6).tolist()
    for tick in ticks:
        line([at(0, tick), at(1, tick)], RULE, 1)
        line([at(tick, 0), at(tick, 1)], RULE, 1)
    recall_R = np.linspace(0, 1, curves_KxR.shape[1])
    known = [k for k in range(len(curves_KxR)) if not np.isnan(curves_KxR[k]).any()]
    curves = [(k, _FAINT, 1.0) for k in known if k not in colored]
    curves += [(k, category_color(k), 1.7) for k in reversed(colored) if k in known]
    for k, color, thick in curves:
        line([at(*point) for point in zip(recall_R, curves_KxR[k], strict=True)], color, thick)
    if known:
        mean_R = curves_KxR[known].mean(0)
        line([at(*point) for point in zip(recall_R, mean_R, strict=True)], INK, 2.6)
    page.image.paste(large.resize((width, height), Image.Resampling.BOX))
    for tick in ticks:
        x, y = at(tick, tick)
        page.words(_LEFT - 6, y + 4, f"{tick:g}", size=11, ink=MUTED, anchor="rs")
        page.words(x, bottom + 15, f"{tick:g}", size=11, ink=MUTED, anchor="ms")
    page.words((_LEFT + right) / 2, bottom + 31, "recall", size=12, anchor="ms")
    upright = image_grid.ImageGrid(80, 16)
    upright.words(40, 12, "precision", size=12, anchor="ms")
    page.image.paste(upright.image.rotate(90, expand=True), (1, (_TOP + bottom) // 2 - 40))
    return page.image


def curves_figure(
    title: str,
    names: Sequence[str],
    curves_KxR: np.ndarray,
    *,
    iou: str = "0.5",
) -> Figure:
    """Precision-recall curves, with the AP of the classes beside them: all classes, or the better
    and the worse half of SHOWN.

    Args:
      title: of the figure.
      names: of the K classes.
      curves_KxR: precision at R recalls from 0 to 1; NaN for a class without objects.
      iou: the overlap at which a detection is right, for the note.
    """
    value_K = curves_KxR.mean(1)
    order = [k for k in np.argsort(-value_K, kind="stable").tolist() if not np.isnan(value_K[k])]
    shown = order if len(order) <= SHOWN else [*order[: SHOWN // 2], *order[-SHOWN // 2 :]]
    lines = [FigureLine(names[k], float(value_K[k]), chip=category_color(k)) for k in shown]
    if order:
        mean = float(np.nanmean(value_K))
        lines.insert(0, FigureLine(f"mean of {len(order):,} classes", mean, chip=INK))
    note = f"a detection is right at an IoU of {iou}; beside the curves the areas below them"
    if len(shown) < len(order):
        lines.insert(1 + SHOWN // 2, FigureLine(f"… {len(order) - len(shown):,} classes …"))
        note += f"; the {SHOWN // 2} best and the {SHOWN // 2} worst classes have a colour"
    image = precision_recall_image(curves_KxR, shown)
    return Figure(title, note, [FigureRow([FigureTile(image)], lines)])


def class_table_image(
    headers: Sequence[str], names: Sequence[str], counts: np.ndarray, values_KxC: np.ndarray
) -> Image.Image:
    """Returns a table of classes with bars: best first, by the first column of values; of many
    classes the best and the worst of those that have such a value.

    Args:
      headers: of the count and of the C columns of values.
      names: of the K classes.
      counts: int [K], objects or pixels.
      values_KxC: shares in 0..1; NaN is left empty. Of few classes, those without the first one
        come last.

    >>> image = class_table_image(("objects", "AP"), ("cat",), np.array([3]), np.array([[0.5]]))
    >>> image.size
    (348, 46)
    """
    first_K = np.nan_to_num(values_KxC[:, 0], nan=-1.0)
    order: list[int | None] = list(np.argsort(-first_K, kind="stable").tolist())
    left_out = 0
    if len(order) > TABLE:
        order = order[: len(order) - int(np.isnan(values_KxC[:, 0]).sum())]
    if len(order) > TABLE:
        left_out = len(order) - TABLE
        order = [*order[: TABLE // 2], None, *order[-TABLE // 2 :]]
    columns = values_KxC.shape[1]
    width = _NAME + _COUNT + columns * (_VALUE + 2)
    page = image_grid.ImageGrid(width, 10 + _ROW * (1 + len(order)))
    page.words(_NAME + _COUNT - 18, 13, headers[0], size=11, ink=MUTED, anchor="rs")
    for column, header in enumerate(headers[1:]):
        left = _NAME + _COUNT + column * (_VALUE + 2)
        page.words(left, 13, header, size=11, ink=MUTED, width=_VALUE - 6)
    page.rule(_PAD, width - _PAD, 18)
    for row, k in enumerate(order):
        base = 19 + row * _ROW + 14
        if k is None:
            page.words(_PAD, base, f"… {left_out:,} classes …", size=11, ink=MUTED)
            continue
        page.chip(_PAD, base, category_color(k), 10)
        page.words(_PAD + 16, base, names[k], width=_NAME - _PAD - 20)
        page.words(_NAME + _COUNT - 18, base, f"{counts[k]:,}", size=11, ink=MUTED, anchor="rs")
        for column, value in enumerate(values_KxC[k].tolist()):
            if np.isnan(value):
                continue
            left = _NAME + _COUNT + column * (_VALUE + 2)
            page.draw.rectangle((left, base - 9, left + _BAR - 1, base - 1), fill=RULE)
            if bar := round(value * _BAR):
                page.draw.rectangle(
                    (left, base - 9, left + bar - 1, base - 1), fill=image_grid.PARTNER
                )
            page.words(left + _BAR + 5, base, f"{100 * value:.1f}", size=11)
    return page.image


def class_table_figure(
    title: str,
    headers: Sequence[str],
    names: Sequence[str],
    counts: np.ndarray,
    values_KxC: np.ndarray,
) -> Figure:
    """`class_table_image` as a figure; values are in per cent."""
    note = f"{len(names):,} classes by {headers[1]}, in per cent"
    without = int(np.isnan(values_KxC[:, 0]).sum()) if len(names) > TABLE else 0
    if without:
        note += f"; {without:,} have no {headers[1]} and are left out"
    if len(names) - without > TABLE:
        note += f"; the {TABLE // 2} best and the {TABLE // 2} worst"
    image = class_table_image(headers, names, counts, values_KxC)
    return Figure(title, note, [FigureRow([FigureTile(image)])])


def class_confusion_figure(
    title: str, counts: ConfusionCounts, names: Sequence[str], *, note: str
) -> Figure:
    """Confusion of classes: the matrix, and the most frequent errors; without rows if nothing was
    counted.

    Args:
      title: of the figure.
      counts: of objects or pixels. A class equal to len(names) is "nothing": as prediction, what
        was missed; as true class, what was found where nothing is.
      names: of the classes.
      note: what was counted.
    """
    if not len(counts.count):
        return Figure(title, note, [])
    known = [*names, "nothing"]
    classes = confusion_matrix.shown_classes(counts)
    share = confusion_matrix.row_shares(counts, classes)
    others = bool(share[:, -1].any())
    image = confusion_matrix.confusion_image(share, [known[k] for k in classes], others)
    lines = [
        FigureLine(
            f"{known[true]} missed"
            if guess == len(names)
            else f"{known[guess]}, not there"
            if true == len(names)
            else f"{known[true]} as {known[guess]}",
            part,
        )
        for true, guess, part in confusion_matrix.confused_pairs(counts)
    ]
    note = f"rows are true classes, columns predictions; {note}"
    if others:
        note += f"; the {len(classes)} classes with most errors"
    return Figure(title, note, [FigureRow([FigureTile(image)], lines)])


def confusion_of_matrix(matrix_KxK: np.ndarray) -> ConfusionCounts:
    """Returns the counts of a dense matrix, rows are true classes.

    >>> confusion_of_matrix(np.array([[0, 2], [0, 0]]))
    ConfusionCounts(true=array([0]), guessed=array([1]), count=array([2]))
    """
    true, guessed = np.nonzero(matrix_KxK)
    return ConfusionCounts(true, guessed, matrix_KxK[true, guessed])


def worst_detections_figure(
    title: str,
    images: Sequence[np.ndarray],
    truth: Sequence[DrawnObjects],
    found: Sequence[DrawnObjects],
    names: Sequence[str],
    keys: Sequence[str],
    values: Sequence[float],
) -> Figure:
    """Returns images with their objects and their detections beside them, in the given order.

    Args:
      title: of the figure.
      images: uint8 [H, W, 3] each.
      truth, found: of each image.
      names: of the classes.
      keys: of the images.
      values: their average precisions.
    """
    tiles: list[FigureTile] = []
    for image, given, detected, key, value in zip(images, truth, found, keys, values, strict=True):
        shown = dense_panels.shown_detections(detected)
        left = dense_panels.objects_tile(image, given, names, TILE)
        right = dense_panels.objects_tile(image, shown, names, TILE)
        objects = "object" if len(given.boxes) == 1 else "objects"
        tiles.append(FigureTile(left, key, f"{len(given.boxes):,} {objects}"))
        count = f"{len(shown.boxes):,} of {len(detected.boxes):,} detections"
        tiles.append(FigureTile(right, f"AP50 {100 * value:.0f} %", count))
    rows = [FigureRow(tiles[i : i + 4]) for i in range(0, len(tiles), 4)]
    note = "ground truth, and beside it the detections of a score of at least 0.5 (or the best 3)"
    return Figure(title, note, rows)


def worst_maps_figure(
    title: str,
    images: Sequence[np.ndarray],
    truth: Sequence[np.ndarray],
    found: Sequence[np.ndarray],
    names: Sequence[str],
    keys: Sequence[str],
    values: Sequence[float],
) -> Figure:
    """Returns images with their class maps, the predicted ones and where these are wrong, in the
    given order.

    Args:
      title: of the figure.
      images: uint8 [H, W, 3] each.
      truth, found: class maps [H, W]; 255 in `truth` where unknown.
      names: of the classes.
      keys: of the images.
      values: their mean IoUs.
    """
    rows = []
    for image, given, predicted, key, value in zip(images, truth, found, keys, values, strict=True):
        size = dense_panels.fitted_size(given.shape[0], given.shape[1], MAP_TILE)
        whole = Image.fromarray(np.ascontiguousarray(image)).convert("RGB")
        known = np.where(given == dense_panels.UNKNOWN, given, predicted)
        wrong = (known != given).sum() / max((given != dense_panels.UNKNOWN).sum(), 1)
        both = np.concatenate([given.ravel(), known.ravel()])
        present, count = np.unique(both, return_counts=True)
        legend = [
            FigureLine(names[k] if k < len(names) else str(k), chip=category_color(k))
            for k in present[np.argsort(-count, kind="stable")].tolist()
            if k != dense_panels.UNKNOWN
        ]
        rows.append(
            FigureRow(
                [
                    FigureTile(whole.resize(size, Image.Resampling.BICUBIC), key),
                    FigureTile(dense_panels.map_tile(image, given, MAP_TILE), "ground truth"),
                    FigureTile(
                        dense_panels.map_tile(image, predicted, MAP_TILE),
                        f"mIoU {100 * value:.0f} %",
                    ),
                    FigureTile(
                        dense_panels.error_tile(given, known, MAP_TILE),
                        f"{100 * wrong:.0f} % of pixels wrong",
                    ),
                ],
                legend[:SHOWN],
            )
        )
    return Figure(title, "grey stripes are unknown and do not count", rows)


def worst_first(scores: Sequence[tuple[str | int, float]], most: int) -> list[str | int]:
    """Returns the keys of the images of the lowest scores, the worst first; of equal scores, the
    first.

    >>> worst_first([("a", 0.5), ("b", 0.1), ("c", 0.3)], 2)
    ['b', 'c']
    """
    return [key for key, _ in sorted(scores, key=lambda row: row[1])[:most]]
