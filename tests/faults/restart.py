"""Time of a start that resumes from a checkpoint, compared with a clean start: from the process to
the line of its first new step.

    python -m tests.faults.restart DIRECTORY --trials 5 \
        --settings model.encoder.width=192 model.encoder.depth=6

Both have all compiled programs in the cache, and take turns. No evaluator runs, since only a clean
start would wait for it. Prints one JSON object: medians of wall and processor seconds, and their
ratios."""

import argparse
import json
import pathlib
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from tests.faults import soak

QUIET = [
    "evaluate.knn=False",
    "evaluate.direct=False",
    "evaluate.zero_shot=False",
    "evaluate.retrieval=False",
]


def first_step(
    run: pathlib.Path, cache: pathlib.Path, settings: Sequence[str], *, save: bool = False
) -> tuple[float, float]:
    """(wall seconds, processor seconds) to the first new step of a process, which is then killed,
    or saves and ends."""
    life = soak.Life(run, 1000, 1000, cache, settings=[*QUIET, *settings])
    while life.process.poll() is None and not life.first:
        time.sleep(0.01)
    if not life.first:
        raise SystemExit(f"{run}: ended before its first step: {life.last_output()}")
    life.stop() if save else life.kill()
    return life.first - life.began, life.cost


def measure(place: pathlib.Path, *, trials: int, settings: Sequence[str] = ()) -> dict[str, Any]:
    cache, saved = place / "cache", place / "saved"
    first_step(saved, cache, settings, save=True)
    shutil.copytree(saved, place / "warm")
    first_step(place / "warm", cache, settings)  # what only a restart compiles
    took: dict[str, list[tuple[float, float]]] = {"clean": [], "restart": []}
    for k in range(trials):
        for kind in (("clean", "restart"), ("restart", "clean"))[k % 2]:
            run = place / f"{kind}-{k}"
            if kind == "restart":
                shutil.copytree(saved, run)
            took[kind].append(first_step(run, cache, settings))
            shutil.rmtree(run)
    size = sum(path.stat().st_size for path in (saved / "checkpoints").rglob("*") if path.is_file())
    clock, cost = (
        {kind: statistics.median(t[i] for t in all_) for kind, all_ in took.items()} for i in (0, 1)
    )
    return {
        "trials": trials, "checkpoint_mb": round(size / 1e6, 1),
        "clean_seconds": round(clock["clean"], 2), "restart_seconds": round(clock["restart"], 2),
        "ratio": round(clock["restart"] / clock["clean"], 3),
        "clean_processor": round(cost["clean"], 2), "restart_processor": round(cost["restart"], 2),
        "ratio_processor": round(cost["restart"] / cost["clean"], 3),
    }  # fmt: skip


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("directory", type=pathlib.Path)
    ask.add_argument("--trials", type=int, default=5)
    ask.add_argument("--settings", nargs="*", default=[], metavar="KEY=VALUE")
    flags = ask.parse_args()
    print(
        json.dumps(measure(flags.directory, trials=flags.trials, settings=flags.settings), indent=1)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
