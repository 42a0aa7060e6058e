"""Measures how the seconds of a run are spent, by phase. A run is in exactly one phase at any
moment, so that the seconds of all phases add up to the wall time of its processes, those before a
restart included:

    start      imports, the connection of hosts, opening data, the trainer, the first state
    restore    reading a checkpoint
    compile    tracing and compiling, in whatever phase it happens
    data       waiting for a batch
    step       training: dispatching steps and waiting for the device
    evaluate   evaluators
    save       what the loop waits for checkpoints
    panel      images
    trace      the profiler's stop
    stop       closing files at the end
    lost       steps that a restart repeated
"""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping

PHASES = (
    "start",
    "restore",
    "compile",
    "data",
    "step",
    "evaluate",
    "save",
    "panel",
    "trace",
    "stop",
    "lost",
)
PREFIX = "perf/seconds/"


class GoodputClock:
    """Measures phases, and from them the speed of training between two readings. A mode creates it,
    the loop reports its phases.

    Args:
      images: images a step.
      chips: accelerators that share a step.
      flops: matrix FLOPs a step, without recomputation; 0: unknown.
      peak: dense FLOP/s of all chips together; 0: unknown, and there is no MFU then.
      earlier: seconds by phase of the run before a restart, as of `resumed_seconds`.
      restarts: how often the run was started again.
      began: when the process began this run, of `time.monotonic()`; None: now.

    >>> clock = GoodputClock(images=8)
    >>> with clock.phase("step"):
    ...     with clock.phase("data"):
    ...         clock.ended += 1
    >>> sorted(name for name, seconds in clock.total().items() if seconds)
    ['data', 'start', 'step']
    """

    def __init__(
        self,
        *,
        images: int = 0,
        chips: float = 1,
        flops: float = 0.0,
        peak: float = 0.0,
        earlier: Mapping[str, float] | None = None,
        restarts: int = 0,
        began: float | None = None,
    ) -> None:
        self.images, self.chips, self.restarts = images, chips, restarts
        self.flops, self.peak = flops, peak
        self._seconds = dict.fromkeys(PHASES, 0.0) | dict(earlier or {})
        self._stack = ["start"]
        self._since = time.monotonic() if began is None else began
        self._owner = threading.get_ident()
        self._compiled: list[tuple[float, float]] = []
        self.steps = 0  # computed since the last reading
        self.ended = 0  # steps of this process whose metrics were fetched
        self._computed = 0  # steps of this process that are known to be computed
        self._speed: dict[str, float] = {}  # of the last reading
        self.alive = self._since  # when the run last gave a sign of life
        self._mark = self._busy()

    @property
    def now(self) -> str:
        """The phase the run is in."""
        return self._stack[-1]

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Yields seconds of the block go to `name`, and not to the phase around it."""
        self._settle()
        self._stack.append(name)
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()

    def turn(self, name: str) -> None:
        """Seconds outside of any phase's block go to `name` from now on."""
        self._settle()
        self._stack[0] = name

    def beat(self) -> None:
        """Reports a sign of life within a phase that may be long."""
        self.alive = time.monotonic()

    def step_ended(self, ahead: int = 0) -> None:
        """Count a step whose metrics were fetched.

        Args:
          ahead: steps after it that are computed too: where dispatching a step computes it, as on
            CPUs, the seconds before this call are theirs.
        """
        self.ended += 1
        computed = max(self._computed, self.ended + ahead)
        self.steps, self._computed = self.steps + computed - self._computed, computed

    def compiled(self, seconds: float) -> None:
        """Move `seconds` of tracing or compiling that have just ended from the current phase to
        `compile`. Nested compilations, as JAX reports them, count once; those of other threads
        do not count, since the run does not wait for them."""
        if threading.get_ident() != self._owner:
            return
        self._settle()
        begin, inside = self._since - seconds, 0.0
        while self._compiled and self._compiled[-1][0] >= begin:
            a, b = self._compiled.pop()
            inside += b - a
        if self._compiled:  # the previous one overlaps by the resolution of the clock
            begin = max(begin, self._compiled[-1][1])
        self._compiled.append((begin, self._since))
        more = max(self._since - begin - inside, 0.0)
        self._seconds[self.now] -= more
        self._seconds["compile"] += more

    def total(self) -> dict[str, float]:
        """Returns seconds by phase so far, of all starts of the run."""
        self._settle()
        return dict(self._seconds)

    def read(self) -> dict[str, float]:
        """Metrics of the steps since the last reading, or of that reading if none was computed
        since, and the seconds by phase so far.

        perf/images_per_sec, perf/images_per_sec_per_chip and perf/step_seconds cover the phases
        data and step; perf/input_wait is the share of data in them; perf/mfu is model FLOPs over
        the chips' peak."""
        total = self.total()
        if self.steps or not self._speed:
            self._speed = self._measure()
        return self._speed | self._lines(total)

    def _measure(self) -> dict[str, float]:
        (data, step), (data_before, step_before) = self._busy(), self._mark
        self._mark = data, step
        waited = data - data_before
        busy = max(waited + step - step_before, 1e-9)
        rate, self.steps = self.steps / busy, 0
        out = {
            "perf/images_per_sec": self.images * rate,
            "perf/images_per_sec_per_chip": self.images * rate / self.chips,
            "perf/step_seconds": 1 / rate if rate else busy,
            "perf/input_wait": waited / busy,
        }
        if self.peak and self.flops:
            out["perf/mfu"] = self.flops * rate / self.peak
        return out

    def summary(self) -> tuple[dict[str, float], str]:
        """Returns (metrics, one line for the log) of the whole run: the share of its wall time
        spent in steps, and the other phases."""
        total = self.total()
        wall = sum(total.values())
        values = {
            "perf/goodput": total["step"] / wall if wall else 0.0,
            "perf/wall_seconds": wall,
        } | self._lines(total)
        # rounded so that the printed parts add up to the printed sum
        shown, exact, done = {}, 0.0, 0
        for name in PHASES:
            exact += total[name]
            shown[name], done = round(10 * exact) - done, round(10 * exact)
        parts = sorted((item for item in shown.items() if item[1]), key=lambda item: -item[1])
        again = f"; started {self.restarts + 1} times" if self.restarts else ""
        phases = " + ".join(f"{name} {tenths / 10:,.1f}" for name, tenths in parts)
        return values, f"goodput {values['perf/goodput']:.1%}: {done / 10:,.1f} s = {phases}{again}"

    def started(self) -> dict[str, float]:
        """Returns the metrics that a resumed run logs once it has its state: another start before
        the next line would otherwise not know of this one."""
        return self._lines(self.total())

    def _lines(self, total: Mapping[str, float]) -> dict[str, float]:
        out = {PREFIX + name: seconds for name, seconds in total.items() if seconds}
        return out | ({"perf/restarts": self.restarts} if self.restarts else {})

    def _busy(self) -> tuple[float, float]:
        return self._seconds["data"], self._seconds["step"]

    def _settle(self) -> None:
        now = time.monotonic()
        self._seconds[self.now] += now - self._since
        self._since = self.alive = now


class InputStallAlarm:
    """Detects from the readings of a clock that training waits for its data.

    The alarm rises after READINGS consecutive readings in which at least SHARE of the time, and
    SECONDS in total, were spent waiting, so that neither the first batches nor a short stall raise
    it. It falls at the first reading with less than half of that share.

    Args:
      before: seconds of waiting before the first reading, those of earlier starts of the run."""

    SHARE, READINGS, SECONDS = 0.5, 2, 5.0

    def __init__(self, before: float = 0.0) -> None:
        self.alarm, self._row, self._before = False, 0, before

    def see(self, values: Mapping[str, float]) -> str:
        """Returns the warning to log if the alarm rises with a reading of `GoodputClock.read`, else
        "".

        >>> alarm = InputStallAlarm()
        >>> readings = (0.9, 4.0), (0.8, 8.0), (0.9, 12.0), (0.1, 12.1), (0.9, 16.0), (0.9, 22.0)
        >>> warnings = [
        ...     alarm.see({"perf/input_wait": share, "perf/seconds/data": seconds})
        ...     for share, seconds in readings
        ... ]
        >>> [bool(text) for text in warnings]
        [False, True, False, False, False, True]
        >>> print(warnings[1][:58])
        training waits for data: 80% of the last reading's time, 8
        """
        share, total = values["perf/input_wait"], values.get(f"{PREFIX}data", 0.0)
        if share < self.SHARE:
            self._row, self._before = 0, total
        else:
            self._row += 1
        before, waited = self.alarm, total - self._before
        enough = self._row >= self.READINGS and waited >= self.SECONDS
        self.alarm = enough or (self.alarm and share >= self.SHARE / 2)
        if before or not self.alarm:
            return ""
        return (
            f"training waits for data: {share:.0%} of the last reading's time, {waited:,.1f} s"
            " since it began; raise data.threads or data.workers, use a faster disk, or smaller"
            " images in ArrayRecord shards (--mode=convert)"
        )


def resumed_seconds(saved: Mapping[str, float], logged: Mapping[str, float]) -> dict[str, float]:
    """Returns seconds by phase of a resumed run.

    Args:
      saved: those at its checkpoint.
      logged: those of the last line of its log, which may be later; the steps in between are
        trained again, and so count as lost.

    >>> resumed_seconds({"step": 60.0, "save": 1.0}, {"step": 90.0, "data": 2.0, "save": 3.0})
    {'step': 60.0, 'save': 3.0, 'data': 0.0, 'lost': 32.0}
    """
    out = {name: max(saved.get(name, 0.0), logged.get(name, 0.0)) for name in {**saved, **logged}}
    for name in ("data", "step"):
        if again := out.get(name, 0.0) - saved.get(name, 0.0):
            out[name] -= again
            out["lost"] = out.get("lost", 0.0) + again
    return out
