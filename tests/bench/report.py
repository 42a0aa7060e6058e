"""All figures that this project reports, measured and printed as one table. `bash launch/bench.sh`
runs it in a separate environment.

    python -m tests.bench.report                   # 15 minutes on two cores, 30 with libtpu
    python -m tests.bench.report --quick           # toy sizes, as a functional check
    python -m tests.bench.report flops checkpoint  # some benchmarks
    python -m tests.bench.report --gpu             # the accelerator's (tests/bench/accelerator.py)

A benchmark is a module of this package with a function `figures(quick)`; each runs in a process of
its own. Figures that need a missing package are listed as not measured, with the reason. A missed
target is no failure; the exit code is 1 if a benchmark failed.
"""

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
DEVICE = "accelerator"  # runs only on request


def benchmarks() -> list[str]:
    """The modules of this package with figures, found without importing them."""
    names = []
    for path in sorted(HERE.glob("*.py")):
        body = ast.parse(path.read_text()).body
        if any(isinstance(node, ast.FunctionDef) and node.name == "figures" for node in body):
            names.append(path.stem)
    return names


def run(name: str, quick: bool, seconds: float) -> tuple[list[Figure], bool]:
    """(figures of a benchmark, whether it failed)."""
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
            done = subprocess.run(  # its progress is visible: some take long
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
    rows = importlib.import_module(f"tests.bench.{name}").figures(quick)
    out.write_text(json.dumps([dataclasses.asdict(figure) for figure in rows]))


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
        help="toy sizes, as a functional check",
    )
    flags.add_argument(
        "--gpu",
        action="store_true",
        help=f"only {DEVICE}: MFU, PyTorch on the same card, memory, attention",
    )
    flags.add_argument("--seconds", type=float, default=4 * 3600.0, help="limit of a benchmark")
    flags.add_argument("--one", default="", help=argparse.SUPPRESS)
    flags.add_argument("--out", default="", help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.one:
        one(args.one, args.quick, pathlib.Path(args.out))
        return 0
    names = args.names or (
        [DEVICE] if args.gpu else [name for name in benchmarks() if name != DEVICE]
    )
    if wrong := [name for name in names if name not in benchmarks()]:
        flags.error(f"{wrong[0]}: there is no such benchmark; they are {', '.join(benchmarks())}")
    rows, broken = [], False
    for name in names:
        start = time.monotonic()
        new_rows, failed = run(name, args.quick, args.seconds)
        rows += new_rows
        broken |= failed
        print(
            f"{name}: {len(new_rows)} figure(s) in {time.monotonic() - start:.0f} s",
            file=sys.stderr,
        )
        # Printed as they come, so that an interruption keeps them.
        print(
            text_table.text_table([figure.cells for figure in new_rows], HEADERS),
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
        if args.quick
        else "; ratios within one run, counts exact"
    )
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
