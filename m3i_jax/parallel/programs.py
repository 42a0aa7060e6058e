"""Programs that span hosts: all hosts compile one, meet, and only then does any of them run it.

A collective waits for the other hosts. What happens when one of them still compiles depends on the
platform:

    CPU  Gloo connects the hosts in the first collective of a group and gives up after 30 seconds,
         with a page of traceback. No flag of XLA changes that, nor the 30 seconds of every
         reduce-scatter (measured with jaxlib 0.10.2; github.com/jax-ml/jax/issues/40831). An
         all-reduce waited longer.
    GPU  NCCL waits for ever and logs nothing, while the heartbeats of the other host go on; XLA's
         limit, `xla_gpu_nccl_termination_timeout_seconds`, is off and did not help where it was set
         (github.com/jax-ml/jax/issues/38503; not tried here).
    TPU  Not tried here. MaxText's guide to Megascale hangs advises what is done below: a barrier in
         the store of jax.distributed, no collective.

So the hosts wait for each other here, through the store of jax.distributed, with a limit and by
name; a host that dies meanwhile is missed by its heartbeat (`parallel/heartbeat.py`).

Hosts that share a directory of compiled programs must also find the same ones in it, or one loads
in a second what another compiles for minutes. On GPUs JAX makes the key of a program the same on
all hosts. On CPUs the key has the numbers of a host's own devices in it, and `share_cache_keys`
takes them out."""

import functools
import hashlib
import pathlib
import platform
from collections.abc import Callable
from typing import Any

import jax
from jax._src import cache_key as _cache_key  # the key of a compiled program has no public name

from m3i_jax.parallel import barriers

LIMIT = 7200.0  # seconds that compilations may be apart; the watchdog gives a first step the same


class Program:
    """A jitted function whose arguments may lie on several hosts. All hosts call it, in the same
    order.

    Alone it is `jax.jit(function, **options)`. Of several hosts, each compiles the program of new
    shapes first, and waits until all have.

    Args:
      function: to be jitted.
      name: of the program in messages; that of the function by default.
      limit: seconds to wait for the slowest compilation.
      options: as of `jax.jit`.

    Raises:
      HostMissing: when called; names the hosts that have not compiled the program in time.

    >>> double = Program(lambda x: 2 * x, name="double")
    >>> double(3).item()
    6
    """

    def __init__(
        self, function: Callable[..., Any], *, name: str = "", limit: float = LIMIT, **options: Any
    ) -> None:
        self._jitted, self._limit = jax.jit(function, **options), limit
        self._name = name or getattr(function, "__name__", "program")
        self._ready: set[Any] = set()

    def __call__(self, *arguments: Any) -> Any:
        if barriers.host_names() > 1 and (signature := _signature(arguments)) not in self._ready:
            self._jitted.lower(*arguments).compile()  # the call below finds it compiled
            barriers.barrier(f"compile {self._name}", limit=self._limit)
            self._ready.add(signature)
        return self._jitted(*arguments)

    def lower(self, *arguments: Any) -> Any:
        """As of the jitted function."""
        return self._jitted.lower(*arguments)


def _signature(arguments: Any) -> Any:
    """What a program is compiled for: structure, and of every array shape, dtype and layout."""
    leaves, structure = jax.tree.flatten(arguments)
    return structure, tuple((jax.typeof(leaf), getattr(leaf, "sharding", None)) for leaf in leaves)


def machine_key() -> str:
    """Kind of processor: one of another kind cannot run the programs of this one, and hosts of both
    may share a directory of them.

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
    """Makes the keys of compiled programs on CPUs the same on all hosts of one kind of processor.

    Does nothing where JAX has other functions than those that are known here: then every host but
    the first, which alone writes programs, compiles at every start."""
    devices, options = "_hash_accelerator_config", "_hash_serialized_compile_options"
    plain = getattr(_cache_key, options, None)
    if (
        plain is None
        or not hasattr(_cache_key, devices)
        or getattr(_cache_key, devices) is _hash_devices
    ):
        return
    # was: a fingerprint with the numbers of this host's devices
    setattr(_cache_key, devices, _hash_devices)
    # As JAX does on GPUs: a program is loaded for the devices that are asked for, whatever their
    # numbers.
    setattr(_cache_key, options, functools.partial(_hash_options, plain))


def _hash_devices(hashed: Any, devices: Any) -> None:
    hashed.update(f"{[device.device_kind for device in devices.flat]} {machine_key()}".encode())


def _hash_options(
    plain: Callable[..., Any], hashed: Any, options: Any, strip_device_assignment: bool = True
) -> Any:
    return plain(hashed, options, strip_device_assignment=True)
