"""Ctrl-C outside the training loop: one line, exit code 130, no traceback."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from m3i_jax.modes import MODES
from tests.interruptible import interruptible

ROOT = pathlib.Path(__file__).parent.parent
LINE = "m3i_jax: interrupted; run the same command again to continue\n"
# A configuration file that waits: the command line is in the middle of its start.
WAITING = "import time\nprint('ready', flush=True)\ntime.sleep(100)\n"
START = (
    "import signal\nfrom m3i_jax import interrupts\ninterrupts.install_handler()\n"
    "interrupts.watch_long_calls()\n"
)
READY = "print('ready', flush=True)\n"
# A call of C that a signal does not end: a mutex that is locked twice.
LONG_CALL = (
    "import ctypes\nlibrary, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)\n"
    f"library.pthread_mutex_lock(mutex)\n{READY}library.pthread_mutex_lock(mutex)\n"
)
COLLECTED = (  # Python prints and ignores what a callback of the garbage collector raises
    "import gc, time\nf = lambda *_: (gc.callbacks.clear(), print('ready', flush=True),"
    " time.sleep(100))\ngc.callbacks.append(f)\ngc.collect()\ntime.sleep(100)\n"
)


def interrupted(*command: str, number: int = signal.SIGINT) -> tuple[int, str]:
    """Exit code and stderr of a process that gets a signal when it has printed "ready"."""
    with interruptible():
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    return process.returncode, error


def waiting(folder: pathlib.Path, mode: str, first: str = "") -> tuple[str, ...]:
    """The command of a mode whose configuration waits; `first`: what it does before."""
    config = folder / "config.py"
    config.write_text(first + WAITING)
    arguments = ("--config", str(config), "--workdir", str(folder / "run"), f"--mode={mode}")
    return "-m", "m3i_jax.main", *arguments


@pytest.mark.row("A4")
@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(name, marks=() if name in ("train", "index") else pytest.mark.slow)
        for name, mode in MODES.items()
        if mode.settings
    ],
)
def test_every_mode_while_it_starts(tmp_path: pathlib.Path, mode: str) -> None:
    assert interrupted(*waiting(tmp_path, mode)) == (130, LINE)


@pytest.mark.row("A4")
@pytest.mark.parametrize("code", [f"{READY}import time\ntime.sleep(100)", LONG_CALL, COLLECTED])
def test_python_a_long_call_and_a_callback(code: str) -> None:
    assert interrupted("-c", START + code) == (130, LINE)


def preempted(*command: str) -> None:
    code, error = interrupted(*command, number=signal.SIGTERM)
    assert code == 42 and error.count("\n") == 1, (code, error)
    assert error.startswith("m3i_jax: stopped by SIGTERM where nothing has to be saved")


@pytest.mark.row("A2")
@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(
            name,
            marks=pytest.mark.slow
            if name in ("index", "curate", "features", "compare", "eval")
            else (),
        )
        for name, mode in MODES.items()
        if mode.preemptible
    ],
)
def test_sigterm_before_the_loop(tmp_path: pathlib.Path, mode: str) -> None:
    """As a preemption in the loop, which saves: a scheduler starts the run again."""
    preempted(*waiting(tmp_path, mode))


def test_the_modes_that_go_on_where_they_were_stopped() -> None:
    """As configs/README.md lists them."""
    text = (pathlib.Path(__file__).parents[1] / "configs" / "README.md").read_text()
    (listed,) = re.findall(r"\(SIGTERM in ([\w, \n]*) and (\w+);", text)
    names = [*re.split(r",\s+", listed[0]), listed[1]]
    assert sorted(names) == sorted(name for name, mode in MODES.items() if mode.preemptible)
    assert {"convert", "curate", "index", "features"} < set(names)


def test_a_request_for_a_trace_does_not_end_a_run_that_starts(tmp_path: pathlib.Path) -> None:
    """SIGUSR1, which by default ends a process: a run is named in run.lock before its loop."""
    asked = "import os, signal\nos.kill(os.getpid(), signal.SIGUSR1)\n"
    assert interrupted(*waiting(tmp_path, "train", asked)) == (130, LINE)


@pytest.mark.row("A2")
def test_sigterm_while_a_program_is_compiled() -> None:
    preempted("-c", f"from m3i_jax import interrupts\ninterrupts.exit_on_sigterm()\n{LONG_CALL}")


def test_a_fork_ends_by_sigterm_as_any_process() -> None:
    code = (
        "import os, signal, time\nfrom m3i_jax import interrupts\ninterrupts.exit_on_sigterm()\n"
        "reader, writer = os.pipe()\nchild = os.fork()\n"
        "if not child:\n    os.write(writer, b'x')\n    time.sleep(20)\n    os._exit(1)\n"
        "os.read(reader, 1)\nos.kill(child, signal.SIGTERM)\n"
        "assert os.waitpid(child, 0)[1] == signal.SIGTERM\ntime.sleep(0.5)\n"
        f"{READY}time.sleep(100)\n"
    )
    preempted("-c", code)


def test_a_block_that_catches_it() -> None:
    code = (
        "import sys, time\ntry:\n    with interrupts.raise_interrupts():\n"
        "        print('ready', flush=True)\n        time.sleep(100)\n"
        "except KeyboardInterrupt:\n    sys.exit(7)\n"
    )
    assert interrupted("-c", START + code) == (7, "")


def test_an_ignored_signal_stays_ignored() -> None:
    code = "signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + START
    code += READY + "import time\ntime.sleep(0.5)\n"
    assert interrupted("-c", "import signal\n" + code) == (0, "")


def test_processes_that_are_started_in_a_block_do_not_receive_it() -> None:
    """Also the first one: multiprocessing starts a process of its own before it, and unblocks the
    signal then."""
    child = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    code = (
        "import subprocess, sys, time\nfrom multiprocessing import resource_tracker\n"
        "with interrupts.block_interrupts():\n    resource_tracker.ensure_running()\n"
        f"    assert subprocess.check_output([sys.executable, '-c', {child!r}]) == b'True\\n'\n"
        f"assert subprocess.check_output([sys.executable, '-c', {child!r}]) == b'False\\n'\n"
        f"{READY}time.sleep(100)\n"
    )
    assert interrupted("-c", START + code) == (130, LINE)


@pytest.mark.parametrize("seconds", [0.2, 30])
def test_a_preempted_process_does_not_wait_for_a_thread_that_hangs(seconds: float) -> None:
    """One thread ends after a second: the process ends before or by itself, with its own code."""
    code = (
        "import sys, threading, time\nfrom m3i_jax import interrupts\n"
        "threading.Thread(target=time.sleep, args=(1.0 if LIMIT > 1 else 100,)).start()\n"
        "interrupts.end_within(LIMIT, 42)\nsys.exit(LIMIT < 1 or 42)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code.replace("LIMIT", str(seconds))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 42
    assert ("has not ended within 0.2 s" in done.stderr) == (seconds < 1)
