"""Rows A: a signal during a save, two runs in one workdir, unusual environments, and kills at any
instant."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import parallel, schema
from m3i_jax.training import loop
from m3i_jax.training.checkpoint import Checkpoints
from m3i_jax.training.task import State
from tests.faults import restart, soak
from tests.training.test_loop import World

ROOT = pathlib.Path(__file__).parent.parent.parent
SETTINGS = ["--config", "configs/quickstart.py", *(f"--config.{item}" for item in soak.TINY)]


@pytest.mark.fast
@pytest.mark.row("B2")
def test_a_failed_save_is_tried_again_between_the_regular_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(9, save_every=5, eval_every=0)
    world.again = {0: True, 7: True}  # before anything was trained there is nothing to save
    assert world.run(monkeypatch) == 0
    assert (
        list(world.positions) == [5, 7, 9]
        and world.events[world.events.index("save 7") - 1] == "write 7"
    )


class Counting:
    """A trainer whose step adds one to a donated state."""

    def __init__(self, steps: int, save_every: int):
        train = schema.Train(
            batch_size=8,
            steps=steps,
            save_every=save_every,
            eval_every=0,
            panel_every=0,
            log_every=100,
        )
        self.config = schema.Config(train=train)
        self.length, self.mesh = dataclasses.make_dataclass("Length", ["steps"])(steps), None
        self._add = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)

    def init(self) -> State:
        return State(step=jnp.int32(0), params={"w": jnp.zeros(3000)}, opt={})

    def step(self, state: State, batch: Any) -> tuple[State, dict[str, Any]]:
        time.sleep(0.002)
        return self._add(state), {"loss": jnp.float32(1), "skipped/not_finite": jnp.float32(0)}

    def scheduled(self, step: int) -> dict[str, float]:
        return {}

    def counted(self) -> dict[str, float]:
        return {}

    def __next__(self) -> dict[str, Any]:
        return {}


def stops_while_saving(
    place: pathlib.Path, monkeypatch: pytest.MonkeyPatch, at: int, number: int
) -> bool:
    """A run with slow saves gets a signal during one; a new start finds the newest step complete,
    and resumes."""
    monkeypatch.setattr(loop.parallel, "to_global", lambda mesh, batch: batch)
    one = Counting(60, 10)
    checkpoints = Checkpoints(place, 2, log=lambda text: pytest.fail(text))
    inner = checkpoints._finish
    monkeypatch.setattr(checkpoints, "_finish", lambda *what: (time.sleep(0.05), inner(*what)))
    sent = []

    class Data(Counting):
        def __next__(self) -> dict[str, Any]:
            sent.append(len(sent))
            if len(sent) == at:
                assert checkpoints._saving and not checkpoints._saving[-1].done(), (
                    "the save is over"
                )
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), signal.SIGTERM)  # a launcher that insists
            return {}

    quiet = {
        "write": lambda *_: None,
        "log": lambda text: None,
        "panel": lambda *_: None,
        "evaluators": [],
        "position": lambda n: {"n": n},
    }
    code, state = loop.run_loop(
        one,
        one.init(),
        samples_seen=0,
        callbacks=loop.Callbacks(data=Data(60, 10), checkpoints=checkpoints, **quiet),
    )
    checkpoints.close()
    step = int(state.step)
    again = Checkpoints(place, 2, log=lambda text: pytest.fail(text))
    template = jax.eval_shape(one.init)
    got = again.restore(
        step,
        template,
        parallel.tree_shardings(parallel.make_mesh((1, 1, 1), jax.devices()[:1]), template),
    )
    fine = [
        code == loop.PREEMPTED,
        step == at,
        again.newest_good() == step,
        again.position(step) == {"n": 8 * step},
        bool((np.asarray(got.params["w"]) == step).all()),
        all(p.name.isdecimal() for p in place.iterdir()),
    ]
    again.close()
    return all(fine)


@pytest.mark.fast
@pytest.mark.row("A3")
@pytest.mark.parametrize(
    ("at", "number"), [(11, signal.SIGTERM), (21, signal.SIGINT), (13, signal.SIGTERM)]
)
def test_stopped_while_it_saves(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, at: int, number: int
) -> None:
    assert stops_while_saving(tmp_path, monkeypatch, at, number)


@pytest.mark.slow
@pytest.mark.row("A3", "A4")
def test_stopped_at_any_instant_of_a_save(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, trials
) -> None:
    for k in range(20):
        with monkeypatch.context() as patch:
            trials.add(
                stops_while_saving(
                    tmp_path / str(k),
                    patch,
                    11 + k % 5 + 10 * (k % 4),
                    (signal.SIGTERM, signal.SIGINT)[k % 2],
                )
            )
    trials.figure = f"{trials.passed} of 20 exit 42 with a complete newest step"
    assert trials.passed == 20


HOLD = """
import pathlib, sys, time
from m3i_jax.modes import setup
with setup.lock_workdir(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.fast
@pytest.mark.row("A12")
def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path: pathlib.Path) -> None:
    """The error names the process that holds the lock; after a kill its lock is stale and does not
    count."""
    from m3i_jax.errors import UserError
    from m3i_jax.modes import setup

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=f"is used by another run \\(process {holder.pid}\\)"),
            setup.lock_workdir(tmp_path),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
    with setup.lock_workdir(tmp_path):
        assert (tmp_path / "run.lock").read_text() == str(os.getpid())


def run(place: pathlib.Path, **surroundings: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "m3i_jax.main", *SETTINGS, "--workdir", str(place)]
    more = [
        "--config.train.steps=3",
        "--config.train.save_every=3",
        "--config.train.eval_every=0",
        "--config.evaluate.knn=False",
    ]
    environment = soak.environment(place / "cache") | surroundings.pop("env", {})
    for name in surroundings.pop("without", ()):
        environment.pop(name, None)
    config = str(ROOT / "configs/quickstart.py")
    command[command.index("configs/quickstart.py")] = config
    return subprocess.run(
        [*command, *more], env=environment, check=False, timeout=300, **surroundings
    )


@pytest.mark.slow
@pytest.mark.row("A11")
def test_odd_surroundings(tmp_path: pathlib.Path, trials) -> None:
    """No terminal (all of them), a closed console, a read-only directory, no HOME, umask 077, a
    wrong clock."""
    read_only = tmp_path / "elsewhere"
    read_only.mkdir(mode=0o555)
    wrong = {"TZ": "Pacific/Kiritimati"}
    cases: dict[str, dict[str, Any]] = {
        "closed": {"preexec_fn": lambda: [os.close(n) for n in (0, 1, 2)]},
        "readonly": {"cwd": read_only},
        "homeless": {
            "without": ["HOME", "XDG_CACHE_HOME", "USER", "LOGNAME"],
            "env": {"LANG": "C"},
        },
        "umask": {"umask": 0o077, "env": wrong},
    }
    for name, how in cases.items():
        quiet = {} if name == "closed" else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = run(tmp_path / name, **{"cwd": tmp_path, **quiet, **how})
        lines = (
            [
                json.loads(line)
                for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
            ]
            if done.returncode == 0
            else []
        )
        if not trials.add(done.returncode == 0 and 3 in [line["step"] for line in lines]):
            trials.figure += f"{name}: {(done.stdout or b'')[-400:].decode(errors='replace')} "
    assert trials.passed == len(cases), trials.figure


@pytest.mark.slow
@pytest.mark.row("A1")
def test_killed_at_fifty_random_instants(tmp_path: pathlib.Path, trials) -> None:
    """From the import through compiling, steps, evaluation and saves: the surviving run equals an
    undisturbed one."""
    kills = int(os.environ.get("M3I_FAULTS_KILLS", "50"))
    results = soak.at_random(tmp_path, steps=400, kills=kills, save_every=5)
    # A save goes on behind the training, which waits for it before the next one begins: less than
    # two intervals can be under way.
    few = results["most_steps_lost"] <= 2 * results["save_every"]
    fine = (
        results["bitwise"]
        and not results["leftovers"]
        and not results["committed_steps_lost"]
        and few
    )
    trials.trials, trials.passed = results["kills"], results["kills"] * fine
    trials.figure = (
        f"{trials.passed} of {results['kills']} bitwise, at most {results['most_steps_lost']} steps"
        f" lost (saves every 5), restart {results['restart_seconds']} s, clean start"
        f" {results['clean_start_seconds']} s"
    )
    assert fine, results


@pytest.mark.slow
@pytest.mark.row("A1")
def test_a_restart_costs_no_more_than_half_a_start_more(tmp_path: pathlib.Path, trials) -> None:
    """Judged by processor time, which does not depend on other load; wall time is reported."""
    results = restart.measure(tmp_path, trials=3)
    trials.add(results["ratio_processor"] <= 1.5)
    trials.figure = (
        f"restart to the first new step {results['ratio_processor']:.2f} of a clean start in"
        f" processor time, {results['ratio']:.2f} on the clock ({results['restart_seconds']} s,"
        f" {results['clean_seconds']} s), no evaluation in either"
    )
    assert trials.passed, results


@pytest.mark.slow
@pytest.mark.row("A1")
def test_a_short_soak(tmp_path: pathlib.Path, trials) -> None:
    results = soak.soak(tmp_path, seconds=180.0, every=45.0, save_every=10)
    grown = results["alone"] or {}
    fine = (
        results["bitwise"]
        and not results["leftovers"]
        and not results["committed_steps_lost"]
        and grown.get("descriptors", 1) <= 0
    )
    trials.trials, trials.passed = results["kills"], results["kills"] * fine
    trials.figure = (
        f"soak of {results['minutes']} minutes: the same bits at step {results['steps']:,},"
        f" {grown.get('descriptors')} descriptors more"
    )
    # memory is only judged in an hour: an allocator takes minutes to have what it needs
    assert fine and results["kills"] >= 2, results


@pytest.mark.fast
@pytest.mark.row("A1")
def test_growth_is_seen_and_only_growth() -> None:
    """An hour of samples with short peaks, a warm-up and saves that open files: a growth of two MB
    an hour, or of one descriptor a save, is detected."""
    noise = np.random.default_rng(0)

    def hour(
        slope: float, leak: int = 0, seconds: int = 3600, loud: float = 6.0
    ) -> soak.Growth | None:
        warm = 400 - 30 * np.exp(-np.arange(seconds) / 120)
        memory = warm + slope * np.arange(seconds) / 3600 + loud * noise.random(seconds)
        handles = 20 + 4 * (np.arange(seconds) % 15 == 0) + leak * (np.arange(seconds) // 600)
        return soak.growth(
            [
                (float(t), float(m), int(n))
                for t, m, n in zip(range(seconds), memory, handles, strict=True)
            ]
        )

    for slope, leak, none in ((0.0, 0, True), (-1.0, 0, True), (2.0, 0, False), (0.0, 1, False)):
        found = hour(slope, leak)
        assert found and found.none() == none, found
        assert abs(found.mb - slope) <= found.error + 0.1 and (found.descriptors > 0) == bool(
            leak
        ), found
    restless, short = hour(0.0, loud=1000.0), hour(0.0, seconds=300)
    assert restless and not restless.none() and short and not short.none()  # not shown is not none
    assert hour(0.0, seconds=60) is None
    saving = hour(2.0)
    # a save every other second explains two MB
    assert saving and saving.none(3600 / 2.0) and not saving.none(600.0)
