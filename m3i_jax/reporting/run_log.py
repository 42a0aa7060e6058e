"""Reading the files of a run for reports: its log as curves, its settings, its images. Without jax.
A file that differs from what the run wrote is left out with a warning; of a changed log, the
readable lines are used with a warning."""

import dataclasses
import functools
import logging
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from m3i_jax import run_files
from m3i_jax.errors import UserError

LogLine = dict[str, Any]
T = TypeVar("T")
_PNG = b"\x89PNG\r\n\x1a\n"
NOT_FINITE = ("nan", "inf", "-inf")  # as JSON lines have them, see `writers`
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunLog:
    """The files of a working directory.

    Attributes:
      name: of the directory.
      lines: of metrics.jsonl, by step; the later one of a step that a resumed run wrote again.
      config, data: text of config.txt and data.txt, "" if absent.
      panels: (step, file), by step.
      evaluation: eval.json, or {}.
      others: {name of the data: results of evaluations on them}, of the directories eval-<name>.
    """

    name: str
    lines: list[LogLine]
    config: str
    data: str
    panels: list[tuple[int, pathlib.Path]]
    evaluation: LogLine
    others: dict[str, LogLine] = dataclasses.field(default_factory=dict)

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Returns steps and values of a metric; values may not be finite.

        >>> RunLog("a", [{"step": 1, "loss": 2.0}, {"step": 2}], "", "", [], {}).curve("loss")
        ([1], [2.0])
        """
        return self._curves.get(name, ([], []))

    def last_point(self, name: str) -> tuple[int, float] | None:
        """Returns the last step and value of a metric, which may not be finite, or None.

        >>> lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": "nan"}, {"step": 3}]
        >>> RunLog("a", lines, "", "", [], {}).last_point("loss")
        (2, nan)
        """
        steps, values = self.curve(name)
        return (int(steps[-1]), values[-1]) if steps else None

    def last(self, name: str) -> float | None:
        """Returns the value of `last_point`."""
        point = self.last_point(name)
        return point[1] if point else None

    @property
    def end(self) -> int:
        """The last step that was logged."""
        return self.lines[-1]["step"]

    @property
    def names(self) -> list[str]:
        """All metrics with a numeric value, in the order of their first line."""
        return list(self._curves)

    @functools.cached_property
    def _curves(self) -> dict[str, tuple[list[float], list[float]]]:
        """{metric: (steps, values)} from one pass over the lines."""
        curves: dict[str, tuple[list[float], list[float]]] = {}
        for line in self.lines:
            step = line["step"]
            for name, value in line.items():
                if isinstance(value, str) and value in NOT_FINITE:
                    value = float(value)
                elif name == "step" or not isinstance(value, int | float):
                    continue
                steps, values = curves.get(name) or curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
        return curves


def run_names(workdirs: Sequence[str | pathlib.Path]) -> list[str]:
    """Returns distinct names of runs: each directory's name, with as many parents as that takes.

    >>> run_names(["a/first", "b"]), run_names(["a/k", "b/k"])
    (['first', 'b'], ['a/k', 'b/k'])
    """
    paths = [pathlib.Path(workdir).resolve().parts for workdir in workdirs]
    candidates = (
        [pathlib.Path(*path[-n:]).as_posix() for path in paths]
        for n in range(1, max(map(len, paths)) + 1)
    )
    return next(names for names in candidates if len(set(names)) == len(set(paths)))


def load_run_log(workdir: str | pathlib.Path, key: str = "--workdir") -> RunLog:
    """Load a run from its working directory.

    Args:
      workdir: of the run.
      key: flag or setting that gave it, for errors.

    Raises:
      UserError: there is no log, or none of its lines can be read.
    """
    directory = pathlib.Path(workdir)
    log = directory / "metrics.jsonl"
    if not log.is_file():
        raise UserError(
            f"{key} {workdir}: has no metrics.jsonl; give the working directory of a run"
        )
    by_step: dict[int, LogLine] = {}
    for line in read_log_lines(log):
        before = by_step.get(line["step"])
        by_step[line["step"]] = before | line if before else line
    if not by_step:
        raise UserError(f"{log}: has no line of a run; train first")
    files = [
        (re.fullmatch(r"(\d+)\.png", file.name), file)
        for file in sorted((directory / "panels").glob("*.png"))
    ]
    return RunLog(
        name=directory.resolve().name,
        lines=[by_step[step] for step in sorted(by_step)],
        config=_text(directory / "config.txt"),
        data=_text(directory / "data.txt"),
        panels=[(int(match[1]), file) for match, file in files if match],
        evaluation=_evaluation(directory / "eval.json"),
        others={
            place.name.removeprefix("eval-"): saved
            for place in sorted(directory.glob("eval-*"))
            if (saved := _evaluation(place / "eval.json"))  # warns of one that was deleted
        },
    )


def read_log_lines(log: pathlib.Path) -> list[LogLine]:
    """Returns the readable lines of a metrics.jsonl, with a warning if it differs from what the run
    wrote; none if the file is absent.

    Raises:
      OSError: the file cannot be read.
    """
    if not log.is_file():
        return []
    lines, mismatch = run_files.read_log(log)
    if mismatch:
        _log.warning(
            "warning: %s is not what the run wrote (%s): its figures may be wrong",
            log,
            mismatch,
        )
    return lines


def _read_or_default(path: pathlib.Path, read: Callable[[pathlib.Path], T], default: T) -> T:
    if not path.is_file():
        if os.path.lexists(path) or run_files.noted_marks(path):
            _log.warning("warning: %s is missing, or not a file: it is left out", path)
        return default
    try:
        return read(path)
    except (OSError, UserError) as error:
        _log.warning("warning: %s: it is left out", error)
        return default


def _text(path: pathlib.Path) -> str:
    return _read_or_default(path, run_files.read_run_text, "")


def read_png(path: pathlib.Path) -> bytes:
    """Returns the bytes of an undamaged PNG file; b"" with a warning for a damaged one."""
    try:
        content = run_files.read_bytes(path)
    except (OSError, UserError) as error:
        _log.warning("warning: %s cannot be read (%s): it is left out", path, error)
        return b""
    if is_complete_png(content):
        return content
    _log.warning("warning: %s is damaged: it is left out", path)
    return b""


def is_complete_png(content: bytes) -> bool:
    """Returns whether all chunks of a PNG are present and have their checksums.

    >>> end = bytes(4) + b"IEND" + zlib.crc32(b"IEND").to_bytes(4, "big")
    >>> is_complete_png(_PNG), is_complete_png(_PNG + end)
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


def image_counts(saved: Mapping[str, Any], *, cut: bool = False) -> dict[str, str]:
    """Returns how many images of each set an evaluation has read, in words.

    Args:
      saved: eval.json. Of one that says no number, from an older version, that of the set.
      cut: leave out sets of which all images were read.

    >>> data = {"index": {"pictures": 1281167}, "queries": {"pictures": 500}}
    >>> saved = {"data": data, "evaluated": {"index": 50000, "queries": 500}}
    >>> image_counts(saved), image_counts({"data": data}, cut=True)
    ({'index': '50,000 of 1,281,167', 'queries': '500'}, {})
    """
    counts = {}
    for name, part in saved.get("data", {}).items():
        size = part.get("pictures", 0)
        read = saved.get("evaluated", {}).get(name, size)
        if read != size or not cut:
            counts[name] = f"{read:,} of {size:,}" if read != size else f"{size:,}"
    return counts


def _evaluation(path: pathlib.Path) -> LogLine:
    """eval.json, if it has the structure that --mode=eval gives it."""
    default: LogLine = {}
    saved = _read_or_default(path, lambda path: run_files.read_run_json(path), default)
    parts = [saved.get("results", {}), saved.get("untrained", {}), {"": saved.get("chance", {})}]
    each: list[Any] = []
    for part in parts:
        each += list(part.values()) if isinstance(part, dict) else [None]
    if all(
        isinstance(one, dict) and all(isinstance(value, int | float) for value in one.values())
        for one in each
    ):
        return saved
    _log.warning("warning: %s has no results of evaluators: it is left out", path)
    return {}
