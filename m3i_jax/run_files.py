"""The files of a run: who writes each, who reads it, and how a change of it by another hand is
noticed.

`FILES` is the list. A file that is read back and that nothing else protects has its size and digest
in WORKDIR/digests/NAME, noted before the file itself is written: the newest two versions of it are
known, so that a process that is killed between the two writes leaves a file that is known as well.
Of a log that only grows, the beginning is noted. A run of an older version has no such notes, and
its files are taken as they are. What a checkpoint needs (the tokenizer, the log so far) is also in
its position, which its own digests cover."""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import pathlib
import stat
import zlib
from collections.abc import Mapping
from typing import Any

import xxhash

from m3i_jax.errors import UserError

Mark = tuple[int, str]  # size in bytes and digest of a file, or of its beginning
DIGESTS = "digests"  # directory of the notes
LARGEST = 2**28  # bytes of a file of a run that are read into memory
_log = logging.getLogger(__name__)
_warned: set[tuple[pathlib.Path, int]] = set()


@dataclasses.dataclass(frozen=True)
class RunFile:
    """One kind of file below WORKDIR.

    Attributes:
      name: path below WORKDIR; a * is any name.
      written_by, read_by: modes.
      verified: how a change is noticed, one of VERIFIED.
    """

    name: str
    written_by: tuple[str, ...]
    read_by: tuple[str, ...]
    verified: str


VERIFIED = {
    "note": (
        "size and digest are in WORKDIR/digests; another content is refused, or left out with a"
        " warning"
    ),
    "position": "size and digest are in WORKDIR/digests and in the position of each checkpoint",
    "beginning": (
        "as `position`, of the bytes that were there then; a warning, since no training depends"
        " on it"
    ),
    "checkpoint": "the digests.json of the checkpoint has size and digest, the step included",
    "itself": (
        "it ends in a checksum of its content; without it a warning, and what it protects is taken"
        " as it is"
    ),
    "rebuilt": "it has a checksum of each array; what does not hold is made again from the data",
    "shown": "only shown to a person; what cannot be read is left out",
    "not read": "written for people and other programs",
    "lock": (
        "the kernel's lock counts, not the content; anything but a file of one process number is"
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
    RunFile("tokenizer.json", (*_OPEN, "data"), (*_OPEN, "data"), "position"),
    RunFile("metrics.jsonl", _RUNS, ("train", "compare", "report"), "beginning"),
    RunFile("eval.json", ("eval",), ("eval", "report"), "note"),
    RunFile("eval-*/eval.json", ("eval",), ("eval",), "note"),
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
    """JSON on one line, and the CRC-32 of that line on the next.

    >>> unseal_note(seal_note({"a": 1})), unseal_note(seal_note({"a": 1}).replace(b"1", b"2"))
    ({'a': 1}, None)
    """
    line = json.dumps(value, sort_keys=True)
    return f"{line}\n{zlib.crc32(line.encode()):08x}\n".encode()


def unseal_note(content: bytes) -> Any:
    """What `seal_note` made bytes of; None if it is not whole."""
    line, _, check = content.partition(b"\n")
    if check != b"%08x\n" % zlib.crc32(line):
        return None
    # of somebody who knows how to make a checksum
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(line)
    return None


def file_mark(content: bytes) -> Mark:
    """Size and digest.

    >>> file_mark(b"123456789")
    (9, '72dcb18b67a17dff')
    """
    return len(content), xxhash.xxh3_64_hexdigest(content)


def parse_marks(value: Any) -> list[Mark] | None:
    """A list of sizes and digests that came out of a file; None if it is something else."""
    if not isinstance(value, list):
        return None
    out = []
    for one in value:
        if not isinstance(one, list | tuple) or [type(part) for part in one] != [int, str]:
            return None
        out.append((one[0], one[1]))
    return out


def read_bytes(path: pathlib.Path, limit: int = LARGEST) -> bytes:
    """The content of a file that has a content: no directory, no pipe that would be waited for.

    Raises:
      UserError: it is no file, or a huge one.
      OSError: it cannot be read.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise UserError(f"{path}: is no file; delete it or restore it") from None
        raise
    with open(file, "rb") as stream:
        about = os.fstat(file)
        if not stat.S_ISREG(about.st_mode):
            raise UserError(f"{path}: is no file; delete it or restore it")
        if about.st_size > limit:
            raise UserError(
                f"{path}: has {about.st_size:,} bytes, more than any run writes; restore it"
            )
        return stream.read(limit)


def _note_of(path: pathlib.Path) -> pathlib.Path:
    return path.parent / DIGESTS / path.name


def noted_marks(path: pathlib.Path) -> list[Mark]:
    """What is known of a file of a run, the newest first; nothing of one of an older version. A
    note that is damaged is a warning."""
    note = _note_of(path)
    try:
        found = parse_marks(unseal_note(read_bytes(note, 2**12)))
    except FileNotFoundError:
        return []
    except (OSError, UserError) as error:
        _warn(
            note,
            f"cannot be read ({getattr(error, 'strerror', '') or error}): {path.name} is taken as"
            " it is",
        )
        return []
    if found is None:
        _warn(note, f"is damaged: {path.name} is taken as it is")
    return found or []


def _warn(path: pathlib.Path, what: str) -> None:
    """Log a warning, once for what lies there."""
    try:
        now = path.lstat().st_mtime_ns
    except OSError:
        now = 0
    if (path, now) not in _warned:
        _warned.add((path, now))
        _log.warning("warning: %s %s", path, what)


def note_mark(path: pathlib.Path, new: Mark) -> None:
    """Note what a file will be, or what a log is so far, beside what it was. Only its one writer
    may call this.

    Raises:
      UserError: the place cannot be written to.
    """
    place = _note_of(path)
    known = [new, *(old for old in noted_marks(path) if old != new)][:2]
    unfinished = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            unfinished.write_bytes(seal_note(known))
            os.replace(unfinished, place)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write {place}: {error.strerror or error}; make room or choose another"
            " --workdir"
        ) from error


def mark_mismatch(content: bytes, known: list[Mark], *, beginning: bool = False) -> str:
    """How a content differs from what is known of it, "" if it does not.

    Args:
      content: of the file.
      known: sizes and digests, the newest first; one of them must hold. Nothing: anything is right.
      beginning: the newest is of the beginning of the content, and must hold.

    >>> mark_mismatch(b"ab", [file_mark(b"ab")]), mark_mismatch(b"abc", [file_mark(b"ab")]), mark_mismatch(b"abc", [file_mark(b"ab")], beginning=True)
    ('', '3 bytes, 2 were written', '')
    >>> mark_mismatch(b"ac", [file_mark(b"ab")])
    'other bytes than were written'
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
    """A file of a run as the run wrote it.

    Raises:
      Changed: it is another one.
      UserError: it is no file.
      OSError: it cannot be read.
    """
    wrong = ""
    # its writer notes a new version first, which a reader may miss once, but not again and again
    for _ in range(3):
        known = noted_marks(path)
        content = read_bytes(path, limit)
        if not (wrong := mark_mismatch(content, known)):
            return content
    raise FileChanged(
        f"{path}: is damaged, or was changed by hand ({wrong}); {remedy}; if the change is yours,"
        f" delete {_note_of(path)}"
    )


def read_run_text(path: pathlib.Path, remedy: str = "restore it") -> str:
    """As `read_run_file`, of UTF-8 text. Raises also UserError: it is no text."""
    try:
        return read_run_file(path, remedy).decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: is no text ({error.reason} at byte {error.start:,}); {remedy}"
        ) from None


def read_run_json(path: pathlib.Path, remedy: str = "restore it") -> dict[str, Any]:
    """As `read_run_file`, of one JSON object. Raises also UserError: it is none."""
    try:
        value = json.loads(read_run_text(path, remedy))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: is no JSON ({' '.join(str(error).split())[:100]}); {remedy}"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: is no JSON object; {remedy}")
    return value


def read_log(
    path: pathlib.Path, more: list[Mark] | None = None
) -> tuple[list[dict[str, Any]], str]:
    """The lines of a log that can be read, in the order of the file, and what is wrong with it (""
    if it begins as it was written).

    Args:
      path: of metrics.jsonl.
      more: what the position of a checkpoint knows of it, instead of what is noted.

    Raises:
      UserError: it is no file.
      OSError: it cannot be read.
    """
    known = noted_marks(path) if more is None else more
    content = read_bytes(path, 2**32)
    wrong = mark_mismatch(content, known, beginning=True)
    return [
        line for text in content.splitlines() if (line := parse_log_line(text)) is not None
    ], wrong


def parse_log_line(text: bytes) -> dict[str, Any] | None:
    """A line of a log; None if it is none, such as the half of a line that a killed run left.

    >>> parse_log_line(b'{"step": 7, "loss": 1.5}'), parse_log_line(b'{"step": 7, "lo'), parse_log_line(b'[7]'), parse_log_line(b'{"step": true}')
    ({'step': 7, 'loss': 1.5}, None, None, None)
    """
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    step = line.get("step") if isinstance(line, dict) else None
    return line if type(step) is int and 0 <= step < 2**53 else None


def changed_run_files(position: Mapping[str, Any], workdir: pathlib.Path) -> dict[str, str]:
    """{file: what is wrong} of the files that the position of a checkpoint knows and that are
    there."""
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
        if wrong := mark_mismatch(read_bytes(path, 2**32), [(one[0], one[1])], beginning=beginning):
            out[name] = wrong
    return out
