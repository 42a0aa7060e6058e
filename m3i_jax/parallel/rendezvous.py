"""Before jax.distributed: do all processes exist, and can they reach the first? Its own client ends
the process with a stack trace when they do not come; here the one that is missing is named. One
line of text each way, on the coordinator's port, which is free again afterwards."""

import contextlib
import socket
import time

from m3i_jax.errors import UserError
from m3i_jax.parallel.barriers import HostMissing

GO = "go"
_WORD = "m3i_jax"


def wait_for_processes(coordinator: str, processes: int, process: int, *, limit: float) -> None:
    """Returns when all processes have come to the first.

    Args:
      coordinator: HOST:PORT of process 0.
      processes, process: how many there are, and which this is.
      limit: seconds to wait.

    Raises:
      HostMissing: on all that came, with those that did not; or nobody answers at the address.
      UserError: on all, if two have the same number or their counts differ.

    >>> wait_for_processes("localhost:1", 1, 0, limit=1.0)
    """
    if processes == 1:
        return
    deadline = time.monotonic() + limit
    answer = (
        _gather(coordinator, processes, deadline, limit)
        if process == 0
        else _report(coordinator, processes, process, deadline, limit)
    )
    if answer.startswith("wrong: "):
        raise UserError(answer.removeprefix("wrong: "))
    if answer != GO:
        raise HostMissing(answer)


def _gather(coordinator: str, processes: int, deadline: float, limit: float) -> str:
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
            # nobody came in that half second, or it was somebody else
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
    missing = [str(n) for n in range(1, processes) if n not in seen]
    answer = GO
    if missing:
        shown = ", ".join(missing[:8]) + (
            f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        )
        answer = (
            f"start: waited {limit:.0f} seconds at {coordinator} for process {shown} of"
            f" {processes}; look into their output, and whether they can reach that address"
        )
    answer = wrong or answer
    for peer in peers:
        with contextlib.suppress(OSError), peer:
            peer.sendall(f"{answer}\n".encode())
    return answer


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


def _report(coordinator: str, processes: int, process: int, deadline: float, limit: float) -> str:
    """Another process: says who it is and waits for the answer."""
    host, port = coordinator.rsplit(":", 1)
    while time.monotonic() < deadline:
        with (
            contextlib.suppress(OSError),
            socket.create_connection((host.strip("[]"), int(port)), timeout=5.0) as line,
        ):
            line.sendall(f"{_WORD} {process} {processes} {socket.gethostname() or '-'}\n".encode())
            # process 0 may have started later, and its limit ends later
            line.settimeout(max(deadline - time.monotonic(), 0) + 5.0)
            with line.makefile(encoding="utf-8", errors="replace") as text:
                if answer := text.readline().strip():
                    return answer
        time.sleep(0.3)
    return (
        f"start: waited {limit:.0f} seconds for process 0 at {coordinator}; look into its output,"
        " and whether it can be reached there"
    )
