"""The training loop. At every step, in this order:

    evaluate -> save -> draw data -> dispatch -> fetch the previous metrics -> write -> poll
    preemption

Evaluators get the state that is saved, the saved position is that of the next sample, and the
device computes while the host fetches, writes and draws. Nothing is jitted here."""

import contextlib
import dataclasses
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from m3i_jax import interrupts, parallel
from m3i_jax.objective import collapse
from m3i_jax.training.checkpoint import Checkpoints, SavesFailed
from m3i_jax.training.goodput import GoodputClock, InputStallAlarm
from m3i_jax.training.step import MOST_NOT_FINITE
from m3i_jax.training.targets import MOMENT
from m3i_jax.training.task import State
from m3i_jax.training.trainer import Trainer

DONE, FAILED, PREEMPTED = 0, 1, 42

Poll = Callable[[], None]
Evaluator = Callable[[State, Poll], Iterator[tuple[str, float]]]


class Preempted(Exception):
    """Raised by a poll, also inside an evaluator, so that a long evaluation can be preempted."""


class CallbackError(Exception):
    """A callback raised an error; the state is that of the last step, and can be saved."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@contextlib.contextmanager
def _wrap_errors() -> Iterator[None]:
    try:
        yield
    except Preempted:
        raise
    except Exception as error:
        raise CallbackError(error) from error


class Preemption:
    """Turns SIGTERM and SIGINT into a flag that the loop polls; a second SIGINT interrupts at once.
    All hosts stop at the same poll, whichever of them got the signal. Where SIGTERM ends the
    process (interrupts.py), it does so until `arm` is called: the first step is compiled for
    minutes, and before it there is nothing to save."""

    def __init__(self) -> None:
        self.requested = False
        self._stop = parallel.CoordinatedStop(lambda: self.requested)
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            self._handlers = {signal.SIGINT: signal.signal(signal.SIGINT, self._request)}
            if not interrupts.exits_on_sigterm():
                self.arm()
        self._stop.open()
        return self

    def arm(self) -> None:
        """From here on SIGTERM is polled for as well."""
        if self._handlers and signal.SIGTERM not in self._handlers:
            self._handlers[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._request)

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop.close(failed=kind is not None)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    @property
    def noticed(self) -> bool:
        """After the block: whether a signal came, on any host, also one after the last poll."""
        return self._stop.noticed

    def poll(self) -> None:
        if self._stop.poll():
            raise Preempted


class CollapseAlarm:
    """Detects that all targets become equal, from the monitors of objective/collapse.py, at any
    scale of the features.

    A step counts as collapsed if its spread is below THRESHOLD (nearly all targets are one vector),
    or its deviation, uniformity or information of assignments (marginal_bits - assignment_bits:
    all images go to one prototype, or each to all) is below THRESHOLD times the largest so far.
    `alarm` is set after
    PATIENCE such steps in a row, and reset by the first step above twice the threshold."""

    THRESHOLD, PATIENCE = 0.02, 5

    def __init__(self, saved: Mapping[str, Any] | None = None) -> None:
        self.alarm, self._in_row = False, 0
        self._largest: dict[str, float] = {}
        if saved:
            self.alarm, self._in_row = bool(saved["alarm"]), int(saved["in_row"])
            self._largest = {name: float(value) for name, value in saved["largest"].items()}

    def saved(self) -> dict[str, Any]:
        """Returns what a later run goes on from: without it, a run that resumes after a collapse
        would take the collapsed values for its largest.

        >>> alarm = CollapseAlarm({"alarm": True, "in_row": 5, "largest": {}})
        >>> alarm.update({"collapse/spread": 0.01}), alarm.alarm
        (False, True)
        """
        return {"alarm": self.alarm, "in_row": self._in_row, "largest": self._largest}

    def update(self, values: Mapping[str, float]) -> bool:
        """Add the metrics of a step; True if it sets the alarm. Metrics that are absent or not
        finite are ignored.

        >>> alarm = CollapseAlarm()
        >>> [alarm.update({"collapse/spread": spread}) for spread in (0.6, *[0.01] * 6)]
        [False, False, False, False, False, True, False]
        """
        shares = [values["collapse/spread"]] if "collapse/spread" in values else []
        for name, value in values.items():
            if name.startswith("collapse/marginal_bits"):
                value -= values[name.replace("marginal", "assignment")]
            elif not name.startswith(("collapse/target_std", "collapse/uniformity")):
                continue
            if math.isfinite(size := abs(value)):
                largest = self._largest[name] = max(size, self._largest.get(name, 0.0))
                shares.append(size / largest if largest else 1.0)  # 0 from the start
        least = min(filter(math.isfinite, shares), default=1.0)
        self._in_row = self._in_row + 1 if least < self.THRESHOLD else 0
        before, self.alarm = (
            self.alarm,
            self._in_row >= self.PATIENCE or (self.alarm and least < 2 * self.THRESHOLD),
        )
        return self.alarm and not before


COLLAPSED = (
    "warning: the targets collapsed at step {step}: all are nearly equal ({monitors}), and the loss"
    " has no meaning any more; go back to an earlier checkpoint, and use a target encoder"
    " without gradient (objective.target_encoder=ema), a larger objective.second_moment (of"
    " prototypes: another objective.prototype_targets), a larger optim.ema or a smaller optim.lr"
)


@dataclasses.dataclass(kw_only=True)
class Callbacks:
    """The loop's inputs and outputs. The mode creates them, so that the loop imports no writer,
    evaluator or figure."""

    data: Any  # iterator of host batches; `.counted()`: metrics of the consumed ones
    checkpoints: Checkpoints
    write: Callable[[int, dict[str, float]], None]
    log: Callable[[str], None]
    panel: Callable[[int, State, dict[str, Any]], None]
    evaluators: list[Evaluator]
    position: Callable[[int], dict[str, Any]]  # samples seen -> JSON saved with the state
    # called with the step that ended the run
    dump: Callable[[int, State, Any, Mapping[str, float]], None] = (
        lambda step, state, batch, values: None
    )
    evaluated: frozenset[int] = frozenset()  # steps whose evaluation a resumed log already has
    clock: GoodputClock = dataclasses.field(default_factory=GoodputClock)
    collapse: CollapseAlarm = dataclasses.field(default_factory=CollapseAlarm)
    # called after each dispatched step with its metrics, which may still be computing
    on_step: Callable[[int, Any], None] = lambda step, metrics: None
    # called with a function that the data are to call while a batch is late: it raises Preempted
    # after a signal
    while_waiting: Callable[[Poll], None] = lambda poll: None
    # called at the end of a run, finished or failed, if a signal came after its last poll
    on_late_notice: Callable[[], None] = lambda: None


def equal_weights(values: Mapping[str, float]) -> dict[str, float]:
    """loss/equal_weights, the sum of the losses of both groups with weight 1, where the loss of a
    step weighs the second by lambda. `loss` moves with lambda, and falls by a factor when lambda
    takes its first value after `objective.gamma`; this does not.

    >>> equal_weights({"loss": 9.5, "loss/ssp": 2.0, "loss/sp": 2.5, "balance/lambda": 3.0})
    {'loss/equal_weights': 4.5}
    >>> equal_weights({"loss": 2.0, "loss/ssp": 2.0, "balance/lambda": 3.0})
    {}
    """
    if not {"loss/ssp", "loss/sp", "balance/lambda"} <= values.keys():
        return {}
    return {"loss/equal_weights": values["loss/ssp"] + values["loss/sp"]}


def _is_computed(metrics: Mapping[str, Any]) -> bool:
    # bool() is False: of a value that does not say so, it is not known
    return all(getattr(each, "is_ready", bool)() for each in metrics.values())


class _MetricsLog:
    """Fetches and writes metrics one step late, so that the device never waits for it."""

    def __init__(self, trainer: Trainer, callbacks: Callbacks):
        self.trainer, self.callbacks, self.clock = trainer, callbacks, callbacks.clock
        self.bad, self.failed = 0, False  # steps in a row that were not finite; too many
        self.collapse = callbacks.collapse
        self.stalls = InputStallAlarm(self.clock.total()["data"])
        self.last: dict[str, float] = {}  # metrics of the newest fetched step
        self._pending: tuple[int, dict[str, float], dict[str, jax.Array]] | None = None

    def push(self, step: int, samples_seen: int, metrics: dict[str, jax.Array]) -> None:
        self.flush(metrics)
        self._pending = (
            step,
            {"samples_seen": samples_seen, **self.callbacks.data.counted()},
            metrics,
        )

    def flush(self, newer: Mapping[str, Any] | None = None) -> None:
        """Fetch the pending metrics, and write them at the steps that are logged.

        Args:
          newer: metrics of the next step, if it is dispatched; they are not fetched.
        """
        if self._pending is None:
            return
        (step, consumed, metrics), self._pending = self._pending, None
        trainer, config = self.trainer, self.trainer.config
        moment = metrics.pop(MOMENT, None)
        values = self.last = {k: float(v) for k, v in jax.device_get(metrics).items()}
        # counted when the step is done, not dispatched, so that metrics fetched early keep their
        # step
        self.clock.step_ended(ahead=int(newer is not None and _is_computed(newer)))
        self.bad = self.bad + 1 if values["skipped/not_finite"] else 0
        # a finite step that is fetched together with the third bad one does not reset this
        self.failed |= self.bad >= MOST_NOT_FINITE
        monitors = {
            k.removeprefix("collapse/"): v for k, v in values.items() if k.startswith("collapse/")
        }
        collapsed = self.collapse.update(values)
        if collapsed:
            self.callbacks.log(
                COLLAPSED.format(
                    step=step, monitors=", ".join(f"{k} {v:.3g}" for k, v in monitors.items())
                )
            )
        if (
            step % config.train.log_every == 0
            or step in (1, trainer.length.steps)
            or self.bad
            or collapsed
        ):
            measured = self.clock.steps > 0  # else the speed is that of the last line
            # now: what is computed below waits on the device for the next step
            speed = self.clock.read()
            # schedules count the steps that were taken
            taken = max(step - int(values.get("skipped/steps", 0)), 1)
            values |= {**consumed, **trainer.scheduled(taken), **equal_weights(values)}
            if monitors:
                values["collapse/alarm"] = float(self.collapse.alarm)
            if moment is not None:
                values["collapse/effective_rank"] = float(
                    collapse.effective_rank(jax.device_get(moment))
                )
            values |= speed
            if measured and (stall := self.stalls.see(values)):
                self.callbacks.log(f"warning: {stall}")
            self.callbacks.write(step, values)


def run_loop(
    trainer: Trainer, state: State, *, samples_seen: int, callbacks: Callbacks
) -> tuple[int, State]:
    """Train from `state` to the last step, or until preempted.

    Args:
      trainer: with the settings.
      state: to start from.
      samples_seen: position of the data.
      callbacks: inputs and outputs.

    Returns:
      (exit code, final state): 0 done, 42 preempted and saved, 1 after three steps in a row that
      were not finite.

    Raises:
      SavesFailed: three saves in a row failed.
      Exception: the error of the data or an evaluator, after the state was saved. Several hosts do
        not save then: the others continue to the next step, and a save needs all.
    """
    notice, code = Preemption(), FAILED
    try:
        code, state = _take_steps(trainer, state, samples_seen, callbacks, notice)
    finally:  # also of a run whose saves failed: what comes after it must not begin
        if notice.noticed and code != PREEMPTED:
            callbacks.on_late_notice()
    return code, state


def _take_steps(
    trainer: Trainer, state: State, samples_seen: int, callbacks: Callbacks, notice: Preemption
) -> tuple[int, State]:
    """`run_loop`; it enters `notice`."""
    config, total, metrics_log = (
        trainer.config,
        trainer.length.steps,
        _MetricsLog(trainer, callbacks),
    )
    train, first = config.train, int(state.step)
    host: Any = None  # the newest batch
    with notice, metrics_log.clock.phase("step"):
        if parallel.host_names() == 1:  # several hosts poll at the same points of the program
            callbacks.while_waiting(notice.poll)
        try:
            for step in range(first, total + 1):
                evaluate = (
                    step in (0, total) or bool(train.eval_every and step % train.eval_every == 0)
                ) and step not in callbacks.evaluated
                save = step > first and (
                    step == total or step % train.save_every == 0 or callbacks.checkpoints.retry()
                )
                if evaluate or save:  # the log has this state's line before it is used
                    metrics_log.flush()
                if metrics_log.failed:
                    callbacks.log(
                        f"stopped at step {step}: {MOST_NOT_FINITE} steps in a row were not finite;"
                        " no checkpoint has their updates"
                    )
                    callbacks.dump(step, state, host, metrics_log.last)
                    return FAILED, state
                if evaluate:
                    with metrics_log.clock.phase("evaluate"), _wrap_errors():
                        _evaluate(state, step, callbacks, notice)
                if save:
                    with metrics_log.clock.phase("save"):
                        callbacks.checkpoints.save(step, state, callbacks.position(samples_seen))
                if step == total:
                    break
                with metrics_log.clock.phase("data"), _wrap_errors():
                    host = next(callbacks.data)
                if train.panel_every and step % train.panel_every == 0:
                    with metrics_log.clock.phase("panel"):
                        callbacks.panel(step, state, host)
                state, metrics = trainer.step(state, parallel.to_global(trainer.mesh, host))
                notice.arm()
                samples_seen += train.batch_size
                metrics_log.push(step + 1, samples_seen, metrics)
                callbacks.on_step(step + 1, metrics)
                # fetch each step before the next is dispatched, so that the third bad step is
                # dumped with its own state
                if metrics_log.bad:
                    metrics_log.flush()
                notice.poll()
        except (Preempted, CallbackError) as reason:
            metrics_log.flush()
            now = int(state.step)
            if isinstance(reason, Preempted) or (now > first and parallel.host_names() == 1):
                with metrics_log.clock.phase("save"):
                    _save_last(callbacks, now, state, samples_seen, reason)
            if isinstance(reason, CallbackError):
                # with what it was raised from: of a disk that is away, exit code 1
                raise reason.error from reason.error.__cause__
            callbacks.log(f"preempted: saved step {now}; run the same command again to resume")
            return PREEMPTED, state
        # a signal meanwhile does not cost the last checkpoint
        with metrics_log.clock.phase("save"):
            callbacks.checkpoints.wait(state)
    return DONE, state


def _save_last(
    callbacks: Callbacks, step: int, state: State, samples_seen: int, reason: Exception
) -> None:
    """Save the state of a run that ends early."""
    try:
        callbacks.checkpoints.save(step, state, callbacks.position(samples_seen))
        callbacks.checkpoints.wait(state)
    except SavesFailed as failed:
        if isinstance(reason, Preempted):
            raise
        callbacks.log(f"warning: {failed}")  # the run ends with its own error
    else:
        if isinstance(reason, CallbackError):
            callbacks.log(
                f"saved step {step}, since the run cannot continue; the same command resumes from"
                " there"
            )


def _evaluate(state: State, step: int, callbacks: Callbacks, notice: Preemption) -> None:
    def poll() -> None:
        callbacks.clock.beat()
        notice.poll()

    values = {
        name: value for evaluator in callbacks.evaluators for name, value in evaluator(state, poll)
    }
    if values:
        callbacks.write(step, values)
