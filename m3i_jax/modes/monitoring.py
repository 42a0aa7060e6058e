"""What a run is watched with, put together: the clock of its phases, MFU, the watchdog, traces on a
signal, the compilation cache."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from m3i_jax import parallel, run_files, schema
from m3i_jax.profiling import flops, hardware, trace
from m3i_jax.training import goodput, step
from m3i_jax.training.trainer import Trainer, abstract_batch
from m3i_jax.training.watchdog import Watchdog


def model_flops(trainer: Trainer) -> float:
    """Matrix FLOPs that one step asks for: neither what remat computes again nor what microbatches
    add counts as work done."""
    config = trainer.config
    plain = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, remat="none"),
        train=dataclasses.replace(config.train, microbatches=1),
    )
    run = functools.partial(
        step.train_step, dataclasses.replace(trainer.plan, config=plain), trainer.tx
    )
    return flops.count_flops(run, trainer.template, abstract_batch(plain)).total


def make_clock(trainer: Trainer, say: Callable[[str], None], **more: Any) -> goodput.GoodputClock:
    """The clock of a run on the devices of its mesh; says once why there is no MFU if there is
    none."""
    config, devices = trainer.config, list(trainer.mesh.devices.flat)
    kind = devices[0].device_kind
    found = hardware.find_chip(kind, len(devices))
    if config.report.peak_tflops:
        found = hardware.ChipPeak(
            kind, config.report.peak_tflops * 1e12, found.chips if found else len(devices)
        )
    made = goodput.GoodputClock(
        images=config.train.batch_size, chips=found.chips if found else len(devices), **more
    )
    if found is None:
        say(
            f"no perf/mfu: the peak of {kind!r} is not known; set report.peak_tflops to that of one"
            " chip"
        )
    else:
        made.flops, made.peak = model_flops(trainer), found.flops * found.chips
        say(
            f"{flops.format_flops(made.flops)} a step; MFU against {found.chips:g} x {found.name}"
            f" of {found.flops / 1e12:,.4g} TFLOP/s"
        )
    return made


def log_metrics(log: pathlib.Path) -> dict[str, float]:
    """Seconds by phase of the last line of a log that has them; nothing where there is none."""
    if not log.is_file():
        return {}
    for values in reversed(run_files.read_log(log, [])[0]):
        with contextlib.suppress(ValueError, TypeError):
            if seconds := {
                k.removeprefix(goodput.PREFIX): float(v)
                for k, v in values.items()
                if k.startswith(goodput.PREFIX)
            }:
                return seconds
    return {}


@contextlib.contextmanager
def count_compilations(clock: goodput.GoodputClock) -> Iterator[None]:
    """JAX's reports of tracing and compiling go to the clock."""

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/") and event.endswith("_duration"):
            clock.compiled(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@contextlib.contextmanager
def monitored(
    config: schema.Config,
    workdir: pathlib.Path,
    clock: goodput.GoodputClock,
    say: Callable[[str], None],
) -> Iterator[trace.Tracer]:
    """Watchdog and traces for the block; gives what the loop calls with every step. SIGUSR1 asks
    for a trace of the next steps."""
    tracer = trace.Tracer(
        workdir / "profile",
        say,
        config.report.profile_steps,
        apart=clock.phase,
        done=log_top_ops(say),
    )
    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGUSR1, lambda *_: tracer.ask())
    stacks = workdir / f"stacks-{jax.process_index()}.txt"
    t = config.train
    try:
        with Watchdog(
            clock, stacks, say, limit=t.watchdog, first=t.watchdog_first, abort=t.watchdog_abort
        ):
            yield tracer
    finally:
        tracer.close()
        if before is not None:
            signal.signal(signal.SIGUSR1, before)


def log_top_ops(say: Callable[[str], None]) -> Callable[[pathlib.Path, int], None]:
    """Prints the costliest operations of a trace, and keeps the table beside it."""

    def tell(place: pathlib.Path, steps: int) -> None:
        ops = trace.trace_operations(place)
        if ops:
            text = trace.operation_table(ops, steps)
            (place / "operations.txt").write_text(text + "\n", encoding="utf-8")
            say(f"the costliest operations, summed over this host's devices:\n{text}")

    return tell


def enable_compilation_cache(workdir: pathlib.Path) -> str:
    """Where compiled programs are kept, so that no start after the first compiles them again.

    JAX's own setting wins (JAX_COMPILATION_CACHE_DIR; JAX_ENABLE_COMPILATION_CACHE=0 switches it
    off). Else several hosts keep them in the working directory, where all of them look, and a
    single one in the user's cache, which all its runs share."""
    settings: Any = jax.config  # its attributes are made at run time
    if settings.jax_compilation_cache_dir is not None or not settings.jax_enable_compilation_cache:
        return settings.jax_compilation_cache_dir or ""
    if parallel.host_names() > 1:
        place = workdir / "compiled"
    else:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        place = pathlib.Path(cache) / "m3i_jax" / f"compiled-{parallel.machine_key()}"
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return ""  # a home that cannot be written to: JAX compiles every time
    jax.config.update("jax_compilation_cache_dir", str(place))
    return str(place)
