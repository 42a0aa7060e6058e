"""Restarts data workers that die or hang. The new workers continue with the batch that is due, in
the same order.

A batch is a function of its number, so a worker that the kernel kills for its memory, or that waits
for a disk that does not answer, costs a restart and no data. The run ends with the number of the
batch if `TRIES` starts do not produce it."""

import contextlib
import logging
import multiprocessing
import os
import queue
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

from m3i_jax import interrupts, privacy
from m3i_jax.data import shared_buffers
from m3i_jax.errors import RunStopped

TRIES = 3  # starts of the workers for one batch
SLICE = 0.5  # seconds of a wait for a batch between calls of `on_wait`
# message of Grain's RuntimeError
_DIED = re.compile(r"terminated unexpectedly with exit code (-?\d+)")
_log = logging.getLogger(__name__)


class _WorkerLost(Exception):
    """A worker died or exceeded the time limit."""


class RestartingIterator(Iterator[dict[str, Any]]):
    """Iterates over batches; remakes the inner iterator at the batch that is due if a worker is
    lost.

    Args:
        make: number of a batch -> (Grain iterator that begins with it, pool of its memory or None).
        workers: processes of the iterator, of which worker k % workers builds batch k; 0 for
            threads of this process.
        limit: seconds that a batch may take.
        describe: (number of a batch, (position, record) of each record at which a worker ended) ->
            what the batch consists of, for the message where its worker is lost.

    Attributes:
        restarts: number of restarts of the workers.
        on_wait: called again and again while a batch is late; it may raise, to give up the wait,
            after which only `close` may be called.

    >>> def make(first): return iter({"k": k} for k in range(first, 9)), None
    >>> batches = RestartingIterator(make, workers=0, limit=9.0)
    >>> next(batches), next(batches), batches.close()
    ({'k': 0}, {'k': 1}, None)
    """

    def __init__(
        self,
        make: Callable[[int], tuple[Any, shared_buffers.SharedBufferPool | None]],
        *,
        workers: int,
        limit: float,
        describe: Callable[[int, list[tuple[int, int]]], str] | None = None,
    ) -> None:
        self._make, self._workers, self._limit = make, workers, limit
        self._describe = describe
        self._number, self.restarts = 0, 0
        self.on_wait: Callable[[], None] = lambda: None
        self._open()

    def _open(self) -> None:
        self._first = self._number
        self._inner, self._pool = self._make(self._number)
        self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        # child processes that are not workers of this iterator
        self._other_children = {child.pid for child in multiprocessing.active_children()}
        # This thread may wait for a worker for ever; the caller waits no longer than the limit.
        threading.Thread(
            target=_fetch,
            args=(self._inner, self._requests, self._results, self._workers),
            name="batches",
            daemon=True,
        ).start()

    def __next__(self) -> dict[str, Any]:
        for attempt in range(1, TRIES + 1):
            try:
                batch = dict(self._fetch_within_limit())
                break
            except _WorkerLost as error:
                lost = f"{error}{self._described()}"
                self._kill_workers()
                if attempt == TRIES:
                    raise RunStopped(
                        f"{lost}, {TRIES} times in a row: check the memory of this machine, the"
                        " disk of the data and the file of a record that is named here, which may"
                        " be one that ends a decoder: remove it or repair it"
                    ) from None
                self.restarts += 1
                _log.warning(
                    "%s; the workers are restarted (%d so far) with the same batches in the same"
                    " order",
                    lost,
                    self.restarts,
                )
                self._open()
        self._number += 1
        if self._pool:
            for name, value in batch.items():
                if isinstance(value, shared_buffers.BufferHandle):
                    batch[name] = self._pool.take(value)
        return batch

    def _fetch_within_limit(self) -> Any:
        self._requests.put(True)
        batch, error = self._result_within_limit()
        if error is None:
            return batch
        if self._workers and isinstance(error, RuntimeError) and (died := _DIED.search(str(error))):
            raise _WorkerLost(
                f"{self._worker_name()} ended with exit code {died[1]}{_signal(int(died[1]))}"
            ) from None
        raise error

    def _result_within_limit(self) -> tuple[Any, BaseException | None]:
        deadline = time.monotonic() + self._limit
        while (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                return self._results.get(timeout=min(left, SLICE))
            self.on_wait()
        raise _WorkerLost(
            f"{self._worker_name()} made no batch in {self._limit:g} seconds (config.data.patience)"
        )

    def _worker_name(self) -> str:
        """Names the worker that builds the batch that is due."""
        due = f"batch {self._number:,} since the start"
        if not self._workers:
            return f"the threads that read the data (for {due})"
        return (
            f"worker {(self._number - self._first) % self._workers} of {self._workers} of the data"
            f" (for {due})"
        )

    def _described(self) -> str:
        """Describes the batch that is due, as the end of a message."""
        if self._describe is None:
            return ""
        alive = {child.pid for child in multiprocessing.active_children()}
        notes = self._pool.current_records() if self._pool else []
        ended = [(position, record) for process, position, record in notes if process not in alive]
        return f" ({self._describe(self._number, ended)})"

    def start(self) -> None:
        """Starts to prefetch batches."""
        with _block_interrupts(self._workers):
            self._inner.start_prefetch()

    def _kill_workers(self) -> None:
        """Kills the workers, whether they respond or not, and releases their memory."""
        for child in multiprocessing.active_children():
            if child.pid not in self._other_children and child.name.startswith("grain-"):
                child.kill()
        self._requests.put(False)
        if self._pool:
            self._pool.close()

    def close(self) -> None:
        """Ends threads and worker processes."""
        self._requests.put(False)
        if close := getattr(self._inner, "close", None):
            close()
        if self._pool:
            self._pool.close()


def _signal(code: int) -> str:
    """Names the signal of a negative exit code.

    >>> _signal(-11), _signal(-9), _signal(1)
    (', by SIGSEGV', ', killed, as the kernel does when memory runs out', '')
    """
    if code == -signal.SIGKILL:
        return ", killed, as the kernel does when memory runs out"
    known = {-number: f", by {number.name}" for number in signal.Signals}
    return known.get(code, "")


def _block_interrupts(workers: int) -> contextlib.AbstractContextManager[None]:
    """For a block that starts workers: a terminal sends SIGINT to them too, and the trainer ends
    them."""
    return interrupts.block_interrupts() if workers else contextlib.nullcontext()


def begin_worker(number: int, workers: int) -> None:
    """Initializes a worker process: redacts its warnings as the trainer does, and ends it when the
    trainer ends.

    A killed trainer does not stop its workers; they would wait for ever, each with a batch in
    memory."""
    del number, workers
    privacy.guard_output()
    if (trainer := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_exit_with, args=(trainer,), name="trainer", daemon=True).start()


def _exit_with(trainer: BaseProcess) -> None:
    trainer.join()
    os._exit(1)


def _fetch(
    inner: Any,
    requests: queue.SimpleQueue[bool],
    results: queue.SimpleQueue[tuple[Any, BaseException | None]],
    workers: int,
) -> None:
    """Answers each request with the next batch or the error, which is raised in the caller."""
    with _block_interrupts(workers):  # the first request starts them
        while requests.get():
            try:
                results.put((next(inner), None))
            except BaseException as error:
                results.put((None, error))
