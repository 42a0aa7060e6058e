"""Timing of two programs that compute the same, in JAX and in PyTorch, each in a separate process
and in turns.

A contest is a module of this package with `ours(folder, name)` (JAX) and `theirs(folder, name)`
(PyTorch). Each returns a function that runs one step and returns its loss. The JAX side starts
first and writes the start of the PyTorch side to `folder`. NEEDS names the packages of the PyTorch
side. Both use the malloc configuration of tests.bench.heap, and the least of the runs counts. Other
load slows both down: the load is reported with the result, and the ratio of processor times is less
sensitive to it.
"""

import argparse
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from tests.bench import heap

THREADS = 2


def contestant(module: str, side: str, folder: pathlib.Path, name: str) -> None:
    """Answer every input line with (loss, wall seconds, processor seconds) of one step."""
    contest = importlib.import_module(module)
    step = (contest.ours if side == "jax" else contest.theirs)(folder, name)
    print("ready", flush=True)
    for _ in sys.stdin:
        wall, processor = time.perf_counter(), time.process_time()
        loss = step()
        print(
            json.dumps([loss, time.perf_counter() - wall, time.process_time() - processor]),
            flush=True,
        )


class Running:
    """The process of a contestant."""

    def __init__(self, python: str, *arguments: str) -> None:
        environment = {
            **os.environ,
            **heap.kept(),
            "OMP_NUM_THREADS": str(THREADS),
            "JAX_PLATFORMS": "cpu",
        }
        command = [python, "-m", "tests.bench.race", *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        if self.line() != "ready":
            raise RuntimeError(f"{' '.join(arguments)} did not start")

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def step(self) -> tuple[float, float, float]:
        assert self.process.stdin is not None
        print("go", file=self.process.stdin, flush=True)
        if not (line := self.line()):
            raise RuntimeError(f"{self.process.args!r} ended with {self.process.wait()}")
        return tuple(json.loads(line))  # type: ignore[return-value]

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def race(module: str, name: str, runs: int, python: str, agree: float) -> dict[str, Any]:
    """Losses of the first steps, and the least seconds of both sides; `python` runs the PyTorch
    side.

    Raises: ModuleNotFoundError: theirs would run here, and a package is missing. RuntimeError: the
      losses of the first step differ by more than `agree`: then they do not compute the same thing,
      and no time means anything.
    """
    if python == sys.executable:
        for package in importlib.import_module(module).NEEDS:
            importlib.import_module(package)
    with tempfile.TemporaryDirectory() as folder:
        running = [Running(sys.executable, module, "jax", folder, name)]
        try:
            running.append(Running(python, module, "torch", folder, name))
            rounds = [
                [one.step() for one in running[:: 1 if turn % 2 else -1]][:: 1 if turn % 2 else -1]
                for turn in range(runs + 3)
            ]
        finally:
            for one in running:
                one.end()
    differ = [abs(a[0] - b[0]) / abs(b[0]) for a, b in rounds]
    if differ[0] > agree:
        raise RuntimeError(
            f"the losses of the first step are {rounds[0][0][0]} and {rounds[0][1][0]}"
        )
    timed = rounds[3:]
    least = {
        side: [min(pair[i][j] for pair in timed) for i in range(2)]
        for j, side in ((1, "wall"), (2, "processor"))
    }
    return {
        "differ": differ,
        "rounds": timed,
        "wall": least["wall"],
        "processor": least["processor"],
    }


def summary(name: str, result: dict[str, Any]) -> str:
    (jax_time, torch_time), (jax_cpu, torch_cpu) = result["wall"], result["processor"]
    differences = ", ".join(f"{difference:.1e}" for difference in result["differ"][:3])
    return (
        f"{name}: {jax_time:.3f} s, PyTorch {torch_time:.3f} s, ratio {jax_time / torch_time:.3f}"
        f" (processor time {jax_cpu / torch_cpu:.3f}); losses of three steps differ by"
        f" {differences}; {len(result['rounds'])} runs, load {os.getloadavg()[0]:.1f}"
    )


def one_thread(module: str, name: str, agree: float, runs: int = 7) -> tuple[float, float]:
    """Least processor seconds of a step of (JAX, PyTorch), by turns in this process. The flags of
    XLA must say one thread before jax starts.

    Raises:
      RuntimeError: the losses differ by more than `agree`.
    """
    global THREADS
    THREADS = 1
    contest = importlib.import_module(module)
    with tempfile.TemporaryDirectory() as folder:
        steps = [side(pathlib.Path(folder), name) for side in (contest.ours, contest.theirs)]
    a, b = (step() for step in steps)
    if abs(a - b) > agree * abs(b):
        raise RuntimeError(f"{name}: the losses are {a} and {b}")
    least = [float("inf")] * 2
    for _ in range(runs):
        for i, step in enumerate(steps):
            start = time.process_time()
            step()
            least[i] = min(least[i], time.process_time() - start)
    return least[0], least[1]


def main(module: str, names: list[str], agree: float) -> None:
    """Run the command line of a contest: names, or `one_thread` and names, to compare with one
    thread each."""
    if sys.argv[1:2] == ["one_thread"]:
        one = "--xla_cpu_multi_thread_eigen=false"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {one}"
        for name in sys.argv[2:] or names:
            a, b = one_thread(module, name, agree)
            print(f"{name}: {a:.4f} s, PyTorch {b:.4f} s, ratio {a / b:.2f}", flush=True)
        return
    flags = argparse.ArgumentParser()
    flags.add_argument("names", nargs="*", default=names)
    flags.add_argument("--runs", type=int, default=7)
    flags.add_argument(
        "--torch",
        default=sys.executable,
        help="a Python interpreter with PyTorch; default: this one",
    )
    args = flags.parse_args()
    for name in args.names:
        print(summary(name, race(module, name, args.runs, args.torch, agree)), flush=True)


if __name__ == "__main__":
    module, side, folder, name = sys.argv[1:]
    contestant(module, side, pathlib.Path(folder), name)
