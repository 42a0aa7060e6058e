"""Devices to compile for that are not attached, from the name of a slice, such as v5e:4x4, h100:8
or cpu:8, or of an accelerator type of Google Cloud, such as v5litepod-16.

libtpu compiles TPU programs and the CUDA plugin GPU programs without an accelerator; both are
extras of this package. `cpu:N` are N devices of this host. The environment variables that a library
reads when it loads are set here, unless they are set already."""

import dataclasses
import difflib
import importlib.util
import math
import os
import re
from typing import Any

import jax

from m3i_jax.errors import UserError
from m3i_jax.parallel.chips import CHIPS, CPU, Chip

FAMILIES = CHIPS | {"cpu": CPU}
EXAMPLES = "v5e:4x4, v5litepod-16, v5p:4x4x4, v6e:4x8, tpu7x:2x2x1, h100:8, cpu:8"
# Google Cloud's accelerator types: first part of the name -> kind
CLOUD = {chip.cloud: kind for kind, chip in CHIPS.items() if chip.cloud}
# platform -> (modules of which one compiles for it, extra that brings the first)
EXTRA = {
    "tpu": (("libtpu",), "tpu"),
    "cuda": (("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"), "cuda"),
}
# libtpu would otherwise query the cloud's metadata server, claim a chip, and log both to stderr
_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
# Compiler options by platform. GPU kernels are autotuned on the GPU; without one, Triton has no
# tile sizes for products.
COMPILER: dict[str, dict[str, Any]] = {
    "tpu": {},
    "cpu": {},
    "cuda": {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """A slice by name. shape: its sides; devices: JAX devices, on tpu7x two per chip."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def family(self) -> Chip:
        return FAMILIES[self.kind]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        return self.chips * self.family.cores


def parse_topology(text: str) -> Topology:
    """The slice of a name.

    Raises:
      UserError: an unknown name; with the nearest one.

    >>> parse_topology("v5e:4x4").devices, parse_topology("v5p:4x4x4").shape
    (16, (4, 4, 4))
    >>> parse_topology("h100:8").family.platform
    'cuda'
    >>> parse_topology("v5litepod-16").shape, parse_topology("v4-16").shape
    ((4, 4), (2, 2, 2))
    """
    if not text:
        raise UserError(f"--topology: is missing; name what to compile for, such as {EXAMPLES}")
    if typed := re.fullmatch(rf"({'|'.join(CLOUD)})-(\d{{1,6}})", text):
        kind, shape = _of_cloud(typed[1], int(typed[2]))
        return Topology(name=text, kind=kind, shape=shape)
    kind, _, size = text.partition(":")
    if kind not in FAMILIES:
        near = difflib.get_close_matches(re.split(r"[-_:]", kind)[0], FAMILIES, 1, 0.5)
        hint = (
            f"did you mean {near[0]}:{_example(near[0])}?"
            if near
            else f"known are {', '.join(FAMILIES)}, such as {EXAMPLES}"
        )
        raise UserError(f"--topology {text}: there is no such topology; {hint}")
    family = FAMILIES[kind]
    if not re.fullmatch(r"[1-9]\d{0,4}" + r"x[1-9]\d{0,4}" * (family.sides - 1), size):
        expected = (
            "the number of devices" if family.sides == 1 else f"{family.sides} sides joined by x"
        )
        raise UserError(
            f"--topology {text}: {kind} takes {expected} after the colon, such as"
            f" {kind}:{_example(kind)}"
        )
    shape = tuple(int(n) for n in size.split("x"))
    out = Topology(name=text, kind=kind, shape=shape)
    if family.host and out.devices > family.host and out.devices % family.host:
        raise UserError(
            f"--topology {text}: {out.devices} devices are more than a host's {family.host} and not"
            f" whole hosts; use a multiple of {family.host}"
        )
    return out


def slice_shape(kind: str, chips: int) -> tuple[int, ...]:
    """The sides of a slice of a power of two of chips: as equal as they can be, the longer ones
    last.

    >>> slice_shape("v5e", 32), slice_shape("v5p", 16), slice_shape("v4", 4), slice_shape("h100", 8)
    ((4, 8), (2, 2, 4), (2, 2, 1), (8,))
    """
    sides, power = FAMILIES[kind].sides, chips.bit_length() - 1
    if sides == 3 and power == 2:  # a host
        return 2, 2, 1
    return tuple(2 ** (power // sides + (i >= sides - power % sides)) for i in range(sides))


def _of_cloud(name: str, number: int) -> tuple[str, tuple[int, ...]]:
    """(kind, shape) of an accelerator type, which has a power of two of chips."""
    kind = CLOUD[name]
    chip = CHIPS[kind]
    chips = number // chip.counted
    power = chips.bit_length() - 1
    least = 2 if chip.sides == 3 else 0  # the smallest slice with three sides is a host, 2x2x1
    whole = number == chip.counted << max(power, 0)
    if not whole or power < least or power == 1 or chips > chip.most:
        raise UserError(
            f"--topology {name}-{number}: the shape of that slice is not known; give its sides,"
            f" such as {kind}:{_example(kind)}"
        )
    return kind, slice_shape(kind, chips)


def _example(kind: str) -> str:
    return {1: "8", 2: "4x4", 3: "4x4x4"}[FAMILIES[kind].sides]


def topology_devices(topology: Topology) -> list[jax.Device]:
    """The devices of a slice, to compile for. Sets environment variables, and JAX's platform to the
    CPU, so that no attached accelerator is used; call it before JAX has used a device.

    Raises:
      UserError: the library that compiles for it is not installed, or does not know the slice.
    """
    platform, cores = topology.family.platform, topology.devices
    if platform == "cpu":
        return _host(cores, topology.name)
    libraries, extra = EXTRA[platform]
    if not any(map(_installed, libraries)):
        library = libraries[0].split(".")[-1]
        raise UserError(
            f"--topology {topology.name}: compiling for it needs {library}, which is"
            f" not installed, though no accelerator: pip install 'm3i-jax[{extra}]'; --topology"
            f" cpu:{min(cores, 64)} shows shares of state and FLOPs without it"
        )
    _host(1, topology.name)
    from jax.experimental import topologies

    try:
        if platform == "tpu":
            for name, value in _QUIET.items():
                os.environ.setdefault(name, value)
            options = dict(topology.family.options)
            if topology.chips == 1:
                options["chips_per_host_bounds"] = (1, 1, 1)
            shape = "x".join(str(n) for n in topology.shape)
            return list(
                topologies.get_topology_desc(
                    f"{topology.kind}:{shape}", platform="tpu", **options
                ).devices
            )
        hosts = max(1, cores // topology.family.host)
        layout = f"1x{hosts}x{cores // hosts}"
        return list(
            topologies.get_topology_desc(
                platform="cuda", target_config=card(topology.kind), topology=layout
            ).devices
        )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--topology {topology.name}: {library.split('.')[-1]} does not know it: {reason};"
            f" known are {EXAMPLES}"
        ) from error


def _installed(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def _host(count: int, name: str) -> list[jax.Device]:
    """`count` CPU devices of this host. Their number is fixed when the first is used, so it is set
    before."""
    forced = re.search(
        r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", "")
    )
    try:
        if count > int(forced[1] if forced else 1):
            jax.config.update("jax_num_cpu_devices", count)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:
        pass  # this process already uses its devices: their number stays
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"--topology {name}: this process already uses {len(devices)} CPU devices; start a"
            " new one"
        )
    return devices[:count]


def card(kind: str) -> str:
    """Description of a card for the CUDA compiler, a protocol buffer as text."""
    chip = CHIPS[kind]
    return f"""gpu_device_info {{
      threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
      core_count: {chip.multiprocessors}  fpus_per_core: {chip.fp32_units}
      shared_memory_per_block: 49152  shared_memory_per_core: {chip.shared}
      shared_memory_per_block_optin: {chip.shared_of_block}
      registers_per_core_limit: 65536  registers_per_block_limit: 65536
      block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
      thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
      memory_bandwidth: {chip.reported_bandwidth}  l2_cache_size: {chip.cache}
      clock_rate_ghz: {chip.clock / 1e9:g}  device_memory_size: {chip.device_memory}
      cuda_compute_capability {{ major: {chip.capability} }}
    }}
    platform_name: "CUDA"  dnn_version_info {{ major: 9  minor: 8 }}
    device_description_str: "{chip.device_kind}"
    """
