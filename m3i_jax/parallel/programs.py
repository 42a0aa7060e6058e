"""Programs that span hosts: all hosts compile a program and wait for each other before any runs it.

A collective waits for the other hosts. What happens while one of them still compiles depends on the
platform:

    CPU  Gloo connects the hosts in the first collective of a group and gives up after 30 seconds,
         with a long traceback. No flag of XLA changes that, nor the 30 seconds of every
         reduce-scatter (measured with jaxlib 0.10.2; github.com/jax-ml/jax/issues/40831). An
         all-reduce waited longer.
    GPU  NCCL waits for ever and logs nothing, while the heartbeats of the other host continue;
         XLA's limit, `xla_gpu_nccl_termination_timeout_seconds`, is off by default and did not help
         where it was set (github.com/jax-ml/jax/issues/38503; not tried here).
    TPU  Not tried here. MaxText's guide to Megascale hangs advises a barrier in the store of
         jax.distributed instead of a collective, as below.

So the hosts wait at a barrier with a time limit and an error that names the missing host; the
heartbeat (`parallel/heartbeat.py`) detects a host that dies meanwhile. On CPUs they wait for each
other before every call of a program, or a reduce-scatter ends the run when the data of one host are
late by 30 seconds. That takes 2 milliseconds between two hosts of one machine.

Hosts that share a compilation cache must also use the same keys, or one host loads in a second what
another compiles for minutes. On GPUs JAX makes the key of a program the same on all hosts. On CPUs
the key contains the ids of the host's own devices, and `share_cache_keys` removes them."""

import contextlib
import functools
import hashlib
import pathlib
import platform
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import cache_key as _cache_key  # the key of a compiled program has no public name

from m3i_jax.parallel import barriers, kernel_calls, kernel_checks

LIMIT = 7200.0  # seconds to wait for the slowest host; as the watchdog's for a first step


_log: Callable[[str], None] | None = None  # of `announced_compilations`


@contextlib.contextmanager
def announced_compilations(log: Callable[[str], None]) -> Iterator[None]:
    """Log a line before the first call of each `announced` program within the block, which compiles
    it: on a small machine that takes most of the first minute.

    >>> with announced_compilations(print):
    ...     _ = Program(lambda x: 2 * x, announced="a product")(3)
    compiling a product ...
    """
    global _log
    before, _log = _log, log
    try:
        yield
    finally:
        _log = before


class Program:
    """A jitted function of arrays that may span hosts. All hosts call it, in the same order.

    With one host it is `jax.jit(function, **options)`. Several hosts compile the program for new
    shapes first, and wait until all have. On CPUs they also wait for each other before each call.
    On platforms that have kernels, those in a program are checked first (`kernel_checks`).

    Args:
      function: to be jitted.
      name: of the program in messages; that of the function by default.
      announced: what it computes, for `announced_compilations`; "": its compilation is not logged.
      limit: seconds to wait for the slowest host.
      options: as of `jax.jit`.

    Raises:
      HostMissing: when called; names the hosts that did not come in time.

    >>> double = Program(lambda x: 2 * x, name="double")
    >>> double(3).item()
    6
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str = "",
        announced: str = "",
        limit: float = LIMIT,
        **options: Any,
    ) -> None:
        self._jitted, self._limit = jax.jit(function, **options), limit
        self._name = name or getattr(function, "__name__", "program")
        self._ready: set[Any] = set()
        self._checked: set[Any] = set()
        self._announced = announced

    def __call__(self, *arguments: Any) -> Any:
        if self._announced and _log:
            _log(f"compiling {self._announced} ...")
            self._announced = ""
        hosts, has_kernels = barriers.host_names(), kernel_checks.needed()
        signature = _signature(arguments) if hosts > 1 or has_kernels else None
        if has_kernels and signature not in self._checked:
            # the call below finds the trace
            kernel_checks.settle_kernels(functools.partial(self._jitted.trace, *arguments))
            self._checked.add(signature)
        if hosts > 1:
            if signature not in self._ready:
                self._jitted.lower(*arguments).compile()  # the call below finds it compiled
                barriers.barrier(f"compile {self._name}", limit=self._limit)
                self._ready.add(signature)
            elif jax.default_backend() == "cpu":
                barriers.barrier(f"run {self._name}", limit=self._limit)
        return self._jitted(*arguments)

    def lower(self, *arguments: Any) -> Any:
        """`lower` of the jitted function, whose kernels are assumed to be right."""
        with kernel_calls.noted_calls():
            return self._jitted.lower(*arguments)


def _signature(arguments: Any) -> Any:
    """What a program is compiled for: the tree structure, and every array's shape, dtype and
    sharding."""
    leaves, structure = jax.tree.flatten(arguments)
    return structure, tuple((jax.typeof(leaf), getattr(leaf, "sharding", None)) for leaf in leaves)


def machine_key() -> str:
    """Digest of the processor's instruction set: another kind of processor cannot run the programs
    of this one, and hosts of both may share a compilation cache.

    >>> machine_key() == machine_key()
    True
    """
    info = pathlib.Path("/proc/cpuinfo")
    flags = (
        [line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))][
            :1
        ]
        if info.is_file()
        else []
    )
    return hashlib.sha256("".join([platform.machine(), *flags]).encode()).hexdigest()[:8]


def share_cache_keys() -> None:
    """Make the cache keys of programs on CPUs equal on all hosts with the same kind of processor.

    Does nothing if JAX no longer has the patched functions: then every host but the first, which
    alone writes to the cache, compiles at every start."""
    devices, options = "_hash_accelerator_config", "_hash_serialized_compile_options"
    plain = getattr(_cache_key, options, None)
    if (
        plain is None
        or not hasattr(_cache_key, devices)
        or getattr(_cache_key, devices) is _hash_devices
    ):
        return
    # replaces a digest with the ids of this host's devices
    setattr(_cache_key, devices, _hash_devices)
    # as JAX does on GPUs: a program is loaded for the given devices, whatever their ids
    setattr(_cache_key, options, functools.partial(_hash_options, plain))


def _hash_devices(hashed: Any, devices: Any) -> None:
    hashed.update(f"{[device.device_kind for device in devices.flat]} {machine_key()}".encode())


def _hash_options(
    plain: Callable[..., Any], hashed: Any, options: Any, strip_device_assignment: bool = True
) -> Any:
    return plain(hashed, options, strip_device_assignment=True)
