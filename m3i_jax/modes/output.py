"""Directories that a mode writes its results to, tried before anything is read or computed."""

import os
import pathlib
import tempfile

import jax

from m3i_jax.errors import UserError


def check_writable(place: str | os.PathLike[str], flag: str, way_out: str) -> pathlib.Path:
    """Make a directory, and a file in it that is gone at once. Of several hosts the first writes.

    Args:
      place: the directory.
      flag: names it in a message, with its value.
      way_out: what to do where it cannot be written to.

    Raises:
      UserError: it cannot be written to.

    >>> check_writable("/proc/here", "--out=/proc/here/x.npz", "choose another directory")
    Traceback (most recent call last):
    m3i_jax.errors.UserError: --out=/proc/here/x.npz: cannot write to '/proc/here' (No such file or directory); choose another directory
    """
    directory = pathlib.Path(place)
    if jax.process_index():
        return directory
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(
            f"{flag}: cannot write to {str(directory)!r} ({error.strerror or error}); {way_out}"
        ) from error
    return directory
