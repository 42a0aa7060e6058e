"""Checks of kernels on the device that will run them, before the program that contains them is
compiled: outputs and gradients at the shapes of the program, against the plain form in float32.

A kernel that is wrong, or that the compiler refuses, is not used: one warning says so, and all
hosts use the plain form, also those on which it was right. Results are kept in the directory of
compiled programs under the kind of device, the versions of JAX and of its compiler, the source of
the kernels, and the shapes, so that a second start does not check again.

What is traced outside a `Program`, such as `m3i_jax.load` and a caller's own `jax.jit`, is checked
while it is traced, on one host. On several, where a process may trace alone what the others do not,
it uses the plain form."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax.errors import one_line
from m3i_jax.parallel import barriers, kernel_calls
from m3i_jax.parallel.kernel_calls import KernelCall

# Largest error, relative to the float32 result, that rounding explains. In their
# interpreter, the kernels for TPUs have at most 0.006 in bfloat16 and 3e-7 in float32.
LIMITS = {"bfloat16": 0.05, "float16": 0.01, "float32": 1e-3}
_LIMIT = 7200.0  # seconds to wait for the slowest host, as for a compilation
_STARTS = 3  # a check that never ended in so many starts has ended the process: not again
_log = logging.getLogger(__name__)
Report = Callable[[str, dict[str, float]], Any]
_report: Report | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelResult:
    """The result of a check.

    Attributes:
      forward, gradients: errors relative to the plain form, the larger of that of the norm and that
        of the worst element; nan if they could not be computed.
      reason: why the kernel is not used, "" if it is.
    """

    forward: float = math.nan
    gradients: float = math.nan
    reason: str = ""

    @property
    def error(self) -> float:
        """The larger error; infinite if one could not be computed."""
        both = self.forward, self.gradients
        return math.inf if any(map(math.isnan, both)) else max(both)


@contextlib.contextmanager
def reported_checks(report: Report) -> Iterator[None]:
    """Report the checks of programs within the block: a line for the log, and values for the
    metrics."""
    global _report
    before, _report = _report, report
    try:
        yield
    finally:
        _report = before


def needed() -> bool:
    """Whether programs of this process may contain kernels.

    >>> needed() and jax.default_backend() == "cpu"
    False
    """
    return jax.default_backend() in kernel_calls.PLATFORMS


def is_right(call: KernelCall) -> bool:
    """Whether the program that is traced may contain a call: within `kernel_calls.noted_calls`, and
    for devices that are not attached, a call that was not checked may; else it is checked now, on
    one host, or not used, on several."""
    known = kernel_calls.answer(call)
    if known is not None:
        return known
    if kernel_calls.is_noted() or not needed():
        kernel_calls.note(call)
        return True
    if barriers.host_names() > 1:
        return False
    start = time.perf_counter()
    result = checked_call(call)
    kernel_calls.settle(call.key, not result.reason)
    _report_checks(
        [call],
        {call.key: result},
        {call.key: result.reason} if result.reason else {},
        time.perf_counter() - start,
    )
    return not result.reason


def settle_kernels(trace: Callable[[], Any]) -> None:
    """Trace a program, and check the calls of kernels in it that were not checked. All hosts call
    this for the same programs in the same order. Where a kernel is refused, all traces are
    forgotten, so that the program is traced again when it is called."""
    with kernel_calls.noted_calls():
        trace()
    calls, start = kernel_calls.take_pending(), time.perf_counter()
    found = dict(zip([call.key for call in calls], map(checked_call, calls), strict=True))
    own = {key: result.reason for key, result in found.items() if result.reason}
    refused = _agreed(own)
    for key in found:
        kernel_calls.settle(key, key not in refused)
    for key in refused:
        kernel_calls.settle(key, False)
    if refused:
        jax.clear_caches()  # of this program and of its parts, which contain the kernels
    if found or refused:
        _report_checks(calls, found, refused, time.perf_counter() - start)


def _report_checks(
    calls: list[KernelCall], found: dict[str, KernelResult], refused: dict[str, str], seconds: float
) -> None:
    values = {
        "kernels/used": float(len([key for key in found if key not in refused])),
        "kernels/refused": float(len(refused)),
        "kernels/error": max((result.error for result in found.values()), default=math.nan),
    }
    line = _line(calls, found, refused, seconds)
    if _report:
        _report(line, values)
    elif refused:
        _log.warning("%s", line)


def _line(
    calls: list[KernelCall], found: dict[str, KernelResult], refused: dict[str, str], seconds: float
) -> str:
    """What the log says."""
    kind = jax.local_devices()[0].device_kind
    if not refused:
        worst = max(result.error for result in found.values())
        return (
            f"{len(found)} kernel call(s) equal the plain form on {kind}: largest error {worst:.1e}"
            f" of the values ({seconds:.1f} s)"
        )
    shapes = {call.key: f"{call.name} of {call.shapes}" for call in calls}
    key, reason = next(iter(refused.items()))
    more = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
    return (
        f"warning: kernel {shapes.get(key, key.split(' ')[0])}{more} on {kind}: {reason}; the run"
        " uses the plain form instead, which is slower; please report this line, with the table of"
        " --mode=profile --kernels"
    )


def _agreed(own: dict[str, str]) -> dict[str, str]:
    """{call: reason} that any host refuses, in one order on all."""
    if barriers.host_names() == 1:
        return own
    texts = barriers.exchange_values("kernels", json.dumps(own), limit=_LIMIT)
    out: dict[str, str] = {}
    for number, each in enumerate(map(json.loads, texts)):
        label = barriers.host_label(number)
        out = {key: f"{label}: {reason}" for key, reason in each.items()} | out
    return dict(sorted(out.items()))


def checked_call(call: KernelCall) -> KernelResult:
    """Return the result of `check_call`, which is cached between processes."""
    stem = _cache_stem(call)
    if stem is None:
        return check_call(call)
    file, started = stem.with_suffix(".json"), stem.with_suffix(f".started{jax.process_index()}")
    if (cached := _read_result(file)) is not None:
        return cached
    before = started.stat().st_size if started.is_file() else 0
    if before >= _STARTS:
        result = KernelResult(reason=f"{before} earlier checks of it never ended")
    else:
        with contextlib.suppress(OSError), started.open("ab") as marker:
            marker.write(b".")
        result = check_call(call)
    with contextlib.suppress(OSError):
        content = dataclasses.asdict(result) | {"call": call.key, "device": device_text()}
        part = stem.with_suffix(f".part{os.getpid()}")
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(part, file)
        started.unlink(missing_ok=True)
    return result


def _read_result(file: pathlib.Path) -> KernelResult | None:
    """A cached result; None if there is none, or it cannot be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        reason = f"{content['reason']} (found before: {file})" if content["reason"] else ""
        return KernelResult(
            forward=float(content["forward"]), gradients=float(content["gradients"]), reason=reason
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _cache_stem(call: KernelCall) -> pathlib.Path | None:
    """Path of the files of a call without their endings; None without a directory for them."""
    settings: Any = jax.config  # its attributes exist at run time only
    directory = settings.jax_compilation_cache_dir
    if not directory or "://" in directory or not settings.jax_enable_compilation_cache:
        return None
    text = f"{call.key}\n{device_text()}\n{_source_digest()}"
    folder = pathlib.Path(directory) / "kernel_checks"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    return folder / f"{call.name}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"


def device_text() -> str:
    """The device and the versions that compile for it."""
    device = jax.local_devices()[0]
    version = " ".join(device.client.platform_version.split())
    own = f"jax {jax.__version__}, jaxlib {metadata.version('jaxlib')}"
    return f"{device.device_kind}; {own}; {version}"


@functools.cache
def _source_digest() -> str:
    """Digest of the code that contains kernels and plain forms."""
    hashed, package = hashlib.sha256(), pathlib.Path(__file__).parents[1]
    around = (pathlib.Path(__file__), package / "objective" / "manual_axes.py")
    for path in (*around, *sorted((package / "models").rglob("*.py"))):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()


def check_call(call: KernelCall) -> KernelResult:
    """Run a call on the first device of this host with random inputs, forward and backward, and
    compare its first and last row with the plain form in float32."""
    # in a thread of its own, as a mesh and a trace belong to their thread
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        result = pool.submit(_check, call).result()
        if re.search("out of memory|exhausted", result.reason, re.IGNORECASE):
            # perhaps of the device, beside the state of a run: with fewer rows, once
            result = pool.submit(_check, _with_two_rows(call)).result()
        return result


def _with_two_rows(call: KernelCall) -> KernelCall:
    cut = lambda leaf: jax.ShapeDtypeStruct((min(2, leaf.shape[0]), *leaf.shape[1:]), leaf.dtype)
    return call._replace(arrays=jax.tree.map(cut, call.arrays))


def _check(call: KernelCall) -> KernelResult:
    try:
        arrays = draw_arrays(call)
        out = jax.eval_shape(functools.partial(call.kernel, call.static), *call.arrays)
        g = jax.random.uniform(jax.random.key(1), out.shape, jnp.float32, -1, 1).astype(out.dtype)
        found = jax.jit(functools.partial(value_and_gradients, call.kernel, call.static))(arrays, g)
        ends = jax.jit(lambda tree: jax.tree.map(_ends, tree))
        with jax.default_matmul_precision("highest"):
            plain = jax.jit(functools.partial(value_and_gradients, call.plain, call.static))
            wanted = plain(*jax.tree.map(_wide, ends((arrays, g))))
        errors = jax.device_get(jax.jit(_errors)(ends(found), wanted))
    except Exception as error:  # of the compiler or of the device, whose errors have many types
        return KernelResult(reason=f"fails ({one_line(error)[:300] or type(error).__name__})")
    gradients = float(np.max(errors[1:], initial=0))  # nan if one is
    result = KernelResult(forward=float(errors[0]), gradients=gradients)
    limit = LIMITS.get(str(g.dtype), 1e-3)
    if result.error <= limit:
        return result
    what = "outputs" if not result.forward <= limit else "gradients"
    return dataclasses.replace(
        result,
        reason=(
            f"its {what} are wrong (errors {result.forward:.2g} forward, {result.gradients:.2g} of"
            f" the gradients; the limit is {limit:g})"
        ),
    )


def _ends(rows: jax.Array) -> jax.Array:
    """The first and the last row."""
    return rows if rows.shape[0] < 3 else rows[:: rows.shape[0] - 1]


def _wide(array: jax.Array) -> jax.Array:
    return array.astype(jnp.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array


def draw_arrays(call: KernelCall) -> tuple[Any, ...]:
    """Random inputs of a call; of a mask, three quarters are True."""
    leaves, tree = jax.tree.flatten(call.arrays)

    def draw() -> list[jax.Array]:
        out = []
        for i, (leaf, (low, high)) in enumerate(zip(leaves, call.bounds, strict=True)):
            uniform = jax.random.uniform(jax.random.key(2 + i), leaf.shape)
            out.append(
                uniform < 0.75
                if leaf.dtype == bool
                else (low + (high - low) * uniform).astype(leaf.dtype)
            )
        return out

    return jax.tree.unflatten(tree, jax.jit(draw)())


def value_and_gradients(
    function: Callable[..., Any], static: Any, arrays: tuple[Any, ...], g: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Output of `function(static, *arrays)`, and the gradients of its real inputs.

    >>> scaled = lambda factor, x: factor * x
    >>> out, grads = value_and_gradients(scaled, 3.0, (jnp.ones(1),), jnp.full(1, 2.0))
    >>> out.item(), grads[0].item()
    (3.0, 6.0)
    """
    leaves, tree = jax.tree.flatten(arrays)
    real = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def of(*some: jax.Array) -> jax.Array:
        given = dict(zip(real, some, strict=True))
        every = [given.get(i, leaf) for i, leaf in enumerate(leaves)]
        return function(static, *jax.tree.unflatten(tree, every))

    out, pull = jax.vjp(of, *(leaves[i] for i in real))
    return out, pull(g)


def _errors(found: Any, wanted: Any) -> list[jax.Array]:
    """Of every array: the norm of the difference over the norm, or its largest element over the
    largest, whichever is larger."""
    out = []
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        away, tiny = jnp.abs(a.astype(jnp.float32) - b), 1e-20
        of_norm = jnp.linalg.norm(away.ravel()) / (jnp.linalg.norm(b.ravel()) + tiny)
        out.append(jnp.maximum(of_norm, away.max() / (jnp.abs(b).max() + tiny)))
    return out
