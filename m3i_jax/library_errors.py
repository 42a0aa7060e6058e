"""Errors in threads of other libraries: one line each, printed once, instead of a traceback.

A full disk makes every array of a checkpoint fail in its own thread of Orbax, TensorStore and
asyncio: 40 arrays print thousands of lines, some after the last line of the run, when the event
loops are closed. The run itself logs such a failure in one line. So `drop_repeated_errors` drops
what Orbax logs of an error that it raises as well, and `install_hooks`, which the command line
calls, shortens the rest: a traceback is printed only if it has a frame of this package."""

import contextlib
import functools
import logging
import os
import pathlib
import sys
import threading
import traceback
import warnings
from types import TracebackType
from typing import Any

import absl.logging

from m3i_jax.errors import one_line

_PACKAGE = str(pathlib.Path(__file__).parent)
_ORBAX = "/orbax/checkpoint/"
_SAVE_WORDS = ("orbax", "zarr", "OCDBT", "tensorstore")  # in the text of an abandoned write
_PART_OF_SAVE = "write_fragment"  # of Orbax, writes a part of an array
LONGEST = 300  # characters of a message of another library


def _files_of(trace: TracebackType | None) -> list[str]:
    return [frame.filename.replace("\\", "/") for frame in traceback.extract_tb(trace)]


def is_our_frame(trace: TracebackType | None) -> bool:
    """Returns whether a traceback has a frame of this package."""
    return any(name.startswith(_PACKAGE) for name in _files_of(trace))


def _is_late_callback(error: BaseException | None, trace: TracebackType | None) -> bool:
    """Whether a write of an ended save called an event loop that is closed. TensorStore calls
    asyncio from a thread without Python frames, so all frames are asyncio's."""
    return (
        isinstance(error, RuntimeError)
        and str(error) == "Event loop is closed"
        and all("/asyncio/" in name for name in _files_of(trace))
    )


def _is_repeated(record: logging.LogRecord) -> bool:
    """Whether a log record is an error of Orbax, which raises it too, or the exception of an
    abandoned write of a save, which asyncio logs."""
    if record.name == "absl":
        return record.levelno >= logging.ERROR and _ORBAX in record.pathname.replace("\\", "/")
    text = record.getMessage()
    if record.name != "asyncio" or "exception was never retrieved" not in text:
        return False
    if record.exc_info and record.exc_info[1] is not None:
        text += "".join(traceback.format_exception(record.exc_info[1]))
    return any(word in text for word in _SAVE_WORDS)


def _keep(record: logging.LogRecord) -> bool:
    # the factory of `install_hooks` decides before it removes the traceback
    repeated = getattr(record, "repeated", None)
    return not (_is_repeated(record) if repeated is None else repeated)


class LibraryErrorHooks:
    """Hooks for errors that no caller receives. Each distinct line is printed once."""

    def __init__(self) -> None:
        self._printed: set[str] = set()

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
        if text not in self._printed and sys.stderr is not None:
            self._printed.add(text)
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

    def record(self, factory: Any) -> Any:
        """Returns a factory of log records without tracebacks: the message ends in the error's name
        and text instead."""

        def make(*arguments: Any, **options: Any) -> logging.LogRecord:
            record = factory(*arguments, **options)
            with contextlib.suppress(Exception):  # arguments that do not fit the message
                record.repeated = _is_repeated(record)
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


@functools.cache
def install_hooks() -> None:
    """Install the hooks and filters for the rest of the process; a second call does nothing."""
    hooks = LibraryErrorHooks()
    sys.excepthook = hooks.excepthook
    threading.excepthook = hooks.threading_hook
    sys.unraisablehook = hooks.unraisable
    logging.setLogRecordFactory(hooks.record(logging.getLogRecordFactory()))


@functools.cache
def drop_repeated_errors() -> None:
    """Drop what the threads of a failed save or restore print of the error that Orbax raises; a
    second call does nothing. `Checkpoints` calls this, also in programs without `install_hooks`."""
    for logger in (absl.logging.get_absl_logger(), logging.getLogger("asyncio")):
        logger.addFilter(_keep)
    previous = sys.unraisablehook

    def unraisable(args: Any) -> None:
        if not _is_late_callback(args.exc_value, args.exc_traceback):
            previous(args)

    sys.unraisablehook = unraisable
    # the parts of an array that were not written yet when another one failed
    unawaited = rf"coroutine '(.*\.)?{_PART_OF_SAVE}' was never awaited"
    warnings.filterwarnings("ignore", unawaited, RuntimeWarning)


def silence_process() -> None:
    """Discard what this process prints from now on: other libraries log while a process ends."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    with contextlib.suppress(OSError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(devnull, descriptor)
