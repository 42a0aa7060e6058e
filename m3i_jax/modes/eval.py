"""--mode=eval: what a run's features are worth, without training. Every evaluator that its
configuration asks for, on its newest checkpoint or on another one, as a table and as
WORKDIR/eval.json.

The file is written anew after every evaluator. The same command goes on with those that are not in
it; another checkpoint, other settings or other data begin a new one."""

import dataclasses
import json
import pathlib
import time
from typing import Any

import jax

from m3i_jax import config as configuration
from m3i_jax import parallel, privacy, schema
from m3i_jax.data.sources import base
from m3i_jax.errors import UserError
from m3i_jax.evaluation import feature_extraction, load
from m3i_jax.models import backbones
from m3i_jax.modes import evaluators, figure_evaluators, report
from m3i_jax.modes import setup as jobs
from m3i_jax.parallel import distributed
from m3i_jax.reporting import text_table
from m3i_jax.reporting.atomic_write import write_text_atomic
from m3i_jax.training import checkpoint_dir, loop
from m3i_jax.training.checkpoint import Checkpoints

RESULT = "eval.json"
SAME = ("evaluate.", "data.", "model.", "objective.", "seed ")  # settings that a result depends on


def run(config: schema.Config, *, workdir: str, checkpoint: str = "") -> int:
    there = merge_results(
        checkpoint or workdir, "--checkpoint" if checkpoint else "--workdir", needed=not checkpoint
    )
    if there is None:
        config = evaluate_weights(
            load.fit_config_to_weights(config, checkpoint, "--checkpoint"), checkpoint
        )
    step = there[1] if there else 0
    job = jobs.open_setup(config, workdir, trains=[config.objective.forms])
    # of a run under way they may see another newest one
    distributed.assert_same_on_all_hosts("data", {"data": job.identity, "checkpoint": str(step)})
    of = f"step {step:,}" if there and there[0].parent == job.workdir else checkpoint
    if not there and not jax.process_index():
        what = (
            f"{backbones.get_backbone(job.config.model).describe(job.config.model)},"
            f" {job.config.data.image_size} pixels"
        )
        print(
            f"{checkpoint} is an encoder alone: its features are evaluated, and nothing that asks a"
            f" head ({what})"
        )
    easel = figure_evaluators.FigureWriter(
        job, lambda: f"{step:08d}", lambda: f"{of}, {job.config.evaluate.encoder} parameters"
    )
    asked, sets = evaluators.enabled_metrics(
        job, print if not jax.process_index() else lambda _: None, easel=easel
    )
    if not asked:
        raise UserError(
            "--mode=eval: nothing that is asked for can be evaluated with this data and objective;"
            " see config.evaluate in --help"
        )
    trainer = job.make_trainer()
    if there:
        checkpoints = Checkpoints(there[0], job.config.train.keep)
        state = checkpoints.restore(step, trainer.template, trainer.shardings)
        checkpoints.close()
    else:
        state = trainer.init()
    trained_on = (there[0].parent if there else job.workdir) / "data.txt"
    other = (
        configuration.config_difference(trained_on.read_text(), privacy.redact(job.identity))
        if trained_on.is_file()
        else []
    )
    if other and not jax.process_index():
        print(f"the data are not those of the run in {trained_on.parent}: {'; '.join(other)}")
    settings = [
        line
        for line in configuration.config_to_text(job.config).splitlines()
        if line.startswith(SAME)
    ]
    about = {
        "checkpoint": str(there[0] / str(step)) if there else checkpoint, "step": step, "encoder": job.config.evaluate.encoder,
        "of": base.stable_digest(*settings, job.identity, str(len(job.held_out))),
    }  # fmt: skip
    return evaluate(
        job,
        about,
        asked,
        feature_extraction.EvalContext(
            sets, feature_extraction.encoder_params(job.config, state), lambda: None
        ),
    )


def evaluate_weights(config: schema.Config, place: str) -> schema.Config:
    """The configuration that evaluates the encoder of something that is no checkpoint of ours, as
    `init_from` reads it: its features alone, for there are no heads with it."""
    alone = dataclasses.replace(
        config.evaluate,
        features="mean",
        encoder="online",
        direct=False,
        zero_shot=False,
        retrieval=False,
        examples=False,
    )
    init = dataclasses.replace(config.init, only=("^encoder/",))
    return dataclasses.replace(config, init_from=place, init=init, evaluate=alone)


def evaluate(
    job: jobs.Setup,
    about: dict[str, Any],
    asked: dict[str, feature_extraction.Metric],
    seen: feature_extraction.EvalContext,
) -> int:
    """Run what is not in the file yet, and print all of it; 0, or 42 if told to stop on the way."""
    main, place = not jax.process_index(), job.workdir / RESULT
    known = earlier_results(place, about) if main else {}
    # all hosts skip the same
    known = json.loads(parallel.exchange_values("evaluated", json.dumps(known))[0])
    results = {name: known[name] for name in asked if name in known}
    with loop.Preemption() as notice:
        seen.poll = notice.poll
        try:
            for name, measure in asked.items():
                if name not in results:
                    began = time.monotonic()
                    results[name] = dict(measure(seen))
                    if main:
                        # an evaluation of many images is long
                        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
                        write_text_atomic(
                            place,
                            json.dumps(
                                {**about, "results": results, "skipped": dict(seen.skipped)},
                                indent=1,
                            )
                            + "\n",
                        )
        except loop.Preempted:
            if main:
                print(
                    f"preempted: {len(results)} of {len(asked)} evaluators are in {place}; run the"
                    " same command again to go on",
                    flush=True,
                )
            return loop.PREEMPTED
    if main:
        rows = [
            (name, f"{value:.4f}") for found in results.values() for name, value in found.items()
        ]
        print(
            f"\nstep {about['step']:,} of {about['checkpoint']}, {about['encoder']} parameters;"
            " accuracies are fractions\n"
        )
        print(text_table.text_table(rows, ("what", "value")))
        bad = {reason: count for reason, count in seen.skipped.items() if count}
        if (job.workdir / "metrics.jsonl").is_file():
            print(f"\n{report.write_report(job.config, job.workdir)}, with images of this")
        print(f"\n{place}" + (f"; images that could not be read: {bad}" if bad else ""), flush=True)
    return loop.DONE


def earlier_results(place: pathlib.Path, about: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Results of an earlier, unfinished call about the same thing."""
    try:
        saved = json.loads(place.read_text())
    except (OSError, ValueError):
        return {}
    same = isinstance(saved, dict) and all(saved.get(key) == value for key, value in about.items())
    return saved.get("results", {}) if same else {}


def merge_results(where: str, flag: str, *, needed: bool = True) -> tuple[pathlib.Path, int] | None:
    """(directory of checkpoints, step) of a run, its directory of checkpoints, or one of them; None
    for another thing that is there, if no checkpoint of ours is needed.

    Raises:
      UserError: there is no checkpoint.
    """
    place = pathlib.Path(where)
    if place.name.isdecimal() and int(place.name) in checkpoint_dir.complete_steps(place.parent):
        return place.parent, int(place.name)
    for directory in (place / "checkpoints", place):
        if there := checkpoint_dir.complete_steps(directory):
            return directory, max(there)
    if not needed and place.exists():
        return None
    raise UserError(
        f"{flag}: {where!r} has no complete checkpoint; give the --workdir of a run that saved one,"
        " or one of its checkpoints"
    )
