"""The report of one run, or of several runs compared, as one page: curves of all metrics with a
note about healthy ones, panels over time, evaluations, throughput, settings."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from m3i_jax.reporting import data_report, figures, html_page, run_log, svg_charts
from m3i_jax.reporting.metric_text import is_score, metric_note
from m3i_jax.reporting.run_log import RunLog, read_png
from m3i_jax.reporting.svg_charts import SvgCurve

DENSE_LOSSES = (
    "All losses fall, classification last. A loss that stays at its first value is not learnt, such"
    " as a box loss if no object is ever matched."
)
CURVES = (
    f"Of a curve with more than {svg_charts.MOST} points, the line is the mean of consecutive"
    " points and the band reaches from the least to the largest of them; of evaluations, points are"
    " left out. A cross marks values that are not finite."
)
PANELS = 5  # shown of a run
TONES = 8
DASHES = ("", " dashed", " dotted")  # of as many runs each as there are tones
# metrics of the headline; those of pre-training are named by the ends of their names
HEADLINE = ("eval/box/AP", "eval/mask/AP", "eval/segmentation/mIoU")
HEADLINE_ENDS = ("top1", "/r1")
LOSSES = "Losses"  # the section that panels and figures follow
# (section, prefixes of its metrics, what is healthy)
SECTIONS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        "Evaluation",
        ("eval/",),
        "Rises above its value at step 0, which is that of the initial weights.",
    ),
    (
        LOSSES,
        ("loss",),
        (
            "The dense losses fall fast at first and then slowly, and rise a little when the target"
            " moves; categories move last."
        ),
    ),
    (
        "Bits",
        ("info/", "bits/", "entropy/"),
        (
            "Information (info) that a prediction carries about its target; below 0 it is worse"
            " than knowing nothing. Code lengths (bits) fall, entropies do not."
        ),
    ),
    (
        "Weight of the losses",
        ("balance/",),
        (
            "Lambda falls once both gradient norms are known, then drifts with their ratio; it does"
            " not stay at a limit."
        ),
    ),
    (
        "Collapse",
        ("collapse/",),
        (
            "The rank stays well above 1 and the deviation above 0; if both fall to their minimum,"
            " the targets collapsed."
        ),
    ),
    ("Optimizer", ("grad_norm", "lr", "ema"), "The gradient norm settles after the warm-up."),
    (
        "Throughput",
        (
            *("perf/images", "perf/step", "perf/input", "perf/mfu"),
            *("perf/goodput", "perf/wall", "perf/restarts"),
        ),
        "Images a second are level; waiting for input stays below a few per cent.",
    ),
    (
        "Seconds by phase",
        ("perf/seconds/",),
        (
            "They add up to the wall time of all starts; steps have by far the most, and lost steps"
            " were trained twice."
        ),
    ),
    (
        "Skipped",
        ("skipped/", "data/", "report/dropped/"),
        "Steps that are not finite stay at 0; bad records are few.",
    ),
)


def run_page_html(
    runs: Sequence[RunLog],
    *,
    differs: Mapping[str, Sequence[str]],
    figure_sections: Sequence[str] = (),
) -> str:
    """Returns the HTML page.

    Args:
      runs: the run itself first, then those to compare it with.
      differs: {name of a run: settings in which it differs from the first}, one line each.
      figure_sections: figures of the first run's evaluators, as `figures.figure_html` gives them.

    >>> log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    >>> one = RunLog("first", log, "seed = 0\\n", "", [], {})
    >>> "first" in run_page_html([one], differs={})
    True
    """
    first, axis = runs[0], _Axis.of(runs)
    body = [
        f"<h1>{html_page.escape_html(first.name)}</h1>",
        f"<p class=muted>{html_page.escape_html(_about(runs))}</p>",
        html_page.headline(_key_values(first)),
    ]
    if len(runs) > 1:
        notes = (*_unequal(runs, differs), *axis.notes)
        body.append(_legend(runs) + _comparison(runs) + _paragraphs(notes))
    shown: set[str] = set()
    for title, prefixes, healthy in SECTIONS:
        names = _names(runs, prefixes, shown)
        charts = "".join(_chart(name, runs, axis) for name in names)
        shown |= set(names)
        if charts:
            body.append(
                f"<h2>{html_page.escape_html(title)}</h2><p"
                f" class=muted>{html_page.escape_html(_healthy(runs, title, healthy))}</p><div"
                f' class="charts">{charts}</div>'
            )
        if title == LOSSES:
            body += [_panels(run) for run in runs if run.panels] + list(figure_sections)
            if first.evaluation or first.others:
                body.append(_evaluation(first))
    if others := [name for name in _names(runs, ("",), shown) if name != "samples_seen"]:
        body.append(
            '<h2>Other metrics</h2><div class="charts">'
            + "".join(_chart(name, runs, axis) for name in others)
            + "</div>"
        )
    if first.data:
        body.append(f"<h2>Data</h2><pre>{html_page.escape_html(first.data)}</pre>")
    if first.config or differs:
        changed = "".join(
            f"<h3>{html_page.escape_html(name)} differs in</h3>{_lines(lines)}"
            for name, lines in differs.items()
        )
        body.append(
            f"<h2>Settings</h2>{changed}<details><summary>all"
            f" settings</summary><pre>{html_page.escape_html(first.config)}</pre></details>"
        )
    if any('<path class="band ' in part or '<path class="gap ' in part for part in body):
        body.insert(3, f"<p class=muted>{CURVES}</p>")
    return html_page.render_page(
        f"Run: {first.name}",
        html_page.with_toc(body, after=3),
        svg_charts.STYLE + figures.STYLE + STYLE,
    )


def _healthy(runs: Sequence[RunLog], title: str, note: str) -> str:
    """The note of a section; the losses of dense tasks have another one than those of pre-training,
    which log `loss/ssp` or `loss/sp`."""
    if title != LOSSES:
        return note
    names = {name for run in runs for name in run.names}
    dense = any(name.startswith("loss/") for name in names) and not names & {"loss/ssp", "loss/sp"}
    return DENSE_LOSSES if dense else note


STYLE = """
pre { font-size: .78rem; line-height: 1.35; overflow-x: auto; white-space: pre-wrap; }
summary { cursor: pointer; color: var(--muted); }
.panel img { width: 100%; min-width: 46rem; height: auto; object-fit: contain; border-radius: 6px; }
.panel { margin: 0 0 1.2rem; overflow-x: auto; }
"""


def _about(runs: Sequence[RunLog]) -> str:
    end, samples = runs[0].end, runs[0].last("samples_seen")
    images = f", {samples:,.0f} images seen" if samples else ""
    others = f"; compared with {', '.join(run.name for run in runs[1:])}" if len(runs) > 1 else ""
    return f"{end:,} steps{images}{others}"


def _tone(number: int) -> str:
    """The classes of a run's curves: colours first, then the same ones dashed."""
    return f"c{number % TONES}{DASHES[number // TONES % len(DASHES)]}"


@dataclasses.dataclass(frozen=True)
class _Axis:
    """The horizontal axis of all curves: steps, or images seen where runs have different batch
    sizes. `last` is its right end."""

    images: bool
    last: float

    @classmethod
    def of(cls, runs: Sequence[RunLog]) -> "_Axis":
        ends = [run.last_point("samples_seen") for run in runs]
        batches = [samples / step for step, samples in filter(None, ends) if step]
        images = len(batches) == len(runs) and max(batches) > 1.001 * min(batches)
        last = max(
            end[1] if images and end else run.end for run, end in zip(runs, ends, strict=True)
        )
        return cls(images, last)

    @property
    def notes(self) -> tuple[str, ...]:
        return ("Curves are over images seen.",) if self.images else ()

    def positions(self, run: RunLog, steps: Sequence[float]) -> Sequence[float]:
        if not self.images:
            return steps
        known, samples = run.curve("samples_seen")
        return [float(x) for x in np.interp(steps, [0, *known], [0, *samples])]


def _at_step(run: RunLog, step: int, form: str) -> str:
    """The step of a value in words; "" of the last step of its run."""
    return "" if step == run.end else form.format(f"step {step:,}")


def _key_values(run: RunLog) -> list[tuple[str, str]]:
    """(value, what it is) of what decides a run, at its end."""
    out = []
    for name in run.names:
        if name in HEADLINE or (name.startswith("eval/") and name.endswith(HEADLINE_ENDS)):
            x, y = run.curve(name)
            what = name.removeprefix("eval/") + _at_step(run, int(x[-1]), " at {}")
            if len(y) > 1:
                what += f", {100 * y[0]:.1f} % at step {x[0]:,}"
            out.append((f"{100 * y[-1]:.1f} %", what))
    for name, form, what in (
        ("loss", "{:.3f}".format, "loss"),
        ("balance/lambda", "{:.3g}".format, "lambda"),
        ("collapse/effective_rank", "{:.1f}".format, "effective rank of the targets"),
        ("perf/images_per_sec", data_report.format_rate, "images a second"),
        ("perf/mfu", "{:.1%}".format, "of the peak (MFU)"),
        ("perf/goodput", "{:.1%}".format, "goodput"),
    ):
        if (point := run.last_point(name)) is not None:
            out.append((form(point[1]), what + _at_step(run, point[0], " at {}")))
    return out


def _names(runs: Sequence[RunLog], prefixes: tuple[str, ...], shown: set[str]) -> list[str]:
    """Metrics with one of the prefixes that are not always 0, in the order of the log."""
    names = dict.fromkeys(name for run in runs for name in run.names if name not in shown)
    exact = {"loss", "lr", "ema", "grad_norm"}
    scores = prefixes == ("eval/",)
    chosen = [
        n
        for n in names
        if (is_score(n) or not scores)
        and any(
            n == p or (n.startswith(p) and (p not in exact or n.startswith(p + "/")))
            for p in prefixes
        )
    ]
    return [n for n in chosen if any(v != 0 for run in runs for v in run.curve(n)[1])]


def _chart(name: str, runs: Sequence[RunLog], axis: _Axis) -> str:
    curves = [(run, *run.curve(name)) for run in runs]
    lines = [
        SvgCurve(run.name, axis.positions(run, steps), values, tone=_tone(number))
        for number, (run, steps, values) in enumerate(curves)
    ]
    # shares begin at almost 0 and are read against 1
    evaluation = name.startswith("eval/")
    return svg_charts.svg_chart(
        name.removeprefix("eval/"),
        lines,
        last=axis.last,
        note=metric_note(name),
        linear=evaluation,
        picked=evaluation,
        axis="image" if axis.images else "step",
    )


def _legend(runs: Sequence[RunLog]) -> str:
    return (
        '<div class="legend">'
        + "".join(
            f'<span><i class="{_tone(number)}"></i>{html_page.escape_html(run.name)}</span>'
            for number, run in enumerate(runs)
        )
        + "</div>"
    )


def _comparison(runs: Sequence[RunLog]) -> str:
    """Length of every run, and the last values of its evaluations and of its loss, a row each."""
    metrics = [
        n
        for n in dict.fromkeys(name for run in runs for name in run.names)
        if (n.startswith("eval/") and is_score(n)) or n == "loss"
    ]
    metrics = [n for n in metrics if not n.endswith(("r5", "r10", "top5"))]
    rows = []
    for run in runs:
        samples = run.last("samples_seen")
        row = [run.name, f"{run.end:,}", "" if samples is None else f"{samples:,.0f}"]
        for name in metrics:
            point = run.last_point(name)
            row.append(f"{point[1]:.4g}{_at_step(run, point[0], ' ({})')}" if point else "")
        rows.append(row)
    titles = ("run", "steps", "images seen", *(n.removeprefix("eval/") for n in metrics))
    return html_page.html_table(titles, rows, numeric=1)


def _unequal(runs: Sequence[RunLog], differs: Mapping[str, Sequence[str]]) -> list[str]:
    """Warnings of what makes values of the comparison incomparable, a sentence each."""
    out = []
    for start, what, why in (
        ("train.batch_size:", "Batch sizes", "a step is not as many images"),
        (("objective.", "task:"), "Objectives", "losses are not on one scale"),
        ("evaluate.", "Settings of evaluations", "scores may not be comparable"),
        ("data, ", "Data", "scores may be of other images"),
    ):
        names = [
            name for name, lines in differs.items() if any(one.startswith(start) for one in lines)
        ]
        if names:
            out.append(f"{what} of {', '.join(names)} and {runs[0].name} differ: {why}.")
    return out


def _paragraphs(lines: Sequence[str]) -> str:
    return "".join(f"<p class=muted>{html_page.escape_html(line)}</p>" for line in lines)


def _panels(run: RunLog) -> str:
    """The first panel, the last and some between them."""
    count = len(run.panels)
    chosen = sorted(
        {round(k * (count - 1) / max(min(count, PANELS) - 1, 1)) for k in range(min(count, PANELS))}
    )
    embedded = [
        '<figure class="panel"><h3>step'
        f" {step:,}</h3>{html_page.embed_image(content, f'panel of step {step}')}</figure>"
        for step, file in (run.panels[i] for i in chosen)
        if (content := read_png(file))
    ]
    return f"<h2>Inputs and predictions of {html_page.escape_html(run.name)}</h2>" + "".join(
        embedded
    )


def _evaluation(run: RunLog) -> str:
    """The results of --mode=eval as a table: columns for the data of the run and for each of the
    others, with untrained weights and chance beside them where these are known."""
    sets = {"data of the run": run.evaluation} if run.evaluation else {}
    sets |= run.others
    columns: dict[str, dict[str, float]] = {}
    abouts = []
    for data, saved in sets.items():
        abouts.append(f"{data}: {_about_evaluation(saved)}")
        columns[data] = _metrics_of(saved.get("results", {}))
        if untrained := _metrics_of(saved.get("untrained", {})):
            columns[f"{data}, untrained"] = untrained
        if chance := saved.get("chance", {}):
            columns[f"{data}, chance"] = chance
    names = dict.fromkeys(name for values in columns.values() for name in values)
    rows = [
        [
            name.removeprefix("eval/"),
            *(f"{part[name]:.4f}" if name in part else "" for part in columns.values()),
        ]
        for name in names
    ]
    table = html_page.html_table(("metric", *columns), rows, numeric=1)
    about = "".join(f"<p class=muted>{html_page.escape_html(line)}</p>" for line in abouts)
    return f"<h2>Evaluation by --mode=eval</h2>{about}{table}"


def _metrics_of(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {name: value for one in results.values() for name, value in one.items()}


def _about_evaluation(saved: Mapping[str, Any]) -> str:
    """Weights and data of results, in words."""
    about = (
        f"{saved.get('checkpoint', '')}, {saved.get('encoder', '')} parameters; accuracies are"
        " fractions"
    )
    counts = run_log.image_counts(saved)
    for name, part in saved.get("data", {}).items():
        about += (
            f"; {name}: {counts[name]} images of {part.get('name', '')}, fingerprint"
            f" {part.get('fingerprint', '')}"
        )
    return about


def _lines(lines: Sequence[str]) -> str:
    return (
        "<ul>" + "".join(f"<li>{html_page.escape_html(line)}</li>" for line in lines) + "</ul>"
        if lines
        else "<p>no setting that changes the training or its evaluations, and not in its data</p>"
    )
