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


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceFamily:
    """A kind of device.

    Attributes:
      platform: tpu, cuda or cpu.
      sides: number of sides of a slice (TPU).
      cores: JAX devices per chip.
      options: for libtpu.
      host: devices per host, if the links between devices end there; else 0.
    """

    platform: str
    sides: int = 1
    cores: int = 1
    options: tuple[tuple[str, Any], ...] = ()
    host: int = 0


PER_HOST = 8  # GPUs per host
FAMILIES = {
    "v4": DeviceFamily(platform="tpu", sides=3, options=(("chip_config_name", "megacore"),)),
    "v5e": DeviceFamily(platform="tpu", sides=2),
    "v5p": DeviceFamily(platform="tpu", sides=3),
    "v6e": DeviceFamily(platform="tpu", sides=2),
    "tpu7x": DeviceFamily(platform="tpu", sides=3, cores=2),
    "a100": DeviceFamily(platform="cuda", host=PER_HOST),
    "h100": DeviceFamily(platform="cuda", host=PER_HOST),
    "h200": DeviceFamily(platform="cuda", host=PER_HOST),
    "b200": DeviceFamily(platform="cuda", host=PER_HOST),
    "cpu": DeviceFamily(platform="cpu"),
}
EXAMPLES = "v5e:4x4, v5litepod-16, v5p:4x4x4, v6e:4x8, tpu7x:2x2x1, h100:8, cpu:8"
# Google Cloud's accelerator types: first part of the name -> (kind, what the number counts a chip,
# most chips). Of v4 and v5p it counts TensorCores, two a chip
# (https://cloud.google.com/tpu/docs/v5p and v5e).
CLOUD = {
    "v4": ("v4", 2, 4096),
    "v5litepod": ("v5e", 1, 256),
    "v5p": ("v5p", 2, 4096),
    "v6e": ("v6e", 1, 256),
}
EXTRA = {"tpu": ("libtpu", "tpu"), "cuda": ("jax_plugins.xla_cuda12", "cuda")}
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
# Of each card: cores, compute capability, clock in GHz, bytes of shared memory per core and per
# block, of L2, of memory, of bandwidth per second, name; as CUDA reports them of the SXM cards.
CARDS = {
    "a100": (
        108,
        8,
        1.41,
        167_936,
        166_912,
        41_943_040,
        85_100_068_864,
        2_039_040_000_000,
        "NVIDIA A100-SXM4-80GB",
    ),
    "h100": (
        132,
        9,
        1.98,
        233_472,
        232_448,
        52_428_800,
        84_942_979_072,
        3_352_320_000_000,
        "NVIDIA H100 80GB HBM3",
    ),
    "h200": (
        132,
        9,
        1.98,
        233_472,
        232_448,
        62_914_560,
        150_754_820_096,
        4_814_000_000_000,
        "NVIDIA H200",
    ),
    "b200": (
        148,
        10,
        1.965,
        233_472,
        232_448,
        132_644_864,
        191_514_411_008,
        7_672_320_000_000,
        "NVIDIA B200",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """A slice by name. shape: its sides; devices: JAX devices, on tpu7x two per chip."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def family(self) -> DeviceFamily:
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
    hosts = (
        f"{out.devices} devices are more than a host's {PER_HOST} and not whole hosts; use a"
        f" multiple of {PER_HOST}"
    )
    if family.platform == "cuda" and out.devices > PER_HOST and out.devices % PER_HOST:
        raise UserError(f"--topology {text}: {hosts}")
    return out


def _of_cloud(name: str, number: int) -> tuple[str, tuple[int, ...]]:
    """(kind, shape) of an accelerator type: a power of two of chips, and the sides as equal as they
    can be, the longer ones last."""
    kind, each, most = CLOUD[name]
    sides, chips = FAMILIES[kind].sides, number // each
    power = chips.bit_length() - 1
    least = 2 if sides == 3 else 0  # the smallest slice with three sides is a host, 2x2x1
    if number != each << max(power, 0) or power < least or power == 1 or chips > most:
        raise UserError(
            f"--topology {name}-{number}: the shape of that slice is not known; give its sides,"
            f" such as {kind}:{_example(kind)}"
        )
    if sides == 3 and power == 2:
        return kind, (2, 2, 1)
    return kind, tuple(2 ** (power // sides + (i >= sides - power % sides)) for i in range(sides))


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
    library, extra = EXTRA[platform]
    if not _installed(library):
        raise UserError(
            f"--topology {topology.name}: compiling for it needs {library.split('.')[-1]}, which is"
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
        hosts = max(1, cores // PER_HOST)
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
    cores, major, clock, shared, block, cache, memory, bandwidth, name = CARDS[kind]
    return f"""gpu_device_info {{
      threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
      core_count: {cores}  fpus_per_core: {64 if major == 8 else 128}
      shared_memory_per_block: 49152  shared_memory_per_core: {shared}
      shared_memory_per_block_optin: {block}
      registers_per_core_limit: 65536  registers_per_block_limit: 65536
      block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
      thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
      memory_bandwidth: {bandwidth}  l2_cache_size: {cache}
      clock_rate_ghz: {clock}  device_memory_size: {memory}
      cuda_compute_capability {{ major: {major} }}
    }}
    platform_name: "CUDA"  dnn_version_info {{ major: 9  minor: 8 }}
    device_description_str: "{name}"
    """
