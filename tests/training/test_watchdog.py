"""A run that hangs says so, where it hangs, and ends if that is wanted."""

import pathlib
import threading
from typing import Any

import pytest

from m3i_jax.training import loop, watchdog
from m3i_jax.training.goodput import GoodputClock
from m3i_jax.training.watchdog import Watchdog
from tests.training.test_loop import World

SECONDS = 30.0  # no test waits so long unless something is broken


class Hanging(World):
    """Its data stop coming at one of the batches, until `freed`."""

    def __init__(self, at: int, **more: Any) -> None:
        super().__init__(6, **more)
        self.hangs, self.batches, self.freed, self.first_steps = (
            at,
            0,
            threading.Event(),
            threading.Event(),
        )

    def __next__(self) -> dict:
        self.batches += 1
        if self.batches == self.hangs:
            assert self.freed.wait(SECONDS), "the watchdog did not react"
        return super().__next__()


def test_a_hanging_iterator_is_reported_with_its_stack(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    world, clock, logged = Hanging(4), GoodputClock(images=8), []

    def log(line: str) -> None:
        logged.append(line)
        world.freed.set()

    with Watchdog(clock, tmp_path / "stacks-0.txt", log, limit=0.3, first=SECONDS):
        assert world.run(monkeypatch, clock=clock) == loop.DONE  # reported, not ended
    assert (
        len(logged) == 1
        and "in phase 'data' after 2 step(s)" in logged[0]
        and "stacks-0.txt" in logged[0]
    )
    text = (tmp_path / "stacks-0.txt").read_text()
    assert "in __next__" in text and "in run" in text  # where it hangs, and who called
    assert text.count("no sign of life") == 1


@pytest.mark.parametrize("limit", [0.05, SECONDS])
def test_the_first_step_has_a_limit_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, limit: float
) -> None:
    """Silence before it is compilation, and much longer than one between steps; a shorter limit is
    that of who waits for a first step."""
    world, clock, logged = Hanging(1), GoodputClock(images=8), []

    def log(line: str) -> None:
        logged.append(line)
        world.freed.set()

    with Watchdog(clock, tmp_path / "stacks-0.txt", log, limit=limit, first=0.5):
        world.run(monkeypatch, clock=clock)
    assert logged and "after 0 step(s)" in logged[0]
    seconds = float(logged[0].partition("for ")[2].partition(" s")[0])
    line = (tmp_path / "stacks-0.txt").read_text().splitlines()[0]
    silent = float(line.partition("for ")[2].partition(" s")[0])
    assert silent >= 0.5 and abs(silent - seconds) <= 0.56  # one is rounded to seconds


def test_it_ends_the_process_after_so_many_reports_in_a_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    world, clock, logged, ended = Hanging(3), GoodputClock(images=8), [], []

    def end(status: int) -> None:
        ended.append(status)
        world.freed.set()

    with Watchdog(
        clock, tmp_path / "stacks-0.txt", logged.append, limit=0.2, first=SECONDS, abort=3, end=end
    ):
        world.run(monkeypatch, clock=clock)
    assert ended == [1]
    assert [line.split()[0] for line in logged] == ["warning:"] * 3 + ["ended"]


@pytest.mark.parametrize("disk", ["full", "absent", "hangs"])
def test_a_disk_that_takes_no_report_does_not_keep_it_from_ending_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, disk: str
) -> None:
    world, clock, logged, ended = Hanging(3), GoodputClock(images=8), [], []
    path = tmp_path / ("absent/stacks-0.txt" if disk == "absent" else "stacks-0.txt")
    if disk == "full":
        path.symlink_to("/dev/full")
    if disk == "hangs":
        monkeypatch.setattr(watchdog, "PATIENCE", 0.1, raising=False)
        monkeypatch.setattr(Watchdog, "_report", lambda *_: world.freed.wait(SECONDS))

    def end(status: int) -> None:
        ended.append(status)
        world.freed.set()

    with Watchdog(clock, path, logged.append, limit=0.2, first=SECONDS, abort=1, end=end):
        world.run(monkeypatch, clock=clock)
    assert ended == [1] and logged[-1].startswith("ended by the watchdog")
    if disk != "hangs":
        assert any(f"{path} cannot be written" in line for line in logged)


def test_a_console_that_hangs_does_not_keep_it_from_ending_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """As the log of a job on the disk that hangs: the line is not awaited for ever."""
    monkeypatch.setattr(watchdog, "PATIENCE", 0.1)
    world, ended, freed = Hanging(3), [], threading.Event()

    def end(status: int) -> None:
        ended.append(status)
        world.freed.set()
        freed.set()

    def log(line: str) -> None:
        freed.wait(2 * SECONDS)

    clock = GoodputClock(images=8)
    with Watchdog(
        clock, tmp_path / "stacks-0.txt", log, limit=0.2, first=SECONDS, abort=2, end=end
    ):
        world.run(monkeypatch, clock=clock)
    assert ended == [1]


def test_a_run_that_lives_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    world, clock, logged = World(6), GoodputClock(images=8), []
    with Watchdog(clock, tmp_path / "stacks-0.txt", logged.append, limit=SECONDS, first=SECONDS):
        world.run(monkeypatch, clock=clock)
    assert not logged and not list(tmp_path.iterdir())


def test_an_evaluator_that_polls_is_alive() -> None:
    clock = GoodputClock()
    before = clock.alive
    clock.beat()
    assert clock.alive > before


def test_0_watches_nothing(tmp_path: pathlib.Path) -> None:
    with Watchdog(GoodputClock(), tmp_path / "stacks-0.txt", print, limit=0, first=1):
        assert not any(thread.name == "watchdog" for thread in threading.enumerate())
