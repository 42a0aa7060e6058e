"""Memory of a device, and the part of it that a tree takes."""

import contextlib
import math
import pathlib
import re
from typing import Any

import jax


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Bytes that a device holds of a tree of jax.ShapeDtypeStruct in these shardings.

    >>> import jax.numpy as jnp
    >>> from m3i_jax.parallel.mesh import make_mesh, replicated
    >>> everywhere = replicated(make_mesh((1, 1, 1), jax.devices()[:1]))
    >>> bytes_per_device({"w": jax.ShapeDtypeStruct((3, 5), jnp.float32)}, {"w": everywhere})
    60
    """
    parts = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        tree,
        shardings,
    )
    return sum(jax.tree.leaves(parts))


def device_memory(mesh: jax.sharding.Mesh) -> float:
    """Bytes that a device of this host may use: the limit of its allocator, on a CPU its share of
    the free memory; infinite if unknown."""
    local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    if local and local[0].platform == "cpu":
        return free_memory() / len(local)
    limits = [(device.memory_stats() or {}).get("bytes_limit", math.inf) for device in local]
    return min(limits, default=math.inf)


def free_memory(
    info: pathlib.Path = pathlib.Path("/proc/meminfo"),
    groups: pathlib.Path = pathlib.Path("/sys/fs/cgroup"),
    own: pathlib.Path = pathlib.Path("/proc/self/cgroup"),
) -> float:
    """Bytes of main memory that a process can still allocate, swap included, also within the limit
    of its container or job (control groups, version 2); infinite if unknown.

    >>> 0 < free_memory() and free_memory(pathlib.Path("/nowhere"), pathlib.Path("/nowhere"))
    inf
    """
    limit = _group_memory(groups, own)
    if not info.is_file():
        return limit
    kilobytes = dict(re.findall(r"(\w+):\s+(\d+) kB", info.read_text()))
    if "MemAvailable" not in kilobytes:
        return limit
    swap = 1024.0 * int(kilobytes.get("SwapFree", 0))
    return min(1024.0 * int(kilobytes["MemAvailable"]), limit) + swap


def _group_memory(groups: pathlib.Path, own: pathlib.Path) -> float:
    """Bytes that the control groups of this process leave it, without swap: of its group and of
    those around it, whose pages of files, active and inactive, can be dropped."""
    free = math.inf
    with contextlib.suppress(OSError, ValueError, StopIteration):
        path = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::"))
        group = groups / path.lstrip("/")
        for each in (group, *group.parents):
            if (each / "memory.max").is_file() and each.is_relative_to(groups):
                most = (each / "memory.max").read_text().strip()
                if most != "max":
                    used = int((each / "memory.current").read_text())
                    files = re.findall(r"active_file (\d+)", (each / "memory.stat").read_text())
                    free = min(free, int(most) - used + sum(map(int, files)))
    return max(free, 0.0)
