"""What the devices of this machine can do: memory, and the speed of products of matrices, of which
accelerators have a published peak and other devices are measured."""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from m3i_jax import parallel
from m3i_jax.profiling import hardware

_SIDE = 512  # of the measured matrices
_SECONDS = 0.2


class Machine(NamedTuple):
    """devices: a few words. memory: bytes that one of them may use. flops: FLOP/s of all together.
    measured: whether that was measured here, or is a published peak."""

    devices: str
    memory: float
    flops: float
    measured: bool


def describe_machine(dtype: str) -> Machine:
    """The devices that a run on this machine would use. Takes less than a second.

    Args:
      dtype: of the products that are measured.

    >>> describe_machine("float32").flops > 0
    True
    """
    devices = jax.devices()
    kind, count = devices[0].device_kind, len(devices)
    memory = parallel.device_memory(parallel.make_mesh((-1, 1, 1), devices))
    if peak := hardware.find_chip(kind, count):
        name = f"{peak.chips:g} x {peak.name}"
        return Machine(name, memory, peak.flops * peak.chips, False)
    # the devices of a CPU share its cores
    scale = 1 if devices[0].platform == "cpu" else count
    return Machine(f"{count} x {kind}", memory, _measured_flops(dtype) * scale, True)


def _measured_flops(dtype: str) -> float:
    """FLOP/s of products of square matrices on the first device."""
    x = jnp.ones((_SIDE, _SIDE), dtype)
    product = jax.jit(lambda a, b: a @ b)
    product(x, x).block_until_ready()
    count, began = 0, time.monotonic()
    while (passed := time.monotonic() - began) < _SECONDS:
        product(x, x).block_until_ready()
        count += 1
    return 2 * _SIDE**3 * count / passed
