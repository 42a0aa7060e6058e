"""A command of the fuzzer in a child process and its own directories, with limits."""

import contextlib
import dataclasses
import os
import pathlib
import re
import resource
import signal
import sys
import time
from collections.abc import Mapping

from tests import fork_server
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


def _in_child(
    arguments: list[str], room: Room, limited: bool, environment: Mapping[str, str] | None
) -> int:
    os.setsid()
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(room.place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    places = {"HOME": "home", "TMPDIR": "tmp", "XDG_CACHE_HOME": "cache"}
    own = {**os.environ, **{name: str(room.place / place) for name, place in places.items()}}
    resource.setrlimit(resource.RLIMIT_DATA, (ROOM, ROOM))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limited:
        resource.setrlimit(resource.RLIMIT_CPU, (int(LONGEST), int(LONGEST) + 5))
    if environment is not None:
        os.chdir(room.place)
        started = [sys.executable, "-m", "m3i_jax.main", *arguments]
        os.execve(sys.executable, started, {**own, "PYTHONPATH": str(cases.ROOT), **environment})
    return fork_server.as_command(arguments, str(room.place), own)


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
    began = time.monotonic()
    child = fork_server.fork()
    if not child:
        fork_server.end_like_python(
            lambda: _in_child(arguments, room, limited, environment), error=71
        )
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
