"""Metric writers: JSON lines and the console always, TensorBoard and Weights & Biases if
configured.
A writer that fails never stops training: its lost lines are counted and logged, and the other
writers write the count as `report/dropped/<writer>`. Only the first process of a run writes."""

import contextlib
import dataclasses
import errno
import importlib
import json
import math
import os
import pathlib
import re
import secrets
import stat
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import xxhash

from m3i_jax import privacy, run_files, schema
from m3i_jax.errors import RunStopped, UserError, one_line

Values = dict[str, float]
QUEUE = 10_000  # values that wait for TensorBoard's thread: more than those of many lines
REOPEN = 600.0  # seconds between attempts to write to TensorBoard again
FINISH = 30.0  # seconds that W&B gets for its last uploads


class Sink(Protocol):
    """A destination of the values of a step."""

    def write(self, step: int, values: Values) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: one JSON object a line, `step` first. A line is written completely or not at
    all, also on a full disk. JSON has no infinite numbers or NaN: they become the strings "nan",
    "inf" and "-inf", which `float` reads back.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> JsonLines(path).write(7, {"loss": 1.5, "grad_norm": math.inf, "samples_seen": 448})
    >>> path.read_text()
    '{"step": 7, "loss": 1.5, "grad_norm": "inf", "samples_seen": 448}\\n'
    """

    def __init__(self, path: pathlib.Path):
        self._path = path = pathlib.Path(path)
        try:
            self._file = self._open()
            device = stat.S_ISCHR(os.fstat(self._file).st_mode)
            before = b"" if device else run_files.read_bytes(path, 2**32)
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror or error}; make room or choose another"
                " --workdir"
            ) from error
        self._size, self._content = len(before), xxhash.xxh3_64(before)

    def _open(self) -> int:
        # opening a pipe without a reader must not block
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK
        return os.open(self._path, flags, 0o666)

    def write(self, step: int, values: Values) -> None:
        line = (
            json.dumps({"step": int(step)} | {k: _plain(v) for k, v in values.items()}) + "\n"
        ).encode()
        before, done = os.fstat(self._file).st_size, 0
        try:
            while done < len(line):  # a disk that fills up writes a part
                done += os.write(self._file, line[done:])
        except OSError:
            if done:
                os.ftruncate(self._file, before)
            raise
        self._size += len(line)
        self._content.update(line)

    def mark(self) -> run_files.Mark:
        """Returns the size and digest of the log so far; also recorded for `run_files.read_log`."""
        now = self._size, self._content.hexdigest()
        with contextlib.suppress(UserError):  # a full disk: the earlier record still holds
            if self._path.is_file():
                self._flush()
                run_files.note_mark(self._path, now)
        return now

    def _flush(self) -> None:
        """Bring all lines to the disk. A mounted bucket keeps what is written to an open file on
        this machine, so the file is closed, and another descriptor of it goes on."""
        with contextlib.suppress(OSError):  # the lines stay where they are
            os.fsync(self._file)
            before, self._file = self._file, self._open()
            os.close(before)

    def close(self) -> None:
        self.mark()
        os.close(self._file)


def _plain(value: Any) -> int | float | str:
    """A number of any library as a Python number."""
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)


class Console:
    """One readable line a step: progress, losses, balance, speed, time left.

    Args:
      total: steps of the run.
      images: images a step.
      log: prints a line; returns False if that failed.
    """

    def __init__(self, total: int, images: int, log: Callable[[str], Any]):
        self._total, self._images, self._print = total, images, log

    def _log(self, text: str) -> None:
        if self._print(text) is False:
            raise OSError("the console cannot be written to")

    def write(self, step: int, values: Values) -> None:
        if evaluation := {
            k.removeprefix("eval/"): v for k, v in values.items() if k.startswith("eval/")
        }:
            self._log(
                f"{self._progress(step)}  evaluation  "
                + "  ".join(f"{k} {v:.4f}" for k, v in evaluation.items())
            )
        if "loss" not in values:
            return
        # the weighted loss jumps when lambda takes its first value; it is in metrics.jsonl
        loss = "loss/equal_weights" if "loss/equal_weights" in values else "loss"
        shown = [
            ("loss" if loss == "loss" else "loss at lambda 1:", loss, ".4f"),
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
        self._log(f"{self._progress(step)}  {line}{left}")

    def _progress(self, step: int) -> str:
        return f"{step:>{len(str(self._total))}}/{self._total} {step / max(self._total, 1):4.0%}"

    def close(self) -> None:
        pass


def format_duration(seconds: float) -> str:
    """Returns seconds as text of two units.

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
        self._make = lambda **options: writer(str(directory), max_queue=QUEUE, **options)
        # hides what an interrupted run wrote after this step
        self._writer, self._opened = self._make(purge_step=resume_at + 1), time.monotonic()

    def _thread(self) -> Any:
        """tensorboardX's thread that writes the file; None if this version has another."""
        events = getattr(getattr(self._writer, "file_writer", None), "event_writer", None)
        return getattr(events, "_worker", None)

    def _check(self) -> None:
        """Raises OSError if the thread ended, as it does on a full disk: nothing would empty its
        queue, and the main thread would wait for ever once the queue is full."""
        thread = self._thread()
        if thread is not None and not thread.is_alive():
            raise OSError("the thread of tensorboardX ended, as it does on a full disk")

    def write(self, step: int, values: Values) -> None:
        try:
            self._check()
        except OSError:
            if time.monotonic() < self._opened + REOPEN:
                raise
            self._abandon()
            self._opened = time.monotonic()
            self._writer = self._make()  # a new file beside the one before
        for name, value in values.items():
            self._check()
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def _abandon(self) -> None:
        """Python would wait at its end until a thread that has ended reads the queue."""
        queue = getattr(self._writer.file_writer.event_writer, "_event_queue", None)
        if queue is not None:
            queue.cancel_join_thread()

    def close(self) -> None:
        try:
            self._check()
        except OSError:
            self._abandon()
            raise
        self._writer.close()


class _Wandb:
    def __init__(self, project: str, directory: pathlib.Path, config: dict[str, Any]):
        wandb = require_package("wandb", "report.wandb", "wandb")
        # one id for each working directory, so that a resumed run continues the same W&B run;
        # random, since another run may have the same name
        path = directory / "wandb.id"
        if not (path.is_file() and path.read_text(encoding="utf-8").strip()):
            name = re.sub(r"[/\\#?%:]", "-", directory.absolute().name[:40])  # refused in an id
            run_files.write_text_atomic(path, f"{name}-{secrets.token_hex(4)}\n")
        identity = path.read_text(encoding="utf-8").strip()
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", f"{FINISH:.0f}")
        try:
            self._run = wandb.init(
                project=project,
                dir=str(directory),
                id=identity,
                name=identity,
                resume="allow",
                config=config,
                # metadata have the command line, whose paths may have credentials
                settings=wandb.Settings(x_disable_meta=True),
            )
        except Exception as error:
            if type(error).__name__ == "UsageError":  # no key; a setting that W&B refuses
                raise UserError(
                    f"config.report.wandb: W&B refuses to start ({one_line(error, 300)}); log in"
                    " with `wandb login`, set WANDB_API_KEY, or leave the key unset"
                ) from error
            raise

    def write(self, step: int, values: Values) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        """Finish the run; an upload that takes longer than FINISH does not hold the process."""
        failed: list[Exception] = []

        def finish() -> None:
            try:
                self._run.finish()
            except Exception as error:  # raised below
                failed.append(error)

        (thread := threading.Thread(target=finish, name="wandb", daemon=True)).start()
        thread.join(FINISH + 1.0)
        if thread.is_alive():
            failed.append(TimeoutError(f"its uploads took longer than {FINISH:.0f} seconds"))
        if failed:
            raise failed[0]


def require_package(module: str, key: str, extra: str) -> Any:
    """Import an optional package.

    >>> require_package("no_such_package", "report.wandb", "wandb")
    Traceback (most recent call last):
    m3i_jax.errors.UserError: config.report.wandb: needs the package no_such_package; pip install
    'm3i-jax[wandb]', or leave the key unset
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"config.{key}: needs the package {module}; pip install 'm3i-jax[{extra}]', or leave"
            " the key unset"
        ) from error


def truncate_log(path: pathlib.Path, step: int) -> int:
    """Remove the lines after `step` from a log, since a resumed run writes them again, and an
    incomplete last line. The file is replaced atomically.

    Returns: number of removed lines. Raises UserError if the file cannot be written.

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
        with run_files.atomic_file(path) as temporary, open(temporary, "wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
    return len(lines) - len(kept)


def _step(line: bytes) -> float:
    """The step of a line, infinite for a damaged one."""
    values = run_files.parse_log_line(line)
    return math.inf if values is None else values["step"]


class Writers:
    """All writers of a run. `write` never raises; `dropped` counts the lost lines of each."""

    def __init__(self, sinks: dict[str, Sink], log: Callable[[str], None]):
        self._sinks, self.log, self.dropped = sinks, log, dict.fromkeys(sinks, 0)

    def write(self, step: int, values: Values) -> None:
        losses = {f"report/dropped/{name}": lost for name, lost in self.dropped.items() if lost}
        for name, sink in self._sinks.items():
            try:
                sink.write(step, values | losses)
            except Exception as error:  # a failing disk or network must not stop training
                self._lost(name, "line(s)", error)

    def _lost(self, name: str, what: str, error: Exception) -> None:
        self.dropped[name] = self.dropped.get(name, 0) + 1
        if self.dropped[name] in (1, 10, 100, 1000):
            self.log(
                f"warning: {name} lost {self.dropped[name]} {what}: {type(error).__name__}: {error}"
            )

    def attempt(self, name: str, write: Callable[[], Any]) -> None:
        """Write another file of the run, such as an image; a failure loses only that file, which
        `dropped` counts."""
        try:
            write()
        except RunStopped:  # another host is lost
            raise
        except Exception as error:  # also of a figure of values that are not finite
            self._lost(name, "file(s)", error)

    def mark(self) -> dict[str, run_files.Mark]:
        """Returns {name: size and digest} of the log so far; {} on a process that does not
        write."""
        return {
            name: sink.mark() for name, sink in self._sinks.items() if isinstance(sink, JsonLines)
        }

    def close(self) -> None:
        for sink in self._sinks.values():
            try:
                sink.close()
            except Exception as error:  # a failure to close must not end the run with an error
                self.log(f"warning: {type(sink).__name__} did not close: {error}")


def log_line(text: str) -> None:
    """Print a line with the time. A closed console or a full disk behind it raises no error."""
    log_lines(text)


def log_lines(text: str) -> bool:
    """`log_line`; False if the line was lost to a full disk, which is tried again with the next
    line, or to a console that was closed, which is replaced by os.devnull."""
    try:
        print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)
    except (OSError, ValueError) as error:
        if not isinstance(error, OSError) or error.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EIO,
        ):
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (stays open)
        return False
    return True


def open_writers(
    config: schema.Config, workdir: pathlib.Path, *, resume_at: int, total: int, main: bool = True
) -> Writers:
    """Open the writers of a run.

    Args:
      config: `report` and `train.batch_size` are read.
      workdir: directory of the files.
      resume_at: step that the run resumes from; later lines of the log are removed.
      total: steps of the run.
      main: whether this is the process that writes.

    Raises:
      UserError: an optional package is missing, names the extra; or W&B has no key.
    """
    if not main:
        return Writers({}, lambda text: None)
    log = workdir / "metrics.jsonl"
    if cut := truncate_log(log, resume_at):
        log_line(
            f"{log.name}: removed {cut:,} lines after step {resume_at:,}; the run writes them again"
        )
    sinks: dict[str, Sink] = {
        "metrics.jsonl": JsonLines(log),
        "console": Console(total, config.train.batch_size, log_lines),
    }
    if config.report.tensorboard:
        sinks["tensorboard"] = _TensorBoard(workdir, resume_at)
    if config.report.wandb:
        settings = privacy.redact_tree(dataclasses.asdict(config))
        try:
            sinks["wandb"] = _Wandb(config.report.wandb, workdir, settings)
        except UserError:
            raise
        except Exception as error:  # a service that is away must not stop training
            log_line(
                f"warning: W&B does not start ({type(error).__name__}: {one_line(error, 300)}); the"
                " run is logged there from its next start on"
            )
    return Writers(sinks, log_line)
