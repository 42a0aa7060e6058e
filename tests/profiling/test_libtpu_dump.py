"""What libtpu dumps is read before it has made code; without libtpu, from files as it writes
them."""

import os
import pathlib
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from m3i_jax.errors import DoesNotFit
from m3i_jax.profiling import libtpu_dump

NAME = "module_0003.jit_train_step.cl_1."
REPORT = """Memory Space: default (color=0)
Total bytes: 34283771520 (31.93GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
Memory Space: vmem (color=1)
Total bytes: 50266112 (47.94MiB)
"""


def write(folder: pathlib.Path, *, after: bool = True, report: str = REPORT) -> None:
    for ending in ("before_optimizations.txt", "after_optimizations_before_buffer_assignment.txt"):
        (folder / f"{NAME}{ending}").write_text("HloModule of before")
    (folder / f"{NAME}after_optimizations.txt").write_text("HloModule jit_train_step")
    (folder / f"{NAME}after_optimizations-memory-usage-report.txt").write_text(report)
    if after:
        (folder / f"{NAME}after_optimizations_after_buffer_assignment.txt").write_text("HloModule")


class Slow:
    """A lowered program whose compiler writes its files and then works on."""

    def __init__(self, *, files: bool = True, wrong: str = ""):
        self.files, self.wrong, self.go = files, wrong, threading.Event()

    def compile(self, compiler_options: dict) -> str:
        if self.wrong:
            raise ValueError(self.wrong)
        if self.files:
            write(pathlib.Path(compiler_options["xla_dump_to"]))
            self.go.wait(30)
        return f"all of it, by {compiler_options['level']}"


def test_nothing_is_read_before_all_is_there(tmp_path):
    assert libtpu_dump.read_libtpu_dump(tmp_path) is None
    write(tmp_path, after=False)
    assert libtpu_dump.read_libtpu_dump(tmp_path) is None
    write(tmp_path)
    found = libtpu_dump.read_libtpu_dump(tmp_path)
    assert (
        found.as_text() == "HloModule jit_train_step"
        and found.memory_analysis().peak_memory_in_bytes == 34_283_771_520
    )


def test_a_report_of_another_form_is_not_guessed_at(tmp_path):
    write(tmp_path, report="Total: 3 GiB")
    assert libtpu_dump.read_libtpu_dump(tmp_path) is None


def test_the_compiler_is_not_waited_for(tmp_path):
    slow = Slow()
    begun = time.monotonic()
    assert libtpu_dump.compile_until_scheduled(slow, {"level": 3}, tmp_path).peak == 34_283_771_520
    assert time.monotonic() - begun < 20
    slow.go.set()


def test_without_files_it_is_and_its_errors_are_those_of_the_program(tmp_path):
    assert (
        libtpu_dump.compile_until_scheduled(Slow(files=False), {"level": 3}, tmp_path)
        == "all of it, by 3"
    )
    with pytest.raises(ValueError, match="too large"):
        libtpu_dump.compile_until_scheduled(Slow(wrong="too large"), {"level": 3}, tmp_path)


def test_a_platform_that_writes_other_files_is_compiled(tmp_path):
    done = libtpu_dump.compile_until_scheduled(
        jax.jit(lambda x: x + 1).lower(jnp.zeros(3)), {}, tmp_path
    )
    assert isinstance(done, jax.stages.Compiled) and list(tmp_path.iterdir())


def busy(folder: pathlib.Path, value: int) -> int:
    assert not list(folder.iterdir())
    # not one that Python would leave alone
    threading.Thread(target=time.sleep, args=(600,)).start()
    return os.getpid() * value


def refused(folder: pathlib.Path) -> None:
    raise DoesNotFit(f"{folder.is_dir()}: too large")


def broken(folder: pathlib.Path) -> None:
    raise ValueError("no such thing")


def killed(folder: pathlib.Path) -> None:
    os.kill(os.getpid(), 9)


def test_a_result_comes_from_another_process_that_ends_whatever_runs_in_it():
    begun = time.monotonic()
    made = libtpu_dump.run_in_subprocess(busy, 1)
    assert made != os.getpid() and time.monotonic() - begun < 120
    with pytest.raises(ProcessLookupError):
        os.kill(made, 0)


def test_an_error_there_is_raised_here(capfd):
    with pytest.raises(DoesNotFit, match="True: too large"):
        libtpu_dump.run_in_subprocess(refused)
    with pytest.raises(RuntimeError, match="ValueError"):
        libtpu_dump.run_in_subprocess(broken)
    assert "no such thing" in capfd.readouterr().err
    with pytest.raises(RuntimeError, match="enough memory"):
        libtpu_dump.run_in_subprocess(killed)
