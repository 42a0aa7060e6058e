"""Writing files atomically, and text without secrets."""

import contextlib
import os
import pathlib
import socket
from collections.abc import Iterator

from m3i_jax import privacy, run_files
from m3i_jax.errors import UserError


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A temporary path to write to, renamed to `path` at the end of the block and removed after an
    error.

    Raises:
      UserError: the file cannot be written.

    >>> import tempfile
    >>> target = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
    >>> with atomic_file(target) as temporary:
    ...     _ = temporary.write_text("content")
    >>> target.read_text(), len(list(target.parent.iterdir()))
    ('content', 1)
    """
    target = pathlib.Path(path)
    # with the host's name: hosts of a pod share the directory, and may have equal process ids
    temporary = target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        try:
            yield temporary
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write {target}: {error.strerror or error}; make room or choose another"
            " --workdir"
        ) from error


def write_text_atomic(path: str | os.PathLike[str], text: str, *, noted: bool = False) -> None:
    """Write a UTF-8 file atomically, with secrets redacted and control characters escaped. JSON
    comes from `privacy.json_text`, which escapes them as JSON does.

    Args:
      path: of the file.
      text: its content.
      noted: record its digest first, for a file that `run_files.read_run_file` reads.

    Raises:
      UserError: the file cannot be written.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
    >>> write_text_atomic(path, "é")
    >>> path.read_bytes()
    b'\\xc3\\xa9'
    """
    content = privacy.escape_control(privacy.redact(text)).encode("utf-8", "replace")
    if noted:
        run_files.note_mark(pathlib.Path(path), run_files.file_mark(content))
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)
