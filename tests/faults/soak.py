"""A small run that is killed again and again against one that is left alone: the end must be the same bits, and nothing may grow.

    python -m tests.faults.soak DIRECTORY --hours 1                 # a kill every minute; what launch/soak.sh calls
    python -m tests.faults.soak DIRECTORY --steps 400 --kills 50    # kills at random instants, from the import to the last save

Prints one JSON object; exit 0 if the end is bitwise the same.
"""

import argparse
import hashlib
import json
import math
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent.parent
TINY = [
    "data.size=120", "data.image_size=32", "train.batch_size=8", "optim.warmup_steps=2", "model.encoder.width=32", "model.encoder.depth=1",
    "model.encoder.heads=2", "model.decoder.width=32", "model.decoder.depth=1", "model.decoder.heads=2", "model.pool.heads=2",
    "model.text.width=32", "model.text.heads=2", "model.text.depth=1", "data.vocabulary_size=300", "train.log_every=1",
    "train.panel_every=0", "evaluate.batch_size=32",
]  # fmt: skip
SETTLED = 15.0  # seconds after the first step of a life, from which on memory and descriptors are compared


def environment(cache: pathlib.Path) -> dict[str, str]:
    fast = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    more = {"XLA_FLAGS": fast, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    keep = {"JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(cache))}
    return {**os.environ, **more, **keep, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}


def rows(run: pathlib.Path) -> list[dict[str, Any]]:
    """The whole lines of a log."""
    log = run / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")] if log.is_file() else []


def learned(run: pathlib.Path) -> list[dict[str, Any]]:
    """What a log says about learning: no clocks."""
    kept = ("step", "loss", "balance/", "grad_norm", "eval/", "samples_seen", "lr", "ema", "collapse/", "skipped/")
    return [{k: v for k, v in row.items() if k.startswith(kept)} for row in rows(run)]


DIGEST = """
import hashlib, json, pathlib, sys, jax, numpy as np, orbax.checkpoint as ocp
place = max((p for p in (pathlib.Path(sys.argv[1]).absolute() / "checkpoints").iterdir() if p.name.isdecimal()), key=lambda p: int(p.name))
reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(state=ocp.StandardCheckpointHandler()))
state = reader.restore(place, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
position = json.loads((place / "position" / "metadata").read_text())  # it also has clocks
digest = hashlib.sha256(f"{place.name} {position['samples_seen']} {position['fingerprint']}".encode())
for path, leaf in sorted((jax.tree_util.keystr(p), np.asarray(x)) for p, x in jax.tree_util.tree_leaves_with_path(state)):
    digest.update(path.encode() + str(leaf.dtype).encode() + leaf.tobytes())
print(digest.hexdigest())
"""


def end_of(run: pathlib.Path, cache: pathlib.Path) -> str:
    """Digest of every bit of the newest state, of its step and its position, and of what the log says about learning."""
    done = subprocess.run([sys.executable, "-c", DIGEST, str(run)], env=environment(cache), capture_output=True, text=True, check=True)
    return done.stdout.strip() + hashlib.sha256(json.dumps(learned(run)).encode()).hexdigest()


class Life:
    """One process of a run, watched from outside."""

    def __init__(self, run: pathlib.Path, steps: int, save_every: int, cache: pathlib.Path):
        settings = [*TINY, f"train.steps={steps}", f"train.save_every={save_every}", f"train.eval_every={8 * save_every}"]
        command = [sys.executable, "-m", "m3i_jax.main", "--config", "configs/quickstart.py", "--workdir", str(run)]
        self.run, self.began, self.first, self._log = run, time.monotonic(), 0.0, run / "metrics.jsonl"
        run.mkdir(parents=True, exist_ok=True)
        self.output = open(run / "output.txt", "ab")  # noqa: SIM115 (the process writes to it)
        self.process = subprocess.Popen(
            [*command, *(f"--config.{item}" for item in settings)], cwd=ROOT, env=environment(cache), stdout=self.output, stderr=self.output
        )
        self.samples: list[tuple[float, float, int]] = []  # seconds since the first step, MB, descriptors
        self._size = -1

    def look(self) -> None:
        """Notice the line of the first new step in the log, and sample the process."""
        now = time.monotonic()
        size = self._log.stat().st_size if self._log.is_file() else 0
        if not self.first and 0 <= self._size < size:  # a resumed log is first cut, which makes it shorter
            with open(self._log, "rb") as log:
                log.seek(self._size)
                if b'"loss"' in log.read():  # an evaluation before the first step has none
                    self.first = now
        self._size = size
        if self.first:
            try:
                pages = int(pathlib.Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
                handles = len(os.listdir(f"/proc/{self.process.pid}/fd"))
            except (OSError, IndexError):
                return
            self.samples.append((now - self.first, pages * os.sysconf("SC_PAGE_SIZE") / 2**20, handles))

    def last(self, seconds: float = math.inf) -> bool:
        """Let it live so long, counted from its start; whether it ended by itself."""
        while time.monotonic() - self.began < seconds:
            if self.process.poll() is not None:
                return True
            self.look()
            time.sleep(0.05 if seconds < 20 or not self.first else 0.5)
        return False

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.output.close()

    @property
    def growth(self) -> tuple[float, int] | None:
        """(MB, descriptors) more at the end than when it had settled; None if it did not live long enough."""
        settled = [s for s in self.samples if s[0] >= SETTLED]
        if len(settled) < 8:
            return None
        early, late = settled[: len(settled) // 4], settled[-len(settled) // 4 :]
        return statistics.median(s[1] for s in late) - statistics.median(s[1] for s in early), late[-1][2] - early[0][2]


def alone(place: pathlib.Path, steps: int, save_every: int, cache: pathlib.Path) -> Life:
    life = Life(place, steps, save_every, cache)
    life.last()
    if life.process.returncode:
        raise SystemExit(f"the run that was left alone failed: {(place / 'output.txt').read_text()[-2000:]}")
    life.output.close()
    return life


def committed(run: pathlib.Path) -> int:
    return max((int(p.name) for p in (run / "checkpoints").glob("[0-9]*") if p.name.isdecimal()), default=0)


def soak(place: pathlib.Path, *, steps: int, kills: int, every: float, save_every: int, seed: int = 0) -> dict[str, Any]:
    """Run both and compare them. `kills`: at most so many; if `every` is 0 exactly so many, at random instants from the start to shortly
    after the first step, over as many runs as it takes."""
    r, cache = random.Random(seed), place / "cache"
    whole = alone(place / "alone", steps, save_every, cache)
    clean = whole.first - whole.began
    run, lost, back, starts, grown = place / "killed", 0, 0, [], []
    done, reached, same, left = 0, 0, [], []
    while True:
        life = Life(run, steps, save_every, cache)
        if done < kills:  # no later than half as long again as a start takes, or the run is over before it was killed so often
            ended = life.last(every or r.uniform(0.0, 1.5 * (statistics.median(starts) if starts else clean)))
        else:
            ended = life.last()
        if life.growth:
            grown.append(life.growth)
        if life.first:
            starts.append(life.first - life.began)
        if ended:
            if life.process.returncode:
                raise SystemExit(f"a start failed after {done} kills: {(run / 'output.txt').read_text()[-2000:]}")
            life.output.close()
            same.append(end_of(run, cache) == end_of(place / "alone", cache))
            left += leftovers(run)
            if every or done >= kills:
                break
            run, reached = place / f"killed-{len(same)}", 0  # another one, until there were so many kills
            continue
        life.kill()
        done += 1
        now, seen = committed(run), max((row["step"] for row in rows(run)), default=0)
        back = max(back, reached - now)  # a committed step that is gone again
        lost, reached = max(lost, seen - now), now
    return {
        "steps": steps, "kills": done, "runs": len(same), "bitwise": all(same), "most_steps_lost": lost,
        "save_every": save_every, "committed_steps_lost": back, "leftovers": left,
        "clean_start_seconds": round(clean, 2), "restart_seconds": round(statistics.median(starts), 2) if starts else None,
        "lives_measured": len(grown), "growth_mb": round(statistics.median(g[0] for g in grown), 2) if grown else None,
        "growth_descriptors": max((g[1] for g in grown), default=None),
    }  # fmt: skip


def leftovers(run: pathlib.Path) -> list[str]:
    """What is beside the steps when a run is done: nothing."""
    return sorted(p.name for p in (run / "checkpoints").iterdir() if not p.name.isdecimal())


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("directory", type=pathlib.Path)
    ask.add_argument("--hours", type=float, default=0.0, help="about so long, with a kill every minute")
    ask.add_argument("--steps", type=int, default=0, help="steps of the run, instead of hours")
    ask.add_argument("--kills", type=int, default=10**9, help="at most so many")
    ask.add_argument("--every", type=float, default=0.0, help="seconds between kills; 0: at random in the first seconds of every start")
    ask.add_argument("--save-every", type=int, default=5)
    flags = ask.parse_args()
    steps, every, save_every = flags.steps, flags.every, flags.save_every
    if flags.hours:
        every, save_every = every or 60.0, 100
        trial = alone(flags.directory / "trial", 400, save_every, flags.directory / "cache")
        first, seconds = trial.first - trial.began, time.monotonic() - trial.first
        steps = int(flags.hours * 3600 * (1 - min(first / every, 0.9)) * 400 / seconds)
        print(f"{steps:,} steps: {400 / seconds:.1f} a second, {first:.0f} s to the first", file=sys.stderr, flush=True)
    told = soak(flags.directory, steps=steps, kills=flags.kills, every=every, save_every=save_every)
    print(json.dumps(told, indent=1))
    return 0 if told["bitwise"] and not told["leftovers"] and not told["committed_steps_lost"] else 1


if __name__ == "__main__":
    sys.exit(main())
