"""Which chip of profiling/hardware.py a device is, so that speed can be set in relation to its
peak."""

import re
from typing import NamedTuple

from m3i_jax.profiling.hardware import CHIPS

# What the devices of JAX call themselves (`device_kind`). A cut-down edition of a GPU has another
# peak and is not listed.
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


class ChipPeak(NamedTuple):
    """name: of the kind of chip. flops: dense bf16 FLOP/s of one chip. chips: how many there
    are."""

    name: str
    flops: float
    chips: float


def find_chip(kind: str, devices: int) -> ChipPeak | None:
    """The chip that a `device_kind` stands for, or None if its peak is not known here.

    >>> find_chip("TPU v5 lite", 16)
    Peak(name='v5e', flops=197000000000000.0, chips=16.0)
    >>> find_chip("TPU7x", 8).chips, find_chip("cpu", 1), find_chip("NVIDIA H100 PCIe", 1)
    (4.0, None, None)
    """
    for pattern, name in _NAMES:
        if re.fullmatch(pattern, kind, re.IGNORECASE):
            return ChipPeak(name, CHIPS[name].peak, devices / _DEVICES.get(name, 1))
    return None
