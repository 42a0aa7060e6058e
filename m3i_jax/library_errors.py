"""What other libraries print when their own threads fail: one line each, once, instead of a page of
traceback each time.

A disk that is full makes every array of a checkpoint fail in a thread of its own, in Orbax,
tensorstore and asyncio. The run itself reports such a failure in one line; the traceback is of use
only where a frame of this package is in it."""

import contextlib
import logging
import os
import pathlib
import sys
import threading
import traceback
from types import TracebackType
from typing import Any

from m3i_jax.errors import one_line

_PACKAGE = str(pathlib.Path(__file__).parent)
LONGEST = 300  # characters of a message of another library


def is_our_frame(trace: TracebackType | None) -> bool:
    """Whether a call of this package raised the error itself, or called what did, in a thread."""
    return any(frame.filename.startswith(_PACKAGE) for frame in traceback.extract_tb(trace))


class LibraryErrorHooks:
    """Hooks for errors that reach no caller. Each distinct line is printed once."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def show(
        self,
        kind: type[BaseException],
        error: BaseException | None,
        trace: TracebackType | None,
        thread: str = "",
    ) -> None:
        if error is not None and is_our_frame(trace):
            traceback.print_exception(kind, error, trace)
            return
        self.line(
            f"warning: in a thread of another library{f' ({thread})' if thread else ''}:"
            f" {kind.__name__}: {error}"
        )

    def line(self, text: str) -> None:
        text = one_line(text, LONGEST)
        if text not in self._seen and sys.stderr is not None:
            self._seen.add(text)
            print(f"m3i_jax: {text}", file=sys.stderr, flush=True)

    def excepthook(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        self.show(kind, error, trace)

    def threading_hook(self, args: threading.ExceptHookArgs) -> None:
        if args.exc_type is not SystemExit:
            self.show(
                args.exc_type,
                args.exc_value,
                args.exc_traceback,
                args.thread.name if args.thread else "",
            )

    def unraisable(self, args: Any) -> None:
        self.show(args.exc_type, args.exc_value, args.exc_traceback)

    def record(self, made: Any) -> Any:
        """A factory of log records without tracebacks: the error is named at the end of the
        message."""

        def make(*arguments: Any, **options: Any) -> logging.LogRecord:
            record = made(*arguments, **options)
            if (
                record.exc_info
                and record.exc_info[1] is not None
                and not is_our_frame(record.exc_info[2])
            ):
                with contextlib.suppress(Exception):
                    kind, error, _ = record.exc_info
                    text = one_line(record.getMessage(), LONGEST)
                    record.msg = (
                        text
                        if str(error)[:40] in text
                        else f"{text} ({one_line(f'{kind.__name__}: {error}', LONGEST)})"
                    )
                    record.args = ()
                record.exc_info = record.exc_text = None
            elif (
                "\nTraceback (most recent call last)" in str(record.msg)
                or str(record.msg).count("\n") > 20
            ):
                record.msg, record.args = one_line(record.getMessage(), LONGEST), ()
            return record

        return make


def install_hooks() -> None:
    """For the rest of the process."""
    others = LibraryErrorHooks()
    sys.excepthook, threading.excepthook, sys.unraisablehook = (
        others.excepthook,
        others.threading_hook,
        others.unraisable,
    )
    logging.setLogRecordFactory(others.record(logging.getLogRecordFactory()))


def silence_process() -> None:
    """Nothing more is printed by this process: what other libraries say while it ends helps
    nobody."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    with contextlib.suppress(OSError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            os.dup2(nothing, number)
