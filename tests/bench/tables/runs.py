"""One run of the small tables (`tests.bench.tables`): its steps, its commands, its result."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from m3i_jax.data.sources.base import stable_digest
from m3i_jax.errors import UserError
from m3i_jax.run_files import write_json_atomic
from tests.bench.tables.paired import knn_hits, unpack_hits
from tests.bench.tables.results import machine, run_metrics, version
from tests.bench.tables.rows import METHODS, UNTRAINED, Row, Stage
from tests.bench.tables.sets import ROOT, Set, overrides

PROTOCOLS = ("epochs", "flops", "time")
FEATURES = "features.npz"  # of all images of a run; removed when its hits are counted
Results = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Run:
    """A row of a set with one seed.

    Attributes:
      protocol: what is equal for all rows: epochs (images seen), flops or time.
      chosen: rate and decay that the search found for the method.
    """

    image_set: Set
    row: Row
    seed: int
    protocol: str = "epochs"
    chosen: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.protocol, self.image_set.name, self.row.title, self.seed

    def path(self, out: pathlib.Path) -> pathlib.Path:
        return out / run_directory(*self.key)


def run_directory(protocol: str, set_name: str, title: str, seed: int) -> str:
    """The directory of a run, relative to that of all runs.

    >>> run_directory("epochs", "recent", "dino, multi-crop", 0)
    'runs/epochs/recent/dino-multi-crop-0'
    """
    # a comma would end the path in the value of --config
    name = re.sub(r"[^\w.+-]", "_", title.replace(", ", "-"))
    if len(name) > 200:  # names of files end at 255 bytes
        name = f"{name[:180]}-{stable_digest(name)}"
    return f"runs/{protocol}/{set_name}/{name}-{seed}"


def result_key(result: Mapping[str, Any]) -> tuple[str, str, str, int]:
    return result["protocol"], result["set"], result["form"], result["seed"]


def config_spec(image_set: Set, stage: Stage, steps: int) -> str:
    """The value of --config of one stage."""
    return (
        f"{ROOT / 'configs/toy.py'}:form={stage.form},source={image_set.source}"
        f",path={image_set.path},steps={steps}"
    )


def flops_a_step(run: Run, stage: Stage, out: pathlib.Path) -> float:
    """FLOPs of the traced train step of a stage, cached in OUT/flops.json. A frozen target costs
    what a moving one does."""
    cache = out / "flops.json"
    known = json.loads(cache.read_text()) if cache.is_file() else {}
    spec = config_spec(run.image_set, stage, 1)
    settings = overrides(run.image_set, run.row, run.seed, {})
    name = " ".join([spec, *(s for s in settings if not s.startswith(("seed=", "optim.")))])
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
        write_json_atomic(cache, known)
    return float(known[name])


def split_steps(run: Run, steps: int) -> list[int]:
    """The steps of every stage; at least one each."""
    return [max(round(stage.share * steps), 1) for stage in run.row.stages]


def steps_of(run: Run, out: pathlib.Path, results: Results = ()) -> list[int]:
    """The steps of every stage by the protocol.

    Raises:
      UserError: equal time is asked for before the results of equal images, which measure the
        seconds of a step, are there.
    """
    if run.row.steps:
        return split_steps(run, run.row.steps)
    budget = run.image_set.steps
    if run.protocol == "flops":
        of_m3i = Run(run.image_set, _m3i(run.image_set), run.seed)
        (m3i,) = of_m3i.row.stages
        cost = sum(stage.share * flops_a_step(run, stage, out) for stage in run.row.stages)
        budget = round(budget * flops_a_step(of_m3i, m3i, out) / cost)
    if run.protocol == "time":
        of_m3i, mine = (
            _seconds_a_step(results, run.image_set.name, title)
            for title in (_m3i(run.image_set).title, run.row.title)
        )
        budget = round(budget * of_m3i / mine)
    return split_steps(run, budget)


def _m3i(image_set: Set) -> Row:
    """M3I's row in a set, or that of `METHODS` if it has none."""
    return next((r for r in image_set.rows.values() if r.unaltered == "M3I"), METHODS["M3I"])


def _seconds_a_step(results: Results, image_set: str, title: str) -> float:
    found = [
        r["values"]["seconds"] / r["values"]["steps"]
        for r in results
        if (r["protocol"], r["set"], r["form"]) == ("epochs", image_set, title)
    ]
    if not found:
        raise UserError(
            f"--protocol time: {image_set}, {title}: seconds of a step are those of --protocol"
            " epochs; run that first"
        )
    return sum(found) / len(found)


def commands(run: Run, out: pathlib.Path, steps: Sequence[int], finetune: int) -> list[list[str]]:
    """The commands of a run: its stages, then the further evaluation, the fine-tuning and the
    features of the last. The last stage is in the directory of the run, the others in directories
    within."""
    path, program = run.path(out), ["-m", "m3i_jax.main"]
    settings = overrides(run.image_set, run.row, run.seed, run.chosen)
    made, before = [], ""
    for number, (stage, of_stage) in enumerate(zip(run.row.stages, steps, strict=True)):
        last = number == len(run.row.stages) - 1
        workdir = str(path if last else path / f"stage-{number + 1}")
        taught = [f"objective.target_checkpoint={before}", "objective.target_encoder=frozen"]
        changes = [
            *settings,
            *([f"init_from={before}"] if stage.continues else []),
            *(taught if stage.taught else []),
        ]
        made.append(
            [
                *program,
                "--config",
                config_spec(run.image_set, stage, of_stage),
                "--workdir",
                workdir,
                *(f"--config.{change}" for change in changes),
            ]
        )
        before = workdir
    if run.image_set.other:
        made.append([*program, "--mode=eval", "--workdir", str(path), *run.image_set.other])
    if run.image_set.finetune:
        made.append([*program, *_finetuning(run, path, finetune)])
    made.append([*program, "--mode=features", "--workdir", str(path), f"--out={path / FEATURES}"])
    return made


def _finetuning(run: Run, path: pathlib.Path, steps: int) -> list[str]:
    """Fine-tuning, the same for all rows: weak augmentation and a large rate, since it is a run of
    seconds with a small network."""
    images = run.image_set
    spec = (
        f"{ROOT / 'configs/transfer/finetune.py'}:path={images.path},from={path}"
        f",source={images.source},batch_size=32"
    )
    changes = {
        "seed": str(run.seed),
        **{k: v for k, v in images.overrides.items() if k.startswith("data.")},
        "train.steps": str(steps),
        "train.save_every": str(steps),
        "train.eval_every": "0",
        "optim.lr": "4e-3",
        "optim.warmup_steps": str(min(20, steps)),
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
    settings = [f"--config.{k}={v}" for k, v in changes.items()]
    return ["--config", spec, "--workdir", str(path / "finetuned"), *settings]


def run_once(
    run: Run, out: pathlib.Path, finetune: int, private: Mapping[str, str], results: Results = ()
) -> dict[str, Any] | None:
    """The result of a run, which is started unless it has one; None if a command failed. The output
    of the commands is in log.txt.

    Args:
      private: {path of this machine: its name in the commands that the result keeps}.
    """
    path = run.path(out)
    done = path / "result.json"
    if done.is_file():
        return json.loads(done.read_text())
    path.mkdir(parents=True, exist_ok=True)
    try:
        steps = steps_of(run, out, results)
        costs = [flops_a_step(run, stage, out) for stage in run.row.stages]
    except UserError as error:
        print(f"{', '.join(map(str, run.key))}: {error}", flush=True)
        return None
    run_commands, start = commands(run, out, steps, finetune), time.time()
    public = [public_command(c, private) for c in run_commands]
    if same := same_run(run, public, results):
        write_json_atomic(done, same)
        return same
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with open(path / "log.txt", "a") as log:
        for command in run_commands:
            code = subprocess.run(
                [sys.executable, *command],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": paths},
            ).returncode
            if code:
                name = ", ".join(map(str, run.key))
                print(f"{name}: failed with {code}, see {path / 'log.txt'}", flush=True)
                return None
    stages = [path / f"stage-{n}" for n in range(1, len(run.row.stages))]
    metrics = run_metrics(path, stages) | {
        "steps": float(sum(steps)),
        "flops": sum(n * cost for n, cost in zip(steps, costs, strict=True)),
        "wall": time.time() - start,
    }
    result = {
        "protocol": run.protocol,
        "set": run.image_set.name,
        "form": run.row.title,
        "seed": run.seed,
        "machine": machine(),
        "version": version(),
        "commands": public,
        "values": metrics,
        "hits": _hits(path, metrics["eval/knn/top1"]),
    }
    write_json_atomic(done, result)
    return result


def same_run(run: Run, public: Sequence[str], results: Results) -> dict[str, Any] | None:
    """The result of a run of another set or protocol whose commands are the same but for their
    directories, such as M3I's in `recent` and `encoders`; None if there is no such result. Its
    commands stay those that were executed."""

    def general(texts: Sequence[str], key: tuple[str, str, str, int]) -> list[str]:
        return [text.replace(f"OUT/{run_directory(*key)}", "RUN") for text in texts]

    wanted = general(public, run.key)
    for result in results:
        key = result_key(result)
        if key[2:] == run.key[2:] and general(result["commands"], key) == wanted:
            return dict(result) | {"protocol": run.protocol, "set": run.image_set.name}
    return None


def _hits(path: pathlib.Path, accuracy: float) -> dict[str, Any]:
    """The hits of kNN of a run (`knn_hits`), which are those of its last evaluation.

    Raises:
      ValueError: their share is not the accuracy that the run logged.
    """
    from m3i_jax import config as configuration

    settings = configuration.load_from_workdir(str(path), "--out").evaluate
    hits = knn_hits(path / FEATURES, k=settings.k, temperature=settings.temperature)
    share = float(unpack_hits(hits).mean())
    if abs(share - accuracy) * hits["count"] > 2.5:  # ties and rounding of features
        raise ValueError(f"{path}: kNN accuracy {share:.4f} by its features, {accuracy:.4f} logged")
    (path / FEATURES).unlink()
    return hits


def public_command(command: Sequence[str], private: Mapping[str, str]) -> str:
    """A command without the paths of this machine.

    >>> public_command(["-m", "m3i_jax.main", "--workdir", "/x/out/runs/a"], {"/x/out": "OUT"})
    'python -m m3i_jax.main --workdir OUT/runs/a'
    """
    text = " ".join(["python", *command]).replace(f"{ROOT}/", "")
    for path in sorted(private, key=len, reverse=True):
        text = text.replace(path, private[path])
    return text


def chosen_settings(
    image_set: Set, row: Row, sets: Mapping[str, Set], results: Results
) -> dict[str, str] | None:
    """Rate and decay of the trial with the best mean of kNN and linear accuracy; None while trials
    are missing, {} for sets whose settings are fixed."""
    if not image_set.searched:
        return {}
    searched = sets[image_set.searched]
    trials = [trial for trial in searched.rows.values() if trial.method == row.searched]
    values = {r["form"]: r["values"] for r in results if r["set"] == searched.name}
    if any(trial.title not in values for trial in trials):
        return None

    def score(trial: Row) -> float:
        return sum(values[trial.title][f"eval/{kind}/top1"] for kind in ("knn", "linear"))

    return dict(max(trials, key=score).settings) if trials else {}


def run_queue(
    sets: Mapping[str, Set], names: Sequence[str], protocol: str, seeds: int, results: Results
) -> list[Run]:
    """Runs in the order of their importance: the first seed of every row of a set, then the second;
    a row whose trials are not finished is left out."""
    out = []
    for name in names:
        one = sets[name]
        for seed in range(min(seeds, one.seeds)):
            for row in one.rows.values():
                chosen = chosen_settings(one, row, sets, results)
                if chosen is not None and not (row.unaltered == UNTRAINED and seed):
                    out.append(Run(one, row, seed, one.protocol or protocol, chosen))
    return out
