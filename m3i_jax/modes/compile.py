"""--mode=compile: compiles the train step of a configuration for accelerators that are not here:
does it fit, what does it cost.

It is the function that a run jits, with its shardings and its donated state; no data are read.
Writes WORKDIR/compile.json, whose keys `profiling/compile_report.py` lists, and prints the same as
tables. For a TPU the compiler is left before it makes code (`libtpu_dump`), unless told."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from m3i_jax import parallel, schema
from m3i_jax.errors import DoesNotFit, UserError
from m3i_jax.modes import batch_search, monitoring, setup, show
from m3i_jax.parallel.sharding import path_text
from m3i_jax.profiling import compile_report, flops, hardware, libtpu_dump
from m3i_jax.profiling import topology as topologies
from m3i_jax.reporting import atomic_write
from m3i_jax.training import trainer

GPU_POOL = 0.75  # share of a card that JAX takes unless it is told otherwise


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileTarget:
    """What is compiled for. limit: bytes of a device that a program may use; code: whether the
    compiler is to make code as well, where what is asked of it is settled long before (TPU)."""

    topology: topologies.Topology
    devices: list[jax.Device]
    limit: float
    code: bool = True

    @property
    def chip(self) -> str:
        return self.topology.kind


def compile_target(name: str, memory: str, *, code: bool = False) -> CompileTarget:
    """The devices of a topology and their memory, which `memory` (GiB, as text) overrides;
    UserError for a name that is none."""
    place = topologies.parse_topology(name)
    try:
        given = float(memory) * 2**30 if memory else 0.0
    except ValueError:
        given = -1.0
    if memory and not 0 < given < math.inf:
        raise UserError(f"--memory {memory}: is not a number of GiB a device, such as --memory=16")
    devices = topologies.topology_devices(place)
    if place.kind in hardware.CHIPS:
        there = hardware.CHIPS[place.kind].usable
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / place.devices
    return CompileTarget(
        topology=place,
        devices=devices,
        limit=given or there,
        code=code or place.family.platform != "tpu",
    )


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """A program from the cache has no compile time, and on some platforms no statistics. JAX reads
    the setting once, until a reset."""
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

    >>> [part_of(p) for p in ("params/encoder/norm/scale", "opt/adamw/0/mu/encoder/norm/scale", "opt/target/params/norm/bias", "step")]
    ['params', 'moments', 'target', 'other']
    """
    names = path.split("/")
    if names[0] == "params":
        return "params"
    if {"mu", "nu"} & set(names):
        return "moments"
    return "target" if names[:2] in (["opt", "target"], ["opt", "frozen"]) else "other"


def state_bytes(made: trainer.Trainer) -> dict[str, float]:
    """{part of the state: bytes of one device}, from shapes and shardings."""
    out = dict.fromkeys(compile_report.STATE, 0.0)
    places = jax.tree.leaves(made.shardings)
    for (path, leaf), place in zip(
        jax.tree_util.tree_leaves_with_path(made.template), places, strict=True
    ):
        out[part_of(path_text(path))] += (
            math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        )
    return out


def report_program(config: schema.Config, site: CompileTarget, vocabulary: int) -> dict[str, Any]:
    """Lower and compile the step of a completed configuration; the entries of compile.json."""
    if site.code:
        return _report(None, config, site, vocabulary)
    return libtpu_dump.run_in_subprocess(_there, config, site.topology.name, site.limit, vocabulary)


def _there(
    folder: pathlib.Path, config: schema.Config, name: str, limit: float, vocabulary: int
) -> dict[str, Any]:
    """`report_program` in a process that has no devices yet."""
    return _report(
        folder, config, dataclasses.replace(compile_target(name, ""), limit=limit), vocabulary
    )


def _report(
    folder: pathlib.Path | None, config: schema.Config, site: CompileTarget, vocabulary: int
) -> dict[str, Any]:
    config, mesh = setup.restore_or_init(config, site.devices)
    made = trainer.Trainer(config, mesh, vocabulary)
    batch, shards, devices = (
        trainer.abstract_batch(config),
        batch_search.data_shards(mesh),
        len(site.devices),
    )
    out: dict[str, Any] = {
        "version": compile_report.VERSION, "topology": site.topology.name, "chip": site.chip, "devices": devices, "mesh": dict(mesh.shape),
        "batch_size": config.train.batch_size, "batch_per_device": config.train.batch_size // shards,
        "microbatches": config.train.microbatches, "limit_bytes": site.limit,
    }  # fmt: skip
    state = state_bytes(made)
    rows = sum(math.prod(s.shape) * s.dtype.itemsize for s in batch.values()) / shards
    host = parallel.make_mesh((1, 1, 1), jax.devices("cpu")[:1])
    count = config.train.microbatches
    part = batch_search.with_batch(config, config.train.batch_size // shards // count)
    alone, rows_of_part = trainer.Trainer(part, host, vocabulary), trainer.abstract_batch(part)
    out["residual_bytes"] = alone.residual_bytes(rows_of_part)
    if count > 1:
        out["residual_bytes"] += (count - 1) * alone.views_and_targets_bytes(rows_of_part) + state[
            "params"
        ]
    start = time.perf_counter()
    try:
        with _uncached():
            options, lowered = (
                dict(topologies.COMPILER[site.topology.family.platform]),
                made.lower(batch),
            )
            done = (
                lowered.compile(compiler_options=options)
                if folder is None
                else libtpu_dump.compile_until_scheduled(lowered, options, folder)
            )
    except jax.errors.JaxRuntimeError as error:
        asked = compile_report.parse_out_of_memory(str(error))
        if asked is None:
            raise
        peak = asked[0] if math.isfinite(asked[0]) else None
        over = max(0.0, peak - site.limit) if peak else 0.0
        parts = (
            state | {"batch": rows, "temporaries": peak - sum(state.values()) - rows}
            if peak
            else {}
        )
        return out | {
            "fits": False,
            "peak_bytes": peak,
            "over_bytes": over,
            "memory": parts,
            "compile_seconds": time.perf_counter() - start,
        }
    seconds = time.perf_counter() - start
    need = compile_report.program_memory(
        done.memory_analysis(), state, rows, own=site.topology.family.platform == "tpu"
    )
    out |= {
        "fits": need.peak <= site.limit,
        "peak_bytes": need.peak,
        "over_bytes": max(0.0, need.peak - site.limit),
        "memory": need.parts,
    }
    out["peak_ratio"] = need.peak / (sum(state.values()) + rows + out["residual_bytes"])
    out |= compile_report.analyze_program(
        done.as_text() or "",
        chip=site.chip,
        cores=site.topology.family.cores,
        host=site.topology.family.host,
    ) | {"compile_seconds": seconds}
    plain = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none"))
    one = trainer.Trainer(plain, host, vocabulary)
    due, own = flops.count_flops(one.trace, one.template, batch).total, monitoring.model_flops(made)
    out["flops"] |= {
        "model": own / devices,
        "asked": due / devices,
        "ratio": out["flops"]["compiled"] * devices / due,
    }
    steps, roof, mfu = made.length.steps, out["roofline"], config.report.mfu
    at_mfu = (
        hardware.training_days(own * steps, kind=site.chip, chips=site.topology.chips, mfu=mfu)
        if roof
        else None
    )
    out["run"] = {
        "steps": steps,
        "days": roof["step_seconds"] * steps / 86_400 if roof else None,
        "days_at_mfu": at_mfu,
        "mfu": mfu,
    }
    return out


def _row(name: str, got: dict[str, Any]) -> dict[str, Any]:
    """An attempt as it stands in compile.json."""
    ratio = got["flops"]["ratio"] if "flops" in got else None
    return {
        "tried": name,
        "fits": got["fits"],
        "peak_bytes": got["peak_bytes"],
        "flops_ratio": ratio,
        "seconds": got["compile_seconds"],
    }


def search_batch(
    config: schema.Config, site: CompileTarget, vocabulary: int
) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
    """(images a data shard or 0, report at that size or at the smallest, attempts)."""
    shards = batch_search.data_shards(parallel.make_mesh(config.parallel.mesh, site.devices))
    unit, reports, rows = 2 * config.train.microbatches, {}, {}

    def attempt(units: int) -> batch_search.CompileTrial:
        got = reports[units] = report_program(
            batch_search.with_batch(config, units * unit * shards), site, vocabulary
        )
        rows[units] = _row(f"{units * unit:,} images a data shard", got)
        print(compile_report.attempt_row(rows[units]), flush=True)
        fixed = sum(got["memory"].get(part, 0.0) for part in compile_report.STATE)
        return batch_search.CompileTrial(
            fits=got["fits"], peak=got["peak_bytes"] or math.nan, fixed=fixed, limit=site.limit
        )

    found = batch_search.largest_batch(attempt, config.train.batch_size // (unit * shards))
    return found * unit, reports[found or min(reports)], [row for _, row in sorted(rows.items())]


def search_changes(
    config: schema.Config, site: CompileTarget, vocabulary: int
) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """(flags of the cheapest candidate that fits, or "", report as configured, attempts)."""
    setup.restore_or_init(config, site.devices)
    first, rows = None, []
    for flags, made in batch_search.memory_savers(config, len(site.devices)):
        mesh = parallel.make_mesh(made.parallel.mesh, site.devices)
        if (
            sum(state_bytes(trainer.Trainer(made, mesh, vocabulary)).values()) > site.limit
            and first
        ):
            continue  # its state alone is too large
        got = report_program(made, site, vocabulary)
        first = first or got
        rows.append(_row(flags, got))
        print(compile_report.attempt_row(rows[-1]), flush=True)
        if got["fits"]:
            return flags, first, rows
    assert first
    return "", first, rows


def _advice(config: schema.Config, got: dict[str, Any]) -> str:
    state = sum(got["memory"].get(part, 0.0) for part in compile_report.STATE)
    if state > got["limit_bytes"] and got["devices"] > got["mesh"]["fsdp"] * got["mesh"]["tensor"]:
        return "shard the state with --config.parallel.mesh=(1,-1,1), or let --suggest search"
    now, pairs = config.train.microbatches, got["batch_per_device"] // 2
    possible = [parts for parts in (now * 2**k for k in range(1, 7)) if pairs % parts == 0]
    enough = [
        parts
        for parts in possible
        if state + (got["peak_bytes"] or 0) * now / parts <= got["limit_bytes"]
    ]
    split = "".join(
        f"compute it in parts with --config.train.microbatches={parts}, "
        for parts in enough[:1] or possible[-1:]
    )
    less = {"none": "names", "dots": "names", "names": "half"}.get(config.model.remat)
    keep = f"store less with --config.model.remat={less}, " if less else ""
    return (
        f"{keep}{split}take a smaller batch (batch_size= of the configuration file: learning rate"
        " and EMA go with it), or let --suggest search"
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
) -> int:
    """Entry of the mode: 0, or DoesNotFit (exit 3) once everything is written."""
    if largest_batch and suggest:
        raise UserError(
            "--suggest: does not go together with --largest-batch; ask one after the other"
        )
    where = compile_target(topology, memory, code=code)
    done, assumed = show.assume_data(config)
    words = show.vocabulary_size(done)
    print(
        f"compiling the train step for {topology}; this takes from seconds to minutes", flush=True
    )
    found, flags = 0, ""
    rows: list[dict[str, Any]] = []
    if largest_batch:
        found, got, rows = search_batch(done, where, words)
    elif suggest:
        flags, got, rows = search_changes(done, where, words)
    else:
        got = report_program(done, where, words)
    place = pathlib.Path(workdir)
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    told = got | {"assumed": assumed, "largest_batch": found or None, "tried": rows}
    atomic_write.write_text_atomic(
        place / "compile.json", json.dumps(told, indent=1, sort_keys=True, allow_nan=False) + "\n"
    )
    print(compile_report.report_tables(got))
    if rows:
        print(compile_report.attempt_table(rows))
    if found:
        print(f"largest batch: {found:,} images a data shard, to a sixteenth")
    if (
        where.topology.family.platform == "cuda"
        and got["fits"]
        and got["peak_bytes"] > GPU_POOL * hardware.CHIPS[where.chip].usable / 0.9
    ):
        print(
            "JAX takes three quarters of a card unless XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 is set:"
            " this needs it"
        )
    if assumed:
        print(f"assumed, since this mode reads no data: {', '.join(assumed)}")
    print(f"written: {place / 'compile.json'}")
    if not got["fits"]:
        way = (
            f"add {flags}"
            if flags
            else "nothing that was tried fits"
            if suggest
            else _advice(done, got)
        )
        raise DoesNotFit(
            f"--topology {topology}: does not fit: {compile_report.excess_flops(got)}; {way}"
        )
    return 0
