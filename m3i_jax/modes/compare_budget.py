"""The budget of --mode=compare: how many steps each objective trains for equal images, equal FLOPs
or equal time.

The first objective trains as long as the settings say, and what that costs is the budget of all.
Every learning rate rises and falls over the length of its own run, with an equal share of warm-up.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from m3i_jax import parallel, run_files
from m3i_jax.errors import UserError
from m3i_jax.modes import setup as jobs
from m3i_jax.reporting import text_table
from m3i_jax.reporting.atomic_write import write_text_atomic
from m3i_jax.training.trainer import run_length

MEASURED = "step_seconds.json"
TIMED = 5  # steps after the one that compiles; their median counts


@dataclasses.dataclass(frozen=True)
class Budget:
    """What every run may use.

    Attributes:
      kind: images, flops or time, as `compare.budget`.
      steps, warmup: {objective: steps of its run}, {objective: those of them that warm up}.
      costs: {objective: FLOPs or seconds of one step}; {} for equal images.
    """

    kind: str
    steps: dict[str, int]
    warmup: dict[str, int]
    costs: dict[str, float]

    def limit(self, job: jobs.Setup, form: str) -> jobs.Setup:
        """The run of an objective with its length; as it is for equal images."""
        if self.kind == "images":
            return job
        config = job.config
        config = dataclasses.replace(
            config,
            train=dataclasses.replace(config.train, steps=self.steps[form]),
            optim=dataclasses.replace(config.optim, warmup_steps=self.warmup[form]),
        )
        return dataclasses.replace(job, config=config)

    def description(self, images: int) -> str:
        """One sentence for the table; `images` a step."""
        if self.kind == "images":
            steps = max(self.steps.values())
            return f"Equal images: {steps:,} steps, {steps * images:,} images, for every objective."
        first = next(iter(self.steps))
        total = self.steps[first] * self.costs[first]
        whole = (
            f"Equal FLOPs: {total / 1e12:,.4g} TFLOP a run"
            if self.kind == "flops"
            else f"Equal time: {total:,.4g} seconds of steps a run, as measured on these devices"
        )
        each = ", ".join(f"{form} {steps:,}" for form, steps in self.steps.items())
        return f"{whole}, those of {self.steps[first]:,} steps of {first}. Steps: {each}."


def lengths(
    kind: str, steps: int, warmup: int, costs: Mapping[str, float]
) -> tuple[dict[str, int], dict[str, int]]:
    """({objective: steps}, {objective: warm-up}) of runs that cost the same as `steps` steps of the
    first one.

    >>> lengths("flops", 100, 10, {"mae": 2.0, "dino": 8.0})
    ({'mae': 100, 'dino': 25}, {'mae': 10, 'dino': 2})
    """
    if kind == "images":
        return dict.fromkeys(costs, steps), dict.fromkeys(costs, warmup)
    first = next(iter(costs.values()))
    made = {form: max(1, round(steps * first / cost)) for form, cost in costs.items()}
    return made, {form: min(round(warmup * n / steps), n) for form, n in made.items()}


def plan_budget(
    base: jobs.Setup,
    runs: Mapping[str, jobs.Setup],
    flops_a_step: Callable[[jobs.Setup], float],
) -> Budget:
    """The budget of a comparison.

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
        costs = {form: flops_a_step(job) for form, job in runs.items()}
    else:
        costs = _step_seconds(base, runs)
    steps, warmup = lengths(kind, length.steps, length.warmup, costs)
    return Budget(kind, steps, warmup, {} if kind == "images" else costs)


def _step_seconds(base: jobs.Setup, runs: Mapping[str, jobs.Setup]) -> dict[str, float]:
    """Seconds of a step of every objective, measured once a workdir: a run that goes on must have
    the length that it began with."""
    path, main = base.workdir / "compare" / MEASURED, jax.process_index() == 0
    known: dict[str, Any] = {}
    if main and path.is_file():
        known = run_files.read_run_json(path, "restore it, or begin in an empty workdir")
    if wrong := [x for x in known.values() if not isinstance(x, int | float) or not x > 0]:
        raise UserError(f"{path}: {wrong[0]!r} is no time of a step; begin in an empty workdir")
    # every host runs the steps that host 0 has no time of, and all take host 0's times
    times = parallel.broadcast_from_host0(np.array([known.get(form, 0.0) for form in runs]))
    for (form, job), seconds in zip(runs.items(), times, strict=True):
        known[form] = float(seconds)
        if not seconds:
            print(f"compare: measuring a step of {form}", flush=True)
            known[form] = float(parallel.broadcast_from_host0(np.array(time_step(job))))
    if main:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text_atomic(path, json.dumps(known, indent=1) + "\n", noted=True)
    return {form: float(known[form]) for form in runs}


def time_step(job: jobs.Setup) -> float:
    """Median seconds of a step on the run's devices, without compilation and data."""
    trainer = job.make_trainer()
    state, seconds = trainer.init(log=lambda line: None), []
    batches = job.batches(0)
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
    """The steps of each objective as text, printed before the first run.

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
            f"{budget.costs[form] * scale:,.4g}{unit}" if budget.costs else "-",
        )
        for form, steps in budget.steps.items()
    ]
    return text_table.text_table(rows, ("objective", "steps", "warm-up", "a step"))
