"""What derives from the facts of `parallel/chips.py`: the chip that a JAX device is, named slices,
and the days of a run on each at a given model FLOP utilisation."""

import re
from typing import NamedTuple

from m3i_jax.parallel.chips import CHIPS, Chip


def _slice_name(kind: str, chip: Chip, chips: int) -> str:
    """The name to order a slice by; its sides, those of a cube, where no type has a name."""
    if chip.platform == "cuda":
        return f"{kind}:{chips}"
    if chip.cloud:
        return f"{chip.cloud}-{chips * chip.counted}"
    return f"{kind}:{'x'.join([str(round(chips ** (1 / chip.sides)))] * chip.sides)}"


# (name to order by, kind of chip, chips)
SLICES = tuple(
    (_slice_name(kind, chip, chips), kind, chips)
    for kind, chip in CHIPS.items()
    for chips in chip.slices
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
    >>> find_chip("NVIDIA A100-SXM4-40GB", 1).name, find_chip("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 1)
    ('a100', None)
    """
    for name, chip in CHIPS.items():
        patterns = filter(None, (re.escape(chip.device_kind), chip.other_kinds))
        if re.fullmatch("|".join(patterns), kind, re.IGNORECASE):
            return ChipPeak(name, chip.peak, devices / chip.cores)
    return None


def training_days(
    total: float, *, kind: str, chips: int, mfu: float, dtype: str = "bfloat16"
) -> float:
    """Days that `total` FLOPs of products of arrays of a type take on `chips` chips at a model FLOP
    utilisation of 0..1.

    >>> round(training_days(86_400 * 197e12, kind="v5e", chips=1, mfu=0.5), 6)
    2.0
    """
    return total / (CHIPS[kind].peak_of(dtype) * chips * mfu) / 86_400
