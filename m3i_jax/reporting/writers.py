"""Where metrics go: a JSON line and a console line always, TensorBoard and Weights & Biases if
asked. A sink that fails never stops
training: what it lost is counted, told, and written by the others as `report/dropped/<sink>`. Only
the first process of a run writes."""

import contextlib
import dataclasses
import errno
import importlib
import json
import math
import os
import pathlib
import secrets
import stat
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import xxhash

from m3i_jax import privacy, run_files, schema
from m3i_jax.errors import UserError
from m3i_jax.reporting import atomic_write

Values = dict[str, float]


class Sink(Protocol):
    """Takes the values of a step."""

    def write(self, step: int, values: Values) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: one JSON object a line, `step` first. A line is there whole or not at all,
    also when the disk is full. JSON has no
    numbers that are not finite: they become the texts "nan", "inf" and "-inf", which `float` reads
    back.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> JsonLines(path).write(7, {"loss": 1.5, "grad_norm": math.inf, "samples_seen": 448})
    >>> path.read_text()
    '{"step": 7, "loss": 1.5, "grad_norm": "inf", "samples_seen": 448}\\n'
    """

    def __init__(self, path: pathlib.Path):
        self._path = path = pathlib.Path(path)
        try:
            # of a pipe nobody reads
            self._file = os.open(
                path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o666
            )
            device = stat.S_ISCHR(os.fstat(self._file).st_mode)
            before = b"" if device else run_files.read_bytes(path, 2**32)
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror or error}; make room or choose another"
                " --workdir"
            ) from error
        self._size, self._content = len(before), xxhash.xxh3_64(before)

    def write(self, step: int, values: Values) -> None:
        line = (
            json.dumps({"step": int(step)} | {k: _plain(v) for k, v in values.items()}) + "\n"
        ).encode()
        before, done = os.fstat(self._file).st_size, 0
        try:
            while done < len(line):  # a disk that fills up takes a part
                done += os.write(self._file, line[done:])
        except OSError:
            if done:
                os.ftruncate(self._file, before)
            raise
        self._size += len(line)
        self._content.update(line)

    def mark(self) -> run_files.Mark:
        """Size and digest of what was written so far, which is noted for who reads the log back."""
        now = self._size, self._content.hexdigest()
        with contextlib.suppress(UserError):  # a full disk: what was noted before still holds
            if self._path.is_file():
                run_files.note_mark(self._path, now)
        return now

    def close(self) -> None:
        self.mark()
        os.close(self._file)


def _plain(value: Any) -> int | float | str:
    """A number as Python's own, whatever library it comes from."""
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)


class Console:
    """One readable line a step: progress, losses, balance, speed, time left.

    Args:
      total: steps of the run.
      images: images a step.
      say: prints a line; False if it could not.
    """

    def __init__(self, total: int, images: int, say: Callable[[str], Any]):
        self._total, self._images, self._print = total, images, say

    def _say(self, text: str) -> None:
        if self._print(text) is False:
            raise OSError("it takes no line")

    def write(self, step: int, values: Values) -> None:
        if evaluation := {
            k.removeprefix("eval/"): v for k, v in values.items() if k.startswith("eval/")
        }:
            self._say(
                f"{self._place(step)}  evaluation  "
                + "  ".join(f"{k} {v:.4f}" for k, v in evaluation.items())
            )
        if "loss" not in values:
            return
        shown = [
            ("loss", "loss", ".4f"),
            ("ssp", "loss/ssp", ".4f"),
            ("sp", "loss/sp", ".4f"),
            ("lambda", "balance/lambda", ".3g"),
            ("rank", "collapse/effective_rank", ".1f"),
            ("img/s", "perf/images_per_sec", ",.1f"),
            ("mfu", "perf/mfu", ".1%"),
            ("wait", "perf/input_wait", ".0%"),
        ]
        line = "  ".join(
            f"{name} {values[key]:{form}}" for name, key, form in shown if key in values
        )
        rate = values.get("perf/images_per_sec", 0.0)
        left = (
            f"  left {format_duration((self._total - step) * self._images / rate)}" if rate else ""
        )
        self._say(f"{self._place(step)}  {line}{left}")

    def _place(self, step: int) -> str:
        return f"{step:>{len(str(self._total))}}/{self._total} {step / max(self._total, 1):4.0%}"

    def close(self) -> None:
        pass


def format_duration(seconds: float) -> str:
    """Seconds for a person.

    >>> format_duration(59), format_duration(3700), format_duration(200_000)
    ('59s', '1h01m', '2d07h')
    """
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    return (
        f"{s // 3600}h{s % 3600 // 60:02d}m"
        if s < 86400
        else f"{s // 86400}d{s % 86400 // 3600:02d}h"
    )


class _TensorBoard:
    def __init__(self, directory: pathlib.Path, resume_at: int):
        writer = require_package("tensorboardX", "report.tensorboard", "tensorboard").SummaryWriter
        # hides what a run that was cut off had written after this step
        self._writer = writer(str(directory), purge_step=resume_at + 1)

    def write(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, project: str, directory: pathlib.Path, config: dict[str, Any]):
        wandb = require_package("wandb", "report.wandb", "wandb")
        # One run a working directory, so that a resumed run goes on in the same place; its name
        # alone may be that of another run.
        place = directory / "wandb.id"
        if not place.is_file():
            place.write_text(
                f"{directory.absolute().name[:40]}-{secrets.token_hex(4)}\n", encoding="utf-8"
            )
        identity = place.read_text(encoding="utf-8").strip()
        self._run = wandb.init(
            project=project,
            dir=str(directory),
            id=identity,
            name=identity,
            resume="allow",
            config=config,
        )

    def write(self, step: int, values: Values) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def require_package(module: str, key: str, extra: str) -> Any:
    """An optional package, imported where it is used.

    >>> require_package("no_such_package", "report.wandb", "wandb")
    Traceback (most recent call last):
    m3i_jax.errors.UserError: config.report.wandb: needs the package no_such_package; pip install 'm3i-jax[wandb]', or leave the key unset
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"config.{key}: needs the package {module}; pip install 'm3i-jax[{extra}]', or leave"
            " the key unset"
        ) from error


def truncate_log(path: pathlib.Path, step: int) -> int:
    """Cut a log back to the lines up to `step`, whole or not at all, since a resumed run writes the
    others again. A torn line goes too.

    Returns: how many lines were cut. Raises UserError if the place cannot be written to.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> _ = path.write_text('{"step": 1}\\n{"step": 2}\\n{"step": 3}\\n{"ste')
    >>> truncate_log(path, 2), path.read_text()
    (2, '{"step": 1}\\n{"step": 2}\\n')
    """
    if not path.is_file():
        return 0
    lines = run_files.read_bytes(path, 2**32).splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _step(line) <= step]
    if len(kept) < len(lines):
        if run_files.noted_marks(path):
            run_files.note_mark(path, run_files.file_mark(b"".join(kept)))
        with atomic_write.atomic_file(path) as place, open(place, "wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
    return len(lines) - len(kept)


def _step(line: bytes) -> float:
    """The step of a line; later than any if there is none to read."""
    found = run_files.parse_log_line(line)
    return math.inf if found is None else found["step"]


class Writers:
    """All sinks of a run. `write` never raises; `dropped` counts what a failing sink lost."""

    def __init__(self, sinks: dict[str, Sink], say: Callable[[str], None]):
        self._sinks, self.say, self.dropped = sinks, say, dict.fromkeys(sinks, 0)

    def write(self, step: int, values: Values) -> None:
        losses = {f"report/dropped/{name}": lost for name, lost in self.dropped.items() if lost}
        for name, sink in self._sinks.items():
            try:
                sink.write(step, values | losses)
            except Exception as error:  # whatever a disk or a network does, training goes on
                self._lost(name, "line(s)", error)

    def _lost(self, name: str, what: str, error: Exception) -> None:
        self.dropped[name] = self.dropped.get(name, 0) + 1
        if self.dropped[name] in (1, 10, 100, 1000):
            self.say(
                f"warning: {name} lost {self.dropped[name]} {what}: {type(error).__name__}: {error}"
            )

    def attempt(self, name: str, write: Callable[[], Any]) -> None:
        """Do what writes a file beside the log, such as an image; a disk that does not take it
        costs the file, counted as `dropped`, and nothing else."""
        try:
            write()
        except (OSError, UserError) as error:
            self._lost(name, "file(s)", error)

    def mark(self) -> dict[str, run_files.Mark]:
        """Size and digest of the log so far, by its name; nothing on a process that writes none."""
        return {
            name: sink.mark() for name, sink in self._sinks.items() if isinstance(sink, JsonLines)
        }

    def close(self) -> None:
        for sink in self._sinks.values():
            try:
                sink.close()
            except Exception as error:  # closing is the last chance to fail, not a reason to
                self.say(f"warning: {type(sink).__name__} did not close: {error}")


def log_line(text: str) -> None:
    """A line on the console with the time. A closed console, or a full disk behind it, is no reason
    to stop."""
    log_lines(text)


def log_lines(text: str) -> bool:
    """`log_line`, and whether the line was taken. A closed console stays closed; a disk may have
    room again."""
    try:
        print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)
    except (OSError, ValueError) as error:
        if not isinstance(error, OSError) or error.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EIO,
        ):
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (closed for the rest of the process)
        return False
    return True


def open_writers(
    config: schema.Config, workdir: pathlib.Path, *, resume_at: int, total: int, main: bool = True
) -> Writers:
    """The sinks of a run.

    Args:
      config: `report` and `train.batch_size` are read.
      workdir: where files go.
      resume_at: step that the run goes on from; later lines of an old log are cut.
      total: steps of the run.
      main: whether this is the process that writes.

    Raises:
      UserError: an optional package is missing; names the extra.
    """
    if not main:
        return Writers({}, lambda text: None)
    log = workdir / "metrics.jsonl"
    if cut := truncate_log(log, resume_at):
        log_line(
            f"{log.name}: {cut:,} lines after step {resume_at:,} cut, they will be written again"
        )
    sinks: dict[str, Sink] = {
        "metrics.jsonl": JsonLines(log),
        "console": Console(total, config.train.batch_size, log_lines),
    }
    if config.report.tensorboard:
        sinks["tensorboard"] = _TensorBoard(workdir, resume_at)
    if config.report.wandb:
        sinks["wandb"] = _Wandb(
            config.report.wandb, workdir, privacy.redact_tree(dataclasses.asdict(config))
        )
    return Writers(sinks, log_line)
