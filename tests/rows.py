"""Hashes of the rows of a stream, made by a separate process:

python -m tests.rows FOLDER BATCHES START HOST HOSTS BATCH    # prints one line for each row of this
host"""

import hashlib
import os
import subprocess
import sys

from m3i_jax import schema
from m3i_jax.data import pipeline, splits
from m3i_jax.data.sources import base


def hashes(folder: str, batches: int, start: int, host: int, hosts: int, batch: int) -> list[str]:
    """Of all arrays of every row of one host's share of the global batches, from a position on; two
    crops of 32 pixels."""
    data = schema.Data(
        source="folder",
        path=folder,
        holdout=0.0,
        captions="no",
        image_size=32,
        resizer="pillow",
        threads=0,
    )
    source = base.split_by_hash(splits.open_source(data), 0.0, "train")
    config = schema.Config(data=data, train=schema.Train(batch_size=batch))
    made = pipeline.iterate_batches(config, source, None, start=start, host=host, hosts=hosts)
    try:
        found = [next(made) for _ in range(batches)]
    finally:
        made.close()
    rows = [
        b"".join(name.encode() + b[name][row].tobytes() for name in sorted(b))
        for b in found
        for row in range(len(b["label"]))
    ]
    return [hashlib.sha256(row).hexdigest() for row in rows]


def by_processes(folder: str, hosts: int, *, batches: int, start: int, batch: int) -> list[str]:
    """The rows of the global batches, each host's share from a separate process; they share
    nothing but the folder."""
    commands = [
        [
            sys.executable,
            "-m",
            "tests.rows",
            folder,
            *map(str, (batches, start, host, hosts, batch)),
        ]
        for host in range(hosts)
    ]
    seeds = [os.environ | {"PYTHONHASHSEED": str(host)} for host in range(hosts)]
    running = [
        subprocess.Popen(c, stdout=subprocess.PIPE, text=True, env=e)
        for c, e in zip(commands, seeds, strict=True)
    ]
    shares = [process.communicate()[0].split() for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError(f"a process ended with {[process.returncode for process in running]}")
    rows = batch // hosts
    return [
        line
        for k in range(batches)
        for share in shares
        for line in share[k * rows : (k + 1) * rows]
    ]


if __name__ == "__main__":
    print("\n".join(hashes(sys.argv[1], *map(int, sys.argv[2:]))))
