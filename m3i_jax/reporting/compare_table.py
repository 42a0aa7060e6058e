"""The table of --mode=compare: one row for each objective, with mean and standard deviation over
seeds, as text, Markdown, JSON and a bar chart.

Losses are in the table, but only evaluations are comparable: each objective has its own scale of
loss."""

import dataclasses
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from m3i_jax.reporting import image_grid, text_table
from m3i_jax.reporting.image_grid import INK, MARGIN, MUTED, OWN, PARTNER


@dataclasses.dataclass(frozen=True)
class CompareColumn:
    """A column: the metric's name in the log, its title, its format ("": four figures), and whether
    the largest value is the best."""

    key: str
    title: str
    form: str
    best: bool = False
    scale: float = 1.0


COLUMNS = (
    CompareColumn("eval/knn/top1", "kNN top-1 %", ".1f", True, 100),
    CompareColumn("eval/linear/top1", "linear top-1 %", ".1f", True, 100),
    CompareColumn("eval/retrieval/text_to_image/r1", "text to image R@1 %", ".1f", True, 100),
    CompareColumn("eval/retrieval/image_to_text/r1", "image to text R@1 %", ".1f", True, 100),
    CompareColumn("loss", "loss", ".4f"),
    CompareColumn("images", "images", ",.0f"),
    CompareColumn("flops", "GFLOP a step", ",.2f", scale=1e-9),
    CompareColumn("run_flops", "TFLOP a run", "", scale=1e-12),
    CompareColumn("seconds", "seconds", ",.0f"),
    CompareColumn("collapse/target_std", "target std", ".3g"),
    CompareColumn("collapse/spread", "target spread", ".3f"),
    CompareColumn("collapse/effective_rank", "effective rank", ".1f"),
)
BARS = (("eval/knn/top1", "kNN", OWN), ("eval/linear/top1", "linear", PARTNER))
OTHER_BARS = (
    ("eval/retrieval/text_to_image/r1", "text to image R@1", OWN),
    ("eval/retrieval/image_to_text/r1", "image to text R@1", PARTNER),
)


@dataclasses.dataclass(frozen=True)
class MetricStats:
    """Mean and sample standard deviation over seeds; None for a single seed."""

    mean: float
    spread: float | None
    each: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class CompareRow:
    """An objective, its finished seeds, and its statistics by metric."""

    form: str
    seeds: tuple[int, ...]
    figures: dict[str, MetricStats]


def compare_rows(results: Sequence[Mapping[str, Any]]) -> list[CompareRow]:
    """Returns rows from the results of runs, in the order of their objectives.

    Args:
      results: {"form": str, "seed": int, "values": {name: number}} of every finished run.

    >>> runs = [{"form": "a", "seed": s, "values": {"loss": v}} for s, v in enumerate((1.0, 3.0))]
    >>> compare_rows(runs)[0].figures["loss"]
    MetricStats(mean=2.0, spread=1.4142..., each=(1.0, 3.0))
    """
    rows = []
    for form in dict.fromkeys(r["form"] for r in results):
        runs = [r for r in results if r["form"] == form]
        figures = {}
        for key in dict.fromkeys(key for r in runs for key in r["values"]):
            each = tuple(float(r["values"][key]) for r in runs if key in r["values"])
            finite = all(map(math.isfinite, each))
            spread = statistics.stdev(each) if len(each) > 1 and finite else None
            figures[key] = MetricStats(
                math.fsum(each) / len(each) if finite else math.nan, spread, each
            )
        rows.append(CompareRow(form, tuple(r["seed"] for r in runs), figures))
    return rows


def used_columns(rows: Sequence[CompareRow]) -> list[CompareColumn]:
    """Returns the columns that any row has."""
    return [c for c in COLUMNS if any(c.key in row.figures for row in rows)]


def table_cell(column: CompareColumn, figure: MetricStats | None) -> str:
    """Returns the mean and spread as text.

    >>> table_cell(COLUMNS[0], MetricStats(0.5, 0.012, (0.49, 0.51)))
    '50.0 ± 1.2'
    >>> table_cell(COLUMNS[4], MetricStats(2.0, None, (2.0,))), table_cell(COLUMNS[0], None)
    ('2.0000', '-')
    """
    if figure is None:
        return "-"
    text = _number(figure.mean, column)
    # no spread for a constant, such as FLOPs
    constant = figure.spread is None or (not figure.spread and not column.best)
    return (
        text if figure.spread is None or constant else f"{text} ± {_number(figure.spread, column)}"
    )


def _number(value: float, column: CompareColumn) -> str:
    scaled = value * column.scale
    return format(scaled, column.form) if column.form else text_table.format_figures(scaled)


def row_title(row: CompareRow, seeds: int) -> str:
    """Returns the objective of a row, with the number of its seeds if that is not all of `seeds`.

    >>> row_title(CompareRow("mae", (0, 2), {}), 3), row_title(CompareRow("mae", (0,), {}), 1)
    ('mae (2 of 3 seeds)', 'mae')
    """
    return (
        row.form if len(row.seeds) >= seeds else f"{row.form} ({len(row.seeds)} of {seeds} seeds)"
    )


def seeds_note(rows: Sequence[CompareRow]) -> str:
    """Returns what the numbers after ± are, from the seeds that the rows have; "" without a row.

    >>> seeds_note([CompareRow("a", (0, 1), {}), CompareRow("b", (0, 1), {})])
    'Mean ± standard deviation over 2 seeds.'
    """
    least, most = (part((len(row.seeds) for row in rows), default=0) for part in (min, max))
    if most == 1:
        return "One seed: differences may be chance; set config.compare.seeds."
    if least < most:
        return (
            f"Mean ± standard deviation over the seeds that a row has, {least} to {most}; without"
            " equal numbers of them no value is marked as the best."
        )
    return f"Mean ± standard deviation over {most} seeds." if most else ""


def compare_text(rows: Sequence[CompareRow], notes: Sequence[str], *, seeds: int = 0) -> str:
    """Returns the table for a console, notes below. `seeds`: that a complete row has."""
    shown, seeds = used_columns(rows), max([seeds, *(len(row.seeds) for row in rows)])
    table = text_table.text_table(
        [
            (row_title(r, seeds), *(table_cell(c, r.figures.get(c.key)) for c in shown))
            for r in rows
        ],
        ("objective", *(c.title for c in shown)),
    )
    return "\n".join([table, "", *notes])


def compare_markdown(rows: Sequence[CompareRow], notes: Sequence[str], *, seeds: int = 0) -> str:
    """Returns the table as Markdown, notes below; the best of each evaluation is bold if all rows
    have equal numbers of seeds. `seeds`: that a complete row has."""
    shown, seeds = used_columns(rows), max([seeds, *(len(row.seeds) for row in rows)])
    finite_means = {
        c.key: [
            r.figures[c.key].mean
            for r in rows
            if c.key in r.figures and math.isfinite(r.figures[c.key].mean)
        ]
        for c in shown
    }
    equal = {
        c.key: len({len(r.figures[c.key].each) for r in rows if c.key in r.figures}) == 1
        for c in shown
    }

    def one(row: CompareRow, column: CompareColumn) -> str:
        figure, means = row.figures.get(column.key), finite_means[column.key]
        plain = table_cell(column, figure)
        return (
            f"**{plain}**"
            if column.best
            and figure
            and equal[column.key]
            and len(means) > 1
            and figure.mean == max(means)
            else plain
        )

    lines = [
        f"| objective | {' | '.join(c.title for c in shown)} |",
        f"|---|{'---:|' * len(shown)}",
    ]
    lines += [
        f"| {row_title(row, seeds)} | {' | '.join(one(row, c) for c in shown)} |" for row in rows
    ]
    lines = lines if rows else ["No run has a result."]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


def compare_content(
    rows: Sequence[CompareRow], notes: Sequence[str], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns all metrics of the last lines for JSON; numbers that are not finite are None."""

    def number(x: float | None) -> float | None:
        return x if x is not None and math.isfinite(x) else None

    def one(row: CompareRow) -> dict[str, Any]:
        figures = {
            key: {
                "mean": number(f.mean),
                "spread": number(f.spread),
                "each": [number(v) for v in f.each],
            }
            for key, f in row.figures.items()
        }
        return {"form": row.form, "seeds": row.seeds, "figures": figures}

    return {"settings": dict(settings), "rows": [one(row) for row in rows], "notes": list(notes)}


LABELS, SPAN, BAR, BETWEEN, HEAD = 190, 460, 15, 16, 74


def write_bar_chart(
    path: str | os.PathLike[str],
    rows: Sequence[CompareRow],
    *,
    title: str,
    chance: float | None = None,
) -> bool:
    """Write a bar chart as PNG: kNN and linear accuracy of every objective, or recall if neither
    was measured, with the spread as a line at the end. Returns False, without a file, if there is
    no value to draw.

    Args:
      path: the file; its directory must exist.
      rows: of the table.
      title: of the chart.
      chance: accuracy of guessing, drawn as a dashed line.

    Raises:
      UserError: the file cannot be written.

    >>> import tempfile
    >>> row = CompareRow("a", (0,), {"eval/knn/top1": MetricStats(0.5, None, (0.5,))})
    >>> write_bar_chart(tempfile.mkdtemp() + "/a.png", [row], title="a")
    True
    """
    by_label = [b for b in BARS if any(b[0] in row.figures for row in rows)]
    bars = by_label or [b for b in OTHER_BARS if any(b[0] in row.figures for row in rows)]
    if not bars:
        return False
    means = [
        f.mean + (f.spread or 0)
        for row in rows
        for key, *_ in bars
        if (f := row.figures.get(key)) and math.isfinite(f.mean)
    ]
    step = next(
        s for s in (0.01, 0.02, 0.05, 0.1, 0.2) if max(means, default=0) <= 5 * s or s == 0.2
    )
    most = min(max(step, math.ceil(max(means, default=0) / step - 1e-9) * step), 1.0)
    pitch = len(bars) * BAR + BETWEEN
    left, bottom = MARGIN + LABELS, MARGIN + HEAD + len(rows) * pitch
    page = image_grid.ImageGrid(left + SPAN + 96, bottom + 34)

    def across(value: float) -> int:
        return left + round(SPAN * min(value, most) / most)

    page.words(MARGIN, MARGIN + 12, title, size=15, width=page.image.width - 2 * MARGIN)
    x: float = MARGIN
    what = "top-1 accuracy on held-out images" if by_label else "recall on held-out pairs"
    for _, name, colour in bars:
        page.chip(round(x), MARGIN + 38, colour, size=10)
        x += 16 + page.words(x + 16, MARGIN + 37, name, ink=INK) + 20
    page.words(x, MARGIN + 37, what, ink=MUTED)
    top = MARGIN + HEAD - BETWEEN
    for tick in range(round(most / step) + 1):
        at = across(tick * step)
        page.draw.line((at, top, at, bottom), fill=image_grid.RULE)
        page.words(at, bottom + 18, f"{100 * tick * step:.0f} %", size=11, ink=MUTED, anchor="ms")
    if chance is not None and by_label and chance <= most:
        at = across(chance)
        for y in range(top, bottom, 6):
            page.draw.line((at, y, at, min(y + 2, bottom)), fill=MUTED)
        page.words(at, top - 4, "chance", size=11, ink=MUTED, anchor="ms")
    for number, row in enumerate(rows):
        y = MARGIN + HEAD + number * pitch - BETWEEN // 2
        page.words(
            left - 12,
            y + len(bars) * BAR / 2 + 4,
            row.form,
            size=13,
            width=LABELS - 12,
            anchor="rs",
        )
        for index, (key, _, colour) in enumerate(bars):
            _bar(page, left, y + index * BAR, across, row.figures.get(key), colour)
    page.save(path)
    return True


def _bar(
    page: image_grid.ImageGrid,
    left: int,
    y: int,
    across: Any,
    figure: MetricStats | None,
    colour: image_grid.Color,
) -> None:
    if figure is None or not math.isfinite(figure.mean):
        page.words(
            left + 6, y + BAR - 4, "none" if figure is None else "not finite", size=11, ink=MUTED
        )
        return
    end = across(figure.mean)
    page.draw.rectangle((left, y + 1, max(end, left), y + BAR - 2), fill=colour)
    if figure.spread:
        low, high, middle = (
            across(max(figure.mean - figure.spread, 0)),
            across(figure.mean + figure.spread),
            y + BAR // 2,
        )
        page.draw.line((low, middle, high, middle), fill=INK)
        for at in (low, high):
            page.draw.line((at, middle - 3, at, middle + 3), fill=INK)
        end = max(end, high)
    words = table_cell(CompareColumn("", "", ".1f", scale=100), figure)
    # a blank background, so that no line of the axis crosses the text
    page.draw.rectangle(
        (end + 4, y + 2, end + 8 + image_grid.font(11).getlength(words), y + BAR - 2),
        fill=image_grid.PAPER,
    )
    page.words(end + 6, y + BAR - 3, words, size=11)
