"""Curves as small SVG charts with axes, without scripts."""

import dataclasses
import math
from collections.abc import Sequence

from m3i_jax.reporting.html_page import escape_html

WIDTH, HEIGHT = 420, 200
# margins: least room for labels at the left, room for half of the last one below the axis
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 18, 10, 28
_LETTER = 8  # width of a digit, with room to spare
_MOST = 400  # points of a curve; more are averaged in groups
_WIDE = 300.0  # ratio of largest to smallest value above which an axis is logarithmic


@dataclasses.dataclass(frozen=True)
class SvgCurve:
    """One line of a chart; `tone` is a colour class of the style sheet, c0 to c7."""

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


def thin_points(
    x: Sequence[float], y: Sequence[float], most: int = _MOST
) -> tuple[list[float], list[float]]:
    """Returns at most `most` points: means over consecutive finite points.

    >>> thin_points([0, 1, 2, 3], [1.0, 3.0, float("nan"), 5.0], most=2)
    ([0.5, 3.0], [2.0, 5.0])
    """
    good = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    size = -(-len(good) // most) if good else 1
    groups = [good[i : i + size] for i in range(0, len(good), size)]
    return [sum(a for a, _ in g) / len(g) for g in groups], [
        sum(b for _, b in g) / len(g) for g in groups
    ]


def svg_chart(
    title: str,
    curves: Sequence[SvgCurve],
    *,
    last: float,
    note: str = "",
    linear: bool = False,
    axis: str = "step",
) -> str:
    """Returns a figure with one chart.

    Args:
      title: above the chart.
      curves: drawn over steps; a curve of one point is a dot.
      last: right end of the x axis, in steps.
      note: below the chart.
      linear: the vertical axis is linear however far apart the values are.
      axis: what the horizontal axis counts, for the text of a curve.

    >>> svg_chart("loss", [SvgCurve("a", [0, 10], [2.0, 1.0])], last=10).count("<path")
    1
    """
    points = [(curve, *thin_points(curve.x, curve.y)) for curve in curves]
    values = [v for _, _, y in points for v in y]
    if not values:
        return ""
    low, high = min(values), max(values)
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
    for curve, x, y in points:
        title_tag = (
            f"<title>{escape_html(curve.name)}: {tick_label(y[-1])} at {axis}"
            f" {tick_label(x[-1])}</title>"
            if y
            else ""
        )
        if len(x) == 1:
            parts.append(
                f'<circle class="{curve.tone}" cx="{x_of(x[0]):.1f}" cy="{y_of(y[0]):.1f}"'
                f' r="3">{title_tag}</circle>'
            )
        elif x:
            path = " ".join(f"{x_of(a):.1f},{y_of(b):.1f}" for a, b in zip(x, y, strict=True))
            dots = "".join(
                f'<circle class="{curve.tone}" cx="{x_of(a):.1f}" cy="{y_of(b):.1f}" r="2.2"/>'
                for a, b in zip(x, y, strict=True)
            )
            parts.append(
                f'<path class="{curve.tone}" d="M{path}">{title_tag}</path>'
                + (dots if len(x) <= 12 else "")
            )
    scale = " <small>(logarithmic)</small>" if logarithmic else ""
    return (
        f'<figure class="chart"><h3>{escape_html(title)}{scale}</h3><svg viewBox="0 0 {WIDTH}'
        f' {HEIGHT}" role="img" aria-label="{escape_html(title)}">{"".join(parts)}</svg>'
        + (f"<figcaption>{escape_html(note)}</figcaption>" if note else "")
        + "</figure>"
    )


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
.chart small { font-weight: 400; color: var(--muted); } .chart figcaption { color: var(--muted); }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: .6rem 0; }
.legend i { display: inline-block; width: 1.1rem;
  height: .3rem; border-radius: 2px; margin-right: .4rem; vertical-align: middle; }
""" + "".join(
    f".c{i} {{ stroke: {colour}; }} circle.c{i} {{ fill: {colour}; }} .legend i.c{i} {{ background:"
    f" {colour}; }}\n"
    for i, colour in enumerate(
        ("#4676b2", "#e4873e", "#3f9a76", "#b4442f", "#8b6bb8", "#8a7346", "#c867a0", "#7d8590")
    )
)
