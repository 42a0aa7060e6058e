"""--mode=compare: several objectives under one configuration, one after the other, and one table of
what came out.

Every objective and seed is an ordinary run in WORKDIR/compare/NAME-SEED, with the data that is
opened once. A run that is done has its result.json and is not run again; one that was cut off goes
on. After each, the table is written anew: WORKDIR/compare.md, .json and .png."""

import dataclasses
import gc
import itertools
import json
import pathlib
from typing import Any

import jax

from m3i_jax import parallel, published_settings, run_files, schema
from m3i_jax.errors import UserError
from m3i_jax.models import backbones
from m3i_jax.modes import monitoring, train
from m3i_jax.modes import setup as jobs
from m3i_jax.reporting import compare_table as report
from m3i_jax.reporting.atomic_write import write_text_atomic
from m3i_jax.training import loop, plan
from m3i_jax.training.trainer import Trainer

RESULT = "result.json"


def run(config: schema.Config, *, workdir: str, allow_changes: bool) -> int:
    # A form that this data cannot feed is refused before hours go into those before it.
    trains = [objective_names(form) for form in config.compare.forms]
    for name in itertools.chain(*trains):
        plan.terms_named(name, "config.compare.forms")
    plan.reject_unused_settings(config, trains)
    whole = jobs.open_setup(config, workdir, trains=trains)
    main = jax.process_index() == 0
    with jobs.lock_workdir(whole.workdir):
        wanted = [
            (form, seed, config_for(whole, form, seed))
            for form in config.compare.forms
            for seed in compare_seeds(config)
        ]
        results: list[dict[str, Any]] = []
        failed: list[str] = []
        for number, (form, seed, job) in enumerate(wanted, 1):
            place = job.workdir / RESULT
            if place.is_file():
                result = run_files.read_run_json(
                    place, "restore it, or delete it to have it made again from the run's log"
                )
                if not is_result(result):
                    raise UserError(
                        f"{place}: is not the result of a run; delete it to have it made again from"
                        " the run's log"
                    )
                train.check_same_run(job, result, allow_changes)
            else:
                print(
                    f"compare: {number} of {len(wanted)}: {form}, seed {seed}, in {job.workdir}",
                    flush=True,
                )
                code = run_one(job, allow_changes)
                if code == loop.PREEMPTED:
                    return code
                if code != loop.DONE:
                    failed.append(f"{form}, seed {seed}")
                    continue
                cost = next((r["values"]["flops"] for r in results if r["form"] == form), None)
                values = read_outcome(job) | {"flops": flops_a_step(job) if cost is None else cost}
                result = {
                    "form": form,
                    "seed": seed,
                    "fingerprint": job.fingerprint,
                    "values": values,
                }
                if main:
                    write_text_atomic(place, json.dumps(result, indent=1) + "\n", noted=True)
            results.append({**result, "form": form, "seed": seed})
            if main:
                write_comparison(whole, results, failed)
        if main:
            rows = report.compare_rows(results)
            if rows:
                print(
                    "\n" + report.compare_text(rows, compare_notes(whole, results, failed)) + "\n"
                )
            print(
                "\n".join(
                    str(whole.workdir / f"compare.{ending}") for ending in ("md", "json", "png")
                )
            )
    return loop.FAILED if failed else loop.DONE


def is_result(found: dict[str, Any]) -> bool:
    """Whether what was read has the structure of a result."""
    values = found.get("values")
    if not isinstance(values, dict) or not isinstance(found.get("fingerprint"), str):
        return False
    return "step" in values and all(isinstance(value, int | float) for value in values.values())


def compare_seeds(config: schema.Config) -> range:
    return range(config.seed, config.seed + config.compare.seeds)


def objective_names(form: str) -> tuple[str, ...]:
    return tuple(form.split("+"))


def config_for(whole: jobs.Setup, form: str, seed: int) -> jobs.Setup:
    """The run of one objective and seed: the settings of the whole otherwise, with the linear
    evaluation that the table shows."""
    config = dataclasses.replace(
        jobs.with_objective(whole.config, objective_names(form)),
        seed=seed,
        evaluate=dataclasses.replace(whole.config.evaluate, linear=True),
        compare=schema.Compare(),
    )
    return dataclasses.replace(
        whole, config=config, workdir=whole.workdir / "compare" / f"{form}-{seed}"
    )


def run_one(job: jobs.Setup, allow_changes: bool) -> int:
    """Train one of them, as --mode=train would in its directory."""
    job.workdir.mkdir(mode=0o700, parents=True, exist_ok=True)
    words = job.workdir / "tokenizer.json"
    if job.tokenizer and not words.is_file():
        job.tokenizer.save(str(words))
    with jobs.lock_workdir(job.workdir):
        code = train.pretrain(job, allow_changes)
    gc.collect()
    jax.clear_caches()  # the next one has programs of its own
    return code


def read_outcome(job: jobs.Setup) -> dict[str, float]:
    """Figures of a finished run: its last line of metrics, its last evaluation, and "seconds" of
    training, without the first step, which compiles, and without evaluations."""
    lines = train.logged(job.workdir)
    trained = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if any(name.startswith("eval/") for name in line)]
    before, seconds = 1, 0.0
    for line in trained[1:]:
        seconds += (line["step"] - before) * float(line["perf/step_seconds"])
        before = line["step"]
    last = {**(evaluated[-1] if evaluated else {}), **(trained[-1] if trained else {})}
    return {name: float(value) for name, value in last.items()} | {"seconds": seconds}


def flops_a_step(job: jobs.Setup) -> float:
    """Matrix FLOPs of the model in one step, which no mesh changes."""
    made = Trainer(
        job.config,
        parallel.make_mesh((1, 1, 1), jax.devices()[:1]),
        job.tokenizer.vocabulary if job.tokenizer else 0,
    )
    return monitoring.model_flops(made)


def compare_notes(whole: jobs.Setup, results: list[dict[str, Any]], failed: list[str]) -> list[str]:
    """What must be known to read the table."""
    config, count = whole.config, whole.config.compare.seeds
    steps = max((int(r["values"]["step"]) for r in results), default=0)
    out = [
        (
            f"{whole.train.description()}; {len(whole.held_out):,} held out. {steps:,} steps of"
            f" {config.train.batch_size} images of {config.data.image_size} pixels, encoder of"
            f" {backbones.get_backbone(config.model).describe(config.model)}."
        ),
        (
            f"Mean ± standard deviation over {count} seeds."
            if count > 1
            else "One seed: differences may be chance; set config.compare.seeds."
        ),
        (
            "Only the objective differs between rows, and losses of different objectives are not on"
            " one scale."
        ),
        (
            "kNN, linear: of the pooling where the objective trains it (category or text), else of"
            " the mean of the patch tokens."
        ),
    ]
    if whole.classes:
        out[-1] += f" Chance: {100 / len(whole.classes):.1f} %."
    methods = sorted(
        {name for form in config.compare.forms for name in objective_names(form)}
        & set(published_settings.SETTINGS)
    )
    if methods:
        out.append(
            f"{', '.join(methods)}: the objective alone; configs/forms.py:form=NAME has the"
            " settings that it was published with."
        )
    collapsed = [
        f"{r['form']}, seed {r['seed']}" for r in results if r["values"].get("collapse/alarm")
    ]
    if collapsed:
        out.append(f"Collapsed at the end: {'; '.join(collapsed)}.")
    if failed:
        out.append(f"Not finite, and not in the table: {'; '.join(failed)}.")
    return out


def write_comparison(whole: jobs.Setup, results: list[dict[str, Any]], failed: list[str]) -> None:
    """WORKDIR/compare.md, compare.json and compare.png of what is done so far."""
    rows, told, place = (
        report.compare_rows(results),
        compare_notes(whole, results, failed),
        pathlib.Path(whole.workdir),
    )
    settings = {
        "batch_size": whole.config.train.batch_size,
        "data": whole.fingerprint,
        "seeds": list(compare_seeds(whole.config)),
    }
    write_text_atomic(place / "compare.md", report.compare_markdown(rows, told))
    write_text_atomic(place / "compare.json", report.compare_json(rows, told, settings))
    chance = 1 / len(whole.classes) if whole.classes else None
    title = f"{whole.train.name}, {whole.config.train.batch_size} images a step"
    report.write_bar_chart(place / "compare.png", rows, title=title, chance=chance)
