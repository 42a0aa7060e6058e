"""The law of order of a run. At every step, and in this order:

    evaluate -> save -> draw data -> dispatch -> fetch the previous metrics -> write -> poll
    preemption

Evaluators see the state that is saved, the saved position is that of the first sample not yet
drawn, and the device works while the host fetches, writes and draws. Nothing is jitted here."""

import contextlib
import dataclasses
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from m3i_jax import parallel
from m3i_jax.objective import collapse
from m3i_jax.training.checkpoint import Checkpoints, SavesFailed
from m3i_jax.training.goodput import GoodputClock, InputStallAlarm
from m3i_jax.training.state import State
from m3i_jax.training.step import MOMENT, MOST_NOT_FINITE
from m3i_jax.training.trainer import Trainer

DONE, FAILED, PREEMPTED = 0, 1, 42

Poll = Callable[[], None]
Evaluator = Callable[[State, Poll], Iterator[tuple[str, float]]]


class Preempted(Exception):
    """Raised by a poll inside an evaluator, so that a long evaluation does not eat the notice."""


class CallbackError(Exception):
    """What the loop asked for outside itself did not come; the state is that of the last step, and
    as good as any."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@contextlib.contextmanager
def _calling() -> Iterator[None]:
    try:
        yield
    except Preempted:
        raise
    except Exception as error:
        raise CallbackError(error) from error


class Preemption:
    """Turns SIGTERM and SIGINT into a flag that the loop polls; a second SIGINT interrupts at once.
    Of several hosts, all stop at the same poll, whichever was told."""

    def __init__(self) -> None:
        self.asked = False
        self._together = parallel.CoordinatedStop(lambda: self.asked)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        self._together.open()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._together.close(failed=kind is not None)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def poll(self) -> None:
        if self._together.poll():
            raise Preempted


@dataclasses.dataclass(kw_only=True)
class Callbacks:
    """What the loop talks to; made by the mode, so that the loop imports no sink, no evaluator and
    no image."""

    data: Any  # iterator of host batches; `.counted()`: metrics of those that were consumed
    checkpoints: Checkpoints
    write: Callable[[int, dict[str, float]], None]
    say: Callable[[str], None]
    panel: Callable[[int, State, dict[str, Any]], None]
    evaluators: list[Evaluator]
    position: Callable[[int], dict[str, Any]]  # samples seen -> what is saved beside the state
    # of a step that ended the run
    dump: Callable[[int, State, Any, Mapping[str, float]], None] = (
        lambda step, state, batch, values: None
    )
    evaluated: frozenset[int] = frozenset()  # steps whose evaluation a resumed log already has
    clock: GoodputClock = dataclasses.field(default_factory=GoodputClock)
    # called with every step sent and its metrics, which may not be there yet
    sent: Callable[[int, Any], None] = lambda step, metrics: None


class CollapseAlarm:
    """Notices when all targets become the same, from the monitors of objective/collapse.py,
    whatever the size of the features.

    Collapsed is a step whose spread is below LEAST (targets are all but one vector), or whose
    deviation or uniformity is below LEAST of the largest so far. `alarm` rises after PATIENCE such
    steps in a row, and falls again with the first that has twice as much."""

    LEAST, PATIENCE = 0.02, 5

    def __init__(self) -> None:
        self.alarm, self._row = False, 0
        self._largest: dict[str, float] = {}

    def see(self, values: Mapping[str, float]) -> bool:
        """Look at the metrics of a step; True if the alarm rises with it. What is not there, or not
        finite, is not judged.

        >>> watch = CollapseAlarm()
        >>> [watch.see({"collapse/spread": spread}) for spread in (0.6, *[0.01] * 6)]
        [False, False, False, False, False, True, False]
        """
        shares = [values["collapse/spread"]] if "collapse/spread" in values else []
        for name in (
            name
            for name in values
            if name.startswith(("collapse/target_std", "collapse/uniformity"))
        ):
            if math.isfinite(size := abs(values[name])):
                largest = self._largest[name] = max(size, self._largest.get(name, 0.0))
                shares.append(size / largest if largest else 1.0)  # 0 from the start says nothing
        least = min(filter(math.isfinite, shares), default=1.0)
        self._row = self._row + 1 if least < self.LEAST else 0
        before, self.alarm = (
            self.alarm,
            self._row >= self.PATIENCE or (self.alarm and least < 2 * self.LEAST),
        )
        return self.alarm and not before


COLLAPSED = (
    "warning: the targets have collapsed at step {step}: all are nearly the same ({monitors}), and"
    " the loss says nothing any more; go back to a checkpoint from before, and use a target encoder"
    " without gradient (objective.target_encoder=ema), a larger objective.second_moment, a larger"
    " optim.ema or a smaller optim.lr"
)


class _Log:
    """Metrics one step behind, so that fetching them never stalls the device."""

    def __init__(self, trainer: Trainer, outside: Callbacks):
        self.trainer, self.outside, self.clock, self.bad, self.failed = (
            trainer,
            outside,
            outside.clock,
            0,
            False,
        )
        self.collapse, self.starving = CollapseAlarm(), InputStallAlarm()
        self.last: dict[str, float] = {}  # metrics of the newest step that was fetched
        self._pending: tuple[int, dict[str, float], dict[str, jax.Array]] | None = None

    def push(self, step: int, samples_seen: int, metrics: dict[str, jax.Array]) -> None:
        self.flush()
        self._pending = step, {"samples_seen": samples_seen, **self.outside.data.counted()}, metrics

    def flush(self) -> None:
        """Fetch what is pending; write it if it is its turn."""
        if self._pending is None:
            return
        (step, consumed, metrics), self._pending = self._pending, None
        trainer, config = self.trainer, self.trainer.config
        moment = metrics.pop(MOMENT, None)
        values = self.last = {k: float(v) for k, v in jax.device_get(metrics).items()}
        # counted when it is done, not when it is sent: a line that is fetched early has its own
        # step
        self.clock.step_ended()
        self.bad = self.bad + 1 if values["skipped/not_finite"] else 0
        # a finite step that is fetched together with the third does not undo it
        self.failed |= self.bad >= MOST_NOT_FINITE
        monitors = {
            k.removeprefix("collapse/"): v for k, v in values.items() if k.startswith("collapse/")
        }
        rises = self.collapse.see(values)
        if rises:
            self.outside.say(
                COLLAPSED.format(
                    step=step, monitors=", ".join(f"{k} {v:.3g}" for k, v in monitors.items())
                )
            )
        if (
            step % config.train.log_every == 0
            or step in (1, trainer.length.steps)
            or self.bad
            or rises
        ):
            values |= {
                **consumed,
                "lr": float(trainer.learning_rate(step - 1)),
                "ema": trainer.momentum(step),
            }
            if monitors:
                values["collapse/alarm"] = float(self.collapse.alarm)
            if moment is not None:
                values["collapse/effective_rank"] = float(
                    collapse.effective_rank(jax.device_get(moment))
                )
            values |= self.clock.read()
            if waits := self.starving.see(values):
                self.outside.say(f"warning: {waits}")
            self.outside.write(step, values)


def run_loop(
    trainer: Trainer, state: State, *, samples_seen: int, outside: Callbacks
) -> tuple[int, State]:
    """Train from `state` to the end, or to a preemption notice.

    Returns: (exit code, final state): 0 done, 42 preempted and saved, 1 after three steps in a row
      that were not finite.

    Raises: SavesFailed: three saves in a row failed. Exception: what the data or an evaluator
      raised, after the state was saved. Of several hosts nothing is saved then: the others are on
      their way to the next step, and a save needs all.
    """
    config, total, log = trainer.config, trainer.length.steps, _Log(trainer, outside)
    train, first = config.train, int(state.step)
    host: Any = None  # the newest batch
    with Preemption() as notice, log.clock.phase("step"):
        try:
            for step in range(first, total + 1):
                evaluate = (
                    step in (0, total) or bool(train.eval_every and step % train.eval_every == 0)
                ) and step not in outside.evaluated
                save = step > first and (
                    step == total or step % train.save_every == 0 or outside.checkpoints.retry()
                )
                if evaluate or save:  # what is saved or evaluated has its line in the log first
                    log.flush()
                if log.failed:
                    outside.say(
                        f"stopped at step {step}: {MOST_NOT_FINITE} steps in a row were not finite;"
                        " no checkpoint has their updates"
                    )
                    outside.dump(step, state, host, log.last)
                    return FAILED, state
                if evaluate:
                    with log.clock.phase("evaluate"), _calling():
                        _evaluate(state, step, outside, notice)
                if save:
                    with log.clock.phase("save"):
                        outside.checkpoints.save(step, state, outside.position(samples_seen))
                if step == total:
                    break
                with log.clock.phase("data"), _calling():
                    host = next(outside.data)
                if train.panel_every and step % train.panel_every == 0:
                    with log.clock.phase("panel"):
                        outside.panel(step, state, host)
                state, metrics = trainer.step(state, parallel.to_global(trainer.mesh, host))
                samples_seen += train.batch_size
                log.push(step + 1, samples_seen, metrics)
                outside.sent(step + 1, metrics)
                # look at each step before the next is sent, so that a third is dumped with the
                # state that it had
                if log.bad:
                    log.flush()
                notice.poll()
        except (Preempted, CallbackError) as end:
            log.flush()
            now = int(state.step)
            if isinstance(end, Preempted) or (now > first and parallel.host_names() == 1):
                with log.clock.phase("save"):
                    _save_last(outside, now, state, samples_seen, end)
            if isinstance(end, CallbackError):
                raise end.error from None
            outside.say(f"preempted: saved step {now}; run the same command again to go on")
            return PREEMPTED, state
    with log.clock.phase("save"):
        outside.checkpoints.wait(state)
    return DONE, state


def _save_last(
    outside: Callbacks, step: int, state: State, samples_seen: int, end: Exception
) -> None:
    """The save of a run that ends before its time."""
    try:
        outside.checkpoints.save(step, state, outside.position(samples_seen))
        outside.checkpoints.wait(state)
    except SavesFailed as failed:
        if isinstance(end, Preempted):
            raise
        outside.say(f"warning: {failed}")  # why the run ends is what it ends with
    else:
        if isinstance(end, CallbackError):
            outside.say(
                f"saved step {step}, since the run cannot go on; the same command goes on from"
                " there"
            )


def _evaluate(state: State, step: int, outside: Callbacks, notice: Preemption) -> None:
    def poll() -> None:
        outside.clock.beat()
        notice.poll()

    values = {
        name: value for evaluator in outside.evaluators for name, value in evaluator(state, poll)
    }
    if values:
        outside.write(step, values)
