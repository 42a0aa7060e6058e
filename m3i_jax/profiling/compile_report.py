"""Report of a compiled train step, for the devices that it was compiled for: `compile.json` and the
printed tables.

compile.json, version 1. Bytes, seconds and FLOPs are of one device and one step unless the name
says otherwise.

version
topology, chip, devices, mesh
    what was compiled for; mesh is {axis: devices}
batch_size, batch_per_device, microbatches
    images (mixed views); batch_per_device is of a data shard
fits, peak_bytes, limit_bytes, over_bytes
    over_bytes: peak over limit, 0 if it fits
memory
    {part: bytes}, whose sum is peak_bytes; parts: params, moments, target, other (the state),
    batch, temporaries. Empty if the compiler did not state its needs
residual_bytes, peak_ratio
    bytes that live from a forward pass to its backward pass: of the encoder and the more expensive
    of the two groups of losses, by the policy of model.remat, of one microbatch; with several also
    views and targets of the others, and the sum of gradients. A part of the temporaries. peak_ratio
    is peak_bytes over the sum of state, batch and these; a perfect compiler has 1
flops
    {compiled, asked, model, ratio}: matrix FLOPs of a device: of the compiled program; of the step
    without remat; of the model, also without the additions of microbatches, as MFU counts; and
    compiled over asked: the recomputation
collectives
    {kind: {count, received_bytes}}; those in a loop count once per iteration
traffic_bytes, traffic_parts
    HBM traffic, estimated from the program's text; and {part of the model: bytes}, whose sum it is
roofline
    {compute_seconds, memory_seconds, network_seconds, step_seconds, binds}; step_seconds is the
    largest, a lower bound of a step, and binds its name; null for an unknown chip. network: links
    between chips or, if that is longer, between hosts of GPUs
compiler_seconds
    with --code, the sum of the TPU compiler's estimated cycles of all instructions; else null
run
    {steps, days, days_at_mfu, mfu}: at the times of roofline, of which compute and memory are in
    proportion to the pixels of the mean canvas where batches have several (dense.geometry.buckets);
    and the FLOPs of the mean canvas at report.mfu of the peak
compile_seconds
    time of lowering and compiling; for a TPU without --code until memory and operations were
    settled
assumed
    values that only the data would determine
largest_batch, tried
    of --largest-batch: images per data shard, or null; each attempt of it or of --suggest, whose
    flops_ratio is compiled over model
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from m3i_jax.parallel.chips import CHIPS
from m3i_jax.profiling import flops as operations
from m3i_jax.profiling import hbm_traffic, hlo, traffic_parts
from m3i_jax.reporting import text_table

VERSION = 1
STATE = ("params", "moments", "target", "other")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_UNKNOWN = 2**62  # the compiler writes 2^63 - 1 where it has no estimate
_MOST_PARTS = 12  # rows of the table of memory traffic
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramMemory:
    """Bytes on a device. parts: {part: bytes}, whose sum is the peak."""

    peak: float
    parts: dict[str, float]


def program_memory(
    stats: Any, state: dict[str, float], batch: float, *, own: bool = False
) -> ProgramMemory:
    """The memory of a program from the compiler's statistics.

    Args:
      stats: of `compiled.memory_analysis()`.
      state: {part of the state: bytes on a device}, from shapes.
      batch: bytes of a device's part of the batch.
      own: use the compiler's peak, arguments included, as for TPUs: the sum of its other numbers
        counts temporaries of loops that share memory twice. After code generation it lacks the gaps
        between arrays.

    Without `own`, the peak is arguments, results that do not replace them, and temporaries. Padding
    of tiled layouts is a temporary."""
    peak = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
    )
    if own:
        peak = stats.peak_memory_in_bytes or peak
    parts = dict(state) | {"batch": batch}
    return ProgramMemory(peak=peak, parts=parts | {"temporaries": peak - sum(parts.values())})


def parse_out_of_memory(message: str) -> tuple[float, float] | None:
    """(bytes that a program needs, bytes that the device has) from a compiler's out-of-memory
    error; None if it is another error.

    >>> required = "the total memory required for HLO temporaries (640.00G) exceeds available HBM"
    >>> parse_out_of_memory(f"Ran out of memory on HBM, {required} (15.75G).")
    (687194767360.0, 16911433728.0)
    >>> parse_out_of_memory("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.")
    (22011707392.0, 16911433728.0)
    >>> parse_out_of_memory("INVALID_ARGUMENT: no such shape")
    """
    if not re.search(r"out of memory|resource_exhausted", message, re.IGNORECASE):
        return None
    number = r"\(?([\d.]+)([KMGT]?)i?B?\)?"
    for pattern in (
        rf"temporaries {number} exceeds available HBM {number}",
        rf"Used {number} of {number} hbm",
    ):
        if match := re.search(pattern, message, re.IGNORECASE):
            return (
                float(match[1]) * _UNITS[match[2].upper()],
                float(match[3]) * _UNITS[match[4].upper()],
            )
    return float("nan"), float("nan")


def analyze_program(
    text: str, *, chip: str, cores: int = 1, host: int = 0, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """Entries of compile.json from the program's text: flops.compiled, collectives, traffic_bytes,
    roofline, compiler_seconds.

    Args:
      text: `compiled.as_text()`.
      chip: a key of `chips.CHIPS`, or the name of an unknown chip.
      cores: devices per chip, which share its peak.
      host: devices per host, if the chip's links connect only those; 0: they connect all.
      dtype: of most products.
    """
    program = hlo.parse_hlo(text)
    traffic, collectives, flops = (
        hbm_traffic.hbm_traffic(program),
        hlo.collective_traffic(program, host),
        hlo.hlo_flops(program),
    )
    out: dict[str, Any] = {
        "flops": {"compiled": flops},
        "collectives": {
            kind: {"count": t.count, "received_bytes": t.received}
            for kind, t in sorted(collectives.items())
        },
        "traffic_bytes": traffic,
        "traffic_parts": traffic_parts.traffic_by_part(program),
        "roofline": None,
        "compiler_seconds": None,
    }
    if chip in CHIPS:
        limits = CHIPS[chip]
        times = {
            "compute_seconds": flops / limits.peak_of(dtype) * cores,
            "memory_seconds": traffic / limits.bandwidth * cores,
            "network_seconds": max(
                sum(t.received for t in collectives.values()) / limits.link * cores,
                sum(t.outside for t in collectives.values()) / limits.network
                if limits.network
                else 0.0,
            ),
        }
        slowest = max(times, key=lambda name: times[name])
        binds = slowest.removesuffix("_seconds")
        out["roofline"] = times | {"step_seconds": times[slowest], "binds": binds}
        cycles = sum(
            times * int(hit[1])
            for times, each, fused in hlo.executed_counts(program)
            if not fused and (hit := _CYCLES.search(each.text)) and int(hit[1]) < _UNKNOWN
        )
        out["compiler_seconds"] = cycles / limits.clock if cycles and limits.clock else None
    return out


def report_tables(report: dict[str, Any]) -> str:
    """A report as text."""
    peak, limit = report["peak_bytes"], report["limit_bytes"]
    verdict = (
        f"fits: {peak / limit:.0%} of {text_table.format_bytes(limit)} a device"
        if report["fits"]
        else f"does not fit: {excess_flops(report)}"
    )
    mesh = ", ".join(f"{axis} {n}" for axis, n in report["mesh"].items())
    of = f"{report['batch_size']:,} images a step, {report['batch_per_device']:,} a data shard"
    lines = [
        (
            f"{report['topology']}: {report['devices']:,} devices ({mesh}); {of}, microbatches"
            f" {report['microbatches']}"
        ),
        verdict,
        "",
    ]
    if report["memory"]:
        rows = [
            (part, text_table.format_bytes(n), f"{n / peak:.1%}")
            for part, n in report["memory"].items()
        ]
        lines += [
            text_table.text_table(
                [*rows, ("all", text_table.format_bytes(peak), "100.0%")],
                ("memory of a device", "size", "share"),
            ),
            "",
        ]
    if "peak_ratio" in report:
        kept = text_table.format_bytes(report["residual_bytes"])
        lines += [
            (
                f"{kept} of it wait for the backward pass; the peak is {report['peak_ratio']:.2f}"
                " times the sum of state, batch and those"
            ),
            "",
        ]
    if "flops" in report:
        lines += [_costs(report), ""]
    return "\n".join(lines)


def _costs(report: dict[str, Any]) -> str:
    flops, roof, run = report["flops"], report["roofline"], report["run"]
    rows = [
        (
            "matrix FLOPs",
            f"{operations.format_flops(flops['compiled'])},"
            f" {flops['compiled'] / flops['model']:.3f} times the model's",
        ),
        ("memory traffic", text_table.format_bytes(report["traffic_bytes"])),
        *(
            (kind, f"{t['count']:,} times, {text_table.format_bytes(t['received_bytes'])} received")
            for kind, t in report["collectives"].items()
        ),
    ]
    if roof:
        parts = ", ".join(
            f"{name} {roof[f'{name}_seconds'] * 1e3:,.1f}"
            for name in ("compute", "memory", "network")
        )
        least = f"{roof['step_seconds'] * 1e3:,.1f} ms ({parts}): {roof['binds']} binds"
        rows.append(("step, at least", least))
    if report["compiler_seconds"]:
        rows.append(
            ("step, sum of the compiler's estimates", f"{report['compiler_seconds'] * 1e3:,.1f} ms")
        )
    if roof:
        rows.append(("run, at least", f"{run['days']:,.2f} days for {run['steps']:,} steps"))
        rows.append((f"run, at {run['mfu']:.0%} of the peak", f"{run['days_at_mfu']:,.2f} days"))
    return "\n\n".join(
        [text_table.text_table(rows, ("a device and step", "how much")), _traffic(report)]
    )


def _traffic(report: dict[str, Any]) -> str:
    """The largest shares of the memory traffic."""
    parts, total = report["traffic_parts"], report["traffic_bytes"]
    large = [(part, moved) for part, moved in parts.items() if moved >= 0.01 * total][:_MOST_PARTS]
    rest = total - sum(moved for _, moved in large)
    rows = [*large, (f"{len(parts) - len(large)} more", rest)] if len(large) < len(parts) else large
    return text_table.text_table(
        [(part, text_table.format_bytes(moved), f"{moved / total:.1%}") for part, moved in rows],
        ("memory traffic of", "size", "share"),
    )


def excess_flops(report: dict[str, Any]) -> str:
    """The excess memory of a program, as text."""
    if not report["over_bytes"] > 0:
        return f"the compiler ran out of {text_table.format_bytes(report['limit_bytes'])} a device"
    return (
        f"{text_table.format_bytes(report['peak_bytes'])} of"
        f" {text_table.format_bytes(report['limit_bytes'])} a device,"
        f" {text_table.format_bytes(report['over_bytes'])} too much"
    )


def attempt_table(rows: Sequence[dict[str, Any]]) -> str:
    """The table of attempts of --largest-batch or --suggest."""
    return text_table.text_table(
        [_cells(row) for row in rows], ("tried", "fits", "peak or wanted", "FLOPs over the model's")
    )


def attempt_row(row: dict[str, Any]) -> str:
    """One attempt as a line of the log.

    >>> row = {"tried": "8 images", "fits": True, "peak_bytes": 3 * 2**30, "seconds": 90.4}
    >>> print(attempt_row(row | {"flops_ratio": 1.0156}))
    8 images: fits, 3.00 GiB, FLOPs 1.016 times the model's; 90 s
    """
    name, _, size, ratio = _cells(row)
    result = (
        f"fits, {size}, FLOPs {ratio} times the model's" if row["fits"] else f"does not fit, {size}"
    )
    return f"{name}: {result}; {row['seconds']:.0f} s"


def _cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    size = text_table.format_bytes(row["peak_bytes"]) if row["peak_bytes"] else "?"
    ratio = f"{row['flops_ratio']:.3f}" if row["flops_ratio"] else "-"
    return row["tried"], "yes" if row["fits"] else "no", size, ratio
