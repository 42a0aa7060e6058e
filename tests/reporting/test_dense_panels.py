"""Sheets and figures of dense tasks: what is drawn is where it was annotated, in the colour of its
class; words stay inside and apart; everything fits its width."""

import itertools
import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m3i_jax.errors import UserError
from m3i_jax.reporting import confusion_matrix, dense_figures, dense_panels, figures, image_grid
from m3i_jax.reporting.dense_panels import DrawnObjects

NAMES = ("cat", "dog", "a class with a name that is far too long for its tile", "猫")
GREY = np.full((60, 80, 3), 128, np.uint8)


def objects(count: int, *, seed: int = 0, scores: bool = False, masks: bool = True) -> DrawnObjects:
    r = np.random.default_rng(seed)
    low = r.uniform(0, 50, (count, 2))
    boxes = np.concatenate([low, low + r.uniform(3, 30, (count, 2))], 1).clip(0, [80, 60, 80, 60])
    shapes: list[np.ndarray | None] = []
    for x0, y0, x1, y1 in boxes.astype(int):
        mask = np.zeros((60, 80), bool)
        mask[y0:y1, x0:x1] = True
        shapes.append(mask if len(shapes) % 4 else None)
    return DrawnObjects(
        boxes=boxes,
        classes=r.integers(0, 4, count),
        scores=r.random(count) if scores else None,
        masks=shapes if masks else None,
        crowd=np.arange(count) % 5 == 4,
    )


def test_colours_of_classes_differ() -> None:
    colors = np.array([dense_panels.category_color(k) for k in range(150)], int)
    assert colors.min() >= 0 and colors.max() <= 255
    first = [np.abs(a - b).sum() for a, b in itertools.combinations(colors[:20], 2)]
    assert min(first) >= 60
    every = [np.abs(a - b).sum() for a, b in itertools.combinations(colors, 2)]
    assert min(every) > 0


def test_boxes_and_masks_are_where_they_were_annotated() -> None:
    box = np.array([[20.0, 10.0, 50.0, 40.0]])
    mask = np.zeros((60, 80), bool)
    mask[15:35, 25:45] = True
    drawn = DrawnObjects(boxes=box, classes=np.array([1]), masks=[mask])
    tile = np.asarray(dense_panels.objects_tile(GREY, drawn, NAMES, 320), int)  # four times as wide
    assert tile.shape == (240, 320, 3)
    color = np.array(dense_panels.category_color(1))
    for y, x in ((100, 81), (100, 198), (158, 140)):  # left, right, bottom
        np.testing.assert_array_equal(tile[y, x], color)
    inside, free = tile[70:130, 110:170], tile[70:130, 205:300]
    share = dense_panels._FILL
    assert np.abs(inside - (128 * (1 - share) + color * share)).max() <= 1
    np.testing.assert_array_equal(free, 128)
    crowd = DrawnObjects(boxes=box, classes=np.array([1]), crowd=np.array([True]))
    dashed = np.asarray(dense_panels.objects_tile(GREY, crowd, NAMES, 320), int)
    edge = (dashed[60:150, 81] == color).all(-1)
    assert 0.3 < edge.mean() < 0.8


@pytest.mark.parametrize("room", [120, 236, 484])
def test_words_stay_in_the_tile_and_apart(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[tuple[float, ...]] = []
    label = dense_panels._label

    def noted(tile, draw, box, words, color, taken):  # type: ignore[no-untyped-def]
        label(tile, draw, box, words, color, taken)
        placed.append(taken[-1])

    monkeypatch.setattr(dense_panels, "_label", noted)
    tile = dense_panels.objects_tile(GREY, objects(6, scores=True), NAMES, room)
    assert len(placed) == 6
    for x0, y0, x1, y1 in placed:
        assert x0 >= 0 and y0 >= 0 and x1 <= tile.width and y1 <= tile.height
    if room == 484:  # there is room for all
        for a, b in itertools.combinations(placed, 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_shown_detections() -> None:
    many = objects(40, scores=True)
    shown = dense_panels.shown_detections(many, score=0.4)
    assert shown.scores is not None and len(shown.boxes) == 12 and shown.masks is not None
    assert (np.diff(shown.scores) <= 0).all() and shown.scores.min() >= 0.4
    assert len(dense_panels.shown_detections(many, score=2.0).boxes) == 3
    none = objects(0, scores=True)
    assert len(dense_panels.shown_detections(none).boxes) == 0


@pytest.mark.parametrize("sizes", [[(60, 80)] * 3, [(60, 80), (400, 90), (30, 700)], []])
def test_sheets_are_1024_wide(sizes: list[tuple[int, int]], tmp_path: pathlib.Path) -> None:
    """Small and large images, tall and wide ones, without objects, none at all."""
    r = np.random.default_rng(0)
    images = [r.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]
    truth = [objects(n * 3, seed=n, masks=False) for n in range(len(sizes))]
    found = [objects(n * 5, seed=9 - n, scores=True, masks=False) for n in range(len(sizes))]
    words = [f"image {n}" for n in range(len(sizes))]
    dense_panels.write_detection_sheet(
        tmp_path / "objects.png", images, truth, found, names=NAMES, words=words
    )
    maps = [r.integers(0, 4, size).astype(np.uint8) for size in sizes]
    for each in maps:
        each[:5] = 255
    dense_panels.write_map_sheet(
        tmp_path / "maps.png", images, maps, maps[::-1] if sizes == [] else maps, names=NAMES
    )
    for name in ("objects", "maps"):
        with Image.open(tmp_path / f"{name}.png") as sheet:
            assert sheet.width == 1024 and sheet.height < 5000
    with pytest.raises(UserError, match="cannot write"):
        dense_panels.write_map_sheet(tmp_path / "no" / "x.png", images, maps, maps, names=NAMES)


def test_maps_show_classes_and_what_is_unknown() -> None:
    truth = np.zeros((20, 40), np.uint8)
    truth[:, 20:] = 3
    truth[:4] = 255
    found = truth.copy()
    found[10:, :10] = 2
    image = np.full((20, 40, 3), 100, np.uint8)
    tile = np.asarray(dense_panels.map_tile(image, truth, 160), int)
    assert tile.shape == (80, 160, 3)
    left, right = tile[30, 40], tile[30, 120]
    for pixel, label in ((left, 0), (right, 3)):
        distances = [np.abs(pixel - dense_panels.category_color(k)).sum() for k in range(20)]
        assert int(np.argmin(distances)) == label
    assert len(np.unique(tile[:12].reshape(-1, 3), axis=0)) == 2  # stripes
    errors = np.asarray(dense_panels.error_tile(truth, found, 160), int)
    np.testing.assert_array_equal(errors[60, 20], dense_panels._WRONG)
    np.testing.assert_array_equal(errors[60, 120], dense_panels._RIGHT)
    wrong = (errors == dense_panels._WRONG).all(-1)
    assert wrong.sum() == 40 * 40


def test_curves_are_drawn_where_they_are() -> None:
    recall = np.linspace(0, 1, 101)
    curves = np.stack([1 - recall, np.full(101, 0.5), np.full(101, np.nan)])
    image = np.asarray(dense_figures.precision_recall_image(curves, [0, 1]), int)
    (width, height), low = dense_figures.CHART, dense_figures
    right, bottom = width - low._RIGHT, height - low._BOTTOM
    middle = bottom - 0.5 * (bottom - low._TOP)

    def near(x: float, y: float, color: tuple[int, int, int]) -> bool:
        window = image[round(y) - 1 : round(y) + 2, round(x) - 1 : round(x) + 2]
        return bool((np.abs(window - color).sum(-1) < 90).any())

    quarter = low._LEFT + 0.25 * (right - low._LEFT)
    assert near(quarter, middle, dense_panels.category_color(1))
    assert near(quarter, bottom - 0.75 * (bottom - low._TOP), dense_panels.category_color(0))
    assert near(quarter, bottom - 0.625 * (bottom - low._TOP), (38, 40, 44))  # the mean


def test_figures_of_dense_tasks_are_written_and_read(tmp_path: pathlib.Path) -> None:
    r = np.random.default_rng(0)
    many = [f"class {k}" for k in range(50)]
    curves = np.sort(r.random((50, 101)), 1)[:, ::-1]
    curves[7] = np.nan
    value = np.stack([curves.mean(1), curves[:, 50]], 1)
    counts = r.integers(0, 9, 50)
    truth = [objects(3, seed=n) for n in range(3)]
    found = [objects(5, seed=n, scores=True) for n in range(3)]
    maps = [r.integers(0, 3, (60, 80)).astype(np.uint8) for _ in range(3)]
    keys, values = ["a", "b", "c"], [0.1, 0.2, 0.3]
    times = [9, 8, 7, 6]
    confusion = confusion_matrix.count_confusions(
        np.repeat([0, 1, 4, 2], times), np.repeat([1, 4, 0, 2], times)
    )
    made = {
        "curves": dense_figures.curves_figure("Curves", many, curves),
        "few": dense_figures.curves_figure("Curves", many[:3], curves[:3]),
        "none": dense_figures.curves_figure("Curves", many[:1], curves[7:8]),
        "table": dense_figures.class_table_figure(
            "Classes", ("objects", "AP", "AP50"), many, counts, value
        ),
        "confusion": dense_figures.class_confusion_figure(
            "Confusion", confusion, NAMES, note="objects"
        ),
        "worst": dense_figures.worst_detections_figure(
            "Worst", [GREY] * 3, truth, found, NAMES, keys, values
        ),
        "maps": dense_figures.worst_maps_figure(
            "Worst", [GREY] * 3, maps, maps[::-1], NAMES, keys, values
        ),
    }
    for name, figure in made.items():
        figures.write_figure(tmp_path, f"000001-{name}", figure)
        with Image.open(tmp_path / f"000001-{name}.png") as drawn:
            assert drawn.width <= 1060, name
    html = {
        file.stem.partition("-")[2]: figures.figure_html(file)
        for file in figures.newest_figures(tmp_path)
    }
    assert set(html) == set(made)
    assert "mean of 49 classes" in html["curves"] and "… 41 classes …" in html["curves"]
    best = int(np.nanargmax(curves.mean(1)))
    assert f"class {best}<" in html["curves"] and "class 7<" not in html["curves"]
    assert "dog missed" in html["confusion"] and "cat as dog" in html["confusion"]
    assert "cat, not there" in html["confusion"]
    assert "AP50 10 %" in html["worst"] and "mIoU 30 %" in html["maps"]


def test_the_worst_of_many_classes_have_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes without a value, such as those of LVIS that no image shows, are not the worst."""
    drawn: list[str] = []
    words = image_grid.ImageGrid.words

    def noted(page: image_grid.ImageGrid, x: float, y: float, text: str, **more: Any) -> float:
        drawn.append(text)
        return words(page, x, y, text, **more)

    monkeypatch.setattr(image_grid.ImageGrid, "words", noted)
    names = [f"class {k}" for k in range(100)]
    value = np.linspace(1, 0, 100)[:, None]
    value[90:] = np.nan
    headers, counts = ("objects", "AP"), np.ones(100, int)
    figure = dense_figures.class_table_figure("t", headers, names, counts, value)
    assert [text for text in drawn if text.startswith("class ")] == [*names[:20], *names[70:90]]
    assert "… 50 classes …" in drawn
    assert figure.note == (
        "100 classes by AP, in per cent; 10 have no AP and are left out; the 20 best and the 20"
        " worst"
    )
    value[30:] = np.nan
    drawn.clear()
    figure = dense_figures.class_table_figure("t", headers, names, counts, value)
    assert [text for text in drawn if text.startswith("class ")] == names[:30]
    assert figure.note.endswith("; 70 have no AP and are left out")


def test_counts_of_a_matrix() -> None:
    r = np.random.default_rng(0)
    label, guess = r.integers(0, 6, 200), r.integers(0, 6, 200)
    matrix = np.zeros((6, 6), int)
    np.add.at(matrix, (label, guess), 1)
    got = dense_figures.confusion_of_matrix(matrix)
    expected = confusion_matrix.count_confusions(label, guess)
    for name in ("true", "guessed", "count"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))


def test_nothing_counted_is_not_drawn() -> None:
    """Held-out images that show no object, without a detection."""
    nothing = dense_figures.confusion_of_matrix(np.zeros((4, 4), int))
    assert dense_figures.class_confusion_figure("Confusion", nothing, NAMES, note="").rows == []
    assert dense_figures.worst_detections_figure("Worst", [], [], [], NAMES, [], []).rows == []
