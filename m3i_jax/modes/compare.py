"""--mode=compare: train several objectives under one configuration, one after the other, and write
one table of their results.

Every objective and seed is an ordinary run in WORKDIR/compare/NAME-SEED; the data are opened once.
All have one budget: equal images, FLOPs or time. The first objective trains as long as the settings
say, and what that costs is the budget of all. Every learning rate rises and falls over the length
of its own run, with an equal share of warm-up. A finished run has a result.json and is not
repeated; an interrupted one is resumed. After each run the table is rewritten: WORKDIR/compare.md,
.json and .png."""

import dataclasses
import gc
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from m3i_jax import config as configuration
from m3i_jax import parallel, privacy, published_settings, run_files, schema
from m3i_jax.errors import UserError
from m3i_jax.models import backbones
from m3i_jax.modes import monitoring, train
from m3i_jax.modes.eval_header import evaluated_images
from m3i_jax.modes.setup import (
    Setup,
    has_checkpoints,
    lock_on_all_hosts,
    open_setup,
    require_shared,
    require_views,
    with_objective,
)
from m3i_jax.reporting import compare_table, run_log, text_table
from m3i_jax.reporting.text_table import format_figures
from m3i_jax.run_files import write_json_atomic, write_text_atomic
from m3i_jax.training import loop, plan, unused_settings
from m3i_jax.training.trainer import Trainer, run_length

RESULT = "result.json"
MEASURED = "step_seconds.json"
TIMED = 5  # steps after the one that compiles; their median counts


@dataclasses.dataclass(frozen=True)
class Budget:
    """The budget of every run.

    Attributes:
      kind: images, flops or time, as `compare.budget`.
      steps, warmup: {objective: steps of its run}, {objective: those of them that warm up}.
      costs: {objective: FLOPs or seconds of one step}; {} for equal images.
    """

    kind: str
    steps: dict[str, int]
    warmup: dict[str, int]
    costs: dict[str, float]

    def limit(self, setup: Setup, form: str) -> Setup:
        """Returns the run of an objective with its length; as it is for equal images."""
        if self.kind == "images":
            return setup
        config = setup.config
        config = dataclasses.replace(
            config,
            train=dataclasses.replace(config.train, steps=self.steps[form]),
            optim=dataclasses.replace(config.optim, warmup_steps=self.warmup[form]),
        )
        return dataclasses.replace(setup, config=config)

    def description(self, images: int) -> str:
        """Returns one sentence for the table; `images` a step."""
        if self.kind == "images":
            steps = max(self.steps.values())
            return f"Equal images: {steps:,} steps, {steps * images:,} images, for every objective."
        first = next(iter(self.steps))
        total = self.steps[first] * self.costs[first]
        whole = (
            f"Equal FLOPs: {format_figures(total / 1e12)} TFLOP a run"
            if self.kind == "flops"
            else f"Equal time: {format_figures(total)} seconds of steps a run, as measured on these"
            " devices"
        )
        each = ", ".join(f"{form} {steps:,}" for form, steps in self.steps.items())
        return f"{whole}, those of {self.steps[first]:,} steps of {first}. Steps: {each}."


def run(config: schema.Config, *, workdir: str, allow_changes: bool) -> int:
    require_views(config, "compare", "it compares objectives of pre-training")
    # refuse an objective that this data cannot train before hours go into the others
    trains = [objective_names(form) for form in config.compare.forms]
    for name in itertools.chain(*trains):
        plan.terms_named(name, "config.compare.forms")
    unused_settings.reject_unused_settings(config, trains)
    require_shared(pathlib.Path(workdir))
    base = open_setup(config, workdir, trains=trains)
    main = jax.process_index() == 0
    with lock_on_all_hosts(base.workdir):
        firsts = {form: config_for(base, form, config.seed) for form in config.compare.forms}
        budget = plan_budget(base, firsts, flops_a_step)
        if budget.costs:
            log(budget_rows(budget))
        runs = [
            (form, seed, budget.limit(config_for(base, form, seed), form))
            for form in config.compare.forms
            for seed in compare_seeds(config)
        ]
        results: list[dict[str, Any]] = []
        failed: list[str] = []
        notices: list[bool] = []  # of signals that came too late to stop a run
        for number, (form, seed, setup) in enumerate(runs, 1):
            result = read_result(setup, allow_changes)
            if result is None:
                log(f"compare: {number} of {len(runs)}: {form}, seed {seed}, in {setup.workdir}")
                code = run_one(setup, allow_changes, lambda: notices.append(True))
                if code == loop.PREEMPTED:
                    return code
                if code == loop.DONE:
                    cost = next((r["values"]["flops"] for r in results if r["form"] == form), None)
                    if cost is None:
                        cost = budget.costs[form] if budget.kind == "flops" else flops_a_step(setup)
                    result = write_result(setup, form, seed, cost)
                else:
                    failed.append(f"{form}, seed {seed}")
                    # hosts that end by an error have not agreed whether a signal came before it
                    if any(parallel.exchange_values("compare", "stop" if notices else "")):
                        notices.append(True)
            if result:
                results.append({**result, "form": form, "seed": seed})
            if main:
                try:
                    write_comparison(base, results, failed, budget)
                except UserError as error:
                    if not failed:
                        raise
                    log(f"warning: compare: {error}")  # as the disk on which the run failed
            if notices and number < len(runs):
                log(
                    f"compare: preempted after {number} of {len(runs)}; run the same command again"
                    " to resume"
                )
                return loop.PREEMPTED
        if main:
            rows = compare_table.compare_rows(results)
            if rows:
                notes = compare_notes(base, results, failed, budget)
                seeds = base.config.compare.seeds
                print(f"\n{compare_table.compare_text(rows, notes, seeds=seeds)}\n")
            files = [base.workdir / f"compare.{ending}" for ending in ("md", "json", "png")]
            print("\n".join(str(file) for file in files if file.is_file()))
    return loop.FAILED if failed else loop.DONE


def log(text: str) -> None:
    """Print a line, on the first host."""
    if not jax.process_index():
        print(text, flush=True)


def read_result(setup: Setup, allow_changes: bool) -> dict[str, Any] | None:
    """Returns the saved result of a run; None if it has none yet. The first host reads it for all:
    others may not see it yet.

    Raises:
      UserError: the file is not a result, or of a run with other settings.
    """
    path = setup.workdir / RESULT
    result: dict[str, Any] = {}
    with parallel.fail_together("result.json"):
        if not jax.process_index() and path.is_file():
            result = run_files.read_run_json(
                path, "restore it, or delete it: it is written again from the run's log"
            )
            if not is_result(result):
                raise UserError(
                    f"{path}: is not the result of a run; delete it: it is written again from the"
                    " run's log"
                )
    result = json.loads(parallel.exchange_values("result", json.dumps(result))[0])
    if not result:
        return None
    train.check_same_run(setup, result, allow_changes)
    return result


def write_result(setup: Setup, form: str, seed: int, cost: float) -> dict[str, Any]:
    """Write the result of a run that has ended; returns it. cost: FLOPs of a step."""
    # the first host wrote the log, of which others may not see the end yet
    with parallel.fail_together("log"):
        own = {} if jax.process_index() else read_outcome(setup)
    values = json.loads(parallel.exchange_values("outcome", json.dumps(own))[0]) | {"flops": cost}
    values |= {
        "images": values["step"] * setup.config.train.batch_size,
        "run_flops": values["step"] * cost,
    }
    result = {"form": form, "seed": seed, "fingerprint": setup.fingerprint, "values": values}
    result["evaluate"] = evaluation_settings(setup.config)
    if not jax.process_index():
        write_json_atomic(setup.workdir / RESULT, result, noted=True)
    return result


def is_result(content: dict[str, Any]) -> bool:
    """Returns whether the content of a result.json has the right structure."""
    values = content.get("values")
    if not isinstance(values, dict) or not isinstance(content.get("fingerprint"), str):
        return False
    if not isinstance(content.get("evaluate", ""), str):  # absent from files of earlier versions
        return False
    return "step" in values and all(isinstance(value, int | float) for value in values.values())


def evaluation_settings(config: schema.Config) -> str:
    """Returns the settings of evaluations, one line each."""
    lines = privacy.redact(configuration.config_to_text(config)).splitlines(keepends=True)
    return "".join(line for line in lines if line.startswith("evaluate."))


def otherwise_evaluated(base: Setup, results: list[dict[str, Any]]) -> list[str]:
    """Returns a line for every run that was evaluated with other settings than this command's."""
    now = evaluation_settings(config_for(base, base.config.compare.forms[0], 0).config)
    out = []
    for result in results:
        if changed := configuration.evaluation_difference(result.get("evaluate", now), now):
            out.append(f"{result['form']}, seed {result['seed']} ({', '.join(changed)})")
    return out


def compare_seeds(config: schema.Config) -> range:
    return range(config.seed, config.seed + config.compare.seeds)


def objective_names(form: str) -> tuple[str, ...]:
    return tuple(form.split("+"))


def config_for(base: Setup, form: str, seed: int) -> Setup:
    """Returns the run of one objective and seed: the common settings, with the linear evaluation
    that the table shows."""
    config = dataclasses.replace(
        with_objective(base.config, objective_names(form)),
        seed=seed,
        evaluate=dataclasses.replace(base.config.evaluate, linear=True),
        compare=schema.Compare(),
    )
    return dataclasses.replace(
        base, config=config, workdir=base.workdir / "compare" / f"{form}-{seed}"
    )


def run_one(
    setup: Setup, allow_changes: bool, on_late_notice: Callable[[], None] = lambda: None
) -> int:
    """Train one run, as --mode=train would in its directory; see `train.pretrain`."""
    vocabulary = setup.workdir / "tokenizer.json"
    with parallel.fail_together("tokenizer.json"):
        setup.workdir.mkdir(mode=0o700, parents=True, exist_ok=True)
        begun = vocabulary.is_file() and has_checkpoints(setup.workdir)
        if setup.tokenizer and not jax.process_index() and not begun:
            setup.tokenizer.save(str(vocabulary))
    with lock_on_all_hosts(setup.workdir):
        code = train.pretrain(setup, allow_changes, on_late_notice=on_late_notice)
    gc.collect()
    jax.clear_caches()  # the next run compiles other programs
    return code


def read_outcome(setup: Setup) -> dict[str, float]:
    """Returns results of a finished run: its last line of metrics, the evaluation after its last
    step, and the "seconds" of training, without the first step, which compiles, and without
    evaluations."""
    lines = run_log.read_log_lines(setup.workdir / train.LOG)
    trained = [line for line in lines if "loss" in line]
    # one that was stopped, as of features that are not finite, leaves those of earlier steps
    end = trained[-1]["step"] if trained else 0
    evaluated = [
        line for line in lines if line["step"] >= end and any(k.startswith("eval/") for k in line)
    ]
    before, seconds = 1, 0.0
    for line in trained[1:]:
        seconds += (line["step"] - before) * float(line["perf/step_seconds"])
        before = line["step"]
    last = {**(evaluated[-1] if evaluated else {}), **(trained[-1] if trained else {})}
    return {name: float(value) for name, value in last.items()} | {"seconds": seconds}


def flops_a_step(setup: Setup) -> float:
    """Returns matrix FLOPs of the model in one step; they do not depend on the mesh."""
    trainer = Trainer(
        setup.config,
        parallel.make_mesh((1, 1, 1), jax.devices()[:1]),
        setup.tokenizer.vocabulary if setup.tokenizer else 0,
    )
    return monitoring.mean_flops(trainer)


def compare_notes(
    base: Setup,
    results: list[dict[str, Any]],
    failed: list[str],
    budget: Budget,
) -> list[str]:
    """Returns notes below the table."""
    config = base.config
    seeds = compare_table.seeds_note(compare_table.compare_rows(results))
    out = [
        budget.description(config.train.batch_size),
        (
            f"{base.train.description()}; {len(base.held_out):,} held out{_evaluated(base)}. Steps"
            f" of {config.train.batch_size} images of {config.data.image_size} pixels, encoder of"
            f" {backbones.get_backbone(config.model).describe(config.model)}."
        ),
        *([seeds] if seeds else []),
        (
            "Only the objective differs"
            if budget.kind == "images"
            else "Only objective and length differ"
        )
        + " between rows, and losses of different objectives are not on one scale.",
        (
            "kNN and linear use attention-pooled features where the objective trains the pooling"
            " (category or text), cls where it compares images by cls alone (as in dino), else the"
            " mean of the patch tokens."
        ),
    ]
    if base.classes:
        out[-1] += f" Chance: {100 / len(base.classes):.1f} %."
    methods = sorted(
        {name for form in config.compare.forms for name in objective_names(form)}
        & set(published_settings.SETTINGS)
    )
    if methods:
        out.append(
            f"{', '.join(methods)}: trained with the published objective alone;"
            " configs/forms.py:form=NAME also has the published settings."
        )
    collapsed = [
        f"{r['form']}, seed {r['seed']}" for r in results if r["values"].get("collapse/alarm")
    ]
    if others := otherwise_evaluated(base, results):
        out.append(
            "Evaluated with other settings, the first of two values, and perhaps not comparable:"
            f" {'; '.join(others)}."
        )
    if collapsed:
        out.append(f"Collapsed at the end: {'; '.join(collapsed)}.")
    if failed:
        out.append(f"Failed, not in the table: {'; '.join(failed)}.")
    return out


def _evaluated(base: Setup) -> str:
    """How many images are evaluated, where limits leave some out."""
    sizes = {"index": len(base.train), "queries": len(base.held_out)}
    counts = evaluated_images(base.config, sizes["index"], sizes["queries"])
    if counts == sizes:
        return ""
    return (
        f", of which {counts['queries']:,} are evaluated, with {counts['index']:,} training images"
    )


def write_comparison(
    base: Setup,
    results: list[dict[str, Any]],
    failed: list[str],
    budget: Budget,
) -> None:
    """Write WORKDIR/compare.md, compare.json and compare.png with the results so far."""
    rows, notes = compare_table.compare_rows(results), compare_notes(base, results, failed, budget)
    directory = pathlib.Path(base.workdir)
    settings = {
        "batch_size": base.config.train.batch_size,
        "budget": budget.kind,
        "steps": budget.steps,
        "data": base.fingerprint,
        "seeds": list(compare_seeds(base.config)),
    }
    table = compare_table.compare_markdown(rows, notes, seeds=base.config.compare.seeds)
    write_text_atomic(directory / "compare.md", table)
    content = compare_table.compare_content(rows, notes, settings)
    write_json_atomic(directory / "compare.json", content)
    chance = 1 / len(base.classes) if base.classes else None
    title = f"{base.train.name}, {base.config.train.batch_size} images a step"
    compare_table.write_bar_chart(directory / "compare.png", rows, title=title, chance=chance)


def lengths(
    kind: str, steps: int, warmup: int, costs: Mapping[str, float]
) -> tuple[dict[str, int], dict[str, int]]:
    """Returns ({objective: steps}, {objective: warm-up}) of runs that cost the same as `steps`
    steps of the first one.

    >>> lengths("flops", 100, 10, {"mae": 2.0, "dino": 8.0})
    ({'mae': 100, 'dino': 25}, {'mae': 10, 'dino': 2})
    """
    if kind == "images":
        return dict.fromkeys(costs, steps), dict.fromkeys(costs, warmup)
    first = next(iter(costs.values()))
    made = {form: max(1, round(steps * first / cost)) for form, cost in costs.items()}
    return made, {form: min(round(warmup * n / steps), n) for form, n in made.items()}


def plan_budget(
    base: Setup,
    runs: Mapping[str, Setup],
    flops_a_step: Callable[[Setup], float],
) -> Budget:
    """Returns the budget of a comparison.

    Args:
      base: of the comparison.
      runs: {objective: its first run, with the length that the settings give}, in order.
      flops_a_step: counts the FLOPs of a step.

    Raises:
      UserError: times of another comparison in the workdir.
    """
    kind = base.config.compare.budget
    length = run_length(next(iter(runs.values())).config)
    if kind == "images":
        costs = dict.fromkeys(runs, 1.0)
    elif kind == "flops":
        costs = {form: flops_a_step(setup) for form, setup in runs.items()}
    else:
        costs = _step_seconds(base, runs)
    steps, warmup = lengths(kind, length.steps, length.warmup, costs)
    return Budget(kind, steps, warmup, {} if kind == "images" else costs)


def _step_seconds(base: Setup, runs: Mapping[str, Setup]) -> dict[str, float]:
    """Seconds of a step of every objective, measured once a workdir: a run that goes on must have
    the length that it began with."""
    path, main = base.workdir / "compare" / MEASURED, jax.process_index() == 0
    known: dict[str, Any] = {}
    with parallel.fail_together("times of steps"):
        if main and path.is_file():
            known = run_files.read_run_json(path, "restore it, or begin in an empty workdir")
        if wrong := [x for x in known.values() if not isinstance(x, int | float) or not x > 0]:
            raise UserError(
                f"{path}: {wrong[0]!r} is not the time of a step; begin in an empty workdir"
            )
    # every host runs the steps that host 0 has no time of, and all take host 0's times
    times = parallel.broadcast_from_host0(np.array([known.get(form, 0.0) for form in runs]))
    for (form, setup), seconds in zip(runs.items(), times, strict=True):
        known[form] = float(seconds)
        if not seconds:
            log(f"compare: measuring a step of {form}")
            known[form] = float(parallel.broadcast_from_host0(np.array(time_step(setup))))
    if main:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json_atomic(path, known, noted=True)
    return {form: float(known[form]) for form in runs}


def time_step(setup: Setup) -> float:
    """Returns the median seconds of a step on the run's devices, without compilation and data."""
    trainer = setup.make_trainer()
    state, seconds = trainer.init(log=lambda line: None), []
    batches = setup.batches(0)
    try:
        batch = parallel.to_global(trainer.mesh, next(iter(batches)))
        for _ in range(1 + TIMED):
            began = time.perf_counter()
            state, metrics = trainer.step(state, batch)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - began)
    finally:
        batches.close()
    jax.clear_caches()  # the next objective compiles other programs
    return statistics.median(seconds[1:])


def budget_rows(budget: Budget) -> str:
    """Returns the steps of each objective as text, printed before the first run.

    >>> print(budget_rows(Budget("flops", {"a": 10}, {"a": 1}, {"a": 2e12})))
    objective  steps  warm-up  a step
    ---------  -----  -------  -------
    a             10        1  2 TFLOP
    """
    unit = {"images": "", "flops": " TFLOP", "time": " s"}[budget.kind]
    scale = 1e-12 if budget.kind == "flops" else 1.0
    rows = [
        (
            form,
            f"{steps:,}",
            f"{budget.warmup[form]:,}",
            f"{format_figures(budget.costs[form] * scale)}{unit}" if budget.costs else "-",
        )
        for form, steps in budget.steps.items()
    ]
    return text_table.text_table(rows, ("objective", "steps", "warm-up", "a step"))
