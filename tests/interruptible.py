"""Starts processes that Ctrl-C can end, also where these tests ignore it."""

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A process that begins in this block has the default action of SIGINT. In the background of a
    shell the tests ignore it, which a process inherits; a handler it does not. (`preexec_fn` would
    do the same, and copy the page tables of this process, which take gigabytes.)"""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
