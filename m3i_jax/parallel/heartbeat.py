"""Signs of life between the hosts of a run. jax.distributed notices a dead host after a minute or
more, and then ends the others with a stack of C++ that names nobody; here every host has a line to
the first one, both ends send a sign now and then, and whoever is silent for too long, or whose line
breaks without a farewell, is named by all others, which end at once: what launched them starts all
again."""

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

from m3i_jax.errors import UserError
from m3i_jax.parallel import barriers

LIMIT = 60.0  # seconds
TOGETHER = 3.0  # seconds within which all hosts fail, if what failed is the same for all
_KEY = "m3i/heartbeat"
_BEAT, _BYE, _LOST = b".\n", b"bye\n", b"lost "
_beats: list["Heartbeat"] = []  # of this process: one, or none


class Heartbeat:
    """The lines of this host: to all others on the first, to the first on the others.

    Args:
      limit: seconds of silence after which a host is lost.
      ended: called with the line that says so; ends the process.
    """

    def __init__(self, limit: float, ended: Callable[[str], None]):
        self.limit, self._ended = limit, ended
        # host -> its name; the store that has it may be lost, or not answer, when it is wanted
        self._names: dict[int, str] = {}
        self._lines: dict[int, socket.socket] = {}  # host -> line
        self._heard: dict[int, float] = {}  # host -> when
        self._text: dict[int, bytes] = {}  # host -> what is not a whole line yet
        self._choose, self._closed = selectors.DefaultSelector(), threading.Event()
        self._door: socket.socket | None = None
        self.status = 0  # that the process will end with, as far as is known
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def open(self) -> "Heartbeat":
        """Connect. Of several hosts, all call this. Raises OSError if the first host cannot be
        reached on another port."""
        if barriers.host_name() == 0:
            self._door = socket.create_server(("", 0), backlog=barriers.host_names())
            self._choose.register(self._door, selectors.EVENT_READ, None)
            barriers.publish(_KEY, str(self._door.getsockname()[1]))
            now = time.monotonic()
            self._heard = {number: now for number in range(1, barriers.host_names())}
        else:
            address = barriers.coordinator().rsplit(":", 1)[0].strip("[]")
            line = socket.create_connection(
                (address, int(barriers.read_published(_KEY))), timeout=min(self.limit, 20.0)
            )
            line.sendall(
                f"{barriers.host_name()} {barriers.host_label(barriers.host_name())}\n".encode()
            )
            self._names[0] = barriers.host_label(0)
            self._adopt(0, line)
        self._thread.start()
        return self

    def _adopt(self, number: int, line: socket.socket) -> None:
        line.setblocking(False)
        self._lines[number], self._heard[number], self._text[number] = line, time.monotonic(), b""
        self._choose.register(line, selectors.EVENT_READ, number)

    def refuse(self, status: int) -> None:
        """A mistake of a person ends this process with a status: that is no other host's doing, so
        nobody is missed any more."""
        self.status = status
        self._closed.set()

    def close(self) -> bool:
        """Take leave, so that the others do not miss this host; with a status they shall. Then it
        first waits a moment, since what failed here may be that another one is lost, which is worth
        saying instead.

        Returns: whether others were left in the middle of the run, that is not all have failed as
        this host did, or are done."""
        if self.status:
            self._thread.join(timeout=1.0)
        self._closed.set()  # from here on nobody is missed
        left = False
        if self.status and self._heard:
            try:
                barriers.barrier("failed", limit=TOGETHER)
            except barriers.HostMissing:
                left = True
        if not left:
            self._tell(_BYE)
        self._thread.join(timeout=2.0)
        for line in (*self._lines.values(), *([self._door] if self._door else [])):
            with contextlib.suppress(OSError):
                line.close()
        return left

    def _tell(self, text: bytes) -> None:
        for line in list(self._lines.values()):
            # a line that broke, or is full because nobody reads: found out by its silence
            with contextlib.suppress(OSError):
                line.send(text)

    def _watch(self) -> None:
        beat, period = 0.0, min(max(self.limit / 5, 0.1), 5.0)
        while not self._closed.is_set():
            for key, _ in self._choose.select(timeout=min(period, 0.5)):
                if key.data is None:
                    self._enter()
                else:
                    self._read(key.data)
            now = time.monotonic()
            if now >= beat:
                beat = now + period
                self._tell(_BEAT)
            for number, heard in list(self._heard.items()):
                if now - heard > self.limit:
                    self._lost(number, f"silent for {self.limit:.0f} seconds")

    def _enter(self) -> None:
        """Another host comes: it says its number and its name."""
        assert self._door
        with contextlib.suppress(OSError, ValueError):
            line, _ = self._door.accept()
            line.settimeout(2.0)
            hello, _, more = line.recv(512).partition(b"\n")
            first, _, name = hello.decode(errors="replace").partition(" ")
            number = int(first)
            if number in self._heard and number not in self._lines:
                # whoever finds the door may have said it
                self._names[number] = "".join(c for c in name if c.isprintable())
                self._adopt(number, line)
                self._text[number] = more

    def _read(self, number: int) -> None:
        try:
            got = self._lines[number].recv(4096)
        except BlockingIOError:
            return
        except OSError:
            got = b""
        self._heard[number] = time.monotonic()
        *whole, self._text[number] = (self._text[number] + got).split(b"\n")
        for word in whole:
            if word + b"\n" == _BYE:
                got = b""
                del self._heard[number]
            elif word.startswith(_LOST):
                self._ended(word[len(_LOST) :].decode(errors="replace"))
        if not got:
            self._choose.unregister(self._lines[number])
            self._lines.pop(number).close()
            if number in self._heard:
                self._lost(number, "its process ended")

    def _lost(self, number: int, why: str) -> None:
        self._heard.pop(number, None)
        if self._closed.is_set():
            return
        who = self._names.get(number) or f"host {number}"
        text = (
            f"lost {who}: {why}; look into its output, and start all hosts again to go on from the"
            " last checkpoint"
        )
        if barriers.host_name() == 0 and barriers.host_names() > 2:
            self._tell(_LOST + text.encode() + b"\n")
            # with this process the coordinator goes, and with it those that have not read that yet
            time.sleep(1.0)
        self._ended(text)


def end_heartbeat(text: str) -> None:
    """Says why and ends the process now: what waits for a host that is gone cannot be unwound."""
    with contextlib.suppress(OSError):
        os.write(2, f"m3i_jax: {text}\n".encode())
    os._exit(1)


def start_heartbeat(limit: float, say: Callable[[str], None] = print) -> None:
    """Begin to listen for the other hosts, until the process ends. Nothing to do alone, or with a
    limit of 0."""
    if barriers.host_names() == 1 or not limit:
        return
    beat = Heartbeat(limit, end_heartbeat)
    try:
        beat.open()
    except (OSError, ValueError) as error:
        say(
            f"warning: no heartbeats from {barriers.host_label(0)} ({error}); a lost host is only"
            " noticed by jax.distributed, without its name"
        )
        return
    before = sys.excepthook

    def hook(
        kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
    ) -> None:
        beat.status = 1
        before(kind, error, trace)

    sys.excepthook = hook
    _beats.append(beat)
    # Registered after jax's own, so called before it: that one waits for hosts that may be lost.
    atexit.register(_leave, beat)


def _leave(beat: Heartbeat) -> None:
    # what waits for this host has ended, and jax would wait for that before it aborts this process
    # too
    if beat.close():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        if barriers.host_name() == 0:
            # with this process the coordinator goes, and with it those that have not seen that yet
            time.sleep(1.0)
        os._exit(beat.status)


@contextlib.contextmanager
def refuse_on_error() -> Iterator[None]:
    """A mistake that is told on one line within the block ends the other hosts too, should this one
    alone have met it: such as a file that vanished, which only the host whose turn it was has seen.
    They would wait for it.

    >>> with refuse_on_error(): print("alone, nothing is to be done")
    alone, nothing is to be done
    """
    try:
        yield
    except UserError as error:
        for beat in _beats:
            beat.refuse(error.status)
        raise
