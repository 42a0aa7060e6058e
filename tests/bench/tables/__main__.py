"""The paper's Tables 3 to 5 at toy scale, on real images: M3I against single methods at equal
FLOPs.

    python -m tests.bench.tables --data DIR --out OUT               # all; run again to resume
    python -m tests.bench.tables --data DIR --out OUT --sets emoji  # a selection
    python -m tests.bench.tables --data DIR --out OUT --only-print  # tables of the finished runs

DIR holds images as tar files STYLE-NUMBER.tar in img2dataset's format, where equal keys of two
styles show the same thing, and subcategories.json with the names of the labels. A fifth of the keys
is held out by a hash. Every run is an ordinary command line (configs/toy.py, then
configs/transfer/finetune.py) in OUT/runs/SET/METHOD-SEED, one process at a time; a run with a
result.json is not repeated. OUT/tables.md and OUT/results.json are rewritten after every run.

    emoji   all styles: all methods with one seed, then M3I, M3I without mix and the best single
            method with more seeds
    STYLE   trained on one style, evaluated on held-out keys of the other style and of its own
    digits  scikit-learn's digits: no captions
    tuning  settings of M3I, tried on a part of the images on which the other tables train; no table
            holds out any of them

FLOPs are those of the train step, counted on the traced program; a single method gets as many steps
as M3I's FLOPs allow. Fine-tuning is the same for all. Every column is measured at the end of the
run; none is the best over a run.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from m3i_jax.errors import UserError
from m3i_jax.reporting.atomic_write import write_text_atomic
from tests.bench.tables.results import best_single_methods, machine, run_metrics, write_tables
from tests.bench.tables.sets import (
    METHODS,
    ROOT,
    STEPS_OF_FINETUNING,
    TRIED,
    UNTRAINED,
    Run,
    Set,
    config_spec,
    image_sets,
    overrides,
)


def flops_a_step(run: Run, out: pathlib.Path) -> float:
    """FLOPs of the traced train step of a run, cached in OUT/flops.json."""
    cache = out / "flops.json"
    known = json.loads(cache.read_text()) if cache.is_file() else {}
    spec, settings = config_spec(run, 1), overrides(run)
    name = " ".join([spec, *(s for s in settings if not s.startswith("seed="))])
    if name not in known:
        from m3i_jax import config as configuration
        from m3i_jax.modes import compare, setup

        config = configuration.load_config(spec)
        configuration.apply_overrides(config, settings)
        opened = setup.open_setup(
            configuration.resolve(config),
            str(out / "counted" / run.image_set.name),
            trains=[tuple(config.objective.forms)],
        )
        known[name] = compare.flops_a_step(opened)
        write_text_atomic(cache, json.dumps(known, indent=1))
    return float(known[name])


def steps_of(run: Run, out: pathlib.Path) -> tuple[int, float]:
    """(steps of a run, FLOPs of one step)."""
    run_flops = flops_a_step(run, out)
    if run.method == UNTRAINED or run.steps:
        return max(run.steps, 1), run_flops
    budget = run.image_set.steps * flops_a_step(Run(run.image_set, "M3I", run.seed), out)
    return max(round(budget / run_flops), 1), run_flops


def commands(run: Run, out: pathlib.Path, steps: int, finetune_steps: int) -> list[list[str]]:
    """The commands of a run: pre-training, then evaluation on its own style or fine-tuning."""
    path = run.path(out)
    program = ["-m", "m3i_jax.main"]
    first = [
        *program,
        "--config",
        config_spec(run, steps),
        "--workdir",
        str(path),
        *(f"--config.{s}" for s in overrides(run)),
    ]
    if run.image_set.own:
        return [
            first,
            [
                *program,
                "--mode=eval",
                "--workdir",
                str(path),
                f"--config.data.holdout_split={run.image_set.own}",
            ],
        ]
    if not run.image_set.finetune:
        return [first]
    images = run.image_set
    spec = (
        f"{ROOT / 'configs/transfer/finetune.py'}:path={images.path},from={path}"
        f",source={images.source},batch_size=32"
    )
    # A run of seconds with a small network: weak augmentation and a larger learning rate.
    changes = {
        "seed": str(run.seed),
        **{k: v for k, v in run.image_set.overrides.items() if k.startswith("data.")},
        "train.steps": str(finetune_steps),
        "train.save_every": str(finetune_steps),
        "train.eval_every": "0",
        "optim.lr": "4e-3",
        "optim.warmup_steps": str(min(20, finetune_steps)),
        "optim.weight_decay": "0.05",
        "optim.layer_decay": "0.65",
        "data.rand_augment.ops": "0",
        "data.threads": "1",
        "data.crop_scale": "0.7,1.0",
        "data.augment.erase_p": "0.0",
        "data.augment.mixup": "0.0",
        "data.augment.cutmix": "0.0",
        "model.encoder.drop_path": "0.0",
        "evaluate.crop": "1.0",
    }
    second = [
        *program,
        "--config",
        spec,
        "--workdir",
        str(path / "finetuned"),
        *(f"--config.{k}={v}" for k, v in changes.items()),
    ]
    return [first, second]


def run_once(
    run: Run, data: pathlib.Path, out: pathlib.Path, finetune_steps: int
) -> dict[str, Any] | None:
    """The result of a run, which is started unless it has one; None if a command failed. The output
    of the commands is in log.txt."""
    path = run.path(out)
    done = path / "result.json"
    if done.is_file():
        return json.loads(done.read_text())
    path.mkdir(parents=True, exist_ok=True)
    try:
        steps, cost = steps_of(run, out)
    except UserError as error:
        print(f"{run.image_set.name}, {run.row}, seed {run.seed}: {error}", flush=True)
        return None
    run_commands = commands(run, out, steps, finetune_steps)
    start = time.time()
    with open(path / "log.txt", "a") as log:
        for command in run_commands:
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            }
            code = subprocess.run(
                [sys.executable, *command],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            ).returncode
            if code:
                print(
                    f"{run.image_set.name}, {run.row}, seed {run.seed}: failed with {code}, see"
                    f" {path / 'log.txt'}",
                    flush=True,
                )
                return None
    metrics = run_metrics(path) | {
        "steps": float(steps),
        "flops": steps * cost,
        "wall": time.time() - start,
    }
    result = {
        "set": run.image_set.name,
        "form": run.row,
        "seed": run.seed,
        "machine": machine(),
        "commands": [public_command(c, data, out) for c in run_commands],
        "values": metrics,
    }
    write_text_atomic(done, json.dumps(result, indent=1) + "\n")
    return result


def public_command(command: Sequence[str], data: pathlib.Path, out: pathlib.Path) -> str:
    """A command without the paths of this machine.

    >>> command = ["-m", "m3i_jax.main", "--workdir", "/x/out/runs/a"]
    >>> public_command(command, pathlib.Path("/x"), pathlib.Path("/x/out"))
    'python -m m3i_jax.main --workdir OUT/runs/a'
    """
    return (
        " ".join(["python", *command])
        .replace(f"{ROOT}/", "")
        .replace(str(out), "OUT")
        .replace(str(data), "DIR")
    )


def run_queue(
    sets_: Mapping[str, Set], names: Sequence[str], seeds: int, results: Sequence[Mapping[str, Any]]
) -> list[Run]:
    """Runs in order of importance. Further seeds are added as soon as the results of the first seed
    show the best method."""
    out = []
    for name in names:
        image_set = sets_[name]
        if name == "tuning":
            out += [
                Run(image_set, method, 0, changes, title, steps)
                for title, (method, steps, changes) in TRIED.items()
            ]
            continue
        out += [Run(image_set, method, 0) for method in (*image_set.methods, UNTRAINED)]
        first_seed = [r for r in results if r["set"] == name and r["seed"] == 0]
        if {r["form"] for r in first_seed} >= set(image_set.methods) or image_set.own:
            leading = best_single_methods(first_seed, image_set.columns)
            repeated = [
                m
                for m in ("M3I", *leading[:1], "M3I without mix", *leading[1:])
                if m in image_set.methods
            ]
            out += [Run(image_set, method, seed) for seed in range(1, seeds) for method in repeated]
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    flags = argparse.ArgumentParser(description="Toy-scale tables of M3I against single methods.")
    flags.add_argument("--data", required=True, metavar="DIR", help="directory of STYLE-NUMBER.tar")
    flags.add_argument("--out", required=True, metavar="DIR", help="runs and tables")
    flags.add_argument(
        "--sets",
        default="emoji,styles,digits",
        help="comma-separated: emoji, styles (every style), a style, digits, tuning",
    )
    flags.add_argument("--methods", default="", help="comma-separated methods; default: all")
    flags.add_argument(
        "--seeds",
        type=int,
        default=3,
        help="seeds of M3I, M3I without mix and the best single methods",
    )
    flags.add_argument("--steps", type=int, default=0, help="steps of M3I; 0: those of each set")
    flags.add_argument("--finetune-steps", type=int, default=STEPS_OF_FINETUNING)
    flags.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="setting of every run, for small trials",
    )
    flags.add_argument(
        "--only-print", action="store_true", help="print the tables of the finished runs"
    )
    args = flags.parse_args(arguments)
    data, out = pathlib.Path(args.data).resolve(), pathlib.Path(args.out).resolve()
    try:
        sets_ = image_sets(data, out)
    except UserError as error:
        print(f"tables: {error}", file=sys.stderr)
        return 2
    styles = [name for name in sets_ if sets_[name].own]
    names = [n for name in args.sets.split(",") for n in (styles if name == "styles" else [name])]
    if wrong := [n for n in names if n not in sets_]:
        flags.error(f"--sets {wrong[0]}: there is no such set; choose among {', '.join(sets_)}")
    extra = dict(s.split("=", 1) for s in args.override)
    sets_ = {
        n: dataclasses.replace(s, overrides={**s.overrides, **extra}, steps=args.steps or s.steps)
        for n, s in sets_.items()
    }
    failed: set[pathlib.Path] = set()
    while True:
        results = [
            json.loads(path.read_text()) for path in sorted(out.glob("runs/*/*/result.json"))
        ]
        print_order = list(METHODS) + [UNTRAINED, *TRIED]
        results.sort(
            key=lambda r: (list(sets_).index(r["set"]), print_order.index(r["form"]), r["seed"])
        )
        text = write_tables(out, sets_, results)
        finished = {(r["set"], r["form"], r["seed"]) for r in results}
        queue = [
            r
            for r in run_queue(sets_, names, args.seeds, results)
            if not args.methods or r.method in args.methods.split(",")
        ]
        remaining = [
            r
            for r in queue
            if (r.image_set.name, r.row, r.seed) not in finished and r.path(out) not in failed
        ]
        if args.only_print or not remaining:
            break
        run = remaining[0]
        print(
            f"{run.image_set.name}, {run.row}, seed {run.seed}: {len(remaining)} remaining,"
            f" {time.strftime('%H:%M:%S')}",
            flush=True,
        )
        if run_once(run, data, out, args.finetune_steps) is None:
            failed.add(run.path(out))
    print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
