"""Engines run a pure function on many items: in processes of this machine, or on a Ray cluster."""

import concurrent.futures
import concurrent.futures.process
import copy
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from m3i_jax import interrupts
from m3i_jax.data.conversion import exit_with_parent
from m3i_jax.errors import UserError

ENGINES = ("local", "ray")
TEMPORARY = ".arrays-"  # with which the name of a directory of such files begins
_AHEAD = 4  # items in flight per worker
_LARGE = 1 << 20  # bytes from which an array is not sent to each process, but read from a file
_STATE: dict[str, Any] = {}  # of a worker process
_T = TypeVar("_T")


def map_items(
    engine: str,
    function: Callable[[Any], _T],
    items: Sequence[Any],
    *,
    workers: int,
    directory: str | None = None,
) -> Iterator[_T]:
    """Yields `function(item)` of every item, in their order.

    The function is sent to each worker once, the items one by one; few are in flight, so results
    that are not consumed yet take little memory. Large arrays that are attributes of the function
    are in memory once for all processes, which cannot change them.

    Args:
        engine: "local" or "ray".
        function: picklable, with its data.
        items: picklable.
        workers: processes; 1 for this process alone. Ray has its own number.
        directory: for temporary files of large arrays; None: that of the system.

    Raises:
        UserError: Ray is not installed, no cluster is there, or a process died.

    >>> list(map_items("local", str, [3, 1], workers=1))
    ['3', '1']
    """
    if engine == "ray":
        yield from _map_on_ray(function, items)
    elif workers == 1 or len(items) < 2:
        yield from map(function, items)
    else:
        with tempfile.TemporaryDirectory(dir=directory, prefix=TEMPORARY) as files:
            sent = _write_arrays(function, files)
            yield from _map_in_processes(sent, items, min(workers, len(items)))


class _Sent(NamedTuple):
    """A function as it is sent to a process, and the files of those attributes that it lacks."""

    function: Any
    files: dict[str, str]


def _write_arrays(function: Callable[[Any], Any], directory: str) -> _Sent:
    """Writes the large arrays of a function to files, an array of two attributes to one."""
    large = {
        name: value
        for name, value in getattr(function, "__dict__", {}).items()
        if isinstance(value, np.ndarray) and value.nbytes >= _LARGE
    }
    if not large:
        return _Sent(function, {})
    paths = {id(value): os.path.join(directory, f"{name}.npy") for name, value in large.items()}
    for value in {id(value): value for value in large.values()}.values():
        np.save(paths[id(value)], value)
    rest = copy.copy(function)
    for name in large:
        object.__setattr__(rest, name, None)  # of a frozen dataclass, too
    return _Sent(rest, {name: paths[id(value)] for name, value in large.items()})


def _map_arrays(sent: _Sent) -> Any:
    """Returns the function; the processes of a machine share the pages of its arrays."""
    for name, path in sent.files.items():
        object.__setattr__(
            sent.function, name, np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        )
    return sent.function


def _map_in_processes(sent: _Sent, items: Sequence[Any], workers: int) -> Iterator[Any]:
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _begin_worker, (sent,)
    )
    try:
        pending: list[concurrent.futures.Future[Any]] = []
        for item in items:
            with interrupts.block_interrupts():  # a process may be started here
                pending.append(pool.submit(_call, item))
            if len(pending) >= _AHEAD * workers:
                yield pending.pop(0).result()
        for future in pending:
            yield future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError(
            "a worker process died, perhaps because memory ran out: run the same command again with"
            " a smaller data.workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker(sent: _Sent) -> None:
    threading.Thread(target=exit_with_parent, daemon=True).start()
    _STATE["function"] = _map_arrays(sent)


def _call(item: Any) -> Any:
    return _STATE["function"](item)


def _map_on_ray(function: Callable[[Any], _T], items: Sequence[Any]) -> Iterator[_T]:
    try:
        import ray
    except ImportError:
        raise UserError("--engine=ray needs the package ray: pip install 'm3i-jax[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False)  # the cluster of RAY_ADDRESS, else one on this machine
    shared = ray.put(function)
    task = ray.remote(_apply)
    limit = _AHEAD * max(int(ray.cluster_resources().get("CPU", 1)), 1)
    pending: list[Any] = []
    for item in items:
        pending.append(task.remote(shared, item))
        if len(pending) >= limit:
            yield ray.get(pending.pop(0))
    for reference in pending:
        yield ray.get(reference)


def _apply(function: Callable[[Any], Any], item: Any) -> Any:
    return function(item)
