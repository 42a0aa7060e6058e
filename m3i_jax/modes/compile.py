"""--mode=compile: compile the train step of a configuration for accelerators that need not be
present, and report memory, FLOPs and time.

It compiles the function that a run jits, with its shardings and its donated state; no data are
read. Writes WORKDIR/compile.json, whose keys `profiling/compile_report.py` lists, and prints the
same as tables. The TPU compiler is stopped before code generation (`libtpu_dump`), unless --code is
given."""

import contextlib
import dataclasses
import io
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from m3i_jax import config as configuration
from m3i_jax import parallel, run_files, schema
from m3i_jax.data import geometry
from m3i_jax.errors import DoesNotFit, UserError
from m3i_jax.modes import batch_search, monitoring, setup, show
from m3i_jax.parallel.chips import CHIPS, GPU_MEMORY
from m3i_jax.parallel.sharding import path_text
from m3i_jax.profiling import compile_report, flops, hardware, libtpu_dump
from m3i_jax.profiling import topology as topologies
from m3i_jax.training import plan, trainer
from m3i_jax.training.task import task_kind

GPU_POOL = 0.75  # share of GPU memory that JAX allocates by default


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileTarget:
    """The devices to compile for. limit: bytes of a device that a program may use; code: whether to
    run code generation too; on a TPU the reported values are known before it; file: the text of
    --config, which a process that compiles runs for what the file registers."""

    topology: topologies.Topology
    devices: list[jax.Device]
    limit: float
    code: bool = True
    file: str = ""

    @property
    def chip(self) -> str:
        return self.topology.kind


def compile_target(name: str, memory: str, *, code: bool = False, file: str = "") -> CompileTarget:
    """The devices of a topology and their memory, which `memory` (GiB, as text) overrides, and the
    configuration file. Raises UserError for an unknown topology."""
    parsed = topologies.parse_topology(name)
    try:
        given = float(memory) * 2**30 if memory else 0.0
    except ValueError:
        given = -1.0
    if memory and not 2**10 <= given < math.inf:  # nothing fits into less: no compilation for it
        raise UserError(f"--memory {memory}: is not a number of GiB a device, such as --memory=16")
    devices = topologies.topology_devices(parsed)
    if parsed.kind in CHIPS:
        available = CHIPS[parsed.kind].usable
    else:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / parsed.devices
    return CompileTarget(
        topology=parsed,
        devices=devices,
        limit=given or available,
        code=code or parsed.family.platform != "tpu",
        file=file,
    )


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Disable the compilation cache: a cached program has no compile time and, on some platforms,
    no statistics. JAX reads the setting once, until a reset."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def part_of(path: str) -> str:
    """The part of the state that an array belongs to, by its path.

    >>> part_of("params/encoder/norm/scale"), part_of("opt/adamw/0/mu/encoder/norm/scale")
    ('params', 'moments')
    >>> part_of("opt/target/params/norm/bias"), part_of("step")
    ('target', 'other')
    >>> part_of("opt/lars/2/trace/norm/bias")  # momentum of LARS
    'moments'
    """
    names = path.split("/")
    if names[0] == "params":
        return "params"
    if {"mu", "nu", "z", "trace"} & set(names):
        return "moments"
    return (
        "target"
        if names[0] == "opt" and names[1] in ("target", "frozen", "snapshot", "teachers")
        else "other"
    )


def state_bytes(step_trainer: trainer.Trainer) -> dict[str, float]:
    """{part of the state: bytes of one device}, from shapes and shardings."""
    out = dict.fromkeys(compile_report.STATE, 0.0)
    shardings = jax.tree.leaves(step_trainer.shardings)
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(step_trainer.template), shardings, strict=True
    ):
        out[part_of(path_text(path))] += (
            math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        )
    return out


def report_program(config: schema.Config, target: CompileTarget, vocabulary: int) -> dict[str, Any]:
    """Lower and compile the step of a completed configuration; the entries of compile.json."""
    if target.code:
        return _report(None, config, target, vocabulary)
    return libtpu_dump.run_in_subprocess(
        _report_in_subprocess, target.file, config, target.topology.name, target.limit, vocabulary
    )


def _report_in_subprocess(
    folder: pathlib.Path, file: str, config: schema.Config, name: str, limit: float, vocabulary: int
) -> dict[str, Any]:
    """`report_program` in a process that has not initialised its devices, nor run the file that
    registers what the settings may name."""
    if file:
        with contextlib.redirect_stdout(io.StringIO()):  # it printed its lines once
            configuration.load_config(file)
    return _report(
        folder, config, dataclasses.replace(compile_target(name, ""), limit=limit), vocabulary
    )


def _report(
    folder: pathlib.Path | None, config: schema.Config, target: CompileTarget, vocabulary: int
) -> dict[str, Any]:
    config, mesh = setup.fit_to_devices(config, target.devices)
    step_trainer = trainer.Trainer(config, mesh, vocabulary)
    batch, shards = trainer.abstract_batch(config), batch_search.data_shards(mesh)
    state = state_bytes(step_trainer)
    rows = sum(math.prod(s.shape) * s.dtype.itemsize for s in batch.values()) / shards
    out: dict[str, Any] = {
        "version": compile_report.VERSION, "topology": target.topology.name, "chip": target.chip,
        "devices": len(target.devices), "mesh": dict(mesh.shape),
        "batch_size": config.train.batch_size,
        "batch_per_device": config.train.batch_size // shards,
        "microbatches": config.train.microbatches, "limit_bytes": target.limit,
        "residual_bytes": _residual_bytes(config, shards, vocabulary, state["params"]),
    }  # fmt: skip
    family = target.topology.family
    start = time.perf_counter()
    try:
        with _uncached():
            options = dict(topologies.COMPILER[family.platform])
            lowered = step_trainer.lower(batch)
            compiled = (
                lowered.compile(compiler_options=options)
                if folder is None
                else libtpu_dump.compile_until_scheduled(lowered, options, folder)
            )
    except jax.errors.JaxRuntimeError as error:
        requested = compile_report.parse_out_of_memory(str(error))
        if requested is None:
            raise
        out |= _excess(requested[0], target.limit, state, rows)
        return out | {"compile_seconds": time.perf_counter() - start}
    out["compile_seconds"] = time.perf_counter() - start
    need = compile_report.program_memory(
        compiled.memory_analysis(), state, rows, own=family.platform == "tpu"
    )
    out |= {
        "fits": need.peak <= target.limit,
        "peak_bytes": need.peak,
        "over_bytes": max(0.0, need.peak - target.limit),
        "memory": need.parts,
    }
    out["peak_ratio"] = need.peak / (sum(state.values()) + rows + out["residual_bytes"])
    out |= compile_report.analyze_program(
        compiled.as_text() or "", chip=target.chip, cores=family.cores, host=family.host,
        dtype=config.model.dtype,
    )  # fmt: skip
    own = monitoring.model_flops(step_trainer)
    one = trainer.Trainer(monitoring.without_remat(config), _one_cpu(), vocabulary)
    due, devices = flops.count_flops(one.trace, one.template, batch).total, len(target.devices)
    # of the update a device computes its share of an fsdp axis, and of the rest that of all devices
    again = monitoring.update_flops(step_trainer) * (1 / mesh.shape["fsdp"] - 1 / devices)
    asked = due / devices + again
    out["flops"] |= {
        "model": own / devices + again,
        "asked": asked,
        "ratio": out["flops"]["compiled"] / asked,
    }
    mean = monitoring.mean_flops(step_trainer, own) + again * devices
    out["run"] = _run_days(step_trainer, target, mean, out["roofline"])
    return out


def _one_cpu() -> jax.sharding.Mesh:
    return parallel.make_mesh((1, 1, 1), jax.devices("cpu")[:1])


def _residual_bytes(config: schema.Config, shards: int, vocabulary: int, gradients: float) -> float:
    """Bytes of a device that wait for the backward pass: those of a microbatch, and of several
    also the targets of the others and the gradients that are added up."""
    count = config.train.microbatches
    due = config.train.batch_size // shards // count
    # an entropy term compares rows of several devices, and one device has fewer than its groups
    group = _entropy_unit(config)
    traced = math.lcm(due, group) if due > group else due
    part = batch_search.with_batch(config, traced)
    alone, rows = trainer.Trainer(part, _one_cpu(), vocabulary), trainer.abstract_batch(part)
    residual = alone.residual_bytes(rows) * due / traced
    if count > 1:
        residual += (count - 1) * alone.waiting_bytes(rows) * due / traced + gradients
    return residual


def _entropy_unit(config: schema.Config) -> int:
    """Images that a batch is a multiple of, so that entropy terms see whole groups."""
    parts = config.train.microbatches if config.objective.entropy_rows == "microbatch" else 1
    return plan.entropy_group(config) * parts


def _excess(requested: float, limit: float, state: dict[str, float], rows: float) -> dict[str, Any]:
    """The entries of a program that was refused. requested: the bytes that it asked for, if the
    compiler stated them."""
    peak = requested if math.isfinite(requested) else None
    parts = {"batch": rows, "temporaries": requested - sum(state.values()) - rows}
    return {
        "fits": False,
        "peak_bytes": peak,
        "over_bytes": max(0.0, peak - limit) if peak else 0.0,
        "memory": state | parts if peak else {},
    }


def _run_days(
    step_trainer: trainer.Trainer, target: CompileTarget, total: float, roofline: Any
) -> dict[str, Any]:
    """The entry `run`: days by the roofline, which is that of the largest canvas, and by `total`
    FLOPs a step at `report.mfu`."""
    config, steps = step_trainer.config, step_trainer.length.steps
    mfu, days, at_mfu = config.report.mfu, None, None
    if roofline:
        share = geometry.mean_canvas_share(config.dense.geometry)
        pixels = max(roofline["compute_seconds"], roofline["memory_seconds"]) * share
        days = max(pixels, roofline["network_seconds"]) * steps / 86_400
        at_mfu = hardware.training_days(
            total * steps, kind=target.chip, chips=target.topology.chips, mfu=mfu,
            dtype=config.model.dtype,
        )  # fmt: skip
    return {
        "steps": steps,
        "days": days,
        "days_at_mfu": at_mfu,
        "mfu": mfu,
    }


def _row(name: str, report: dict[str, Any]) -> dict[str, Any]:
    """An attempt, as compile.json lists it."""
    cost = report.get("flops")
    ratio = cost["compiled"] / cost["model"] if cost else None
    return {
        "tried": name,
        "fits": report["fits"],
        "peak_bytes": report["peak_bytes"],
        "flops_ratio": ratio,
        "seconds": report["compile_seconds"],
    }


def search_batch(
    config: schema.Config, target: CompileTarget, vocabulary: int
) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
    """(images a data shard, or 0; report of that size, or of the smallest tried; attempts)."""
    shards = batch_search.data_shards(parallel.make_mesh(config.parallel.mesh, target.devices))
    unit, reports, rows = (1 + config.traits.pairs) * config.train.microbatches, {}, {}
    group = _entropy_unit(config)
    unit = math.lcm(unit, group // math.gcd(group, shards))

    def attempt(units: int) -> batch_search.CompileTrial:
        report = reports[units] = report_program(
            batch_search.with_batch(config, units * unit * shards), target, vocabulary
        )
        rows[units] = _row(f"{units * unit:,} images a data shard", report)
        print(compile_report.attempt_row(rows[units]), flush=True)
        fixed = sum(report["memory"].get(part, 0.0) for part in compile_report.STATE)
        return batch_search.CompileTrial(
            fits=report["fits"],
            peak=report["peak_bytes"] or math.nan,
            fixed=fixed,
            limit=target.limit,
        )

    largest = batch_search.largest_batch(attempt, config.train.batch_size // (unit * shards))
    return (
        largest * unit,
        reports[largest or min(reports)],
        [row for _, row in sorted(rows.items())],
    )


def search_changes(
    config: schema.Config, target: CompileTarget, vocabulary: int
) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """(flags of the cheapest candidate that fits, or "", report as configured, attempts)."""
    setup.fit_to_devices(config, target.devices)
    first, rows = None, []
    for flags, changed in batch_search.memory_savers(config, len(target.devices)):
        mesh = parallel.make_mesh(changed.parallel.mesh, target.devices)
        if (
            sum(state_bytes(trainer.Trainer(changed, mesh, vocabulary)).values()) > target.limit
            and first
        ):
            continue  # the state alone exceeds the memory
        report = report_program(changed, target, vocabulary)
        first = first or report
        rows.append(_row(flags, report))
        print(compile_report.attempt_row(rows[-1]), flush=True)
        if report["fits"]:
            return flags, first, rows
    assert first
    return "", first, rows


def _advice(config: schema.Config, report: dict[str, Any]) -> str:
    state = sum(report["memory"].get(part, 0.0) for part in compile_report.STATE)
    if (
        state > report["limit_bytes"]
        and report["devices"] > report["mesh"]["fsdp"] * report["mesh"]["tensor"]
    ):
        return "shard the state with --config.parallel.mesh=(1,-1,1), or let --suggest search"
    now, rows = config.train.microbatches, report["batch_per_device"] // (1 + config.traits.pairs)
    possible = [parts for parts in (now * 2**k for k in range(1, 7)) if rows % parts == 0]
    enough = [
        parts
        for parts in possible
        if state + (report["peak_bytes"] or 0) * now / parts <= report["limit_bytes"]
    ]
    split = "".join(
        f"compute it in parts with --config.train.microbatches={parts}, "
        for parts in enough[:1] or possible[-1:]
    )
    less = {"none": "names", "dots": "names", "names": "half"}.get(config.model.remat)
    keep = f"store less with --config.model.remat={less}, " if less else ""
    return (
        f"{keep}{split}reduce the batch (batch_size= of the configuration file: learning rate and"
        " EMA change with it), or let --suggest search"
    )


def run(
    config: schema.Config,
    *,
    workdir: str,
    topology: str,
    memory: str,
    code: bool,
    largest_batch: bool,
    suggest: bool,
    file: str = "",
) -> int:
    """Run the mode: returns 0, or raises DoesNotFit (exit code 3) after all output is written."""
    if largest_batch and suggest:
        raise UserError(
            "--suggest: cannot be combined with --largest-batch; run the two one after the other"
        )
    # first: it decides on the devices of this process, which make_workdir asks for
    target = compile_target(topology, memory, code=code, file=file)
    task_kind(config.task).reject_unused_settings(config)
    directory = pathlib.Path(workdir)
    setup.make_workdir(directory)
    done, assumed = show.assume_data(config)
    vocabulary = show.vocabulary_size(done)
    print(
        f"compiling the train step for {topology}; this takes from seconds to minutes", flush=True
    )
    largest, flags = 0, ""
    rows: list[dict[str, Any]] = []
    if largest_batch:
        largest, report, rows = search_batch(done, target, vocabulary)
    elif suggest:
        flags, report, rows = search_changes(done, target, vocabulary)
    else:
        report = report_program(done, target, vocabulary)
    content = report | {"assumed": assumed, "largest_batch": largest or None, "tried": rows}
    ordered = json.loads(json.dumps(content, sort_keys=True, allow_nan=False))
    run_files.write_json_atomic(directory / "compile.json", ordered)
    print(compile_report.report_tables(report))
    if rows:
        print(compile_report.attempt_table(rows))
    if largest:
        print(f"largest batch: {largest:,} images a data shard, to a sixteenth")
    if (
        target.topology.family.platform == "cuda"
        and report["fits"]
        and report["peak_bytes"] > GPU_POOL * CHIPS[target.chip].device_memory
    ):
        print(
            "this needs more than the three quarters of a GPU that JAX allocates by default: set"
            f" XLA_CLIENT_MEM_FRACTION={GPU_MEMORY}"
        )
    for line in show.size_lines(config):
        print(line)
    if assumed:
        print(f"assumed, since this mode reads no data: {', '.join(assumed)}")
    print(f"written: {directory / 'compile.json'}")
    if not report["fits"]:
        advice = (
            f"add {flags}"
            if flags
            else "no configuration that was tried fits"
            if suggest
            else _advice(done, report)
        )
        raise DoesNotFit(
            f"--topology {topology}: does not fit: {compile_report.excess_flops(report)}; {advice}"
        )
    return 0
