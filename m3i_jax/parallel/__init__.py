"""Devices as a mesh with axes (replica, fsdp, tensor), rules from parameter paths to shardings, and the way of a host's rows to one global
array. Knows neither models nor training: it speaks of trees and names."""

from m3i_jax.parallel.barriers import HostMissing, Together, call, exchange, first, hosts, wait
from m3i_jax.parallel.distributed import from_first
from m3i_jax.parallel.gathered import GATHERED, by_hand, mean_over_devices
from m3i_jax.parallel.memory import held, room
from m3i_jax.parallel.mesh import (
    AXES,
    DATA,
    by_device,
    data_sharding,
    everywhere,
    hint,
    kernels,
    make_mesh,
    own_rows,
    platform,
    replicated,
    rows_of_device,
    split_rows,
    stands_alone,
    to_global,
)
from m3i_jax.parallel.rules import RULES, shardings

__all__ = [
    "AXES",
    "DATA",
    "GATHERED",
    "RULES",
    "HostMissing",
    "Together",
    "by_device",
    "by_hand",
    "call",
    "data_sharding",
    "everywhere",
    "exchange",
    "first",
    "from_first",
    "held",
    "hint",
    "hosts",
    "kernels",
    "make_mesh",
    "own_rows",
    "mean_over_devices",
    "platform",
    "replicated",
    "room",
    "rows_of_device",
    "shardings",
    "split_rows",
    "stands_alone",
    "to_global",
    "wait",
]
