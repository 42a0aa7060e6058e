"""Curves of many points: no value is lost in a mean, and none that is not finite is bridged."""

import math
import re

import numpy as np

from m3i_jax.reporting import svg_charts
from m3i_jax.reporting.svg_charts import SvgCurve


def coordinates(path: str) -> np.ndarray:
    return np.array([[float(v) for v in p.split(",")] for p in path.strip("Z").split(" ")])


def paths(chart: str, kind: str = "") -> list[np.ndarray]:
    """The coordinates of the paths of a kind: "" lines, "band "."""
    return [coordinates(d) for d in re.findall(rf'<path class="{kind}c0" d="M([^"]*)"', chart)]


def test_one_large_value_among_thousands_is_drawn() -> None:
    """A gradient norm of 1e4 among 5,000 lines. The band has it, and the axis reaches it."""
    values = np.ones(5000)
    values[1234] = 1e4
    groups = svg_charts.group_points(range(5000), values.tolist())
    assert len(groups) <= 400 and max(g.high for g in groups) == 1e4
    assert min(g.low for g in groups) == 1.0 and max(g.y for g in groups) < 1e4
    assert (groups[0].x, groups[-1].x) == (0, 4999)
    assert sum(abs(g.high - g.low) > 0 for g in groups) == 1
    chart = svg_charts.svg_chart("t", [SvgCurve("a", range(5000), values)], last=4999)
    (band,), (line,) = paths(chart, "band "), paths(chart)
    top = float(re.findall(r'class="grid"[^>]* y1="([\d.]+)"', chart)[-1])  # of 1e4
    assert "logarithmic" in chart and band[:, 1].min() == top < line[:, 1].min()


def test_first_and_last_points_are_those_of_the_curve() -> None:
    x, y = list(range(1001)), [float(v) for v in range(1001)]
    groups = svg_charts.group_points(x, y, most=10)
    assert len(groups) <= 10
    assert [(g.x, g.y) for g in (groups[0], groups[-1])] == [(0, 0), (1000, 1000)]
    assert [g.low for g in groups[2:]] == [g.high + 1 for g in groups[1:-1]]  # nothing twice


def test_a_line_ends_where_values_are_not_finite() -> None:
    values = [1.0, 2.0, math.nan, 3.0, 4.0, math.inf, 5.0]
    chart = svg_charts.svg_chart("t", [SvgCurve("a", range(7), values)], last=6)
    assert [len(line) for line in paths(chart)] == [2, 2]
    assert chart.count('<path class="gap c0"') == 2
    assert "a: not finite at step 2<" in chart and "a: not finite at step 5<" in chart
    assert chart.count("<circle") == 5  # the part of one point is a dot too
    many = [1.0] * 2000
    many[700] = math.nan
    chart = svg_charts.svg_chart("t", [SvgCurve("a", range(2000), many)], last=1999)
    assert len(paths(chart)) == 2 and chart.count('<path class="gap c0"') == 1


def test_evaluations_are_picked_and_not_averaged() -> None:
    values = [float(k % 2) for k in range(1001)]
    chart = svg_charts.svg_chart("t", [SvgCurve("a", range(1001), values)], last=1000, picked=True)
    (line,) = paths(chart)
    assert len(line) == 400 and len(set(line[:, 1])) == 2 and not paths(chart, "band ")
