"""A check that the output directory of a mode is writable, before anything is read or computed."""

import os
import pathlib
import tempfile

import jax

from m3i_jax.errors import UserError


def check_writable(path: str | os.PathLike[str], flag: str, remedy: str) -> pathlib.Path:
    """Create a directory and try a temporary file in it, on the first host.

    Args:
      path: the directory.
      flag: the flag that names it, with its value, for the message.
      remedy: what the user can do about it.

    Raises:
      UserError: it cannot be written to.

    >>> check_writable("/proc/here", "--out=/proc/here/x.npz", "choose another directory")
    Traceback (most recent call last):
    m3i_jax.errors.UserError: --out=/proc/here/x.npz: cannot write to '/proc/here' (No such ...
    """
    directory = pathlib.Path(path)
    if jax.process_index():
        return directory
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(
            f"{flag}: cannot write to {str(directory)!r} ({error.strerror or error}); {remedy}"
        ) from error
    return directory
