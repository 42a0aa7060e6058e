"""--mode=train: train, or resume the run in the working directory."""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from m3i_jax import config as configuration
from m3i_jax import parallel, privacy, run_files, schema
from m3i_jax.data.sources import base
from m3i_jax.errors import UserError, one_line
from m3i_jax.models import m3i
from m3i_jax.modes import earlier_log, evaluators, monitoring, report
from m3i_jax.modes.earlier_log import EarlierLog
from m3i_jax.modes.setup import Setup, lock_on_all_hosts, open_setup, require_shared
from m3i_jax.modes.task_views import task_views
from m3i_jax.parallel import distributed
from m3i_jax.reporting import run_log, writers
from m3i_jax.run_files import write_json_atomic, write_text_atomic
from m3i_jax.training import (
    checkpoint_dir,
    debug_dump,
    loop,
    scaling,
    weight_source,
)
from m3i_jax.training.checkpoint import CheckpointDamaged, Checkpoints, SavesFailed
from m3i_jax.training.task import task_kind
from m3i_jax.training.trainer import Trainer
from m3i_jax.training.unused_settings import ignored_settings

LOG = "metrics.jsonl"


def run(
    config: schema.Config, *, workdir: str, allow_changes: bool, began: float | None = None
) -> int:
    kind = task_kind(config.task)
    kind.reject_unused_settings(config)
    report.refuse_absent(config)
    require_shared(pathlib.Path(workdir))
    setup = open_setup(config, workdir, trains=kind.objectives(config))
    distributed.assert_same_on_all_hosts("data", {"data": setup.identity})
    with lock_on_all_hosts(setup.workdir):
        return pretrain(setup, allow_changes, began)


def check_same_run(setup: Setup, position: dict[str, Any], allow_changes: bool) -> bool:
    """Refuse to resume a run with other relevant settings, data or tokenizer; log them if they are
    allowed. Returns whether there are any. Secrets in paths are redacted, so that new credentials
    are no change. The first host checks for all."""
    changed = list[str]()
    with parallel.fail_together("config.txt"):
        if not jax.process_index():
            changed = _changes(setup, position)
    changes = parallel.exchange_values("changes", "; ".join(changed)[:4000])[0]
    if changes and not allow_changes:
        raise UserError(
            f"--workdir {setup.workdir}: its run has another configuration"
            f" ({changes}); choose another directory, or add --allow-changes to continue"
            " with the new one"
        )
    if changes and not jax.process_index():
        writers.log_line(f"--allow-changes: {changes}")
    return bool(changes)


def write_settings(setup: Setup) -> None:
    """Write config.txt and data.txt of a run, and the names of its classes. For a run that has
    checkpoints only after its state was restored: what a refused command left there would be taken
    for the settings of the run. The first host writes."""
    main = not jax.process_index()
    with parallel.fail_together("config.txt, written"):
        if main:
            write_text_atomic(setup.workdir / "config.txt", privacy.redact(setup.text), noted=True)
            identity = privacy.redact(setup.identity)
            write_text_atomic(setup.workdir / "data.txt", identity, noted=True)
        if main and setup.classes:  # predictions of the run have their names
            names = {"classes": setup.classes}
            write_json_atomic(setup.workdir / weight_source.CLASSES, names, noted=True)


def _refuse_fewer_steps(config: schema.Config, steps: int, done: int) -> None:
    """Refuse a length of `steps` that is less than what a run has done."""
    if steps < done:
        name = "steps" if config.train.steps else "epochs"
        raise UserError(
            f"config.train.{name}={getattr(config.train, name)}: the run has done {done:,} steps"
            f" already, more than {steps:,}; set more, or use another --workdir"
        )


def _changes(setup: Setup, position: dict[str, Any]) -> list[str]:
    """Differences from the run at a checkpoint. Logs a warning for files that cannot be compared or
    that do not influence the training.

    Raises:
      UserError: config.txt was changed after the run wrote it.
    """
    saved, data = setup.workdir / "config.txt", setup.workdir / "data.txt"
    out = []
    if saved.is_file():
        remedy = "restore it, or delete it to continue with the settings of this command"
        differences = configuration.config_difference(
            run_files.read_run_text(saved, remedy), privacy.redact(setup.text)
        )
        # what the run took from init_from is in its checkpoint, and is not read again
        started = [line for line in differences if line.startswith("init.")]
        # a run of another version may have set what nothing reads
        unread = ignored_settings(setup.config)
        out += [
            line
            for line in differences
            if line not in started and line.partition(":")[0] not in unread
        ]
        if started:
            writers.log_line(
                f"warning: {'; '.join(started)}: has no effect, because the run continues from its"
                " checkpoint"
            )
    else:
        writers.log_line(
            f"warning: {saved} is missing: the settings cannot be compared with those of the run"
        )
    if position["fingerprint"] not in (setup.fingerprint, *setup.earlier_fingerprints):
        lines = _difference(data, privacy.redact(setup.identity))
        out += [f"data, {line}" for line in lines] or [
            f"data: {position['fingerprint']} -> {setup.fingerprint}"
        ]
    for name, wrong in run_files.changed_run_files(position, setup.workdir).items():
        if name == LOG:
            writers.log_line(
                f"warning: {setup.workdir / name} was changed after the run wrote it ({wrong}): its"
                " values may be wrong"
            )
        else:
            out.append(f"{name}: {wrong}")
    return out


def _difference(data: pathlib.Path, identity: str) -> list[str]:
    """Differences from data.txt, for a message; [] if it cannot be read."""
    with contextlib.suppress(OSError, UserError):
        saved = base.current_identity(run_files.read_run_text(data))
        return configuration.config_difference(saved, identity)
    return []


def checked_position(position: dict[str, Any], step: int) -> dict[str, Any]:
    """Returns the position stored in a checkpoint, checked.

    Raises:
      UserError: it has another structure, although its checksum is right.
    """
    kinds = {
        "samples_seen": int,
        "restarts": int,
        "fingerprint": str,
        "seconds": dict,
        "counts": dict,
        "collapse": dict,
        "files": dict,
    }
    wrong = [
        name
        for name, kind in kinds.items()
        if name in position and type(position[name]) is not kind
    ]
    wrong += [name for name in ("samples_seen", "fingerprint") if name not in position]
    if not wrong:
        groups = list(position.get("counts", {}).values())
        counts = [count for group in groups if isinstance(group, dict) for count in group.values()]
        wrong += ["counts"] * (
            any(type(group) is not dict for group in groups)
            or any(type(count) is not int for count in counts)
        )
        wrong += ["seconds"] * any(
            type(value) not in (int, float) for value in position.get("seconds", {}).values()
        )
    if wrong or position["samples_seen"] < 0:
        raise UserError(
            f"checkpoint {step}: its position is not valid"
            f" ({', '.join(wrong) or 'samples_seen'}); move this checkpoint away to use the one"
            " before"
        )
    return position


def pretrain(
    setup: Setup,
    allow_changes: bool,
    began: float | None = None,
    on_late_notice: Callable[[], None] = lambda: None,
) -> int:
    """Train from the start or from its newest good checkpoint. The caller holds the lock.

    Args:
      setup: of the run.
      allow_changes: continue a run of other settings.
      began: `time.monotonic()` at the start of the process.
      on_late_notice: called, on all hosts, if SIGTERM came too late to stop this run.

    Returns: the exit code of `loop.run_loop`: 0, 1 or 42.
    """
    while True:
        try:
            return _pretrain(setup, allow_changes, began, on_late_notice)
        except CheckpointDamaged:
            pass  # it was logged and set aside: the next attempt uses the one before


def _newest_position(
    setup: Setup, checkpoints: Checkpoints, allow_changes: bool
) -> tuple[int, dict[str, Any], bool] | None:
    """(step, position, whether this command changes settings) of the newest good checkpoint of the
    same run; None without one. Logs a warning if a later one is missing."""
    newest = checkpoints.newest_good()
    if newest is None:
        return None
    position = checked_position(checkpoints.position(newest), newest)
    if not jax.process_index() and (lost := checkpoint_dir.lost_since(setup.workdir, newest)):
        writers.log_line(
            f"warning: checkpoint {lost:,}, which the run saved, is missing: resuming from"
            f" {newest:,}"
        )
    changed = check_same_run(setup, position, allow_changes)
    if not jax.process_index() and (lines := _evaluation_changes(setup)):
        writers.log_line(
            f"warning: {'; '.join(lines)}: evaluations up to step {newest:,} had the old value, and"
            " may not be comparable with later ones"
        )
    return newest, position, changed


def _evaluation_changes(setup: Setup) -> list[str]:
    """Settings of evaluations that differ from those of the run so far; [] without its file."""
    saved = setup.workdir / "config.txt"
    if not saved.is_file():
        return []
    return configuration.evaluation_difference(
        run_files.read_run_text(saved), privacy.redact(setup.text)
    )


def _log_start(setup: Setup, trainer: Trainer, log: Callable[[str], None]) -> None:
    """Log what is trained on what, how long, and settings that may not be meant."""
    config, length, views = setup.config, trainer.length, task_views(setup.config.task)
    log(f"{setup.train.description()}; {len(setup.held_out):,} held out")
    if unpublished := views.unpublished(config):
        log(unpublished)
    parameters = sum(count for _, count in m3i.parameter_table(trainer.template.params))
    where = f"{jax.device_count()} {jax.devices()[0].platform} device(s)"
    log(
        f"{parameters:,} parameters; {length.steps:,} steps of {config.train.batch_size} images on"
        f" {where}"
    )
    log(
        f"peak rate {config.optim.lr:.4g} after {length.warmup:,} steps of warm-up,"
        f" {views.summary(config)}"
    )
    for line in scaling.scaling_warnings(config, steps=length.steps, warmup=length.warmup):
        log(line)


def _last_batch(data: Iterator[Any], log: Callable[[str], None]) -> Any:
    """The batch after the last step, for a panel; None, with a warning, if a host cannot read it:
    the run is done without it."""
    batch, reason = None, ""
    try:
        batch = next(data)
    except parallel.HostMissing:
        raise
    except Exception as error:
        reason = one_line(error, 300) or type(error).__name__
    reasons = parallel.exchange_values("last panel", reason, limit=1800.0)
    if failed := [host for host, text in enumerate(reasons) if text]:
        log(f"warning: no panel of the last step ({reasons[failed[0]]})")
        return None
    return batch


def _pretrain(
    setup: Setup, allow_changes: bool, began: float | None, on_late_notice: Callable[[], None]
) -> int:
    config, workdir, main = setup.config, setup.workdir, not jax.process_index()
    with parallel.fail_together("checkpoints"):
        logged = _earlier_log(workdir) if main else EarlierLog()
        checkpoints = Checkpoints(workdir / "checkpoints", config.train.keep, log=writers.log_line)
    newest = _newest_position(setup, checkpoints, allow_changes)
    start, position, changed = newest or (0, {}, False)
    samples = position.get("samples_seen", 0)
    views = task_views(config.task)
    trainer = setup.make_trainer()
    _refuse_fewer_steps(config, trainer.length.steps, start)
    trainer.check_state_fits()
    with parallel.fail_together("files of the run", limit=1800.0):
        writer = writers.open_writers(
            config, workdir, resume_at=start, total=trainer.length.steps, main=main
        )
        own = sorted(step for step in logged.evaluated if step <= start)
        # for the position, which the first host writes
        vocabulary_mark = tokenizer_of(workdir) if setup.tokenizer and main else {}
    log = writer.log
    # all hosts skip the evaluations that are in the log of the first
    done = frozenset(json.loads(parallel.exchange_values("evaluated", json.dumps(own))[0]))
    _log_start(setup, trainer, log)
    resumed = logged.resumed(position) if newest else {}
    clock = monitoring.make_clock(trainer, log, **resumed, began=began)
    goes_on = newest is not None and start < trainer.length.steps
    if goes_on:  # the lines that had it were cut, and this start may end before its first one
        writer.write(start, earlier_log.kept_metrics(**resumed))

    def checked(line: str, values: dict[str, float]) -> None:
        log(line)
        writer.write(start + clock.ended, values)

    with (
        contextlib.closing(writer),
        monitoring.count_compilations(clock),
        parallel.announced_compilations(log),
        parallel.reported_checks(checked),
        monitoring.monitored(config, workdir, clock, log) as tracer,
    ):
        # what may refuse the settings comes before they replace those of the run
        evaluation = evaluators.make_evaluators(
            setup, log, trainer.length.steps, lambda draw: writer.attempt("pictures", draw)
        )
        data = setup.batches(samples)
        if newest:
            with clock.phase("restore"):
                state = checkpoints.restore(start, trainer.template, trainer.shardings)
            if goes_on:
                writer.write(start, clock.started())
            log(f"resuming at step {start:,}, {samples:,} samples seen")
        else:
            write_settings(setup)  # for modes that read the run meanwhile
            state = trainer.init(log, classes=setup.classes)
        if changed and start == trainer.length.steps:  # its weights are of the settings before
            log("warning: no step is left to train, so the run keeps its settings")
        elif newest:
            write_settings(setup)
        data.go_on(position.get("counts", {}))
        alarm = loop.CollapseAlarm(position.get("collapse"))
        if alarm.alarm:
            log("warning: the targets had collapsed before this start (collapse/alarm)")
        callbacks = loop.Callbacks(
            data=data,
            checkpoints=checkpoints,
            write=writer.write,
            log=log,
            panel=lambda step, state, batch: writer.attempt(
                "panels", lambda: views.draw_panel(setup, trainer, step, state, batch)
            ),
            evaluators=evaluation,
            position=lambda samples: {
                "samples_seen": samples,
                "fingerprint": setup.fingerprint,
                "seconds": clock.total(),
                "restarts": clock.restarts,
                "counts": data.counts,
                "collapse": alarm.saved(),
                "files": {**writer.mark(), **vocabulary_mark},
            },
            dump=lambda *what: dump_step(workdir, trainer, log, *what),
            evaluated=done,
            clock=clock,
            collapse=alarm,
            on_step=tracer,
            while_waiting=data.call_while_waiting,
            on_late_notice=on_late_notice,
        )
        try:
            code, state = loop.run_loop(trainer, state, samples_seen=samples, callbacks=callbacks)
            clock.turn("stop")
            if code == loop.DONE and config.train.panel_every:
                with clock.phase("panel"):
                    if (last := _last_batch(data, log)) is not None:
                        callbacks.panel(trainer.length.steps, state, last)
        except SavesFailed as error:
            log(
                f"stopped: {error}; free space or fix the permissions of {workdir}, and run the"
                " same command again"
            )
            code = loop.FAILED
        finally:
            data.close()
            checkpoints.close()
        if clock.ended:  # a run that was finished before has its summary in the log
            values, line = clock.summary()
            writer.write(start + clock.ended, values)
            log(line)
    if code == loop.PREEMPTED and earlier_log.is_long(workdir / LOG):
        log(
            "report.html is not written: a preemption leaves no time to read"
            f" {workdir / LOG}, which is long; --mode=report writes it"
        )
    elif not jax.process_index():
        writer.attempt("report.html", lambda: report.write_report(config, workdir))
    if code == loop.DONE:
        log(
            f"done: {trainer.length.steps:,} steps; metrics in {workdir / 'metrics.jsonl'}, report"
            f" in {workdir / 'report.html'}"
        )
    return code


def _earlier_log(workdir: pathlib.Path) -> EarlierLog:
    """The log of a run before this start. Only the first host reads it: it replaces the file
    meanwhile. Refuses to start where the checkpoints of the run are gone."""
    lines = run_log.read_log_lines(workdir / LOG)
    checkpoint_dir.refuse_lost(workdir, lines)
    return EarlierLog.of(lines)


def tokenizer_of(workdir: pathlib.Path) -> dict[str, run_files.Mark]:
    """Returns the entry for the tokenizer of the run in the position of a checkpoint."""
    path = workdir / "tokenizer.json"
    return {path.name: run_files.file_mark(run_files.read_run_file(path))} if path.is_file() else {}


def dump_step(
    workdir: pathlib.Path,
    trainer: Trainer,
    log: Any,
    step: int,
    state: Any,
    batch: Any,
    values: Any,
) -> None:
    """Write WORKDIR/dumps/<step> for the step that ended the run. A failure is logged and does not
    raise."""
    try:
        path = debug_dump.write_dump(workdir / "dumps", trainer, state, batch, step, values)
    except Exception as error:
        log(f"warning: step {step} could not be dumped ({' '.join(str(error).split())[:200]})")
    else:
        log(
            f"{path} has state and batch of step {step}; --mode=replay --workdir {workdir} repeats"
            " the step and lists what is not finite"
        )
