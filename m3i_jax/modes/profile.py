"""--mode=profile: run a few steps of a training on its data and devices, and trace the last of
them. Writes WORKDIR/profile; checkpoints and metrics in the same directory stay unchanged. With
--kernels: a table of its kernels instead (`kernel_table`)."""

import dataclasses
from typing import Any

import jax

from m3i_jax import parallel, schema
from m3i_jax.errors import UserError
from m3i_jax.modes import kernel_table, monitoring
from m3i_jax.modes import setup as jobs
from m3i_jax.parallel import distributed
from m3i_jax.reporting import writers
from m3i_jax.training import loop

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
    """The same run with only the steps of a trace, without evaluation, panels and saving."""
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
    if kernels:
        return kernel_table.print_kernels(config)
    job = jobs.open_setup(shorten_run(config), workdir, trains=[config.objective.forms])
    distributed.assert_same_on_all_hosts("data", {"data": job.identity})
    with jobs.lock_workdir(job.workdir):
        return profile(job, began)


def profile(job: jobs.Setup, began: float | None) -> int:
    """Trace the end of a short run; returns 0, or the exit code of `loop.run_loop`."""
    trainer = job.make_trainer()
    total, main = trainer.length.steps, jax.process_index() == 0
    log = writers.log_line if main else lambda line: None
    console = writers.Console(total, job.config.train.batch_size, log)
    clock = monitoring.make_clock(trainer, log, began=began)
    before = set((job.workdir / "profile").rglob("*.xplane.pb"))
    with (
        monitoring.count_compilations(clock),
        parallel.reported_checks(lambda line, values: log(line)),
        monitoring.monitored(job.config, job.workdir, clock, log) as tracer,
    ):

        def sent(step: int, metrics: Any) -> None:
            if step == WARM:
                tracer.ask()
            tracer(step, metrics)

        state, data = trainer.init(), job.batches(0)
        outside = loop.Callbacks(
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
            code, _ = loop.run_loop(trainer, state, samples_seen=0, callbacks=outside)
        finally:
            data.close()
        clock.turn("stop")
        tracer.close()
        log(clock.summary()[1])
    if code == loop.DONE and set((job.workdir / "profile").rglob("*.xplane.pb")) == before:
        raise UserError(
            f"--mode=profile: no trace was written to {job.workdir / 'profile'}; the line above"
            " gives the reason"
        )
    return code
