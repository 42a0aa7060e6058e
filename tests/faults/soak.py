"""A small run that is killed repeatedly, compared with an undisturbed run: the final states must be
equal bit for bit, and memory and descriptors must not grow.

    # a kill every minute, as launch/soak.sh
    python -m tests.faults.soak DIRECTORY --hours 1
    # kills at random instants, from the import to the last save
    python -m tests.faults.soak DIRECTORY --steps 400 --kills 50

Prints one JSON object; exits with 0 if the final states are equal, no files are left over and, with
--hours, memory and descriptors of the undisturbed process do not grow. A process that is too short
or too noisy to show that fails as well. Two memories are measured: allocated memory that is not
freed, and resident memory with all that the C library keeps. Both with one malloc arena
(MALLOC_ARENA_MAX=1), since several hide what a run leaks: with two a core, as runs have, resident
memory grew by 6 +- 3 MB an hour of 1,800 saves. Growth up to 1 MB an hour (24 MB a day) including
its error, plus 1.5 kB a save, is accepted: a run that saves every 20 steps does so a thousand times
an hour, and TensorStore leaks 1 kB each time (training/malloc.py)."""

import argparse
import atexit
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from tests import xla_flags

ROOT = pathlib.Path(__file__).parent.parent.parent
TINY = [
    *("data.size=120", "data.image_size=32", "train.batch_size=8", "optim.warmup_steps=2"),
    *("model.encoder.width=32", "model.encoder.depth=1", "model.encoder.heads=2"),
    *("model.decoder.width=32", "model.decoder.depth=1", "model.decoder.heads=2"),
    *("model.text.width=32", "model.text.heads=2", "model.text.depth=1", "model.pool.heads=2"),
    *("data.vocabulary_size=300", "train.log_every=1", "train.panel_every=0"),
    "evaluate.batch_size=32",
]
STEPS = 10_000_000  # of a run that is stopped after some hours: more than it can reach
SETTLED = 15.0  # seconds after the first step of a process, before which descriptors do not count
WINDOWS = 24  # parts of a process whose medians give the slope of its memory
MOST_MB = 1.0  # accepted growth of memory an hour, including its error
LEFT_MB = 1.5e-3  # accepted growth a save


def environment(cache: pathlib.Path) -> dict[str, str]:
    more = {
        "XLA_FLAGS": xla_flags.FASTEST,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
    }
    keep = {"JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(cache))}
    return {**os.environ, **more, **keep, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}


def rows(run: pathlib.Path) -> list[dict[str, Any]]:
    """The complete lines of a log."""
    log = run / "metrics.jsonl"
    return (
        [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
        if log.is_file()
        else []
    )


def learned(run: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a log without times."""
    kept = (
        "step",
        "loss",
        "balance/",
        "grad_norm",
        "eval/",
        "samples_seen",
        "lr",
        "ema",
        "collapse/",
        "skipped/",
    )
    lines = [{k: v for k, v in row.items() if k.startswith(kept)} for row in rows(run)]
    return [line for line in lines if len(line) > 1]  # a start has a line of times alone


DIGEST = """
import hashlib, json, pathlib, sys, jax, numpy as np, orbax.checkpoint as ocp
place = pathlib.Path(sys.argv[1]).absolute() / "checkpoints" / sys.argv[2]
reader = ocp.PyTreeCheckpointer()
tree = reader.metadata(place / "state").item_metadata.tree
# as numpy: saved by any number of hosts
plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
state = reader.restore(place / "state", restore_args=plain)
position = json.loads((place / "position" / "metadata").read_text())  # it also has clocks
samples, fingerprint = position["samples_seen"], position["fingerprint"]
digest = hashlib.sha256(f"{place.name} {samples} {fingerprint}".encode())
leaves = jax.tree_util.tree_leaves_with_path(state)
for path, leaf in sorted((jax.tree_util.keystr(p), np.asarray(x)) for p, x in leaves):
    digest.update(path.encode() + str(leaf.dtype).encode() + leaf.tobytes())
print(digest.hexdigest())
"""


def state_at(run: pathlib.Path, step: int, cache: pathlib.Path) -> str:
    """Digest of all bits of the state of a step, of its position, and of the metrics up to it."""
    command = [sys.executable, "-c", DIGEST, str(run), str(step)]
    done = subprocess.run(
        command, env=environment(cache), capture_output=True, text=True, check=True
    )
    rows_before = [row for row in learned(run) if row["step"] <= step]
    return done.stdout.strip() + hashlib.sha256(json.dumps(rows_before).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Growth:
    """Growth during a process. `mb`: MB an hour, the slope of a line through the medians of its
    windows; the true slope is between mb - error and mb + error with 95 % confidence.
    `descriptors`: medians and maxima of the last quarter and the first."""

    minutes: float
    mb: float
    error: float
    descriptors: int

    @property
    def a_day(self) -> list[float]:
        """MB a day, and its error."""
        return [round(24 * self.mb, 1), round(24 * self.error, 1)]

    def none(self, saves: float = 0.0) -> bool:
        """Whether the samples show that memory does not grow, at so many saves an hour."""
        return self.mb + self.error <= MOST_MB + LEFT_MB * saves and self.descriptors <= 0

    def figures(self, saves: float) -> dict[str, Any]:
        """As in the result."""
        return dataclasses.asdict(self) | {"mb_a_day": self.a_day, "none": self.none(saves)}


def growth(samples: list[tuple[float, float, int]], settled: float = SETTLED) -> Growth | None:
    """Growth from (seconds since the first step, MB, descriptors); None with too few samples.
    Memory is measured after the first quarter, since an allocator takes minutes to reach its size,
    and the window of data/pipeline.py holds 10,000 records."""
    late = [s for s in samples if s[0] >= settled]
    judged = [s for s in late if s[0] >= samples[-1][0] / 4]
    if len(judged) < 2 * WINDOWS:
        return None
    first, last = judged[0][0], judged[-1][0]
    windows = [
        [s[1] for s in judged if i <= WINDOWS * (s[0] - first) / (last - first) < i + 1]
        for i in range(WINDOWS)
    ]
    points = [
        ((first + (i + 0.5) * (last - first) / WINDOWS) / 3600, statistics.median(w))
        for i, w in enumerate(windows)
        if w
    ]
    hours, memory = zip(*points, strict=True)
    slope, at = statistics.linear_regression(hours, memory)
    left = sum((m - slope * h - at) ** 2 for h, m in points) / (len(points) - 2)
    error = 2.07 * math.sqrt(left / sum((h - statistics.fmean(hours)) ** 2 for h in hours))
    quarter = len(late) // 4
    early, late_ = [s[2] for s in late[:quarter]], [s[2] for s in late[-quarter:]]
    more = max(statistics.median_low(late_) - statistics.median_low(early), max(late_) - max(early))
    return Growth(
        minutes=round((last - first) / 60, 1),
        mb=round(slope, 3),
        error=round(error, 3),
        descriptors=more,
    )


class Life:
    """One process of a run, sampled from outside by a thread."""

    def __init__(
        self,
        run: pathlib.Path,
        steps: int,
        save_every: int,
        cache: pathlib.Path,
        keep: int = 2,
        settings: Sequence[str] = (),
        watched: bool = False,
    ) -> None:
        regular = {
            "steps": steps,
            "save_every": save_every,
            "eval_every": 8 * save_every,
            "keep": keep,
        }
        settings = [*TINY, *(f"train.{name}={value}" for name, value in regular.items()), *settings]
        self._noted = run / "memory.txt"  # written by a watched process
        traced = {"PYTHONMALLOC": "malloc"} if watched else {}
        program = ["tests.faults.watched", str(self._noted)] if watched else ["m3i_jax.main"]
        command = [
            sys.executable,
            "-m",
            *program,
            "--config",
            "configs/quickstart.py",
            "--workdir",
            str(run),
        ]
        self.cost = 0.0  # seconds of processors up to the first step
        self.run, self.began, self.first, self._log = (
            run,
            time.monotonic(),
            0.0,
            run / "metrics.jsonl",
        )
        run.mkdir(parents=True, exist_ok=True)
        self._size = self._log.stat().st_size if self._log.is_file() else 0
        self.output = open(run / "output.txt", "ab")  # noqa: SIM115 (the process writes to it)
        self.process = subprocess.Popen(
            [*command, *(f"--config.{item}" for item in settings)],
            cwd=ROOT,
            env=environment(cache) | traced,
            stdout=self.output,
            stderr=self.output,
        )
        self._stopping = False  # memory that a run uses when it ends is not its memory in training
        # seconds since the first step, private MB, descriptors
        self.samples: list[tuple[float, float, int]] = []
        # resident memory of a watched process, whose samples are allocated memory
        self.resident: list[tuple[float, float, int]] = []
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        atexit.register(self.process.kill)  # if the test fails

    def _watch(self) -> None:
        while self.process.poll() is None:
            self._look()
            time.sleep(0.5 if self.first else 0.05)

    def _look(self) -> None:
        """Detect the first new step in the log, and sample the process."""
        now = time.monotonic()
        size = self._log.stat().st_size if self._log.is_file() else 0
        # a resumed log is first cut, which makes it shorter
        if not self.first and self._size < size:
            with open(self._log, "rb") as log:
                log.seek(self._size)
                if b'"loss"' in log.read():  # an evaluation before the first step has none
                    self.first, self.cost = now, self._processor()
        self._size = size
        if self.first and not self._stopping:
            try:
                noted = self._noted.read_text() if self._noted.is_file() else ""
                about = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
                handles = len(os.listdir(f"/proc/{self.process.pid}/fd"))
            except OSError:
                return
            if noted.endswith("\n"):
                held, own_ = map(float, noted.split())
                self.samples.append((now - self.first, held, handles))
                self.resident.append((now - self.first, own_, handles))
            elif own := re.search(
                r"RssAnon:\s+(\d+) kB", about
            ):  # not what the kernel keeps of files and may drop
                self.samples.append((now - self.first, int(own[1]) / 1024, handles))

    def _processor(self) -> float:
        try:
            words = (
                pathlib.Path(f"/proc/{self.process.pid}/stat")
                .read_text()
                .rpartition(") ")[2]
                .split()
            )
        except OSError:
            return math.nan
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def last(self, seconds: float = math.inf) -> bool:
        """Wait until the process has this age; True if it ended by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(
                None if seconds == math.inf else max(self.began + seconds - time.monotonic(), 0.01)
            )
        if self.process.returncode is None:
            return False
        self._close()
        return True

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._close()

    def stop(self) -> None:
        """Send SIGTERM, as a cluster does; the run saves and exits with 42."""
        self._stopping = True
        self.process.send_signal(signal.SIGTERM)
        if self.process.wait() not in (0, 42):
            raise SystemExit(
                f"{self.run}: exit {self.process.returncode} after SIGTERM: {self.last_output()}"
            )
        self._close()

    def _close(self) -> None:
        self._thread.join()
        self.output.close()
        atexit.unregister(self.process.kill)

    def last_output(self) -> str:
        return (self.run / "output.txt").read_text()[-2000:]

    def ended_well(self) -> None:
        if self.process.returncode:
            raise SystemExit(f"{self.run}: exit {self.process.returncode}: {self.last_output()}")


def committed(run: pathlib.Path) -> list[int]:
    """Complete steps, oldest first."""
    return sorted(int(p.name) for p in (run / "checkpoints").glob("[0-9]*") if p.name.isdecimal())


def leftovers(run: pathlib.Path) -> list[str]:
    """Files besides the steps when a run is done; there must be none."""
    return sorted(p.name for p in (run / "checkpoints").iterdir() if not p.name.isdecimal())


class Lost:
    """Steps that kills cost, and complete steps that disappeared."""

    def __init__(self, run: pathlib.Path) -> None:
        self.run, self.most, self.back, self.reached = run, 0, 0, 0

    def killed(self) -> None:
        now, seen = (
            max(committed(self.run), default=0),
            max((row["step"] for row in rows(self.run)), default=0),
        )
        self.back, self.most, self.reached = (
            max(self.back, self.reached - now),
            max(self.most, seen - now),
            now,
        )


def at_random(
    place: pathlib.Path, *, steps: int, kills: int, save_every: int, seed: int = 0
) -> dict[str, Any]:
    """Kill runs at random instants between the start of a process and shortly after its first step.
    Each run is compared with an undisturbed one."""
    r, cache = random.Random(seed), place / "cache"
    whole = Life(place / "alone", steps, save_every, cache)
    whole.last()
    whole.ended_well()
    wanted = state_at(whole.run, steps, cache)
    clean, starts, same, done, left = whole.first - whole.began, [], [], 0, []
    lost = [Lost(place / "killed-0")]
    while True:
        life = Life(lost[-1].run, steps, save_every, cache)
        # At most 1.5 times the duration of a start, or the run ends before it has all its kills.
        most = 1.5 * (statistics.median(starts) if starts else clean)
        ended = life.last(r.uniform(0.0, most) if done < kills else math.inf)
        if not ended:
            life.kill()
        if life.first:
            starts.append(life.first - life.began)
        if not ended:
            done += 1
            lost[-1].killed()
            continue
        life.ended_well()
        same.append(state_at(life.run, steps, cache) == wanted)
        left += leftovers(life.run)
        if done >= kills:
            break
        lost.append(Lost(place / f"killed-{len(same)}"))
    return {
        "steps": steps,
        "kills": done,
        "runs": len(same),
        "bitwise": all(same),
        "most_steps_lost": max(one.most for one in lost),
        "save_every": save_every,
        "committed_steps_lost": max(one.back for one in lost),
        "leftovers": left,
        "clean_start_seconds": round(clean, 2),
        "restart_seconds": round(statistics.median(starts), 2) if starts else None,
    }


def soak(place: pathlib.Path, *, seconds: float, every: float, save_every: int) -> dict[str, Any]:
    """Two runs side by side for some time: one is undisturbed and keeps all its steps; the other is
    killed periodically. At the end both get a signal to stop, and are compared at the newest
    regular step of the killed one. After a process that saved nothing the next one gets twice the
    time, or a slow machine would make no progress."""
    cache, began = place / "cache", time.monotonic()
    whole = Life(place / "alone", STEPS, save_every, cache, keep=STEPS, watched=True)
    lost, kills, starts, lives, time_ = Lost(place / "killed"), 0, [], [], every
    while True:
        life = Life(lost.run, STEPS, save_every, cache)
        over = began + seconds - time.monotonic() <= time_  # the last life, which has its time too
        while life.last(time_) is False and over and not life.first:
            time_ += 1.0
        if life.process.returncode is not None or whole.process.poll() is not None:
            raise SystemExit(f"a run ended by itself: {life.last_output()}\n{whole.last_output()}")
        life.stop() if over else life.kill()
        starts += [life.first - life.began] if life.first else []
        lives += [late] if (late := [s for s in life.samples if s[0] >= SETTLED]) else []
        if over:
            break
        kills, before = kills + 1, lost.reached
        lost.killed()
        time_ = every if lost.reached > before else 2 * time_
    if not (regular := [step for step in committed(lost.run) if step % save_every == 0]):
        raise SystemExit(
            f"the run that was killed never came to step {save_every}: raise --every, or lower"
            " --save-every"
        )
    while (step := regular[-1]) not in committed(whole.run):
        if whole.last(time.monotonic() - whole.began + 1.0):
            raise SystemExit(f"the run that was left alone ended by itself: {whole.last_output()}")
    whole.stop()
    grown = growth(whole.samples)
    saves = len(committed(whole.run))  # none is deleted
    an_hour, resident = 3600 * saves / (time.monotonic() - whole.began), growth(whole.resident)
    (place / "samples.json").write_text(json.dumps([whole.samples, whole.resident]))
    # of consecutive processes, each at the same age
    of_lives = [statistics.median(s[1] for s in life) for life in lives]
    part = max(len(of_lives) // 3, 1)
    return {
        "minutes": round((time.monotonic() - began) / 60, 1),
        "steps": step,
        "kills": kills,
        "bitwise": state_at(lost.run, step, cache) == state_at(whole.run, step, cache),
        "most_steps_lost": lost.most,
        "save_every": save_every,
        "committed_steps_lost": lost.back,
        "leftovers": leftovers(lost.run) + leftovers(whole.run),
        "restart_seconds": round(statistics.median(starts), 2) if starts else None,
        "alone": grown.figures(an_hour) if grown else None,
        "alone_resident": resident.figures(an_hour) if resident else None,
        "alone_samples": len(whole.samples),
        "alone_saves": saves,
        "lives_measured": len(of_lives),
        "lives_mb": of_lives
        and [round(statistics.median(x), 1) for x in (of_lives[:part], of_lives[-part:])]
        or None,
        "lives_descriptors": lives and [max(s[2] for s in lives[i]) for i in (0, -1)] or None,
    }


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("directory", type=pathlib.Path)
    ask.add_argument("--hours", type=float, default=0.0, help="duration, with a kill every minute")
    ask.add_argument("--every", type=float, default=60.0, help="seconds between kills")
    ask.add_argument("--steps", type=int, default=400, help="without --hours: steps of the run")
    ask.add_argument(
        "--kills",
        type=int,
        default=50,
        help="without --hours: kills at random instants after every start",
    )
    ask.add_argument(
        "--save-every", type=int, default=0, help="steps; default: 20 with --hours, else 5"
    )
    flags = ask.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that its processes end with it
    if flags.hours:
        results = soak(
            flags.directory,
            seconds=3600 * flags.hours,
            every=flags.every,
            save_every=flags.save_every or 20,
        )
    else:
        results = at_random(
            flags.directory, steps=flags.steps, kills=flags.kills, save_every=flags.save_every or 5
        )
    print(json.dumps(results, indent=1))
    fine = results["bitwise"] and not results["leftovers"] and not results["committed_steps_lost"]
    if flags.hours and not all(
        results[name] and results[name]["none"] for name in ("alone", "alone_resident")
    ):
        print(
            f"it is not shown that memory grows by at most {MOST_MB:g} MB an hour and descriptors"
            " not at all",
            file=sys.stderr,
        )
        fine = False
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
