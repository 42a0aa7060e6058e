"""The mesh, the sharding of data, the only sharding constraint of the project, and programs that
run on each device separately."""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from m3i_jax.errors import UserError
from m3i_jax.parallel import kernel_calls, kernel_checks
from m3i_jax.parallel.programs import Program

AXES = ("replica", "fsdp", "tensor")
DATA = ("replica", "fsdp")  # the leading axis of a batch is split over both
GPUS = ("gpu", "cuda")  # platforms: of a device, and of a topology that is compiled for


def make_mesh(shape: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of (replica, fsdp, tensor) devices; one number may be -1, the rest of the devices.

    Axis types are set: the default of jax.make_mesh is Explicit, under which sharding constraints
    are assertions.

    Raises:
      UserError: the numbers do not multiply to the number of devices.

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
    """Refuse a mesh in which devices of several hosts share rows of a batch: every host reads its
    own rows.

    Raises:
      UserError: names the axis that is too long.

    >>> check_host_rows(make_mesh((1, 1, 1), jax.devices()[:1]))
    """
    for devices in mesh.devices.reshape(-1, mesh.shape["tensor"]):
        if len(hosts := {device.process_index for device in devices}) > 1:
            raise UserError(
                f"config.parallel.mesh: a tensor axis of {len(devices)} spans {len(hosts)} hosts,"
                " and every host reads its own rows; make it at most the devices of one host,"
                " and let fsdp span hosts"
            )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def data_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over all data axes."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def hint(x: jax.Array, *axes: Any) -> jax.Array:
    """Constrain the sharding of an array inside a jitted function; does nothing outside a mesh
    (jax.set_mesh), so that models run anywhere."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(DATA) <= set(mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def rows_of_device(rows: int) -> int:
    """Rows of a batch's array on each device, inside a jitted function; inside `per_device` and
    `with_fsdp_gather`, all rows.

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


def split_axes(rows: int) -> tuple[str, ...]:
    """Axes of the mesh that split that many rows of a batch, inside a jitted function; () if they
    do not divide them, for one device, and inside `per_device` and `with_fsdp_gather`.

    >>> split_axes(6)
    ()
    """
    axes = tuple(axis for axis in _split_axes(jax.sharding.get_abstract_mesh()) if axis in DATA)
    return () if rows_of_device(rows) == rows else axes


def hold_rows(x_Bx: jax.Array) -> jax.Array:
    """The array with every device holding its own rows of a batch, inside a jitted function, where
    the partitioner might split another axis, as weights are split, and add up arrays of the whole
    batch. Nothing changes where devices do not divide the rows, or outside a mesh.

    >>> print(hold_rows(jax.numpy.ones(2)))
    [1. 1.]
    """
    axes = split_axes(x_Bx.shape[0])
    return hint(x_Bx, axes) if axes else x_Bx


_assumed = contextvars.ContextVar("assumed", default="")


@contextlib.contextmanager
def assumed_platform(name: str) -> Iterator[None]:
    """Trace for another platform: for estimates, as what is traced is not compiled.

    >>> with assumed_platform("tpu"):
    ...     platform()
    'tpu'
    """
    before = _assumed.set(name)
    try:
        yield
    finally:
        _assumed.reset(before)


def platform() -> str:
    """Platform that the traced program will run on: that of the mesh (jax.set_mesh), whose devices
    need not be attached, or else the default.

    >>> platform() == jax.default_backend()
    True
    """
    if assumed := _assumed.get():
        return assumed
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def _split_axes(mesh: AbstractMesh) -> tuple[str, ...]:
    """Axes over which the partitioner still splits arrays."""
    return tuple(
        axis for axis in mesh.axis_names if axis not in mesh.manual_axes and mesh.shape[axis] > 1
    )


def is_single_device(rows: int) -> bool:
    """Whether `per_device` can run a program on that many rows: there is one device, or the mesh
    splits the rows and nothing else.

    >>> with jax.set_mesh(make_mesh((1, 1, 1), jax.devices()[:1])):
    ...     is_single_device(6)
    True
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    axes = _split_axes(mesh)
    return set(axes) <= set(DATA) and rows % math.prod(mesh.shape[axis] for axis in axes) == 0


def kernels(rows: int, platforms: Collection[str] = ("tpu",)) -> bool:
    """Whether Pallas kernels for these platforms can run on that many rows: there, where
    `is_single_device` holds, unless M3I_JAX_KERNELS=0 or within `kernel_calls.without_kernels`. A
    number of rows that a symbol stands for may be anything.

    >>> kernels(6) and jax.default_backend() != "tpu"
    False
    """
    if kernel_calls.excluded() or not isinstance(rows, int):
        return False
    possible = platform() in platforms and is_single_device(rows)
    return possible and kernel_calls.kernel_setting() != "0"


def trusted(call: kernel_calls.KernelCall) -> bool:
    """Whether the traced program may contain a call that `kernels` allows: it is compared with the
    plain form on the device, now or before the program is compiled (`kernel_checks.is_right`).

    Args:
      call: with the arrays of all devices, or arrays instead of their shapes.
    """

    def of_device(array: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows_of_device(array.shape[0]), *array.shape[1:]), array.dtype)

    return kernel_checks.is_right(call._replace(arrays=jax.tree.map(of_device, call.arrays)))


def per_device(run: Callable[..., Any], *arrays_Bx: Any) -> Any:
    """`run(*arrays)`, every device on its own rows: for a program that the partitioner cannot
    split, such as a kernel.

    Args:
      run: a function of trees of arrays [B, ...] to a tree of arrays [B, ...].
      arrays_Bx: B rows for which `is_single_device` holds.

    >>> per_device(lambda x: x + 1, np.zeros(2)).tolist()
    [1.0, 1.0]
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not (axes := _split_axes(mesh)):
        return run(*arrays_Bx)
    rows, auto_axes = PartitionSpec(axes), set(mesh.axis_names) - set(mesh.manual_axes)
    return jax.shard_map(run, in_specs=rows, out_specs=rows, axis_names=auto_axes, check_vma=False)(
        *arrays_Bx
    )


def to_global(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The rows of this host as its part of global arrays [B, ...], split over the data axes."""
    sharding = data_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }


def local_rows(x_Bx: jax.Array) -> np.ndarray:
    """The rows of this host of an array that is split over the data axes, in order."""
    parts = {shard.index[0].start or 0: shard.data for shard in x_Bx.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def allgather_rows(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All rows of all hosts, on every host, the inverse of `split_rows`. A single process gets its
    own rows.

    >>> mesh = make_mesh((1, 1, 1), jax.devices()[:1])
    >>> allgather_rows(mesh, {"label": np.array([3, 4])})["label"].tolist()
    [3, 4]
    """
    if jax.process_count() == 1:
        return batch
    # devices have no 64-bit numbers without x64: they are sent as two words
    words = {
        name: rows.view(np.uint32).reshape(*rows.shape, 2) if rows.dtype.itemsize == 8 else rows
        for name, rows in batch.items()
    }
    gathered = jax.device_get(_gather(mesh)(to_global(mesh, words)))
    return {
        name: (
            np.ascontiguousarray(rows).view(batch[name].dtype)[..., 0]
            if batch[name].dtype.itemsize == 8
            else rows
        )
        for name, rows in gathered.items()
    }


@functools.cache
def _gather(mesh: Mesh) -> Program:
    return Program(lambda x: x, name="everywhere", out_shardings=replicated(mesh))


def split_rows(mesh: Mesh, rows: np.ndarray) -> jax.Array:
    """Rows that every host has, as one global array split over the data axes, which must divide
    their number."""
    return jax.make_array_from_callback(rows.shape, data_sharding(mesh), lambda index: rows[index])
