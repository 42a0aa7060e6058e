"""--mode=profile: run a few steps of a training on its data and devices, and trace the last of
them. Writes WORKDIR/profile, of several hosts WORKDIR/profile/host-<index>; checkpoints and metrics
in the same directory stay unchanged. With --kernels: a table of the kernels that the train step
would run on this device instead, each by itself: time, error and share of the peaks. That reads no
data and trains nothing."""

import dataclasses
from typing import Any

import jax

from m3i_jax import parallel, schema
from m3i_jax.errors import UserError
from m3i_jax.modes import monitoring, show
from m3i_jax.modes.setup import Setup, fit_to_devices, lock_workdir, open_setup
from m3i_jax.parallel import distributed, kernel_calls
from m3i_jax.profiling import kernel_profile
from m3i_jax.reporting import writers
from m3i_jax.training import loop
from m3i_jax.training.task import task_kind
from m3i_jax.training.trainer import Trainer, abstract_batch

WARM = 3  # steps before the trace: the first compiles, the others fill the queue of batches


class _NoCheckpoints:
    """Takes the place of `Checkpoints` and saves nothing."""

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        pass

    def retry(self) -> bool:
        return False

    def wait(self, state: Any) -> None:
        pass


def shorten_run(config: schema.Config) -> schema.Config:
    """Returns the same run with only the steps of a trace, without evaluation, panels and
    saving."""
    steps = WARM + config.report.profile_steps
    return dataclasses.replace(
        config,
        train=dataclasses.replace(
            config.train, steps=steps, log_every=1, eval_every=0, panel_every=0, save_every=steps
        ),
        optim=dataclasses.replace(config.optim, warmup_steps=0),
    )


def run(
    config: schema.Config, *, workdir: str, kernels: bool = False, began: float | None = None
) -> int:
    kind = task_kind(config.task)
    kind.reject_unused_settings(config)
    if kernels:
        return print_kernels(config)
    setup = open_setup(shorten_run(config), workdir, trains=kind.objectives(config))
    distributed.assert_same_on_all_hosts("data", {"data": setup.identity})
    with lock_workdir(setup.workdir):
        return profile(setup, began)


def profile(setup: Setup, began: float | None) -> int:
    """Trace the end of a short run; returns 0, or the exit code of `loop.run_loop`."""
    trainer = setup.make_trainer()
    total, main = trainer.length.steps, jax.process_index() == 0
    log = writers.log_line if main else lambda line: None
    console = writers.Console(total, setup.config.train.batch_size, log)
    clock = monitoring.make_clock(trainer, log, began=began)
    directory = monitoring.trace_directory(setup.workdir)
    before = set(directory.rglob("*.xplane.pb"))
    with (
        monitoring.count_compilations(clock),
        parallel.reported_checks(lambda line, values: log(line)),
        monitoring.monitored(setup.config, setup.workdir, clock, log) as tracer,
    ):

        def sent(step: int, metrics: Any) -> None:
            if step == WARM:
                tracer.ask()
            tracer(step, metrics)

        state, data = trainer.init(), setup.batches(0)
        callbacks = loop.Callbacks(
            data=data,
            checkpoints=_NoCheckpoints(),  # type: ignore[arg-type]
            write=console.write,
            log=log,
            panel=lambda *_: None,
            evaluators=[],
            position=lambda samples: {},
            clock=clock,
            on_step=sent,
        )
        try:
            code, _ = loop.run_loop(trainer, state, samples_seen=0, callbacks=callbacks)
        finally:
            data.close()
        clock.turn("stop")
        tracer.close()
        log(clock.summary()[1])
    if code == loop.DONE and set(directory.rglob("*.xplane.pb")) == before:
        raise UserError(
            f"--mode=profile: no trace was written to {directory}; the line above gives the reason"
        )
    return code


def print_kernels(config: schema.Config) -> int:
    """Print the table; returns 0, or 1 if a kernel is wrong."""
    if (setting := kernel_calls.kernel_setting()) != "check":
        raise UserError(
            f"{kernel_calls.KERNELS}={setting}: --mode=profile --kernels checks all kernels; unset"
            " it"
        )
    config, mesh = fit_to_devices(show.assume_data(config)[0])
    calls = traced_calls(Trainer(config, mesh, show.vocabulary_size(config)))
    first = not jax.process_index()
    if not calls:
        if first:
            kind = jax.local_devices()[0].device_kind
            print(f"the train step of this configuration has no kernel on {kind}")
        return 0
    profiles = [kernel_profile.profile_call(call) for call in calls]
    if first:
        print(kernel_profile.kernel_table(profiles))
    return int(any(each.result.reason for each in profiles))


def traced_calls(step_trainer: Trainer) -> list[kernel_calls.KernelCall]:
    """Returns the calls of kernels in the train step."""
    batch = abstract_batch(step_trainer.config)
    kernel_calls.take_pending()  # of what this process traced before
    with jax.set_mesh(step_trainer.mesh), kernel_calls.noted_calls():
        jax.eval_shape(step_trainer.trace, step_trainer.template, batch)
    return kernel_calls.take_pending()
