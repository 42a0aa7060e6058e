"""Errors for the user: one line with what was wrong, why, and what to do.

`as_refusal` converts errors of the system (a full disk, no memory, a file that is no text, a device
that jax cannot start) into such a line. `main` applies it to every error, in every mode.
"""

import contextlib
import errno
import io
import os
import pathlib
import re
from collections.abc import Iterator
from types import TracebackType


class UserError(Exception):
    """A user's mistake or a refusal of the system: main prints the message on one line and exits
    with code 2, without a traceback."""

    status = 2  # exit code


class TransientError(UserError):
    """A failure of a disk, a server or the network, and no user's mistake: main exits with code 1,
    so that a scheduler starts the run again."""

    status = 1


class MissingWeights(UserError):
    """Weights that a setting or a recipe names do not exist.

    Attributes:
      path: as given.
    """

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message)
        self.path = path


class UnreadableError(UserError):
    """Data that was readable at the start of the run can no longer be read."""


class UnreachableError(UnreadableError, TransientError):
    """Data whose disk or server does not answer."""

    status = 1


class RunStopped(Exception):
    """The run cannot continue, and not because of a mistake: main prints the message on one line
    and exits with code 1, without a traceback."""


class DoesNotFit(UserError):
    """The program does not fit in the memory of the device that it is compiled for, or of this
    machine: exit code 3."""

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
    errno.EEXIST: "move the existing file away",
    errno.ELOOP: "the link leads to itself: delete it",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs: the machine has too many open files",
    errno.EAGAIN: "raise the limit of processes and threads (ulimit -u)",
    errno.EIO: "check the disk, then run the same command again",
    errno.ESTALE: "mount the file system again, then run the same command again",
    errno.EPIPE: "the program that reads the output has ended",
}
# Errors that the same call may not give a minute later.
TRANSIENT = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENETRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.ENOTCONN,
}
MAX_PATH = 600  # characters of a path in a message
SMALLER = "use a smaller batch, image or model, or a machine with more memory"
_PACKAGE = pathlib.Path(__file__).parent
# System errors in messages of C++ libraries: tensorstore has the number, Riegeli (ArrayRecord) the
# text.
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
        errno.ETIMEDOUT,
        errno.ENOTCONN,
        errno.EMFILE,
    )
}
_FILE = re.compile(r"(?:writing|reading|opening|file) ['\"]?(/[^;'\"]+)")
_DEVICE = re.compile(
    r"Unable to initialize backend|Unknown backend|JAX_PLATFORMS|No visible .* devices",
    re.IGNORECASE,
)
_FULL = re.compile(r"RESOURCE_EXHAUSTED|out of memory", re.IGNORECASE)
_LOST = re.compile(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|DATA_LOSS)\b")


def one_line(text: object, most: int = 600) -> str:
    """Returns a text on one line, cut to at most `most` characters.

    >>> one_line("a\\n  b"), one_line("abcdef", 4)
    ('a b', 'abc…')
    """
    try:
        line = " ".join(str(text).split())
    except Exception:  # a user's exception whose __str__ fails
        line = f"a {type(text).__name__} without a text"
    return line if len(line) <= most else line[: most - 1] + "…"


def shorten(value: object, most: int = 120) -> str:
    """Returns the `repr` of a value for a message, on one line of at most `most` characters.

    >>> shorten("a" * 200, 8), shorten((1, 2))
    ("'aaaaaa…", '(1, 2)')
    """
    try:
        return one_line(repr(value), most)
    except (
        ValueError,
        RecursionError,
    ):  # a number of thousands of digits; a list that is nested too deep
        return f"a {type(value).__name__} that is too long to print"


def as_refusal(error: BaseException) -> UserError | RunStopped | None:
    """Returns the error that `main` prints on one line instead of `error`; None for a bug of this
    package.

    - OSError, UnicodeError, RecursionError: UserError with the path; of `TRANSIENT` kinds,
      TransientError, also where it was raised as a UserError from such an OSError.
    - MemoryError and jax's RESOURCE_EXHAUSTED: DoesNotFit.
    - A backend that jax cannot start: UserError.
    - A lost device or host: RunStopped.

    An error that was raised from such an error counts as that error.

    >>> try: open("/no/such/file")
    ... except OSError as error: print(as_refusal(error))
    /no/such/file: No such file or directory; check the path; a file of a run can be restored ...
    >>> as_refusal(KeyError("x")) is None
    True
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError | RunStopped):
            return _as_transient(cause)
        if refusal := _refusal(cause):
            return refusal
        cause = cause.__cause__
    return None


def _as_transient(error: UserError | RunStopped) -> UserError | RunStopped:
    """The refusal, as a TransientError if a failure of the system that may pass is what it was
    raised from: it is no mistake in what the message names, such as a directory."""
    cause = error.__cause__ if getattr(error, "status", 1) == UserError.status else None
    while cause is not None:
        if isinstance(_refusal(cause), TransientError):
            return TransientError(str(error))
        cause = cause.__cause__
    return error


@contextlib.contextmanager
def refuse_system_errors() -> Iterator[None]:
    """Context manager that replaces an error of the block by its `as_refusal`.

    >>> with refuse_system_errors(): open("/no/such/file")
    Traceback (most recent call last):
    m3i_jax.errors.UserError: /no/such/file: No such file or directory; check the path; ...
    """
    try:
        yield
    except Exception as error:
        refusal = as_refusal(error)
        if refusal is None or refusal is error:
            raise
        raise refusal from error


def _refusal(error: BaseException) -> UserError | RunStopped | None:
    text = one_line(error)
    if isinstance(error, OSError):
        return system_error(error)
    if isinstance(error, MemoryError):
        return DoesNotFit(
            f"does not fit the memory of this machine ({text or error_location(error)}); {SMALLER}"
        )
    if isinstance(error, UnicodeError | RecursionError):
        if not (path := error_path(error)):
            return None
        reason = (
            "is nested too deep"
            if isinstance(error, RecursionError)
            else f"is not UTF-8 text ({text})"
        )
        return UserError(f"{path}: {reason}; restore the file, or move it away")
    match = _SYSTEM.search(text)
    number = (
        int(match[1])
        if match
        else next((number for words, number in _WORDS.items() if words in text), 0)
    )
    lost = type(error).__name__ == "JaxRuntimeError" and _LOST.search(text)
    if number and not lost and not isinstance(error, KeyError | AssertionError):
        file = _FILE.search(text)
        return system_error(
            OSError(number, os.strerror(number), file[1] if file else error_path(error) or None)
        )
    if not isinstance(error, RuntimeError):
        return None
    if _FULL.search(text):
        return DoesNotFit(f"does not fit the memory of the device ({text}); {SMALLER}")
    if _DEVICE.search(text):
        return UserError(
            f"jax cannot use the requested devices ({text}); check JAX_PLATFORMS and the drivers"
        )
    if "can't start new thread" in text:
        return UserError(f"no more threads can be started; {HINTS[errno.EAGAIN]}")
    if lost:
        return RunStopped(
            f"a device or another host does not answer ({text}); run the same command again to"
            " resume"
        )
    return None


def system_error(error: OSError) -> UserError:
    """Returns the UserError of an OSError: path, reason and hint.

    >>> str(system_error(OSError(errno.ENAMETOOLONG, "File name too long", "a/" * 3000)))[-44:]
    'a/a/: File name too long; use a shorter path'
    """
    names = [
        os.fsdecode(name)
        for name in (error.filename, error.filename2)
        if isinstance(name, str | bytes | os.PathLike)
    ]
    path = " -> ".join(names) or error_path(error) or error_location(error)
    if len(path) > MAX_PATH:  # the reason comes after it
        path = f"{path[: MAX_PATH // 2]}…{path[-MAX_PATH // 2 :]}"
    reason = error.strerror or one_line(error) or type(error).__name__
    if error.errno == errno.ENOMEM:
        return DoesNotFit(f"{path}: {reason}; {SMALLER}")
    kind: type[UserError] = TransientError if is_transient(error) else UserError
    hint = HINTS.get(error.errno or 0, "repair that, then run the same command again")
    return kind(f"{path}: {reason}; {hint}")


def is_transient(error: BaseException) -> bool:
    """Returns whether an error is one of the system that may pass: of a disk, a server or the
    network.

    >>> is_transient(OSError(errno.ESTALE, "Stale file handle")), is_transient(FileNotFoundError())
    (True, False)
    """
    return isinstance(error, OSError) and error.errno in TRANSIENT


def path_exists(path: str | os.PathLike[str], *, follow: bool = True) -> bool:
    """Returns whether a path exists, as `os.path.exists`, which is False also where the disk or
    server of the path does not answer.

    Args:
      path: of a file or directory.
      follow: whether a link counts by what it leads to.

    Raises:
      OSError: of a `TRANSIENT` kind: what is at the path is not known now.

    >>> path_exists("/"), path_exists("/no/such/file")
    (True, False)
    """
    try:
        os.stat(path, follow_symlinks=follow)
    except (OSError, ValueError) as error:  # ValueError: no file can have this name
        if is_transient(error):
            raise
        return False
    return True


def _frames(trace: TracebackType | None) -> list[TracebackType]:
    """The frames of a traceback, the innermost first."""
    frames = []
    while trace:
        frames.append(trace)
        trace = trace.tb_next
    return frames[::-1]


def error_path(error: BaseException) -> str:
    """Returns the path of the file that was being read or written, taken from the local variables
    of the innermost call that has one; "" if none has.

    Among the variables of a call, an open file comes first, then a path that is no directory, then
    a directory; among equals, the last variable."""
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
        if candidates := opened or [p for p in paths if not os.path.isdir(p)] or paths:
            return os.fsdecode(candidates[0])
    return ""


def error_location(error: BaseException) -> str:
    """Returns the innermost line of this package in the error's traceback, as file:line relative to
    the package."""
    for trace in _frames(error.__traceback__):
        file = pathlib.Path(trace.tb_frame.f_code.co_filename)
        if file.is_relative_to(_PACKAGE):
            return f"{file.relative_to(_PACKAGE.parent)}:{trace.tb_lineno}"
    return "m3i_jax"
