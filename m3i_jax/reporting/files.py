"""A text file that is whole or not there, and holds no secret."""

import os
import pathlib

from m3i_jax import privacy
from m3i_jax.errors import UserError


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file whole or not at all, without the secrets that the text may hold.

    Raises:
      UserError: the place cannot be written to.

    >>> import tempfile
    >>> place = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
    >>> write_text(place, "é")
    >>> place.read_bytes()
    b'\\xc3\\xa9'
    """
    place = pathlib.Path(path)
    unfinished = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        try:
            unfinished.write_text(privacy.redact(text), encoding="utf-8", errors="replace")
            os.replace(unfinished, place)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {place}: {error.strerror or error}; make room or choose another --workdir") from error
