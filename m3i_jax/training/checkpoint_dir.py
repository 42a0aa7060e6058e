"""The directories of a run's checkpoints: which steps are complete and whole, who reads one, how
one is deleted, and what saves leave behind.

checkpoints/<step>              complete: it got this name when all of it was there
checkpoints/<step>.new[...]     being written
checkpoints/<step>.old          being deleted
checkpoints/<step>.bad-<time>   damaged, set aside
"""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from m3i_jax import run_files
from m3i_jax.errors import UserError
from m3i_jax.training import array_checksums, file_checksums

# of a checkpoint; 1: without digests, 2: digests are CRC-32, 3: the digests do not have the step
FORMAT = 4
WAITS = (1.0, 4.0, 15.0)  # seconds before a checkpoint that cannot be read is read again
T = TypeVar("T")
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # nothing waits for the other end of a pipe
_LEFT = re.compile(r"\d+\.(new|old|orbax-checkpoint-tmp)([.-].*)?")


def complete_steps(directory: pathlib.Path) -> list[int]:
    """The steps that are complete on the disk, oldest first. Only real directories count, no link
    out of the place."""
    if not directory.is_dir():
        return []
    with os.scandir(directory) as entries:
        return sorted(
            int(e.name)
            for e in entries
            if re.fullmatch(r"0|[1-9]\d*", e.name) and e.is_dir(follow_symlinks=False)
        )


def make(directory: pathlib.Path) -> None:
    """Make the directory of checkpoints if it is not there. Raises UserError if it cannot be
    made."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{directory}: no checkpoints can be kept there ({error.strerror}); choose another"
            " --workdir"
        ) from error


def is_run(place: str) -> bool:
    """Whether a directory is the workdir of a run."""
    path = pathlib.Path(place)
    return (path / "checkpoints").is_dir() or (path / "config.txt").is_file()


def position(step: pathlib.Path) -> dict[str, Any]:
    """The JSON beside the state of a step.

    Raises:
      ValueError: it is damaged, or missing.
      OSError: it cannot be read.
    """
    try:
        value = json.loads(run_files.read_bytes(step / "position" / "metadata", 2**24))
    except (FileNotFoundError, NotADirectoryError, UserError, RecursionError) as error:
        raise ValueError(f"position/metadata: {getattr(error, 'strerror', '') or error}") from error
    if not isinstance(value, dict):
        raise ValueError("position/metadata: is no JSON object")
    return value


def complaints(step: pathlib.Path, say: Callable[[str], None] = lambda text: None) -> list[str]:
    """What is wrong with the files of a step, nothing if all are as they were written, by the save
    of that step.

    Raises:
      UserError: it is of a newer version.
      OSError: a file is there and cannot be read.
    """
    found = file_checksums.read_checksums(step)
    if found is not None:
        if found.get("format", 0) > FORMAT:
            raise UserError(
                f"checkpoint {step.name}: is of format {found['format']}, this version of m3i_jax"
                f" reads up to {FORMAT}; use a newer version"
            )
        if not _is_of_its_name(step, found):
            of = f"checkpoint {found['step']}" if "step" in found else "another checkpoint"
            return [f"{file_checksums.NAME}: is that of {of}, which was copied or renamed"]
    elif not os.path.lexists(step / file_checksums.NAME):
        try:
            old = "format" not in position(step)
        except ValueError as error:
            return [f"position/metadata: cannot be read ({' '.join(str(error).split())[:100]})"]
        if old:
            say(
                f"warning: checkpoint {step.name} was saved by an older version, without digests:"
                " it is used as it is"
            )
            return []
    return file_checksums.verify_checksums(step)


def _is_of_its_name(step: pathlib.Path, found: dict[str, Any]) -> bool:
    """Whether digests are of the step whose name the directory has. Those of format 3 have the
    fingerprint of its number."""
    number, arrays = int(step.name), found.get("arrays", {})
    if "step" in found or "step" not in arrays:
        return found.get("step", number) == number
    return (
        arrays["step"] == array_checksums.checksum_arrays({"step": np.int32(number)}).read()["step"]
    )


def patiently(look: Callable[[], T], place: pathlib.Path, say: Callable[[str], None]) -> T:
    """What `look` returns. What cannot be read is tried again: a server may be away for a moment,
    and nothing says that the content is damaged.

    Args:
      look: reads `place`, or what is below it.
      place: a checkpoint, or the directory of all.
      say: prints a line.

    Raises:
      UserError: it still cannot be read.
    """
    for wait in (*WAITS, None):
        try:
            return look()
        except OSError as error:
            file = f"{error.filename or place}"
            reason = f"{file} cannot be read ({error.strerror or error})"
            if wait is None:
                raise UserError(
                    f"{reason}; what is in it may be whole, so nothing was renamed and no older"
                    " step is used: see to its permissions, its disk or its server and run again;"
                    f" only if it is lost, move {place} away"
                ) from error
            say(f"warning: {reason}; tried again in {wait:g} seconds")
            time.sleep(wait)
    raise AssertionError("unreachable")


def note_newest(directory: pathlib.Path, step: int) -> None:
    """Note outside the directory of checkpoints that there is one. A directory that is empty later
    was lost."""
    if directory.name == "checkpoints":  # of a run
        run_files.note_mark(directory, (step, ""))  # no size and no digest: its number


def lost_since(workdir: pathlib.Path, newest: int) -> int:
    """The step that was saved last, if it is later than the newest that is there and was not set
    aside; else 0."""
    directory = workdir / "checkpoints"
    saved = run_files.noted_marks(directory)
    return (
        saved[0][0]
        if saved and saved[0][0] > newest and not any(directory.glob(f"{saved[0][0]}.bad-*"))
        else 0
    )


def refuse_lost(workdir: pathlib.Path, log: list[dict[str, Any]]) -> None:
    """Refuse to start a run anew where one has been, but its checkpoints are gone, as those on a
    disk that is not mounted.

    Args:
      workdir: of the run.
      log: its lines.

    Raises:
      UserError: what is there, and how to go on.
    """
    directory = workdir / "checkpoints"
    if os.path.lexists(directory) and not directory.exists():
        raise UserError(
            f"{directory}: is a link to a place that is not there; mount its disk, or delete the"
            " link"
        )
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: is no directory; move it away, or choose another --workdir")
    if complete_steps(directory) or any(directory.glob("*.bad-*")):
        return
    saved = run_files.noted_marks(directory)
    last = max((line["step"] for line in log), default=0)
    if saved:
        there = f"saved checkpoint {saved[0][0]:,}"
    elif last and not directory.is_dir():
        there = f"logged {last:,} steps in metrics.jsonl"
    else:
        return
    raise UserError(
        f"--workdir {workdir}: there is no checkpoint in checkpoints/, but the run there {there};"
        " mount or restore them and run again, or, to start anew, move metrics.jsonl and"
        f" {run_files.DIGESTS}/ away or choose another --workdir"
    )


@contextlib.contextmanager
def hold_step(step: pathlib.Path) -> Iterator[None]:
    """While this lasts, the retention of a run that goes on does not delete the step."""
    try:
        file = os.open(step / file_checksums.NAME, _FLAGS)
    except OSError:  # of an older version, or damaged
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_SH)
        yield
    finally:
        os.close(file)


def delete_step(step: pathlib.Path) -> bool:
    """Delete a step unless somebody reads it: first its name, so that half of it is never taken for
    all."""
    gone = step.with_name(f"{step.name}.old")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(FileNotFoundError):
            file = os.open(step / file_checksums.NAME, _FLAGS)
            stack.callback(os.close, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:  # a file system without locks
                pass
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(step, gone)
    shutil.rmtree(gone, ignore_errors=True)
    return True


def retain_newest(directory: pathlib.Path, keep: int, say: Callable[[str], None]) -> None:
    """Delete all steps but the newest."""
    for old in complete_steps(directory)[:-keep]:
        try:
            delete_step(directory / str(old))
        except OSError as error:  # no reason to think that the save failed
            say(f"warning: checkpoint {old} cannot be deleted ({error.strerror or error})")


def quarantine_step(step: pathlib.Path, wrong: list[str]) -> str:
    """Give a damaged step another name; what to tell a person. Raises UserError if it cannot be
    renamed."""
    name = f"{step.name}.bad-{time.strftime('%Y%m%d-%H%M%S')}"
    more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    damaged = f"checkpoint {step.name} is damaged ({'; '.join(wrong[:3])}{more})"
    try:
        os.rename(step, step.with_name(name))
    except OSError as error:
        raise UserError(
            f"{damaged}, and {step} cannot be renamed ({error.strerror}); move it away and run"
            " again"
        ) from error
    fsync_dir(step.parent)
    return f"warning: {damaged}; set aside as {name}, the one before is used"


def fsync_dir(directory: pathlib.Path) -> None:
    """The names in a directory to the disk."""
    with contextlib.suppress(OSError):  # some file systems have no such thing
        file_checksums.fsync_path(directory)


def remove_leftovers(directory: pathlib.Path) -> None:
    """Remove what saves and deletions left behind that were cut off. Only for the one that saves
    there.

    A save that failed is told at its first error, when other threads of it may still write: what
    they leave is removed again, for a second."""
    for wait in (0.0, 0.1, 0.3, 0.6):
        with os.scandir(directory) as entries:
            left = [
                e.path
                for e in entries
                if _LEFT.fullmatch(e.name) and e.is_dir(follow_symlinks=False)
            ]
        if not left:
            return
        time.sleep(wait)
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
