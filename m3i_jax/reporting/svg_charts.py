"""Curves as small SVG charts with axes, without scripts."""

import dataclasses
import math
from collections.abc import Callable, Sequence

from m3i_jax.reporting.html_page import escape_html

WIDTH, HEIGHT = 420, 200
# margins: least room for labels at the left, room for half of the last one below the axis
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 18, 10, 28
_LETTER = 8  # width of a digit, with room to spare
MOST = 400  # points of a curve; more are drawn in groups
_WIDE = 300.0  # ratio of largest to smallest value above which an axis is logarithmic


@dataclasses.dataclass(frozen=True)
class SvgCurve:
    """One line of a chart; `tone` is a colour class of the style sheet, c0 to c7, with "dashed" or
    "dotted" after a blank for more lines than colours."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    tone: str = "c0"


def axis_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns round numbers from low to high, inclusive, with a step of 1, 2 or 5 times a power of
    ten.

    >>> axis_ticks(0.0, 1.0), axis_ticks(3.0, 3.0)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [3.0])
    """
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_label(value: float, step: float = 0.0) -> str:
    """Returns a number in few characters, but distinct from one that differs by `step`.

    >>> [tick_label(v) for v in (0.0, 0.25, 1000.0, 12000.0, 2.5e6, 3e-5, -1.5)]
    ['0', '0.25', '1000', '12k', '2.5M', '3e-5', '-1.5']
    >>> tick_label(4.594, 0.002), tick_label(12_340.0, 10.0), tick_label(9999.9)
    ('4.594', '12.34k', '10000')
    """
    digits = (
        1 + math.floor(math.log10(abs(value))) - math.floor(math.log10(step))
        if step and value
        else 0
    )
    digits = max(3, digits)
    for above, size, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= above:
            return _decimals(value / size, digits) + letter
    if not 0 < abs(value) < 1e-3:
        return _decimals(value, digits)
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _decimals(value: float, digits: int) -> str:
    """A number with so many digits, or with all of a larger whole part: never as 1e+03."""
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e" in text else text


@dataclasses.dataclass(frozen=True)
class PointGroup:
    """Consecutive points of a curve, drawn as one: their mean, and the least and the largest value,
    of those that are finite; NaN if none is.

    Attributes:
      broken: a value is not finite, so that the line before ends here.
    """

    x: float
    y: float
    low: float
    high: float
    broken: bool = False


def group_points(x: Sequence[float], y: Sequence[float], most: int = MOST) -> list[PointGroup]:
    """Returns at most `most` groups of points; the first and the last one have a point alone.

    >>> [(g.x, g.y, g.low, g.high) for g in group_points([0, 1, 2, 3], [5.0, 1, 3, 6.0], most=3)]
    [(0.0, 5.0, 5.0, 5.0), (1.5, 2.0, 1, 3), (3.0, 6.0, 6.0, 6.0)]
    >>> group_points([7], [math.nan])
    [PointGroup(x=7.0, y=nan, low=nan, high=nan, broken=True)]
    """
    points = list(zip(x, y, strict=True))
    size = 1 if len(points) <= most else -(-(len(points) - 2) // (most - 2))
    inner = [points[i : min(i + size, len(points) - 1)] for i in range(1, len(points) - 1, size)]
    return [_group(each) for each in (points[:1], *inner, points[1:][-1:]) if each]


def _group(points: Sequence[tuple[float, float]]) -> PointGroup:
    middle = sum(a for a, _ in points) / len(points)
    good = [b for _, b in points if math.isfinite(b)]
    broken, good = len(good) < len(points), good or [math.nan]
    return PointGroup(middle, sum(good) / len(good), min(good), max(good), broken)


def pick_points(
    x: Sequence[float], y: Sequence[float], most: int = MOST
) -> tuple[list[float], list[float]]:
    """Returns at most `most` of the points, evenly spread, with the first and the last.

    >>> pick_points(range(9), range(9), most=3)
    ([0, 4, 8], [0, 4, 8])
    """
    if len(x) <= most:
        return list(x), list(y)
    chosen = [round(k * (len(x) - 1) / (most - 1)) for k in range(most)]
    return [x[i] for i in chosen], [y[i] for i in chosen]


def svg_chart(
    title: str,
    curves: Sequence[SvgCurve],
    *,
    last: float,
    note: str = "",
    linear: bool = False,
    picked: bool = False,
    axis: str = "step",
) -> str:
    """Returns a figure with one chart: the mean of each group of points as a line, with a band
    from the least to the largest value; a cross where values are not finite.

    Args:
      title: above the chart.
      curves: drawn over steps; a curve of one point is a dot.
      last: right end of the x axis, in steps.
      note: below the chart.
      linear: the vertical axis is linear however far apart the values are.
      picked: of many points some are drawn, and none is averaged.
      axis: what the horizontal axis counts, for the text of a curve.

    >>> svg_chart("loss", [SvgCurve("a", [0, 10], [2.0, 1.0])], last=10).count("<path")
    1
    """
    grouped = [
        (c, group_points(*(pick_points(c.x, c.y) if picked else (c.x, c.y)))) for c in curves
    ]
    finite = [g for _, groups in grouped for g in groups if not math.isnan(g.y)]
    if not finite:
        return ""
    low, high = min(g.low for g in finite), max(g.high for g in finite)
    logarithmic = not linear and low > 0 and high / low > _WIDE
    if not logarithmic:
        margin = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
        low, high = low - margin * (low != 0 or high <= 0), high + margin

    def y_of(value: float) -> float:
        share = (
            math.log(value / low) / math.log(high / low)
            if logarithmic
            else (value - low) / (high - low)
        )
        return _TOP + (1 - share) * (HEIGHT - _TOP - _BOTTOM)

    levels = _powers(low, high) if logarithmic else axis_ticks(low, high)
    step = levels[1] - levels[0] if len(levels) > 1 else 0.0
    labels = [tick_label(v, 0 if logarithmic else step) for v in levels]
    left = max(_LEFT, _LETTER * max(map(len, labels), default=0) + 8)

    def x_of(step: float) -> float:
        return left + step / max(last, 1) * (WIDTH - left - _RIGHT)

    parts = [
        f'<line class="grid" x1="{left}" x2="{WIDTH - _RIGHT}" y1="{y_of(v):.1f}"'
        f' y2="{y_of(v):.1f}"/><text x="{left - 6}" y="{y_of(v) + 4.5:.1f}"'
        f' text-anchor="end">{label}</text>'
        for v, label in zip(levels, labels, strict=True)
    ]
    parts += [
        f'<text x="{min(x_of(step), WIDTH - 22):.1f}" y="{HEIGHT - 7}"'
        f' text-anchor="middle">{tick_label(step)}</text>'
        for step in axis_ticks(0, last)
        if step == int(step)  # of a run of a few steps; there is no half step
    ]
    for curve, groups in grouped:
        parts += _curve_elements(curve, groups, x_of, y_of, axis)
    scale = " <small>(logarithmic)</small>" if logarithmic else ""
    return (
        f'<figure class="chart"><h3>{escape_html(title)}{scale}</h3><svg viewBox="0 0 {WIDTH}'
        f' {HEIGHT}" role="img" aria-label="{escape_html(title)}">{"".join(parts)}</svg>'
        + (f"<figcaption>{escape_html(note)}</figcaption>" if note else "")
        + "</figure>"
    )


def _segments(groups: Sequence[PointGroup]) -> list[list[PointGroup]]:
    """The parts of a curve between values that are not finite."""
    out: list[list[PointGroup]] = [[]]
    for group in groups:
        if group.broken:
            out.append([])
        if not math.isnan(group.y):
            out[-1].append(group)
    return [segment for segment in out if segment]


def _curve_elements(
    curve: SvgCurve,
    groups: Sequence[PointGroup],
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
    axis: str,
) -> list[str]:
    """The elements of a curve: band, line and dots of each part, and crosses."""
    segments = _segments(groups)
    ends = [(g.x, g.y) for segment in segments for g in segment[-1:]]
    title = (
        f"<title>{escape_html(curve.name)}: {tick_label(ends[-1][1])} at {axis}"
        f" {tick_label(ends[-1][0])}</title>"
        if ends
        else ""
    )
    parts = []
    for segment in segments:
        highs = [f"{x_of(g.x):.1f},{y_of(g.high):.1f}" for g in segment]
        lows = [f"{x_of(g.x):.1f},{y_of(g.low):.1f}" for g in segment]
        middle = [f"{x_of(g.x):.1f},{y_of(g.y):.1f}" for g in segment]
        if highs != lows:
            band = " ".join([*highs, *reversed(lows)])
            parts.append(f'<path class="band {curve.tone}" d="M{band}Z"/>')
        if len(segment) > 1:
            parts.append(f'<path class="{curve.tone}" d="M{" ".join(middle)}">{title}</path>')
        if len(segment) == 1 or len(groups) <= 12:
            radius = 3 if len(groups) == 1 else 2.2
            parts += [
                f'<circle class="{curve.tone}" cx="{at.partition(",")[0]}"'
                f' cy="{at.partition(",")[2]}" r="{radius}">'
                f"{title if len(segment) == 1 else ''}</circle>"
                for at in middle
            ]
    return parts + [
        f'<path class="gap {curve.tone}" d="M{x_of(g.x) - 3:.1f},{_TOP}l6,6m0,-6l-6,6">'
        f"<title>{escape_html(curve.name)}: not finite at {axis} {tick_label(g.x)}</title></path>"
        for g in groups
        if g.broken
    ]


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten in a range; every second, third ... one if there are many."""
    exponents = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    return [10.0**e for e in exponents[:: -(-len(exponents) // 5) or 1]]


STYLE = """
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1rem 2rem; }
.chart svg { display: block; width: 100%; height: auto; }
.chart text { fill: var(--muted); font-size: 13.5px; }
.chart .grid { stroke: var(--rule); stroke-width: 1; }
.chart path { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.chart path.band { stroke-width: 1; opacity: .35; }
.dashed { stroke-dasharray: 6 4; } .dotted { stroke-dasharray: 2 3; }
.chart path.gap, .chart path.band { stroke-dasharray: none; }
.chart small { font-weight: 400; color: var(--muted); } .chart figcaption { color: var(--muted); }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: .6rem 0; }
.legend i { display: inline-block; width: 1.1rem;
  height: .3rem; border-radius: 2px; margin-right: .4rem; vertical-align: middle; }
.legend i.dashed { mask: repeating-linear-gradient(90deg, #000 0 .28rem, #0000 0 .41rem); }
.legend i.dotted { mask: repeating-linear-gradient(90deg, #000 0 .1rem, #0000 0 .25rem); }
""" + "".join(
    f".c{i} {{ stroke: {colour}; }} circle.c{i}, .chart path.band.c{i} {{ fill: {colour}; }}"
    f" .legend i.c{i} {{ background: {colour}; }}\n"
    for i, colour in enumerate(
        ("#4676b2", "#e4873e", "#3f9a76", "#b4442f", "#8b6bb8", "#8a7346", "#c867a0", "#7d8590")
    )
)
