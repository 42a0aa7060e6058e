"""Teachers of a run on a machine without their files: `objective.teachers` then names what the run
wrote about them, `RUN/teachers.json#NUMBER`. Their weights are in its checkpoints."""

import os
import pathlib
from collections.abc import Sequence

TEACHERS = "teachers.json"


def described_teacher(path: str) -> tuple[str, int]:
    """Returns (file, number in it) of a teacher that a run describes; ("", 0) for any other path.

    >>> described_teacher("runs/a/teachers.json#1"), described_teacher("vit.safetensors")
    (('runs/a/teachers.json', 1), ('', 0))
    """
    file, _, number = path.rpartition("#")
    if pathlib.PurePath(file).name != TEACHERS or not number.isdecimal():
        return "", 0
    return file, int(number)


def reachable_teachers(workdir: str, paths: Sequence[str]) -> tuple[str, ...]:
    """Returns the teachers of a run, in place of those that do not exist what it wrote about them,
    if it did.

    >>> reachable_teachers("no_run", ["gone.safetensors"])
    ('gone.safetensors',)
    """
    file = os.path.join(workdir, TEACHERS)
    described = os.path.lexists(file)
    return tuple(
        f"{file}#{number}" if described and not os.path.exists(path) else path
        for number, path in enumerate(paths)
    )
