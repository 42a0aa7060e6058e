"""How much memory a device has, and how much of it a tree will take."""

import math
import pathlib
import re
from typing import Any

import jax


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Bytes that a device holds of a tree of jax.ShapeDtypeStruct in these shardings.

    >>> import jax.numpy as jnp
    >>> from m3i_jax.parallel.mesh import make_mesh, replicated
    >>> tree = {"w": jax.ShapeDtypeStruct((3, 5), jnp.float32), "n": jax.ShapeDtypeStruct((), jnp.int32)}
    >>> bytes_per_device(tree, dict.fromkeys(tree, replicated(make_mesh((1, 1, 1), jax.devices()[:1]))))
    64
    """
    parts = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        tree,
        shardings,
    )
    return sum(jax.tree.leaves(parts))


def device_memory(mesh: jax.sharding.Mesh) -> float:
    """Bytes that a device of this host may use: what its allocator says, on a CPU its share of what
    is free; infinite if nobody knows."""
    mine = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    if mine and mine[0].platform == "cpu":
        return free_memory() / len(mine)
    limits = [(device.memory_stats() or {}).get("bytes_limit", math.inf) for device in mine]
    return min(limits, default=math.inf)


def free_memory(info: pathlib.Path = pathlib.Path("/proc/meminfo")) -> float:
    """Bytes of main memory that a process could still get, swap included; infinite on a system that
    does not say.

    >>> 0 < free_memory() and free_memory(pathlib.Path("/nowhere"))
    inf
    """
    if not info.is_file():
        return math.inf
    found = dict(re.findall(r"(\w+):\s+(\d+) kB", info.read_text()))
    return (
        1024.0 * (int(found["MemAvailable"]) + int(found.get("SwapFree", 0)))
        if "MemAvailable" in found
        else math.inf
    )
