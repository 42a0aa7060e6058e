"""What a run has written, read back: its log as curves, its settings, its images. No jax. What is
not as the run wrote it is left out with a warning; of a log that was changed, what can be read is
shown with one."""

import dataclasses
import logging
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from m3i_jax import run_files
from m3i_jax.errors import UserError

LogLine = dict[str, Any]
T = TypeVar("T")
_PNG = b"\x89PNG\r\n\x1a\n"
_log = logging.getLogger(__name__)


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
    for line in logged(log):
        by_step[line["step"]] = by_step.get(line["step"], {}) | line
    if not by_step:
        raise UserError(f"{log}: holds no line of a run; train first")
    files = [
        (re.fullmatch(r"(\d+)\.png", file.name), file)
        for file in sorted((place / "panels").glob("*.png"))
    ]
    return RunLog(
        name=place.resolve().name,
        lines=[by_step[step] for step in sorted(by_step)],
        config=_text(place / "config.txt"),
        data=_text(place / "data.txt"),
        panels=[(int(match[1]), file) for match, file in files if match],
        evaluation=_evaluation(place / "eval.json"),
    )


def logged(log: pathlib.Path) -> list[LogLine]:
    """The lines of a metrics.jsonl that can be read, with a warning if it is not as the run wrote
    it; none if it is not there.

    Raises:
      OSError: it cannot be read.
    """
    if not log.is_file():
        return []
    lines, wrong = run_files.read_log(log)
    if wrong:
        _log.warning(
            "warning: %s is not what the run wrote (%s): its figures may be wrong", log, wrong
        )
    return lines


def _or_nothing(path: pathlib.Path, read: Callable[[pathlib.Path], T], nothing: T) -> T:
    if not path.is_file():
        if os.path.lexists(path) or run_files.noted_marks(path):
            _log.warning("warning: %s is missing, or no file: it is left out", path)
        return nothing
    try:
        return read(path)
    except (OSError, UserError) as error:
        _log.warning("warning: %s: it is left out", error)
        return nothing


def _text(path: pathlib.Path) -> str:
    return _or_nothing(path, run_files.read_run_text, "")


def picture(path: pathlib.Path) -> bytes:
    """A PNG file whose checksums hold; b"" with a warning if they do not."""
    try:
        content = run_files.read_bytes(path)
    except (OSError, UserError) as error:
        _log.warning("warning: %s cannot be read (%s): it is left out", path, error)
        return b""
    if is_whole_png(content):
        return content
    _log.warning("warning: %s is damaged: it is left out", path)
    return b""


def is_whole_png(content: bytes) -> bool:
    """Whether the checksums of all chunks of a PNG hold, and nothing is missing.

    >>> is_whole_png(_PNG), is_whole_png(_PNG + bytes(4) + b"IEND" + zlib.crc32(b"IEND").to_bytes(4, "big"))
    (False, True)
    """
    at, kind = len(_PNG), b""
    while content.startswith(_PNG) and kind != b"IEND" and at + 12 <= len(content):
        end = at + 8 + int.from_bytes(content[at : at + 4], "big")
        kind = content[at + 4 : at + 8]
        if zlib.crc32(content[at + 4 : end]).to_bytes(4, "big") != content[end : end + 4]:
            return False
        at = end + 4
    return kind == b"IEND"


def _evaluation(path: pathlib.Path) -> LogLine:
    """eval.json, if it has the structure that --mode=eval gives it."""
    nothing: LogLine = {}
    found = _or_nothing(path, lambda path: run_files.read_run_json(path), nothing)
    results = found.get("results", {})
    each = list(results.values()) if isinstance(results, dict) else [None]
    if all(
        isinstance(one, dict) and all(isinstance(value, int | float) for value in one.values())
        for one in each
    ):
        return found
    _log.warning("warning: %s has no results of evaluators: it is left out", path)
    return {}
