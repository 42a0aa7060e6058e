"""--mode=report: WORKDIR/report.html, one page of what the run there has logged and drawn; training writes it too when it ends."""

import dataclasses
import pathlib

from m3i_jax import config as configuration
from m3i_jax import schema
from m3i_jax.reporting import exhibits, run_page, runs
from m3i_jax.reporting.files import write_text


def run(config: schema.Config, *, workdir: str) -> int:
    print(f"wrote {write(config, pathlib.Path(workdir))}")
    return 0


def write(config: schema.Config, workdir: pathlib.Path) -> pathlib.Path:
    """The page of a run and of those beside it.

    Raises:
      UserError: a directory has no log of a run.
    """
    beside = config.report.beside
    found = [runs.read(workdir), *(runs.read(place, "config.report.beside") for place in beside)]
    read = [dataclasses.replace(run, name=name) for run, name in zip(found, runs.names([workdir, *beside]), strict=True)]
    differs = {other.name: configuration.difference(read[0].config, other.config) for other in read[1:] if other.config}
    write_text(
        workdir / "report.html",
        run_page.html(read, differs=differs, exhibits=[exhibits.html(file) for file in exhibits.newest(workdir / "pictures")]),
    )
    return workdir / "report.html"
