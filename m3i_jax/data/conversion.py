"""Any source to ArrayRecord shards: in parallel, and resumable. A shard is renamed into place when
it is whole, so one that is there is kept and only what is missing is made. Every record is kept
with its original bytes, bad ones too: they are counted and replaced when they are read, by rules
that may become better, and the numbering stays that of the source.

This module is what the worker processes import, so it stays light.
"""

import concurrent.futures
import concurrent.futures.process
import json
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from m3i_jax.data.sources import array_record, base
from m3i_jax.data.sources.base import DataSource, Record
from m3i_jax.errors import UserError

NAME = "pictures"
PLAN = "convert.json"
FULL = 4096  # records of a shard of a large source: some hundred MB of photographs
_READ = 64  # records read at once
_STATE: dict[str, Any] = {}  # of a worker process


def shard_count(records: int) -> int:
    """How many shards a source is cut into, whatever the machine: of FULL records, of small sources
    up to 16 to make and read in parallel.

    >>> shard_count(100), shard_count(1_911), shard_count(1_281_167)
    (1, 8, 313)
    """
    return max(math.ceil(records / FULL), min(16, math.ceil(records / 256)), 1)


def shard_path(directory: str, shard: int, shards: int) -> str:
    """Path of one shard.

    >>> shard_path("out", 3, 8)
    'out/pictures-00003-of-00008.array_record'
    """
    return os.path.join(directory, f"{NAME}-{shard:05d}-of-{shards:05d}{array_record.ENDING}")


def shard_rows(records: int, shard: int, shards: int) -> range:
    """Records of a shard: consecutive ones, so many or one more.

    >>> [list(shard_rows(5, shard, 2)) for shard in range(2)]
    [[0, 1], [2, 3, 4]]
    """
    return range(shard * records // shards, (shard + 1) * records // shards)


def check_plan(source: DataSource, directory: str) -> int:
    """Number of shards; writes down what is converted, or checks that it is what is being converted
    there already.

    Raises:
        UserError: the directory holds (part of) another conversion, or other ArrayRecord files.
    """
    shards, place = shard_count(len(source)), os.path.join(directory, PLAN)
    plan = {
        "source": source.fingerprint(),
        "records": len(source),
        "shards": shards,
        "classes": list(source.classes),
    }
    if os.path.exists(place):
        try:
            with open(place, encoding="utf-8") as file:
                there = json.load(file)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--workdir: {place!r} cannot be read ({error}): remove the directory, or choose"
                " another one"
            ) from error
        if there != plan:
            raise UserError(
                f"--workdir {directory}: another source, or another state of it, is converted there"
                f" ({there.get('records')} records, this one has {len(source)}): choose another"
                " directory"
            )
    else:
        foreign = [
            name
            for name in sorted(os.listdir(directory))
            if array_record.ENDING in name or name == array_record.INDEX
        ]
        if foreign:
            raise UserError(
                f"--workdir {directory}: {foreign[0]!r} is there and not from this conversion:"
                " choose another directory"
            )
        base.write_atomic(place, json.dumps(plan, ensure_ascii=False).encode("utf-8", "replace"))
    return shards


def missing_shards(records: int, directory: str, shards: int) -> list[int]:
    """The shards that are not there yet, or not whole. Leftovers of a killed process are
    removed."""
    for name in os.listdir(directory):
        if name.startswith(f"{NAME}-") and name.endswith(".part"):
            os.unlink(os.path.join(directory, name))
    wanted = ((shard, len(shard_rows(records, shard, shards))) for shard in range(shards))
    return [
        shard
        for shard, count in wanted
        if array_record.shard_length(shard_path(directory, shard, shards)) != count
    ]


def convert(
    source: DataSource, directory: str, todo: list[int], shards: int, *, processes: int
) -> Iterator[int]:
    """Makes the shards `todo`; yields the number of records of each when it is in place, in any
    order.

    Args:
        source: what to convert. Sent to the processes.
        directory: for the shards; exists.
        todo: numbers of shards.
        shards: number of all shards.
        processes: that work at the same time; with 1, none is started.

    Raises:
        UserError: the source cannot be read, the directory cannot be written, or a process died.
    """
    if processes == 1 or len(todo) < 2:
        for shard in todo:
            yield _write(source, directory, shard, shards)
        return
    context, method = multiprocessing.get_context("spawn"), (source, directory, shards)
    pool = concurrent.futures.ProcessPoolExecutor(
        min(processes, len(todo)), context, _begin, method
    )
    try:
        for future in concurrent.futures.as_completed(
            [pool.submit(_make, shard) for shard in todo]
        ):
            yield future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError(
            "a process that wrote a shard died, perhaps for want of memory: the same command goes"
            " on with what is missing"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(source: DataSource, directory: str, shards: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_orphaned, daemon=True).start()
    _STATE.update(source=source, directory=directory, shards=shards)


def _orphaned() -> None:
    """Ends a worker whose parent was killed: it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _make(shard: int) -> int:
    return _write(_STATE["source"], _STATE["directory"], shard, _STATE["shards"])


def _write(source: DataSource, directory: str, shard: int, shards: int) -> int:
    try:
        return array_record.write_shard(
            shard_path(directory, shard, shards),
            _records(source, shard_rows(len(source), shard, shards)),
        )
    except OSError as error:
        raise UserError(
            f"cannot write to {directory}: {error.strerror or error}; make room, then the same"
            " command goes on"
        ) from error


def _records(source: DataSource, rows: range) -> Iterator[Record]:
    for at in range(0, len(rows), _READ):
        yield from base.read_items(source, list(rows[at : at + _READ]))
