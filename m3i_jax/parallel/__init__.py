"""The device mesh with axes (replica, fsdp, tensor), rules from parameter paths to shardings,
global arrays from the rows of each host, and coordination of hosts; facts about chips (`chips`).
Works on trees and names, without models or training."""

from m3i_jax.parallel.barriers import (
    CoordinatedStop,
    HostMissing,
    barrier,
    exchange_values,
    fail_together,
    host0_first,
    host_label,
    host_names,
)
from m3i_jax.parallel.distributed import broadcast_from_host0
from m3i_jax.parallel.fsdp import FSDP_GATHERED, mean_over_devices, with_fsdp_gather
from m3i_jax.parallel.gather import gather_bytes
from m3i_jax.parallel.kernel_calls import KernelCall
from m3i_jax.parallel.kernel_checks import reported_checks
from m3i_jax.parallel.memory import bytes_per_device, device_memory
from m3i_jax.parallel.mesh import (
    AXES,
    DATA,
    GPUS,
    allgather_rows,
    assumed_platform,
    check_host_rows,
    data_sharding,
    hint,
    hold_rows,
    is_single_device,
    kernels,
    local_rows,
    make_mesh,
    per_device,
    platform,
    replicated,
    rows_of_device,
    split_axes,
    split_rows,
    to_global,
    trusted,
)
from m3i_jax.parallel.programs import Program, announced_compilations, machine_key
from m3i_jax.parallel.sharding import RULES, tree_shardings

__all__ = [
    "AXES",
    "DATA",
    "FSDP_GATHERED",
    "GPUS",
    "RULES",
    "HostMissing",
    "KernelCall",
    "Program",
    "CoordinatedStop",
    "per_device",
    "with_fsdp_gather",
    "host_label",
    "data_sharding",
    "allgather_rows",
    "assumed_platform",
    "announced_compilations",
    "exchange_values",
    "fail_together",
    "gather_bytes",
    "host0_first",
    "broadcast_from_host0",
    "bytes_per_device",
    "hint",
    "hold_rows",
    "host_names",
    "kernels",
    "local_rows",
    "machine_key",
    "make_mesh",
    "check_host_rows",
    "mean_over_devices",
    "platform",
    "replicated",
    "reported_checks",
    "device_memory",
    "rows_of_device",
    "tree_shardings",
    "split_axes",
    "split_rows",
    "is_single_device",
    "to_global",
    "trusted",
    "barrier",
]
