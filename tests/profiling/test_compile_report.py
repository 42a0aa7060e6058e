"""The report of a compiled step: parts that sum, a compiler's out-of-memory error, times from a
chip's figures, tables."""

import json
import math
import re
import types

import pytest

from m3i_jax.parallel.chips import CHIPS
from m3i_jax.profiling import compile_report
from tests.profiling.test_hlo import LOOP

STATE = {"params": 40.0, "moments": 80.0, "target": 30.0, "other": 2.0}


def stats(**bytes_: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(**{f"{name}_size_in_bytes": n for name, n in bytes_.items()})


def test_parts_sum_to_the_peak_and_results_in_place_count_once() -> None:
    need = compile_report.program_memory(
        stats(argument=170, output=162, alias=152, temp=100), STATE, 10.0
    )
    assert need.peak == 170 + 10 + 100 == sum(need.parts.values())
    # the padding of arguments, 8, and new results, 10, among them
    assert need.parts["temporaries"] == 280 - 152 - 10


def test_the_peak_of_a_compiler_that_refuses_by_it_is_believed() -> None:
    through = types.SimpleNamespace(
        **vars(stats(argument=170, output=162, alias=152, temp=100)), peak_memory_in_bytes=230
    )
    for own, peak in ((True, 230), (False, 280)):
        need = compile_report.program_memory(through, STATE, 10.0, own=own)
        assert need.peak == peak == sum(need.parts.values())


@pytest.mark.parametrize(
    ("message", "asked"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO"
            " temporaries (45.75G) exceeds available HBM (15.75G).",
            (45.75 * 2**30, 15.75 * 2**30),
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space"
            " hbm. Used 16.25G of 15.75G hbm. Exceeds",
            (16.25 * 2**30, 15.75 * 2**30),
        ),
        (
            "Ran out of memory in memory space hbm. Used 512.0M of 100.5M hbm.",
            (512 * 2**20, 100.5 * 2**20),
        ),
        ("INVALID_ARGUMENT: sharding", None),
    ],
)
def test_what_a_compiler_wanted(message: str, asked: tuple[float, float] | None) -> None:
    assert compile_report.parse_out_of_memory(message) == asked


def test_an_unknown_wording_is_still_out_of_memory() -> None:
    asked = compile_report.parse_out_of_memory("RESOURCE_EXHAUSTED: no room left")
    assert asked and all(map(math.isnan, asked))


def test_times_are_the_chips_and_the_longest_is_the_steps() -> None:
    got, chip = compile_report.analyze_program(LOOP, chip="v5e"), CHIPS["v5e"]
    roof = got["roofline"]
    assert roof["compute_seconds"] == pytest.approx(10 * 2 * 8 * 16 * 16 / chip.peak)
    assert roof["network_seconds"] == pytest.approx((10 * 3 * 128 + 10 * 1.5 * 516) / chip.link)
    assert roof["step_seconds"] == max(
        roof[f"{k}_seconds"] for k in ("compute", "memory", "network")
    )
    assert roof["step_seconds"] == roof[f"{roof['binds']}_seconds"]
    assert sum(got["traffic_parts"].values()) == got["traffic_bytes"]
    assert compile_report.analyze_program(LOOP, chip="tpu7x", cores=2)["roofline"][
        "compute_seconds"
    ] == pytest.approx(2 * 40_960 / CHIPS["tpu7x"].peak)
    assert compile_report.analyze_program(LOOP, chip="cpu")["roofline"] is None


@pytest.mark.parametrize(
    ("groups", "outside"),
    [
        ("{{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}", 0.0),  # within a host
        ("{{0,8},{1,9}}", 1.0),  # one device a host: all that it receives
        ("[8,2]<=[2,8]T(1,0)", 1.0),
        ("mesh['a'=2,'b'=8] {'a'}", 1.0),
        ("[1,16]<=[16]", 8 / 15 / 8),  # the other host's half comes once, through eight adapters
    ],
)
def test_what_crosses_hosts_of_gpus_takes_the_networks_time(groups: str, outside: float) -> None:
    text = f"""HloModule m, num_partitions=16
ENTRY %e (a: bf16[1024]) -> bf16[1024] {{
  %a = bf16[1024]{{0}} parameter(0)
  ROOT %g = bf16[1024]{{0}} all-reduce(%a), replica_groups={groups}
}}
"""
    chip = CHIPS["h100"]
    assert chip.network == 50e9  # 400 Gb/s
    got = compile_report.analyze_program(text, chip="h100", host=8)
    received = got["collectives"]["all-reduce"]["received_bytes"]
    assert got["roofline"]["network_seconds"] == pytest.approx(
        max(received / chip.link, received * outside / chip.network)
    )
    assert compile_report.analyze_program(text, chip="h100")["roofline"][
        "network_seconds"
    ] == pytest.approx(received / chip.link)


def test_the_compilers_cycles_are_summed_with_their_loops() -> None:
    cycles = LOOP.replace(
        'op_name="jit(f)/while/body/dot_general"}',
        'op_name="x"}, backend_config={"estimated_cycles":"1500"}',
    )
    assert compile_report.analyze_program(cycles, chip="v5e")["compiler_seconds"] == pytest.approx(
        10 * 1500 / 1.5e9
    )
    assert compile_report.analyze_program(LOOP, chip="v5e")["compiler_seconds"] is None
    unknown = cycles.replace("1500", str(2**63 - 1))
    assert compile_report.analyze_program(unknown, chip="v5e")["compiler_seconds"] is None


def test_tables_say_what_the_report_says() -> None:
    report = {
        "topology": "v5e:4x4",
        "devices": 16,
        "mesh": {"replica": 2, "fsdp": 8, "tensor": 1},
        "batch_size": 4096,
        "batch_per_device": 256,
        "microbatches": 4,
        "fits": False,
        "peak_bytes": 3 * 2**30,
        "limit_bytes": 2 * 2**30,
        "over_bytes": 2**30,
        "memory": {"params": 2**30, "temporaries": 2**31},
    }
    text = compile_report.report_tables(report)
    assert (
        "does not fit: 3.00 GiB of 2.00 GiB a device, 1.00 GiB too much" in text
        and "replica 2, fsdp 8" in text
    )
    assert [line.split() for line in text.splitlines() if line.startswith("temporaries")] == [
        ["temporaries", "2.00", "GiB", "66.7%"]
    ]
    full = (
        report
        | compile_report.analyze_program(LOOP, chip="v5e")
        | {
            "fits": True,
            "run": {"steps": 10, "days": 0.5, "days_at_mfu": 1.0, "mfu": 0.45},
        }
    )
    full["traffic_parts"] = {"encoder/stage2": 3 * full["traffic_bytes"] / 4, "other": 4.0}
    # of the step as asked for, which may be more than the model: microbatches embed captions twice
    full["flops"] |= {"model": full["flops"]["compiled"] / 1.25, "ratio": 1.024}
    text = compile_report.report_tables(full)
    assert (
        "all-gather" in text
        and "10 times" in text
        and "1.250 times the model's" in text
        and "1.00 days" in text
        and f"): {full['roofline']['binds']} binds" in text
    )
    assert re.search(r"^encoder/stage2 .* 75\.0%$", text, re.MULTILINE) and "\n1 more" in text
    assert json.loads(json.dumps(full)) == full
    rows = [
        {
            "tried": "as configured",
            "fits": False,
            "peak_bytes": None,
            "flops_ratio": None,
            "seconds": 1.0,
        }
    ]
    assert compile_report.attempt_table(rows).splitlines()[-1].split() == [
        "as",
        "configured",
        "no",
        "?",
        "-",
    ]
