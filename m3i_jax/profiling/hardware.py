"""Accelerators: their peaks and memories, the chip that a JAX device is, named slices, and the days
of a run on each at a given model FLOP utilisation."""

import dataclasses
import re
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip.

    Attributes:
      peak: dense bf16 FLOP/s.
      memory: bytes of HBM.
      bandwidth: bytes a second to and from HBM.
      link: bytes a second received from other chips over all links; for a GPU, of its host.
      usable: bytes that a program may use on a device (tpu7x has two devices a chip); 0: all.
      clock: cycles a second of the matrix units; 0: unknown.
      network: bytes a second that a GPU receives from other hosts.
    """

    peak: float
    memory: float
    bandwidth: float
    link: float
    usable: float = 0.0
    clock: float = 0.0
    network: float = 0.0


# TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, "peak compute per chip (bf16)", "HBM
# capacity", "HBM bandwidth", and half of "bidirectional inter-chip interconnect bandwidth"; usable
# is what libtpu 0.0.42 states when it refuses a program; clock is the peak over the multiply-adds
# of the matrix units. GPUs: NVIDIA's data sheets of A100, H100 and H200 (SXM) and of the HGX B200;
# peak dense, which is half of the figure with sparsity, link half of NVLink's total; usable nine
# tenths of what CUDA reports, which JAX takes with XLA_PYTHON_CLIENT_MEM_FRACTION=.9; network is
# one adapter per GPU, of 200 Gb/s in the data sheet of the DGX A100 and of 400 Gb/s in those of the
# DGX H100, H200 and B200.
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1200e9, 300e9, 30.75 * 2**30, 1.05e9),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9, 15.75 * 2**30, 1.5e9),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9, 95.74 * 2**30, 1.75e9),
    "v6e": Chip(918e12, 32 * 2**30, 1600e9, 400e9, 31.25 * 2**30, 1.75e9),
    "tpu7x": Chip(2307e12, 192 * 2**30, 7380e9, 600e9, 94.75 * 2**30),
    "a100": Chip(312e12, 80e9, 2039e9, 300e9, 0.9 * 85_100_068_864, network=25e9),
    "h100": Chip(989e12, 80e9, 3350e9, 450e9, 0.9 * 84_942_979_072, network=50e9),
    "h200": Chip(989e12, 141e9, 4800e9, 450e9, 0.9 * 150_754_820_096, network=50e9),
    "b200": Chip(2250e12, 180e9, 7700e9, 900e9, 0.9 * 191_514_411_008, network=50e9),
}

# Patterns of `device_kind` of JAX's devices. A reduced edition of a GPU has another peak and is not
# listed.
_NAMES = (
    (r"TPU v4", "v4"),
    (r"TPU (v5 ?lite|v5e)", "v5e"),
    (r"TPU (v5p?)", "v5p"),
    (r"TPU (v6 ?lite|v6e)", "v6e"),
    (r"TPU ?(7x|v7x?)", "tpu7x"),
    (r"NVIDIA A100[- ].*", "a100"),
    (r"NVIDIA H100 80GB HBM3", "h100"),
    (r"NVIDIA H200", "h200"),
    (r"NVIDIA B200", "b200"),
)
_DEVICES = {"tpu7x": 2}  # JAX devices a chip, where they are not the same

# (name to order by, kind of chip, chips). v4 and v5p are ordered by cores, two a chip; the
# others by chips.
SLICES = (
    ("v4-32", "v4", 16),
    ("v5e-16", "v5e", 16),
    ("v5e-64", "v5e", 64),
    ("v5e-256", "v5e", 256),
    ("v5p-32", "v5p", 16),
    ("v5p-128", "v5p", 64),
    ("v6e-64", "v6e", 64),
    ("v6e-256", "v6e", 256),
    ("tpu7x-64", "tpu7x", 64),
    ("a100:8", "a100", 8),
    ("h100:1", "h100", 1),
    ("h100:8", "h100", 8),
    ("h200:8", "h200", 8),
    ("b200:8", "b200", 8),
)


class ChipPeak(NamedTuple):
    """name: key of CHIPS. flops: dense bf16 FLOP/s of one chip. chips: their number."""

    name: str
    flops: float
    chips: float


def find_chip(kind: str, devices: int) -> ChipPeak | None:
    """The chip of a `device_kind`, or None if CHIPS does not list it.

    >>> find_chip("TPU v5 lite", 16)
    ChipPeak(name='v5e', flops=197000000000000.0, chips=16.0)
    >>> find_chip("TPU7x", 8).chips, find_chip("cpu", 1), find_chip("NVIDIA H100 PCIe", 1)
    (4.0, None, None)
    """
    for pattern, name in _NAMES:
        if re.fullmatch(pattern, kind, re.IGNORECASE):
            return ChipPeak(name, CHIPS[name].peak, devices / _DEVICES.get(name, 1))
    return None


def training_days(total: float, *, kind: str, chips: int, mfu: float) -> float:
    """Days that `total` FLOPs take on `chips` chips at a model FLOP utilisation of 0..1.

    >>> round(training_days(86_400 * 197e12, kind="v5e", chips=1, mfu=0.5), 6)
    2.0
    """
    return total / (CHIPS[kind].peak * chips * mfu) / 86_400
