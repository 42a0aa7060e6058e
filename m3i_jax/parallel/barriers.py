"""What the hosts of a run tell each other beside the arrays: through the key-value store of
jax.distributed, never through a collective, so that a host that hangs or died is found out.
Everything here has a limit and names the host that is missing; alone, everything is free."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jax._src import distributed as _distributed  # the store has no public name

from m3i_jax.errors import RunStopped

LIMIT = 600.0  # seconds
NOTICE = 15.0  # seconds of waiting for other hosts that are worth a line, and between two of them
_log = logging.getLogger(__name__)
_rounds: dict[str, int] = {}


class HostMissing(RunStopped):
    """A host did not come to a meeting in time."""


def _client() -> Any:
    return _distributed.global_state.client


def host_names() -> int:
    """Processes of this run; asks no device, so it may come before the first use of one.

    >>> host_names(), host_name()
    (1, 0)
    """
    return _distributed.global_state.num_processes if _client() else 1


def host_name() -> int:
    """Number of this process, from 0."""
    return _distributed.global_state.process_id if _client() else 0


def host_label(number: int) -> str:
    """A host as a person knows it: its number and, if it has told it, its name."""
    try:
        return f"host {number} ({_client().key_value_try_get(f'm3i/name/{number}')})"
    except Exception:  # it never told, or there is no store any more
        return f"host {number}"


def announce_host(name: str) -> None:
    """Tell the name that messages of other hosts call this one by."""
    if host_names() > 1:
        _client().key_value_set(f"m3i/name/{host_name()}", name, allow_overwrite=True)


def coordinator() -> str:
    """HOST:PORT of the first process, "" alone."""
    return _distributed.global_state.coordinator_address or ""


def publish(key: str, text: str) -> None:
    """Leave a text for all hosts."""
    _client().key_value_set(key, text, allow_overwrite=True)


def read_published(key: str, *, limit: float = LIMIT) -> str:
    """What a host left under a key, as soon as it is there. Raises HostMissing."""
    try:
        return _client().blocking_key_value_get(key, int(limit * 1000))
    except Exception as error:
        raise HostMissing(
            f"{key}: waited {limit:.0f} seconds; look into the output of {host_label(0)}"
            f" ({str(error).splitlines()[0]})"
        ) from None


def exchange_values(name: str, text: str, *, limit: float = LIMIT) -> list[str]:
    """Every host's text, in the order of the hosts. A meeting: nobody leaves before all have come.

    Args:
      name: of the meeting; all hosts come to the meetings of one name in the same order.
      text: what this host says; short, since every host reads all of it.
      limit: seconds to wait for the last host.

    Raises:
      HostMissing: with the hosts that did not come in time.

    >>> exchange_values("docs", "here")
    ['here']
    """
    if host_names() == 1:
        return [text]
    round_ = _rounds[name] = _rounds.get(name, -1) + 1
    room, me, client = f"m3i/{name}/{round_}/", host_name(), _client()
    client.key_value_set(f"{room}{me:06d}", text or " ")
    try:
        with _noticed(name, room):
            client.wait_at_barrier(f"m3i/{name}/{round_}", int(limit * 1000))
    except Exception as error:
        who = ", ".join(host_label(n) for n in _missing(room)) or "no host, but one of them failed"
        if host_name() == 0:
            # with this process the store goes, which the others still ask who is missing
            time.sleep(1.0)
        raise HostMissing(
            f"{name}: waited {limit:.0f} seconds for {who}; look into its output"
            f" ({str(error).splitlines()[0]})"
        ) from None
    said = [value.rstrip(" ") for _, value in sorted(_told(room))]
    if round_:  # all that are here have read what was said before
        with contextlib.suppress(Exception):
            client.key_value_delete(f"m3i/{name}/{round_ - 1}/{me:06d}")
    return said


def _missing(room: str) -> list[int]:
    """Hosts that have not come to a meeting yet."""
    return sorted(set(range(host_names())) - {int(key.rsplit("/", 1)[1]) for key, _ in _told(room)})


@contextlib.contextmanager
def _noticed(name: str, room: str) -> Iterator[None]:
    """A block that waits logs, every NOTICE seconds, for whom."""
    came, began = threading.Event(), time.monotonic()

    def log() -> None:
        while not came.wait(NOTICE):
            who = ", ".join(host_label(number) for number in _missing(room))
            if who and not came.is_set():
                _log.warning(
                    "%s: waiting for %s (%.0f seconds so far)", name, who, time.monotonic() - began
                )

    threading.Thread(target=log, name="barrier", daemon=True).start()
    try:
        yield
    finally:
        came.set()


def _told(room: str) -> list[tuple[str, str]]:
    try:
        return _client().key_value_dir_get(room)
    except Exception:  # the coordinator itself is gone
        return []


def barrier(name: str, *, limit: float = LIMIT) -> None:
    """Until every host is here. Raises HostMissing."""
    exchange_values(name, "", limit=limit)


@contextlib.contextmanager
def host0_first(name: str, *, limit: float = 6 * 3600.0) -> Iterator[None]:
    """Host 0 does the block, then all others do: what is made once in a shared directory is found
    there by them. Nobody goes on before all have done it, so that an error of one ends all.

    Raises:
      HostMissing: another host failed in the block, or took longer than the limit in seconds.

    >>> with host0_first("docs"): print("made")
    made
    """
    if host_names() == 1:
        yield
        return
    round_ = _rounds[name] = _rounds.get(name, -1) + 1
    key, client = f"m3i/first/{name}/{round_}", _client()
    if host_name():
        try:
            client.blocking_key_value_get(key, int(limit * 1000))
        except Exception:
            raise HostMissing(
                f"{name}: waited {limit:.0f} seconds for {host_label(0)}; look into its output"
            ) from None
    try:
        if host_name() and client.key_value_try_get(key) != "done":
            raise HostMissing(f"{name}: {host_label(0)} failed; its output says why")
        yield
    except BaseException:
        if not host_name():
            client.key_value_set(key, "failed")
        # the others are told; what happened here is said here
        with contextlib.suppress(HostMissing):
            exchange_values(f"{name}, done", "failed", limit=60.0)
        raise
    if not host_name():
        client.key_value_set(key, "done")
    said = exchange_values(f"{name}, done", "done", limit=limit)
    if failed := [host_label(number) for number, verdict in enumerate(said) if verdict != "done"]:
        raise HostMissing(f"{name}: {', '.join(failed)} failed; its output says why")


class CoordinatedStop:
    """All hosts of a run stop at the same poll, whichever of them was told to.

    A thread watches for the notice, here or of another host; then every host says how many polls it
    has seen, and all go on to the one after the largest number. Since hosts do the same things in
    the same order, that is the same place in the program for all of them, and no collective is left
    half done. Alone, a notice counts at the next poll, and there is no thread.

    Args:
      asked: whether this host was told to stop; called often, from another thread.
      limit: seconds that hosts may take to answer.

    >>> told = []
    >>> together = CoordinatedStop(lambda: bool(told)).open()
    >>> together.poll(), told.append(1), together.poll()
    (False, None, True)
    >>> together.close()
    """

    LOOK, ASK = 0.1, 1.0  # seconds between looks at this host's notice, and at the store

    def __init__(self, asked: Callable[[], bool], *, limit: float = LIMIT) -> None:
        self._asked, self._limit, self._alone = asked, limit, host_names() == 1
        # of this run: a notice of one before is not for it
        _rounds["notice"] = _rounds.get("notice", -1) + 1
        self._key = f"m3i/notice/{_rounds['notice']}"
        self._count, self._at = 0, 0  # polls so far; the one at which to stop, 0: none
        self._error: HostMissing | None = None
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="preemption", daemon=True)

    def open(self) -> "CoordinatedStop":
        if not self._alone:
            self._thread.start()
        return self

    def poll(self) -> bool:
        """Whether to stop here. Every host must call this in the same places."""
        if self._alone:
            return self._asked()
        with self._lock:  # held while the hosts agree, so that none runs away
            if self._error:
                raise self._error
            self._count += 1
            return bool(self._at) and self._count >= self._at

    def close(self, failed: bool = False) -> None:
        """The run ended here. Answers a host that is told to stop just now; `failed`: does not wait
        for the others."""
        if self._alone or not self._thread.is_alive() and self._at:
            return
        self._closed.set()
        self._thread.join(timeout=0 if failed else self._limit)
        if not failed and not self._at:
            self._agree()

    def _watch(self) -> None:
        ask = 0.0
        while not self._closed.wait(self.LOOK):
            noticed = self._asked()
            if noticed:
                with contextlib.suppress(Exception):
                    _client().key_value_set(self._key, str(host_name()), allow_overwrite=True)
            elif time.monotonic() >= ask:
                ask = time.monotonic() + self.ASK
                with contextlib.suppress(Exception):
                    noticed = bool(_client().key_value_try_get(self._key))
            if noticed:
                self._agree()
                return

    def _agree(self) -> None:
        with self._lock:
            try:
                self._at = (
                    max(map(int, exchange_values("stop", str(self._count), limit=self._limit))) + 1
                )
            except HostMissing as error:
                self._error = error
