"""Memory of a device, and the part of it that a tree takes."""

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


def free_memory(info: pathlib.Path = pathlib.Path("/proc/meminfo")) -> float:
    """Bytes of main memory that a process can still allocate, swap included; infinite if unknown.

    >>> 0 < free_memory() and free_memory(pathlib.Path("/nowhere"))
    inf
    """
    if not info.is_file():
        return math.inf
    kilobytes = dict(re.findall(r"(\w+):\s+(\d+) kB", info.read_text()))
    return (
        1024.0 * (int(kilobytes["MemAvailable"]) + int(kilobytes.get("SwapFree", 0)))
        if "MemAvailable" in kilobytes
        else math.inf
    )
