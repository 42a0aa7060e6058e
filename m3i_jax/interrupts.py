"""Signals outside the training loop. Ctrl-C (SIGINT): the process ends with one line and exit code
130. SIGTERM, by which a scheduler preempts, in the modes that go on where they were stopped: one
line and exit code 42. The other hosts of the run end in the same way, with the line of this one.
The training loop saves a checkpoint first; elsewhere nothing is to be saved, since complete parts
are on the disk.

The handlers end the process instead of raising KeyboardInterrupt, which imports, callbacks of the
garbage collector and threads of libraries print, swallow or wait for. A killed run loses nothing
either. Two blocks have others: the training loop (training/loop.py), for SIGTERM from its first
step on, and `--mode=convert`, which reports the complete shards.

SIGUSR1 requests a trace of the next steps (modes/monitoring.py). Outside the training loop it is
noted for the next one, since by default it would end the process.

A terminal sends the signal to the worker processes as well, which are started with it blocked: the
process that started them ends them."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from typing import NoReturn

STATUS = 130  # exit code: 128 + SIGINT, as shells report it
PREEMPTED = 42  # exit code
_INTERRUPTED = "interrupted; run the same command again to continue"
_WHY = "stopped by SIGTERM where nothing has to be saved; run the same command again to continue"
_once = threading.Lock()
_watching = False  # whether the thread of `watch_long_calls` runs
_tell: Callable[[int, str], None] = lambda status, why: None  # the other hosts
_trace_requested = False


def exit_interrupted() -> NoReturn:
    """Print the line and end the process without cleaning up; other hosts end too."""
    _exit(STATUS, f"m3i_jax: {_INTERRUPTED}\n", lambda: _tell(STATUS, _INTERRUPTED))


def exit_preempted() -> NoReturn:
    """As `exit_interrupted`, after SIGTERM."""
    _exit(PREEMPTED, f"m3i_jax: {_WHY}\n", lambda: _tell(PREEMPTED, _WHY))


def _exit(status: int, line: str, then: Callable[[], None] = lambda: None) -> NoReturn:
    if _once.acquire(blocking=False):
        # a stream may be closed, full, or in use by the interrupted code
        with contextlib.suppress(OSError, ValueError, AttributeError, RuntimeError):
            sys.stdout.flush()
        with contextlib.suppress(OSError):
            os.write(2, line.encode())
        with contextlib.suppress(Exception):
            then()
    else:  # the other thread prints, or waits for a reader of stdout
        time.sleep(3.0)
    os._exit(status)


def end_within(seconds: float, status: int) -> None:
    """End the process with `status` if it has not ended by itself after so many seconds: Python
    waits for its threads, and one that reads from a disk that hangs would make a scheduler, which
    starts a preempted job again by its exit code, kill it instead."""

    def end() -> None:
        time.sleep(seconds)
        line = f"m3i_jax: a thread has not ended within {seconds:g} s; ending without it\n"
        _exit(status, line)

    threading.Thread(target=end, name="end-within", daemon=True).start()


def _handle(number: int, frame: object) -> None:
    exit_interrupted()


def _terminate(number: int, frame: object) -> None:
    exit_preempted()


def _after_fork() -> None:
    """A fork, such as a worker process, ends by SIGTERM as any other process, and does not write to
    the pipe of `watch_long_calls`, by which the first process would end."""
    if exits_on_sigterm():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)


def _raise(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def install_handler() -> None:
    """Replace Python's own handler. Does nothing where the signal is ignored, as in background jobs
    of shell scripts, or where a program has its own handler."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _handle)


def notify_hosts(tell: Callable[[int, str], None]) -> None:
    """Call `tell` with code and reason before a signal ends this process, for the other hosts.

    >>> notify_hosts(lambda status, why: None)
    """
    global _tell
    _tell = tell


def exit_on_sigterm() -> None:
    """Replace the default action of SIGTERM by `exit_preempted`. Does nothing where the signal is
    ignored, or where a program has its own handler."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
        os.register_at_fork(after_in_child=_after_fork)
        watch_long_calls()


def exits_on_sigterm() -> bool:
    """Returns whether SIGTERM ends this process now, by `exit_preempted`.

    >>> exits_on_sigterm()
    False
    """
    return signal.getsignal(signal.SIGTERM) is _terminate


def _note(number: int, frame: object) -> None:
    global _trace_requested
    _trace_requested = True


def note_trace_requests() -> None:
    """Replace the default action of SIGUSR1, which ends the process, by a note."""
    if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, _note)


def take_trace_request() -> bool:
    """Returns whether SIGUSR1 was noted, and forgets it.

    >>> take_trace_request()
    False
    """
    global _trace_requested
    noted, _trace_requested = _trace_requested, False
    return noted


def watch_long_calls() -> None:
    """Start a thread that calls the handlers while the main thread compiles, or waits for another
    host: Python itself runs them only between two instructions of Python. Once per process."""
    global _watching
    if _watching or (signal.getsignal(signal.SIGINT) is not _handle and not exits_on_sigterm()):
        return
    _watching = True
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), name="interrupts", daemon=True).start()


def _watch(reader: int) -> None:
    while received := os.read(reader, 512):
        if signal.SIGINT in received and signal.getsignal(signal.SIGINT) is _handle:
            exit_interrupted()
        if signal.SIGTERM in received and exits_on_sigterm():
            exit_preempted()


@contextlib.contextmanager
def raise_interrupts() -> Iterator[None]:
    """Context manager in which SIGINT raises KeyboardInterrupt in the main thread.

    >>> with raise_interrupts(): print("can be caught")
    can be caught
    """
    before = signal.getsignal(signal.SIGINT)
    if before is _handle:
        signal.signal(signal.SIGINT, _raise)
    try:
        yield
    finally:
        if before is _handle:
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def block_interrupts() -> Iterator[None]:
    """Context manager in which this thread, and the threads and worker processes that it starts, do
    not receive SIGINT. The main thread receives it at the end of the block.

    >>> with block_interrupts(): print("start workers")
    start workers
    """
    # the start of this process of multiprocessing would unblock the signal
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
