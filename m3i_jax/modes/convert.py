"""--mode=convert: all records of a source as ArrayRecord shards in WORKDIR. The same command goes
on where it was stopped."""

import os
import pathlib
import sys
import time

from m3i_jax import schema
from m3i_jax.data import conversion, splits
from m3i_jax.data.sources import array_record
from m3i_jax.modes import setup as jobs
from m3i_jax.reporting import text_table

PREEMPTED = 42


def run(config: schema.Config, *, workdir: str) -> int:
    place = pathlib.Path(workdir)
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    with jobs.lock_workdir(place):
        source = splits.open_source(config.data, cache=str(place / "index"))
        print(source.description())
        shards = conversion.check_plan(source, str(place))
        todo = conversion.missing_shards(len(source), str(place), shards)
        if len(todo) < shards:
            print(f"{shards - len(todo):,} of {shards:,} shards are there already")
        told = Progress(
            sum(len(conversion.shard_rows(len(source), shard, shards)) for shard in todo), len(todo)
        )
        processes = config.data.workers or len(os.sched_getaffinity(0))
        try:
            for count in conversion.convert(source, str(place), todo, shards, processes=processes):
                told(count)
        except KeyboardInterrupt:
            print(f"\nstopped; {shards - len(conversion.missing_shards(len(source), str(place), shards)):,} of {shards:,} shards are whole: "
                  "the same command goes on", file=sys.stderr)  # fmt: skip
            return PREEMPTED
        count = array_record.write_shard_index(str(place), classes=source.classes, name=source.name)
    size = sum(file.stat().st_size for file in place.glob(f"*{array_record.ENDING}"))
    print(f"{count:,} records in {shards:,} shards, {text_table.format_bytes(size)}, in {place}; train on them with "
          f"--config.data.source=array_record --config.data.path={place}")  # fmt: skip
    return 0


class Progress:
    """A line that says how far the conversion is: rewritten on a terminal, else a new one every ten
    seconds."""

    def __init__(self, records: int, shards: int) -> None:
        self.records, self.shards, self.done, self.whole = records, shards, 0, 0
        self.start = self.last = time.monotonic()

    def __call__(self, count: int) -> None:
        self.done, self.whole, now = self.done + count, self.whole + 1, time.monotonic()
        terminal, last = sys.stderr.isatty(), self.whole == self.shards
        if not (terminal or last or now - self.last > 10):
            return
        self.last = now
        text = self.line(now - self.start)
        print(
            f"\r{text}\x1b[K" if terminal else text,
            end="\n" if last or not terminal else "",
            file=sys.stderr,
            flush=True,
        )

    def line(self, seconds: float) -> str:
        """What is told after so many seconds.

        >>> progress = Progress(1000, 4)
        >>> progress.done, progress.whole = 500, 2
        >>> progress.line(10.0)
        '[#############             ] 2 of 4 shards, 500 of 1,000 records, 50 a second, 0:10 left'
        """
        share, speed = self.done / max(self.records, 1), self.done / max(seconds, 1e-9)
        left = round((self.records - self.done) / max(speed, 1e-9))
        return (
            f"[{'#' * int(26 * share):<26}] {self.whole:,} of {self.shards:,} shards, {self.done:,}"
            f" of {self.records:,} records, {speed:,.0f} a second, {left // 60}:{left % 60:02d}"
            " left"
        )
