"""Commands of the program in children of a process that has imported everything, for tests in which
a command, but not the start of Python, is what is tried: imports take 2.6 of the 13 seconds of
processor time of a toy run.

`ForkServer(place, package)` starts the process and writes `place/python`, which takes the place of
`python` in a script: it has `python -m m3i_jax.main ...` and `python FILE.py ...` run by the
server, with their own arguments, directory, environment and standard streams, and ends with their
status; anything else it gives to the interpreter. JAX reads its own variables when it is imported:
they are those of the server. XLA's are those of the command, as devices are initialized in the
child."""

import atexit
import contextlib
import gc
import importlib
import json
import os
import pathlib
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

MODULE = "m3i_jax.main"
# of standard library modules alone, so that it starts in ten milliseconds
CLIENT = """#!{python} -IS
import json, os, socket, sys
file = sys.argv[1] if sys.argv[1:] and sys.argv[1].endswith(".py") else ""
if not file and sys.argv[1:3] != ["-m", {module!r}]:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
asked = [sys.argv[2 if file else 3:], os.getcwd(), dict(os.environ), file]
socket.send_fds(server, [b"x"], [0, 1, 2])
server.sendall(json.dumps(asked).encode())
server.shutdown(socket.SHUT_WR)
status = int(server.makefile().read() or 70)
if status < 0:
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


def import_all() -> None:
    """Import what the modes import, and let --mode=data measure speeds for a moment instead of two
    times two seconds. No device is used, and no thread is started."""
    modes = importlib.import_module("m3i_jax.modes")
    for name in modes.MODES:
        importlib.import_module(f"m3i_jax.modes.{name}")
    dataset_scan = importlib.import_module("m3i_jax.data.dataset_scan")
    dataset_scan.measure_speed.__kwdefaults__["seconds"] = 0.05
    # what is here is searched for garbage by no child, which would copy it
    gc.collect()
    gc.freeze()


def leave_out_estimates() -> None:
    """Let --mode=show print no measured speed, and traffic that is the same for every step: these
    are four of its five seconds."""
    show = importlib.import_module("m3i_jax.modes.show")
    kind = importlib.import_module("m3i_jax.profiling.traffic_model").StepTraffic
    traffic = {platform: kind(1e6, 1e6, 1e6) for platform in ("tpu", "cuda")}
    show.estimated_traffic = lambda trainer, state: traffic  # type: ignore[attr-defined]
    show.machine_line = lambda *_: ""  # type: ignore[attr-defined]


def fork() -> int:
    """A child of this process, which must have one thread: a lock of another would stay locked."""
    if (threads := len(os.listdir("/proc/self/task"))) != 1:
        raise RuntimeError(f"a child of a process with {threads} threads may hang")
    return os.fork()


def end_like_python(run: Callable[[], Any], error: int = 1) -> NoReturn:
    """Call a function and end this child as Python ends after a program: with its result or the
    status of its SystemExit, after threads and exit handlers.

    Args:
      run: the program, which returns its status.
      error: status after an exception.
    """
    status = error
    try:
        try:
            status = run()
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException:  # noqa: BLE001 - it must not come back into the parent
        traceback.print_exc()
        status = error
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def as_command(
    arguments: list[str], folder: str, environment: Mapping[str, str], file: str = ""
) -> int:
    """Run a command, or a file, in this child, whose standard streams are set, and return its
    status."""
    atexit._clear()  # the directories of the parent are its own to remove
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    sys.argv = [file or MODULE, *arguments]
    if file:  # `python FILE` finds modules beside the file
        sys.path.insert(0, os.path.dirname(os.path.abspath(file)))
        runpy.run_path(file, run_name="__main__")
        return 0
    sys.path.insert(0, folder)
    return importlib.import_module(MODULE).main()


def _receive(connection: socket.socket) -> tuple[list[int], list[Any]]:
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile("rb") as file:
        return streams, json.loads(file.read())


def serve(address: str) -> None:
    """Run the commands that clients send, side by side, until the parent ends. One --mode=show is
    whole, the others leave out what takes longest."""
    import_all()
    listener, parent = socket.socket(socket.AF_UNIX), os.getppid()
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    children: dict[int, socket.socket] = {}
    while os.getppid() == parent:
        some, _, _ = select.select([listener], [], [], 0.02 if children else 1.0)
        if some:
            connection, _ = listener.accept()
            streams, asked = _receive(connection)
            child = fork()
            if not child:
                os.setpgid(0, 0)
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                for opened in (*streams, listener.fileno(), connection.fileno()):
                    os.close(opened)
                end_like_python(lambda: as_command(*asked))
            for stream in streams:
                os.close(stream)
            if "--mode=show" in asked[0]:
                leave_out_estimates()
            children[child] = connection
        for child, connection in list(children.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                with contextlib.suppress(OSError):
                    connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
                connection.close()
                del children[child]
            elif select.select([connection], [], [], 0)[0] and not _alive(connection):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)


def _alive(connection: socket.socket) -> bool:
    """Whether the client is still there: it has sent all, so that its end is always readable."""
    poll = select.poll()
    poll.register(connection, select.POLLHUP)
    return not any(event & select.POLLHUP for _, event in poll.poll(0))


class ForkServer:
    """A server process, and `place/python` for scripts.

    Args:
      place: a directory of its own; a path of a socket has at most 107 characters.
      package: directory of the package m3i_jax.
      environment: of the server.
    """

    def __init__(
        self, place: pathlib.Path, package: pathlib.Path, environment: Mapping[str, str]
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="m3i_fork_")
        address = str(pathlib.Path(self._folder.name) / "socket")
        self._process = subprocess.Popen(
            [sys.executable, __file__, address],
            env={**environment, "PYTHONPATH": str(package)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout and self._process.stdout.readline() == b"ready\n"
        self.python = place / "python"
        self.python.write_text(CLIENT.format(python=sys.executable, module=MODULE, address=address))
        self.python.chmod(0o755)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()
        self._folder.cleanup()


if __name__ == "__main__":
    sys.path.pop(0)  # tests
    serve(sys.argv[1])
