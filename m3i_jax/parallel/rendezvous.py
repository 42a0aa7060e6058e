"""Before jax.distributed: do all processes exist, and can they reach the first? Its own client ends
the process with a stack trace when they do not come; here the one that is missing is named. One
line of text each way, on the coordinator's port, which is free again afterwards."""

import contextlib
import socket
import time
from collections.abc import Callable

from m3i_jax.errors import UserError
from m3i_jax.parallel.barriers import HostMissing

GO = "go"
_WORD = "m3i_jax"
FIRST, AGAIN = 2.0, 15.0  # seconds of waiting before the first line about it, and between two lines


def now(text: str) -> None:
    """Prints a line that must be read at once, also where the output is a pipe or a file."""
    print(text, flush=True)


class _Waiting:
    """A line about a wait that lasts: after FIRST seconds, and every AGAIN seconds from then on."""

    def __init__(self, say: Callable[[str], None], limit: float) -> None:
        self._say, self._limit, self._began, self._due = say, limit, time.monotonic(), FIRST

    def on(self, what: str) -> None:
        now = time.monotonic() - self._began
        if now >= self._due:
            self._due = now + AGAIN
            self._say(f"waiting for {what}; {now:.0f} of at most {self._limit:.0f} seconds")


def resolve(coordinator: str) -> str:
    """Why the name of the coordinator has no address, "" if it has one.

    >>> resolve("127.0.0.1:8476")
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
    say: Callable[[str], None] = now,
) -> None:
    """Returns when all processes have come to the first.

    Args:
      coordinator: HOST:PORT of process 0.
      processes, process: how many there are, and which this is.
      limit: seconds to wait.
      patient: a name without an address may get one yet, as where a scheduler made it; one that a
        person gave is a mistake.
      say: gets a line about a wait that lasts.

    Raises:
      HostMissing: on all that came, with those that did not; or no process answers at the address.
      UserError: the name has no address; on all, if two have the same number, or counts differ.

    >>> wait_for_processes("localhost:1", 1, 0, limit=1.0)
    """
    if processes == 1:
        return
    deadline, waiting = time.monotonic() + limit, _Waiting(say, limit)
    while why := resolve(coordinator):
        if not patient or time.monotonic() > deadline:
            raise UserError(
                f"--coordinator {coordinator}: the name has no address here ({why}); give the name"
                " or the IP address of the first host"
            )
        waiting.on(f"an address of {coordinator} ({why})")
        time.sleep(0.5)
    if process == 0:
        answer = _gather(coordinator, processes, deadline, limit, waiting)
    else:
        answer = _report(coordinator, processes, process, deadline, limit, waiting)
    if answer.startswith("wrong: "):
        raise UserError(answer.removeprefix("wrong: "))
    if answer != GO:
        raise HostMissing(answer)


def _gather(
    coordinator: str, processes: int, deadline: float, limit: float, waiting: _Waiting
) -> str:
    """Process 0: hears the others and tells all of them the same."""
    port, wrong = int(coordinator.rsplit(":", 1)[1]), ""
    seen, peers = dict[int, tuple[str, socket.socket]](), list[socket.socket]()
    six = socket.has_dualstack_ipv6()
    try:
        door = socket.create_server(
            ("", port),
            family=socket.AF_INET6 if six else socket.AF_INET,
            dualstack_ipv6=six,
            backlog=processes,
        )
    except OSError as error:
        raise UserError(
            f"--coordinator {coordinator}: port {port} cannot be used here ({error.strerror});"
            " choose another one"
        ) from None
    with door:
        door.settimeout(0.5)
        while len(seen) < processes - 1 and not wrong and time.monotonic() < deadline:
            waiting.on(
                f"process {_named([n for n in range(1, processes) if n not in seen])} of"
                f" {processes} at {coordinator}"
            )
            # none came in that half second, or it was another program
            with contextlib.suppress(OSError, ValueError):
                peer, _ = door.accept()
                peer.settimeout(5.0)
                word, number, count, name = peer.recv(400).decode().split()
                if word != _WORD:
                    continue
                at = int(number)
                if int(count) != processes:
                    wrong = (
                        f"wrong: --processes: process {number} on {name} is one of {count}, process"
                        f" 0 is one of {processes}"
                    )
                elif at in seen and _alive(seen[at][1]):
                    wrong = (
                        f"wrong: --process-id: {number} was given twice, on {seen[at][0]} and on"
                        f" {name}"
                    )
                seen[at] = name, peer
                peers.append(peer)
    answer = GO
    if missing := [n for n in range(1, processes) if n not in seen]:
        answer = (
            f"start: waited {limit:.0f} seconds at {coordinator} for process {_named(missing)} of"
            f" {processes}; look into their output, and whether they can reach that address"
        )
    answer = wrong or answer
    for peer in peers:
        with contextlib.suppress(OSError), peer:
            peer.sendall(f"{answer}\n".encode())
    return answer


def _named(missing: list[int]) -> str:
    """Numbers for a message, not more than eight of them."""
    return ", ".join(map(str, missing[:8])) + (
        f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    )


def _alive(peer: socket.socket) -> bool:
    """Whether the other end still listens: a process that was started anew replaces the one
    before."""
    peer.settimeout(0.2)
    try:
        return peer.recv(1) != b""
    except TimeoutError:
        return True
    except OSError:
        return False


def _report(
    coordinator: str, processes: int, process: int, deadline: float, limit: float, waiting: _Waiting
) -> str:
    """Another process: gives its number and waits for the answer."""
    host, port = coordinator.rsplit(":", 1)
    while time.monotonic() < deadline:
        why = "it ended the connection"
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5.0) as line:
                line.sendall(
                    f"{_WORD} {process} {processes} {socket.gethostname() or '-'}\n".encode()
                )
                line.settimeout(0.5)
                # Process 0 may have started later, and its limit ends later.
                if answer := _answer(
                    line,
                    deadline + 5.0,
                    lambda: waiting.on(f"the other processes, with process 0 at {coordinator}"),
                ):
                    return answer
        except OSError as error:
            why = error.strerror or str(error)
        waiting.on(f"process 0 at {coordinator} ({why})")
        time.sleep(0.3)
    return (
        f"start: waited {limit:.0f} seconds for process 0 at {coordinator}; look into its output,"
        " and whether it can be reached there"
    )


def _answer(line: socket.socket, deadline: float, waits: Callable[[], None]) -> str:
    """The line of text that process 0 sends, "" if it ends the connection without one; `waits` is
    called twice a second."""
    text = b""
    while not text.endswith(b"\n") and time.monotonic() < deadline:
        try:
            got = line.recv(4096)
        except TimeoutError:
            waits()
            continue
        if not got:
            return ""
        text += got
    return text.decode(errors="replace").strip()
