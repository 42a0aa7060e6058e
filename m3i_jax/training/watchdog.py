"""Detects a run that hangs: a thread writes the stacks of all threads to a file, logs one line, and
ends the run if so configured."""

import contextlib
import faulthandler
import os
import pathlib
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

from m3i_jax.training.goodput import GoodputClock

FAILED = 1
PATIENCE = 10.0  # seconds that a report may take: what hangs may be the disk that it goes to


class Watchdog:
    """Watches a clock from a separate thread while its block runs.

    A phase that begins or ends, and an evaluator that polls, are signs of life. After `limit`
    seconds without any (`first` seconds before the first step of the process has ended, since it
    compiles), the stacks of all threads are appended to `path` and `log` gets one line; again
    after every further `limit` seconds. The stacks are written even if the interpreter is stuck
    and runs no Python thread. A disk that hangs or is full, or a console that does, costs the
    report, not the end.

    Args:
      clock: of the run.
      path: file for the stacks.
      log: logs a line.
      limit, first: seconds; 0: off.
      abort: after so many consecutive reports the process exits with status 1; 0: it never does.
      end: ends the process, wherever it is stuck.
    """

    def __init__(
        self,
        clock: GoodputClock,
        path: pathlib.Path,
        log: Callable[[str], None],
        *,
        limit: float,
        first: float,
        abort: int = 0,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self._clock, self._path, self._log = clock, path, log
        self._limit, self._first = limit, first
        self._abort, self._end = abort, end
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._limit > 0 and self._first > 0:
            self._clock.beat()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * PATIENCE)

    def _watch(self) -> None:
        period = min(self._limit / 4, self._first / 4, 10.0)
        reports, alive = 0, self._clock.alive
        # closing the file may fail as writing to it did
        with contextlib.suppress(OSError), self._open() as file:
            try:
                while not self._stop.wait(period):
                    limit = self._limit if self._clock.ended else self._first
                    # if this thread cannot run: faulthandler's own thread needs no interpreter
                    faulthandler.dump_traceback_later(limit + 4 * period, file=file)
                    if self._clock.alive != alive:
                        reports, alive = 0, self._clock.alive
                    silent = time.monotonic() - alive
                    if silent >= limit * (reports + 1):
                        reports += 1
                        _attempt(self._report, file, silent)
                        if self._abort and reports >= self._abort:
                            _attempt(
                                self._log,
                                f"ended by the watchdog after {reports} report(s) in a row"
                                " (train.watchdog_abort)",
                            )
                            self._end(FAILED)
                            return
            finally:
                faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):
            if not self._path.stat().st_size:
                self._path.unlink()

    def _open(self) -> TextIO:
        try:
            return open(self._path, "a", encoding="utf-8")
        except OSError as error:
            self._log(
                f"warning: {self._path} cannot be written ({error.strerror or error}): if the run"
                " hangs, the log says so without stacks"
            )
            return open(os.devnull, "a", encoding="utf-8")

    def _report(self, file: TextIO, silent: float) -> None:
        where = f"in phase {self._clock.now!r} after {self._clock.ended:,} step(s) of this process"
        stacks = f"the stacks of all threads are in {self._path}"
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            file.write(f"{when}  no sign of life for {silent:,.1f} s, {where}\n")
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)
            file.write("\n")
            file.flush()
        except OSError as error:
            stacks = f"{self._path} cannot be written ({error.strerror or error})"
        self._log(f"warning: no sign of life for {silent:,.0f} s, {where}: {stacks}")


def _attempt(work: Callable[..., Any], *arguments: Any) -> None:
    """Call a function that may hang, and wait for PATIENCE seconds at most."""
    thread = threading.Thread(target=work, args=arguments, name="report", daemon=True)
    thread.start()
    thread.join(timeout=PATIENCE)
