"""Engines run a pure function on many items: in processes of this machine, or on a Ray cluster."""

import concurrent.futures
import concurrent.futures.process
import multiprocessing
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from m3i_jax import interrupts
from m3i_jax.data.conversion import exit_with_parent
from m3i_jax.errors import UserError

ENGINES = ("local", "ray")
_AHEAD = 4  # items in flight per worker
_STATE: dict[str, Any] = {}  # of a worker process
_T = TypeVar("_T")


def map_items(
    engine: str, function: Callable[[Any], _T], items: Sequence[Any], *, workers: int
) -> Iterator[_T]:
    """Yields `function(item)` of every item, in their order.

    The function is sent to each worker once, the items one by one; few are in flight, so results
    that are not consumed yet take little memory.

    Args:
        engine: "local" or "ray".
        function: picklable, with its data.
        items: picklable.
        workers: processes; 1 for this process alone. Ray has its own number.

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
        yield from _map_in_processes(function, items, min(workers, len(items)))


def _map_in_processes(
    function: Callable[[Any], _T], items: Sequence[Any], workers: int
) -> Iterator[_T]:
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _begin_worker, (function,)
    )
    try:
        pending: list[concurrent.futures.Future[_T]] = []
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


def _begin_worker(function: Callable[[Any], Any]) -> None:
    threading.Thread(target=exit_with_parent, daemon=True).start()
    _STATE["function"] = function


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
