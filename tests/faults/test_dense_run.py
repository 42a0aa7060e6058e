"""Rows of the fault matrix for runs of detection and segmentation, with every head: a full disk, a
resume on other devices, shardings and hosts, and numbers that are not finite. Killed and preempted
runs are in tests/training/test_dense_resume.py."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import pytest

from m3i_jax import main as command
from m3i_jax.parallel.sharding import path_text
from m3i_jax.training import checkpoint_dir, loop, trainer
from m3i_jax.training.checkpoint import Checkpoints
from tests.faults.test_saves import no_file_above
from tests.free_port import free_address
from tests.training.test_dense_resume import (
    HEADS,
    PARTS,
    ROOT,
    STEPS,
    arguments,
    logged,
    same,
    saved_arrays,
    traced_once,  # noqa: F401
    unbroken,  # noqa: F401
)

SHORT = "mask_rcnn"  # the head of the normal suite
LIMIT = 40_000  # bytes: above the log of a run, below the arrays of a checkpoint


@pytest.fixture(
    scope="module",
    params=[pytest.param(h, marks=() if h == SHORT else pytest.mark.slow) for h in HEADS],
)
def head(request: pytest.FixtureRequest) -> str:
    """The head of the run that `unbroken` makes."""
    return request.param


@pytest.fixture(scope="module")
def stopped(head: str, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run on eight devices that was preempted at its second step."""
    run = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        _at_step(patch, {2: lambda: signal.raise_signal(signal.SIGTERM)})
        assert command.main(arguments(run, head)) == loop.PREEMPTED
    return run


def _at_step(patch: pytest.MonkeyPatch, events: dict) -> list[int]:
    """Calls a function before a step; returns the list of the steps taken."""
    calls, whole = [], trainer.Trainer.step

    def counted(self, state, batch):
        calls.append(len(calls) + 1)
        events.get(calls[-1], lambda: None)()
        return whole(self, state, batch)

    patch.setattr(trainer.Trainer, "step", counted)
    return calls


def _close(run: pathlib.Path, other: pathlib.Path) -> None:
    """The same steps, batches and learning rates, and losses up to rounding."""
    mine, theirs = logged(run), logged(other)
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]
    for row, wanted in zip(mine, theirs, strict=True):
        for name in ("samples_seen", "lr"):
            assert row[name] == wanted[name]
        for name in (name for name in wanted if name.startswith("loss")):
            np.testing.assert_allclose(row[name], wanted[name], rtol=2e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.row("B1", "B2")
def test_a_disk_that_is_full_for_a_while_costs_no_bit(
    head: str,
    unbroken: pathlib.Path,  # noqa: F811
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The save of step 3 fails; it is logged, training goes on, and a later save succeeds."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(Checkpoints, "BACK_OFF", 0.0)
    full, saves, start = contextlib.ExitStack(), [], Checkpoints._start

    def watched(self, *arguments):
        start(self, *arguments)
        saves.append(self._saving[-1])

    def free() -> None:
        assert saves[0].exception(timeout=60)  # the save of step 3 goes on beside step 4
        full.close()

    monkeypatch.setattr(Checkpoints, "_start", watched)
    _at_step(monkeypatch, {3: lambda: full.enter_context(no_file_above(LIMIT)), 4: free})
    with full:
        assert command.main(arguments(tmp_path, head)) == loop.DONE
    out = capsys.readouterr().out
    assert "of 3 in a row failed" in out and "Traceback" not in out
    assert STEPS in checkpoint_dir.complete_steps(tmp_path / "checkpoints")
    left = [path.name for path in (tmp_path / "checkpoints").iterdir() if not path.name.isdigit()]
    assert not [name for name in left if "tmp" in name], left
    assert same(tmp_path, unbroken)


@pytest.mark.slow
@pytest.mark.row("B1")
def test_a_disk_that_stays_full_ends_the_run_and_a_restart_goes_on(
    head: str,
    unbroken: pathlib.Path,  # noqa: F811
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(Checkpoints, "BACK_OFF", 0.0)
    with contextlib.ExitStack() as full, monkeypatch.context() as patch:
        steps = tmp_path / "checkpoints"

        def fill() -> None:
            deadline = time.monotonic() + 60
            while checkpoint_dir.complete_steps(steps) != [3] and time.monotonic() < deadline:
                time.sleep(0.01)  # the save of step 3 goes on beside step 4
            full.enter_context(no_file_above(LIMIT))

        _at_step(patch, {4: fill})
        assert command.main(arguments(tmp_path, head)) == loop.FAILED
    out = capsys.readouterr().out
    assert "save 3 of 3 in a row failed" in out and "free space" in out
    assert checkpoint_dir.complete_steps(steps) == [3]
    assert command.main(arguments(tmp_path, head)) == loop.DONE
    assert "resuming at step 3" in capsys.readouterr().out
    assert same(tmp_path, unbroken)


@pytest.mark.slow
@pytest.mark.row("A9")
def test_a_run_goes_on_with_a_sharded_state(
    head: str,
    unbroken: pathlib.Path,  # noqa: F811
    stopped: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    assert command.main(arguments(run, head, parallel__mesh="(2,4,1)")) == loop.DONE
    _close(run, unbroken)
    assert saved_arrays(run).keys() == saved_arrays(unbroken).keys()


def _processes(
    run: pathlib.Path, head: str, hosts: int, devices: int
) -> list[subprocess.Popen[str]]:
    """The command on hosts of so many devices."""
    at = free_address()
    flags = f"--xla_force_host_platform_device_count={devices}"
    more = [["--coordinator", at, "--processes", str(hosts), "--process-id", str(i)]
            for i in range(hosts)] if hosts > 1 else [[]]  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-m", "m3i_jax.main", *arguments(run, head), *words],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for words in more
    ]


@pytest.mark.slow
@pytest.mark.row("A9", "A10")
@pytest.mark.parametrize(("hosts", "devices"), [(1, 2), (2, 1)])
def test_a_run_goes_on_elsewhere(
    head: str,
    hosts: int,
    devices: int,
    unbroken: pathlib.Path,  # noqa: F811
    stopped: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    """Begun on eight devices of one host."""
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    processes = _processes(run, head, hosts, devices)
    try:
        outputs = [process.communicate(timeout=900)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * hosts, outputs[0][-3000:]
    assert "resuming at step 2" in outputs[0]
    _close(run, unbroken)


def _poisoned(state: Any, head: str) -> Any:
    """The state with one number of the head that is NaN."""
    found = []

    def change(path: Any, leaf: Any) -> Any:
        if found or not f"params/{path_text(path)}".startswith(PARTS[head]):
            return leaf
        found.append(path_text(path))
        values = np.array(leaf)
        values.reshape(-1)[0] = np.nan
        return jax.device_put(values, leaf.sharding)

    params = jax.tree_util.tree_map_with_path(change, state.params)
    assert found
    return dataclasses.replace(state, params=params)


@pytest.mark.slow
@pytest.mark.row("D1")
def test_a_head_that_is_not_finite_ends_the_run_without_harm(
    head: str,
    unbroken: pathlib.Path,  # noqa: F811
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the fourth step on, after a save. Three steps leave every bit of parameters, moments and
    running statistics; the dump replays; and the same command goes on from the save."""
    monkeypatch.chdir(ROOT)
    seen, whole = [], trainer.Trainer.step
    bits = lambda state: [
        np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((state.params, state.opt))
    ]

    def broken(self, state, batch):
        if int(state.step) == 3:
            state = _poisoned(state, head)
        if int(state.step) >= 3:
            seen.append(bits(state))
        state, metrics = whole(self, state, batch)
        if int(state.step) > 3:
            seen.append(bits(state))
        return state, metrics

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "step", broken)
        assert command.main(arguments(tmp_path, head)) == loop.FAILED
    assert len(seen) == 6 and all(one == seen[0] for one in seen)
    assert [row["skipped/not_finite"] for row in logged(tmp_path)] == [0, 0, 0, 1, 1, 1]
    assert "stopped at step 6: 3 steps in a row were not finite" in capsys.readouterr().out
    assert command.main(["--mode=replay", "--workdir", str(tmp_path)]) == 0
    assert "reproduced" in capsys.readouterr().out
    assert checkpoint_dir.complete_steps(tmp_path / "checkpoints") == [3]
    assert command.main(arguments(tmp_path, head)) == loop.DONE
    assert "resuming at step 3" in capsys.readouterr().out
    assert same(tmp_path, unbroken)
