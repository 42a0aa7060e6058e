"""The directories of a run's checkpoints: which steps are complete, who reads one, how one is
deleted, and what saves leave behind.

checkpoints/<step>              complete: it got this name when all of it was there
checkpoints/<step>.new[...]     being written
checkpoints/<step>.old          being deleted
checkpoints/<step>.bad-<time>   damaged, set aside
"""

import contextlib
import fcntl
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Iterator

from m3i_jax.training import file_checksums

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


def is_run(place: str) -> bool:
    """Whether a directory is the workdir of a run."""
    path = pathlib.Path(place)
    return (path / "checkpoints").is_dir() or (path / "config.txt").is_file()


@contextlib.contextmanager
def hold_step(step: pathlib.Path) -> Iterator[None]:
    """While this lasts, the retention of a run that goes on does not delete the step."""
    try:
        file = os.open(step / file_checksums.NAME, os.O_RDONLY)
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
            file = os.open(step / file_checksums.NAME, os.O_RDONLY)
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
    """Give a damaged step another name; what to tell a person."""
    name = f"{step.name}.bad-{time.strftime('%Y%m%d-%H%M%S')}"
    os.rename(step, step.with_name(name))
    fsync_dir(step.parent)
    more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return (
        f"warning: checkpoint {step.name} is damaged ({'; '.join(wrong[:3])}{more}); set aside as"
        f" {name}, the one before is used"
    )


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
