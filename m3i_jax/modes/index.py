"""--mode=index: read the headers of the tar files of a source once, into data.index or
WORKDIR/index, so that no run has to.

The index is built in parts, each a pure function of some tar files. The same command goes on where
it was stopped. On several hosts each writes every n-th part (--shard=i/n) to a common directory;
the one that finds all parts complete joins them. Of hosts that end at the same moment all may find
that, and write the same."""

import os
import pathlib

from m3i_jax import interrupts, progress, schema
from m3i_jax.data import engines
from m3i_jax.data.cores import usable_cores
from m3i_jax.data.sources import base, mixture, tar_index, tars
from m3i_jax.errors import UserError
from m3i_jax.modes import host_share
from m3i_jax.modes.setup import index_directory, make_workdir


def run(
    config: schema.Config,
    *,
    workdir: str,
    shard: str = "",
    hosts: tuple[str, str, str] = ("", "", ""),
) -> int:
    directory = pathlib.Path(workdir)
    share = host_share.detect_share(shard, *hosts, environ=os.environ)
    make_workdir(directory)
    workers = config.data.workers or usable_cores()
    with interrupts.raise_interrupts():
        for pattern in _patterns(config.data):
            cache = index_directory(config.data, directory)
            builder = tars.index_builder(pattern, cache=cache)
            _build(builder, pattern, share, workers)
    return 0


def _patterns(data: schema.Data) -> list[str]:
    entries = [entry for entry in mixture.mixture_entries(data) if entry.kind == "tars"]
    if not entries:
        raise UserError(
            f"data.source={data.source!r} holds no tar files: other sources have no index to build"
            " in advance"
        )
    patterns = [
        base.split_path(entry.path, split)
        for entry in entries
        for split in (entry.split, entry.held_out)
        if split or split is entry.split
    ]
    return list(dict.fromkeys(patterns))


def _build(
    builder: tar_index.IndexBuilder, pattern: str, share: host_share.HostShare, workers: int
) -> None:
    if builder.load(verify=False) is not None:
        print(f"{pattern}: {builder.path} is complete")
        return
    missing = builder.missing()
    todo = [part for part in missing if share.has(part)]
    if share.count > 1:
        held = sum(map(share.has, range(builder.parts())))
        print(f"share {share} ({share.source}): {len(todo):,} of {held:,} parts are to be written")
    written = engines.map_items("local", builder, todo, workers=workers)
    records = sum(progress.track_progress(written, f"indexing {pattern}", len(todo), "parts"))
    print(f"{pattern}: {records:,} records of {len(builder.files):,} tar files are indexed here")
    host_share.settle_missing(
        lambda: [] if builder.load(verify=False) is not None else builder.missing(),
        os.path.dirname(builder.path),
    )
    if builder.finish():
        index = builder.load(verify=False)
        count = 0 if index is None else len(index["shard"])
        print(f"{count:,} records in {builder.path}")
    else:
        print(
            f"share {share} is complete; {len(builder.missing()):,} of {builder.parts():,} parts"
            " are still to be written by other shares, of which the last one joins them"
        )
