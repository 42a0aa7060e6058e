"""Which share of work without communication this process does, as one of several on a cluster."""

import contextlib
import dataclasses
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Mapping

from m3i_jax.errors import UserError
from m3i_jax.parallel import barriers, distributed

# file systems on local disks that have no block device of their own
_LOCAL_SYSTEMS = ("bcachefs", "btrfs", "overlay", "ramfs", "tmpfs", "zfs")
_ARRAY = tuple(f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "MAX", "STEP", "COUNT"))


@dataclasses.dataclass(frozen=True)
class HostShare:
    """Share `number` of `count`, both whole numbers, 0 <= number < count; `source` names where they
    come from."""

    number: int = 0
    count: int = 1
    source: str = "alone"

    def has(self, item: int) -> bool:
        """Returns whether an item, by its number, belongs to this share.

        >>> [item for item in range(7) if HostShare(1, 3).has(item)]
        [1, 4]
        """
        return item % self.count == self.number

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def detect_share(
    shard: str, coordinator: str, processes: str, process: str, *, environ: Mapping[str, str]
) -> HostShare:
    """Returns the share of this process: from --shard=i/n, the flags --processes and --process-id,
    a Slurm array, an indexed Job of Kubernetes, or what `distributed.detect_processes` reads.

    Args:
        shard: "i/n", "/n" for the i of a Slurm array or an indexed Job, or "".
        coordinator, processes, process: flags of a training; no connection is made here.
        environ: variables.

    Raises:
        UserError: a value is missing, no number or out of range.

    >>> detect_share("3/16", "", "", "", environ={})
    HostShare(number=3, count=16, source='--shard')
    >>> detect_share("/8", "", "", "", environ={"JOB_COMPLETION_INDEX": "5"}).number
    5
    >>> array = dict(zip(_ARRAY, "7 1 9 2 5".split()))
    >>> detect_share("", "", "", "", environ=array)
    HostShare(number=3, count=5, source='Slurm array')
    """
    if shard:
        match = re.fullmatch(r"(\d{0,9})/(\d{1,9})", shard)
        if not match:
            raise UserError(f"--shard={shard[:60]}: is not i/n, such as 0/16")
        count = int(match[2])
        number = int(match[1]) if match[1] else _index(environ, count)
        if number >= count:
            raise UserError(
                f"--shard={number}/{count}: the first number must be less than the second; shares"
                " are numbered from 0"
            )
        return HostShare(number, count, "--shard")
    if processes and process:
        info = distributed.detect_processes(
            coordinator or "localhost", processes, process, environ={}, tpu=False
        )
        return HostShare(info.process, info.processes, "flags")
    if _ARRAY[0] in environ:
        return _slurm_array(environ)
    info = distributed.detect_processes(
        coordinator, processes, process, environ=environ, tpu=distributed.on_tpu(environ)
    )
    if not info.processes:
        raise UserError(
            "--shard: the number of hosts is not in the variables of this machine: give --shard=i/n"
        )
    if info.processes == 1 and "JOB_COMPLETION_INDEX" in environ:
        raise UserError(
            "--shard: an indexed Job does not state its number of completions: give --shard=/n, the"
            " n of `completions`"
        )
    return HostShare(info.process, info.processes, info.source)


def settle_missing(
    missing: Callable[[], list[int]],
    directory: str,
    *,
    begun: Callable[[int], bool] = lambda item: True,
) -> list[int]:
    """Returns the items of a common directory that are missing when this share is complete; the
    share that finds none has the work that is left.

    Two shares that end at the same moment may not see yet what the other wrote, for NFS and gcsfuse
    keep for a minute that a file is absent. Each would leave that work to the other. So on such a
    file system this looks again, until nothing is missing or VIEW_AGE has passed: a share that ends
    later sees all of this one.

    Args:
        missing: returns the items, by number, that are not seen.
        directory: of the items.
        begun: whether the share that writes an item has begun. One that has not will end later, so
            there is nothing to wait for.

    >>> settle_missing(lambda: [], "/tmp")
    []
    """
    deadline, noted = time.monotonic() + barriers.VIEW_AGE, False
    while left := missing():
        if _is_local(directory) or not all(map(begun, left)) or time.monotonic() >= deadline:
            break
        if not noted:
            noted = True
            print(
                f"looking for up to {barriers.VIEW_AGE:.0f} seconds for what other shares have just"
                " written",
                flush=True,
            )
        # a change makes NFS ask its server for the state of the directory
        with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=directory, prefix=".look-"):
            pass
        time.sleep(min(2.0, barriers.VIEW_AGE / 10))
    return left


def _is_local(directory: str, mounts: str = "/proc/self/mountinfo") -> bool:
    """Whether a directory is on a disk of this machine, whose state no other one changes; False if
    that is not known.

    Args:
        directory: any path.
        mounts: file with the mounted file systems, as in proc_pid_mountinfo(5).
    """
    path = pathlib.Path(os.path.realpath(directory))
    try:
        if os.major(os.stat(path).st_dev):  # a block device
            return True
        with open(mounts, encoding="utf-8") as lines:
            fields = [line.split() for line in lines]
    except (OSError, UnicodeError):
        return False
    found = (pathlib.Path("/"), "")  # of nested mount points the deepest, of equal ones the last
    for field in fields:
        point = pathlib.Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), field[4]))
        if path.is_relative_to(point) and point.is_relative_to(found[0]):
            found = point, field[field.index("-") + 1]
    return found[1] in _LOCAL_SYSTEMS


def _index(environ: Mapping[str, str], count: int) -> int:
    if _ARRAY[0] in environ:
        return _slurm_array(environ, count).number
    index = environ.get("JOB_COMPLETION_INDEX", "")
    if not re.fullmatch(r"\d{1,9}", index):
        raise UserError(
            f"--shard=/{count}: neither SLURM_ARRAY_TASK_ID nor JOB_COMPLETION_INDEX is set: give"
            " --shard=i/n"
        )
    return int(index)


def _slurm_array(environ: Mapping[str, str], count: int = 0) -> HostShare:
    """The share of a task of a Slurm array; with `count`, its id is the number."""
    values = [environ.get(name, "") for name in _ARRAY]
    known = [int(value) if re.fullmatch(r"\d{1,9}", value) else -1 for value in values]
    number, least, most, step, tasks = known
    if count and number >= 0:
        return HostShare(number, count, "Slurm array")
    if min(known) < 0 or step < 1 or (most - least) // step + 1 != tasks:
        raise UserError(
            "--shard: the ids of this Slurm array are not evenly spaced, or not known: give"
            " --shard=/n with the ids 0 to n - 1"
        )
    return HostShare((number - least) // step, tasks, "Slurm array")
