"""Barriers and small messages between the hosts of a run, through the key-value store of
jax.distributed instead of a collective, so that a wait for a host that hangs or died has a time
limit and ends in an error that names it. With one host, all functions return at once."""

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jax._src import distributed as _distributed  # the store has no public name

from m3i_jax.errors import DoesNotFit, RunStopped, UserError, as_refusal, one_line

LIMIT = 600.0  # seconds
NOTICE = 15.0  # seconds of waiting before each log line about it
# seconds after which a host sees what another wrote: NFS and gcsfuse keep what they know of a
# directory, also that a file is absent, for up to 60
VIEW_AGE = 75.0
_FAILED = "1"  # exit code of an error that is no mistake
_log = logging.getLogger(__name__)
_rounds: dict[str, int] = {}


class HostMissing(RunStopped):
    """A host did not reach a barrier in time."""


def _client() -> Any:
    return _distributed.global_state.client


def host_names() -> int:
    """Number of processes of this run; may be called before a device is initialized.

    >>> host_names(), host_name()
    (1, 0)
    """
    return _distributed.global_state.num_processes if _client() else 1


def host_name() -> int:
    """Index of this process, from 0."""
    return _distributed.global_state.process_id if _client() else 0


def host_label(number: int) -> str:
    """A host for a message: its number and, if it announced one, its name."""
    try:
        return f"host {number} ({_client().key_value_try_get(f'm3i/name/{number}')})"
    except Exception:  # it announced none, or the store is gone
        return f"host {number}"


def announce_host(name: str) -> None:
    """Announce the name of this host for the messages of others."""
    if host_names() > 1:
        _client().key_value_set(f"m3i/name/{host_name()}", name, allow_overwrite=True)


def coordinator() -> str:
    """HOST:PORT of process 0, "" without other processes."""
    return _distributed.global_state.coordinator_address or ""


def publish(key: str, text: str) -> None:
    """Publish a text under a key for all hosts."""
    _client().key_value_set(key, text, allow_overwrite=True)


def read_published(key: str, *, limit: float = LIMIT) -> str:
    """The text that a host published under a key; waits for it. Raises HostMissing."""
    try:
        return _client().blocking_key_value_get(key, int(limit * 1000))
    except Exception as error:
        raise HostMissing(
            f"{key}: waited {limit:.0f} seconds; look into the output of {host_label(0)}"
            f" ({str(error).splitlines()[0]})"
        ) from None


def exchange_values(name: str, text: str, *, limit: float = LIMIT) -> list[str]:
    """Every host's text, in the order of the hosts. A barrier: it returns when all hosts called it.

    Args:
      name: of the barrier; all hosts reach the barriers of one name in the same order.
      text: of this host; short, since every host reads all of them.
      limit: seconds to wait for the last host.

    Raises:
      HostMissing: names the hosts that did not come in time.

    >>> exchange_values("docs", "text")
    ['text']
    """
    if host_names() == 1:
        return [text]
    round_ = _rounds[name] = _rounds.get(name, -1) + 1
    prefix, host, client = f"m3i/{name}/{round_}/", host_name(), _client()
    client.key_value_set(f"{prefix}{host:06d}", text or " ")
    try:
        with _log_waits(name, lambda: _missing(prefix)):
            client.wait_at_barrier(f"m3i/{name}/{round_}", int(limit * 1000))
    except Exception as error:
        hosts = ", ".join(map(host_label, _missing(prefix))) or "a host that failed"
        if host == 0:
            # the store ends with this process, and the others still read who is missing
            time.sleep(1.0)
        raise HostMissing(
            f"{name}: waited {limit:.0f} seconds for {hosts}; look into its output"
            f" ({str(error).splitlines()[0]})"
        ) from None
    texts = [value.rstrip(" ") for _, value in sorted(_entries(prefix))]
    if round_:  # all hosts are here, so all have read the round before
        with contextlib.suppress(Exception):
            client.key_value_delete(f"m3i/{name}/{round_ - 1}/{host:06d}")
    return texts


def _missing(prefix: str) -> list[int]:
    """Hosts that have not reached a barrier yet."""
    present = {int(key.rsplit("/", 1)[1]) for key, _ in _entries(prefix)}
    return sorted(set(range(host_names())) - present)


@contextlib.contextmanager
def _log_waits(name: str, missing: Callable[[], Iterable[int]]) -> Iterator[None]:
    """Log the missing hosts every NOTICE seconds while the block waits."""
    done, start = threading.Event(), time.monotonic()

    def log() -> None:
        while not done.wait(NOTICE):
            hosts = ", ".join(host_label(number) for number in missing())
            if hosts and not done.is_set():
                seconds = time.monotonic() - start
                _log.warning("%s: waiting for %s (%.0f seconds so far)", name, hosts, seconds)

    threading.Thread(target=log, name="barrier", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _entries(prefix: str) -> list[tuple[str, str]]:
    try:
        return _client().key_value_dir_get(prefix)
    except Exception:  # the coordinator is gone
        return []


def barrier(name: str, *, limit: float = LIMIT) -> None:
    """Wait until every host called this. Raises HostMissing."""
    exchange_values(name, "", limit=limit)


@contextlib.contextmanager
def fail_together(name: str, *, limit: float = LIMIT) -> Iterator[None]:
    """Run a block that reads or writes files on every host, or on some, and waits for no other. An
    error that one host has, such as a file that it alone cannot read, is raised on all of them:
    they would wait for that host in the next collective. A barrier.

    Raises:
      UserError: the block failed on a host; names the host and its reason, which has the file.
      RunStopped: it failed there by a bug, not by a mistake.
      HostMissing: not all hosts came.

    >>> with fail_together("docs"): print("one host")
    one host
    """
    if host_names() == 1:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except RunStopped:  # a wait for the others ended: they cannot learn of it
        raise
    except Exception as error:
        own = error
    answers = exchange_values(name, _reason(own) if own else "", limit=limit)
    if own and as_refusal(own) is None:  # a bug: its traceback is here
        raise own
    if not (failed := [number for number, answer in enumerate(answers) if answer]):
        return
    more = f" (and {len(failed) - 1} more hosts)" if len(failed) > 1 else ""
    # the error of another host has the same exit code here, whatever this host met
    cause = own if failed[0] == host_name() else None
    raise _failure(answers[failed[0]], f"{host_label(failed[0])}{more}: ") from cause


def _reason(error: Exception) -> str:
    """Exit code and message of an error, on one line for the other hosts."""
    refusal = as_refusal(error)
    if refusal is None:
        return f"{_FAILED} a bug in m3i_jax ({type(error).__name__}: {one_line(error, 200)})"
    return f"{getattr(refusal, 'status', _FAILED)} {one_line(refusal)}"


def _failure(answer: str, before: str) -> Exception:
    """The error of a host on another one, from exit code and message: with the same exit code, by
    which a scheduler decides whether to start all again."""
    status, _, reason = answer.partition(" ")
    kinds = {str(DoesNotFit.status): DoesNotFit, _FAILED: RunStopped}
    return kinds.get(status, UserError)(before + reason)


@contextlib.contextmanager
def host0_first(
    name: str, *, limit: float = 6 * 3600.0, written: Callable[[], Iterable[str]] = tuple
) -> Iterator[None]:
    """Run the block on host 0, then on all others, which find the files that host 0 wrote to a
    shared directory. Returns when all hosts are done, so that an error of one ends all.

    Args:
      name: of the barrier.
      limit: seconds to wait for host 0, and then for the last host.
      written: paths of the files, asked on host 0 after its block. The other hosts wait until they
        see them, at most VIEW_AGE seconds, or they would make them again.

    Raises:
      HostMissing: another host took longer than the limit in seconds.
      UserError, RunStopped: it failed in the block; with its exit code.

    >>> with host0_first("docs"): print("written")
    written
    """
    if host_names() == 1:
        yield
        return
    round_ = _rounds[name] = _rounds.get(name, -1) + 1
    key, client = f"m3i/first/{name}/{round_}", _client()
    if host_name():
        try:
            with _log_waits(name, lambda: [0]):
                client.blocking_key_value_get(key, int(limit * 1000))
        except Exception:
            raise HostMissing(
                f"{name}: waited {limit:.0f} seconds for {host_label(0)}; look into its output"
            ) from None
    try:
        if host_name():
            result = client.key_value_try_get(key)
            if not result.startswith("["):
                raise _failure(result, f"{name}: {host_label(0)} ")
            _await_view(name, json.loads(result))
        yield
        if not host_name():
            files = json.dumps(list(written()))
    except BaseException as error:
        refusal = None if isinstance(error, HostMissing) else as_refusal(error)
        reason = f" ({one_line(refusal)})" if refusal else "; its output says why"
        why = f"{getattr(refusal, 'status', _FAILED)} failed{reason}"
        if not host_name():
            client.key_value_set(key, why)
        # the other hosts get the failure, this one raises its own error
        with contextlib.suppress(HostMissing):
            exchange_values(f"{name}, done", why, limit=60.0)
        raise
    if not host_name():
        client.key_value_set(key, files)
    results = exchange_values(f"{name}, done", "done", limit=limit)
    if failed := [number for number, result in enumerate(results) if result != "done"]:
        raise _failure(results[failed[0]], f"{name}: {host_label(failed[0])} ")


def _await_view(name: str, paths: list[str]) -> None:
    """Wait until this host sees the files that host 0 wrote."""
    deadline = time.monotonic() + VIEW_AGE
    while absent := [path for path in paths if not os.path.exists(path)]:
        if time.monotonic() >= deadline:
            _log.warning(
                "%s: %s, which %s wrote, is not seen here: it is made again",
                name,
                absent[0],
                host_label(0),
            )
            return
        time.sleep(0.5)


class CoordinatedStop:
    """Stops all hosts of a run at the same poll, after a notice on any of them.

    A thread watches for a notice on this host or another; then all hosts exchange their number of
    polls, and continue to the one after the largest. Hosts run the same steps in the same order, so
    that is the same point of the program on all of them, and no collective is left half done. With
    one host, a notice counts at the next poll, without a thread.

    Args:
      requested: whether this host got a notice; called often, from another thread.
      limit: seconds that hosts may take to answer.

    >>> notices = []
    >>> stop = CoordinatedStop(lambda: bool(notices)).open()
    >>> stop.poll(), notices.append(1), stop.poll()
    (False, None, True)
    >>> stop.close()
    """

    LOCAL_PERIOD, STORE_PERIOD = 0.1, 1.0  # seconds between checks of this host and of the store

    def __init__(self, requested: Callable[[], bool], *, limit: float = LIMIT) -> None:
        self._requested, self._limit, self._alone = requested, limit, host_names() == 1
        # one key for each run in this process
        _rounds["notice"] = _rounds.get("notice", -1) + 1
        self._key = f"m3i/notice/{_rounds['notice']}"
        self._count, self._stop_at = 0, 0  # polls so far; the one at which to stop, 0: none
        # after `close`: whether a host got a notice, also one after the last poll
        self.noticed = False
        self._error: HostMissing | None = None
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="preemption", daemon=True)

    def open(self) -> "CoordinatedStop":
        if not self._alone:
            self._thread.start()
        return self

    def poll(self) -> bool:
        """Whether to stop now. All hosts must call this at the same points of the program."""
        if self._alone:
            return self._requested()
        with self._lock:  # held during the exchange, so that the count stays
            if self._error:
                raise self._error
            self._count += 1
            return bool(self._stop_at) and self._count >= self._stop_at

    def close(self, failed: bool = False) -> None:
        """End of the run. Answers a host that gets a notice now; `failed`: without waiting for the
        others."""
        if self._alone:
            self.noticed = self._requested()
        if self._alone or not self._thread.is_alive() and self._stop_at:
            return
        self._closed.set()
        self._thread.join(timeout=0 if failed else self._limit)
        if not failed and not self._stop_at:
            self._agree()

    def _watch(self) -> None:
        next_check = 0.0
        while not self._closed.wait(self.LOCAL_PERIOD):
            noticed = self._requested()
            if noticed:
                with contextlib.suppress(Exception):
                    _client().key_value_set(self._key, str(host_name()), allow_overwrite=True)
            elif time.monotonic() >= next_check:
                next_check = time.monotonic() + self.STORE_PERIOD
                with contextlib.suppress(Exception):
                    noticed = bool(_client().key_value_try_get(self._key))
            if noticed:
                self._agree()
                return

    def _agree(self) -> None:
        with self._lock:
            try:
                own = f"{self._count} {int(self._requested())}"
                answers = [x.split() for x in exchange_values("stop", own, limit=self._limit)]
                self._stop_at = max(int(count) for count, _ in answers) + 1
                self.noticed = any(int(noticed) for _, noticed in answers)
            except HostMissing as error:
                self._error = error
