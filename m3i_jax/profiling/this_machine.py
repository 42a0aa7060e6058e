"""What the devices of this machine can do: memory, and the speed of products of matrices, of which
accelerators have a published peak and other devices are measured."""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from m3i_jax import parallel
from m3i_jax.parallel.chips import CHIPS
from m3i_jax.profiling import hardware

# Side of the measured matrices, and products of a wait for them: an accelerator is as fast as a
# step on large ones alone, and works while the next are sent.
_MEASURED = {"cpu": (512, 1), "other": (4096, 16)}
_SECONDS = 0.2


class Machine(NamedTuple):
    """devices: a few words. memory: bytes that one of them may use. flops: FLOP/s of all together.
    measured: whether that was measured here, or is a peak, published or of the settings."""

    devices: str
    memory: float
    flops: float
    measured: bool


def describe_machine(dtype: str, peak: float = 0.0) -> Machine:
    """The devices that a run on this machine would use. Takes about a second.

    Args:
      dtype: of the products.
      peak: FLOP/s of one chip, if the settings give it (`report.peak_tflops`).

    >>> describe_machine("float32").flops > 0
    True
    """
    devices = jax.devices()
    kind, count = devices[0].device_kind, len(devices)
    memory = parallel.device_memory(parallel.make_mesh((-1, 1, 1), devices))
    chip = hardware.find_chip(kind, count)
    chips, name = (chip.chips, chip.name) if chip else (count, kind)
    speed = peak or (CHIPS[name].peak_of(dtype) if chip else 0.0)
    if speed:
        return Machine(f"{chips:g} x {name}", memory, speed * chips, False)
    # the devices of a CPU share its cores
    scale, kept = (1, "cpu") if devices[0].platform == "cpu" else (count, "other")
    return Machine(
        f"{count} x {kind}", memory, measured_flops(dtype, *_MEASURED[kept]) * scale, True
    )


def measured_flops(dtype: str, side: int, together: int) -> float:
    """FLOP/s of products of square matrices of a side on the first device, with one wait for so
    many products."""
    x = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a, b: a @ b)
    product(x, x).block_until_ready()
    count, began = 0, time.monotonic()
    while (passed := time.monotonic() - began) < _SECONDS:
        jax.block_until_ready([product(x, x) for _ in range(together)])
        count += together
    return 2 * side**3 * count / passed
