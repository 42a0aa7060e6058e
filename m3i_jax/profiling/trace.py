"""Profiler traces on demand, and their operations, without TensorFlow."""

import contextlib
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from m3i_jax.reporting import text_table

HEADERS = ("operation", "ms a step", "share", "calls a step", "kind")


class TraceOp(NamedTuple):
    """An operation of the compiled step; seconds and calls in the trace. Its time excludes that of
    operations inside it."""

    name: str
    kind: str
    seconds: float
    calls: int


class Tracer:
    """Traces a few steps of a run on request. Called with every dispatched step and its metrics; a
    trace begins and ends when the device is idle, so that it has complete steps.

    Args:
      directory: of the traces, each in a folder named by the time.
      log: logs a line.
      steps: length of a trace.
      pause: context in which the profiler starts, or stops and writes; its time is not that of
        training.
      done: called with the directory of each finished trace and its number of steps.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        log: Callable[[str], None],
        steps: int,
        *,
        pause: Callable[[str], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        done: Callable[[pathlib.Path, int], None] = lambda place, steps: None,
    ) -> None:
        self._directory, self._log, self._steps = directory, log, steps
        self._pause, self._done = pause, done
        self._requested, self._last, self._first = False, 0, 0
        self.running = False

    def ask(self) -> None:
        """Trace the next steps. It only sets a flag, so that a signal handler may call it."""
        self._requested = True

    def __call__(self, step: int, metrics: Any) -> None:
        if self.running and step >= self._last:
            jax.block_until_ready(metrics)
            with self._pause("trace"):
                self._finish(step)
        elif self._requested and not self.running:
            self._requested = False
            jax.block_until_ready(metrics)
            with self._pause("trace"):
                self._begin(step)

    def _begin(self, step: int) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # Python frames of all threads would fill the trace
        try:
            jax.profiler.start_trace(
                str(self._directory), create_perfetto_trace=True, profiler_options=options
            )
        except Exception as error:  # another profiler runs, or the disk is full: training goes on
            self._log(f"warning: no trace: {' '.join(str(error).split())[:200]}")
            return
        self.running, self._first, self._last = True, step, step + self._steps
        self._log(f"tracing steps {step + 1:,} to {self._last:,}")

    def close(self) -> None:
        """Drop an incomplete trace."""
        if self.running:
            self.running = False
            with contextlib.suppress(Exception):
                jax.profiler.stop_trace()
            self._log(f"the run ended before the trace had its {self._steps} steps")

    def _finish(self, step: int) -> None:
        self.running = False
        try:
            jax.profiler.stop_trace()
            place = newest_trace(self._directory)
            self._log(
                f"trace of {step - self._first} steps: {place}; open perfetto_trace.json.gz there"
                " in https://ui.perfetto.dev"
            )
            self._done(place, step - self._first)
        except Exception as error:
            self._log(f"warning: the trace is lost: {' '.join(str(error).split())[:200]}")


def newest_trace(directory: pathlib.Path) -> pathlib.Path:
    """The folder of the last trace under a directory."""
    return max(
        (path.parent for path in directory.rglob("*.xplane.pb")),
        key=lambda folder: folder.stat().st_mtime,
    )


def trace_operations(place: pathlib.Path) -> list[TraceOp]:
    """Operations of the devices of this host, the most expensive first, from the xplane.pb of a
    trace."""
    totals: dict[tuple[str, str], list[float]] = {}
    for file in sorted(place.glob("*.xplane.pb")):
        planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
        devices = [plane for plane in planes if plane.name.startswith("/device:")]
        for plane in devices or planes:
            lines = list(plane.lines)
            # TPU: the other lines have the same time by module and step
            op_lines = [line for line in lines if line.name == "XLA Ops"]
            for line in op_lines or lines:
                _add(totals, line.events, every=bool(op_lines))
    ops = [
        TraceOp(name, kind, seconds, int(calls))
        for (name, kind), (seconds, calls) in totals.items()
    ]
    return sorted(ops, key=lambda op: -op.seconds)


def _add(totals: dict[tuple[str, str], list[float]], events: Iterable[Any], every: bool) -> None:
    """Adds the events of a line; the time of nested events is subtracted from the outer ones."""
    spans = []
    for event in events:
        stats = dict(event.stats)
        if (every or "hlo_op" in stats) and not event.name.startswith("end: "):
            name = str(stats.get("hlo_op", event.name))
            spans.append(
                (event.start_ns, -event.duration_ns, name, str(stats.get("hlo_category", "")))
            )
    outer: list[tuple[float, list[float]]] = []
    for start, minus, name, kind in sorted(spans):
        seconds = -minus / 1e9
        while outer and outer[-1][0] <= start:
            outer.pop()
        if outer:
            outer[-1][1][0] -= seconds
        total = totals.setdefault((name, kind or _kind(name)), [0.0, 0])
        total[0] += seconds
        total[1] += 1
        outer.append((start - minus, total))


def _kind(name: str) -> str:
    """Kind of an operation by its name: the compiler's name without its number.

    >>> _kind("loop_multiply_fusion.12.clone"), _kind("dot.3")
    ('loop_multiply_fusion', 'dot')
    """
    return re.sub(r"(\.(\d+|clone|remat\d*))+$", "", name)


def operation_table(ops: list[TraceOp], steps: int, most: int = 15) -> str:
    """The most expensive operations as text."""
    total = sum(op.seconds for op in ops)
    rows = [
        (
            op.name[:48],
            f"{1e3 * op.seconds / steps:.3f}",
            f"{op.seconds / total:.1%}",
            f"{op.calls / steps:.1f}",
            op.kind[:32],
        )
        for op in ops[:most]
    ]
    rest = sum(op.seconds for op in ops[most:])
    if rest:
        rows.append(
            (
                f"{len(ops) - most} others",
                f"{1e3 * rest / steps:.3f}",
                f"{rest / total:.1%}",
                "",
                "",
            )
        )
    return text_table.text_table(rows, HEADERS)
