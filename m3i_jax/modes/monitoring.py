"""Monitoring of a run: the clock of its phases, MFU, the watchdog, traces on a signal, and the
compilation cache."""

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
import optax

from m3i_jax import interrupts, parallel, schema
from m3i_jax.data import geometry
from m3i_jax.profiling import flops, hardware, trace
from m3i_jax.training import goodput, optimizer, step
from m3i_jax.training.trainer import Trainer, abstract_batch
from m3i_jax.training.update_rules import update_rule
from m3i_jax.training.watchdog import Watchdog


def without_remat(config: schema.Config) -> schema.Config:
    """Returns the configuration that computes nothing again in the backward pass, heads included.

    >>> detect = schema.Detect(dino=schema.Dino(remat=True))
    >>> config = schema.Config(dense=schema.DensePrediction(detect=detect))
    >>> without_remat(config).dense.detect.dino.remat
    False
    """
    detect, segment = config.dense.detect, config.dense.segment
    dino = dataclasses.replace(detect.dino, remat=False)
    of_objects, of_maps = (
        dataclasses.replace(head.mask2former, remat=False) for head in (detect, segment)
    )
    dense = dataclasses.replace(
        config.dense,
        detect=dataclasses.replace(detect, dino=dino, mask2former=of_objects),
        segment=dataclasses.replace(segment, mask2former=of_maps),
    )
    model = dataclasses.replace(config.model, remat="none")
    return dataclasses.replace(config, model=model, dense=dense)


def model_flops(trainer: Trainer, canvas: tuple[int, int] = (0, 0)) -> float:
    """Returns matrix FLOPs of one step of the model, without those that rematerialisation and
    microbatches add, on images of this height and width, or on the largest that there are."""
    plain = without_remat(trainer.config)
    plain = dataclasses.replace(plain, train=dataclasses.replace(plain.train, microbatches=1))
    run = functools.partial(
        step.train_step, dataclasses.replace(trainer.task, config=plain), trainer.tx
    )
    batch = abstract_batch(plain)
    if any(canvas):
        image = batch["image"]
        batch["image"] = image.update(shape=(image.shape[0], *canvas, 3))
    return flops.count_flops(run, trainer.template, batch).total


def mean_flops(trainer: Trainer, largest: float = 0.0) -> float:
    """Returns `model_flops` of the mean step of a run, whose batches may have different canvases.
    Between the smallest and the largest, FLOPs grow with the number of pixels. `largest`: those of
    the largest, if they are counted already."""
    largest = largest or model_flops(trainer)
    canvases = geometry.bucket_canvases(trainer.config.dense.geometry)
    pixels = [height * width for height, width in canvases]
    if len(set(pixels)) < 2:
        return largest
    least, most = min(pixels), max(pixels)
    smallest = model_flops(trainer, canvases[pixels.index(least)])
    share = (sum(pixels) / len(pixels) - least) / (most - least)
    return smallest + share * (largest - smallest)


def update_flops(trainer: Trainer) -> float:
    """Returns matrix FLOPs of the update rule of one step, which only Muon has. They do not depend
    on the batch: devices that have the whole state compute all of them."""
    optim = trainer.config.optim
    links = update_rule(optim.rule).links(optim, lambda _: 0.0, optimizer.decay_mask)
    rule = optax.with_extra_args_support(optax.chain(*links))

    def update(params: Any) -> Any:
        return rule.update(params, rule.init(params), params)[0]

    return flops.count_flops(update, trainer.template.params).total


def make_clock(
    trainer: Trainer, log: Callable[[str], None], **options: Any
) -> goodput.GoodputClock:
    """Returns the clock of a run on the devices of its mesh. Logs the peak that MFU refers to, or
    why MFU is not reported; nothing on a CPU, for which no peak is listed."""
    config, devices = trainer.config, list(trainer.mesh.devices.flat)
    kind = devices[0].device_kind
    peak = hardware.find_chip(kind, len(devices))
    if config.report.peak_tflops:
        peak = hardware.ChipPeak(
            kind, config.report.peak_tflops * 1e12, peak.chips if peak else len(devices)
        )
    clock = goodput.GoodputClock(
        images=config.train.batch_size, chips=peak.chips if peak else len(devices), **options
    )
    if peak is None:
        if devices[0].platform != "cpu":
            log(
                f"no perf/mfu: the peak of {kind!r} is unknown; set config.report.peak_tflops to"
                " that of one chip"
            )
    else:
        clock.flops, clock.peak = mean_flops(trainer), peak.flops * peak.chips
        log(
            f"{flops.format_flops(clock.flops)} a step; MFU against {peak.chips:g} x {peak.name}"
            f" of {peak.flops / 1e12:,.4g} TFLOP/s"
        )
    return clock


@contextlib.contextmanager
def count_compilations(clock: goodput.GoodputClock) -> Iterator[None]:
    """Report JAX's events of tracing and compiling to the clock."""

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/") and event.endswith("_duration"):
            clock.compiled(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def trace_directory(workdir: pathlib.Path) -> pathlib.Path:
    """Directory of the traces of this host. Each of several hosts has its own: a trace's folder is
    named by the second, and jax refuses one with files of two hosts, whose operations would add
    up."""
    directory = workdir / "profile"
    several = parallel.host_names() > 1
    return directory / f"host-{jax.process_index()}" if several else directory


@contextlib.contextmanager
def monitored(
    config: schema.Config,
    workdir: pathlib.Path,
    clock: goodput.GoodputClock,
    log: Callable[[str], None],
) -> Iterator[trace.Tracer]:
    """Run the block with watchdog and tracer; yields the tracer, which the loop calls at every
    step. SIGUSR1 requests a trace of the next steps, also before the block."""
    tracer = trace.Tracer(
        trace_directory(workdir),
        log,
        config.report.profile_steps,
        pause=clock.phase,
        done=log_top_ops(log),
    )
    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGUSR1, lambda *_: tracer.ask())
    if interrupts.take_trace_request():
        tracer.ask()
    stacks = workdir / f"stacks-{jax.process_index()}.txt"
    settings = config.train
    try:
        with Watchdog(
            clock,
            stacks,
            log,
            limit=settings.watchdog,
            first=settings.watchdog_first,
            abort=settings.watchdog_abort,
        ):
            yield tracer
    finally:
        tracer.close()
        if before is not None:
            signal.signal(signal.SIGUSR1, before)


def log_top_ops(log: Callable[[str], None]) -> Callable[[pathlib.Path, int], None]:
    """Returns a function that logs the costliest operations of a trace, and writes the table next
    to it."""

    def log_table(directory: pathlib.Path, steps: int) -> None:
        ops = trace.trace_operations(directory)
        if ops:
            text = trace.operation_table(ops, steps)
            (directory / "operations.txt").write_text(text + "\n", encoding="utf-8")
            log(f"the costliest operations, summed over this host's devices:\n{text}")

    return log_table


def enable_compilation_cache(workdir: pathlib.Path) -> str:
    """Enable JAX's persistent compilation cache; returns its directory, "" if disabled.

    JAX's own settings take precedence (JAX_COMPILATION_CACHE_DIR; JAX_ENABLE_COMPILATION_CACHE=0
    disables it). Else several hosts use the working directory, which they share, and a single host
    the user's cache directory, which its runs share."""
    settings: Any = jax.config  # its attributes exist at run time only
    if settings.jax_compilation_cache_dir is not None or not settings.jax_enable_compilation_cache:
        return settings.jax_compilation_cache_dir or ""
    if parallel.host_names() > 1:
        directory = workdir / "compiled"
    else:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        directory = pathlib.Path(cache) / "m3i_jax" / f"compiled-{parallel.machine_key()}"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return ""  # the home directory is not writable: JAX compiles at every start
    jax.config.update("jax_compilation_cache_dir", str(directory))
    return str(directory)
