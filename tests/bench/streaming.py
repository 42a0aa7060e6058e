"""Whether one of many hosts is fed from tar files in a bucket, by simulation: the reader and the
pipeline are those of a run, the bucket is a file system that waits.

    python -m tests.bench.streaming                # two minutes; needs fsspec

A range is answered after the latency, at so many bytes a second, and fails at a rate; one in a
thousand takes a second longer. All tar files of the bucket have the same content: images of 30 KB
with JSON captions. One host of --hosts takes its rows of batches of --batch images, by the threads
of data.threads; a step lasts --step seconds. On a machine with other work, --stretch=10 makes
everything that waits ten times slower and divides the times that are printed by ten, so that the
processor counts a tenth."""

import argparse
import asyncio
import collections
import concurrent.futures
import contextlib
import io
import json
import random
import resource
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import fsspec
import numpy as np
from fsspec.asyn import AsyncFileSystem
from PIL import Image

from m3i_jax import schema
from m3i_jax.data import pipeline
from m3i_jax.data.sources import base, remote, tars
from m3i_jax.reporting import text_table

PAGE = 1000  # names of one request of a listing, as in Google's and Amazon's stores


class SlowBucket(AsyncFileSystem):
    """`files` names of one content, behind a network. `counts` has the requests by kind and the
    bytes; it lives as long as the process, like `setup`."""

    protocol = "gs"
    cachable = False
    content, files = b"", 1
    latency, speed, errors, stalls, stretch = 0.05, 100e6, 0.01, 0.001, 1.0
    counts: collections.Counter[str] = collections.Counter()
    rng = random.Random(0)

    async def _cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        start, end = start or 0, len(self.content) if end is None else end
        self.counts["ranges"] += 1
        self.counts["at once"] += 1
        self.counts["most at once"] = max(self.counts["most at once"], self.counts["at once"])
        failed, stalled = self.rng.random() < self.errors, self.rng.random() < self.stalls
        await asyncio.sleep(self.stretch * (self.latency + (1.0 if stalled else 0.0)))
        if not failed:
            await asyncio.sleep(self.stretch * (end - start) / self.speed)
        self.counts["at once"] -= 1
        if failed:
            self.counts["errors"] += 1
            raise OSError("503 service unavailable")
        self.counts["bytes"] += end - start
        return self.content[start:end]

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        self.counts["info"] += 1
        await asyncio.sleep(self.stretch * self.latency)
        if not path.endswith(".tar"):
            return {"name": path, "size": 0, "type": "directory"}
        return self._entry(path)

    def _entry(self, path: str) -> dict[str, Any]:
        return {"name": path, "size": len(self.content), "type": "file", "etag": path[-9:]}

    async def _glob(self, pattern: str, **_: Any) -> dict[str, dict[str, Any]]:
        self.counts["listings"] += -(-self.files // PAGE)
        await asyncio.sleep(self.stretch * self.latency * -(-self.files // PAGE))
        folder = self._strip_protocol(pattern).rpartition("/")[0]
        names = [f"{folder}/{number:05d}.tar" for number in range(self.files)]
        return {name: self._entry(name) for name in names}


def tar_content(records: int, image_bytes: int = 30_000) -> bytes:
    """A tar file of records with an image and a JSON caption, as img2dataset writes them."""
    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 3)).astype(np.uint8)
    image = io.BytesIO()
    Image.fromarray(noise).resize((384, 288)).save(image, "JPEG", quality=90)
    raw = image.getvalue().ljust(image_bytes, b"\0")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key in range(records):
            caption = json.dumps({"caption": f"image {key}", "status": "success", "url": "x" * 300})
            for ending, content in (("jpg", raw), ("json", caption.encode())):
                member = tarfile.TarInfo(f"{key:09d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@contextlib.contextmanager
def bucket(files: int, records: int, **setup: float) -> Iterator[type[SlowBucket]]:
    """Puts the bucket in the place of gs:// for a block."""
    values = {"files": files, "content": tar_content(records), "counts": collections.Counter()}
    made = type("Bucket", (SlowBucket,), {**values, "rng": random.Random(0), **setup})
    registry = sys.modules["fsspec.registry"]._registry  # fsspec has no way to remove one
    known = dict(registry)
    fsspec.register_implementation("gs", made, clobber=True)
    try:
        yield made
    finally:
        registry.clear()
        registry.update(known)


def waits(batches: Iterator[Any], steps: int, step: float) -> list[float]:
    """Seconds for which each of so many steps, which last `step` seconds, waited for its batch."""
    waited = []
    for _ in range(steps):
        began = time.perf_counter()
        next(batches)
        waited.append(time.perf_counter() - began)
        time.sleep(step)
    return waited


def measure_reader(source: base.DataSource, rows: int, threads: int, batches: int) -> float:
    """Images a second of the reader alone, in so many threads that each read batches of rows."""
    rng = np.random.default_rng(0)
    order = rng.integers(0, len(source), (batches, rows)).tolist()
    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda indices: base.read_items(source, indices), order))
    return rows * batches / (time.perf_counter() - began)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hosts", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--step", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--files", type=int, default=16)
    parser.add_argument("--records", type=int, default=4000)
    parser.add_argument("--stretch", type=float, default=1.0)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8])
    flags = parser.parse_args()
    rows = flags.batch // flags.hosts
    print(f"{rows} images a host a step of {flags.step} s: {rows / flags.step:.0f} images/s")
    lines: list[list[str]] = []
    with tempfile.TemporaryDirectory() as cache, bucket(flags.files, flags.records) as store:
        began, used = time.perf_counter(), time.process_time()
        source = tars.TarSource("gs://simulated/laion", cache=cache)
        wall, used = time.perf_counter() - began, time.process_time() - used
        members, size = 2 * len(source), store.counts["bytes"]
        print(
            f"index of {len(source):,} records, one process: {wall:.1f} s, {size / wall / 1e6:.0f}"
            f" MB/s, {1e6 * used / members:.0f} us of processor time a member; {store.counts}"
        )
        store.stretch = flags.stretch
        store.files = 44_200  # the listing of 442 million records
        store.counts.clear()
        began = time.perf_counter()
        known = remote.glob_urls("gs://simulated/laion")
        remote.file_states(known, known)
        wall = (time.perf_counter() - began) / flags.stretch
        print(f"list {len(known):,} files: {wall:.1f} s, {store.counts}")
        store.files = flags.files
        store.counts.clear()
        began = time.perf_counter()
        source = tars.TarSource("gs://simulated/laion", cache=cache)
        wall = (time.perf_counter() - began) / flags.stretch
        print(f"second start: {wall:.2f} s, {store.counts}")
        for threads in flags.threads:
            speed = flags.stretch * measure_reader(source, rows, threads, 24 * threads)
            lines.append([str(threads), "reader alone", f"{speed:.0f} images/s", ""])
        for threads in flags.threads:
            config = schema.Config(
                data=schema.Data(threads=threads, image_size=224, captions="no"),
                train=schema.Train(batch_size=flags.batch),
            )
            store.counts.clear()
            batches = pipeline.iterate_batches(config, source, None, start=0, hosts=flags.hosts)
            next(batches)
            waited = waits(batches, flags.steps, flags.stretch * flags.step)
            waited = [each / flags.stretch for each in waited]
            batches.close()
            late = sum(each > 0.05 for each in waited)
            lines.append(
                [
                    *(str(threads), "pipeline, steps that wait more than 50 ms"),
                    f"{late} of {len(waited)}",
                    f"median {1e3 * statistics.median(waited):.1f} ms, most"
                    f" {1e3 * max(waited):.0f} ms, mean {1e3 * statistics.mean(waited):.1f};"
                    f" {store.counts['errors']} errors in {store.counts['ranges']} requests",
                ]
            )
    print(text_table.text_table(lines, ["data.threads", "what", "value", ""]))
    print(f"peak memory of the process: {peak_mib():,.0f} MiB")


if __name__ == "__main__":
    main()
