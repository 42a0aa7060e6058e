"""Files that are whole or not there; a text holds no secret."""

import contextlib
import os
import pathlib
import socket
from collections.abc import Iterator

from m3i_jax import privacy, run_files
from m3i_jax.errors import UserError


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A place to write a file to, which takes the name `path` at the end of the block, or is gone
    after an error.

    Raises:
      UserError: the place cannot be written to.

    >>> import tempfile
    >>> wanted = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
    >>> with atomic_file(wanted) as place:
    ...     _ = place.write_text("all of it")
    >>> wanted.read_text(), len(list(wanted.parent.iterdir()))
    ('all of it', 1)
    """
    wanted = pathlib.Path(path)
    # Hosts of a pod share the directory and count their processes alike.
    unfinished = wanted.with_name(f".{wanted.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        try:
            yield unfinished
            os.replace(unfinished, wanted)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write {wanted}: {error.strerror or error}; make room or choose another"
            " --workdir"
        ) from error


def write_text_atomic(path: str | os.PathLike[str], text: str, *, noted: bool = False) -> None:
    """Write a UTF-8 file whole or not at all, without the secrets that the text may hold and with
    its control characters spelt out. JSON comes from `privacy.json_text`, which spells them as JSON
    does.

    Args:
      path: of the file.
      text: its content.
      noted: the run reads it back, by `run_files.read_run_file`: note its digest first.

    Raises:
      UserError: the place cannot be written to.

    >>> import tempfile
    >>> place = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
    >>> write_text_atomic(place, "é")
    >>> place.read_bytes()
    b'\\xc3\\xa9'
    """
    content = privacy.escape_control(privacy.redact(text)).encode("utf-8", "replace")
    if noted:
        run_files.note_mark(pathlib.Path(path), run_files.file_mark(content))
    with atomic_file(path) as place:
        place.write_bytes(content)
