"""Rows C9, C10: a run whose data or evaluator fails saves its state, and resumes from there."""

import errno
import os
import pathlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from m3i_jax import parallel
from m3i_jax.data import pipeline, workers
from m3i_jax.data.sources.folder import FolderSource
from m3i_jax.errors import RunStopped, TransientError, UnreadableError, UserError, as_refusal
from m3i_jax.modes import train
from m3i_jax.training import loop
from m3i_jax.training.checkpoint import Checkpoints, SavesFailed
from tests.data.conftest import settings
from tests.faults.test_data_run import a_folder
from tests.faults.test_processes import Counting
from tests.training.test_loop import World

ERRORS = [
    UnreadableError("'2.tar' cannot be read"),
    RunStopped("worker 1 of 2 made no batch"),
    UserError("too many bad"),
    ValueError("of a source"),
]


def failing(event: str, error: Exception, **more: Any) -> World:
    """Steps 1 to 5 are done when the event, during the sixth, raises."""
    world = World(9, save_every=4, eval_every=5, **more)

    def fail() -> None:
        if world.of("dispatch")[-1:] == ["dispatch 5"]:
            raise error

    world.at[event] = fail
    return world


@pytest.mark.fast
@pytest.mark.row("A2", "A3")
def test_a_signal_during_the_last_save_does_not_cost_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the handlers, SIGTERM would end the process, and with it the save."""
    world, before = World(2), signal.getsignal(signal.SIGTERM)

    def wait() -> None:
        assert signal.getsignal(signal.SIGTERM) != before
        signal.raise_signal(signal.SIGTERM)

    world.at["wait"], late = wait, list[str]()
    callback = lambda: late.append(world.events[-1])
    assert world.run(monkeypatch, on_late_notice=callback) == loop.DONE and late == ["wait"]
    # --mode=compare starts no other run then; without a signal it goes on
    world = World(2)
    assert world.run(monkeypatch, on_late_notice=callback) == loop.DONE and late == ["wait"]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.fast
@pytest.mark.row("A2", "D1")
def test_a_signal_at_the_end_of_a_run_that_fails_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the failing step is dumped, or before the save that fails: no other run begins then."""
    late: list[str] = []
    callbacks = {
        "dump": lambda *_: signal.raise_signal(signal.SIGTERM),
        "on_late_notice": lambda: late.append("late"),
    }
    world = World(9, bad={1, 2, 3})
    assert world.run(monkeypatch, **callbacks) == loop.FAILED and late == ["late"]
    world = World(9)

    def fail() -> None:
        raise SavesFailed("the disk is full")

    world.at |= {"dispatch 2": lambda: signal.raise_signal(signal.SIGTERM), "save 2": fail}
    with pytest.raises(SavesFailed):
        world.run(monkeypatch, **callbacks)
    assert late == ["late", "late"]
    world = World(9)
    world.at["dispatch 2"] = lambda: signal.raise_signal(signal.SIGTERM)
    assert world.run(monkeypatch, **callbacks) == loop.PREEMPTED and len(late) == 2


@pytest.mark.row("A2")
def test_until_the_first_step_sigterm_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it does so outside the loop: there is nothing to save while the step is compiled."""
    world, before, ends = World(2), signal.getsignal(signal.SIGTERM), list[bool]()
    look = lambda: ends.append(signal.getsignal(signal.SIGTERM) == before)
    world.at = {"evaluate 0": look, "dispatch 1": look, "dispatch 2": look, "wait": look}
    monkeypatch.setattr(loop.interrupts, "exits_on_sigterm", lambda: True)
    assert world.run(monkeypatch) == loop.DONE and ends == [True, True, False, False]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.fast
@pytest.mark.row("A2", "C9")
def test_a_signal_while_a_batch_is_late_saves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler kills the process half a minute later, and a file server may be away longer."""
    world, released = World(9, save_every=100), threading.Event()

    def make(first: int) -> tuple[Any, None]:
        def inner() -> Iterator[dict[str, Any]]:
            for number in range(9):
                if number == 3:
                    signal.raise_signal(signal.SIGTERM)
                    released.wait(60)
                yield {}

        return inner(), None

    batches = workers.RestartingIterator(make, workers=0, limit=60.0)
    monkeypatch.setattr(workers, "SLICE", 0.01)
    monkeypatch.setattr(World, "__next__", lambda self: next(batches))
    waits = lambda poll: setattr(batches, "on_wait", poll)
    assert world.run(monkeypatch, while_waiting=waits) == loop.PREEMPTED
    assert world.positions == {3: {"samples_seen": 24}} and not released.is_set()
    released.set()


@pytest.mark.fast
@pytest.mark.row("C9", "C10")
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_the_state_is_saved_before_the_run_ends(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    world = failing("draw", error)
    with pytest.raises(type(error), match=str(error)):
        world.run(monkeypatch)
    assert list(world.positions) == [4, 5] and world.positions[5] == {"samples_seen": 40}
    # what is saved has its line in the log
    assert world.events[-2:] == ["save 5", "wait"] and "write 5" in world.events
    assert "saved step 5" in world.logged[-1]


@pytest.mark.fast
@pytest.mark.row("C9")
def test_an_error_keeps_what_it_was_raised_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """By which a disk that is away gives exit code 1."""
    error = UserError("the files of 'train' cannot be read")
    error.__cause__ = OSError(errno.ESTALE, "Stale file handle")
    with pytest.raises(UserError) as raised:
        failing("draw", error).run(monkeypatch)
    assert isinstance(as_refusal(raised.value), TransientError)


@pytest.mark.fast
@pytest.mark.row("C9")
def test_an_evaluator_that_fails_costs_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    world = failing("evaluate 5", UnreadableError("'held-out.tar' cannot be read"))
    with pytest.raises(UnreadableError):
        world.run(monkeypatch)
    assert list(world.positions) == [4, 5] and not world.of("write eval 5")


@pytest.mark.fast
@pytest.mark.row("C9")
def test_what_is_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step was trained yet; there are other hosts; the disk is full as well: the run ends with
    the error of the data in every case."""
    world = World(9)
    world.at["draw"] = lambda: (_ for _ in ()).throw(UnreadableError("gone"))
    with pytest.raises(UnreadableError, match="gone"):
        world.run(monkeypatch)
    assert not world.positions
    with monkeypatch.context() as patch:
        patch.setattr(loop.parallel, "host_names", lambda: 2)
        world = failing("draw", UnreadableError("gone"))
        with pytest.raises(UnreadableError, match="gone"):
            world.run(patch)
        assert list(world.positions) == [4]
    world = failing("draw", UnreadableError("gone"))
    world.at["wait"] = lambda: (_ for _ in ()).throw(SavesFailed("no space"))
    with pytest.raises(UnreadableError, match="gone"):
        world.run(monkeypatch)
    assert world.logged[-1] == "warning: no space"


@pytest.mark.fast
@pytest.mark.row("C9")
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_data_that_fail_after_the_last_step_cost_a_panel(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """All hosts draw the panel together, or none does."""
    logged: list[str] = []
    assert train._last_batch(iter([7]), logged.append) == 7 and not logged
    gone = (_ for _ in [0] if (_ for _ in ()).throw(error))
    assert train._last_batch(gone, logged.append) is None
    assert logged == [f"warning: no panel of the last step ({error})"]
    monkeypatch.setattr(parallel, "exchange_values", lambda name, text, **_: ["", "not here"])
    assert train._last_batch(iter([7]), logged.append) is None
    assert logged[1:] == ["warning: no panel of the last step (not here)"]


@pytest.mark.fast
@pytest.mark.row("C9")
def test_files_that_come_back_continue_the_run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, trials
) -> None:
    """With real data and checkpoints: images vanish between two saves, and come back. No step and
    no sample is lost."""
    monkeypatch.setattr(loop.parallel, "to_global", lambda mesh, batch: batch)
    (tmp_path / "data").mkdir()
    _, lost, _ = a_folder(tmp_path / "data")
    one, seen = Counting(20, 100), {}

    def go(name: str, first: int, vanish: int) -> tuple[int, list[str]]:
        logged: list[str] = []
        checkpoints = Checkpoints(tmp_path / name, 2, log=logged.append)
        inner = pipeline.iterate_batches(
            settings(batch=8), FolderSource(str(tmp_path / "data")), None, start=8 * first
        )

        class Data:
            def counted(self) -> dict[str, float]:
                return {}

            def __next__(self) -> dict[str, Any]:
                if len(seen[name]) == vanish:
                    for path in lost:
                        os.rename(path, path.with_suffix(".gone"))
                batch = next(inner)
                seen[name].append(batch["views"][:, 0, 0, 0, 0].tolist())
                return batch

        seen.setdefault(name, [])
        state = one.init()
        if first:
            shardings = parallel.tree_shardings(
                parallel.make_mesh((1, 1, 1), jax.devices()[:1]), jax.eval_shape(one.init)
            )
            state = checkpoints.restore(first, jax.eval_shape(one.init), shardings)
            assert checkpoints.newest_good() == first and checkpoints.position(first) == {
                "n": 8 * first
            }
        quiet = {
            "write": lambda *_: None,
            "log": logged.append,
            "panel": lambda *_: None,
            "evaluators": [],
            "position": lambda n: {"n": n},
        }
        try:
            _, state = loop.run_loop(
                one,
                state,
                samples_seen=8 * first,
                callbacks=loop.Callbacks(data=Data(), checkpoints=checkpoints, **quiet),
            )
        finally:
            inner.close()
            checkpoints.close()
        assert (np.asarray(state.params["w"]) == 20).all()
        return int(state.step), logged

    go("whole", 0, -1)
    with pytest.raises(UserError, match=r"0\d\.png' cannot be read"):
        go("broken", 0, 7)
    steps = [int(path.name) for path in (tmp_path / "broken").iterdir()]
    done = len(seen["broken"])
    assert trials.add(steps == [done] and 7 <= done < 20), (steps, done)
    for path in lost:
        os.rename(path.with_suffix(".gone"), path)
    assert go("broken", done, -1)[0] == 20
    assert trials.add(seen["broken"] == seen["whole"])
    trials.figure = (
        f"files vanish at step {done} of a run that saves every 100: 0 steps and 0 samples lost"
    )
