"""Time, memory and disk of the index of a large data set of tar files: joined from its parts, and
opened.

python -m tests.bench.tar_index --records 1e8 --dir DIR

The parts are simulated as `--mode=index` writes them (12 bytes a key, 10,000 records a tar file,
640,000 a part); they are joined as its last process does, and the index is opened as TarSource
opens it: by the first process of a host, which compares checksums, and by a worker, which does
not."""

import argparse
import os
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from m3i_jax.data.sources import base, tar_index, tars

FILE = 10_000  # records of a tar file


def write_part(builder: tar_index.IndexBuilder, part: int, records: int) -> None:
    """Writes a part of an index of so many records, with captions in JSON members."""
    number = np.arange(
        part * tar_index.PART * FILE, min((part + 1) * tar_index.PART * FILE, records)
    )
    rng = np.random.default_rng(part)
    digits = number[:, None] // 10 ** np.arange(11, -1, -1) % 10 + ord("0")
    columns: dict[str, Any] = {
        "shard": number // FILE,
        "offset": number % FILE * 40_960 + 512,
        "size": rng.integers(10_000, 40_000, len(number)),
        "label": np.full(len(number), -1),
        "caption_kind": np.full(len(number), tar_index.JSON),
        "caption_offset": number % FILE * 40_960 + 30_000,
        "caption_size": np.full(len(number), 300),
        "key_hash": rng.integers(0, 2**63, len(number)),
        "keys": digits.ravel(),
        "key_end": 12 * (np.arange(len(number)) + 1),
    }
    arrays = {name: columns[name].astype(kind) for name, kind in tar_index._DTYPES.items()}
    rows = slice(part * tar_index.PART, (part + 1) * tar_index.PART)
    base.save_arrays(
        builder._part_path(part),
        **arrays,
        lengths=np.array([len(number), 12 * len(number)]),
        ignored=np.frombuffer(b"{}", np.uint8),
        version=np.array([tar_index.VERSION]),
        signature=builder.states[rows].ravel(),
    )


def opened(builder: tar_index.IndexBuilder, verify: bool) -> tars.TarSource:
    """A source with the index of a file, whose tar files are not there."""
    source = tars.TarSource.__new__(tars.TarSource)
    source.name = "simulated"
    index = builder.load(verify=verify)
    assert index is not None
    source._set_index(index)
    return source


def in_child(act: Callable[[], None]) -> None:
    """Runs a function in a process of its own, and prints its peak memory."""
    if child := os.fork():
        os.waitpid(child, 0)
        return
    act()
    with open("/proc/self/status", encoding="ascii") as file:
        memory = {line.split(":")[0]: line.split()[1] for line in file if line.startswith("Rss")}
    parts = {name: f"{int(kib) / 1024:,.0f} MiB" for name, kib in memory.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"memory {parts}, peak {peak:,.0f} MiB", flush=True)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=float, default=1e7)
    parser.add_argument("--dir", required=True)
    flags = parser.parse_args()
    records = int(flags.records)
    files = [f"{number:05d}.tar" for number in range(-(-records // FILE))]
    path = os.path.join(flags.dir, f"index_{flags.records:g}.npz")
    builder = tar_index.IndexBuilder(files, np.ones((len(files), 2), np.int64), path)
    if not os.path.exists(path):
        for part in builder.missing():
            write_part(builder, part, records)

    def join() -> None:
        wall, used = time.perf_counter(), time.process_time()
        assert builder.finish()
        wall, used = time.perf_counter() - wall, time.process_time() - used
        print(f"join {builder.parts()} parts: {used:.1f} s of processor time, {wall:.1f} s")

    def use() -> None:
        for name, verify in (("first process", True), ("worker", False)):
            wall, used = time.perf_counter(), time.process_time()
            source = opened(builder, verify)
            source.fingerprint(), source.key(len(source) // 2)
            wall, used = time.perf_counter() - wall, time.process_time() - used
            print(f"{name}: {used:.2f} s of processor time, {wall:.2f} s")
        used = time.process_time()
        part = base.split_by_hash(source, 0.1, "train")
        print(f"training part, {len(part):,} records: {time.process_time() - used:.2f} s")

    in_child(join)
    print(f"{records:,} records, {os.path.getsize(path) / 2**20:,.0f} MiB")
    in_child(use)


if __name__ == "__main__":
    main()
