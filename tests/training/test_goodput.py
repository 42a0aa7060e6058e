"""Seconds by phase: they add up to the wall time, whatever is nested in what, however often a run
was started."""

import threading
import types

import jax
import numpy as np
import pytest

from m3i_jax.training import goodput, loop
from m3i_jax.training.goodput import GoodputClock
from tests.training.test_loop import BATCH, World


class Time:
    """A wall clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(goodput.time, "monotonic", lambda: self.now)

    def __call__(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def pass_(monkeypatch: pytest.MonkeyPatch) -> Time:
    return Time(monkeypatch)


def phase_seconds(clock: GoodputClock) -> dict[str, float]:
    return {name: seconds for name, seconds in clock.total().items() if seconds}


def test_a_phase_inside_another_takes_its_time_out_of_it(pass_: Time) -> None:
    clock = GoodputClock()
    pass_(1)
    with clock.phase("step"):
        pass_(2)
        with clock.phase("evaluate"):
            pass_(4)
            with clock.phase("save"):
                pass_(8)
            pass_(16)
        pass_(32)
    clock.turn("stop")
    pass_(64)
    assert phase_seconds(clock) == {"start": 1, "step": 34, "evaluate": 20, "save": 8, "stop": 64}
    assert sum(clock.total().values()) == pass_.now - 1000


def test_a_phase_that_raises_ends(pass_: Time) -> None:
    clock = GoodputClock()
    with pytest.raises(KeyError), clock.phase("data"):
        pass_(3)
        raise KeyError
    pass_(1)
    assert phase_seconds(clock) == {"data": 3, "start": 1}


def test_compilations_inside_one_another_count_once(pass_: Time) -> None:
    """As JAX reports them: each when it ends, an inner one before the outer one."""
    clock = GoodputClock()
    with clock.phase("step"):
        pass_(1)  # nothing of it
        pass_(2)
        clock.compiled(2)  # an inner trace
        pass_(3)
        clock.compiled(3)  # another
        pass_(1)
        clock.compiled(6)  # the outer one: both, and 1 more
        pass_(4)
        clock.compiled(4)  # the backend, after it
        pass_(5)
    assert phase_seconds(clock) == {"step": 6, "compile": 10}


def test_a_compilation_longer_than_its_phase_leaves_the_sum_alone(pass_: Time) -> None:
    clock = GoodputClock()
    pass_(2)
    with clock.phase("step"):
        pass_(1)
        clock.compiled(2.5)
    assert sum(clock.total().values()) == 3


def test_compilations_of_other_threads_hold_nothing_up(pass_: Time) -> None:
    clock = GoodputClock()
    pass_(5)
    thread = threading.Thread(target=clock.compiled, args=(3.0,))
    thread.start()
    thread.join()
    assert phase_seconds(clock) == {"start": 5}


def test_speed_is_that_of_training_alone(pass_: Time) -> None:
    clock = GoodputClock(images=8, chips=4, flops=6e12, peak=4e12)
    pass_(100)
    with clock.phase("step"):
        with clock.phase("data"):
            pass_(1)
        pass_(3)
        with clock.phase("evaluate"):
            pass_(1000)
        clock.step_ended()
        clock.step_ended()
        seen = clock.read()
        assert {
            name: value for name, value in seen.items() if not name.startswith(goodput.PREFIX)
        } == {
            "perf/images_per_sec": 4.0,
            "perf/images_per_sec_per_chip": 1.0,
            "perf/step_seconds": 2.0,
            "perf/input_wait": 0.25,
            "perf/mfu": 0.75,  # 2 steps of 6 TFLOP in 4 s, of 4 TFLOP/s
        }
        pass_(2)
        clock.step_ended()
        again = clock.read()
    assert again["perf/images_per_sec"] == 4.0 and again["perf/input_wait"] == 0.0
    # these go on adding up
    assert again["perf/seconds/step"] == 5.0 and again["perf/seconds/evaluate"] == 1000.0


def test_no_peak_no_mfu(pass_: Time) -> None:
    clock = GoodputClock(images=8, flops=1e12)
    pass_(1)
    assert "perf/mfu" not in clock.read()


def test_the_line_at_the_end_adds_up_as_printed(pass_: Time) -> None:
    clock = GoodputClock()
    for name in ("step", "compile", "data", "evaluate", "panel", "save"):
        with clock.phase(name):
            pass_(1.04)
    values, line = clock.summary()
    parts = line.partition(" = ")[2].split(" + ")
    total = float(line.partition(": ")[2].partition(" s")[0])
    assert round(sum(float(part.split()[-1]) for part in parts), 1) == total == 6.2
    assert values["perf/goodput"] == pytest.approx(1 / 6) and line.startswith("goodput 16.7%")
    assert (
        values["perf/wall_seconds"]
        == pytest.approx(6.24)
        == sum(v for k, v in values.items() if k.startswith(goodput.PREFIX))
    )


def test_what_a_restart_throws_away_is_lost_and_everything_else_goes_on(pass_: Time) -> None:
    """Killed at step 90 of which 60 are saved: 30 steps are trained again, evaluations and
    compilations are not undone."""
    saved = {"step": 60.0, "data": 1.0, "compile": 7.0}
    logged = {"step": 90.0, "data": 3.0, "compile": 7.0, "evaluate": 5.0}
    earlier = goodput.resumed_seconds(saved, logged)
    assert earlier == {"step": 60.0, "data": 1.0, "compile": 7.0, "evaluate": 5.0, "lost": 32.0}
    assert sum(earlier.values()) == sum(logged.values())
    clock = GoodputClock(earlier=earlier, restarts=1)
    with clock.phase("step"):
        pass_(40)
    values, line = clock.summary()
    assert (
        values["perf/restarts"] == 1
        and values["perf/goodput"] == pytest.approx(100 / 145)
        and line.endswith("; started 2 times")
    )


def test_a_resumed_run_waits_as_long_as_a_new_one_before_it_warns(pass_: Time) -> None:
    """What it waited before the restart does not count after it: two readings of 2 s each are too
    short, and the third makes 6 s."""
    world = World(1)
    clock = GoodputClock(earlier={"data": 100.0})
    callbacks = types.SimpleNamespace(clock=clock, collapse=loop.CollapseAlarm())
    stalls = loop._MetricsLog(world, callbacks).stalls
    warned = []
    for _ in range(3):
        with clock.phase("data"):
            pass_(2)
        clock.step_ended()
        warned.append(stalls.see(clock.read()))
    assert warned[:2] == ["", ""] and "100% of the last reading's time, 6.0 s" in warned[2]


def test_a_log_older_than_the_checkpoint_takes_nothing_away() -> None:
    assert goodput.resumed_seconds({"step": 60.0}, {"step": 50.0, "save": 1.0}) == {
        "step": 60.0,
        "save": 1.0,
    }
    assert goodput.resumed_seconds({}, {}) == {}


def test_the_phases_of_a_run_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the loop does for a second is in its phase, and nothing twice."""
    now = [100.0]
    monkeypatch.setattr(goodput.time, "monotonic", lambda: now[0])
    world = World(4, save_every=2, eval_every=2, panel_every=3)
    events = (
        "evaluate 0",
        "evaluate 2",
        "evaluate 4",
        "save 2",
        "save 4",
        "wait",
        "draw",
        "panel 3",
        "fetch 1",
        "fetch 2",
        "fetch 3",
    )
    world.at = {event: lambda: now.__setitem__(0, now[0] + 1.0) for event in events}
    clock = goodput.GoodputClock(images=BATCH)
    world.run(monkeypatch, clock=clock)
    total = {name: seconds for name, seconds in clock.total().items() if seconds}
    assert total == {"evaluate": 3, "save": 3, "data": 4, "panel": 1, "step": 3}
    assert sum(total.values()) == now[0] - 100


def test_each_line_has_the_speed_of_steps_that_are_computed_when_dispatched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on CPUs: metrics are fetched a step later, and before a save at once."""
    now = [100.0]
    monkeypatch.setattr(goodput.time, "monotonic", lambda: now[0])

    class OnCpu(World):
        def step(self, state, batch):
            state, metrics = super().step(state, batch)
            now[0] += 2.0
            values = {name: np.float32(name == "loss") for name in metrics}
            return state, jax.block_until_ready(jax.device_put(values))

    world = OnCpu(6, save_every=3)
    world.run(monkeypatch, evaluators=[])
    assert [step for step, _ in world.lines] == [1, 2, 3, 4, 5, 6]
    assert [values["perf/step_seconds"] for _, values in world.lines] == [2.0] * 6
    assert [values["perf/images_per_sec"] for _, values in world.lines] == [BATCH / 2.0] * 6


def test_what_a_line_computes_is_not_in_its_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits on the device for the step that was dispatched meanwhile."""
    now = [100.0]
    monkeypatch.setattr(goodput.time, "monotonic", lambda: now[0])

    def ready(step: int) -> None:
        now[0] = max(now[0], 100.0 + 2.0 * step)

    class Busy(World):
        def scheduled(self, step):
            ready(len(self.of("dispatch")))
            return super().scheduled(step)

    world = Busy(6, save_every=3)
    world.at = {f"fetch {k}": lambda k=k: ready(k) for k in range(1, 7)}
    world.run(monkeypatch, evaluators=[])
    assert [values["perf/step_seconds"] for _, values in world.lines] == [2.0] * 6


def test_every_step_is_passed_on_with_its_metrics_unfetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(3)
    world.run(
        monkeypatch, on_step=lambda step, metrics: world.note(f"sent {step} {sorted(metrics)[0]}")
    )
    assert world.of("sent") == [f"sent {k} loss" for k in (1, 2, 3)]
    for k in (1, 2, 3):
        assert world.events.index(f"sent {k} loss") < world.events.index(f"fetch {k}")
