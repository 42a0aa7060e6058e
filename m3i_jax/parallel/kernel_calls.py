"""The calls of kernels that traced programs contain, and which of them a run trusts.

The code that chooses between a kernel and the plain form describes the call by a `KernelCall` and
asks `trusted` (`parallel/mesh.py`) while it is traced. That notes the call, whatever the model, and
`parallel/kernel_checks.py` checks it on the device before the program is compiled."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from m3i_jax.errors import UserError

KERNELS = "M3I_JAX_KERNELS"  # environment variable
PLATFORMS = ("tpu", "gpu")  # that have kernels
_SETTINGS = ("check", "0", "1")


class KernelCall(NamedTuple):
    """One call of a kernel on one device, and what it must equal.

    Attributes:
      name: of the kernel.
      static: what does not change while a program runs; its repr is the same in every process.
      kernel: `kernel(static, *arrays)`, rows [B, ...] of trees of arrays to rows.
      plain: the same in plain JAX, row for row, for float32.
      arrays: shapes and types.
      bounds: (lowest, highest) of the random numbers that try the call, for every leaf of arrays.
    """

    name: str
    static: Any
    kernel: Callable[..., Any]
    plain: Callable[..., Any]
    arrays: tuple[Any, ...]
    bounds: tuple[tuple[float, float], ...]

    @property
    def shapes(self) -> str:
        """Shapes and types for people.

        >>> row = jax.ShapeDtypeStruct((2, 3), "bfloat16")
        >>> KernelCall("sum", 1, max, max, (row, None), ((-1, 1),)).shapes
        '2x3 bfloat16'
        """
        leaves = jax.tree.leaves(self.arrays)
        return ", ".join(f"{'x'.join(map(str, leaf.shape))} {leaf.dtype}" for leaf in leaves)

    @property
    def key(self) -> str:
        """What is the same for equal calls in every process."""
        return f"{self.name} {self.static!r} {self.shapes} {jax.tree.structure(self.arrays)}"


_pending: dict[str, KernelCall] = {}  # traced and not checked
_settled: dict[str, bool] = {}  # whether the kernel is used


def kernel_setting() -> str:
    """`check`: kernels are used where the device computes the plain form's values with them; 0:
    never; 1: always.

    Raises:
      UserError: M3I_JAX_KERNELS has another value.

    >>> kernel_setting()
    'check'
    """
    setting = os.environ.get(KERNELS) or "check"
    if setting not in _SETTINGS:
        raise UserError(
            f"{KERNELS}={setting}: is not one of {', '.join(_SETTINGS)}; check compares every"
            " kernel with the plain form on the device, 0 uses none, 1 uses them unchecked"
        )
    return setting


def ask(call: KernelCall) -> bool:
    """Whether a program may contain this call. A call that was not checked is noted, and may: a
    `Program` checks it before it is compiled. What is compiled otherwise, such as encoders of
    `m3i_jax.load` and exported files, contains calls that no `Program` of the process checked."""
    setting = kernel_setting()
    if setting == "check" and call.key not in _settled:
        _pending[call.key] = call
    if setting != "check":
        return setting == "1"
    return _settled.get(call.key, True)


def take_pending() -> list[KernelCall]:
    """The noted calls, which are forgotten."""
    calls = list(_pending.values())
    _pending.clear()
    return calls


def settle(key: str, used: bool) -> None:
    """Answer later questions about a call."""
    _settled[key] = used


def forget_all() -> None:
    """As in a new process."""
    _pending.clear()
    _settled.clear()
