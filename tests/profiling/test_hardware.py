"""Chips: what derives from their rows, and the names of their devices."""

import dataclasses

import pytest

from m3i_jax.parallel import chips
from m3i_jax.parallel.chips import CHIPS
from m3i_jax.profiling import compile_report, hardware, topology

# of a chip of each platform: what its row states, beside names
NEEDED = {
    "tpu": "peak memory bandwidth link device_memory scratchpad",
    "cuda": "peak memory bandwidth link network device_memory clock host multiprocessors"
    " fp32_units capability shared shared_of_block cache reported_bandwidth",
}


@pytest.mark.parametrize("kind", CHIPS)
def test_a_row_states_what_its_platform_needs(kind: str) -> None:
    chip = CHIPS[kind]
    missing = [name for name in NEEDED[chip.platform].split() if not getattr(chip, name) > 0]
    assert not missing and chip.slices and (chip.sides > 1) == (chip.platform == "tpu")
    assert hardware.find_chip(chip.device_kind, chip.cores) == (kind, chip.peak, 1)
    # the capacity of the maker's table, and what a program is left of it, in bytes of a chip
    assert 0.85 < chip.usable * chip.cores / chip.memory < 1.01


@pytest.mark.parametrize("kind", [kind for kind, chip in CHIPS.items() if chip.clock])
def test_a_peak_is_that_of_the_matrix_units(kind: str) -> None:
    """Multiply-adds a cycle: of a TPU's matrix units of 128 x 128 or 256 x 256, and of the tensor
    cores of a multiprocessor by compute capability (dense, bf16). A GPU's clock is its boost, above
    that of the maker's peak."""
    of_tpus = {"v4": 8 * 128**2, "v5e": 4 * 128**2, "v5p": 8 * 128**2, "v6e": 4 * 256**2}
    chip = CHIPS[kind]
    units = (
        of_tpus.get(kind) or chip.multiprocessors * {8: 1024, 9: 2048, 10: 4096}[chip.capability]
    )
    low = 0.99 if chip.platform == "tpu" else 0.9
    assert low < chip.peak / (2 * units * chip.clock) < 1.01


def test_a_new_chip_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TPU of the future, by its row alone; tables that are made when their modules are imported
    are made again here."""
    new = dataclasses.replace(
        CHIPS["v6e"], device_kind="TPU v99", other_kinds="", peak=1e18, cloud="v99pod", most=64
    )
    monkeypatch.setitem(CHIPS, "v99", new)
    monkeypatch.setitem(topology.FAMILIES, "v99", new)
    monkeypatch.setitem(topology.CLOUD, "v99pod", "v99")
    assert hardware.find_chip("TPU v99", 4) == ("v99", 1e18, 4)
    assert topology.parse_topology("v99:2x4").devices == 8
    assert topology.parse_topology("v99pod-64").shape == (8, 8)
    assert hardware.training_days(86_400e18, kind="v99", chips=1, mfu=1) == 1
    assert compile_report.analyze_program("", chip="v99")["roofline"]["compute_seconds"] == 0


def test_kernels_count_on_the_least_scratchpad() -> None:
    """That of a TensorCore of v4; the limits that kernels had before there were rows."""
    from m3i_jax.models import dcnv3_tpu, dcnv3_window_plan, intern_image_layer

    assert chips.LEAST_SCRATCHPAD == 16 * 2**20
    assert (dcnv3_tpu._BYTES, dcnv3_window_plan._BYTES) == (29 * 2**19, 12 * 2**20)
    assert intern_image_layer.GRADIENTS == 96 * 2**20


@pytest.mark.parametrize(
    ("kind", "chip"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", None),  # a reduced edition has another peak
        ("cpu", None),
    ],
)
def test_the_chip_of_a_device(kind: str, chip: str | None) -> None:
    peak = hardware.find_chip(kind, 4)
    assert (peak and peak.name) == chip
    if peak:
        assert (peak.flops, peak.chips) == (CHIPS[peak.name].peak, 4)


@pytest.mark.parametrize("name", [name for name, *_ in hardware.SLICES])
def test_a_named_slice_is_a_topology(name: str) -> None:
    """The names of the table of days are those that --topology takes and Google Cloud has."""
    (chips_of,) = (count for each, _, count in hardware.SLICES if each == name)
    assert topology.parse_topology(name).chips == chips_of
