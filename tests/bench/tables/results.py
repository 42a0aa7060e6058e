"""The results of the toy-scale tables (`tests.bench.tables`): metrics of a run, and the tables in
Markdown."""

import json
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from m3i_jax.reporting import compare_table as report
from m3i_jax.reporting.atomic_write import write_text_atomic
from tests.bench.tables.sets import RUN_COLUMNS, SINGLE, Set


def best_single_methods(
    results: Sequence[Mapping[str, Any]], columns: Sequence[report.CompareColumn]
) -> list[str]:
    """Single methods that are best in a column among the single methods, ordered by the number of
    such columns.

    >>> metrics = {"CLIP": {"a": 1}, "MAE": {"a": 2, "b": 3}, "M3I": {"a": 9}}
    >>> rows = [{"form": method, "values": values} for method, values in metrics.items()]
    >>> best_single_methods(rows, [report.CompareColumn(key, key, "") for key in "abc"])
    ['MAE']
    """
    leads: dict[str, int] = {}
    for column in columns:
        rivals = [r for r in results if r["form"] in SINGLE and column.key in r["values"]]
        if rivals:
            first = max(rivals, key=lambda r: r["values"][column.key])["form"]
            leads[first] = leads.get(first, 0) + 1
    return sorted(leads, key=lambda m: -leads[m])


def run_metrics(path: pathlib.Path) -> dict[str, float]:
    """Metrics of a run: its last evaluation, the evaluation before training as "before/...", fine-
    tuning and seconds."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if any(name.startswith("eval/") for name in line)]
    out = {name: float(value) for name, value in evaluated[-1].items() if name.startswith("eval/")}
    out |= {
        f"before/{name}": float(value)
        for name, value in evaluated[0].items()
        if name.startswith("eval/")
    }
    logged = [line for line in lines if "loss" in line]
    out |= {
        name: float(value)
        for name, value in logged[-1].items()
        if name.startswith(("collapse/", "loss", "balance/"))
    }
    steps = [0, *(line["step"] for line in logged)]
    out["seconds"] = sum(
        (line["step"] - before) * line["perf/step_seconds"]
        for before, line in zip(steps, logged, strict=False)
    )
    if (path / "finetuned" / "metrics.jsonl").is_file():
        tuned = [
            json.loads(line)
            for line in (path / "finetuned" / "metrics.jsonl").read_text().splitlines()
        ]
        out["finetune"] = float(
            [line for line in tuned if "eval/direct/top1" in line][-1]["eval/direct/top1"]
        )
    # The evaluation on its own style, whose images are not the held-out ones, has a directory of
    # its own.
    for file in (*path.glob("eval.json"), *path.glob("eval-*/eval.json")):
        for metrics in json.loads(file.read_text())["results"].values():
            out |= {f"own/{name}": float(value) for name, value in metrics.items()}
    return out


def machine() -> str:
    """Processor and versions, to be printed with the results."""
    import jax

    info = pathlib.Path("/proc/cpuinfo")
    models = (
        [
            line.partition(":")[2].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.is_file()
        else []
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{models[0] if models else platform.machine()}, {cores} core(s), Python"
        f" {platform.python_version()}, jax {jax.__version__}"
    )


def markdown_table(image_set: Set, results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table: one row per method with mean and deviation over seeds in per cent; the best
    mean of a column is bold."""
    rows = report.compare_rows([r for r in results if r["set"] == image_set.name])
    shown = [c for c in image_set.columns if any(c.key in row.figures for row in rows)]
    most = {
        c.key: max(row.figures[c.key].mean for row in rows if c.key in row.figures) for c in shown
    }

    def cell(row: report.CompareRow, column: report.CompareColumn) -> str:
        figure = row.figures.get(column.key)
        text = report.table_cell(column, figure)
        return f"**{text}**" if figure and figure.mean == most[column.key] else text

    titles = ["method", "seeds", *(f"{c.title} %" for c in shown), *(c.title for c in RUN_COLUMNS)]
    lines = [f"| {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) - 1)}"]
    for row in rows:
        cells = [
            row.form,
            str(len(row.seeds)),
            *(cell(row, c) for c in shown),
            *(report.table_cell(c, row.figures.get(c.key)) for c in RUN_COLUMNS),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lacking = (
        [m for m in image_set.methods if m not in {row.form for row in rows}]
        if image_set.name != "tuning"
        else []
    )
    return "\n".join([*lines, *([f"\nNot run: {', '.join(lacking)}."] if lacking else [])])


def write_tables(
    out: pathlib.Path, sets_: Mapping[str, Set], results: Sequence[Mapping[str, Any]]
) -> str:
    """Write OUT/tables.md and OUT/results.json; returns the text of the tables."""
    finished = [s for s in sets_.values() if any(r["set"] == s.name for r in results)]
    text = "\n\n".join(f"### {s.name}\n\n{markdown_table(s, results)}" for s in finished) + "\n"
    write_text_atomic(out / "tables.md", text)
    short = [{**r, "values": {k: round(v, 6) for k, v in r["values"].items()}} for r in results]
    write_text_atomic(out / "results.json", json.dumps(short, indent=1) + "\n")
    return text
