"""A command of the fuzzer in a child process and its own directories, with limits."""

import atexit
import contextlib
import dataclasses
import os
import pathlib
import re
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping

from m3i_jax import main
from tests.faults import fuzz_cases as cases

LONGEST = 40.0  # seconds of the processor after which a command is ended
WALL = 300.0  # seconds that pass, on a busy machine too, after which it is
ROOM = 12 * 2**30  # bytes of memory that a command may have


@dataclasses.dataclass
class Done:
    """The result of a command."""

    code: int
    out: str
    err: str
    seconds: float
    late: bool = False


@dataclasses.dataclass
class Room:
    """Directories of one case; `W` is its working directory, and all else must stay unchanged."""

    place: pathlib.Path

    def filled(self, text: str) -> str:
        for name in "WDC":
            text = text.replace(
                "{" + name + "}", str(self.place / {"W": "run", "D": "data", "C": "mine.py"}[name])
            )
        return text

    def outside(self) -> dict[str, tuple[int, int]]:
        """Size and time of change of everything outside the working directory."""
        out = {}
        for folder, names, files in os.walk(self.place):
            if pathlib.Path(folder) == self.place:
                names[:] = [name for name in names if name not in ("run", "tmp", "cache")]
            for name in (*names, *files):
                if not re.fullmatch(r"out|err|__pycache__|.*\.pyc", name):
                    about = os.lstat(os.path.join(folder, name))
                    out[os.path.join(folder, name)] = (
                        about.st_size if name in files else 0,
                        about.st_mtime_ns if name in files else 0,
                    )
        return out


def command(
    arguments: list[str],
    room: Room,
    *,
    limited: bool = True,
    environment: Mapping[str, str] | None = None,
) -> Done:
    """Run the command in a child of this process, with time limits.

    Args:
      arguments: of the command.
      room: its directories.
      limited: whether it has a limit of time.
      environment: variables beside those of this process, for a Python that starts anew; None: the
        child has the modules of this process.
    """
    if (threads := len(os.listdir("/proc/self/task"))) != 1:
        raise RuntimeError(f"a child of a process with {threads} threads may hang")
    began = time.monotonic()
    child = os.fork()
    if not child:
        code = 70
        try:
            os.setsid()
            atexit._clear()  # the directories of this process are its own to remove
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(room.place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            os.environ.update(
                HOME=str(room.place / "home"),
                TMPDIR=str(room.place / "tmp"),
                XDG_CACHE_HOME=str(room.place / "cache"),
            )
            tempfile.tempdir = None
            resource.setrlimit(resource.RLIMIT_DATA, (ROOM, ROOM))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            if limited:
                resource.setrlimit(resource.RLIMIT_CPU, (int(LONGEST), int(LONGEST) + 5))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.chdir(room.place)
            if environment is not None:
                os.environ.update(PYTHONPATH=str(cases.ROOT))
                os.environ.update(environment)
                started = [sys.executable, "-m", "m3i_jax.main", *arguments]
                os.execv(sys.executable, started)
            sys.argv = ["m3i_jax", *arguments]
            sys.path.insert(0, str(cases.ROOT))
            try:
                code = main.main()
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
        except BaseException:  # noqa: BLE001 - whatever it is, it must not come back into the fuzzer
            import traceback

            traceback.print_exc()
            code = 71
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    late = False
    while True:
        pid, status, used = os.wait4(child, os.WNOHANG)
        if pid:
            break
        if limited and time.monotonic() - began > WALL:
            late = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # workers that it left
    read = {
        name: (room.place / name).read_text(errors="replace")
        for name in ("out", "err")
        if (room.place / name).is_file()
    }
    code = os.waitstatus_to_exitcode(status)
    late = late or code in (-signal.SIGXCPU, -signal.SIGKILL)
    return Done(code, read.get("out", ""), read.get("err", ""), used.ru_utime + used.ru_stime, late)
