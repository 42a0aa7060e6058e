"""Memory traffic of a step, estimated from the traced program without compiling it: for
--mode=show, which has no minutes for a compiler.

A compiler fuses elementwise operations into one pass over memory, so that what a program moves is
what its products, convolutions, kernels, gathers and sorts read and write, and what the passes
between them read and write: a pass makes the input of such an operation, the result of a reduction
or a result of the program of what the last ones left in memory. Reshapes move nothing, and passes
over the same arrays are one. What a compiler merges beyond that, or cannot fuse, is in a factor
for each platform; tests/bench/README.md has what it leaves.

Days by the three resources: `bound_rows`."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from m3i_jax import parallel
from m3i_jax.parallel import kernel_calls
from m3i_jax.parallel.chips import CHIPS
from m3i_jax.profiling import hardware
from m3i_jax.reporting import text_table

# Operations that read their operands from memory and leave their results there.
_WHOLE = (
    "dot_general",
    "conv_general_dilated",
    "pallas_call",
    "sort",
    "top_k",
    "cumsum",
    "cumprod",
)
_SLICED = ("gather", "dynamic_slice", "take")  # which read what they return
_UPDATED = ("scatter", "scatter-add", "scatter_add", "dynamic_update_slice")  # as much as they put
_ALIASES = ("reshape", "squeeze", "expand_dims", "name", "copy", "stop_gradient")
_VIEWS = ("slice", "split")  # parts of an array in memory
# What compiled programs move over the estimate: between those of ViT and of InternImage.
COMPILED = {"tpu": 0.73, "cuda": 1.03}
_SMALL = 2**16  # bytes; what is smaller is not counted
# In a loop within a loop, over chunks of images, a TPU keeps arrays of up to so many bytes in its
# scratchpad; what the loop reads and leaves of each chunk is counted, and weights and their
# gradients for every chunk.
_NEAR = 2**24


class StepTraffic(NamedTuple):
    """Bytes of a step: of an image; of the update of the state; and of the weights on every chip,
    whatever the number of images."""

    image: float
    update: float
    weights: float

    def of_chip(self, images: float, share: float = 1.0, cores: int = 1) -> float:
        """Bytes of a chip that has so many images and that share of the state, which it computes on
        so many devices, each with weights in its own memory.

        >>> traffic = StepTraffic(10.0, 100.0, 20.0)
        >>> traffic.of_chip(4, 0.5), traffic.of_chip(4, 0.5, cores=2)
        (110.0, 130.0)
        """
        return self.image * images + self.update * share + self.weights * cores


def step_traffic(
    function: Callable[..., Any], template: Any, batch: Any, *, images: int, state: float,
    params: int, platform: str,
) -> StepTraffic:  # fmt: skip
    """The traffic of a step, a function of state and batch, on a platform.

    Args:
      template, batch: shapes; of `images` images.
      state: bytes of the state, all of which an update reads and writes, with gradients in four
        bytes.
      params: number of parameters: in four bytes, and in two, and read by three products each.
    """
    update, weights = 2 * state + 8.0 * params, 16.0 * params
    whole = estimate_traffic(function, template, batch, platform=platform)
    factor = COMPILED[platform]
    return StepTraffic(
        factor * max(whole - update - weights, 0.0) / images, update, factor * weights
    )


def estimate_traffic(function: Callable[..., Any], *arguments: Any, platform: str = "tpu") -> float:
    """Bytes that a program moves to and from memory on one device of a platform, tpu or cuda.

    >>> import jax.numpy as jnp
    >>> x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    >>> product = estimate_traffic(lambda a, b: a @ b, x, x) / x.size
    >>> fused = estimate_traffic(lambda a, b: jnp.tanh(2 * a + 1) @ b, x, x) / x.size
    >>> product, fused  # three arrays of four bytes; and one is read and written before
    (12.0, 20.0)
    """
    mesh = parallel.make_mesh((1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh), parallel.assumed_platform(platform), kernel_calls.noted_calls():
        # a new function, as JAX keeps the traces of another platform
        closed = jax.make_jaxpr(lambda *some: function(*some))(*arguments)
    kernel_calls.take_pending()
    return _program(closed.jaxpr, platform)


def _bytes(variable: Any, near: int = _SMALL) -> float:
    shape, dtype = getattr(variable.aval, "shape", ()), getattr(variable.aval, "dtype", None)
    size = math.prod(shape) * int(getattr(dtype, "itemsize", 0))
    return float(size) if size >= near else 0.0


def _of_chunk(each: Any) -> float:
    """Bytes that a turn of a loop reads from memory and leaves there."""
    body = each.params["jaxpr"].jaxpr
    return sum(map(_bytes, [*body.invars, *body.outvars]))


def _is_real(variable: Any) -> bool:
    return not isinstance(variable, core.Literal)


def _program(jaxpr: Any, platform: str, loops: int = 0) -> float:
    total = 0.0
    near = _NEAR if platform == "tpu" and loops > 1 else _SMALL
    size = functools.partial(_bytes, near=near)
    made: dict[Any, Any] = {}  # variable -> equation of a pass
    same: dict[Any, Any] = {}  # variable -> that whose memory it shares
    parts: dict[Any, Any] = {}  # variable -> that of which it is a part
    platforms: dict[Any, Any] = {}

    def origin(variable: Any) -> Any:
        while variable in same:
            variable = same[variable]
        return variable

    stored: dict[Any, None] = {}  # results of passes that are written to memory
    need = lambda variables: stored.update(dict.fromkeys(map(origin, filter(_is_real, variables))))
    for each in jaxpr.eqns:
        name, inner = each.primitive.name, _inner(each.params)
        operands = [origin(v) for v in each.invars if _is_real(v)]
        if name == "platform_index":
            platforms[each.outvars[0]] = each.params["platforms"]
        elif name == "cond":
            need(each.invars)
            known = next((platforms[v] for v in operands[:1] if v in platforms), None)
            total += _branch(each, known, platform, loops)
        elif name in _WHOLE:
            need(each.invars)
            stated = getattr(each.params.get("cost_estimate"), "bytes_accessed", 0)
            whole = sum(map(size, [*dict.fromkeys(operands), *each.outvars]))
            total += whole if near > stated else max(float(stated), whole)
        elif name in _SLICED or name in _UPDATED:
            need(each.invars)
            part = (
                each.outvars[0] if name in _SLICED else each.invars[-1 if "scatter" in name else 1]
            )
            total += 2 * size(part)
        elif inner:
            need(each.invars)
            turns, deeper = (each.params["length"], loops + 1) if name == "scan" else (1, loops)
            of_chunk = _of_chunk(each) if deeper > loops > 0 and platform == "tpu" else 0.0
            total += turns * (of_chunk + sum(_program(p, platform, deeper) for p in inner))
        elif name in _VIEWS and operands and operands[0] not in made:
            parts |= dict.fromkeys(each.outvars, parts.get(operands[0], operands[0]))
        elif name in _ALIASES and len(operands) == 1:
            same |= dict.fromkeys(each.outvars, operands[0])
            platforms |= {
                v: platforms[operands[0]] for v in each.outvars if operands[0] in platforms
            }
        else:
            made |= dict.fromkeys(each.outvars, each)
            if any(v in platforms for v in operands):
                platforms |= {
                    each.outvars[0]: next(platforms[v] for v in operands if v in platforms)
                }
            if name.startswith(("reduce_", "argm")):
                need(each.outvars)
    need(jaxpr.outvars)
    # the results of one equation and all that passes of the same inputs make are one pass
    passes: dict[tuple[Any, ...], float] = {}
    for variable in stored:
        if variable not in made:
            continue
        total += size(variable)
        read = _reads(variable, made, stored, origin)
        passes[tuple(sorted(map(id, read)))] = _together(read, parts, size)
    return total + sum(passes.values())


def _together(read: set[Any], parts: dict[Any, Any], size: Callable[[Any], float]) -> float:
    """Bytes of arrays that a pass reads; of parts of one array, at most the whole."""
    sums: dict[Any, float] = {}
    for each in read:
        whole = parts.get(each, each)
        sums[whole] = min(sums.get(whole, 0.0) + size(each), size(whole))
    return sum(sums.values())


def _reads(variable: Any, made: Any, stored: Any, origin: Any) -> set[Any]:
    """What the pass that makes a variable reads from memory."""
    out: set[Any] = set()
    seen, stack = set(), [variable]
    while stack:
        for each in made[stack.pop()].invars:
            if not _is_real(each) or (each := origin(each)) in seen:
                continue
            seen.add(each)
            if each in made and each not in stored:
                stack.append(each)
            else:
                out.add(each)
    return out


def _inner(params: dict[str, Any]) -> list[Any]:
    found = []
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr", "body_jaxpr"):
        value = getattr(params.get(name), "jaxpr", params.get(name))
        if hasattr(value, "eqns"):
            found.append(value)
    return found


def _branch(each: Any, platforms: Any, platform: str, loops: int) -> float:
    """Of a condition, the branch of the platform or the most expensive."""
    costs = [_program(branch.jaxpr, platform, loops) for branch in each.params["branches"]]
    if platforms and len(platforms) == len(costs):
        of = [i for i, names in enumerate(platforms) if names is None or platform in names]
        return costs[of[0]] if of else costs[-1]
    return max(costs)


def chip_days(
    *, flops: float, traffic: StepTraffic, state: float, params: int, images: int, steps: int,
    kind: str, chips: int, mfu: float, update_flops: float = 0.0, dtype: str = "bfloat16"
) -> dict[str, float]:  # fmt: skip
    """Days of a run by its FLOPs at a share of the peak, and by what memory and network move at
    their peaks.

    Args:
      flops: of a step.
      state: bytes of the state; where a device has no room for it, it is sharded (FSDP), else it
        lies on each.
      params: their number.
      images: of a step.
      update_flops: those of `flops` that every device computes where the state is not sharded.
      dtype: of the products.

    >>> chip_days(
    ...     flops=1e15, traffic=StepTraffic(1e9, 1e9, 0.0), state=1e9, params=10**8, images=512,
    ...     steps=86_400, kind="h100", chips=8, mfu=0.5,
    ... )["memory"]  # of 65 GB a step and chip
    0.0194...
    """
    chip = CHIPS[kind]
    sharded = 3 * state > chip.device_memory
    moved = traffic.of_chip(images / chips, 1 / chips if sharded else chip.cores, chip.cores)
    if not sharded:
        flops += update_flops * (chips * chip.cores - 1)
    # a gradient is reduced and its sum spread; sharded, weights are gathered in two bytes for the
    # forward and for the backward pass, and gradients are reduced
    received = params * (2 + 2 + 4 if sharded else 8)
    times = [received * (1 - 1 / chips) / chip.link]
    if 0 < chip.host < chips:  # between hosts GPUs have no links: all of a host take in once what
        times.append(received * (1 - chip.host / chips) / (chip.host * chip.network))  # others have
    return {
        "FLOPs": hardware.training_days(
            flops * steps, kind=kind, chips=chips, mfu=mfu, dtype=dtype
        ),
        "memory": moved / chip.bandwidth * steps / 86_400,
        "network": max(times) * steps / 86_400,
    }


HEADERS = ("slice", "chips", "memory a chip", "days by FLOPs", "by memory", "by network", "binds")


def bound_rows(
    slices: Sequence[tuple[str, str, int]],
    divides: Callable[[int], bool] = lambda devices: True,
    **run: Any,
) -> list[tuple[str, ...]]:
    """One row a slice, for `text_table.text_table` with HEADERS; without days where a chip has no
    room for its part of the state.

    Args:
      slices: as `hardware.SLICES`.
      divides: whether the batch can be split over so many devices; a row says where it cannot.
      run: of `chip_days`; `traffic` is {platform: StepTraffic}.
    """
    out: list[tuple[str, ...]] = []
    of_platform = run.pop("traffic")
    for name, kind, chips in slices:
        chip = CHIPS[kind]
        memory = text_table.format_bytes(chip.device_memory * chip.cores)
        if run["state"] / chips > chip.usable * chip.cores:
            out.append((name, str(chips), memory, "-", "-", "-", "no room for the state"))
            continue
        days = chip_days(traffic=of_platform[chip.platform], kind=kind, chips=chips, **run)
        shown = [f"{time:,.1f}" if time >= 1 else f"{time:.2f}" for time in days.values()]
        binds = max(days, key=lambda each: days[each])
        if not divides(chips * chip.cores):
            binds += "; batch does not divide"
        out.append((name, str(chips), memory, *shown, binds))
    return out
