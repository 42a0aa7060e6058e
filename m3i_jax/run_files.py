"""The files of a run: which mode writes and reads each, how they are written atomically and without
secrets, and how a change by another program is detected.

`FILES` lists them. A file that a mode reads back and nothing else protects has its size and digest
in WORKDIR/digests/NAME, recorded before the file itself is written. The record has the newest two
versions, so that the file is valid also if the process is killed between the two writes. Of a log
that only grows, the record covers the beginning. WORKDIR/digests/NAME.origin says what a file was
made from. A run of an older version has no records, and its files are used unverified. What a
checkpoint needs (the tokenizer, the log so far) is also in its position, which its own checksums
cover."""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import pathlib
import socket
import stat
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import xxhash

from m3i_jax import privacy
from m3i_jax.errors import UserError

Mark = tuple[int, str]  # size in bytes and digest of a file, or of its beginning
DIGESTS = "digests"  # directory of the records
LARGEST = 2**28  # most bytes of a file that are read into memory
_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_warned: set[tuple[pathlib.Path, int]] = set()


@dataclasses.dataclass(frozen=True)
class RunFile:
    """One kind of file below WORKDIR.

    Attributes:
      name: path below WORKDIR; * matches any name.
      written_by, read_by: modes.
      verified: how a change is detected, one of VERIFIED.
    """

    name: str
    written_by: tuple[str, ...]
    read_by: tuple[str, ...]
    verified: str


VERIFIED = {
    "note": (
        "size and digest are in WORKDIR/digests; other content is refused, or left out with a"
        " warning"
    ),
    "position": "size and digest are in WORKDIR/digests and in the position of each checkpoint",
    "beginning": (
        "as `position`, of the bytes written by then; only a warning, since training does not"
        " depend on it"
    ),
    "checkpoint": "the digests.json of the checkpoint has its size, digest and step",
    "itself": (
        "it ends in a checksum of its content; without it a warning, and what it protects is used"
        " unverified"
    ),
    "rebuilt": "it has a checksum of each array; a damaged one is built again from the data",
    "shown": "only displayed; a damaged one is left out",
    "not read": "written for people and other programs",
    "lock": (
        "the kernel's lock counts, not the content; anything but a file with a process id is"
        " refused"
    ),
}

_RUNS = ("train", "compare")
_OPEN = ("train", "compare", "eval", "features", "preview", "profile")
FILES = (
    RunFile(
        "config.txt", _RUNS, ("train", "compare", "eval", "export", "features", "report"), "note"
    ),
    RunFile("data.txt", _RUNS, ("train", "compare", "eval", "report"), "note"),
    # also read by m3i_jax.load, of detection and segmentation
    RunFile("classes.json", ("train",), ("eval", "export"), "note"),
    RunFile("detections-*.json", ("train", "eval"), (), "not read"),
    RunFile("eval-*/detections-*.json", ("eval",), (), "not read"),
    RunFile("tokenizer.json", (*_OPEN, "data"), (*_OPEN, "data"), "position"),
    RunFile("metrics.jsonl", _RUNS, ("train", "compare", "report"), "beginning"),
    RunFile("eval.json", ("eval",), ("eval", "report"), "note"),
    RunFile("eval-*/eval.json", ("eval",), (*_RUNS, "eval", "report"), "note"),
    RunFile("eval-*/pictures/*", ("eval",), (), "not read"),
    RunFile("result.json", ("compare",), ("compare",), "note"),
    RunFile("digests/*", (*_OPEN, "data"), (*_OPEN, "report", "export"), "itself"),
    RunFile("index/*.npz", (*_OPEN, "data", "convert"), (*_OPEN, "data", "convert"), "rebuilt"),
    RunFile("checkpoints/*/digests.json", _RUNS, ("train", "eval", "export", "features"), "itself"),
    RunFile(
        "checkpoints/*/position/*", _RUNS, ("train", "eval", "export", "features"), "checkpoint"
    ),
    RunFile("checkpoints/*/state/*", _RUNS, ("train", "eval", "export", "features"), "checkpoint"),
    RunFile("dumps/*/step.json", _RUNS, ("replay",), "note"),
    RunFile("dumps/*/config.txt", _RUNS, ("replay",), "note"),
    RunFile("dumps/*/batch-*.npz", _RUNS, ("replay",), "note"),
    RunFile("dumps/*/state/*", _RUNS, ("replay",), "checkpoint"),
    RunFile("run.lock", _RUNS, _RUNS, "lock"),
    RunFile("wandb.id", _RUNS, _RUNS, "shown"),
    RunFile("panels/*.png", _RUNS, ("report",), "shown"),
    RunFile("pictures/*.json", (*_RUNS, "eval"), ("report",), "note"),
    RunFile("pictures/*.png", (*_RUNS, "eval"), ("report",), "shown"),
    RunFile("report.html", (*_RUNS, "eval", "report"), (), "not read"),
    RunFile("compare/step_seconds.json", ("compare",), ("compare",), "note"),
    RunFile("compare.md", ("compare",), (), "not read"),
    RunFile("compare.json", ("compare",), (), "not read"),
    RunFile("compare.png", ("compare",), (), "not read"),
    RunFile("export/*", ("export",), (), "not read"),
    RunFile("layout.txt", ("train", "eval"), (), "not read"),
    RunFile("preview.png", ("preview",), (), "not read"),
    RunFile("data.json", ("data",), (), "not read"),
    RunFile("data.html", ("data",), (), "not read"),
    RunFile("compile.json", ("compile",), (), "not read"),
    RunFile("profile/*", (*_RUNS, "profile"), (), "not read"),
    RunFile("stacks-*.txt", _RUNS, (), "not read"),
)


class FileChanged(UserError):
    """A file of a run is not what the run wrote."""


def seal_note(value: Any) -> bytes:
    """Returns a JSON value on one line, and the CRC-32 of that line on the next.

    >>> unseal_note(seal_note({"a": 1})), unseal_note(seal_note({"a": 1}).replace(b"1", b"2"))
    ({'a': 1}, None)
    """
    line = json.dumps(value, sort_keys=True)
    return f"{line}\n{zlib.crc32(line.encode()):08x}\n".encode()


def unseal_note(content: bytes) -> Any:
    """Returns the value of the bytes of `seal_note`; None if they are damaged."""
    line, _, check = content.partition(b"\n")
    if check != b"%08x\n" % zlib.crc32(line):
        return None
    # a forged checksum may cover invalid JSON
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(line)
    return None


def file_mark(content: bytes) -> Mark:
    """Returns the size and digest of a content.

    >>> file_mark(b"123456789")
    (9, '72dcb18b67a17dff')
    """
    return len(content), xxhash.xxh3_64_hexdigest(content)


def parse_marks(value: Any) -> list[Mark] | None:
    """Returns a list of sizes and digests from parsed JSON; None if it is not one."""
    if not isinstance(value, list):
        return None
    out = []
    for one in value:
        if not isinstance(one, list | tuple) or [type(part) for part in one] != [int, str]:
            return None
        out.append((one[0], one[1]))
    return out


def read_bytes(path: pathlib.Path, limit: int = LARGEST) -> bytes:
    """Returns the content of a regular file; never blocks on a pipe.

    Raises:
      UserError: it is not a regular file, or is larger than the limit.
      OSError: it cannot be read.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise UserError(f"{path}: is not a regular file; delete it or restore it") from None
        raise
    with open(file, "rb") as stream:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: is not a regular file; delete it or restore it")
        if status.st_size > limit:
            raise UserError(
                f"{path}: has {status.st_size:,} bytes, more than any run writes; restore it"
            )
        return stream.read(min(limit, status.st_size))


def note_path(path: pathlib.Path) -> pathlib.Path:
    """Returns the path of the record of a file."""
    return path.parent / DIGESTS / path.name


def noted_marks(path: pathlib.Path) -> list[Mark]:
    """Recorded sizes and digests of a file of a run, the newest first; [] without a record. Logs a
    warning if the record is damaged."""
    return _read_note(note_path(path), path.name, parse_marks) or []


def _read_note(note: pathlib.Path, name: str, parse: Callable[[Any], _T | None]) -> _T | None:
    """The value of a record, None without one. Logs a warning if it is damaged, or if `parse`
    returns None."""
    try:
        value = parse(unseal_note(read_bytes(note, 2**12)))
    except FileNotFoundError:
        return None
    except (OSError, UserError) as error:
        why = getattr(error, "strerror", "") or error
        _warn(note, f"cannot be read ({why}): {name} is used unverified")
        return None
    if value is None:
        _warn(note, f"is damaged: {name} is used unverified")
    return value


def _write_note(note: pathlib.Path, value: Any) -> None:
    """Write a record atomically. Raises UserError if that fails."""
    temporary = note.with_name(f".{note.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(seal_note(value))
            os.replace(temporary, note)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write {note}: {error.strerror or error}; make room or choose another --workdir"
        ) from error


def origin_path(path: pathlib.Path) -> pathlib.Path:
    """Returns the path of the record of what a file was made from."""
    return path.parent / DIGESTS / f"{path.name}.origin"


def note_origin(path: pathlib.Path, new: Mark, origin: Mapping[str, Any]) -> None:
    """Record what the next version of a file is made from.

    Args:
      path: of the file, which does not exist yet: of an older version this would be wrong.
      new: size and digest that it will have.
      origin: as JSON; settings, digests.

    Raises:
      UserError: the record cannot be written.
    """
    _write_note(origin_path(path), {"mark": list(new), "origin": dict(origin)})


def noted_origin(path: pathlib.Path, mark: Mark) -> dict[str, Any]:
    """Returns what a file was made from; {} without a record, or with that of another version
    than the one of this size and digest."""

    def parse(value: Any) -> dict[str, Any] | None:
        marks = parse_marks([value.get("mark")]) if isinstance(value, dict) else None
        origin = value.get("origin") if marks else None
        if not marks or not isinstance(origin, dict):
            return None
        return origin if marks[0] == mark else {}

    return _read_note(origin_path(path), path.name, parse) or {}


def _warn(path: pathlib.Path, problem: str) -> None:
    """Log a warning, once for each version of the file."""
    try:
        modified = path.lstat().st_mtime_ns
    except OSError:
        modified = 0
    if (path, modified) not in _warned:
        _warned.add((path, modified))
        _log.warning("warning: %s %s", path, problem)


def note_mark(path: pathlib.Path, new: Mark) -> None:
    """Record the size and digest of a file's next version, or of a log so far, and keep those of
    the version before. Only the writer of the file may call this.

    Raises:
      UserError: the record cannot be written.
    """
    known = [new, *(old for old in noted_marks(path) if old != new)][:2]
    _write_note(note_path(path), known)


def mark_mismatch(content: bytes, known: list[Mark], *, beginning: bool = False) -> str:
    """Returns how a content differs from its recorded sizes and digests, "" if it does not.

    Args:
      content: of the file.
      known: sizes and digests, the newest first; one of them must match. []: anything matches.
      beginning: the newest covers the beginning of the content, and must match.

    >>> known = [file_mark(b"ab")]
    >>> [mark_mismatch(content, known) for content in (b"ab", b"abc", b"ac")]
    ['', '3 bytes, 2 were written', 'other bytes than were written']
    >>> mark_mismatch(b"abc", known, beginning=True)
    ''
    """
    if beginning:
        known, content, length = (
            known[:1],
            content[: known[0][0]] if known else content,
            len(content),
        )
    else:
        length = len(content)
    if not known or file_mark(content) in known:
        return ""
    if len(content) in [size for size, _ in known]:
        return "other bytes than were written"
    return f"{length:,} bytes, {known[0][0]:,} were written"


def read_run_file(path: pathlib.Path, remedy: str = "restore it", *, limit: int = LARGEST) -> bytes:
    """Returns the content of a file of a run, verified against its record.

    Raises:
      FileChanged: it has another content.
      UserError: it is not a regular file.
      OSError: it cannot be read.
    """
    mismatch = ""
    # the writer records a new version first: a reader may see only the old record, but not thrice
    for _ in range(3):
        known = noted_marks(path)
        content = read_bytes(path, limit)
        if not (mismatch := mark_mismatch(content, known)):
            return content
    raise FileChanged(
        f"{path}: is damaged, or was changed by hand ({mismatch}); {remedy}; if the change is"
        f" yours, delete {note_path(path)}"
    )


def read_run_text(path: pathlib.Path, remedy: str = "restore it") -> str:
    """`read_run_file` as UTF-8 text. Also raises UserError: it is not text."""
    try:
        return read_run_file(path, remedy).decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: is not UTF-8 text ({error.reason} at byte {error.start:,}); {remedy}"
        ) from None


def read_run_json(path: pathlib.Path, remedy: str = "restore it") -> dict[str, Any]:
    """`read_run_file` as a JSON object. Also raises UserError: it is not one."""
    try:
        value = json.loads(read_run_text(path, remedy))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: is not JSON ({' '.join(str(error).split())[:100]}); {remedy}"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not a JSON object; {remedy}")
    return value


def read_log(
    path: pathlib.Path, more: list[Mark] | None = None
) -> tuple[list[dict[str, Any]], str]:
    """Returns the readable lines of a log, in the order of the file, and how its beginning differs
    from its record ("" if it does not).

    Args:
      path: of metrics.jsonl.
      more: sizes and digests from the position of a checkpoint, instead of the record.

    Raises:
      UserError: it is not a regular file.
      OSError: it cannot be read.
    """
    known = noted_marks(path) if more is None else more
    content = read_bytes(path, 2**32)
    mismatch = mark_mismatch(content, known, beginning=True)
    lines = [line for text in content.splitlines() if (line := parse_log_line(text)) is not None]
    return lines, mismatch


def parse_log_line(text: bytes) -> dict[str, Any] | None:
    """Returns the values of a line of a log; None for a damaged line, such as half a line of a
    killed run.

    >>> parse_log_line(b'{"step": 7, "loss": 1.5}'), parse_log_line(b'{"step": 7, "lo')
    ({'step': 7, 'loss': 1.5}, None)
    >>> parse_log_line(b'[7]'), parse_log_line(b'{"step": true}')
    (None, None)
    """
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    step = line.get("step") if isinstance(line, dict) else None
    if type(step) is not int or not 0 <= step < 2**53:
        return None
    return {sys.intern(name): value for name, value in line.items()}  # once for all lines


def changed_run_files(position: Mapping[str, Any], workdir: pathlib.Path) -> dict[str, str]:
    """Returns {file: mismatch} of the files whose size and digest the position of a checkpoint
    has."""
    out = {}
    known = position.get("files", {})
    for name, one in known.items() if isinstance(known, dict) else ():
        path = workdir / name
        if name not in {file.name for file in FILES} or parse_marks([one]) is None:
            continue
        if not path.is_file():
            out[name] = "is missing"
            continue
        beginning = next(file.verified for file in FILES if file.name == name) == "beginning"
        mark = (one[0], one[1])
        if mismatch := mark_mismatch(read_bytes(path, 2**32), [mark], beginning=beginning):
            out[name] = mismatch
    return out


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a temporary path to write to, renamed to `path` at the end of the block and removed
    after an error.

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
    """Write a UTF-8 file atomically, with secrets redacted and control characters escaped. For JSON
    use `write_json_atomic`.

    Args:
      path: of the file.
      text: its content.
      noted: record its digest first, for a file that `read_run_file` reads.

    Raises:
      UserError: the file cannot be written.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
    >>> write_text_atomic(path, "é")
    >>> path.read_bytes()
    b'\\xc3\\xa9'
    """
    _write_atomic(path, privacy.escape_control(privacy.redact(text)), noted)


def write_json_atomic(
    path: str | os.PathLike[str], value: Any, *, indent: int | None = 1, noted: bool = False
) -> None:
    """Write a value as a JSON file atomically, with secrets in its texts redacted. As one text, a
    number beside a name such as "caption/token" would be taken for a secret, and the file would no
    longer be JSON. `noted`, and errors: as of `write_text_atomic`."""
    _write_atomic(path, privacy.json_text(privacy.redact_tree(value), indent=indent) + "\n", noted)


def _write_atomic(path: str | os.PathLike[str], text: str, noted: bool) -> None:
    content = text.encode("utf-8", "replace")
    if noted:
        note_mark(pathlib.Path(path), file_mark(content))
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)
