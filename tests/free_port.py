"""Ports for tests with several processes."""

import itertools
import os
import socket

FIRST, LAST = 10_000, 32_000  # below those from which connections start
WORKERS = 16
# each worker of pytest takes one of 16 residues, so that no two choose the same port at once, and
# each pytest begins elsewhere
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS
_NUMBERS = itertools.count(os.getpid())


def free_port() -> int:
    """A port at which no process listens, and which no other test is given.

    A port that the system chooses, and that is closed again to be passed on, is free for any other
    process: the system gave the same one to two workers of pytest.
    """
    rows = (LAST - FIRST) // WORKERS
    for number in itertools.islice(_NUMBERS, rows):
        port = FIRST + number % rows * WORKERS + _WORKER
        try:
            socket.create_server(("", port)).close()
        except OSError:
            continue
        return port
    raise RuntimeError(f"no port of {FIRST} to {LAST} is free")


def free_address() -> str:
    """HOST:PORT of such a port."""
    return f"127.0.0.1:{free_port()}"
