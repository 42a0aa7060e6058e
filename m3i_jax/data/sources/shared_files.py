"""Writes files of a directory that several hosts share and whose processes do not communicate: what
one of them wrote first counts for all."""

import contextlib
import os

from m3i_jax.data.sources import base
from m3i_jax.errors import UserError


def write_first(path: str, content: bytes) -> bytes:
    """Writes a file atomically, unless another process was first; returns what is there then, which
    all processes read back.

    Raises:
        UserError: the directory cannot be written to, or the file not read.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print(write_first(f"{folder}/a", b"mine"), write_first(f"{folder}/a", b"late"))
    b'mine' b'mine'
    """
    temporary = f"{path}.{os.urandom(8).hex()}.part"
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(content)
            try:
                os.link(temporary, path)  # fails where the file exists, also if it is not seen here
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                if not os.path.exists(path):
                    os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        return base.read_byte_range(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; make room or choose another directory"
        ) from error


def write_shared(path: str, content: bytes) -> None:
    """`base.write_atomic`, unless the file has this content: of several processes that write the
    same, the first does, and no reader loses the file that it has open. Raises UserError."""
    try:
        with open(path, "rb", opener=base.open_nonblocking) as file:
            if file.read(len(content) + 1) == content:
                return
    except OSError:  # absent, or not readable
        pass
    base.write_atomic(path, content)
