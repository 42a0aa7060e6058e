"""Orbax and TensorStore raise what failed, and the run logs that on one line. Beside it they would
print every part of a failed save or restore with its traceback: 40 arrays on a full disk are
thousands of lines, some of them after the last line of the run, when the event loops that the parts
report to are closed. `quiet_orbax` drops those."""

import functools
import logging
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

_ORBAX = "/orbax/checkpoint/"
_PARTS = ("orbax", "zarr", "OCDBT", "tensorstore")  # what the text of an abandoned part has of them


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Whether a record of absl's logger is no error of Orbax, which it raises too."""
    return record.levelno < logging.ERROR or _ORBAX not in record.pathname.replace("\\", "/")


def _is_awaited(record: logging.LogRecord) -> bool:
    """Whether a record of asyncio's logger is about something else than an abandoned part of a
    save."""
    text = record.getMessage()
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        text += "".join(traceback.format_exception(error))
    return "exception was never retrieved" not in text or not any(part in text for part in _PARTS)


def _is_late(error: BaseException, at: TracebackType | None) -> bool:
    """Whether an error is that of a part of a save that reports to an event loop which is closed by
    now: TensorStore calls asyncio from a thread without any Python of its own, so asyncio has all
    frames."""
    frames = [frame.filename.replace("\\", "/") for frame in traceback.extract_tb(at)]
    return (
        isinstance(error, RuntimeError)
        and str(error) == "Event loop is closed"
        and all("/asyncio/" in name for name in frames)
    )


def _filtered(before: Callable[[Any], object]) -> Callable[[Any], None]:
    def hook(raised: Any) -> None:
        if raised.exc_value is None or not _is_late(raised.exc_value, raised.exc_traceback):
            before(raised)

    hook.m3i_jax_quiet = True  # type: ignore[attr-defined]
    return hook


@functools.cache
def _filter_logs() -> None:
    logging.getLogger("absl").addFilter(_is_worth_a_line)
    logging.getLogger("asyncio").addFilter(_is_awaited)


def quiet_orbax() -> None:
    """Drop what the parts of a failed save would print; once or more often."""
    _filter_logs()
    if not hasattr(sys.unraisablehook, "m3i_jax_quiet"):
        sys.unraisablehook = _filtered(sys.unraisablehook)
