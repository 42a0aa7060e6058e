"""What a run has written, read back: its log as curves, its settings, its images. No jax, and no
trust in the last line of a log."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from m3i_jax.errors import UserError

LogLine = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RunLog:
    """A working directory.

    Attributes:
      name: the directory's.
      lines: of metrics.jsonl, by step; where a resumed run wrote a step again, the later one.
      config, data: text of config.txt and data.txt, "" if absent.
      panels: (step, file), by step.
      evaluation: eval.json, or {}.
    """

    name: str
    lines: list[LogLine]
    config: str
    data: str
    panels: list[tuple[int, pathlib.Path]]
    evaluation: LogLine

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric.

        >>> RunLog("a", [{"step": 1, "loss": 2.0}, {"step": 2}], "", "", [], {}).curve("loss")
        ([1], [2.0])
        """
        found = [
            (line["step"], line[name])
            for line in self.lines
            if isinstance(line.get(name), int | float)
        ]
        return [step for step, _ in found], [value for _, value in found]

    def last(self, name: str) -> float | None:
        """The newest value of a metric, or None."""
        values = self.curve(name)[1]
        return values[-1] if values else None

    @property
    def names(self) -> list[str]:
        """All metrics with a number, in the order in which they first appear."""
        return list(
            dict.fromkeys(
                name
                for line in self.lines
                for name, v in line.items()
                if isinstance(v, int | float) and name != "step"
            )
        )


def run_names(workdirs: Sequence[str | pathlib.Path]) -> list[str]:
    """What to call runs: each directory's name, with as many above it as tell them all apart.

    >>> run_names(["a/first", "b"]), run_names(["a/k", "b/k"])
    (['first', 'b'], ['a/k', 'b/k'])
    """
    places = [pathlib.Path(workdir).resolve().parts for workdir in workdirs]
    several = (
        [pathlib.Path(*place[-n:]).as_posix() for place in places]
        for n in range(1, max(map(len, places)) + 1)
    )
    return next(called for called in several if len(set(called)) == len(set(places)))


def load_run_log(workdir: str | pathlib.Path, key: str = "--workdir") -> RunLog:
    """A run from its working directory; `key` is what named it, for errors.

    Raises:
      UserError: there is no log, or no line of it can be read.
    """
    place = pathlib.Path(workdir)
    log = place / "metrics.jsonl"
    if not log.is_file():
        raise UserError(
            f"{key} {workdir}: there is no metrics.jsonl; name the working directory of a run"
        )
    by_step: dict[int, LogLine] = {}
    for text in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # a run that was killed may leave half a line
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            by_step[line["step"]] = by_step.get(line["step"], {}) | line
    if not by_step:
        raise UserError(f"{log}: holds no line of a run; train first")
    files = [
        (re.fullmatch(r"(\d+)\.png", file.name), file)
        for file in sorted((place / "panels").glob("*.png"))
    ]
    evaluation = place / "eval.json"
    return RunLog(
        name=place.resolve().name,
        lines=[by_step[step] for step in sorted(by_step)],
        config=_text(place / "config.txt"),
        data=_text(place / "data.txt"),
        panels=[(int(match[1]), file) for match, file in files if match],
        evaluation=json.loads(evaluation.read_text()) if evaluation.is_file() else {},
    )


def _text(path: pathlib.Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
