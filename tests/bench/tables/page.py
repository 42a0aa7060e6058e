"""All small tables as one page (`tests.bench.tables`): the figures of every row with their spread
over seeds, as bars, and the tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from m3i_jax.reporting import compare_table as report
from m3i_jax.reporting import html_page, svg_charts
from tests.bench.tables.crossing import crossing_charts
from tests.bench.tables.paired import compare_with, paired_text
from tests.bench.tables.results import PAIRED, REFERENCE, with_gains
from tests.bench.tables.sets import RUN_COLUMNS, Set

STYLE = (
    svg_charts.STYLE
    + """
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.span { position: relative; height: 1.3rem; }
.span .bar { margin-top: .15rem; }
.span .spread { position: absolute; top: .55rem; height: 2px; background: var(--ink); }
.span .seed { position: absolute; top: .35rem; width: 4px; height: .55rem; margin-left: -2px;
  background: var(--paper); border: 1px solid var(--ink); }
.rows td:first-child { width: 14rem; } .rows .number { width: 6rem; }
.best { font-weight: 600; }
"""
)


def bar_chart(rows: Sequence[report.CompareRow], column: report.CompareColumn) -> str:
    """One column as bars from 0: the mean, one standard deviation to each side as a line, and every
    seed as a mark.

    >>> row = report.CompareRow("a", (0, 1), {"k": report.MetricStats(0.5, 0.1, (0.4, 0.6))})
    >>> html = bar_chart([row], report.CompareColumn("k", "kNN", ".1f", True, 100))
    >>> html.count("class=seed"), "50.0 ± 10.0" in html
    (2, True)
    """
    shown = [(row.form, row.figures[column.key]) for row in rows if column.key in row.figures]
    most = max(
        (value for _, f in shown for value in (f.mean + (f.spread or 0), *f.each)), default=0
    )
    best = max((f.mean for _, f in shown), default=0)

    def across(value: float) -> str:
        return f"{100 * min(max(value / most, 0.0), 1.0) if most else 0:.2f}%"

    lines = []
    for title, figure in shown:
        spread = figure.spread or 0.0
        marks = "".join(f'<i class=seed style="left:{across(v)}"></i>' for v in figure.each)
        line = f"left:{across(figure.mean - spread)};width:{across(2 * spread)}"
        bars = (
            f'<div class=span><div class=bar style="width:{across(figure.mean)}"></div>'
            f'<div class=spread style="{line}"></div>{marks if len(figure.each) > 1 else ""}</div>'
        )
        bold = " class=best" if figure.mean == best else ""
        name, text = html_page.escape_html(title), report.table_cell(column, figure)
        lines.append(f"<tr><td{bold}>{name}</td><td>{bars}</td><td class=number>{text}</td></tr>")
    heading = f"<h3>{html_page.escape_html(column.title)}, %</h3>"
    return f'<div>{heading}<table class="bars rows">{"".join(lines)}</table></div>'


def tables_page(
    sets: Mapping[str, Set], results: Sequence[Mapping[str, Any]], titles: Mapping[str, str]
) -> str:
    """The page: one section for each protocol and set that has results."""
    body = [
        "<h1>M3I against other methods, in small</h1>",
        f"<p class=muted>{len(results)} runs. A bar is the mean over seeds, a line one standard"
        " deviation to each side, a mark one seed. Every figure is measured at the end of its run,"
        " on images that no run of its table trains on. The last column compares kNN with M3I's"
        " on the same images; ± there is a standard error over the things that they show and, where"
        " a row has two, over seeds.</p>",
    ]
    for protocol, title in titles.items():
        for one in sets.values():
            of_set = [
                with_gains(r) for r in results if (r["protocol"], r["set"]) == (protocol, one.name)
            ]
            if not of_set:
                continue
            rows, paired = report.compare_rows(of_set), compare_with(REFERENCE, of_set)
            columns = [c for c in one.columns if any(c.key in row.figures for row in rows)]
            # gains may be negative, where bars begin at 0; the table has them
            charted = [c for c in columns if c.best and not c.key.startswith("gained/")]
            charts = "".join(bar_chart(rows, column) for column in charted)
            cells = [
                [
                    row.form,
                    str(len(row.seeds)),
                    *(
                        report.table_cell(c, row.figures.get(c.key))
                        for c in (*columns, *RUN_COLUMNS)
                    ),
                    *([paired_text(paired.get(row.form))] if paired else []),
                ]
                for row in rows
            ]
            headers = ["", "seeds", *(c.title for c in (*columns, *RUN_COLUMNS))]
            headers += [PAIRED] if paired else []
            body.append(
                f"<h2>{html_page.escape_html(f'{one.name}, {title}')}</h2>"
                f"<div class=charts>{charts}</div>{crossing_charts(one, of_set)}"
                f"{html_page.html_table(headers, cells, 1)}"
            )
    return html_page.render_page("Small tables", html_page.with_toc(body, after=2), STYLE)
