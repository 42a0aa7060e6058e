"""--mode=convert: write all records of a source as shards to WORKDIR, ArrayRecord or tar files
(--format). The same command resumes an interrupted conversion.

On several hosts each writes every n-th shard (--shard=i/n). They share the directory and do not
communicate; the one that finds all shards complete checks them and writes the index. Of hosts that
end at the same moment all may find that, and write the same."""

import contextlib
import os
import pathlib
import sys
import time
from collections.abc import Iterator

from m3i_jax import interrupts, schema
from m3i_jax.data import conversion, reencode, splits
from m3i_jax.data.cores import usable_cores
from m3i_jax.data.sources import base, mixture, tar_shards
from m3i_jax.errors import UserError, shorten
from m3i_jax.modes import host_share
from m3i_jax.modes.setup import index_directory, lock_workdir, make_workdir
from m3i_jax.reporting import text_table

PREEMPTED = 42


def run(
    config: schema.Config,
    *,
    workdir: str,
    shard: str = "",
    size: str = "",
    quality: str = "",
    format: str = "",
    hosts: tuple[str, str, str] = ("", "", ""),
) -> int:
    directory = pathlib.Path(workdir)
    form = conversion.FORMATS.get(format or conversion.ARRAY_RECORD.name)
    if form is None:
        raise UserError(f"--format={format[:60]}: is not one of {', '.join(conversion.FORMATS)}")
    share = host_share.detect_share(shard, *hosts, environ=os.environ)
    reencoding = reencode.parse_reencoding(size, quality, config.data.background)
    make_workdir(directory)
    own = (share.number, share.count)
    with _lock(directory, share):
        source = splits.open_source(config.data, cache=index_directory(config.data, directory))
        print(source.description())
        for line in lost_weights(source):
            print(line)
        if form is conversion.TAR and (key := tar_shards.key_with_dot(source)):
            print(
                f"keys such as {shorten(key)} have a dot, at which WebDataset ends them and names"
                " fields by the rest; source=tars reads them whole"
            )
        shards = conversion.check_plan(source, str(directory), reencoding, form)
        conversion.remove_partial(str(directory), own, form)
        missing = conversion.missing_shards(len(source), str(directory), shards, form)
        todo = [number for number in missing if share.has(number)]
        held = sum(map(share.has, range(shards)))
        if share.count > 1:
            print(f"share {share} ({share.source}): {held:,} of {shards:,} shards")
        if len(todo) < held:
            print(f"{held - len(todo):,} of {held:,} shards are already complete")
        progress = Progress(
            sum(len(conversion.shard_rows(len(source), number, shards)) for number in todo),
            len(todo),
        )
        processes = config.data.workers or usable_cores()
        try:
            with interrupts.raise_interrupts():
                for count in conversion.convert(
                    source,
                    str(directory),
                    todo,
                    shards,
                    processes=processes,
                    reencoding=reencoding,
                    share=own,
                    form=form,
                ):
                    progress(count)
        except KeyboardInterrupt:
            missing = conversion.missing_shards(len(source), str(directory), shards, form)
            print(
                f"\nstopped: {shards - len(missing):,} of {shards:,} shards are complete; run the"
                " same command again to continue",
                file=sys.stderr,
            )
            return PREEMPTED
        missing = host_share.settle_missing(
            lambda: conversion.missing_shards(len(source), str(directory), shards, form),
            str(directory),
            begun=lambda number: _lock_file(directory, number % share.count, share.count).exists(),
        )
        if missing:
            print(
                f"share {share} is complete; {len(missing):,} of {shards:,} shards are still to be"
                " written by other shares, of which the last one writes the index"
            )
            return 0
        conversion.check_conversion(str(directory), len(source), shards, form)
        count = form.module.write_shard_index(
            str(directory), classes=source.classes, name=source.name
        )
    total = sum(file.stat().st_size for file in directory.glob(f"*{form.ending}"))
    kind = "tars" if form is conversion.TAR else form.name
    names = directory / tar_shards.CLASS_NAMES
    named = f" --config.data.class_names={names}" if kind == "tars" and source.classes else ""
    print(
        f"{count:,} records in {shards:,} shards, {text_table.format_bytes(total)}, in {directory};"
        f" train on them with --config.data.source={kind} --config.data.path={directory}{named}"
    )
    return 0


def lost_weights(source: base.DataSource) -> list[str]:
    """Says which weights of a source its shards do not hold.

    >>> class Few:
    ...     name, classes, captions, record_weights = "few", (), False, (1.0, 2.0)
    ...     def __len__(self): return 2
    >>> lost_weights(Few())
    ['shards hold no weights of records: train on them with the same data.keep']
    """
    tree = [source]
    for node in tree:
        tree += base.inner_sources(node)
    lines = []
    if any(getattr(node, "record_weights", None) is not None for node in tree):
        lines.append("shards hold no weights of records: train on them with the same data.keep")
    for node in tree:
        if isinstance(node, mixture.Mixture) and any(node.weights):
            shares = " : ".join(f"{share:,}" for share in node.shares)
            lines.append(
                f"shards hold every record of data.mixture once and not its shares {shares}: to"
                " keep these, convert each source to another --workdir and mix the results"
            )
    return lines


@contextlib.contextmanager
def _lock(directory: pathlib.Path, share: host_share.HostShare) -> Iterator[None]:
    """Locks the directory for this process, or for all shares and the share for this process."""
    with contextlib.ExitStack() as locks:
        locks.enter_context(lock_workdir(directory, shared=share.count > 1))
        if share.count > 1:
            name = _lock_file(directory, share.number, share.count).name
            locks.enter_context(lock_workdir(directory, name=name))
        yield


def _lock_file(directory: pathlib.Path, number: int, count: int) -> pathlib.Path:
    """The lock of a share, which stays when the share has ended."""
    return directory / f"share-{number:05d}-of-{count:05d}.lock"


class Progress:
    """Prints the progress of the conversion: on a terminal one line that is rewritten, else a new
    line every ten seconds."""

    def __init__(self, records: int, shards: int) -> None:
        self.records, self.shards, self.done, self.complete = records, shards, 0, 0
        self.start = self.last = time.monotonic()

    def __call__(self, count: int) -> None:
        self.done, self.complete, now = self.done + count, self.complete + 1, time.monotonic()
        terminal, last = sys.stderr.isatty(), self.complete == self.shards
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
        """The line after a number of seconds.

        >>> progress = Progress(1000, 4)
        >>> progress.done, progress.complete = 500, 2
        >>> progress.line(10.0)
        '[#############             ] 2 of 4 shards, 500 of 1,000 records, 50 a second, 0:10 left'
        """
        share, speed = self.done / max(self.records, 1), self.done / max(seconds, 1e-9)
        left = round((self.records - self.done) / max(speed, 1e-9))
        return (
            f"[{'#' * int(26 * share):<26}] {self.complete:,} of {self.shards:,} shards,"
            f" {self.done:,} of {self.records:,} records, {speed:,.0f} a second,"
            f" {left // 60}:{left % 60:02d} left"
        )
