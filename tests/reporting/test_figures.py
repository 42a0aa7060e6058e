"""Figures of evaluators: PNG and text agree, the newest of a kind is shown, text is escaped."""

import base64
import io
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from m3i_jax import run_files
from m3i_jax.errors import UserError
from m3i_jax.reporting import confusion_matrix, figures, image_grid
from m3i_jax.reporting.figures import Figure, FigureLine, FigureRow, FigureTile


def noise(side: int, seed: int) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (side, side + 3, 3)).astype(np.uint8)
    )


def shown(html: str) -> list[np.ndarray]:
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(found))))
        for found in re.findall(r'base64,([^"]*)"', html)
    ]


ROWS = [
    FigureRow(
        [FigureTile(noise(20, 0), "猫 <b>", "0.93", True), FigureTile(noise(30, 1))],
        [FigureLine("dog & co", 0.257, right=False), FigureLine("key", chip=(1, 2, 3))],
    ),
    FigureRow([FigureTile(noise(25, 2), "a very long word indeed", right=False)]),
]


def test_the_page_shows_the_pixels_and_words_that_were_given(tmp_path: pathlib.Path) -> None:
    """Every pixel, though the images share one PNG; text in any script; no text of the data becomes
    markup."""
    figures.write_figure(tmp_path / "new", "000007-kind", Figure("A <title>", "a note", ROWS))
    html = figures.figure_html(tmp_path / "new" / "000007-kind.json")
    for got, wanted in zip(
        shown(html), (tile.image for row in ROWS for tile in row.tiles), strict=True
    ):
        np.testing.assert_array_equal(got, np.asarray(wanted))
    assert (
        "猫 &lt;b&gt;" in html
        and "dog &amp; co" in html
        and "A &lt;title&gt;" in html
        and "<title>" not in html
    )
    assert html.count("26 %") == 1 and "width:25.7%" in html and "rgb(1,2,3)" in html
    assert html.count('class="right"') == 1 and html.count('class="wrong"') == 2


def test_a_share_that_is_no_number_has_no_bar(tmp_path: pathlib.Path) -> None:
    """Of features with NaN: the figure says so, and ends no run."""
    lines = [FigureLine("cat", float("nan")), FigureLine("dog", 1.0)]
    row = FigureRow([FigureTile(noise(20, 0))], lines)
    figures.write_figure(tmp_path, "000007-kind", Figure("", "", [row]))
    html = figures.figure_html(tmp_path / "000007-kind.json")
    assert "width:0.0%" in html and "nan %" in html and "width:100.0%" in html


def test_nothing_of_a_sheet_overlaps() -> None:
    paper, boxes = figures.draw_figure(Figure("t", "note " * 60, [*ROWS, *ROWS]))
    pixels, places = np.asarray(paper.image), [box for row in boxes for box in row]
    for (x, y, w, h), tile in zip(
        places, [t for row in [*ROWS, *ROWS] for t in row.tiles], strict=True
    ):
        np.testing.assert_array_equal(pixels[y : y + h, x : x + w], np.asarray(tile.image))
        assert (
            x + w <= paper.image.width - image_grid.MARGIN
            and y + h <= paper.image.height - image_grid.MARGIN
        )


def test_the_newest_of_every_kind(tmp_path: pathlib.Path) -> None:
    """Newest by its time, not by its step: an evaluation may use an older checkpoint. Copies may
    not keep the times of files."""
    for name, made in (("000009-map", 1), ("000005-map", 2), ("000009-zero_shot", 0)):
        figures.write_figure(tmp_path, name, Figure(name, "", ROWS))
        place = tmp_path / f"{name}.json"
        run_files.write_text_atomic(
            place, json.dumps(json.loads(place.read_text()) | {"made": made}), noted=True
        )
    assert [file.stem for file in figures.newest_figures(tmp_path)] == [
        "000005-map",
        "000009-zero_shot",
    ]
    assert figures.newest_figures(tmp_path / "absent") == []


def test_a_damaged_text_of_a_figure_costs_that_figure_alone(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("000001-map", "000001-curves", "000002-curves"):
        figures.write_figure(tmp_path, name, Figure(name, "", ROWS))
    (tmp_path / "000002-curves.json").write_text("{")
    found = [file.stem for file in figures.newest_figures(tmp_path)]
    assert found == ["000001-curves", "000001-map"]  # the one before is whole
    (warning,) = caplog.messages
    assert "000002-curves.json: is not a figure" in warning and "left out" in warning


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"made": 1, "title": "", "note": "", "rows": [{}]}', "no sheet"]
)
def test_what_is_broken_is_named(damage: str, tmp_path: pathlib.Path) -> None:
    figures.write_figure(tmp_path, "000001-map", Figure("", "", ROWS))
    if damage == "no sheet":
        (tmp_path / "000001-map.png").unlink()
    else:
        (tmp_path / "000001-map.json").write_text(damage)
    with pytest.raises(
        UserError, match=r"000001-map\.json: is not a figure of an evaluator"
    ) as error:
        figures.figure_html(tmp_path / "000001-map.json")
    assert "\n" not in str(error.value)


def test_confusion_is_that_of_a_full_matrix() -> None:
    r = np.random.default_rng(0)
    label, guess = r.integers(0, 40, 3000), r.integers(0, 40, 3000)
    label[:600] = np.arange(600) % 3
    guess[label < 3] = 39  # three classes with many errors, all to one
    full = np.zeros((40, 40), int)
    np.add.at(full, (label, guess), 1)
    counts = confusion_matrix.count_confusions(label, guess)
    chosen = confusion_matrix.shown_classes(counts, 10)
    errors = full.sum(0) + full.sum(1) - 2 * np.diag(full)
    assert (
        {0, 1, 2, 39} < set(chosen)
        and min(errors[chosen]) >= max(np.delete(errors, chosen))
        and chosen == sorted(chosen)
    )
    share = confusion_matrix.row_shares(counts, chosen)
    np.testing.assert_allclose(
        share[:, :-1], full[np.ix_(chosen, chosen)] / full[chosen].sum(1, keepdims=True)
    )
    np.testing.assert_allclose(share.sum(1), 1)
    first = confusion_matrix.confused_pairs(counts)
    assert {(t, g) for t, g, _ in first[:3]} == {(0, 39), (1, 39), (2, 39)} and all(
        part == 1 for *_, part in first[:3]
    )
    off = full - np.diag(np.diag(full))
    assert [full[t, g] for t, g, _ in first] == sorted(off.reshape(-1), reverse=True)[
        : confusion_matrix.PAIRS
    ]


def test_the_matrix_is_drawn_the_right_way_round() -> None:
    """Row: the class; column: the prediction, with its name above, in the same order."""
    share = np.array([[1.0, 0.0, 0.0], [0.6, 0.4, 0.0]])
    image = np.asarray(confusion_matrix.confusion_image(share, ["a", "b"], others=False))
    side = 100
    cells = image[-2 * side :, -2 * side :][side // 2 :: side, side // 2 :: side]
    np.testing.assert_array_equal(
        cells, [[image_grid.heat_tile(x) for x in row[:2]] for row in share]
    )
    wide = np.asarray(confusion_matrix.confusion_image(np.eye(2, 3), ["mm", "i"], others=False))
    # ink above the columns
    names = (wide[: -2 * side, -2 * side - 1 : -1] < 200).any(-1).sum(0).reshape(2, side).sum(1)
    assert names[0] > 2 * names[1] > 0
