"""Whether a read that fails is retried for minutes, as where a server starts again, or briefly."""

import time

# A read that failed after all retries is remembered for so many seconds. Another read must have
# succeeded within RECENT seconds, or PATIENT reads of a store, one after another, must have failed.
MEMORY, RECENT, PATIENT = 3600.0, 30.0, 5


class Outages:
    """Remembers the stores of which reads failed after all retries. While other reads succeed,
    further failures there are taken for those of single records and retried briefly: where bad
    records are replaced (`data.missing`), each would wait for two minutes. Where nothing succeeds,
    a read waits, for there is no other record to go on with, but only five times one after another:
    then the store is taken for lost.

    >>> outages = Outages()
    >>> outages.begin("gs://a/0.tar", time.monotonic()); outages.lasts("gs://a/1.tar")
    False
    >>> outages.answered("gs://b/0.tar"); outages.lasts("gs://a/1.tar"), outages.lasts("gs://b/1")
    (True, False)
    """

    def __init__(self) -> None:
        self._last: dict[str, float] = {}  # by store: when a read last failed after all retries
        self._count: dict[str, int] = {}  # and how many did one after another
        self._answered = -RECENT

    def begin(self, path: str, started: float) -> None:
        """Notes that a read of a path that was started at a time of `time.monotonic` failed after
        all retries, not after brief ones. Those of several threads at once count as one."""
        store = _store(path)
        if started >= self._last.get(store, 0.0):
            self._count[store] = self._count.get(store, 0) + 1
        self._last[store] = time.monotonic()

    def answered(self, path: str) -> None:
        """Notes that a read of a path succeeded."""
        self._answered = time.monotonic()
        if self._count:
            self._count.pop(_store(path), None)

    def lasts(self, path: str) -> bool:
        """Returns whether a failed read of a path is to be retried briefly."""
        now, store = time.monotonic(), _store(path)
        if now - self._last.get(store, -MEMORY) >= MEMORY:
            return False
        return now - self._answered < RECENT or self._count.get(store, 0) >= PATIENT


OUTAGES = Outages()


def _store(path: str) -> str:
    """The bucket of a URL; all disks of this machine are one.

    >>> _store("gs://bucket/x/0.tar"), _store("/data/0.tar")
    ('gs://bucket', '')
    """
    return "/".join(path.split("/")[:3]) if "://" in path else ""
