"""The directories of a run's checkpoints: listing complete steps, verifying, locking and deleting a
step, and removing what interrupted saves left.

checkpoints/<step>              complete: renamed to this when all of it was written
checkpoints/<step>.new[...]     being written; beside <step>, the rename was interrupted
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
from m3i_jax.errors import TransientError, UserError, is_transient
from m3i_jax.training import checksums

# format of a checkpoint; 1: no checksums, 2: CRC-32, 3: the checksums do not have the step number
FORMAT = 4
# of an export: its arrays in one file or as an Orbax checkpoint, and what it says about a model
ARRAYS, PARAMETERS, DESCRIPTION = "model.npz", "parameters", "model.json"
# Seconds before each retry of a failed read; an error that a server does not cause, such as a
# missing permission, has `BRIEF` waits.
WAITS, BRIEF = (1.0, 4.0, 15.0, 30.0, 60.0), 3
T = TypeVar("T")
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # opening a pipe does not block
_LEFTOVER = re.compile(r"\d+\.(new|old|orbax-checkpoint-tmp)([.-].*)?")


def complete_steps(directory: pathlib.Path) -> list[int]:
    """Complete steps on the disk, oldest first. Only real directories count, no links."""
    if not directory.is_dir():
        return []
    with os.scandir(directory) as entries:
        return sorted(
            int(e.name)
            for e in entries
            if re.fullmatch(r"0|[1-9]\d*", e.name) and e.is_dir(follow_symlinks=False)
        )


def make_checkpoint_dir(directory: pathlib.Path) -> None:
    """Create the directory of checkpoints if it is absent. Raises UserError if that fails."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{directory}: cannot be created ({error.strerror}); choose another --workdir"
        ) from error


def is_run(directory: str) -> bool:
    """Returns whether a directory is the workdir of a run."""
    path = pathlib.Path(directory)
    if (path / "checkpoints").is_dir():
        return True
    return (path / "config.txt").is_file() and not is_export(directory)


def is_export(directory: str) -> bool:
    """Returns whether a directory has the settings of a run and, in the place of checkpoints, its
    exported parameters or the description of an exported model (--mode=export)."""
    path = pathlib.Path(directory)
    if (path / "checkpoints").is_dir() or not (path / "config.txt").is_file():
        return False
    return (path / PARAMETERS).is_dir() or (path / DESCRIPTION).is_file()


def has_settings(directory: str) -> bool:
    """Returns whether a directory has the settings of a run beside its weights: a run or an
    export."""
    return is_run(directory) or is_export(directory)


def position(step: pathlib.Path) -> dict[str, Any]:
    """Returns the JSON that was saved with the state of a step.

    Raises:
      ValueError: it is damaged or missing.
      OSError: it cannot be read.
    """
    try:
        value = json.loads(run_files.read_bytes(step / "position" / "metadata", 2**24))
    except (FileNotFoundError, NotADirectoryError, UserError, RecursionError) as error:
        raise ValueError(f"position/metadata: {getattr(error, 'strerror', '') or error}") from error
    if not isinstance(value, dict):
        raise ValueError("position/metadata: is not a JSON object")
    return value


def find_damage(step: pathlib.Path, log: Callable[[str], None] = lambda text: None) -> list[str]:
    """Returns differences between the files of a step and what its save wrote, `FILE: PROBLEM`
    each; empty if there are none.

    Raises:
      UserError: a newer version wrote the step.
      OSError: a file exists and cannot be read.
    """
    saved = checksums.read_checksums(step)
    if saved is not None:
        if saved.get("format", 0) > FORMAT:
            raise UserError(
                f"checkpoint {step.name}: has format {saved['format']}, this version of m3i_jax"
                f" reads up to {FORMAT}; use a newer version"
            )
        if not _has_own_step(step, saved):
            owner = f"checkpoint {saved['step']}" if "step" in saved else "another checkpoint"
            return [f"{checksums.NAME}: belongs to {owner}, which was copied or renamed"]
    elif not os.path.lexists(step / checksums.NAME):
        try:
            old = "format" not in position(step)
        except ValueError as error:
            return [f"position/metadata: cannot be read ({' '.join(str(error).split())[:100]})"]
        if old:
            log(
                f"warning: checkpoint {step.name} was saved by an older version, without checksums:"
                " it is used unverified"
            )
            return []
    return checksums.verify_checksums(step)


def _has_own_step(step: pathlib.Path, saved: dict[str, Any]) -> bool:
    """Whether checksums belong to the step that the directory is named after. Those of format 3
    have the checksum of the step counter instead of its number."""
    number, arrays = int(step.name), saved.get("arrays", {})
    if "step" in saved or "step" not in arrays:
        return saved.get("step", number) == number
    return arrays["step"] == checksums.checksum_arrays({"step": np.int32(number)}).read()["step"]


def retry_read(read: Callable[[], T], path: pathlib.Path, log: Callable[[str], None]) -> T:
    """Returns the result of `read`, retried after an OSError: a server may be unavailable for a
    moment, and the content need not be damaged.

    Args:
      read: reads `path`, or files below it.
      path: a checkpoint, or the directory of all.
      log: logs a line.

    Raises:
      UserError: the last retry failed too; TransientError if it may succeed later.
    """
    for attempt in range(len(WAITS) + 1):
        try:
            return read()
        except OSError as error:
            transient = is_transient(error)
            waits = WAITS if transient else WAITS[:BRIEF]
            file = f"{error.filename or path}"
            reason = f"{file} cannot be read ({error.strerror or error})"
            if attempt >= len(waits):
                raise (TransientError if transient else UserError)(
                    f"{reason}; its content may be undamaged, so nothing was renamed and no older"
                    " step is used: check its permissions, its disk or its server and run again;"
                    f" only if it is lost, move {path} away"
                ) from error
            log(f"warning: {reason}; retrying in {waits[attempt]:g} seconds")
            time.sleep(waits[attempt])
    raise AssertionError("unreachable")


def saved_checksums(step: pathlib.Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Returns the JSON object of digests.json, read as `retry_read` does; {} for an older step.
    Raises UserError."""
    return retry_read(lambda: checksums.read_checksums(step), step / checksums.NAME, log) or {}


def rename_step(new: pathlib.Path, step: pathlib.Path) -> None:
    """Rename what was written to its step. Where directories are renamed file by file, a failure
    may leave a part in each; then the other files are moved one by one.

    Raises:
      OSError: files are left in `new`.
    """
    began = step.exists()
    try:
        os.rename(new, step)
    except OSError:
        if began or not (step.is_dir() and new.is_dir()):
            raise
        try:
            _move_files(new, step)
        except OSError:
            shutil.rmtree(step, ignore_errors=True)  # a part of it would count as complete
            raise
    fsync_dir(step.parent)


def _move_files(new: pathlib.Path, step: pathlib.Path) -> None:
    for folder, _, names in os.walk(new):
        to = step / pathlib.Path(folder).relative_to(new)
        to.mkdir(parents=True, exist_ok=True)
        for name in names:
            os.replace(pathlib.Path(folder, name), to / name)
    shutil.rmtree(new, ignore_errors=True)


def finish_rename(step: pathlib.Path, log: Callable[[str], None]) -> bool:
    """Finish the rename of a step that was interrupted while files were moved one by one, which
    only the process that saves may call. Returns whether there was one: <step>.new is beside it.

    Raises:
      UserError: the files cannot be moved.
    """
    new = step.with_name(f"{step.name}.new")
    if not new.is_dir() or new.is_symlink():
        return False
    log(
        f"warning: the rename of checkpoint {step.name} was interrupted: the files that are still"
        f" in {new.name} are moved now"
    )
    try:
        _move_files(new, step)
    except OSError as error:
        raise UserError(
            f"{new}: its files cannot be moved to {step.name} ({error.strerror or error}); check"
            f" the disk and run again, or move both away"
        ) from error
    fsync_dir(step.parent)
    return True


def never_saved(directory: pathlib.Path) -> bool:
    """Returns whether this is of a run of which no step was ever saved completely: none is noted
    outside the directory (`note_newest`), and none was set aside."""
    of_run = directory.name == "checkpoints"
    return of_run and not _has_note(directory) and not any(directory.glob("*.bad-*"))


def _has_note(directory: pathlib.Path) -> bool:
    """Whether a saved step is noted, or may be, in a record that cannot be read now."""
    try:
        run_files.note_path(directory).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass
    return True


def drop_first(step: pathlib.Path, problems: list[str]) -> str:
    """Make the first step of a run, whose save was interrupted, a leftover that the next save
    removes; returns the warning to log. Raises UserError if that fails."""
    try:
        os.rename(step, step.with_name(f"{step.name}.old"))
    except OSError as error:
        raise UserError(
            f"{step}: is incomplete ({problems[0]}) and cannot be renamed ({error.strerror}); move"
            " it away and run again"
        ) from error
    fsync_dir(step.parent)
    return (
        f"warning: the save of checkpoint {step.name}, the first of this run, was interrupted"
        f" ({problems[0]}): nothing was saved yet, and the run starts again"
    )


def note_newest(directory: pathlib.Path, step: int) -> None:
    """Record outside the directory of checkpoints that a step was saved, so that a directory that
    is empty later counts as lost."""
    if directory.name == "checkpoints":  # of a run
        run_files.note_mark(directory, (step, ""))  # the step number in place of a size


def lost_since(workdir: pathlib.Path, newest: int) -> int:
    """Returns the last saved step, if it is later than the newest existing one and was not set
    aside; else 0."""
    directory = workdir / "checkpoints"
    saved = run_files.noted_marks(directory)
    return (
        saved[0][0]
        if saved and saved[0][0] > newest and not any(directory.glob(f"{saved[0][0]}.bad-*"))
        else 0
    )


def refuse_lost(workdir: pathlib.Path, log: list[dict[str, Any]]) -> None:
    """Refuse to start a run from step 0 in the workdir of a run whose checkpoints are gone, such as
    those on a disk that is not mounted.

    Args:
      workdir: of the run.
      log: lines of its metrics.jsonl.

    Raises:
      UserError: the checkpoints are gone; says what the run saved and how to continue.
    """
    directory = workdir / "checkpoints"
    if os.path.lexists(directory) and not directory.exists():
        raise UserError(
            f"{directory}: is a link whose target does not exist; mount its disk, or delete the"
            " link"
        )
    if directory.exists() and not directory.is_dir():
        raise UserError(
            f"{directory}: is not a directory; move it away, or choose another --workdir"
        )
    if complete_steps(directory) or any(directory.glob("*.bad-*")):
        return
    saved = run_files.noted_marks(directory)
    last = max((line["step"] for line in log), default=0)
    if saved:
        progress = f"saved checkpoint {saved[0][0]:,}"
    elif _has_note(directory):
        progress = f"may have saved some: {run_files.note_path(directory)} is damaged or unreadable"
    elif last and not directory.is_dir():
        progress = f"logged {last:,} steps in metrics.jsonl"
    else:
        return
    raise UserError(
        f"--workdir {workdir}: checkpoints/ has no checkpoint, but the run {progress}; mount or"
        " restore them and run again, or, to start from step 0, move metrics.jsonl and"
        f" {run_files.DIGESTS}/ away or choose another --workdir"
    )


@contextlib.contextmanager
def hold_step(step: pathlib.Path) -> Iterator[None]:
    """Hold a shared lock on a step, so that a run that continues does not delete it."""
    try:
        file = os.open(step / checksums.NAME, _FLAGS)
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
    """Delete a step unless a process holds it; False if one does. The step is renamed first, so
    that a half-deleted one never counts as complete."""
    trash = step.with_name(f"{step.name}.old")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(FileNotFoundError):
            file = os.open(step / checksums.NAME, _FLAGS)
            stack.callback(os.close, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:  # a file system without locks
                pass
        shutil.rmtree(trash, ignore_errors=True)
        os.rename(step, trash)
    shutil.rmtree(trash, ignore_errors=True)
    return True


def retain_newest(directory: pathlib.Path, keep: int, log: Callable[[str], None]) -> None:
    """Delete all steps but the newest `keep`."""
    try:
        steps = complete_steps(directory)
    except OSError as error:  # the save itself succeeded
        log(f"warning: {directory} cannot be listed ({error.strerror or error})")
        return
    for old in steps[:-keep]:
        try:
            delete_step(directory / str(old))
        except OSError as error:
            log(f"warning: checkpoint {old} cannot be deleted ({error.strerror or error})")


def quarantine_step(step: pathlib.Path, problems: list[str]) -> str:
    """Rename a damaged step; returns the warning to log. Raises UserError if that fails."""
    name = f"{step.name}.bad-{time.strftime('%Y%m%d-%H%M%S')}"
    more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
    damaged = f"checkpoint {step.name} is damaged ({'; '.join(problems[:3])}{more})"
    try:
        os.rename(step, step.with_name(name))
    except OSError as error:
        raise UserError(
            f"{damaged}, and {step} cannot be renamed ({error.strerror}); move it away and run"
            " again"
        ) from error
    fsync_dir(step.parent)
    return f"warning: {damaged}; renamed to {name}, the one before it is used"


def fsync_dir(directory: pathlib.Path) -> None:
    """Flush the entries of a directory to the disk."""
    with contextlib.suppress(OSError):  # some file systems cannot
        checksums.fsync_path(directory)


def remove_leftovers(directory: pathlib.Path) -> None:
    """Remove what interrupted saves and deletions left. Only the process that saves may call this.

    A failed save is reported at its first error, when its other threads may still write: what they
    leave is removed again, for a second."""
    for wait in (0.0, 0.1, 0.3, 0.6):
        with os.scandir(directory) as entries:
            leftovers = [
                e.path
                for e in entries
                if _LEFTOVER.fullmatch(e.name) and e.is_dir(follow_symlinks=False)
            ]
        if not leftovers:
            return
        time.sleep(wait)
        for path in leftovers:
            shutil.rmtree(path, ignore_errors=True)
