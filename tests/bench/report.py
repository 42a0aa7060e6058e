"""All figures that this project claims, measured and printed as one table. `bash launch/bench.sh`
runs it in an environment of its own.

    python -m tests.bench.report                      # a quarter of an hour on two cores, with
    libtpu half an hour python -m tests.bench.report --quick              # the same at toy sizes:
    whether everything runs, not how fast it is python -m tests.bench.report flops checkpoint     #
    some python -m tests.bench.report --gpu                # the accelerator's
    (tests/bench/accelerator.py)

A benchmark is a module beside this one with a function `figures(quick)`; each runs in a process of
its own. What needs a package that is not installed is in the table as not measured, with the
reason. Nothing here fails because a figure is missed; the status is 1 if a benchmark broke."""

import argparse
import ast
import dataclasses
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from m3i_jax.reporting import text_table
from tests.bench import heap
from tests.bench.figures import Figure

HERE = pathlib.Path(__file__).parent
HEADERS = ("figure", "measured", "target", "", "note")
STDERR = 2
DEVICE = "accelerator"  # the one that is only run when it is asked for


def benchmarks() -> list[str]:
    """Modules here that have figures, without importing any."""
    found = []
    for path in sorted(HERE.glob("*.py")):
        body = ast.parse(path.read_text()).body
        if any(isinstance(node, ast.FunctionDef) and node.name == "figures" for node in body):
            found.append(path.stem)
    return found


def run(name: str, quick: bool, seconds: float) -> tuple[list[Figure], bool]:
    """(figures of a benchmark, whether it broke)."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "figures.json"
        command = [
            sys.executable,
            "-m",
            "tests.bench.report",
            "--one",
            name,
            "--out",
            str(out),
            *(["--quick"] if quick else []),
        ]
        environment = os.environ | (
            {} if name == DEVICE else {**heap.kept(), "JAX_PLATFORMS": "cpu"}
        )
        try:
            done = subprocess.run(  # what it prints on the way is seen: some take long
                command,
                env=environment,
                text=True,
                stdout=STDERR,
                stderr=subprocess.PIPE,
                timeout=seconds,
                cwd=HERE.parent.parent,
            )
        except subprocess.TimeoutExpired:
            return [Figure(name, None, note=f"took longer than {seconds:,.0f} s")], True
        if out.is_file():
            return [Figure(**values) for values in json.loads(out.read_text())], False
        last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        absent = last.startswith("ModuleNotFoundError")
        return [
            Figure(
                name,
                None,
                note=f"needs {last.split(chr(39))[1]}: the extra bench" if absent else last[:120],
            )
        ], not absent


def one(name: str, quick: bool, out: pathlib.Path) -> None:
    made = importlib.import_module(f"tests.bench.{name}").figures(quick)
    out.write_text(json.dumps([dataclasses.asdict(figure) for figure in made]))


def main() -> int:
    flags = argparse.ArgumentParser(description="All figures of the project, measured.")
    flags.add_argument(
        "names",
        nargs="*",
        metavar="BENCHMARK",
        help=f"some of {', '.join(benchmarks())}; default: all but {DEVICE}",
    )
    flags.add_argument(
        "--quick",
        action="store_true",
        help="toy sizes: whether everything runs, not how fast it is",
    )
    flags.add_argument(
        "--gpu",
        action="store_true",
        help=f"only {DEVICE}: MFU, PyTorch on the same card, memory, attention",
    )
    flags.add_argument("--seconds", type=float, default=4 * 3600.0, help="limit of a benchmark")
    flags.add_argument("--one", default="", help=argparse.SUPPRESS)
    flags.add_argument("--out", default="", help=argparse.SUPPRESS)
    given = flags.parse_args()
    if given.one:
        one(given.one, given.quick, pathlib.Path(given.out))
        return 0
    names = given.names or (
        [DEVICE] if given.gpu else [name for name in benchmarks() if name != DEVICE]
    )
    if wrong := [name for name in names if name not in benchmarks()]:
        flags.error(f"{wrong[0]}: there is no such benchmark; they are {', '.join(benchmarks())}")
    rows, broken = [], False
    for name in names:
        start = time.monotonic()
        found, failed = run(name, given.quick, given.seconds)
        rows += found
        broken |= failed
        print(
            f"{name}: {len(found)} figure(s) in {time.monotonic() - start:.0f} s", file=sys.stderr
        )
        # As they come: who is cut off later has these.
        print(
            text_table.text_table([figure.cells for figure in found], HEADERS),
            file=sys.stderr,
            flush=True,
        )
    print(text_table.text_table([figure.cells for figure in rows], HEADERS))
    verdicts = [figure.verdict for figure in rows]
    load, cores = os.getloadavg()[0], os.cpu_count()
    print(
        f"\n{', '.join(f'{verdicts.count(v)} {v}' for v in ('met', 'missed', 'not measured'))};"
        f" load {load:.1f} on {cores} cores",
        end="",
    )
    print(
        "; toy sizes: ratios mean nothing"
        if given.quick
        else "; ratios within one run, counts exact"
    )
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
