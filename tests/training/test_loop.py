"""The order of a step, recorded with a trainer and callbacks in plain Python."""

import dataclasses
import signal
import threading
from typing import Any

import jax
import numpy as np
import pytest

from m3i_jax import parallel, schema
from m3i_jax.objective import losses, posteriors, registry, terms
from m3i_jax.training import goodput, loop, trainer
from m3i_jax.training.targets import MOMENT
from tests import toy

BATCH = 8


@dataclasses.dataclass(frozen=True)
class State:
    step: int


class Metric:
    """A number on a device; fetching it is an event."""

    def __init__(self, value: float, fetched: Any = None):
        self.value, self.fetched = value, fetched

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        if self.fetched:
            self.fetched()
        return np.asarray(self.value, dtype)


class World:
    """Trainer, data, checkpoints, writers and evaluators; `events` has their calls in order."""

    def __init__(
        self,
        steps: int,
        *,
        bad: set[int] = frozenset(),
        moment: bool = False,
        spread: Any = None,
        **train: int,
    ):
        settings = {"save_every": 100, "eval_every": 100, "panel_every": 0, "log_every": 1} | train
        self.config = schema.Config(train=schema.Train(batch_size=BATCH, steps=steps, **settings))
        self.length, self.mesh = dataclasses.make_dataclass("Length", ["steps"])(steps), None
        self.bad, self.moment, self.spread = bad, moment, spread
        self.events: list[str] = []
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.logged: list[str] = []
        self.positions: dict[int, Any] = {}
        self.at: dict[str, Any] = {}  # event -> what else happens then
        self.again: dict[int, bool] = {}  # batches drawn -> a save that failed before is due again

    def note(self, event: str) -> None:
        self.events.append(event)
        if event in self.at:
            self.at[event]()

    # the trainer
    def step(self, state: State, batch: dict) -> tuple[State, dict[str, Any]]:
        k = state.step + 1
        self.note(f"dispatch {k}")
        loss = float("nan") if k in self.bad else 1.0 / k
        metrics = {
            "loss": Metric(loss, lambda: self.note(f"fetch {k}")),
            "skipped/not_finite": Metric(float(k in self.bad)),
        }
        if self.bad:
            metrics["skipped/steps"] = Metric(float(sum(j <= k for j in self.bad)))
        if self.spread:
            metrics["collapse/spread"] = Metric(self.spread(k))
        return State(k), metrics | ({MOMENT: np.eye(4)} if self.moment else {})

    def scheduled(self, step: int) -> dict[str, float]:
        return {"lr": 0.1 * (step - 1), "ema": 0.9 + 0.01 * step}

    # the data
    def __next__(self) -> dict:
        self.note("draw")
        return {}

    def counted(self) -> dict[str, float]:
        return {"data/drawn": self.events.count("draw")}

    # the checkpoints
    def save(self, step: int, state: State, position: Any) -> None:
        assert state.step == step
        self.note(f"save {step}")
        self.positions[step] = position

    def wait(self, state: State) -> None:
        self.note("wait")

    def retry(self) -> bool:
        return self.again.pop(self.events.count("draw"), False)

    # the sinks
    def write(self, step: int, values: dict[str, float]) -> None:
        self.note(f"write {'eval ' if any(k.startswith('eval/') for k in values) else ''}{step}")
        self.lines.append((step, values))

    def evaluator(self, state: State, poll: loop.Poll):
        self.note(f"evaluate {state.step}")
        poll()
        yield "eval/knn/top1", 0.5

    def run(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        first: int = 0,
        samples: int | None = None,
        **changes: Any,
    ) -> int:
        before = loop.Preemption.poll
        monkeypatch.setattr(loop.parallel, "to_global", lambda mesh, batch: batch)
        monkeypatch.setattr(
            loop.Preemption, "poll", lambda notice: (self.note("poll"), before(notice))[1]
        )
        outside = {
            "data": self,
            "checkpoints": self,
            "write": self.write,
            "log": self.logged.append,
            "panel": lambda step, state, batch: self.note(f"panel {step}"),
            "evaluators": [self.evaluator],
            "position": lambda samples: {"samples_seen": samples},
            "clock": goodput.GoodputClock(images=BATCH),
        }
        samples = first * BATCH if samples is None else samples
        code, state = loop.run_loop(
            self, State(first), samples_seen=samples, callbacks=loop.Callbacks(**outside | changes)
        )  # type: ignore[arg-type]
        self.final = state.step
        return code

    def of(self, *kinds: str) -> list[str]:
        return [e for e in self.events if e.startswith(kinds)]


def test_the_law_of_order(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(4, save_every=2, eval_every=2)
    assert world.run(monkeypatch) == loop.DONE == 0
    assert world.events == [
        *("evaluate 0", "poll", "write eval 0", "draw", "dispatch 1", "poll"),
        *("draw", "dispatch 2", "fetch 1", "write 1", "poll"),
        # what is saved has its line in the log first
        *(
            "fetch 2",
            "write 2",
            "evaluate 2",
            "poll",
            "write eval 2",
            "save 2",
            "draw",
            "dispatch 3",
            "poll",
        ),
        *("draw", "dispatch 4", "fetch 3", "write 3", "poll"),
        *("fetch 4", "write 4", "evaluate 4", "poll", "write eval 4", "save 4", "wait"),
    ]
    assert world.final == 4


def test_the_saved_position_is_that_of_the_first_sample_not_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(6, save_every=2)
    world.run(monkeypatch, first=1, samples=1000)
    assert world.positions == {
        2: {"samples_seen": 1008},
        4: {"samples_seen": 1024},
        6: {"samples_seen": 1040},
    }
    assert [(step, v["samples_seen"]) for step, v in world.lines if "loss" in v] == [
        (k, 1000 + 8 * (k - 1)) for k in range(2, 7)
    ]


def test_the_host_never_waits_for_the_step_it_just_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(6)
    world.run(monkeypatch)
    for k in range(1, 6):
        assert world.events.index(f"fetch {k}") > world.events.index(f"dispatch {k + 1}")


def test_lines_come_at_log_every_at_the_first_and_at_the_last_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(11, log_every=4)
    world.run(monkeypatch, evaluators=[])
    assert [step for step, _ in world.lines] == [1, 4, 8, 11]
    line = world.lines[-1][1]
    assert line["loss"] == 1 / 11 and line["samples_seen"] == 88
    # the rate that the 11th update used: a schedule counts from 0
    assert line["lr"] == pytest.approx(0.1 * 10)
    # the momentum of the 11th update: the target counts from 1
    assert line["ema"] == pytest.approx(0.9 + 0.11)
    assert [values["data/drawn"] for _, values in world.lines] == [
        1,
        4,
        8,
        11,
    ]  # what the step itself has consumed, though one more is drawn
    assert line["perf/images_per_sec"] > 0 and 0 <= line["perf/input_wait"] <= 1
    assert "evaluate 0" not in world.events


def test_the_last_line_is_written_though_no_step_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(3, log_every=50, save_every=50, eval_every=0)
    world.run(monkeypatch)
    assert world.of("write") == ["write eval 0", "write 1", "write 3", "write eval 3"]
    assert world.of("save") == ["save 3"]


def test_a_matrix_is_written_as_its_effective_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(2, moment=True)
    world.run(monkeypatch, evaluators=[])
    assert [values["collapse/effective_rank"] for _, values in world.lines] == pytest.approx(
        [4.0, 4.0], rel=1e-5
    )
    assert all(MOMENT not in values for _, values in world.lines)


def test_panels_show_a_batch_before_it_is_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(5, panel_every=2)
    world.run(monkeypatch, evaluators=[])
    assert world.of("panel", "draw", "dispatch") == [
        *("draw", "panel 0", "dispatch 1", "draw", "dispatch 2"),
        *("draw", "panel 2", "dispatch 3", "draw", "dispatch 4"),
        *("draw", "panel 4", "dispatch 5"),
    ]


@pytest.mark.parametrize("done", [{2}, {0, 2}])
def test_a_resumed_run_does_not_evaluate_twice(
    monkeypatch: pytest.MonkeyPatch, done: set[int]
) -> None:
    world = World(4, save_every=2, eval_every=2)
    assert world.run(monkeypatch, first=2, evaluated=frozenset(done)) == 0
    assert world.of("evaluate", "save", "dispatch") == [
        "dispatch 3",
        "dispatch 4",
        "evaluate 4",
        "save 4",
    ]


def test_a_resumed_run_evaluates_what_the_log_lacks_and_saves_nothing_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(4, save_every=2, eval_every=2)
    world.run(monkeypatch, first=2)
    assert world.of("evaluate", "save", "dispatch") == [
        "evaluate 2",
        "dispatch 3",
        "dispatch 4",
        "evaluate 4",
        "save 4",
    ]


def test_a_finished_run_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(4)
    assert world.run(monkeypatch, first=4, evaluated=frozenset({0, 4})) == 0
    assert world.events == ["wait"]


def test_every_evaluator_of_a_step_shares_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1)
    world.run(
        monkeypatch,
        evaluators=[world.evaluator, lambda state, poll: iter([("eval/other", 2.0 + state.step)])],
    )
    evaluations = [(step, values) for step, values in world.lines if "loss" not in values]
    assert evaluations == [
        (step, {"eval/knn/top1": 0.5, "eval/other": 2.0 + step}) for step in (0, 1)
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.row("A2", "A4")
def test_preemption_in_the_loop_saves_and_returns_42(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    world = World(9, eval_every=0)
    world.at["dispatch 3"] = lambda: signal.raise_signal(number)
    assert world.run(monkeypatch) == loop.PREEMPTED == 42
    # the notice is polled after the step, whose line is still written
    assert world.events[-8:] == [
        "dispatch 3",
        "fetch 2",
        "write 2",
        "poll",
        "fetch 3",
        "write 3",
        "save 3",
        "wait",
    ]
    assert world.positions == {3: {"samples_seen": 24}} and world.final == 3
    assert len(world.logged) == 1 and "preempted: saved step 3" in world.logged[0]
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.row("A2")
def test_preemption_inside_an_evaluator_saves_and_returns_42(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(9, eval_every=2)
    world.at["evaluate 4"] = lambda: signal.raise_signal(signal.SIGTERM)
    assert world.run(monkeypatch) == 42
    # no half evaluation in the log
    assert world.events[-5:] == ["write 4", "evaluate 4", "poll", "save 4", "wait"]
    assert world.positions == {4: {"samples_seen": 32}}


@pytest.mark.row("A4")
def test_a_second_interrupt_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    world = World(9)
    world.at["dispatch 3"] = lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt):
        world.run(monkeypatch)
    assert not world.positions and signal.getsignal(signal.SIGINT) == before


@pytest.mark.row("D1")
def test_three_steps_in_a_row_that_are_not_finite_stop_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(20, bad={4, 5, 6, 7, 8}, save_every=3, log_every=50)
    assert world.run(monkeypatch) == loop.FAILED == 1
    # the state for step 6 is checked before it is saved
    assert world.final == 6 and list(world.positions) == [3]
    # written whatever log_every is
    assert [step for step, values in world.lines if "loss" in values] == [1, 4, 5, 6]
    assert len(world.logged) == 1 and "not finite" in world.logged[0]


def test_three_at_the_very_end_are_not_saved_as_done(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(6, bad={4, 5, 6})
    assert world.run(monkeypatch) == 1
    assert not world.positions


def test_a_finite_step_fetched_with_the_third_does_not_undo_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(20, bad={4, 5, 6}, save_every=7)
    assert world.run(monkeypatch) == 1
    assert not world.positions


def test_two_and_then_finite_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(12, bad={2, 3, 5, 6, 8, 9, 11, 12}, log_every=50)
    assert world.run(monkeypatch) == 0
    bad = [(step, values) for step, values in world.lines if values.get("skipped/not_finite")]
    assert [step for step, _ in bad] == [2, 3, 5, 6, 8, 9, 11, 12]
    # schedules count the steps that were taken
    rates = [0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3]
    assert [values["lr"] for _, values in bad] == pytest.approx(rates)


def test_a_collapse_is_logged_once_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(40, spread=lambda k: 0.7 if k < 11 else 0.001, log_every=10)
    assert world.run(monkeypatch, evaluators=[]) == loop.DONE
    assert (
        len(world.logged) == 1
        and "collapsed at step 15" in world.logged[0]
        and "objective.second_moment" in world.logged[0]
    )
    alarms = [(step, values["collapse/alarm"]) for step, values in world.lines]
    assert alarms == [(1, 0.0), (10, 0.0), (15, 1.0), (20, 1.0), (30, 1.0), (40, 1.0)]


def test_without_monitors_there_is_no_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(3)
    world.run(monkeypatch, evaluators=[])
    assert all("collapse/alarm" not in values for _, values in world.lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pull(posteriors.Gaussian):
    """A Gaussian posterior with a gradient through its target, so that all features may become
    equal."""

    grad_through_target = True

    def cost(
        self, prediction: Any, target: Any, where: Any, given: posteriors.LossInputs
    ) -> posteriors.LossSum:
        made = super().cost(
            prediction, target, where, dataclasses.replace(given, moment_weight=0.0)
        )
        other = losses.gaussian(
            target.reshape(-1, target.shape[-1]),
            prediction.reshape(-1, target.shape[-1]),
            where.reshape(-1),
        )[0]
        # its value once, the gradient of both sides
        return made._replace(sum=made.sum + other - jax.lax.stop_gradient(other))


class _Data:
    def __init__(self, batches: Any):
        self._batches = iter(batches)

    def __next__(self) -> Any:
        return next(self._batches)

    def counted(self) -> dict[str, float]:
        return {}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["collapsing", "sim"])
@pytest.mark.row("D4")
def test_a_forced_collapse_warns_within_100_steps_and_a_healthy_run_does_not(
    monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Real steps at toy size. The collapse is measured on the features of the encoder, as the
    target of a second term."""
    pulled = terms.token_term(terms.FULL, 1, encoder="online", posterior=Pull())
    watched = terms.token_term(terms.FULL, 0, encoder="shared", posterior=posteriors.Gaussian())
    registry.register_form("collapsing", (pulled, watched))
    settings = {
        "objective__forms": form,
        "objective__second_moment": 0.0,
        "train__steps": 60,
        "optim__lr": 0.01,
        "train__log_every": 10,
    }
    config = toy.settings(**settings)
    made = trainer.Trainer(config, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), toy.VOCABULARY)
    logged, lines, world = [], [], World(0)
    outside = loop.Callbacks(
        data=_Data(toy.batch(config, k) for k in range(60)),
        checkpoints=world,
        write=lambda step, values: lines.append((step, values)),
        log=logged.append,
        panel=lambda *_: None,
        evaluators=[],
        position=lambda samples: {},
    )
    monkeypatch.setattr(world, "save", lambda *_: None)
    loop.run_loop(made, made.init(), samples_seen=0, callbacks=outside)
    if form == "collapsing":
        assert len(logged) == 1 and "the targets collapsed" in logged[0]
        first = next(step for step, values in lines if values["collapse/alarm"])
        assert (
            first <= 60
            and lines[-1][1]["collapse/effective_rank"]
            < 1.5
            < 4
            < lines[0][1]["collapse/effective_rank"]
        )
    else:
        assert not logged and all(values["collapse/alarm"] == 0 for _, values in lines)


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    seen = []

    def work() -> None:
        with loop.Preemption() as notice:
            notice.poll()
            seen.append(notice.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_every_line_has_the_speed_of_the_steps_that_were_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Metrics are ready two seconds after a step; lines before a save are written one step earlier
    than others."""
    now = [100.0]
    monkeypatch.setattr(goodput.time, "monotonic", lambda: now[0])
    world = World(6, save_every=3)
    world.at = {f"fetch {k}": lambda: now.__setitem__(0, now[0] + 2.0) for k in range(1, 7)}
    world.run(monkeypatch, evaluators=[])
    assert [values["perf/images_per_sec"] for _, values in world.lines] == [BATCH / 2.0] * 6
    assert [values["perf/step_seconds"] for _, values in world.lines] == [2.0] * 6
