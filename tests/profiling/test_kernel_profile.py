"""The table of --mode=profile --kernels, of calls that cost nothing."""

import jax
import jax.numpy as jnp
import pytest

from m3i_jax.errors import UserError
from m3i_jax.modes import profile
from m3i_jax.parallel import KernelCall, kernel_calls
from m3i_jax.profiling import hardware, kernel_profile
from tests import toy


def test_the_table_has_times_errors_and_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    row = jax.ShapeDtypeStruct((2, 64), "float32")
    sine = lambda factor, x: factor * jnp.sin(x)
    calls = [
        KernelCall("sine", 2.0, kernel, sine, (row,), ((-1.0, 1.0),))
        for kernel in (sine, lambda factor, x: factor * x)
    ]
    right, wrong = (kernel_profile.profile_call(call, repeats=1) for call in calls)
    assert right.forward > 0 and not right.result.reason and wrong.result.reason
    # x and y; x, the gradient of y, and that of x
    assert right.moved == 5 * 2 * 64 * 4
    timed = right._replace(forward=1e-3, backward=3e-3, moved=4e6, flops=8e9)
    monkeypatch.setattr(
        hardware, "find_chip", lambda kind, devices: hardware.ChipPeak("v5e", 197e12, 1.0)
    )
    lines = kernel_profile.kernel_table([timed, wrong]).splitlines()
    assert lines[0].startswith("cpu; jax ") and lines[1].startswith("kernel ")
    cells = lines[3].split()
    assert cells[:5] == ["sine", "2x64", "float32", "1.000", "3.000"]
    assert cells[-4:] == ["1.0", "0%", "2.00", "1%"]
    assert lines[-1].startswith("sine of 2x64 float32: its outputs are wrong")


def test_a_device_without_kernels_says_so(capsys, monkeypatch) -> None:
    config = toy.settings(objective__forms="supervised")
    kernel_calls.note(KernelCall("sine", 2.0, max, max, (), ()))  # of another program
    assert profile.run(config, workdir="", kernels=True) == 0
    assert "has no kernel on cpu" in capsys.readouterr().out
    monkeypatch.setenv("M3I_JAX_KERNELS", "0")
    with pytest.raises(UserError, match="M3I_JAX_KERNELS=0"):
        profile.run(config, workdir="", kernels=True)
