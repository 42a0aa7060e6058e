"""The fuzzer with a seed and few cases; for an hour: `python -m tests.faults.fuzz --minutes 60`."""

import os
import pathlib
import subprocess
import sys

import pytest

from m3i_jax import main as command
from m3i_jax.modes import MODES
from tests.faults import fuzz, fuzz_cases
from tests.faults.hostile import ROOT
from tests.test_setting_limits import SETTINGS


@pytest.mark.fast
@pytest.mark.row("E7")
def test_settings_are_refused_on_one_line_or_taken(trials, tmp_path: pathlib.Path) -> None:
    """A hundred settings, within and beyond their declared limits, in this process."""
    fuzzer = fuzz.Fuzzer(tmp_path)
    fuzz.examples(fuzz_cases.settings(), 100, 7, fuzzer.resolved)
    trials.trials, trials.passed = (
        fuzzer.counts["resolved"],
        fuzzer.counts["resolved"] - len(fuzzer.found),
    )
    assert not fuzzer.found and trials.trials > 75


@pytest.mark.fast
@pytest.mark.row("E7")
def test_commands_and_files_of_a_seed(trials) -> None:
    """A few commands, configuration files and damaged data, in new processes."""
    line = [
        sys.executable,
        "-m",
        "tests.faults.fuzz",
        "--cases",
        "5",
        "--seed",
        "3",
        "--only",
        "scripts,of_data",
    ]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    trials.figure = done.stdout.splitlines()[-1] if done.stdout else ""
    assert trials.add(done.returncode == 0), done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.row("E7")
def test_an_hour_finds_nothing(trials) -> None:
    """All kinds, with damaged files of a run; M3I_FUZZ_MINUTES sets the time, M3I_FUZZ_SEED the
    seed."""
    minutes, seed = os.environ.get("M3I_FUZZ_MINUTES", "60"), os.environ.get("M3I_FUZZ_SEED", "0")
    line = [sys.executable, "-m", "tests.faults.fuzz", "--minutes", minutes, "--seed", seed]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    trials.figure = "; ".join(done.stdout.splitlines()[-2:])
    assert trials.add(done.returncode == 0), done.stdout + done.stderr


@pytest.mark.fast
@pytest.mark.row()
def test_a_new_setting_mode_or_flag_is_tried_without_being_named() -> None:
    """Everything is drawn from the schema, the modes and the parser."""
    kinds = ("QUICK_MODES", "SLOW_MODES", "STEP_MODES")
    assert {name for kind in kinds for name in getattr(fuzz_cases, kind)} == set(MODES)
    assert set(fuzz_cases.flags()) | fuzz_cases.LEFT_OUT_FLAGS >= {
        name for action in command.parser()._actions for name in action.option_strings
    }
    assert set(fuzz_cases.KEYS) == set(SETTINGS) - fuzz_cases.LEFT_OUT_KEYS
    seen: set[str] = set()
    fuzz.examples(
        fuzz_cases.overrides(),
        100,
        1,
        lambda some: seen.update(text.partition("=")[0] for text in some),
    )
    assert len(seen) > 50 and seen <= set(fuzz_cases.KEYS)


@pytest.mark.fast
@pytest.mark.row()
def test_what_a_fault_looks_like(tmp_path: pathlib.Path, monkeypatch) -> None:
    """The checks can fail: a command that prints a traceback, one that changes the data, one that
    exits with another code."""
    fuzzer = fuzz.Fuzzer(tmp_path, log=lambda *_, **__: None)
    case = fuzz_cases.Case(("--mode=show",))

    def did(code: int, err: str, touch: bool = False) -> list[str]:
        def run(arguments: list[str], room: fuzz.Room, **_) -> fuzz.Done:
            if touch:
                (room.place / "data" / "new").write_text("x")
            return fuzz.Done(code, "", err, 0.1)

        monkeypatch.setattr(fuzz, "command", run)
        return fuzzer.trial(case)

    line = "m3i_jax: config.optim.lr: -1 must be positive\n"
    assert did(2, line) == [] and did(3, "WARNING: slow\n" + line) == [] and did(0, "") == []
    assert did(1, line) == ["exit 1"] and did(-11, "") == ["exit -11"]
    assert did(2, "") == ["0 lines on stderr"] and did(2, line + "and more\n") == [
        "2 lines on stderr"
    ]
    assert did(2, line + "Traceback (most recent call last):\n") == [
        "traceback",
        "2 lines on stderr",
    ]
    assert did(0, "", touch=True) == ["touched ROOM/data/new"]
