"""Errors that reach a person: one line, what was wrong, why, what to do.

`as_refusal` is the one function that turns what the system says (a full disk, no memory, a file
that is no text, a device that jax cannot start) into such a line, for every mode: `main` asks it
about each error that reaches it."""

import contextlib
import errno
import io
import os
import pathlib
import re
from collections.abc import Iterator
from types import TracebackType


class UserError(Exception):
    """A mistake of the person at the keyboard, or a refusal of the system: main prints the message
    on one line and exits 2, without a traceback."""

    status = 2  # of the process


class UnreadableError(UserError):
    """Data that could be read when the run began cannot be read any more."""


class RunStopped(Exception):
    """The run cannot go on, through nobody's mistake: main prints the message on one line and exits
    1, without a traceback."""


class DoesNotFit(UserError):
    """The program does not fit the device it was compiled for, or the memory of this machine: exit
    3."""

    status = 3


HINTS = {
    errno.ENOSPC: "make room there, or use another --workdir",
    errno.EDQUOT: "make room there, or use another --workdir",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or use another --workdir",
    errno.EACCES: "give permission, or use another path",
    errno.EPERM: "give permission, or use another path",
    errno.EROFS: "use a path that can be written",
    errno.ENAMETOOLONG: "use a shorter path",
    errno.ENOENT: "check the path; a file of a run can be restored from a copy of the run",
    errno.EISDIR: "a file belongs there: move the directory away",
    errno.ENOTDIR: "a directory belongs there: move the file away",
    errno.EEXIST: "move what is there away",
    errno.ELOOP: "the link leads to itself: delete it",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs: the machine has too many open files",
    errno.EAGAIN: "raise the limit of processes and threads (ulimit -u)",
    errno.EIO: "check the disk, then run the same command again",
    errno.ESTALE: "mount the file system again, then run the same command again",
    errno.EPIPE: "the program that reads the output has ended",
}
SMALLER = "use a smaller batch, image or model, or a machine with more memory"
_PACKAGE = pathlib.Path(__file__).parent
# How libraries of C++ spell what the system said: tensorstore has the number, Riegeli (ArrayRecord)
# the words.
_SYSTEM = re.compile(r"OS error (\d+)")
_WORDS = {
    os.strerror(number): number
    for number in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EACCES,
        errno.EIO,
        errno.ESTALE,
        errno.EMFILE,
    )
}
_NAMED = re.compile(r"(?:writing|reading|opening|file) ['\"]?(/[^;'\"]+)")
_DEVICE = re.compile(
    r"Unable to initialize backend|Unknown backend|JAX_PLATFORMS|No visible .* devices",
    re.IGNORECASE,
)
_FULL = re.compile(r"RESOURCE_EXHAUSTED|out of memory", re.IGNORECASE)
_LOST = re.compile(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|DATA_LOSS)\b")


def one_line(text: object, most: int = 600) -> str:
    """A text on one line, of at most so many characters.

    >>> one_line("a\\n  b"), one_line("abcdef", 4)
    ('a b', 'abc…')
    """
    try:
        line = " ".join(str(text).split())
    except Exception:  # an error of a person's own whose text fails
        line = f"a {type(text).__name__} without a text"
    return line if len(line) <= most else line[: most - 1] + "…"


def shorten(value: object, most: int = 120) -> str:
    """A value for a message: its `repr`, on one line of at most so many characters.

    >>> shorten("a" * 200, 8), shorten((1, 2))
    ("'aaaaaa…", '(1, 2)')
    """
    try:
        return one_line(repr(value), most)
    except (
        ValueError,
        RecursionError,
    ):  # of a number of thousands of digits; of a list that is nested too deep
        return f"a {type(value).__name__} that is too long to print"


def as_refusal(error: BaseException) -> UserError | RunStopped | None:
    """The error that `main` prints on one line instead of this one; None for what only a bug of
    ours can be.

    OSError, UnicodeError, RecursionError: UserError with the path. MemoryError, and jax's
    RESOURCE_EXHAUSTED: DoesNotFit.
    A backend that jax cannot start: UserError. A device or a host that is lost: Stopped. What was
    raised from such an error counts as that error.

    >>> try: open("/no/such/file")
    ... except OSError as error: print(as_refusal(error))
    /no/such/file: No such file or directory; check the path; a file of a run can be restored from a copy of the run
    >>> as_refusal(KeyError("x")) is None
    True
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError | RunStopped):
            return cause
        if found := _refusal(cause):
            return found
        cause = cause.__cause__
    return None


@contextlib.contextmanager
def refuse_system_errors() -> Iterator[None]:
    """Raises `as_refusal` of an error in the block in its stead.

    >>> with refuse_system_errors(): open("/no/such/file")
    Traceback (most recent call last):
    m3i_jax.errors.UserError: /no/such/file: No such file or directory; check the path; ...
    """
    try:
        yield
    except Exception as error:
        found = as_refusal(error)
        if found is None or found is error:
            raise
        raise found from error


def _refusal(error: BaseException) -> UserError | RunStopped | None:
    text = one_line(error)
    if isinstance(error, OSError):
        return system_error(error)
    if isinstance(error, MemoryError):
        return DoesNotFit(
            f"does not fit the memory of this machine ({text or error_location(error)}); {SMALLER}"
        )
    if isinstance(error, UnicodeError | RecursionError):
        if not (place := error_path(error)):
            return None
        why = (
            "is nested too deep"
            if isinstance(error, RecursionError)
            else f"is not UTF-8 text ({text})"
        )
        return UserError(f"{place}: {why}; restore the file, or move it away")
    said = _SYSTEM.search(text)
    number = (
        int(said[1])
        if said
        else next((number for words, number in _WORDS.items() if words in text), 0)
    )
    if number and not isinstance(error, KeyError | AssertionError):
        named = _NAMED.search(text)
        return system_error(
            OSError(number, os.strerror(number), named[1] if named else error_path(error) or None)
        )
    if not isinstance(error, RuntimeError):
        return None
    if _FULL.search(text):
        return DoesNotFit(f"does not fit the memory of the device ({text}); {SMALLER}")
    if _DEVICE.search(text):
        return UserError(
            f"jax cannot use the devices that were asked for ({text}); check JAX_PLATFORMS and the"
            " drivers"
        )
    if "can't start new thread" in text:
        return UserError(f"no more threads can be started; {HINTS[errno.EAGAIN]}")
    if type(error).__name__ == "JaxRuntimeError" and _LOST.search(text):
        return RunStopped(
            f"a device or another host does not answer ({text}); run the same command again to"
            " resume"
        )
    return None


def system_error(error: OSError) -> UserError:
    """A system's refusal with its path, and what to do about it."""
    names = [
        os.fsdecode(name)
        for name in (error.filename, error.filename2)
        if isinstance(name, str | bytes | os.PathLike)
    ]
    place = " -> ".join(names) or error_path(error) or error_location(error)
    reason = error.strerror or one_line(error) or type(error).__name__
    if error.errno == errno.ENOMEM:
        return DoesNotFit(f"{place}: {reason}; {SMALLER}")
    hint = HINTS.get(error.errno or 0, "mend that, then run the same command again")
    return UserError(f"{place}: {reason}; {hint}")


def _frames(trace: TracebackType | None) -> list[TracebackType]:
    """From the innermost call outwards."""
    out = []
    while trace:
        out.append(trace)
        trace = trace.tb_next
    return out[::-1]


def error_path(error: BaseException) -> str:
    """The file that was being read or written, by the variables of the innermost call that knows
    one; "" if none does.

    Of the variables of a call, an open file comes first, then a path to no directory, then a
    directory; of equals, the last."""
    for trace in _frames(error.__traceback__):
        values = list(trace.tb_frame.f_locals.values())[::-1]
        names = [getattr(v, "name", None) for v in values if isinstance(v, io.IOBase)]
        opened = [name for name in names if isinstance(name, str | bytes)]
        paths = [str(v) for v in values if isinstance(v, pathlib.PurePath) and v.name]
        paths += [
            v
            for v in values
            if isinstance(v, str) and "/" in v and len(v) < 4096 and os.path.lexists(v)
        ]
        if found := opened or [p for p in paths if not os.path.isdir(p)] or paths:
            return os.fsdecode(found[0])
    return ""


def error_location(error: BaseException) -> str:
    """The innermost line of this package that the error went through: file:line, relative to the
    package."""
    for trace in _frames(error.__traceback__):
        file = pathlib.Path(trace.tb_frame.f_code.co_filename)
        if file.is_relative_to(_PACKAGE):
            return f"{file.relative_to(_PACKAGE.parent)}:{trace.tb_lineno}"
    return "m3i_jax"
