"""The paper's Tables 3 to 5 at toy scale, on real images: M3I against single methods at equal
FLOPs.

    python -m tests.bench.tables --data DIR --out OUT                      # everything; run it
    again and it goes on python -m tests.bench.tables --data DIR --out OUT --sets emoji         #
    some python -m tests.bench.tables --data DIR --out OUT --only-print         # the tables of what
    is there

DIR holds images as tar files STYLE-NUMBER.tar, as img2dataset writes them, equal keys of two styles
showing the same thing, and subcategories.json with the names of the labels. A fifth of the keys is
held out by their hash. Every run is the ordinary command line (configs/toy.py, then
configs/transfer/finetune.py), one process after the other, in OUT/runs/SET/METHOD-SEED; a run whose
result.json is there is not run again. OUT/tables.md and OUT/results.json are written anew after
every run.

emoji     all styles; all methods with one seed, then M3I, M3I without mix and the best single
method with more STYLE     trained on one style, evaluated on held-out keys of the other one and of
its own digits    scikit-learn's digits: no captions tuning    settings of M3I, tried on a part of
the images that the other tables train on: their held-out keys are not looked at

FLOPs are those of the train step, counted on the traced program; a single method has as many steps
as M3I's FLOPs allow. Fine-tuning is the same for all. Each column is measured at the end of the
run, none is the best over a run."""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from m3i_jax.errors import UserError
from m3i_jax.reporting import compare_table as report
from m3i_jax.reporting.atomic_write import write_text_atomic
from tests.bench import table_data

ROOT = pathlib.Path(__file__).parent.parent.parent
METHODS = {
    "M3I": "m3i", "M3I without mix": "m3i_unmixed", "supervised": "supervised", "CLIP": "weakly_supervised", "SiameseIM": "siamese_im",
    "MAE": "mae",
}  # fmt: skip
SINGLE = ("supervised", "CLIP", "SiameseIM", "MAE")
UNTRAINED = "untrained"  # M3I's first weights
STEPS = {"emoji": 3500, "digits": 800}  # of M3I; the others follow
STEPS_OF_A_STYLE, STEPS_OF_FINETUNING = 1600, 1000

COLUMNS = (
    report.CompareColumn("eval/knn/top1", "kNN", ".1f", True, 100),
    report.CompareColumn("eval/linear/top1", "linear", ".1f", True, 100),
    report.CompareColumn("finetune", "fine-tune", ".1f", True, 100),
    report.CompareColumn("eval/direct/top1", "without fine-tuning", ".1f", True, 100),
    report.CompareColumn("eval/zero_shot/names/top1", "zero-shot", ".1f", True, 100),
    report.CompareColumn("eval/retrieval/text_to_image/r5", "text to image R@5", ".1f", True, 100),
    report.CompareColumn("eval/retrieval/image_to_text/r5", "image to text R@5", ".1f", True, 100),
)
OF_STYLES = (
    *(dataclasses.replace(COLUMNS[i], title=f"{COLUMNS[i].title}, other style") for i in (0, 4)),
    *(
        report.CompareColumn(
            f"own/{COLUMNS[i].key}", f"{COLUMNS[i].title}, own style", ".1f", True, 100
        )
        for i in (0, 4)
    ),
)
TOLD = (
    report.CompareColumn("steps", "steps", ",.0f"), report.CompareColumn("flops", "TFLOP", ".2f", scale=1e-12),
    report.CompareColumn("seconds", "seconds of training", ".0f"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Set:
    """Pictures, what is run on them, and the columns of their table. overrides: of every run;
    finetune: whether it is fine-tuned; own: the split of the same style, where the held-out one is
    of another."""

    name: str
    source: str
    path: str
    overrides: Mapping[str, str]
    columns: tuple[report.CompareColumn, ...] = COLUMNS
    methods: tuple[str, ...] = tuple(METHODS)
    steps: int = 0
    finetune: bool = True
    own: str = ""


@dataclasses.dataclass(frozen=True)
class Run:
    of: Set
    method: str
    seed: int
    variant: Mapping[str, str] = dataclasses.field(default_factory=dict)
    title: str = ""
    steps: int = 0  # 0: as many as M3I's FLOPs allow

    @property
    def row(self) -> str:
        return self.title or self.method

    def place(self, out: pathlib.Path) -> pathlib.Path:
        return (
            out
            / "runs"
            / self.of.name
            / f"{self.row.replace(', ', '-').replace(' ', '_')}-{self.seed}"
        )


# What was tried on the tuning part before the settings of configs/toy.py stood: title: method,
# steps, changes from them.
_WIDE = {
    "model.encoder.width": "96", "model.encoder.heads": "3", "model.pool.width": "96", "model.pool.heads": "3", "model.decoder.width": "64",
    "model.decoder.heads": "2",
}  # fmt: skip
_STRONG = {
    "data.crop_scale": "0.5,1.0", "data.augment.jitter_p": "0.8", "data.augment.brightness": "0.4", "data.augment.contrast": "0.4",
    "data.augment.saturation": "0.2", "data.augment.hue": "0.1", "data.augment.grayscale_p": "0.05",
}  # fmt: skip
_PLAIN = {
    "data.crop_scale": "0.8,1.0",
    "data.augment.jitter_p": "0.0",
    "data.augment.blur_p": "0.0,0.0",
}
_DECODER = {"model.decoder.width": "64", "model.decoder.heads": "2"}
TRIED: dict[str, tuple[str, int, dict[str, str]]] = {
    "supervised, strong colour, pooling starts at 0.02": (
        "supervised",
        400,
        _WIDE | _STRONG | {"model.pool.std": "0.02"},
    ),
    "supervised, strong colour": ("supervised", 400, _WIDE | _STRONG),
    "supervised, no colour": ("supervised", 400, _WIDE | _PLAIN | {"objective.gamma": "1.0"}),
    "M3I, width 96": ("M3I", 800, _WIDE),
    "M3I, width 96, gamma 30": ("M3I", 800, _WIDE | {"objective.gamma": "30.0"}),
    "M3I, width 96, batch 64": ("M3I", 400, _WIDE | {"train.batch_size": "64"}),
    "M3I, width 96, batch 16": ("M3I", 1600, _WIDE | {"train.batch_size": "16"}),
    "M3I, width 96, lr 4e-3": ("M3I", 800, _WIDE | {"optim.lr": "4e-3"}),
    "M3I, width 96, images isolated": ("M3I", 800, _WIDE | {"objective.isolate": "true"}),
    "M3I, width 96, half as many mixed inputs": (
        "M3I",
        1600,
        _WIDE | {"objective.pairing": "halves"},
    ),
    "without mix, width 96": ("M3I without mix", 800, _WIDE),
    "without mix, width 96, a quarter hidden": (
        "M3I without mix",
        800,
        _WIDE | {"data.mask_ratio": "0.25"},
    ),
    "M3I, width 96, gamma 10, longer": ("M3I", 1500, _WIDE | {"objective.gamma": "10.0"}),
    "supervised, width 96, longer": ("supervised", 3000, _WIDE | {"objective.gamma": "1.0"}),
    "M3I, decoder 64": ("M3I", 3000, _DECODER),
    "supervised, long": ("supervised", 6000, _DECODER | {"objective.gamma": "1.0"}),
    "CLIP, long": ("CLIP", 6990, _DECODER),
    "M3I, decoder 64, as many steps as CLIP": ("M3I", 6990, _DECODER),
    "M3I, decoder 64, mask cells of 16 pixels": ("M3I", 3000, _DECODER | {"data.mask_cell": "16"}),
    "M3I, decoder 64, a quarter of the partner": (
        "M3I",
        3000,
        _DECODER | {"data.mask_ratio": "0.25"},
    ),
    "M3I, decoder 64, gamma 10": ("M3I", 3000, _DECODER | {"objective.gamma": "10.0"}),
}


def sets(data: pathlib.Path, out: pathlib.Path) -> dict[str, Set]:
    """Every table by name, its images written."""
    made = out / "data"
    styles = table_data.tars(data, made)
    shared = {
        "data.holdout": str(table_data.HOLDOUT),
        "evaluate.templates": str(made / "names.txt"),
    }
    if (made / "class_names.json").is_file():
        shared["data.class_names"] = str(made / "class_names.json")
    found = {"emoji": Set("emoji", "tars", str(data / "*.tar"), shared, steps=STEPS["emoji"])}
    for style in styles:
        others = [s for s in styles if s != style]
        if len(others) == 1:
            split = {
                "data.split": f"{style}-train.tar",
                "data.holdout_split": f"{others[0]}-held_out.tar",
            }
            found[style] = Set(
                style, "tars", str(made / "styles"), shared | split, OF_STYLES, ("M3I", "supervised", "CLIP"),
                STEPS_OF_A_STYLE, False, f"{style}-held_out.tar",
            )  # fmt: skip
    if table_data.digits(made / "digits"):
        flat = {"data.holdout": str(table_data.HOLDOUT), "data.flip_p": "0.0"}
        methods = tuple(m for m in METHODS if m != "CLIP")
        found["digits"] = Set(
            "digits", "folder", str(made / "digits"), flat, COLUMNS[:4], methods, STEPS["digits"]
        )
    found["tuning"] = Set("tuning", "tars", str(made / "tuning" / "*.tar"), shared, finetune=False)
    return found


def best(
    results: Sequence[Mapping[str, Any]], columns: Sequence[report.CompareColumn]
) -> list[str]:
    """Single methods that lead a column among the single ones, the one that leads most columns
    first.

    >>> rows = [{"form": m, "values": v} for m, v in (("CLIP", {"a": 1}), ("MAE", {"a": 2, "b": 3}), ("M3I", {"a": 9}))]
    >>> best(rows, [report.Column(key, key, "") for key in "abc"])
    ['MAE']
    """
    leads: dict[str, int] = {}
    for column in columns:
        rivals = [r for r in results if r["form"] in SINGLE and column.key in r["values"]]
        if rivals:
            first = max(rivals, key=lambda r: r["values"][column.key])["form"]
            leads[first] = leads.get(first, 0) + 1
    return sorted(leads, key=lambda m: -leads[m])


def flops_a_step(run: Run, out: pathlib.Path) -> float:
    """Counted on the traced step of this run's own settings, and kept."""
    kept = out / "flops.json"
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    spec, settings = trained(run, 1), overrides(run)
    name = " ".join([spec, *(s for s in settings if not s.startswith("seed="))])
    if name not in known:
        from m3i_jax import config as configuration
        from m3i_jax.modes import compare, setup

        config = configuration.load_config(spec)
        configuration.apply_overrides(config, settings)
        opened = setup.open_setup(
            configuration.resolve(config),
            str(out / "counted" / run.of.name),
            trains=[tuple(config.objective.forms)],
        )
        known[name] = compare.flops_a_step(opened)
        write_text_atomic(kept, json.dumps(known, indent=1))
    return float(known[name])


def trained(run: Run, steps: int) -> str:
    """What stands behind --config."""
    form = "m3i" if run.method == UNTRAINED else METHODS[run.method]
    return f"{ROOT / 'configs/toy.py'}:form={form},source={run.of.source},path={run.of.path},steps={steps}"


def overrides(run: Run) -> list[str]:
    frozen = {"optim.lr": "1e-12"} if run.method == UNTRAINED else {}  # it must be positive
    return [
        f"{key}={value}"
        for key, value in {
            "seed": str(run.seed),
            **run.of.overrides,
            **frozen,
            **run.variant,
        }.items()
    ]


def steps_of(run: Run, out: pathlib.Path) -> tuple[int, float]:
    """(steps, FLOPs of one)."""
    mine = flops_a_step(run, out)
    if run.method == UNTRAINED or run.steps:
        return max(run.steps, 1), mine
    whole = run.of.steps * flops_a_step(Run(run.of, "M3I", run.seed), out)
    return max(round(whole / mine), 1), mine


def commands(run: Run, out: pathlib.Path, steps: int, finetune_steps: int) -> list[list[str]]:
    """Pre-training; then evaluation on the own style, or fine-tuning."""
    place = run.place(out)
    program = ["-m", "m3i_jax.main"]
    first = [
        *program,
        "--config",
        trained(run, steps),
        "--workdir",
        str(place),
        *(f"--config.{s}" for s in overrides(run)),
    ]
    if run.of.own:
        return [
            first,
            [
                *program,
                "--mode=eval",
                "--workdir",
                str(place),
                f"--config.data.holdout_split={run.of.own}",
            ],
        ]
    if not run.of.finetune:
        return [first]
    spec = f"{ROOT / 'configs/transfer/finetune.py'}:path={run.of.path},from={place},source={run.of.source},batch_size=32"
    # A run of seconds: no strong augmentation, and the rate that goes with a small net.
    changes = {
        "seed": str(run.seed), **{k: v for k, v in run.of.overrides.items() if k.startswith("data.")},
        "train.steps": str(finetune_steps), "train.save_every": str(finetune_steps), "train.eval_every": "0",
        "optim.lr": "4e-3", "optim.warmup_steps": str(min(20, finetune_steps)), "optim.weight_decay": "0.05",
        "optim.layer_decay": "0.65",
        "data.rand_augment.ops": "0", "data.threads": "1", "data.crop_scale": "0.7,1.0", "data.augment.erase_p": "0.0",
        "data.augment.mixup": "0.0", "data.augment.cutmix": "0.0", "model.encoder.drop_path": "0.0", "evaluate.crop": "1.0",
    }  # fmt: skip
    second = [
        *program,
        "--config",
        spec,
        "--workdir",
        str(place / "finetuned"),
        *(f"--config.{k}={v}" for k, v in changes.items()),
    ]
    return [first, second]


def values(place: pathlib.Path) -> dict[str, float]:
    """Figures of a run: its last evaluation, those before training as "before/...", fine-tuning,
    seconds."""
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if any(name.startswith("eval/") for name in line)]
    out = {name: float(value) for name, value in evaluated[-1].items() if name.startswith("eval/")}
    out |= {
        f"before/{name}": float(value)
        for name, value in evaluated[0].items()
        if name.startswith("eval/")
    }
    logged = [line for line in lines if "loss" in line]
    out |= {
        name: float(value)
        for name, value in logged[-1].items()
        if name.startswith(("collapse/", "loss", "balance/"))
    }
    steps = [0, *(line["step"] for line in logged)]
    out["seconds"] = sum(
        (line["step"] - before) * line["perf/step_seconds"]
        for before, line in zip(steps, logged, strict=False)
    )
    if (place / "finetuned" / "metrics.jsonl").is_file():
        tuned = [
            json.loads(line)
            for line in (place / "finetuned" / "metrics.jsonl").read_text().splitlines()
        ]
        out["finetune"] = float(
            [line for line in tuned if "eval/direct/top1" in line][-1]["eval/direct/top1"]
        )
    # The images of its own style are not those that it held out: their evaluation stands in a
    # directory of its own.
    for file in (*place.glob("eval.json"), *place.glob("eval-*/eval.json")):
        for found in json.loads(file.read_text())["results"].values():
            out |= {f"own/{name}": float(value) for name, value in found.items()}
    return out


def machine() -> str:
    """Its kind, for the reader of a figure."""
    import jax

    info = pathlib.Path("/proc/cpuinfo")
    models = (
        [
            line.partition(":")[2].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.is_file()
        else []
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{models[0] if models else platform.machine()}, {cores} core(s), Python"
        f" {platform.python_version()}, jax {jax.__version__}"
    )


def one(
    run: Run, data: pathlib.Path, out: pathlib.Path, finetune_steps: int
) -> dict[str, Any] | None:
    """The result of a run, from before or now; None if a command failed, whose output is in
    log.txt."""
    place = run.place(out)
    done = place / "result.json"
    if done.is_file():
        return json.loads(done.read_text())
    place.mkdir(parents=True, exist_ok=True)
    try:
        steps, cost = steps_of(run, out)
    except UserError as error:
        print(f"{run.of.name}, {run.row}, seed {run.seed}: {error}", flush=True)
        return None
    ran = commands(run, out, steps, finetune_steps)
    began = time.time()
    with open(place / "log.txt", "a") as log:
        for command in ran:
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
                    f"{run.of.name}, {run.row}, seed {run.seed}: failed with {code}, see"
                    f" {place / 'log.txt'}",
                    flush=True,
                )
                return None
    found = values(place) | {
        "steps": float(steps),
        "flops": steps * cost,
        "wall": time.time() - began,
    }
    result = {
        "set": run.of.name, "form": run.row, "seed": run.seed, "machine": machine(), "commands": [public(c, data, out) for c in ran],
        "values": found,
    }  # fmt: skip
    write_text_atomic(done, json.dumps(result, indent=1) + "\n")
    return result


def public(command: Sequence[str], data: pathlib.Path, out: pathlib.Path) -> str:
    """A command as it can be told: without the paths of this machine.

    >>> public(["-m", "m3i_jax.main", "--workdir", "/x/out/runs/a"], pathlib.Path("/x"), pathlib.Path("/x/out"))
    'python -m m3i_jax.main --workdir OUT/runs/a'
    """
    return (
        " ".join(["python", *command])
        .replace(f"{ROOT}/", "")
        .replace(str(out), "OUT")
        .replace(str(data), "DIR")
    )


def queue(
    found: Mapping[str, Set], names: Sequence[str], seeds: int, results: Sequence[Mapping[str, Any]]
) -> list[Run]:
    """Runs in the order in which they are worth most; those of further seeds stand in it as soon as
    the first seed says which is best."""
    out = []
    for name in names:
        one_set = found[name]
        if name == "tuning":
            out += [
                Run(one_set, method, 0, changes, title, steps)
                for title, (method, steps, changes) in TRIED.items()
            ]
            continue
        out += [Run(one_set, method, 0) for method in (*one_set.methods, UNTRAINED)]
        of_first = [r for r in results if r["set"] == name and r["seed"] == 0]
        if {r["form"] for r in of_first} >= set(one_set.methods) or one_set.own:
            leading = best(of_first, one_set.columns)
            again = [
                m
                for m in ("M3I", *leading[:1], "M3I without mix", *leading[1:])
                if m in one_set.methods
            ]
            out += [Run(one_set, method, seed) for seed in range(1, seeds) for method in again]
    return out


def table(one_set: Set, results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row a method with mean and spread over seeds in per cent, the best mean of a
    column bold."""
    rows = report.compare_rows([r for r in results if r["set"] == one_set.name])
    shown = [c for c in one_set.columns if any(c.key in row.figures for row in rows)]
    most = {
        c.key: max(row.figures[c.key].mean for row in rows if c.key in row.figures) for c in shown
    }

    def cell(row: report.CompareRow, column: report.CompareColumn) -> str:
        figure = row.figures.get(column.key)
        text = report.table_cell(column, figure)
        return f"**{text}**" if figure and figure.mean == most[column.key] else text

    titles = ["method", "seeds", *(f"{c.title} %" for c in shown), *(c.title for c in TOLD)]
    lines = [f"| {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) - 1)}"]
    for row in rows:
        cells = [
            row.form,
            str(len(row.seeds)),
            *(cell(row, c) for c in shown),
            *(report.table_cell(c, row.figures.get(c.key)) for c in TOLD),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lacking = (
        [m for m in one_set.methods if m not in {row.form for row in rows}]
        if one_set.name != "tuning"
        else []
    )
    return "\n".join([*lines, *([f"\nNot run: {', '.join(lacking)}."] if lacking else [])])


def write(out: pathlib.Path, found: Mapping[str, Set], results: Sequence[Mapping[str, Any]]) -> str:
    """OUT/tables.md and OUT/results.json."""
    there = [s for s in found.values() if any(r["set"] == s.name for r in results)]
    text = "\n\n".join(f"### {s.name}\n\n{table(s, results)}" for s in there) + "\n"
    write_text_atomic(out / "tables.md", text)
    short = [{**r, "values": {k: round(v, 6) for k, v in r["values"].items()}} for r in results]
    write_text_atomic(out / "results.json", json.dumps(short, indent=1) + "\n")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    flags = argparse.ArgumentParser(description="Toy-scale tables of M3I against single methods.")
    flags.add_argument("--data", required=True, metavar="DIR", help="directory of STYLE-NUMBER.tar")
    flags.add_argument("--out", required=True, metavar="DIR", help="runs and tables")
    flags.add_argument(
        "--sets",
        default="emoji,styles,digits",
        help="of emoji, styles (each of them), a style, digits, tuning",
    )
    flags.add_argument("--methods", default="", help="some of them; default: all")
    flags.add_argument(
        "--seeds", type=int, default=3, help="of M3I, M3I without mix and the best single methods"
    )
    flags.add_argument("--steps", type=int, default=0, help="of M3I; 0: those of each set")
    flags.add_argument("--finetune-steps", type=int, default=STEPS_OF_FINETUNING)
    flags.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of every run: for trying it out small",
    )
    flags.add_argument("--only-print", action="store_true", help="run nothing")
    given = flags.parse_args(arguments)
    data, out = pathlib.Path(given.data).resolve(), pathlib.Path(given.out).resolve()
    try:
        found = sets(data, out)
    except UserError as error:
        print(f"tables: {error}", file=sys.stderr)
        return 2
    styles = [name for name in found if found[name].own]
    names = [n for name in given.sets.split(",") for n in (styles if name == "styles" else [name])]
    if wrong := [n for n in names if n not in found]:
        flags.error(f"--sets {wrong[0]}: there is no such set here; there are {', '.join(found)}")
    more = dict(s.split("=", 1) for s in given.override)
    found = {
        n: dataclasses.replace(s, overrides={**s.overrides, **more}, steps=given.steps or s.steps)
        for n, s in found.items()
    }
    failed: set[pathlib.Path] = set()
    while True:
        results = [
            json.loads(place.read_text()) for place in sorted(out.glob("runs/*/*/result.json"))
        ]
        print_order = list(METHODS) + [UNTRAINED, *TRIED]
        results.sort(
            key=lambda r: (list(found).index(r["set"]), print_order.index(r["form"]), r["seed"])
        )
        text = write(out, found, results)
        there = {(r["set"], r["form"], r["seed"]) for r in results}
        wanted = [
            r
            for r in queue(found, names, given.seeds, results)
            if not given.methods or r.method in given.methods.split(",")
        ]
        left = [
            r
            for r in wanted
            if (r.of.name, r.row, r.seed) not in there and r.place(out) not in failed
        ]
        if given.only_print or not left:
            break
        run = left[0]
        print(
            f"{run.of.name}, {run.row}, seed {run.seed}: {len(left)} left,"
            f" {time.strftime('%H:%M:%S')}",
            flush=True,
        )
        if one(run, data, out, given.finetune_steps) is None:
            failed.add(run.place(out))
    print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
