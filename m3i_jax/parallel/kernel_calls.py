"""The calls of kernels that traced programs contain, and which of them a run trusts.

The code that chooses between a kernel and the plain form describes the call by a `KernelCall` and
asks `trusted` (`parallel/mesh.py`) while it is traced, whatever the model. Where a `Program` is
traced, that notes the call, and `parallel/kernel_checks.py` checks it on the device before the
program is compiled, with the other hosts. Elsewhere, as in a function that a caller jits, it is
checked at once; several hosts, which cannot agree there, use the plain form."""

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterator
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
        """The key of a call: equal calls have the same in every process."""
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


_noted = contextvars.ContextVar("noted", default=False)
_excluded = contextvars.ContextVar("excluded", default=False)


@contextlib.contextmanager
def noted_calls() -> Iterator[None]:
    """Note calls that were not checked, which are assumed to be right, for `take_pending`."""
    before = _noted.set(True)
    try:
        yield
    finally:
        _noted.reset(before)


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Trace no kernels: for a program that runs on other platforms, too.

    >>> with without_kernels():
    ...     excluded()
    True
    """
    before = _excluded.set(True)
    try:
        yield
    finally:
        _excluded.reset(before)


def is_noted() -> bool:
    """Whether this is within `noted_calls`."""
    return _noted.get()


def excluded() -> bool:
    """Whether this is within `without_kernels`."""
    return _excluded.get()


def answer(call: KernelCall) -> bool | None:
    """Whether a program may contain this call, None if that was not checked."""
    setting = kernel_setting()
    return _settled.get(call.key) if setting == "check" else setting == "1"


def note(call: KernelCall) -> None:
    """Keep a call that was not checked, for `take_pending`."""
    _pending[call.key] = call


def take_pending() -> list[KernelCall]:
    """The noted calls, which are forgotten."""
    calls = list(_pending.values())
    _pending.clear()
    return calls


def settle(key: str, used: bool) -> None:
    """Answer later questions about a call."""
    _settled[key] = used


def forget_all() -> None:
    """Forget all notes and answers; a new process has none."""
    _pending.clear()
    _settled.clear()
