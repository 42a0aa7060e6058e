"""--mode=report: WORKDIR/report.html, one page of what the run there has logged and drawn; training
writes it too when it ends."""

import dataclasses
import pathlib

import jax

from m3i_jax import config as configuration
from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.reporting import figures, run_log, run_page
from m3i_jax.reporting.atomic_write import write_text_atomic


def run(config: schema.Config, *, workdir: str) -> int:
    print(f"wrote {write_report(config, pathlib.Path(workdir))}")
    return 0


def refuse_absent(config: schema.Config) -> None:
    """Raise UserError for a directory of `report.beside` that does not exist: a run that ends would
    have no report."""
    for place in config.report.beside:
        if not jax.process_index() and not pathlib.Path(place).is_dir():
            raise UserError(
                f"config.report.beside: there is no directory {place!r}; name the working directory"
                " of a run, or leave it out"
            )


def write_report(config: schema.Config, workdir: pathlib.Path) -> pathlib.Path:
    """The page of a run and of those beside it.

    Raises:
      UserError: a directory has no log of a run.
    """
    beside = config.report.beside
    found = [
        run_log.load_run_log(workdir),
        *(run_log.load_run_log(place, "config.report.beside") for place in beside),
    ]
    read = [
        dataclasses.replace(run, name=name)
        for run, name in zip(found, run_log.run_names([workdir, *beside]), strict=True)
    ]
    differs = {
        other.name: configuration.config_difference(read[0].config, other.config)
        for other in read[1:]
        if other.config
    }
    write_text_atomic(
        workdir / "report.html",
        run_page.run_page_html(
            read,
            differs=differs,
            exhibits=[
                figures.figure_html(file) for file in figures.newest_figures(workdir / "pictures")
            ],
        ),
    )
    return workdir / "report.html"
