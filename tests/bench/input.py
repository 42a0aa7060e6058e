"""Speed of the input pipeline against its parts and against other loaders, side by side in one run.

    python -m tests.bench.input            # five to ten minutes

Images per second of processor time: decode a 500 x 375 JPEG once and resize two antialiased bicubic
224 x 224 crops of it, in batches of 256. The other loaders also flip half of the views, which this
package does on the device. All contestants are alive at the same time and take turns; a line is the
median of its rounds. Loaders that are not installed are skipped; all of them need `pip install
torch torchvision` (CPU builds) and tensorflow-cpu. Afterwards it checks equal bytes for any number
of workers and after a restart, fast access to a distant position, and the share of augmentation in
the FLOPs of a step.
"""

import contextlib
import hashlib
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from m3i_jax.reporting import text_table
from tests import rows as streams
from tests.bench import contestants, heap
from tests.bench.contestants import BATCH, CONTESTANTS
from tests.bench.figures import Figure

ROUNDS, BATCHES = 9, 2
SMALL = 32  # batch size of the comparisons of bytes

# (numerator, denominator, target); of several denominators, the fastest
RATIOS = [
    ("pipeline", ("raw loop",), 0.90),
    ("pipeline, 1 worker", ("raw loop",), 0.85),
    ("pipeline, Pillow", ("raw loop, Pillow",), 0.90),
    ("pipeline, Pillow, 1 worker", ("raw loop, Pillow",), 0.85),
    ("pipeline, 1 worker", ("DataLoader, Pillow, 1 worker", "DataLoader, tensors, 1 worker"), 1.1),
    (
        "pipeline, Pillow, 1 worker",
        ("DataLoader, Pillow, 1 worker", "DataLoader, tensors, 1 worker"),
        1.1,
    ),
    ("pipeline", ("tf.data",), 2.5),
    ("pipeline", ("pipeline, Pillow",), None),
    ("pipeline", ("pipeline, no augmentation",), 0.95),
    ("decode: simplejpeg", ("decode: Pillow",), None),
]


class Running:
    """The process of a contestant."""

    def __init__(self, name: str, folder: str) -> None:
        environment = {
            **os.environ,
            **heap.kept(),
            "JAX_PLATFORMS": "cpu",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "tests.bench.contestants", name, folder]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.expect("ready")

    def spent(self) -> float:
        """Processor seconds of the process and its living descendants."""
        parents = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    parents[int(entry)] = int(
                        pathlib.Path("/proc", entry, "stat")
                        .read_text()
                        .rpartition(")")[2]
                        .split()[1]
                    )
        pids = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in pids} - pids:
            pids |= more
        # Linux's CPU clock of another process, in nanoseconds
        return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)

    def at_rest(self) -> float:
        """The same once the contestant is idle. This process does the polling, so it costs the
        contestant nothing."""
        last = self.spent()
        while True:
            time.sleep(0.25)
            now = self.spent()
            if now - last < 0.005:
                return now
            last = now

    def expect(self, expected: str = "") -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line or (expected and line != expected):
            raise RuntimeError(
                f"{self.process.args!r} ended with {self.process.wait()} (it printed {line!r})"
            )
        return line

    def round(self) -> float:
        """Images per second of processor time, from idle to idle, so that the number of prefetched
        batches is the same before and after."""
        assert self.process.stdin is not None
        before = self.at_rest()
        print(BATCHES, file=self.process.stdin, flush=True)
        self.expect("done")
        return BATCHES * BATCH / (self.at_rest() - before)

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()


def race(folder: str) -> dict[str, list[float]]:
    """Images per second of every installed contestant, by round."""
    running = {
        name: Running(name, folder)
        for name, contestant in CONTESTANTS.items()
        if not contestant.absent
    }
    speeds: dict[str, list[float]] = {name: [] for name in running}
    try:
        for turn in range(ROUNDS):
            for name in list(running)[:: 1 if turn % 2 else -1]:
                speeds[name].append(running[name].round())
    finally:
        for one in running.values():
            one.end()
    return speeds


def ratio(speeds: dict[str, list[float]], what: str, over: tuple[str, ...]) -> float | None:
    """Median over rounds of the ratio to the fastest of `over` in the same round."""
    rivals = [name for name in over if name in speeds]
    if what not in speeds or not rivals:
        return None
    best = max(rivals, key=lambda name: statistics.median(speeds[name]))
    return statistics.median(a / b for a, b in zip(speeds[what], speeds[best], strict=True))


def digest(folder: str, batches: int, *, start: int = 0, **data: object) -> list[str]:
    """Hash of every array of every batch."""
    iterator = contestants.pipeline(folder, start=start, batch=SMALL, **data)
    out = []
    try:
        for _ in range(batches):
            batch = next(iterator)
            out.append(
                hashlib.sha256(
                    b"".join(name.encode() + batch[name].tobytes() for name in sorted(batch))
                ).hexdigest()
            )
    finally:
        iterator.close()
    return out


def promises(folder: str) -> list[tuple[str, str, str]]:
    """Equal bytes for any number of workers and threads and after a restart; distant positions."""
    complete = digest(folder, 6)
    others = {f"{n} workers": digest(folder, 6, workers=n) for n in (1, 2, 4)} | {
        "2 threads": digest(folder, 6, threads=2)
    }
    one, two = (
        streams.by_processes(folder, hosts, batches=6, start=0, batch=SMALL) for hosts in (1, 2)
    )
    rest = [digest(folder, 6 - k, start=k * SMALL) == complete[k:] for k in range(1, 6)]
    rows = [
        (f"batches of {name} equal those of none", str(seen == complete), "True")
        for name, seen in others.items()
    ]
    rows.append(("batches of 2 processes equal those of 1", str(one == two), "True"))
    rows.append(("restarts after 1 to 5 batches go on with the same bytes", str(all(rest)), "True"))
    seconds: dict[int, list[float]] = {0: [], 10**9: []}
    for start in [*seconds] * 3:
        begin = time.perf_counter()
        digest(folder, 1, start=start)
        seconds[start].append(time.perf_counter() - begin)
    near, far = (min(times) for times in seconds.values())
    rows.append(
        (
            f"first batch at position 1,000,000,000 (at 0: {near:.2f} s), no worker",
            f"{far:.2f} s",
            "1 s",
        )
    )
    return rows


def augmentation_share() -> float:
    """FLOPs of the augmentation of both views over those of a ViT-B/16 step, both counted by
    XLA."""
    import functools

    import jax
    import numpy as np

    from m3i_jax import config as configuration
    from m3i_jax import parallel
    from m3i_jax.augment import photometric
    from m3i_jax.models import presets
    from m3i_jax.training.trainer import Trainer, abstract_batch

    cfg = configuration.default_config()
    cfg.model.update(presets.preset("vit_b16"))
    configuration.apply_overrides(
        cfg, ["data.size=100000", "data.classes=1000", "data.captions=no", "train.batch_size=8"]
    )
    settings = configuration.resolve(cfg)
    one = parallel.make_mesh((1, 1, 1), jax.devices()[:1])
    trainer = Trainer(settings, one, 0)
    step = (
        jax.jit(trainer.trace)
        .lower(trainer.template, abstract_batch(settings))
        .cost_analysis()["flops"]
    )

    def augment(view: int, views: jax.Array, flip: jax.Array, where: jax.Array) -> jax.Array:
        mirrored = photometric.mirror(views, flip)
        return photometric.augment(
            mirrored, where, seed=0, view=view, settings=settings.data.augment
        )

    shapes = [
        jax.ShapeDtypeStruct((8, *rest), kind)
        for rest, kind in (((224, 224, 3), np.uint8), ((), np.bool_), ((2,), np.uint32))
    ]
    lowered = [jax.jit(functools.partial(augment, view)).lower(*shapes) for view in (0, 1)]
    return sum(each.cost_analysis()["flops"] for each in lowered) / step


def figures(quick: bool) -> list[Figure]:
    share = Figure(
        "FLOPs of augmenting two views over the step of a ViT-B/16", augmentation_share(), 0.01
    )
    with tempfile.TemporaryDirectory() as folder:
        contestants.make_pictures(pathlib.Path(folder), 8 if quick else 64)
        if quick:
            complete, rest = digest(folder, 2), digest(folder, 1, start=SMALL)
            return [
                Figure(
                    "batches after a restart that are other bytes", float(complete[1:] != rest), 0
                ),
                share,
            ]
        speeds = race(folder)
        out = [share]
        for what, over, target in RATIOS:
            rival = over[0] if len(over) == 1 else "the faster DataLoader"
            absent = (
                "" if all(name in speeds for name in (what, over[0])) else "needs the extra bench"
            )
            out.append(
                Figure(
                    f"input, images a core second: {what} over {rival}",
                    ratio(speeds, what, over),
                    target,
                    False,
                    absent,
                )
            )
        broken = sum(
            actual != expected for _, actual, expected in promises(folder) if expected == "True"
        )
        return [
            *out,
            Figure(
                "promises broken: same bytes from any number of workers, and after a restart",
                float(broken),
                0,
            ),
        ]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        contestants.make_pictures(pathlib.Path(folder))
        speeds = race(folder)
        rows = [
            (name, f"{statistics.median(s):,.0f}", f"{max(s):,.0f}") for name, s in speeds.items()
        ]
        print(text_table.text_table(rows, ("images a second of one core", "median", "best")), "\n")
        for name, contestant in CONTESTANTS.items():
            if contestant.absent:
                print(f"left out: {name}: the package {contestant.absent} is not installed")
        table = []
        for what, over, target in RATIOS:
            value = ratio(speeds, what, over)
            measured = "not measured" if value is None else f"{value:.2f}"
            rival = over[0] if len(over) == 1 else "the faster DataLoader"
            table.append((f"{what} over {rival}", measured, f"{target:.2f}" if target else "-"))
        share = (
            "augmentation of two views over the step of a ViT-B/16, FLOPs",
            f"{augmentation_share():.2%}",
            "1 %",
        )
        print(text_table.text_table([*table, *promises(folder), share], ("", "measured", "target")))


if __name__ == "__main__":
    main()
