"""The results of the toy-scale tables (`tests.bench.tables`): metrics of a run, and the tables in
Markdown."""

import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from m3i_jax.reporting import compare_table as report
from m3i_jax.run_files import write_json_atomic, write_text_atomic
from tests.bench.tables.crossing import crossing_text
from tests.bench.tables.paired import compare_with, paired_text
from tests.bench.tables.sets import RUN_COLUMNS, Set

REFERENCE = "M3I"  # the row with which the others are compared image by image
PAIRED = "kNN minus M3I's, same images"


def read_results(
    kept: pathlib.Path, out: pathlib.Path, sets: Mapping[str, Set]
) -> list[dict[str, Any]]:
    """The results of a file and of the runs of a directory, in the order of the tables, and then
    those of sets and rows that are not among them. A result of the directory replaces one of the
    file."""
    found = json.loads(kept.read_text()) if kept.is_file() else []
    found += [json.loads(path.read_text()) for path in sorted(out.glob("runs/*/*/*/result.json"))]
    order = {
        (name, title): number
        for number, (name, title) in enumerate(
            (one.name, title) for one in sets.values() for title in one.rows
        )
    }
    rows = ((r, order.get((r["set"], r["form"]), len(order))) for r in found)
    by_run = {(r["protocol"], row, r["set"], r["form"], r["seed"]): r for r, row in rows}
    return [by_run[key] for key in sorted(by_run)]


def _log(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def _seconds(lines: Sequence[Mapping[str, Any]]) -> float:
    logged = [line for line in lines if "loss" in line]
    steps = [0, *(line["step"] for line in logged)]
    return sum(
        (line["step"] - before) * line["perf/step_seconds"]
        for before, line in zip(steps, logged, strict=False)
    )


def run_metrics(path: pathlib.Path, stages: Sequence[pathlib.Path] = ()) -> dict[str, float]:
    """Metrics of a run: its last evaluation, the evaluation before training as "before/...", fine-
    tuning, and seconds, to which those of earlier stages are added."""
    lines = _log(path)
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
    out["seconds"] = _seconds(lines) + sum(_seconds(_log(stage)) for stage in stages)
    if (path / "finetuned" / "metrics.jsonl").is_file():
        tuned = _log(path / "finetuned")
        out["finetune"] = float(
            [line for line in tuned if "eval/direct/top1" in line][-1]["eval/direct/top1"]
        )
    # The evaluation of other images has a directory of its own.
    for file in (*path.glob("eval.json"), *path.glob("eval-*/eval.json")):
        for metrics in json.loads(file.read_text())["results"].values():
            out |= {f"own/{name}": float(value) for name, value in metrics.items()}
    return out


def version() -> str:
    """The version of the program: the short commit of a checkout, followed by "-dirty" if files
    differ from it, or that of the package."""
    import m3i_jax
    from tests.bench.tables.sets import ROOT

    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return found.stdout.strip() or m3i_jax.__version__


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


def with_gains(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result with what each figure gained in training, as "gained/...".

    >>> with_gains({"values": {"loss": 1.0, "eval/knn": 0.5, "before/eval/knn": 0.25}})["values"]
    {'loss': 1.0, 'eval/knn': 0.5, 'before/eval/knn': 0.25, 'gained/eval/knn': 0.25}
    """
    values = result["values"]
    gains = {
        f"gained/{name}": value - values[f"before/{name}"]
        for name, value in values.items()
        if f"before/{name}" in values
    }
    return {**result, "values": values | gains}


def markdown_table(image_set: Set, results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table: one row per method with mean and deviation over seeds in per cent; the best
    mean of a column is bold; last the differences of `compare_with`."""
    of_set = [with_gains(r) for r in results if r["set"] == image_set.name]
    rows, paired = report.compare_rows(of_set), compare_with(REFERENCE, of_set)
    shown = [c for c in image_set.columns if any(c.key in row.figures for row in rows)]
    most = {
        c.key: max(row.figures[c.key].mean for row in rows if c.key in row.figures) for c in shown
    }

    def cell(row: report.CompareRow, column: report.CompareColumn) -> str:
        figure = row.figures.get(column.key)
        text = report.table_cell(column, figure)
        return f"**{text}**" if figure and figure.mean == most[column.key] else text

    titles = ["method", "seeds", *(f"{c.title} %" for c in shown), *(c.title for c in RUN_COLUMNS)]
    titles += [PAIRED] if paired else []
    lines = [f"| {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) - 1)}"]
    for row in rows:
        cells = [
            row.form,
            str(len(row.seeds)),
            *(cell(row, c) for c in shown),
            *(report.table_cell(c, row.figures.get(c.key)) for c in RUN_COLUMNS),
            *([paired_text(paired.get(row.form))] if paired else []),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lacking = [title for title in image_set.rows if title not in {row.form for row in rows}]
    missing = f"\nNot run: {', '.join(lacking)}." if lacking else ""
    return "\n".join([*lines, *([missing] if missing else [])])


TITLES = {"epochs": "equal images", "flops": "equal FLOPs", "time": "equal time"}


def tables_text(sets: Mapping[str, Set], results: Sequence[Mapping[str, Any]]) -> str:
    """All tables in Markdown, by protocol and set."""
    parts = []
    for protocol, title in TITLES.items():
        for one in sets.values():
            rows = [r for r in results if (r["protocol"], r["set"]) == (protocol, one.name)]
            if rows:
                parts.append(f"### {one.name}, {title}\n\n{markdown_table(one, rows)}")
                if fitted := crossing_text(one, rows):
                    parts.append(fitted)
    return "\n\n".join(parts) + "\n"


def write_tables(
    out: pathlib.Path,
    kept: pathlib.Path,
    sets: Mapping[str, Set],
    results: Sequence[Mapping[str, Any]],
) -> str:
    """Write OUT/tables.md and the file of all results; returns the text of the tables."""
    text = tables_text(sets, results)
    write_text_atomic(out / "tables.md", text)
    short = [{**r, "values": {k: round(v, 6) for k, v in r["values"].items()}} for r in results]
    write_json_atomic(kept, short)
    return text
