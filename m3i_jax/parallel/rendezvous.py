"""Waiting for all processes before jax.distributed is initialized. Its client ends the process with
a stack trace when a process does not come; here the error names the missing one. Each process sends
one line of text to process 0 on the coordinator's port and gets one back; the port is free again
afterwards."""

import contextlib
import socket
import time
from collections.abc import Callable

from m3i_jax.errors import UserError
from m3i_jax.parallel.barriers import HostMissing

GO = "go"
_WORD = "m3i_jax"
FIRST_LOG, LOG_EVERY = 2.0, 15.0  # seconds of waiting before the first log line, and between lines


def now(text: str) -> None:
    """Print a line at once, also to a pipe or a file."""
    print(text, flush=True)


class _WaitLog:
    """Logs a wait after FIRST_LOG seconds, and every LOG_EVERY seconds from then on."""

    def __init__(self, log: Callable[[str], None], limit: float) -> None:
        self._log, self._limit, self._start, self._due = log, limit, time.monotonic(), FIRST_LOG

    def log(self, awaited: str) -> None:
        seconds = time.monotonic() - self._start
        if seconds >= self._due:
            self._due = seconds + LOG_EVERY
            self._log(f"waiting for {awaited}; {seconds:.0f} of at most {self._limit:.0f} seconds")


def resolve_address(coordinator: str) -> str:
    """The error of resolving the coordinator's name, "" if it has an address.

    >>> resolve_address("127.0.0.1:8476")
    ''
    """
    host, port = coordinator.rsplit(":", 1)
    try:
        socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return getattr(error, "strerror", None) or str(error)
    return ""


def wait_for_processes(
    coordinator: str,
    processes: int,
    process: int,
    *,
    limit: float,
    patient: bool = False,
    log: Callable[[str], None] = now,
) -> None:
    """Return when all processes have connected to process 0.

    Args:
      coordinator: HOST:PORT of process 0.
      processes, process: their number, and the index of this one.
      limit: seconds to wait.
      patient: wait for a name without an address, which a scheduler may still register; a name that
        a user gave is a mistake then.
      log: logs a line about a long wait.

    Raises:
      HostMissing: on all that came; names those that did not, or no process answers.
      UserError: the name has no address; on all, if two have the same index, or different counts.

    >>> wait_for_processes("localhost:1", 1, 0, limit=1.0)
    """
    if processes == 1:
        return
    deadline, wait_log = time.monotonic() + limit, _WaitLog(log, limit)
    while why := resolve_address(coordinator):
        if not patient or time.monotonic() > deadline:
            raise UserError(
                f"--coordinator {coordinator}: the name has no address here ({why}); give the name"
                " or the IP address of the first host"
            )
        wait_log.log(f"an address of {coordinator} ({why})")
        time.sleep(0.5)
    if process == 0:
        answer = _gather(coordinator, processes, deadline, limit, wait_log)
    else:
        answer = _report(coordinator, processes, process, deadline, limit, wait_log)
    if answer.startswith("wrong: "):
        raise UserError(answer.removeprefix("wrong: "))
    if answer != GO:
        raise HostMissing(answer)


def listen(port: int, backlog: int) -> socket.socket:
    """A server on all addresses of this machine, of IPv4 and IPv6; port 0: any that is free."""
    ipv6 = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=ipv6, backlog=backlog)


def _gather(
    coordinator: str, processes: int, deadline: float, limit: float, wait_log: _WaitLog
) -> str:
    """Process 0: accept the others and send all of them the same answer."""
    port, wrong = int(coordinator.rsplit(":", 1)[1]), ""
    connected, peers = dict[int, tuple[str, socket.socket]](), list[socket.socket]()
    try:
        server = listen(port, processes)
    except OSError as error:
        raise UserError(
            f"--coordinator {coordinator}: port {port} cannot be used here ({error.strerror});"
            " choose another one"
        ) from None
    with server:
        server.settimeout(0.5)
        while len(connected) < processes - 1 and not wrong and time.monotonic() < deadline:
            wait_log.log(
                f"process {_list_some([n for n in range(1, processes) if n not in connected])} of"
                f" {processes} at {coordinator}"
            )
            # no process connected in that half second, or another program did
            with contextlib.suppress(OSError, ValueError):
                peer, _ = server.accept()
                peer.settimeout(5.0)
                word, number, count, name = peer.recv(400).decode().split()
                if word != _WORD:
                    continue
                index = int(number)
                if int(count) != processes:
                    wrong = (
                        f"wrong: --processes: process {number} on {name} is one of {count}, process"
                        f" 0 is one of {processes}"
                    )
                elif index in connected and _is_alive(connected[index][1]):
                    wrong = (
                        f"wrong: --process-id: {number} was given twice, on {connected[index][0]}"
                        f" and on {name}"
                    )
                connected[index] = name, peer
                peers.append(peer)
    answer = GO
    if missing := [n for n in range(1, processes) if n not in connected]:
        answer = (
            f"start: waited {limit:.0f} seconds at {coordinator} for process {_list_some(missing)}"
            f" of {processes}; look into their output, and whether they can reach that address"
        )
    answer = wrong or answer
    for peer in peers:
        with contextlib.suppress(OSError), peer:
            peer.sendall(f"{answer}\n".encode())
    return answer


def _list_some(missing: list[int]) -> str:
    """At most eight numbers for a message."""
    return ", ".join(map(str, missing[:8])) + (
        f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    )


def _is_alive(peer: socket.socket) -> bool:
    """Whether a connection is still open: a process that was restarted replaces the one before."""
    peer.settimeout(0.2)
    try:
        return peer.recv(1) != b""
    except TimeoutError:
        return True
    except OSError:
        return False


def _report(
    coordinator: str,
    processes: int,
    process: int,
    deadline: float,
    limit: float,
    wait_log: _WaitLog,
) -> str:
    """Another process: send its index to process 0 and wait for the answer."""
    host, port = coordinator.rsplit(":", 1)
    while time.monotonic() < deadline:
        why = "it closed the connection"
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5.0) as line:
                line.sendall(
                    f"{_WORD} {process} {processes} {socket.gethostname() or '-'}\n".encode()
                )
                line.settimeout(0.5)
                # process 0 may have started later, so that its limit ends later
                if answer := _read_answer(
                    line,
                    deadline + 5.0,
                    lambda: wait_log.log(f"the other processes, with process 0 at {coordinator}"),
                ):
                    return answer
        except OSError as error:
            why = error.strerror or str(error)
        wait_log.log(f"process 0 at {coordinator} ({why})")
        time.sleep(0.3)
    return (
        f"start: waited {limit:.0f} seconds for process 0 at {coordinator}; look into its output,"
        " and whether it can be reached there"
    )


def _read_answer(line: socket.socket, deadline: float, on_wait: Callable[[], None]) -> str:
    """The line that process 0 sends, "" if it closes the connection without one; `on_wait` is
    called twice a second."""
    text = b""
    while not text.endswith(b"\n") and time.monotonic() < deadline:
        try:
            received = line.recv(4096)
        except TimeoutError:
            on_wait()
            continue
        if not received:
            return ""
        text += received
    return text.decode(errors="replace").strip()
