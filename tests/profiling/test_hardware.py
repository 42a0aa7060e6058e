"""Chips by the names of their devices."""

import pytest

from m3i_jax.profiling import hardware


def test_every_chip_has_a_device_name() -> None:
    assert {name for _, name in hardware._NAMES} == set(hardware.CHIPS)


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
        assert (peak.flops, peak.chips) == (hardware.CHIPS[peak.name].peak, 4)
