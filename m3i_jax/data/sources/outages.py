"""Whether a read that fails is retried for minutes, as where a server starts again, or briefly."""

import time

# Seconds for which reads of a place are retried briefly after one failed with all its retries, and
# seconds within which another read must have succeeded.
MEMORY, RECENT = 600.0, 30.0


class Outages:
    """Remembers the stores of which a read failed after all retries. For ten minutes, and while
    other reads succeed, further failures there are taken for those of single records and retried
    briefly: where bad records are replaced (`data.missing`), each would wait for two minutes.
    Where nothing succeeds, every read waits: there is no other record to go on with.

    >>> outages = Outages()
    >>> outages.begin("gs://a/0.tar"); outages.lasts("gs://a/1.tar")
    False
    >>> outages.answered(); outages.lasts("gs://a/1.tar"), outages.lasts("gs://b/1.tar")
    (True, False)
    """

    def __init__(self) -> None:
        self._began: dict[str, float] = {}
        self._answered = -RECENT

    def begin(self, path: str) -> None:
        """Notes that a read of a path failed after all retries, not after brief ones."""
        self._began[_store(path)] = time.monotonic()

    def answered(self) -> None:
        """Notes that a read succeeded."""
        self._answered = time.monotonic()

    def lasts(self, path: str) -> bool:
        """Returns whether a failed read of a path is to be retried briefly."""
        now, began = time.monotonic(), self._began.get(_store(path))
        return began is not None and now - began < MEMORY and now - self._answered < RECENT


OUTAGES = Outages()


def _store(path: str) -> str:
    """The bucket of a URL; all disks of this machine are one.

    >>> _store("gs://bucket/x/0.tar"), _store("/data/0.tar")
    ('gs://bucket', '')
    """
    return "/".join(path.split("/")[:3]) if "://" in path else ""
