"""Kernels by themselves on this device: time, error, and what they reach of its peaks."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from m3i_jax.errors import one_line
from m3i_jax.parallel import KernelCall, kernel_checks
from m3i_jax.parallel.chips import CHIPS
from m3i_jax.profiling import flops, hardware
from m3i_jax.reporting import text_table

HEADERS = (
    "kernel", "arrays", "forward, ms", "backward, ms", "error", "of gradients", "GB/s",
    "of the peak", "TFLOP/s", "of the peak",
)  # fmt: skip


class KernelProfile(NamedTuple):
    """Time, error and traffic of one call of a kernel on this device.

    Attributes:
      call: the call.
      result: of its comparison with the plain form.
      forward, backward: seconds; 0: it could not run.
      moved: bytes that it cannot avoid, its inputs and outputs in both directions.
      flops: that it computes in both; 0: it does not say.
    """

    call: KernelCall
    result: kernel_checks.KernelResult
    forward: float = 0.0
    backward: float = 0.0
    moved: float = 0.0
    flops: float = 0.0


def profile_call(call: KernelCall, repeats: int = 20) -> KernelProfile:
    """Compare a call with the plain form, and time it, outside of a mesh."""
    result = kernel_checks.check_call(call)
    run = functools.partial(call.kernel, call.static)
    both = functools.partial(kernel_checks.value_and_gradients, call.kernel, call.static)
    try:
        arrays = kernel_checks.draw_arrays(call)
        forward, out = _seconds(jax.jit(run), arrays, repeats)
        g = jnp.ones_like(out)
        total, found = _seconds(jax.jit(both), (arrays, g), repeats)
    except Exception as error:  # of the compiler or of the device, whose errors have many types
        reason = result.reason or f"fails ({one_line(error)[:300]})"
        return KernelProfile(call, dataclasses.replace(result, reason=reason))
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((arrays, out))]
    more = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((arrays, g, found[1]))]
    return KernelProfile(
        call,
        result,
        forward=forward,
        backward=max(total - forward, 0.0),
        moved=float(sum(sizes) + sum(more)),
        flops=flops.kernel_flops(both, arrays, g),
    )


def _seconds(
    run: Callable[..., Any], arguments: tuple[Any, ...], repeats: int
) -> tuple[float, Any]:
    """(shortest mean time of a call over three rounds, what it returns)."""
    out = jax.block_until_ready(run(*arguments))  # compiles
    rounds = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(repeats):
            out = run(*arguments)
        jax.block_until_ready(out)
        rounds.append((time.perf_counter() - start) / repeats)
    return min(rounds), out


def kernel_table(profiles: Sequence[KernelProfile]) -> str:
    """The table of profiles, with device and versions, to be pasted into a report; what fails is
    below it."""
    device = jax.local_devices()[0]
    peak = hardware.find_chip(device.device_kind, 1)
    bandwidth = CHIPS[peak.name].bandwidth * peak.chips if peak else 0.0
    compute = peak.flops * peak.chips if peak else 0.0
    rows = []
    for each in profiles:
        seconds = each.forward + each.backward
        rates = ["-"] * 4
        if seconds:
            rates = [
                f"{each.moved / seconds / 1e9:,.1f}",
                f"{each.moved / seconds / bandwidth:.0%}" if bandwidth else "-",
                f"{each.flops / seconds / 1e12:,.2f}" if each.flops else "-",
                f"{each.flops / seconds / compute:.0%}" if compute and each.flops else "-",
            ]
        rows.append(
            (
                each.call.name,
                each.call.shapes,
                f"{each.forward * 1e3:.3f}" if seconds else "-",
                f"{each.backward * 1e3:.3f}" if seconds else "-",
                f"{each.result.forward:.1e}",
                f"{each.result.gradients:.1e}",
                *rates,
            )
        )
    wrong = [
        f"{each.call.name} of {each.call.shapes}: {each.result.reason}"
        for each in profiles
        if each.result.reason
    ]
    table = text_table.text_table(rows, HEADERS)
    return "\n".join([kernel_checks.device_text(), table, *wrong])
