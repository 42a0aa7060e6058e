"""Heartbeats between the hosts of a run. jax.distributed notices a dead host after a minute or
more, and ends the others with a C++ stack trace that names no host. Here every host has a
connection to host 0, and both ends send heartbeats. A host that is silent for too long, or whose
connection breaks without a goodbye, is lost: all others log its name and exit at once, and the
launcher restarts all. A host that ends for a reason that it knows sends that first, with its exit
code: the others end with the same code and one line."""

import atexit
import contextlib
import os
import selectors
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator

from m3i_jax.errors import UserError, one_line
from m3i_jax.parallel import barriers, rendezvous

LIMIT = 60.0  # seconds
TOGETHER = 3.0  # seconds within which all hosts fail from a common cause
_KEY = "m3i/heartbeat"
_BEAT, _BYE, _LOST, _ENDS = b".\n", b"bye\n", b"lost ", b"ends "
_running: list["Heartbeat"] = []  # of this process: one, or none


class Heartbeat:
    """The connections of this host: host 0 has one to each other host, the others one to host 0.

    Args:
      limit: seconds of silence after which a host is lost.
      on_lost: called with a message about the lost host, and the exit code that it sent if it did;
        ends the process.
    """

    def __init__(self, limit: float, on_lost: Callable[..., None]):
        self.limit, self._on_lost = limit, on_lost
        # host -> name; kept here, since the store may be gone when a host is lost
        self._names: dict[int, str] = {}
        self._connections: dict[int, socket.socket] = {}  # by host
        self._last_heard: dict[int, float] = {}  # host -> time
        self._buffers: dict[int, bytes] = {}  # host -> bytes of an unfinished line
        self._selector, self._closed = selectors.DefaultSelector(), threading.Event()
        self._server: socket.socket | None = None
        self.status = 0  # exit status of the process, as far as is known
        self._why = ""  # the mistake that ends this process
        self._label = ""  # of this host; kept here, as the names
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def open(self) -> "Heartbeat":
        """Connect; all hosts call this. Raises OSError if host 0 cannot be reached on its port."""
        self._label = barriers.host_label(barriers.host_name())
        if barriers.host_name() == 0:
            self._server = rendezvous.listen(0, barriers.host_names())
            self._selector.register(self._server, selectors.EVENT_READ, None)
            barriers.publish(_KEY, str(self._server.getsockname()[1]))
            now = time.monotonic()
            self._last_heard = {number: now for number in range(1, barriers.host_names())}
        else:
            address = barriers.coordinator().rsplit(":", 1)[0].strip("[]")
            connection = socket.create_connection(
                (address, int(barriers.read_published(_KEY))), timeout=min(self.limit / 2, 20.0)
            )
            connection.sendall(f"{barriers.host_name()} {self._label}\n".encode())
            self._names[0] = barriers.host_label(0)
            self._add(0, connection)
        self._thread.start()
        return self

    def _add(self, number: int, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connections[number], self._buffers[number] = connection, b""
        self._last_heard[number] = time.monotonic()
        self._selector.register(connection, selectors.EVENT_READ, number)

    def leave_out(self, hosts: list[int]) -> None:
        """These hosts send no heartbeats, so their silence means nothing."""
        for number in hosts:
            self._last_heard.pop(number, None)

    def refuse(self, status: int, why: str) -> None:
        """A user's mistake ends this process with a status: from here on no other host counts as
        lost."""
        self.status, self._why = status, why
        self._closed.set()

    def end_all(self, status: int, why: str) -> None:
        """Tell the other hosts that this process ends now, with this status and for this reason."""
        self._closed.set()
        text = f"{status} {self._label}: {one_line(why, 1000)}"
        self._send(_ENDS + text.encode(errors="replace") + b"\n")
        if barriers.host_name() == 0:
            # the coordinator ends with this process, and with it hosts that have not read this
            time.sleep(1.0)

    def close(self) -> bool:
        """Send a goodbye, so that this host does not count as lost; with a status it shall. Then it
        first waits a moment: what failed here may be the loss of another host, which is the better
        message.

        Returns: whether other hosts are still in the middle of the run: not all of them failed as
        well, or are done."""
        if self.status:
            self._thread.join(timeout=1.0)
        self._closed.set()  # from here on no host counts as lost
        abandoned = False
        if self.status and self._last_heard:
            try:
                barriers.barrier("failed", limit=TOGETHER)
            except barriers.HostMissing:
                abandoned = True
        if not abandoned:
            self._send(_BYE)
        elif self._why:
            self.end_all(self.status, self._why)
        self._thread.join(timeout=2.0)
        for one in (*self._connections.values(), *([self._server] if self._server else [])):
            with contextlib.suppress(OSError):
                one.close()
        return abandoned

    def _send(self, text: bytes) -> None:
        for connection in list(self._connections.values()):
            # one that is broken, or full because the host hangs, is detected by its silence
            with contextlib.suppress(OSError):
                connection.send(text)

    def _watch(self) -> None:
        next_beat, period = 0.0, min(max(self.limit / 5, 0.1), 5.0)
        while not self._closed.is_set():
            for key, _ in self._selector.select(timeout=min(period, 0.5)):
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + period
                self._send(_BEAT)
            for number, last in list(self._last_heard.items()):
                if now - last > self.limit:
                    self._lost(number, f"silent for {self.limit:.0f} seconds")

    def _accept(self) -> None:
        """Accept another host, which sends its number and its name."""
        assert self._server
        with contextlib.suppress(OSError, ValueError):
            connection, _ = self._server.accept()
            connection.settimeout(2.0)
            hello, _, rest = connection.recv(512).partition(b"\n")
            first, _, name = hello.decode(errors="replace").partition(" ")
            number = int(first)
            if number in self._last_heard and number not in self._connections:
                # any program may have connected and sent this name
                self._names[number] = "".join(c for c in name if c.isprintable())
                self._add(number, connection)
                self._buffers[number] = rest

    def _read(self, number: int) -> None:
        try:
            received = self._connections[number].recv(4096)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        self._last_heard[number] = time.monotonic()
        *lines, self._buffers[number] = (self._buffers[number] + received).split(b"\n")
        for line in lines:
            if line + b"\n" == _BYE:
                received = b""
                del self._last_heard[number]
            elif line.startswith(_LOST):
                self._on_lost(line[len(_LOST) :].decode(errors="replace"))
            elif line.startswith(_ENDS) and not self._closed.is_set():
                self._ended(number, line)
        if not received:
            self._selector.unregister(self._connections[number])
            self._connections.pop(number).close()
            if number in self._last_heard:
                self._lost(number, "its process ended")

    def _ended(self, number: int, line: bytes) -> None:
        """A host said with which status it ends, and why."""
        status, _, text = line[len(_ENDS) :].decode(errors="replace").partition(" ")
        if not status.isascii() or not status.isdigit() or not 0 < int(status) < 256:
            return
        self._last_heard.pop(number, None)
        if barriers.host_name() == 0 and barriers.host_names() > 2:
            self._send(line + b"\n")
            time.sleep(1.0)
        self._on_lost("".join(c for c in text if c.isprintable()), int(status))

    def _lost(self, number: int, why: str) -> None:
        self._last_heard.pop(number, None)
        if self._closed.is_set():
            return
        host = self._names.get(number) or f"host {number}"
        text = (
            f"lost {host}: {why}; look into its output, and start all hosts again to resume from"
            " the last checkpoint"
        )
        if barriers.host_name() == 0 and barriers.host_names() > 2:
            self._send(_LOST + text.encode() + b"\n")
            # the coordinator ends with this process, and with it hosts that have not read the
            # message
            time.sleep(1.0)
        self._on_lost(text)


def end_heartbeat(text: str, status: int = 1) -> None:
    """Print a message and end the process now: a wait for a lost host cannot be unwound."""
    with contextlib.suppress(OSError):
        os.write(2, f"m3i_jax: {text}\n".encode())
    os._exit(status)


def end_hosts(status: int, why: str) -> None:
    """Tell the other hosts that this process ends now, with this status and for this reason: they
    end in the same way. With one host it does nothing."""
    for heartbeat in _running:
        heartbeat.end_all(status, why)


def start_heartbeat(limit: float, log: Callable[[str], None] = print) -> None:
    """Start the heartbeats of this process, unless the limit is 0; all hosts call this. With one
    host, or if they were started, it does nothing."""
    if barriers.host_names() == 1 or _running:
        return
    heartbeat, first, reason = Heartbeat(limit, end_heartbeat), barriers.host_name() == 0, ""
    try:
        if limit:
            heartbeat.open()
        else:
            reason = "parallel.heartbeat is 0"
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
    if first and reason:  # the others wait for its port
        barriers.publish(_KEY, "")
    # host 0 would take a host that cannot connect, as behind a firewall, for lost
    reasons = barriers.exchange_values("heartbeats", reason)
    silent = [number for number, text in enumerate(reasons) if text]
    heartbeat.leave_out(silent)
    if limit and (reason or (first and silent)):
        number = silent[0] if first and not reason else 0
        more = f" and {len(silent) - 1} more" if number and len(silent) > 1 else ""
        log(
            f"warning: no heartbeats from {barriers.host_label(number)}{more}"
            f" ({reasons[number] or reason}); only jax.distributed detects a lost host, without its"
            " name"
        )
    if reason:
        return
    before = sys.excepthook

    def hook(
        kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
    ) -> None:
        heartbeat.status = 1
        before(kind, error, trace)

    sys.excepthook = hook
    _running.append(heartbeat)
    # registered after jax's exit function, so called before it, which waits for lost hosts
    atexit.register(_close_at_exit, heartbeat)


def _close_at_exit(heartbeat: Heartbeat) -> None:
    # the other hosts exit, and jax would wait for them before it aborts this process too
    if heartbeat.close():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        if barriers.host_name() == 0:
            # the coordinator ends with this process, and with it hosts that have not noticed yet
            time.sleep(1.0)
        os._exit(heartbeat.status)


@contextlib.contextmanager
def refuse_on_error() -> Iterator[None]:
    """End the other hosts too if the block raises an error that only this host has, such as a file
    that vanished while host 0 read it, or a bug. They would wait for this host.

    >>> with refuse_on_error(): print("one host")
    one host
    """
    try:
        yield
    except UserError as error:
        for heartbeat in _running:
            heartbeat.refuse(error.status, str(error))
        raise
    except Exception:  # main prints it and exits without `sys.excepthook`
        for heartbeat in _running:
            heartbeat.status = 1
        raise
