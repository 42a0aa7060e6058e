"""Ctrl-C (SIGINT) outside the training loop: the process ends with one line and exit code 130.

The handler ends the process instead of raising KeyboardInterrupt, which imports, callbacks of the
garbage collector and threads of libraries print, swallow or wait for. A killed run loses nothing
either. Two blocks have another handler: the training loop, which saves a checkpoint first
(training/loop.py), and `--mode=convert`, which reports the complete shards.

A terminal sends the signal to the worker processes as well, which are started with it blocked: the
process that started them ends them."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import NoReturn

STATUS = 130  # exit code: 128 + SIGINT, as shells report it
_LINE = "m3i_jax: interrupted; run the same command again to continue\n"
_once = threading.Lock()


def exit_interrupted() -> NoReturn:
    """Print the line and end the process without cleaning up."""
    if _once.acquire(blocking=False):
        # a stream may be closed, full, or in use by the interrupted code
        with contextlib.suppress(OSError, ValueError, AttributeError, RuntimeError):
            sys.stdout.flush()
        with contextlib.suppress(OSError):
            os.write(2, _LINE.encode())
    else:  # the other thread prints, or waits for a reader of stdout
        time.sleep(1.0)
    os._exit(STATUS)


def _handle(number: int, frame: object) -> None:
    exit_interrupted()


def _raise(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def install_handler() -> None:
    """Replace Python's own handler. Does nothing where the signal is ignored, as in background jobs
    of shell scripts, or where a program has its own handler."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _handle)


def watch_long_calls() -> None:
    """Start a thread that calls the handler while the main thread compiles, or waits for another
    host: Python itself runs handlers only between two of its own instructions."""
    if signal.getsignal(signal.SIGINT) is not _handle:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), name="interrupts", daemon=True).start()


def _watch(reader: int) -> None:
    while received := os.read(reader, 512):
        if signal.SIGINT in received and signal.getsignal(signal.SIGINT) is _handle:
            exit_interrupted()


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
