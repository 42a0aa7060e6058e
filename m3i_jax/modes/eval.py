"""--mode=eval: evaluate the features of a run without training. Runs every evaluator that the
settings enable on the newest checkpoint, or on another one; prints a table and writes
WORKDIR/eval.json, which also describes the data and the preprocessing.

The file is rewritten after every evaluator. The same command continues with the evaluators that are
missing in it; another checkpoint of the run, and other settings, texts or code of this package
start a new file (`eval_header`).

--data SOURCE evaluates on other data (`eval_data`), in WORKDIR/eval-<name of the data>. Other data
or weights by other means go to WORKDIR/eval-<digits>. Figures are there too: eval.json and figures
of the working directory stay those of the run, whose report.html shows all of them. --untrained
also evaluates the initial weights of the same network."""

import dataclasses
import functools
import json
import pathlib
import re
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax

from m3i_jax import config as configuration
from m3i_jax import parallel, privacy, run_files, schema
from m3i_jax.data import tokenizer
from m3i_jax.data.sources import base, class_names, relabelled
from m3i_jax.errors import UserError
from m3i_jax.evaluation import feature_extraction, load, registry
from m3i_jax.evaluation.feature_extraction import EvalContext
from m3i_jax.models import backbones
from m3i_jax.modes import (
    eval_data,
    eval_header,
    eval_source,
    evaluators,
    figure_evaluators,
    report,
)
from m3i_jax.modes.eval_results import RESULT, Results, read_earlier, result_dir
from m3i_jax.modes.setup import Setup, check_writable, open_setup, require_views
from m3i_jax.parallel import distributed
from m3i_jax.training import checkpoint_dir, init_from, loop, teachers, weight_source
from m3i_jax.training.checkpoint import Checkpoints
from m3i_jax.training.task import task_kind

HELD = "held out"  # prefix of the lines of data.txt about held-out data


def run(
    config: schema.Config,
    *,
    workdir: str,
    checkpoint: str = "",
    data: str = "",
    untrained: bool = False,
    given: Collection[str] = (),
) -> int:
    if untrained:
        require_views(config, "eval --untrained", "its weights alone predict nothing")
    evaluators.refuse_disabled(config, given)
    flag = "--checkpoint" if checkpoint else "--workdir"
    source = find_checkpoint(checkpoint or workdir, flag, needed=not checkpoint)
    check_writable(
        workdir,
        f"--workdir {workdir}",
        "eval writes its results there; to evaluate this run, give another directory: --workdir DIR"
        f" --config FILE --checkpoint={workdir}",
    )
    step, main = source[1] if source else 0, not jax.process_index()
    log = print if main else _ignore
    if source:
        with parallel.fail_together("settings of the checkpoint"):
            eval_source.check_settings(config, source[0].parent, flag, given, log)
    asked = config.data.augment
    began = checkpoint_dir.is_run(workdir)  # asked before the data index is written there
    if source:
        _find_teachers(config, source[0].parent)
    else:
        config = evaluate_weights(
            load.fit_config_to_weights(config, checkpoint, "--checkpoint"), checkpoint, given
        )
    # other data may have no captions, but the checkpoint has its text tower
    text_tower = bool(source) and config.data.captions == "yes"
    saved = bool(data) and config.data.captions == "yes" and "data.captions" not in given
    setup = open_setup(
        _with_captions(config, "auto") if text_tower or saved else config,
        workdir,
        trains=task_kind(config.task).objectives(config),
        draws_batches=False,
        hold_out_all=bool(data),
    )
    # the checkpoint too: while the run trains, hosts may see different newest ones
    distributed.assert_same_on_all_hosts("data", {"data": setup.identity, "checkpoint": str(step)})
    of_run = source is not None and source[0].parent.resolve() == setup.workdir.resolve()
    weights = f"step {step:,}" if of_run else checkpoint
    if not source and setup.config.traits.views:
        encoder = backbones.get_backbone(setup.config.model).describe(setup.config.model)
        log(
            f"{checkpoint} contains only an encoder ({encoder}, {setup.config.data.image_size}"
            " pixels); evaluators that need a head are skipped"
        )
        pixels = setup.config.data.augment
        if (pixels.mean, pixels.std) != (asked.mean, asked.std):
            log(
                f"mean and deviation of pixels are those of the file, {pixels.mean} and"
                f" {pixels.std}, not {asked.mean} and {asked.std} of the settings; a"
                " preprocessor_config.json beside the file can state others"
            )
    # the tokenizer of the weights, not that of other data
    if (
        source
        and (text_tower or setup.tokenizer)
        and (path := source[0].parent / "tokenizer.json").is_file()
    ):
        setup.tokenizer = tokenizer.Tokenizer.load(str(path), config.data.caption_length)
        setup.config = _with_captions(setup.config, "yes")
    trained_on = source[0].parent if source else setup.workdir
    if other := other_data(setup, trained_on):
        log(f"the data are not those of the run in {trained_on}: {'; '.join(other)}")
        learnt = weight_source.class_names(str(trained_on))
        setup = _with_other_classes(setup, log, named=bool(data), learnt=learnt)
    if other or not source:  # of weights without a run, the data are not known
        setup = _with_learnt_classes(setup, str(source[0].parent if source else checkpoint), log)
    about = eval_header.described(setup, str(source[0] / str(step)) if source else checkpoint, step)
    run_dir = setup.workdir
    if not of_run or other or data:
        name = eval_data.data_name(eval_data.entry_of(config.data)) if data else ""
        directory = result_dir(run_dir, about, began=began, name=name, of_run=of_run)
        setup = dataclasses.replace(setup, workdir=directory)
    figures = figure_evaluators.FigureWriter(
        setup,
        lambda: f"{step:08d}",
        lambda: f"{weights}, {about['encoder']} parameters",
    )
    metrics, image_sets = evaluators.enabled_metrics(
        setup, log, figures=figures, heads=source is not None
    )
    if not metrics:
        raise UserError(
            "--mode=eval: no enabled evaluator can run with this data and objective; enable another"
            " one, see config.evaluate in --help"
        )
    about |= eval_header.measured_by(setup, metrics)
    if warning := eval_header.cut_queries(setup.config, len(setup.held_out)):
        log(warning)
    state = _restored_state(setup, source, checkpoint)
    make_context = functools.partial(_context, setup, image_sets)
    return evaluate(
        setup,
        about,
        metrics,
        make_context(state),
        (lambda: make_context(_initial_state(setup))) if untrained else None,
        run=run_dir,
    )


def _find_teachers(config: schema.Config, run: pathlib.Path) -> None:
    """Take the shapes of the teachers from the checkpoint of a run, if it has one."""
    with parallel.fail_together("teachers"):
        if checkpoint_dir.complete_steps(run / "checkpoints"):
            teachers.find_in_run(str(run), config.objective.teachers, "--checkpoint")


def _restored_state(setup: Setup, source: tuple[pathlib.Path, int] | None, checkpoint: str) -> Any:
    """The state of a checkpoint, or the initial one, with the weights of a file."""
    trainer = dataclasses.replace(setup, config=_one_step(setup.config)).make_trainer()
    if source is None:
        state = trainer.init(targets=False)
        return state if setup.config.traits.views else init_from.with_statistics(state, checkpoint)
    checkpoints = Checkpoints(source[0], setup.config.train.keep)
    state = checkpoints.restore(source[1], trainer.template, trainer.shardings)
    checkpoints.close()
    return state


def _context(setup: Setup, image_sets: Any, state: Any) -> EvalContext:
    return EvalContext(
        image_sets, feature_extraction.encoder_params(setup.config, state), lambda: None
    )


def _initial_state(setup: Setup) -> Any:
    """The state of the run before its first step, without the weights that it started from."""
    config = dataclasses.replace(_one_step(setup.config), init_from="")
    return dataclasses.replace(setup, config=config).make_trainer().init(targets=False)


def _ignore(line: str) -> None:
    pass


def other_data(setup: Setup, run: pathlib.Path) -> list[str]:
    """Returns how the images of a setup differ from those of the run in a directory, a line each.
    [] if there is no run, or if the same images only have another path now."""
    file = run / "data.txt"
    if not file.is_file():
        return []
    was, now = (
        _image_lines(base.current_identity(text))
        for text in (run_files.read_run_text(file), privacy.redact(setup.identity))
    )
    out = [
        f"{k}: {was.get(k, 'absent')} -> {now.get(k, 'absent')}"
        for k in {**was, **now}
        if _differ(was.get(k), now.get(k))
    ]
    # a run of an older version has no lines about held-out data, only settings
    if not any(key.startswith(HELD) for key in was):
        out = [line for line in out if not line.startswith(HELD)]
        saved = run / "config.txt"
        changed = (
            configuration.config_difference(
                run_files.read_run_text(saved), privacy.redact(setup.text)
            )
            if saved.is_file()
            else []
        )
        out += [line for line in changed if line.startswith(("data.holdout", "data.mixture"))]
    return out


def _image_lines(text: str) -> dict[str, str]:
    """The lines of data.txt that identify images, by key."""
    pairs = (line.split(" = ", 1) for line in text.splitlines() if " = " in line)
    return {key: value for key, value in pairs if key.startswith(("source", HELD))}


def _differ(one: str | None, other: str | None) -> bool:
    """Whether two lines of data.txt identify different images; a different path alone, as of a
    moved directory, does not."""
    numbers = [
        re.findall(r"^\d+ of every [\d,]+|[\d,]+ images, fingerprint \w+$", line or "")
        for line in (one, other)
    ]
    return numbers[0] != numbers[1]


def _with_captions(config: schema.Config, captions: str) -> schema.Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, captions=captions))


def _with_other_classes(
    setup: Setup,
    log: Callable[[str], None],
    *,
    named: bool = False,
    learnt: tuple[str, ...] | None = None,
) -> Setup:
    """The setup with the categories of these data, numbered as those that the run has learnt where
    they have the same names. Without the evaluation of the category head if they are others. A run
    that ignored labels measures those of data that are `named` by --data."""
    classes, known = tuple(setup.train.classes), setup.config.data.classes
    if not setup.config.traits.views:
        return setup
    if not known:
        return dataclasses.replace(setup, classes=classes) if named else setup
    setup = dataclasses.replace(setup, classes=classes)
    if not setup.config.evaluate.direct or classes == learnt:
        return setup
    refused = ""
    if len(classes) != known:
        refused = f"these data have {len(classes)} categories, the head of the run has {known}"
    elif learnt is None or _may_be_renamed(classes, learnt):
        log(
            "direct evaluation assumes that category k of these data is category k of the run:"
            f" {', '.join(classes[:3])}, ..."
        )
    elif other := [name for name in classes if name not in learnt]:
        refused = (
            f"the run has not learnt {len(other)} categories of these data, as {other[0]!r}; if"
            " they only have other names, give --config.data.class_names"
        )
    elif len({*classes, *learnt}) < known:
        refused = "categories are matched by name, and several of the run have the same"
    else:
        log(f"{known} categories of these data are numbered as those of the run, by name")
        train, held_out = (
            relabelled.RelabelledSource(part, learnt) for part in (setup.train, setup.held_out)
        )
        return dataclasses.replace(setup, train=train, held_out=held_out, classes=learnt)
    if refused:
        log(f"no direct evaluation: {refused}")
        evaluators_of = dataclasses.replace(setup.config.evaluate, direct=False)
        config = dataclasses.replace(setup.config, evaluate=evaluators_of)
        return dataclasses.replace(setup, config=config)
    return setup


def _may_be_renamed(classes: Sequence[str], learnt: Sequence[str]) -> bool:
    """Whether one side has numbers, or alone ids of WordNet, for which the other may have names."""
    numbers = any(all(map(str.isdecimal, names)) for names in (classes, learnt))
    return numbers or len({class_names.are_wordnet_ids(names) for names in (classes, learnt)}) > 1


def _with_learnt_classes(setup: Setup, run: str, log: Callable[[str], None]) -> Setup:
    """The setup with the classes of the data numbered as a run of a dense task, or its export, has
    learnt them, by name: its head predicts those.

    Raises:
      UserError: names a class of the data that the run has not learnt, or a name that two have.
    """
    learnt = None if setup.config.traits.views else weight_source.class_names(run)
    if learnt is None or learnt == setup.classes:
        return setup
    config, kind = setup.config, task_kind(setup.config.task)
    own = kind.class_names(setup.held_out)
    if wrong := [name for name in own if name not in learnt]:
        raise UserError(
            f"data.source={config.data.source!r}: has {len(own)} classes, of which {len(wrong)},"
            f" such as {wrong[0]!r}, are not among the {len(learnt)} that the run in {run} learnt;"
            f" give data with names of these, in any order: {', '.join(learnt[:5])}"
        )
    if twice := [name for name in own if own.count(name) > 1 or learnt.count(name) > 1]:
        raise UserError(
            f"data.source={config.data.source!r}: {twice[0]!r} names several classes of these data"
            f" or of those that {run} learnt, and classes are matched by name; give each class"
            " another name"
        )
    log(f"{len(own)} classes of these data are numbered as the {len(learnt)} of the run, by name")
    return dataclasses.replace(
        setup,
        config=dataclasses.replace(
            config, data=dataclasses.replace(config.data, classes=len(learnt))
        ),
        train=kind.with_classes(setup.train, learnt),
        held_out=kind.with_classes(setup.held_out, learnt),
        classes=learnt,
    )


def _one_step(config: schema.Config) -> schema.Config:
    """The settings for a single step: nothing is trained, and the data may have fewer images than a
    batch."""
    train, optim = (
        dataclasses.replace(config.train, steps=1),
        dataclasses.replace(config.optim, warmup_steps=0),
    )
    return dataclasses.replace(config, train=train, optim=optim)


def evaluate_weights(
    config: schema.Config, path: str, given: Collection[str] = ()
) -> schema.Config:
    """Returns the configuration that evaluates a file of weights, read as `init_from` reads it: the
    mean features of the online encoder, or its cls token if `evaluate.features` asks for it, since
    such files have no heads of pre-training, and without teachers; of a dense task, the whole
    model, of which nothing may be missing. Which copy of the encoder is read, and whether arrays
    may be missing, say the settings `given` by the command: others are of the weights that the run
    started from.

    Raises:
      UserError: `evaluate.features` is attention.
    """
    if config.traits.views and config.evaluate.features == "attention":
        raise UserError(
            f"config.evaluate.features: 'attention' needs a trained pooling, and {path} has only an"
            " encoder; use 'mean' or 'cls'"
        )
    features = "cls" if config.evaluate.features == "cls" else "mean"
    settings = dataclasses.replace(config.evaluate, features=features, encoder="online")
    asked = {
        name: getattr(config.init, name)
        for name in ("weights", "strict")
        if f"init.{name}" in given
    }
    init = schema.Init(**asked, only=("^encoder/",))
    if not config.traits.views:
        settings = config.evaluate
        init = schema.Init(**asked | {"only": (), "strict": True})
    config = teachers.without_teachers(config)
    return dataclasses.replace(config, init_from=path, init=init, evaluate=settings)


def evaluate(
    setup: Setup,
    about: dict[str, Any],
    metrics: dict[str, feature_extraction.Metric],
    trained: EvalContext,
    untrained: Callable[[], EvalContext] | None = None,
    *,
    run: pathlib.Path | None = None,
) -> int:
    """Run the evaluators that are not in the file yet, and print all results; returns 0, or 42 if
    preempted.

    Args:
      setup: with the directory of the file.
      about: header of the file; see `described`.
      metrics: {evaluator: its metric}.
      trained: the weights.
      untrained: makes the context of the initial weights; None: they are not evaluated.
      run: directory whose report shows the results too; None: that of the file.
    """
    main, path = not jax.process_index(), setup.workdir / RESULT
    with parallel.fail_together(RESULT):
        parts = read_earlier(path, about) if main else {}
    # all hosts skip the same evaluators
    parts = json.loads(parallel.exchange_values("evaluated", json.dumps(parts))[0])
    results = Results(about, len(setup.classes), skipped=parts["skipped"])
    figures = {each.name for each in registry.evaluators() if each.last_only}
    passes = [(results.values, parts["results"], metrics, "", lambda: trained)]
    if untrained:
        measured = {name: metric for name, metric in metrics.items() if name not in figures}
        passes.append((results.untrained, parts["untrained"], measured, "untrained ", untrained))
    results.untrained |= parts["untrained"]
    with loop.Preemption() as notice:
        notice.arm()
        try:
            for values, known, enabled, prefix, make in passes:
                # what measured nothing is tried again: captions may have come since
                done = {name: of for name, of in known.items() if of or name in figures}
                values |= {name: done[name] for name in enabled if name in done}
                missing = {name: metric for name, metric in enabled.items() if name not in values}
                context = make() if missing else trained
                context.poll = notice.poll
                for name, metric in missing.items():
                    began = time.monotonic()
                    values[name] = dict(metric(context))
                    nothing = "" if values[name] or name in figures else ", nothing measured"
                    results.count_skipped(context.skipped)
                    if main:
                        # progress: an evaluation of many images takes long
                        seconds = f"{time.monotonic() - began:.1f} s"
                        print(f"{prefix}{name}: {seconds}{nothing}", flush=True)
                        results.write(path)
        except loop.Preempted:
            if main:
                print(
                    f"preempted: {len(results.values)} of {len(metrics)} evaluators are in {path};"
                    " run the same command again to continue",
                    flush=True,
                )
            return loop.PREEMPTED
    if not any(results.values.values()) and figures.isdisjoint(metrics):
        raise UserError(
            f"--mode=eval: {', '.join(metrics)} measured nothing: no held-out image has the labels"
            " or captions for it; give other data, or enable another evaluator, see config.evaluate"
            " in --help"
        )
    if main:
        print(f"\n{results.text()}")
        unreadable = {reason: count for reason, count in results.skipped.items() if count}
        page = run or setup.workdir
        if (page / "metrics.jsonl").is_file():
            try:  # the results are measured and written
                print(f"\n{report.write_report(setup.config, page)}, with these figures")
            except UserError as error:
                print(f"\nwarning: report.html was not written: {error}")
        print(
            f"\n{path}" + (f"; images that could not be read: {unreadable}" if unreadable else ""),
            flush=True,
        )
    return loop.DONE


def find_checkpoint(
    where: str, flag: str, *, needed: bool = True
) -> tuple[pathlib.Path, int] | None:
    """Returns (checkpoint directory, step) of a run, of its checkpoint directory, or of one
    checkpoint. None for another existing path, unless a checkpoint is `needed`.

    Raises:
      UserError: there is no complete checkpoint.
    """
    path = pathlib.Path(where)
    if path.name.isdecimal() and int(path.name) in checkpoint_dir.complete_steps(path.parent):
        return path.parent, int(path.name)
    for directory in (path / "checkpoints", path):
        if steps := checkpoint_dir.complete_steps(directory):
            return directory, max(steps)
    if not needed and path.exists():
        return None
    raise UserError(
        f"{flag}: {where!r} has no complete checkpoint; give the --workdir of a run that saved one,"
        " or one of its checkpoints"
    )
