"""Time and memory to open a data set of tar files whose headers were read before.

python -m tests.bench.tar_index --records 1e7 --dir DIR

The index is simulated (12 bytes a key, 10,000 records a tar file); it is opened as TarSource opens
it, by the first process of a host, which compares checksums, and by a worker, which does not."""

import argparse
import os
import resource
import time

import numpy as np

from m3i_jax.data.sources import base, tars


def simulated_index(records: int) -> dict[str, np.ndarray]:
    """The columns of an index of so many records, with captions in JSON members."""
    rng, number = np.random.default_rng(0), np.arange(records)
    digits = number[:, None] // 10 ** np.arange(11, -1, -1) % 10 + ord("0")
    columns = {
        "shard": (number // 10_000).astype(np.int32),
        "offset": number % 10_000 * 40_960 + 512,
        "size": rng.integers(10_000, 40_000, records).astype(np.uint32),
        "label": np.full(records, -1, np.int32),
        "caption_kind": np.full(records, 2, np.uint8),
        "caption_offset": number % 10_000 * 40_960 + 30_000,
        "caption_size": np.full(records, 300, np.uint32),
        "key_hash": rng.integers(0, 2**63, records).astype(np.uint64),
        "keys": digits.astype(np.uint8).ravel(),
        "key_end": 12 * (number + 1),
        "ignored": np.frombuffer(b"{}", np.uint8),
    }
    digest = tars._fingerprint(["x.tar"], columns)
    return {**columns, "fingerprint": np.frombuffer(digest.encode(), np.uint8)}


def opened(path: str, signature: np.ndarray, verify: bool) -> tars.TarSource:
    """A source with the index of a file, whose tar files are not there."""
    source = tars.TarSource.__new__(tars.TarSource)
    source.name = "simulated"
    index = tars._load(path, signature, verify=verify)
    assert index is not None
    source._set_index(index)
    return source


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=float, default=1e7)
    parser.add_argument("--dir", required=True)
    flags = parser.parse_args()
    path = os.path.join(flags.dir, f"index_{flags.records:g}.npz")
    signature = np.zeros((int(flags.records) // 10_000, 2), np.int64)
    if not os.path.exists(path):
        tars._save(path, signature, simulated_index(int(flags.records)))
    child = os.fork()  # so that the memory is that of opening alone
    if child:
        os.waitpid(child, 0)
        return
    print(f"{flags.records:,.0f} records, {os.path.getsize(path) / 2**20:,.0f} MiB")
    for name, verify in (("first process", True), ("worker", False)):
        wall, used = time.perf_counter(), time.process_time()
        source = opened(path, signature, verify)
        source.fingerprint(), source.key(len(source) // 2)
        wall, used = time.perf_counter() - wall, time.process_time() - used
        print(f"{name}: {used:.2f} s of processor time, {wall:.2f} s")
    wall = time.process_time()
    part = base.split_by_hash(source, 0.1, "train")
    print(f"training part, {len(part):,} records: {time.process_time() - wall:.2f} s")
    with open("/proc/self/status", encoding="ascii") as file:
        memory = {line.split(":")[0]: line.split()[1] for line in file if line.startswith("Rss")}
    print({name: f"{int(kib) / 1024:,.0f} MiB" for name, kib in memory.items()})
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB")
    os._exit(0)


if __name__ == "__main__":
    main()
