"""What a compiled train step needs and costs on the devices it was compiled for: `compile.json` and
the table that is printed.

compile.json, version 1 (bytes, seconds and FLOPs are of one device and one step unless the name
says otherwise):

    version topology chip devices mesh             what was compiled for; mesh is {axis: devices}
    batch_size batch_per_device microbatches       images (mixed views); batch_per_device is of a
    data shard fits peak_bytes limit_bytes over_bytes         over_bytes: peak over limit, 0 if it
    fits memory                                         {part: bytes}, which sum to peak_bytes;
    parts: params moments target other (the state), batch, temporaries. Empty if the compiler did
    not say what it wanted
    residual_bytes peak_ratio                      what lives from a forward pass to its backward:
                                                   the encoder and the dearer of the two groups of
                                                   losses, by what model.remat keeps, of one
                                                   microbatch; with several also views and targets
                                                   of the others, and the sum of gradients. A part
                                                   of the temporaries. And peak_bytes over state,
                                                   batch and that: 1 were a perfect compiler
    flops                                          {compiled, asked, model, ratio}: matrix
                                                   operations of a device: of the compiled program;
                                                   of the step without remat; of the model, without
                                                   what microbatches add either, as MFU counts; and
                                                   the first over the second: what is done twice
    collectives                                    {kind: {count, received_bytes}}; those in a loop
    as often as it turns traffic_bytes                                  to and from main memory,
    estimated from the program's text roofline
    {compute_seconds, memory_seconds, network_seconds, step_seconds}; the last, the largest, is what
    a step takes at least; null where nothing is known of the chip. network: links between chips or,
    if that is longer, between hosts of GPUs
    compiler_seconds                               with --code, the sum of the cycles that the TPU
                                                   compiler expects of each instruction; null
                                                   elsewhere
    run                                            {steps, days, days_at_mfu, mfu}: at
    roofline.step_seconds; at report.mfu of the peak compile_seconds
    what lowering and compiling took here; for a TPU without --code until memory and operations were
    settled
    assumed                                        what only the data would know largest_batch tried
    of --largest-batch: images a data shard, or null; each attempt of it or of --suggest
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from m3i_jax.profiling import flops as operations
from m3i_jax.profiling import hardware, hbm_traffic, hlo
from m3i_jax.reporting import text_table

VERSION = 1
STATE = ("params", "moments", "target", "other")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramMemory:
    """Bytes of a device. parts: {part: bytes}, which sum to peak."""

    peak: float
    parts: dict[str, float]


def program_memory(
    stats: Any, state: dict[str, float], batch: float, *, own: bool = False
) -> ProgramMemory:
    """The memory of a program from the compiler's statistics.

    Args: stats: what `compiled.memory_analysis()` returns. state: {part of the state: bytes of a
      device}, from shapes. batch: bytes of a device's share of the batch. own: take the compiler's
      own peak, arguments included, as of a TPU's: temporaries of loops that take each other's place
      are in the sum of its other numbers twice. Once there is code, the gaps between arrays are not
      in it.

    Elsewhere arguments, results that do not take their place, and temporaries are taken to live
    together. Padding of tiled layouts is a temporary."""
    whole = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
    )
    if own:
        whole = stats.peak_memory_in_bytes or whole
    parts = dict(state) | {"batch": batch}
    return ProgramMemory(peak=whole, parts=parts | {"temporaries": whole - sum(parts.values())})


def parse_out_of_memory(message: str) -> tuple[float, float] | None:
    """(bytes that a program wanted, bytes that there are) from a compiler's out-of-memory error;
    None if it is another error.

    >>> parse_out_of_memory("Ran out of memory on HBM, the total memory required for HLO temporaries (640.00G) exceeds available HBM (15.75G).")
    (687194767360.0, 16911433728.0)
    >>> parse_out_of_memory("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeds hbm capacity by 4.75G.")
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
        if found := re.search(pattern, message, re.IGNORECASE):
            return (
                float(found[1]) * _UNITS[found[2].upper()],
                float(found[3]) * _UNITS[found[4].upper()],
            )
    return float("nan"), float("nan")


def analyze_program(text: str, *, chip: str, cores: int = 1, host: int = 0) -> dict[str, Any]:
    """The entries of compile.json that the program's text decides: flops.compiled, collectives,
    traffic_bytes, roofline, compiler_seconds.

    Args:
      text: `compiled.as_text()`.
      chip: a key of hardware.CHIPS, or another name of which nothing is known.
      cores: devices a chip, which share its peak.
      host: devices of a host, between which the chip's links run; 0: they run between all.
    """
    program = hlo.parse_hlo(text)
    moved, found, done = (
        hbm_traffic.hbm_traffic(program),
        hlo.collective_traffic(program, host),
        hlo.hlo_flops(program),
    )
    out: dict[str, Any] = {
        "flops": {"compiled": done},
        "collectives": {
            kind: {"count": t.count, "received_bytes": t.received}
            for kind, t in sorted(found.items())
        },
        "traffic_bytes": moved,
        "roofline": None,
        "compiler_seconds": None,
    }
    if chip in hardware.CHIPS:
        card = hardware.CHIPS[chip]
        times = {
            "compute_seconds": done / card.peak * cores,
            "memory_seconds": moved / card.bandwidth * cores,
            "network_seconds": max(
                sum(t.received for t in found.values()) / card.link * cores,
                sum(t.outside for t in found.values()) / card.network if card.network else 0.0,
            ),
        }
        out["roofline"] = times | {"step_seconds": max(times.values())}
        cycles = sum(
            times * int(hit[1])
            for times, each, fused in hlo.executed_counts(program)
            if not fused and (hit := _CYCLES.search(each.text))
        )
        out["compiler_seconds"] = cycles / card.clock if cycles and card.clock else None
    return out


def report_tables(report: dict[str, Any]) -> str:
    """A report as a person reads it."""
    peak, limit = report["peak_bytes"], report["limit_bytes"]
    verdict = (
        f"fits: {peak / limit:.0%} of {text_table.format_bytes(limit)} a device"
        if report["fits"]
        else f"does not fit: {excess_flops(report)}"
    )
    mesh = ", ".join(f"{axis} {n}" for axis, n in report["mesh"].items())
    of = f"{report['batch_size']:,} images a step, {report['batch_per_device']:,} a data shard"
    told = [
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
        told += [
            text_table.text_table(
                [*rows, ("all", text_table.format_bytes(peak), "100.0%")],
                ("memory of a device", "size", "share"),
            ),
            "",
        ]
    if "peak_ratio" in report:
        kept = text_table.format_bytes(report["residual_bytes"])
        told += [
            (
                f"{kept} of it wait for the backward pass; all is {report['peak_ratio']:.2f} times"
                " state, batch and those"
            ),
            "",
        ]
    if "flops" in report:
        told += [_costs(report), ""]
    return "\n".join(told)


def _costs(report: dict[str, Any]) -> str:
    flops, roof, run = report["flops"], report["roofline"], report["run"]
    rows = [
        (
            "matrix FLOPs",
            f"{operations.format_flops(flops['compiled'])}, {flops['ratio']:.3f} times the model's",
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
        rows.append(("step, at least", f"{roof['step_seconds'] * 1e3:,.1f} ms ({parts})"))
    if report["compiler_seconds"]:
        rows.append(
            ("step, sum of the compiler's estimates", f"{report['compiler_seconds'] * 1e3:,.1f} ms")
        )
    if roof:
        rows.append(("run, at least", f"{run['days']:,.2f} days for {run['steps']:,} steps"))
        rows.append((f"run, at {run['mfu']:.0%} of the peak", f"{run['days_at_mfu']:,.2f} days"))
    return text_table.text_table(rows, ("a device and step", "how much"))


def excess_flops(report: dict[str, Any]) -> str:
    """By how much a program is too large."""
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
    """One of them as a line, for whoever waits for the rest.

    >>> print(attempt_row({"tried": "8 images", "fits": True, "peak_bytes": 3 * 2**30, "flops_ratio": 1.0156, "seconds": 90.4}))
    8 images: fits, 3.00 GiB, FLOPs 1.016 times the model's; 90 s
    """
    name, _, size, ratio = _cells(row)
    found = (
        f"fits, {size}, FLOPs {ratio} times the model's" if row["fits"] else f"does not fit, {size}"
    )
    return f"{name}: {found}; {row['seconds']:.0f} s"


def _cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    size = text_table.format_bytes(row["peak_bytes"]) if row["peak_bytes"] else "?"
    ratio = f"{row['flops_ratio']:.3f}" if row["flops_ratio"] else "-"
    return row["tried"], "yes" if row["fits"] else "no", size, ratio
