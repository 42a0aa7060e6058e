"""--mode=eval: what a run's features are worth, without training. Every evaluator that its
configuration asks for, on its newest checkpoint or on another one, as a table and as
WORKDIR/eval.json, which names the data and how images were seen.

The file is written anew after every evaluator. The same command goes on with those that are not in
it; another checkpoint of the run or other settings begin a new one. An evaluation of other data or
of other weights goes to WORKDIR/eval-<digits>, with its images: eval.json and report.html stay
those of the run."""

import dataclasses
import json
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any

import jax

from m3i_jax import config as configuration
from m3i_jax import parallel, privacy, run_files, schema
from m3i_jax.data import tokenizer
from m3i_jax.data.preprocessing import Preprocessing
from m3i_jax.data.sources import base
from m3i_jax.errors import UserError
from m3i_jax.evaluation import feature_extraction, load
from m3i_jax.models import backbones
from m3i_jax.modes import evaluators, figure_evaluators, output, report
from m3i_jax.modes import setup as jobs
from m3i_jax.parallel import distributed
from m3i_jax.reporting import text_table
from m3i_jax.reporting.atomic_write import write_text_atomic
from m3i_jax.training import checkpoint_dir, loop
from m3i_jax.training.checkpoint import Checkpoints

RESULT = "eval.json"
HELD = "held out"  # of data.txt: what is not trained on
SAME = ("evaluate.", "data.", "model.", "objective.", "seed ")  # settings that a result depends on


def run(config: schema.Config, *, workdir: str, checkpoint: str = "") -> int:
    there = merge_results(
        checkpoint or workdir, "--checkpoint" if checkpoint else "--workdir", needed=not checkpoint
    )
    output.check_writable(
        workdir,
        f"--workdir {workdir}",
        "results go there; evaluate it from another one: --workdir DIR --config FILE"
        f" --checkpoint={workdir}",
    )
    if there is None:
        config = evaluate_weights(
            load.fit_config_to_weights(config, checkpoint, "--checkpoint"), checkpoint
        )
    step, main = there[1] if there else 0, not jax.process_index()
    say = print if main else _nothing
    began = checkpoint_dir.is_run(workdir)  # before the data leave their index there
    # other data may have none, and the text tower is there all the same
    spoken = bool(there) and config.data.captions == "yes"
    job = jobs.open_setup(
        _with_captions(config, "auto") if spoken else config,
        workdir,
        trains=[config.objective.forms],
    )
    # of a run under way they may see another newest one
    distributed.assert_same_on_all_hosts("data", {"data": job.identity, "checkpoint": str(step)})
    of_run = there is not None and there[0].parent.resolve() == job.workdir.resolve()
    of = f"step {step:,}" if of_run else checkpoint
    if not there:
        what = (
            f"{backbones.get_backbone(job.config.model).describe(job.config.model)},"
            f" {job.config.data.image_size} pixels"
        )
        say(
            f"{checkpoint} is an encoder alone: its features are evaluated, and nothing that asks a"
            f" head ({what})"
        )
    # those of the weights
    if (
        there
        and (spoken or job.tokenizer)
        and (words := there[0].parent / "tokenizer.json").is_file()
    ):
        job.tokenizer = tokenizer.Tokenizer.load(str(words), config.data.caption_length)
        job.config = _with_captions(job.config, "yes")
    trained_on = there[0].parent if there else job.workdir
    if other := other_data(job, trained_on):
        say(f"the data are not those of the run in {trained_on}: {'; '.join(other)}")
        job = _of_other_classes(job, say)
    about = described(job, str(there[0] / str(step)) if there else checkpoint, step)
    if not of_run or other:
        job = dataclasses.replace(job, workdir=_place(job, about, began))
    easel = figure_evaluators.FigureWriter(
        job, lambda: f"{step:08d}", lambda: f"{of}, {job.config.evaluate.encoder} parameters"
    )
    asked, sets = evaluators.enabled_metrics(job, say, easel=easel)
    if not asked:
        raise UserError(
            "--mode=eval: nothing that is asked for can be evaluated with this data and objective;"
            " see config.evaluate in --help"
        )
    trainer = dataclasses.replace(job, config=_of_any_length(job.config)).make_trainer()
    if there:
        checkpoints = Checkpoints(there[0], job.config.train.keep)
        state = checkpoints.restore(step, trainer.template, trainer.shardings)
        checkpoints.close()
    else:
        state = trainer.init()
    return evaluate(
        job,
        about,
        asked,
        feature_extraction.EvalContext(
            sets, feature_extraction.encoder_params(job.config, state), lambda: None
        ),
    )


def _nothing(line: str) -> None:
    pass


def described(job: jobs.Setup, checkpoint: str, step: int) -> dict[str, Any]:
    """What results are of: weights, data, how images are seen, and a digest of all settings that
    they depend on."""
    settings = [
        line
        for line in configuration.config_to_text(job.config).splitlines()
        if line.startswith(SAME)
    ]
    data = {
        name: {"name": part.name, "pictures": len(part), "fingerprint": part.fingerprint()}
        for name, part in (("index", job.train), ("queries", job.held_out))
    }
    return privacy.redact_tree({
        "checkpoint": checkpoint, "step": step, "encoder": job.config.evaluate.encoder, "data": data,
        "preprocessing": json.loads(json.dumps(Preprocessing.of(job.config).described())),
        "of": base.stable_digest(*settings, job.identity, str(len(job.held_out))),
    })  # fmt: skip


def other_data(job: jobs.Setup, run: pathlib.Path) -> list[str]:
    """In what the data of a job are other images than those of the run in a directory, a line each.
    Nothing where no run was kept there, or where its images are elsewhere now."""
    file = run / "data.txt"
    if not file.is_file():
        return []
    was, now = (
        _pictures(text) for text in (run_files.read_run_text(file), privacy.redact(job.identity))
    )
    out = [
        f"{k}: {was.get(k, 'absent')} -> {now.get(k, 'absent')}"
        for k in {**was, **now}
        if _differ(was.get(k), now.get(k))
    ]
    # a run of an older version, which kept the settings alone
    if not any(key.startswith(HELD) for key in was):
        out = [line for line in out if not line.startswith(HELD)]
        saved = run / "config.txt"
        changed = (
            configuration.config_difference(
                run_files.read_run_text(saved), privacy.redact(job.text)
            )
            if saved.is_file()
            else []
        )
        out += [line for line in changed if line.startswith(("data.holdout", "data.mixture"))]
    return out


def _pictures(text: str) -> dict[str, str]:
    """The lines of data.txt that say which images, by key."""
    pairs = (line.split(" = ", 1) for line in text.splitlines() if " = " in line)
    return {key: value for key, value in pairs if key.startswith(("source", HELD))}


def _differ(one: str | None, other: str | None) -> bool:
    """Whether two lines of data.txt mean other images; another name alone, as of a directory that
    was moved, does not."""
    numbers = [
        re.findall(r"^\d+ of every [\d,]+|[\d,]+ images, fingerprint \w+$", line or "")
        for line in (one, other)
    ]
    return numbers[0] != numbers[1]


def _place(job: jobs.Setup, about: dict[str, Any], began: bool) -> pathlib.Path:
    """The directory for results that are not the run's own: where there is no run, the working
    directory, if it has none of another."""
    if (
        not began
        and earlier_results(
            job.workdir / RESULT, {name: about[name] for name in ("checkpoint", "data")}
        )
        is not None
    ):
        return job.workdir
    data = json.dumps([about["data"], about["checkpoint"]], sort_keys=True)
    place = job.workdir / f"eval-{base.stable_digest(data)[:8]}"
    if not jax.process_index():
        place.mkdir(mode=0o700, exist_ok=True)
    return place


def _with_captions(config: schema.Config, captions: str) -> schema.Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, captions=captions))


def _of_other_classes(job: jobs.Setup, say: Callable[[str], None]) -> jobs.Setup:
    """With the categories of these data; the head of the run knows others, unless there are as
    many."""
    classes, known = tuple(job.train.classes), job.config.data.classes
    if not known:
        return job
    config = job.config
    if config.evaluate.direct and len(classes) != known:
        say(
            f"no direct evaluation: these data have {len(classes)} categories, and the head of the"
            f" run {known}"
        )
        config = dataclasses.replace(
            config, evaluate=dataclasses.replace(config.evaluate, direct=False)
        )
    elif config.evaluate.direct:
        say(
            "direct evaluation takes category k of these data for category k of the run:"
            f" {', '.join(classes[:3])}, ..."
        )
    return dataclasses.replace(job, config=config, classes=classes)


def _of_any_length(config: schema.Config) -> schema.Config:
    """Nothing is trained, so that data may have fewer images than a batch."""
    train, optim = (
        dataclasses.replace(config.train, steps=1),
        dataclasses.replace(config.optim, warmup_steps=0),
    )
    return dataclasses.replace(config, train=train, optim=optim)


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
    known = (earlier_results(place, about) or {}).get("results", {}) if main else {}
    known = known if isinstance(known, dict) else {}
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
                            noted=True,
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
        data = "; ".join(
            f"{name} {part['pictures']:,} of {part['name']}, {part['fingerprint']}"
            for name, part in about["data"].items()
        )
        print(
            f"\nstep {about['step']:,} of {about['checkpoint']}, {about['encoder']} parameters;"
            f" accuracies are fractions\n{data}\n"
        )
        print(text_table.text_table(rows, ("what", "value")))
        bad = {reason: count for reason, count in seen.skipped.items() if count}
        if (job.workdir / "metrics.jsonl").is_file():
            print(f"\n{report.write_report(job.config, job.workdir)}, with images of this")
        print(f"\n{place}" + (f"; images that could not be read: {bad}" if bad else ""), flush=True)
    return loop.DONE


def earlier_results(place: pathlib.Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier call has written about the same thing; {} if it has written nothing that can
    be read, None if about another."""
    if not place.is_file():
        return {}
    try:
        saved = run_files.read_run_json(place)
    except (OSError, UserError) as error:
        print(f"warning: {error}: all evaluators run again", flush=True)
        return {}
    return saved if all(saved.get(key) == value for key, value in about.items()) else None


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
