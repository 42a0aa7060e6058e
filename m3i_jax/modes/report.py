"""--mode=report: WORKDIR/report.html, one page of what the run there has logged and drawn; training writes it too when it ends."""

import pathlib

from m3i_jax import config as configuration
from m3i_jax import schema
from m3i_jax.reporting import run_page, runs
from m3i_jax.reporting.files import write_text


def run(config: schema.Config, *, workdir: str, allow_changes: bool) -> int:
    del allow_changes
    print(f"wrote {write(config, pathlib.Path(workdir))}")
    return 0


def write(config: schema.Config, workdir: pathlib.Path) -> pathlib.Path:
    """The page of a run and of those beside it.

    Raises:
      UserError: a directory has no log of a run.
    """
    read = [runs.read(place) for place in (str(workdir), *config.report.beside)]
    drawn = []
    for title, ending in (("Nearest neighbours of held-out pictures", "neighbours"), ("Map of held-out pictures", "map")):
        files = sorted((workdir / "embedding").glob(f"*-{ending}.png"), key=lambda file: file.stat().st_mtime)
        drawn += [(title, file.read_bytes()) for file in files[-1:]]
    differs = {other.name: configuration.difference(read[0].config, other.config) for other in read[1:] if other.config}
    write_text(workdir / "report.html", run_page.html(read, differs=differs, pictures=drawn))
    return workdir / "report.html"
