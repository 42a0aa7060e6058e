"""--mode=report: write WORKDIR/report.html, one page with the metrics and figures of a run. A
training also writes it when it ends."""

import dataclasses
import logging
import pathlib

import jax

from m3i_jax import config as configuration
from m3i_jax import schema
from m3i_jax.data.sources import base
from m3i_jax.errors import UserError
from m3i_jax.reporting import figures, run_log, run_page
from m3i_jax.run_files import write_text_atomic

_log = logging.getLogger(__name__)


def run(config: schema.Config, *, workdir: str) -> int:
    print(f"wrote {write_report(config, pathlib.Path(workdir))}")
    return 0


def refuse_absent(config: schema.Config) -> None:
    """Raise UserError for a directory of `report.beside` that does not exist: the report at the end
    of the run would fail."""
    for directory in config.report.beside:
        if not jax.process_index() and not pathlib.Path(directory).is_dir():
            raise UserError(
                f"config.report.beside: {directory!r} is not a directory; give the working"
                " directory of a run, or leave it out"
            )


def _figure_sections(directory: pathlib.Path) -> list[str]:
    """The newest figures as HTML; one whose image is damaged is left out with a warning, as panels
    are."""
    sections = []
    for file in figures.newest_figures(directory):
        try:
            sections.append(figures.figure_html(file))
        except UserError as error:
            _log.warning("warning: %s: it is left out", error)
    return sections


def _differences(first: run_log.RunLog, other: run_log.RunLog) -> list[str]:
    """What differs between two runs of a page: settings that change the training, settings of
    evaluations, data. Files that one of them has not are not compared."""
    out = []
    if first.config and other.config:
        out += configuration.config_difference(first.config, other.config, also="evaluate.")
    if first.data and other.data:
        was, now = (base.current_identity(run.data) for run in (first, other))
        out += [f"data, {line}" for line in configuration.config_difference(was, now)]
    return out


def write_report(config: schema.Config, workdir: pathlib.Path) -> pathlib.Path:
    """Write the page of a run and of those in `report.beside`; returns its path.

    Raises:
      UserError: a directory has no log of a run.
    """
    beside = config.report.beside
    logs = [
        run_log.load_run_log(workdir),
        *(run_log.load_run_log(directory, "config.report.beside") for directory in beside),
    ]
    runs = [
        dataclasses.replace(log, name=name)
        for log, name in zip(logs, run_log.run_names([workdir, *beside]), strict=True)
    ]
    differs = {
        other.name: _differences(runs[0], other) for other in runs[1:] if other.config or other.data
    }
    write_text_atomic(
        workdir / "report.html",
        run_page.run_page_html(
            runs,
            differs=differs,
            figure_sections=_figure_sections(workdir / "pictures"),
        ),
    )
    return workdir / "report.html"
