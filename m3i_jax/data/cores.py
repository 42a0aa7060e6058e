"""How many processor cores a process may use: the default number of threads and workers."""

import os


def usable_cores() -> int:
    """Returns the number of cores that this process may use, at least 1; where the system does not
    say (macOS), all of them.

    >>> usable_cores() > 0
    True
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
