"""FLOPs of matrix products and convolutions, counted on the traced program without compilation.

The body of a scan counts once per iteration, the program of a device once per device. (XLA's cost
analysis counts the body of a scan once, and a partitioned program on one device.) Without loops, on
one device, the numbers are XLA's. The number of iterations of a while loop depends on the data; its
code states the expected one by `jax.named_scope("turns=3")`. Products that are no work of the
model, such as reading a map by matrices of mostly zeros, are in `jax.named_scope("flops=0")`."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

_TURNS = re.compile(r"turns=(\d+)")
_STATED = re.compile(r"flops=(\d+)")


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """dot, conv: FLOPs of matrix products and of convolutions, two per multiply-add."""

    dot: float = 0.0
    conv: float = 0.0

    @property
    def total(self) -> float:
        return self.dot + self.conv

    def __add__(self, other: "FlopCount") -> "FlopCount":
        return FlopCount(self.dot + other.dot, self.conv + other.conv)

    def times(self, factor: float) -> "FlopCount":
        return FlopCount(self.dot * factor, self.conv * factor)


def count_flops(function: Callable[..., Any], *arguments: Any) -> FlopCount:
    """FLOPs of one call, for arrays or jax.ShapeDtypeStructs. Products whose result is unused do
    not count, as no compiler runs them; of the branches of a condition, the most expensive counts.

    Raises:
      ValueError: matrix products in a while loop that does not state its number of iterations.

    >>> import jax.numpy as jnp
    >>> count_flops(lambda a, b: a @ b, jnp.zeros((2, 3)), jnp.zeros((3, 4)))
    FlopCount(dot=48.0, conv=0.0)
    """
    closed = jax.make_jaxpr(function)(*arguments)
    return _count(closed.jaxpr, [True] * len(closed.jaxpr.outvars))


def kernel_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """FLOPs that the Pallas kernels of one call compute by their own estimates, also those that are
    no work of the model."""
    return _estimates(jax.make_jaxpr(function)(*arguments).jaxpr)


def _estimates(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "pallas_call":
            total += float(params["cost_estimate"].flops) if params.get("cost_estimate") else 0.0
        else:
            total += sum(map(_estimates, _programs(params))) * _repeats(name, params)
    return total


def format_flops(flops: float) -> str:
    """Four figures and a prefix.

    >>> format_flops(279.5e9), format_flops(48)
    ('279.5 GFLOP', '48 FLOP')
    """
    power = min(max(int(math.log10(flops)) // 3, 0), 6) if flops >= 1 else 0
    return f"{flops / 1000**power:.4g} {('', 'k', 'M', 'G', 'T', 'P', 'E')[power]}FLOP"


def _count(jaxpr: Any, used: Sequence[bool]) -> FlopCount:
    """FLOPs of the equations that a used output needs, counted from the last to the first."""
    live = {
        v for v, u in zip(jaxpr.outvars, used, strict=True) if u and not isinstance(v, core.Literal)
    }
    total = FlopCount()
    for equation in reversed(jaxpr.eqns):
        outputs_used = [v in live for v in equation.outvars]
        if not any(outputs_used) and not equation.effects:
            continue
        total += _equation(equation, outputs_used)
        live |= {v for v in equation.invars if not isinstance(v, core.Literal)}
    return total


def _equation(equation: Any, used: list[bool]) -> FlopCount:
    name, params = equation.primitive.name, equation.params
    stated = _STATED.findall(str(equation.source_info.name_stack))
    if stated and not int(stated[-1]):
        return FlopCount()
    if name == "dot_general":
        (contract, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return FlopCount(
            dot=2.0
            * math.prod(equation.outvars[0].aval.shape)
            * math.prod(left[d] for d in contract)
        )
    if name == "conv_general_dilated":
        return FlopCount(conv=2.0 * _convolution(equation))
    if name == "pallas_call" and params.get("cost_estimate"):
        # A kernel's estimate leaves out products that it discards; jax.named_scope("flops=N")
        # states the FLOPs of the model.
        return FlopCount(dot=float(stated[-1] if stated else params["cost_estimate"].flops))
    is_loop = name in ("scan", "while")  # an iteration needs all outputs of the one before
    inner = [
        _count(p, used if len(p.outvars) == len(used) and not is_loop else [True] * len(p.outvars))
        for p in _programs(params)
    ]
    if name == "while" and any(f.total for f in inner):
        turns = _TURNS.findall(str(equation.source_info.name_stack))
        if not turns:
            raise ValueError(
                "matrix products in a while loop, whose number of iterations is unknown; use"
                ' lax.scan, or state it by jax.named_scope("turns=N")'
            )
        return sum(inner, FlopCount()).times(float(turns[-1]))
    if name == "cond":
        return max(inner, key=lambda f: f.total)
    return sum(inner, FlopCount()).times(_repeats(name, params))


def _programs(value: Any) -> list[Any]:
    """All programs inside an equation's parameters, under any name."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return [program for item in value for program in _programs(item)]
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []


def _repeats(name: str, params: dict[str, Any]) -> float:
    if name == "scan":
        return params["length"]
    if name == "shard_map":  # the program of one device along the manual axes
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return 1


def _convolution(equation: Any) -> float:
    """Multiply-adds with elements of the input, without those with padding and with the zeros of a
    dilation."""
    params, dims = equation.params, equation.params["dimension_numbers"]
    left, kernel = (v.aval.shape for v in equation.invars)
    out = equation.outvars[0].aval.shape
    macs = float(out[dims.out_spec[0]] * out[dims.out_spec[1]] * kernel[dims.rhs_spec[1]])
    for i in range(len(dims.out_spec) - 2):
        size, taps, places = (
            left[dims.lhs_spec[i + 2]],
            kernel[dims.rhs_spec[i + 2]],
            out[dims.out_spec[i + 2]],
        )
        at = np.arange(places)[:, None] * params["window_strides"][i] - params["padding"][i][0]
        at = at + np.arange(taps) * params["rhs_dilation"][i]
        hole = params["lhs_dilation"][i]
        macs *= int(((at >= 0) & (at <= (size - 1) * hole) & (at % hole == 0)).sum())
    return macs
