"""The mesh, the sharding of data and the one sharding constraint of the project; where a program of
one device may stand."""

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from m3i_jax.errors import UserError
from m3i_jax.parallel.programs import Program

AXES = ("replica", "fsdp", "tensor")
DATA = ("replica", "fsdp")  # the leading axis of a batch is split over both
KERNELS = "M3I_JAX_KERNELS"  # variable of the environment; 0: no kernels of our own


def make_mesh(shape: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of (replica, fsdp, tensor) devices; one number may be -1, the rest of the devices.

    Axis types are stated: jax.make_mesh would default to Explicit, under which sharding constraints
    become assertions.

    Raises:
      UserError: if the numbers do not multiply to the number of devices.

    >>> dict(make_mesh((-1, 1, 1), jax.devices()[:1]).shape)
    {'replica': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = list(devices or jax.devices())
    fixed = math.prod(n for n in shape if n != -1)
    sizes = tuple(len(devices) // fixed if n == -1 else n for n in shape)
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"config.parallel.mesh: {tuple(shape)} does not multiply to the {len(devices)} devices"
            " of this run; use (-1,1,1) for all of them as replicas"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def check_host_rows(mesh: Mesh) -> None:
    """Refuse a mesh in which devices of several hosts share rows of a batch: every host reads rows
    of its own.

    Raises:
      UserError: says which axis is too long.

    >>> check_host_rows(make_mesh((1, 1, 1), jax.devices()[:1]))
    """
    for devices in mesh.devices.reshape(-1, mesh.shape["tensor"]):
        if len(hosts := {device.process_index for device in devices}) > 1:
            raise UserError(
                f"config.parallel.mesh: a tensor axis of {len(devices)} spans {len(hosts)} hosts,"
                " and every host reads rows of its own; make it at most the devices of one host,"
                " and let fsdp span hosts"
            )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def data_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over all data axes."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def hint(x: jax.Array, *axes: Any) -> jax.Array:
    """Ask for a sharding inside a jitted function; does nothing outside a mesh (jax.set_mesh), so
    models run anywhere."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(DATA) <= set(mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def rows_of_device(rows: int) -> int:
    """How many of the rows of an array of a batch lie on each device: of a jitted function's, or of
    all there are inside `by_hand`.

    >>> rows_of_device(6)
    6
    """
    mesh = jax.sharding.get_abstract_mesh()
    shards = math.prod(
        mesh.shape[axis]
        for axis in DATA
        if axis in mesh.axis_names and axis not in mesh.manual_axes
    )
    return rows if rows % shards else rows // shards


def platform() -> str:
    """Where what is being traced will run: on the devices of the mesh (jax.set_mesh), which need
    not be here, or else on the default ones.

    >>> platform() == jax.default_backend()
    True
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def _divided(mesh: AbstractMesh) -> tuple[str, ...]:
    """Axes that the partitioner still divides something over."""
    return tuple(
        axis for axis in mesh.axis_names if axis not in mesh.manual_axes and mesh.shape[axis] > 1
    )


def is_single_device(rows: int) -> bool:
    """Whether `per_device` can run a program on that many rows: on one device, or where a mesh that
    is known splits them and nothing else.

    >>> with jax.set_mesh(make_mesh((1, 1, 1), jax.devices()[:1])):
    ...     is_single_device(6)
    True
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    axes = _divided(mesh)
    return set(axes) <= set(DATA) and rows % math.prod(mesh.shape[axis] for axis in axes) == 0


def kernels(rows: int) -> bool:
    """Whether kernels of our own run on that many rows: on TPUs where they can stand alone, unless
    M3I_JAX_KERNELS=0 forbids them all.

    >>> kernels(6) and jax.default_backend() != "tpu"
    False
    """
    return platform() == "tpu" and is_single_device(rows) and os.environ.get(KERNELS, "1") != "0"


def per_device(run: Callable[..., Any], *arrays_Bx: Any) -> Any:
    """`run(*arrays)`, every device on its own rows: for a program that the partitioner cannot look
    into, such as a kernel.

    Args:
      run: a function of trees of arrays [B, ...] to a tree of arrays [B, ...].
      arrays_Bx: B rows for which `is_single_device` holds.

    >>> per_device(lambda x: x + 1, np.zeros(2)).tolist()
    [1.0, 1.0]
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not (axes := _divided(mesh)):
        return run(*arrays_Bx)
    rows, left = PartitionSpec(axes), set(mesh.axis_names) - set(mesh.manual_axes)
    return jax.shard_map(run, in_specs=rows, out_specs=rows, axis_names=left, check_vma=False)(
        *arrays_Bx
    )


def to_global(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The rows of this host as its part of global arrays [B, ...], split over the data axes."""
    sharding = data_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }


def allgather_rows(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All rows of all hosts, on every host: the opposite of splitting. What one process alone has
    comes back as it is.

    >>> allgather_rows(make_mesh((1, 1, 1), jax.devices()[:1]), {"label": np.array([3, 4])})["label"].tolist()
    [3, 4]
    """
    if jax.process_count() == 1:
        return batch
    # Without x64 a device has no 64-bit numbers: they travel as two words.
    words = {
        name: rows.view(np.uint32).reshape(*rows.shape, 2) if rows.dtype.itemsize == 8 else rows
        for name, rows in batch.items()
    }
    spread = to_global(mesh, words)
    whole = jax.device_get(_gather(mesh)(spread))
    return {
        name: (
            np.ascontiguousarray(rows).view(batch[name].dtype)[..., 0]
            if batch[name].dtype.itemsize == 8
            else rows
        )
        for name, rows in whole.items()
    }


@functools.cache
def _gather(mesh: Mesh) -> Program:
    return Program(lambda x: x, name="everywhere", out_shardings=replicated(mesh))


def split_rows(mesh: Mesh, rows: np.ndarray) -> jax.Array:
    """Rows that every host has, as one global array split over the data axes; their number must
    divide by those."""
    return jax.make_array_from_callback(rows.shape, data_sharding(mesh), lambda index: rows[index])
