"""Batches that come within a limit or not at all: workers that die or hang are started again and
make what was due, in the same order.

A batch is a function of its number, so a worker that the kernel killed for its memory, or that
waits for a disk that does not answer, costs a restart of the workers and nothing else. One that
cannot be had after `TRIES` starts ends the run, and says which."""

import logging
import multiprocessing
import os
import queue
import re
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

from m3i_jax import privacy
from m3i_jax.data import shared_buffers
from m3i_jax.errors import RunStopped

TRIES = 3  # starts of the workers for one batch
# Grain's words, of a RuntimeError
_DIED = re.compile(r"terminated unexpectedly with exit code (-?\d+)")
_log = logging.getLogger(__name__)


class _Lost(Exception):
    """A worker died or did not answer."""


class RestartingIterator(Iterator[dict[str, Any]]):
    """An iterator over batches that is made anew, at the batch that is due, when it fails by no
    fault of the data.

    Args: make: number of a batch -> (Grain iterator that begins with it, lender of its memory or
        None). workers: processes of such an iterator; batch k is made by worker k % workers. 0:
        threads of this process. limit: seconds that a batch may take.

    Attributes:
        restarts: how often the workers were started again.

    >>> watched = RestartingIterator(lambda first: (iter({"k": k} for k in range(first, 9)), None), workers=0, limit=9.0)
    >>> next(watched), next(watched), watched.close()
    ({'k': 0}, {'k': 1}, None)
    """

    def __init__(
        self,
        make: Callable[[int], tuple[Any, shared_buffers.SharedBufferPool | None]],
        *,
        workers: int,
        limit: float,
    ) -> None:
        self._make, self._workers, self._limit = make, workers, limit
        self._number, self.restarts = 0, 0
        self._open()

    def _open(self) -> None:
        self._first = self._number
        self._inner, self._lender = self._make(self._number)
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._got: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        # started by somebody else
        self._others = {child.pid for child in multiprocessing.active_children()}
        # A thread may wait for a worker for ever; whoever asked does not.
        threading.Thread(
            target=_fetch, args=(self._inner, self._asked, self._got), name="batches", daemon=True
        ).start()

    def __next__(self) -> dict[str, Any]:
        for attempt in range(1, TRIES + 1):
            try:
                batch = dict(self._take())
                break
            except _Lost as lost:
                self._abandon()
                if attempt == TRIES:
                    raise RunStopped(
                        f"{lost}, {TRIES} times in a row: look at the memory of this machine and at"
                        " the disk of the data"
                    ) from None
                self.restarts += 1
                _log.warning(
                    "%s; started again (%d so far), with the same batches in the same order",
                    lost,
                    self.restarts,
                )
                self._open()
        self._number += 1
        if self._lender:
            batch["views"] = self._lender.take(batch["views"])
        return batch

    def _take(self) -> Any:
        self._asked.put(True)
        try:
            batch, error = self._got.get(timeout=self._limit)
        except queue.Empty:
            raise _Lost(
                f"{self._who()} made no batch in {self._limit:g} seconds (config.data.patience)"
            ) from None
        if error is None:
            return batch
        if self._workers and isinstance(error, RuntimeError) and (died := _DIED.search(str(error))):
            killed = (
                ", killed, as the kernel does when memory runs out"
                if died[1] == f"-{signal.SIGKILL:d}"
                else ""
            )
            raise _Lost(f"{self._who()} ended with exit code {died[1]}{killed}") from None
        raise error

    def _who(self) -> str:
        """Who makes the batch that is due."""
        due = f"batch {self._number:,} since the start"
        if not self._workers:
            return f"the threads that read the data (for {due})"
        return (
            f"worker {(self._number - self._first) % self._workers} of {self._workers} of the data"
            f" (for {due})"
        )

    def start(self) -> None:
        """Begins to make batches ahead."""
        self._inner.start_prefetch()

    def _abandon(self) -> None:
        """Leaves workers that do not answer: they are killed, stopped or not, and their memory is
        given back."""
        for child in multiprocessing.active_children():
            if child.pid not in self._others and child.name.startswith("grain-"):
                child.kill()
        self._asked.put(False)
        if self._lender:
            self._lender.close()

    def close(self) -> None:
        """Ends threads and worker processes."""
        self._asked.put(False)
        close = getattr(self._inner, "close", None)
        if close:
            close()
        if self._lender:
            self._lender.close()


def begin_worker(number: int, workers: int) -> None:
    """Run in a new worker process: its warnings are redacted as the trainer's are, and it ends when
    the trainer does.

    A trainer that is killed outright says goodbye to nobody; its workers would wait for it for
    ever, with a batch in memory each."""
    del number, workers
    privacy.guard_output()
    if (trainer := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_follow, args=(trainer,), name="trainer", daemon=True).start()


def _follow(trainer: BaseProcess) -> None:
    trainer.join()
    os._exit(1)


def _fetch(
    inner: Any,
    asked: queue.SimpleQueue[bool],
    got: queue.SimpleQueue[tuple[Any, BaseException | None]],
) -> None:
    while asked.get():
        try:
            got.put((next(inner), None))
        except BaseException as error:  # it is raised where the batch was asked for
            got.put((None, error))
