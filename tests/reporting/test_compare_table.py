"""The comparison table: means and spreads computed by hand, bold cells, and the pixels of the
bars."""

import json
import statistics

import numpy as np
import pytest
from PIL import Image

from m3i_jax.reporting import compare_table, image_grid

RESULTS = [
    {
        "form": "a",
        "seed": 0,
        "values": {
            "eval/knn/top1": 0.30,
            "eval/linear/top1": 0.5,
            "loss": 2.0,
            "flops": 4.1e9,
            "seconds": 30.0,
        },
    },
    {
        "form": "m3i",
        "seed": 0,
        "values": {
            "eval/knn/top1": 0.60,
            "eval/linear/top1": 0.4,
            "loss": 1.0,
            "flops": 9e9,
            "collapse/spread": 0.5,
        },
    },
    {
        "form": "a",
        "seed": 1,
        "values": {
            "eval/knn/top1": 0.40,
            "eval/linear/top1": 0.6,
            "loss": 3.0,
            "flops": 4.1e9,
            "seconds": 50.0,
        },
    },
]


def test_mean_and_spread_over_seeds_in_the_order_of_objectives() -> None:
    a, m3i = compare_table.compare_rows(RESULTS)
    assert (a.form, a.seeds, m3i.form, m3i.seeds) == ("a", (0, 1), "m3i", (0,))
    assert a.figures["eval/knn/top1"].mean == pytest.approx(0.35)
    assert a.figures["eval/knn/top1"].spread == pytest.approx(statistics.stdev([0.3, 0.4]))
    assert a.figures["seconds"].each == (30.0, 50.0) and m3i.figures["loss"].spread is None
    assert "collapse/spread" not in a.figures and "seconds" not in m3i.figures


def test_the_table_has_only_columns_that_a_row_has_and_marks_the_best() -> None:
    rows = compare_table.compare_rows([*RESULTS[:2], RESULTS[2] | {"form": "b"}])
    lines = compare_table.compare_markdown(rows, ["a note"]).splitlines()
    assert (
        lines[0]
        == "| objective | kNN top-1 % | linear top-1 % | loss | GFLOP a step | seconds | target"
        " spread |"
    )
    assert lines[2] == "| a | 30.0 | 50.0 | 2.0000 | 4.10 | 30 | - |"
    assert lines[3] == "| m3i | **60.0** | 40.0 | 1.0000 | 9.00 | - | 0.500 |"
    assert lines[4] == "| b | 40.0 | **60.0** | 3.0000 | 4.10 | 50 | - |"
    assert lines[-1] == "- a note"
    plain = compare_table.compare_text(rows, ["a note"])
    assert "60.0" in plain and plain.endswith("a note") and "**" not in plain


def test_rows_of_other_numbers_of_seeds_say_so_and_none_is_the_best() -> None:
    rows = compare_table.compare_rows(RESULTS)
    lines = compare_table.compare_markdown(rows, [], seeds=3).splitlines()
    assert lines[2].startswith("| a (2 of 3 seeds) | 35.0 ± 7.1 | 55.0 ± 7.1 | 2.5000 ± 0.7071 |")
    assert lines[3].startswith("| m3i (1 of 3 seeds) | 60.0 | 40.0 |")
    plain = compare_table.compare_text(rows, [])
    assert "m3i (1 of 2 seeds)" in plain and "a (" not in plain
    assert "over the seeds that a row has, 1 to 2;" in compare_table.seeds_note(rows)
    assert compare_table.seeds_note(rows[1:]).startswith("One seed: differences may be chance")
    equal = compare_table.compare_rows(RESULTS[::2] + [r | {"form": "b"} for r in RESULTS[::2]])
    lines = compare_table.compare_markdown(equal, [], seeds=2).splitlines()
    assert lines[2].startswith("| a | **35.0 ± 7.1** |")
    assert compare_table.seeds_note(equal) == "Mean ± standard deviation over 2 seeds."
    assert compare_table.seeds_note([]) == ""


def test_the_cost_of_a_real_run_is_written_out() -> None:
    """ViT-B/16 for 300 epochs of ImageNet; not 1.074e+08."""
    column = next(c for c in compare_table.COLUMNS if c.key == "run_flops")
    cost = 279.5e9 * 1_281_167 * 300
    assert compare_table.table_cell(column, compare_table.MetricStats(cost, None, (cost,))) == (
        "107,425,853"
    )
    small = compare_table.MetricStats(1.5e12, 0.25e12, (1.25e12, 1.75e12))
    assert compare_table.table_cell(column, small) == "1.5 ± 0.25"


def test_a_single_row_is_not_the_best_of_anything() -> None:
    assert "**" not in compare_table.compare_markdown(compare_table.compare_rows(RESULTS[:1]), [])


def test_json_has_every_seed_and_null_for_what_is_not_finite() -> None:
    results = [*RESULTS, {"form": "k", "seed": 0, "values": {"loss": float("nan"), "lr": 0.1}}]
    rows = compare_table.compare_rows(results)
    read = json.loads(json.dumps(compare_table.compare_content(rows, ["note ±"], {"steps": 3})))
    assert read["settings"] == {"steps": 3} and read["notes"] == ["note ±"]
    assert read["rows"][0]["figures"]["loss"]["each"] == [2.0, 3.0] and read["rows"][0][
        "seeds"
    ] == [0, 1]
    assert read["rows"][2]["figures"] == {
        "loss": {"mean": None, "spread": None, "each": [None]},
        "lr": {"mean": 0.1, "spread": None, "each": [0.1]},
    }
    assert "nan" in compare_table.compare_markdown(compare_table.compare_rows(results), [])


def lengths(path, colour: image_grid.Color) -> list[int]:
    """Widths of the bars of a colour, from top to bottom."""
    with Image.open(path) as image:
        here = (np.array(image) == colour).all(-1)[:, image_grid.MARGIN + compare_table.LABELS :]
    rows = here[image_grid.MARGIN + compare_table.HEAD - compare_table.BETWEEN :].sum(1)
    starts = np.flatnonzero((rows[1:] > 0) & (rows[:-1] == 0)) + 1
    return [int(rows[start]) for start in starts]


def test_bars_are_as_long_as_their_figures(tmp_path) -> None:
    rows = compare_table.compare_rows(
        [{**r, "values": {k: v for k, v in r["values"].items()}} for r in RESULTS[:2]]
    )
    assert compare_table.write_bar_chart(tmp_path / "c.png", rows, title="two", chance=0.2)
    for colour, values in ((image_grid.OWN, (0.3, 0.6)), (image_grid.PARTNER, (0.5, 0.4))):
        got = lengths(tmp_path / "c.png", colour)
        np.testing.assert_allclose(got, [compare_table.SPAN * v / 0.6 + 1 for v in values], atol=2)


def test_a_figure_that_is_missing_or_not_finite_has_no_bar(tmp_path) -> None:
    results = [
        *RESULTS,
        {"form": "k", "seed": 0, "values": {"eval/knn/top1": float("nan")}},
        {"form": "z", "seed": 0, "values": {"loss": 1.0}},
    ]
    assert compare_table.write_bar_chart(
        tmp_path / "c.png", compare_table.compare_rows(results), title="four"
    )
    assert len(lengths(tmp_path / "c.png", image_grid.OWN)) == 2


def test_recall_stands_in_where_there_are_no_labels(tmp_path) -> None:
    results = [
        {
            "form": "clip",
            "seed": 0,
            "values": {
                "eval/retrieval/text_to_image/r1": 0.04,
                "eval/retrieval/image_to_text/r1": 0.02,
            },
        }
    ]
    assert compare_table.write_bar_chart(
        tmp_path / "c.png", compare_table.compare_rows(results), title="one", chance=0.1
    )
    np.testing.assert_allclose(
        lengths(tmp_path / "c.png", image_grid.OWN), [compare_table.SPAN + 1], atol=2
    )


def test_nothing_to_draw_is_no_file(tmp_path) -> None:
    assert not compare_table.write_bar_chart(
        tmp_path / "c.png",
        compare_table.compare_rows([{"form": "a", "seed": 0, "values": {"loss": 1.0}}]),
        title="none",
    )
    assert not list(tmp_path.iterdir())
