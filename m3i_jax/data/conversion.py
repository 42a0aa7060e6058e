"""Converts any source to shards, ArrayRecord or tar files, in parallel, on any number of hosts, and
resumably.

A shard is a pure function of (source, number of the shard, re-encoding). A complete one is renamed
into place, so a resumed conversion makes only the missing ones, and hosts need not communicate.
Every record keeps its index, and its original bytes unless it is encoded again, also a bad one: it
is counted and replaced when it is read, by rules that may improve.

The worker processes import this module, so it imports little."""

import concurrent.futures
import concurrent.futures.process
import dataclasses
import json
import math
import multiprocessing
import os
import re
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from m3i_jax import interrupts
from m3i_jax.data import region_texts
from m3i_jax.data.reencode import UNCHANGED, Reencoding
from m3i_jax.data.sources import array_record, base, shared_files, tar_shards
from m3i_jax.data.sources.base import DataSource, Record
from m3i_jax.errors import UserError

NAME = "pictures"  # of the shards
PLAN = "convert.json"
FULL = 4096  # records per shard of a large source: some hundred MB of photographs
_READ_SIZE = 64  # records read at a time
_STATE: dict[str, Any] = {}  # of a worker process


class ShardFormat(NamedTuple):
    """A kind of files: its name, the ending of the files, and the module that writes them."""

    name: str
    ending: str
    module: Any


ARRAY_RECORD = ShardFormat("array_record", array_record.ENDING, array_record)
TAR = ShardFormat("tar", tar_shards.ENDING, tar_shards)
FORMATS = {kind.name: kind for kind in (ARRAY_RECORD, TAR)}


def shard_count(records: int) -> int:
    """Returns the number of shards of a source, the same on every machine: of FULL records, or up
    to 16 smaller ones, which can be written and read in parallel.

    >>> shard_count(100), shard_count(1_911), shard_count(1_281_167)
    (1, 8, 313)
    """
    return max(math.ceil(records / FULL), min(16, math.ceil(records / 256)), 1)


def shard_path(directory: str, shard: int, shards: int, form: ShardFormat = ARRAY_RECORD) -> str:
    """Returns the path of one shard. Sorted by name, the shards are in their order.

    >>> shard_path("out", 3, 8), shard_path("out", 3, 107_911, TAR)
    ('out/pictures-00003-of-00008.array_record', 'out/pictures-000003-of-107911.tar')
    """
    digits = _digits(shards)
    name = f"{NAME}-{shard:0{digits}d}-of-{shards:0{digits}d}{form.ending}"
    return os.path.join(directory, name)


def _digits(shards: int) -> int:
    return max(5, len(str(shards)))


def shard_rows(records: int, shard: int, shards: int) -> range:
    """Returns the indices of the records of a shard: consecutive, in shards of equal size up to
    one.

    >>> [list(shard_rows(5, shard, 2)) for shard in range(2)]
    [[0, 1], [2, 3, 4]]
    """
    return range(shard * records // shards, (shard + 1) * records // shards)


def check_plan(
    source: DataSource,
    directory: str,
    reencoding: Reencoding = UNCHANGED,
    form: ShardFormat = ARRAY_RECORD,
) -> int:
    """Writes the plan of a conversion, or checks that a plan in the directory is the same.

    Returns:
        The number of shards.

    Raises:
        UserError: the directory holds another conversion, or other shards; or the source
            has annotations, which a shard does not hold.
    """
    if region_texts.has_objects(source) or region_texts.has_maps(source):
        raise UserError(
            f"{source.name} has objects or class maps, which shards would lose: train"
            " on its files themselves"
        )
    shards, path = shard_count(len(source)), os.path.join(directory, PLAN)
    plan = {
        "source": source.fingerprint(),
        "records": len(source),
        "shards": shards,
        "classes": list(source.classes),
        **({"encoding": reencoding.plan()} if reencoding else {}),
        **({} if form is ARRAY_RECORD else {"format": form.name}),
    }
    # before the plan is looked for: another host writes it before its first shard
    names = sorted(os.listdir(directory))
    if PLAN not in names and not os.path.exists(path):
        foreign = [name for name in names if form.ending in name or name == array_record.INDEX]
        if foreign:
            raise UserError(
                f"--workdir {directory}: {foreign[0]!r} is not from this conversion: choose another"
                " directory"
            )
    for name in names:  # earlier versions wrote five digits, which sort in another order
        number = re.match(rf"{NAME}-(\d+)-of-", name)
        if number and len(number[1]) != _digits(shards):
            raise UserError(
                f"--workdir {directory}: {name!r} has a number of {len(number[1])} digits, as"
                f" earlier versions wrote it, and {shards:,} shards need {_digits(shards)} to be"
                " read in their order: choose another directory"
            )
    # of hosts that start together, the first writes it, and all have the plan that is there then
    content = json.dumps(plan, ensure_ascii=False).encode("utf-8", "replace")
    if (written := shared_files.write_first(path, content)) != content:
        try:
            old_plan = json.loads(written)
        except ValueError as error:
            raise UserError(
                f"--workdir: {path!r} cannot be read ({error}): remove the directory, or choose"
                " another one"
            ) from error
        if isinstance(old_plan, dict) and (old := old_plan.get("encoding")) != plan.get("encoding"):
            raise UserError(
                f"--workdir {directory}: images there are encoded with {old or 'their own bytes'},"
                f" here with {plan.get('encoding') or 'their own bytes'}: give the same --size and"
                " --quality, with the same version of Pillow on all hosts, or choose another"
                " directory"
            )
        if isinstance(old_plan, dict) and old_plan.get("format") != plan.get("format"):
            raise UserError(
                f"--workdir {directory}: it holds shards of another --format"
                f" ({old_plan.get('format', ARRAY_RECORD.name)}): choose another directory"
            )
        if old_plan != plan:
            raise UserError(
                f"--workdir {directory}: another source, or another state of it, is converted there"
                f" ({old_plan.get('records')} records, this one has {len(source)}): choose another"
                " directory"
            )
    return shards


def writer_name(share: tuple[int, int]) -> str:
    """Returns the name in the partial files of a host.

    >>> writer_name((3, 16))
    'host-00003-of-00016'
    """
    return f"host-{share[0]:05d}-of-{share[1]:05d}"


def remove_partial(
    directory: str, share: tuple[int, int], form: ShardFormat = ARRAY_RECORD
) -> None:
    """Removes the partial files of a killed process of this share, and no others: those of other
    hosts may be in use. A single host also removes those of earlier versions, which name no
    host."""
    own = rf"{NAME}-\d+-of-\d+\{form.ending}\.{writer_name(share)}\..*"
    if share[1] == 1:
        own += rf"|{NAME}-\d+-of-\d+\{form.ending}(\.npz)?\.\d+\.part"
    for name in os.listdir(directory):
        if re.fullmatch(own, name):
            os.unlink(os.path.join(directory, name))


def missing_shards(
    records: int, directory: str, shards: int, form: ShardFormat = ARRAY_RECORD
) -> list[int]:
    """Returns the shards that are missing or incomplete."""
    return [
        shard
        for shard in range(shards)
        if form.module.shard_length(shard_path(directory, shard, shards, form))
        != len(shard_rows(records, shard, shards))
    ]


def convert(
    source: DataSource,
    directory: str,
    todo: list[int],
    shards: int,
    *,
    processes: int,
    reencoding: Reencoding = UNCHANGED,
    share: tuple[int, int] = (0, 1),
    form: ShardFormat = ARRAY_RECORD,
) -> Iterator[int]:
    """Writes the shards `todo`, in any order; yields the number of records of each.

    Args:
        source: to convert; it is pickled to the processes.
        directory: of the shards; exists.
        todo: numbers of shards.
        shards: number of all shards.
        processes: number of processes; 1 for this process alone.
        reencoding: of the images.
        share: (number, count) of this host, for the names of partial files.
        form: of the shards.

    Raises:
        UserError: the source cannot be read, the directory cannot be written, or a process died.
    """
    make = _ShardWriter(source, directory, shards, reencoding, writer_name(share), form.name)
    if processes == 1 or len(todo) < 2:
        for shard in todo:
            yield make(shard)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        min(processes, len(todo)),
        multiprocessing.get_context("spawn"),
        _begin_worker,
        (make,),
    )
    try:
        with interrupts.block_interrupts():  # the processes are started here
            futures = [pool.submit(_write_in_worker, shard) for shard in todo]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError(
            "a process that wrote a shard died, perhaps because memory ran out: run the same"
            " command again, which writes the missing shards"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def check_conversion(
    directory: str, records: int, shards: int, form: ShardFormat = ARRAY_RECORD
) -> None:
    """Checks all shards of a conversion before they are indexed.

    Raises:
        UserError: a file does not hold the records that its small file lists.
    """
    for shard in range(shards):
        path = shard_path(directory, shard, shards, form)
        if not form.module.check_shard(path, len(shard_rows(records, shard, shards))):
            raise UserError(
                f"{path!r} does not hold the records of its .npz file: remove it and run the same"
                " command again"
            )


def _begin_worker(make: "_ShardWriter") -> None:
    threading.Thread(target=exit_with_parent, daemon=True).start()
    _STATE.update(make=make)


def exit_with_parent() -> None:
    """Ends a worker whose parent was killed; it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write_in_worker(shard: int) -> int:
    return _STATE["make"](shard)


@dataclasses.dataclass(frozen=True)
class _ShardWriter:
    """Writes one shard of a conversion; pickled to the processes."""

    source: DataSource
    directory: str
    shards: int
    reencoding: Reencoding
    name: str
    form: str

    def __call__(self, shard: int) -> int:
        rows, form = shard_rows(len(self.source), shard, self.shards), FORMATS[self.form]
        path = shard_path(self.directory, shard, self.shards, form)
        try:
            return form.module.write_shard(
                path, self._records(rows), writer_name=f"{self.name}.{os.getpid()}"
            )
        except OSError as error:
            raise UserError(
                f"cannot write to {self.directory}: {error.strerror or error}; make room and run"
                " the same command again"
            ) from error

    def _records(self, rows: range) -> Iterator[Record]:
        for start in range(0, len(rows), _READ_SIZE):
            records = base.read_items(self.source, list(rows[start : start + _READ_SIZE]))
            yield from map(self.reencoding, records) if self.reencoding else records
