"""The cost of a checkpoint relative to its parts: copying, writing and reading the same bytes, in
turns on the same disk.

    python -m tests.bench.checkpoint                   # 600 MB
    python -m tests.bench.checkpoint --megabytes 64 --runs 3 --place /mnt/disk

- blocked: time for which `save` blocks the loop, over a copy of the state within memory.
- total: time until the checkpoint has its final name, digests included, over writing the bytes to
  one file with fsync.
- restore: reading it into arrays with checked digests, over reading that file.
- digests: digesting the files, and computing the fingerprints of the arrays, each alone, over
  total; by the clock and by processor time. The overlap of digests with writing is not deducted.

The values are random, so nothing compresses. Each number is the least of several runs taken in
turns. On a CPU the state is in host memory already; on an accelerator `save` also copies it there,
and the accelerator computes the fingerprints.
"""

import argparse
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from m3i_jax.reporting import text_table
from m3i_jax.training import checksums
from m3i_jax.training.checkpoint import Checkpoints
from tests.bench.figures import Figure

PIECE = 2**20  # bytes per write
INTERVAL = 600.0  # seconds between saves: 1,000 steps (train.save_every) of 0.6 s


def state_of(megabytes: int) -> dict[str, jax.Array]:
    """Arrays as in a ViT: a few large and many small ones."""
    rng = np.random.default_rng(0)
    large = max(1, megabytes // 24)
    tree = {f"blocks_{i}": rng.normal(size=(12, 2**19)).astype(np.float32) for i in range(large)}
    tree |= {f"bias_{i}": rng.normal(size=3072).astype(np.float32) for i in range(64)}
    return {name: jax.device_put(value) for name, value in tree.items()}


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def costs(run: Callable[[], Any]) -> tuple[float, float]:
    """(seconds by the clock, seconds of processor time)."""
    before = time.process_time()
    return seconds(run), time.process_time() - before


def write(path: pathlib.Path, arrays: list[np.ndarray]) -> None:
    """Write in pieces: for writes of many megabytes Linux allocates large pages, which can take
    four times as long as the write."""
    with open(path, "wb", buffering=0) as file:
        for array in arrays:
            data = memoryview(array).cast("B")
            for start in range(0, len(data), PIECE):
                file.write(data[start : start + PIECE])
        os.fsync(file.fileno())


def read(path: pathlib.Path, arrays: list[np.ndarray]) -> None:
    with open(path, "rb", buffering=0) as file:
        for array in arrays:
            file.readinto(memoryview(array).cast("B"))


def measure(megabytes: int, runs: int, place: str | None) -> dict[str, float]:
    """The least seconds of every part, and the bytes of the state."""
    state = state_of(megabytes)
    host = [np.ascontiguousarray(x) for x in state.values()]
    there = [x.copy() for x in host]
    template = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in state.items()}
    shardings = {name: x.sharding for name, x in state.items()}
    step = jax.jit(lambda tree: jax.tree.map(lambda x: 0.5 * x, tree), donate_argnums=0)
    least: dict[str, float] = {}

    def keep(name: str, value: float) -> None:
        least[name] = min(least.get(name, value), value)

    folder = pathlib.Path(tempfile.mkdtemp(dir=place))
    # Removal of the previous checkpoint is not part of a save: it follows the rename.
    checkpoints = Checkpoints(folder / "checkpoints", runs + 2)
    try:
        for turn in range(1, runs + 2):
            working = jax.block_until_ready(step({name: x.copy() for name, x in state.items()}))
            plain, of_step = costs(lambda: jax.block_until_ready(step(working)))  # noqa: B023 (called at once)
            copied = seconds(lambda: [np.copyto(a, b) for a, b in zip(there, host, strict=True)])
            os.sync()
            raw = seconds(lambda: write(folder / "raw", host))
            loaded = seconds(lambda: read(folder / "raw", there))
            (folder / "raw").unlink()
            os.sync()
            working = {name: x.copy() for name, x in state.items()}
            jax.block_until_ready(working)
            start, before = time.perf_counter(), time.process_time()
            checkpoints.save(turn, working, {"samples_seen": turn})  # type: ignore[arg-type]
            blocked = time.perf_counter() - start
            after = seconds(lambda: jax.block_until_ready(step(working)))
            checkpoints.wait()
            total, processors = time.perf_counter() - start, time.process_time() - before - of_step
            files = [
                path for path in (folder / "checkpoints" / str(turn)).rglob("*") if path.is_file()
            ]
            digested = costs(lambda: [checksums.file_digest(path, written=True) for path in files])
            printed = costs(lambda: checksums.checksum_arrays(state).read())
            back: Any = None

            def restore(turn: int = turn) -> None:
                nonlocal back
                assert checkpoints.newest_good() == turn
                back = jax.block_until_ready(checkpoints.restore(turn, template, shardings))

            restored = seconds(restore)
            if not all(
                (np.asarray(back[name]) == value).all()
                for name, value in zip(state, host, strict=True)
            ):
                raise RuntimeError("the restored arrays differ from the saved ones")
            del back
            # every turn uses the same number of memory pages
            shutil.rmtree(folder / "checkpoints" / str(turn - 1), ignore_errors=True)
            if turn > 1:  # the first turn warms up
                for name, value in {
                    "copy": copied,
                    "raw": raw,
                    "read": loaded,
                    "blocked": blocked,
                    "total": total,
                    "restore": restored,
                    "step": plain,
                    "step after": after,
                    "digests": digested[0],
                    "fingerprints": printed[0],
                    "total, processors": processors,
                    "digests, processors": digested[1],
                    "fingerprints, processors": printed[1],
                }.items():
                    keep(name, value)
    finally:
        checkpoints.close()
        shutil.rmtree(folder, ignore_errors=True)
    return least | {"bytes": float(sum(x.nbytes for x in host))}


def share(s: dict[str, float], end: str, what: str) -> float:
    return sum(s[name + end] for name in what.split(" and ")) / s["total" + end]


def figures(quick: bool) -> list[Figure]:
    s = measure(16 if quick else 600, 2 if quick else 5, None)
    size = f"checkpoint of {s['bytes'] / 1e6:,.0f} MB"
    return [
        Figure(
            f"{size}: loop blocked over a memory copy",
            s["blocked"] / s["copy"],
            0.1,
            note=f"{1e3 * s['blocked']:.1f} ms",
        ),
        Figure(
            f"{size}: loop blocked over a save interval of {INTERVAL:.0f} s",
            s["blocked"] / INTERVAL,
            0.01,
        ),
        Figure(
            f"{size}: total over raw write and fsync",
            s["total"] / s["raw"],
            1.5,
            note=f"{s['total']:.2f} s, digests included",
        ),
        *(
            Figure(f"{size}: {what} over total, by {how}", share(s, end, what), 0.1)
            for how, end in (("clock", ""), ("processors", ", processors"))
            for what in ("digests", "digests and fingerprints")
        ),
        Figure(
            f"{size}: restore over raw read",
            s["restore"] / s["read"],
            note=f"{s['restore']:.2f} s, digests checked",
        ),
        Figure(f"{size}: the step after a save over one without", s["step after"] / s["step"]),
    ]


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("--megabytes", type=int, default=600)
    flags.add_argument("--runs", type=int, default=5)
    flags.add_argument(
        "--place",
        default=None,
        help="directory on the disk to measure; default: the temporary directory",
    )
    args = flags.parse_args()
    s = measure(args.megabytes, args.runs, args.place)
    size = s.pop("bytes")
    print(
        text_table.text_table(
            [
                (name, f"{1e3 * value:,.1f}", f"{size / value / 1e9:.2f}")
                for name, value in s.items()
            ],
            ("", "ms", "GB/s"),
        )
    )
    print(
        f"blocked over copy {s['blocked'] / s['copy']:.3f}, total over raw"
        f" {s['total'] / s['raw']:.3f}, ",
        end="",
    )
    print(f"restore over read {s['restore'] / s['read']:.3f}, load {os.getloadavg()[0]:.1f}")
    for what in ("digests", "digests and fingerprints"):
        print(
            f"{what} over total {share(s, '', what):.3f} by clock,"
            f" {share(s, ', processors', what):.3f} by processors"
        )


if __name__ == "__main__":
    main()
