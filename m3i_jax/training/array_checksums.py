"""Fingerprints of the arrays of a state: what was trained is what was written, and what is read is
what was trained.

The digests of files (digests.py) say that a file is as it was written. Whether the right bytes were
written, and whether what came out of a file in another layout is the same array, only the arrays
can say. A fingerprint is a sum modulo 2^32 over the elements of an array of a mix of their bits and
their place, taken on the devices that hold them. Sums of integers do not depend on their order, so
every layout on any number of devices has the same one. Any one element that differs, by whatever,
changes it; of other differences one in 2^32 is missed."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import parallel
from m3i_jax.parallel.sharding import path_text

_GOLDEN = np.uint32(0x9E3779B1)  # odd: places are told apart


@jax.jit  # traced once for all arrays of a shape, and of a state four have the same
def _one(x: jax.Array) -> jax.Array:
    """The fingerprint uint32 [] of an array of any shape."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = 8 * x.dtype.itemsize
    # 64 bits: two in a new last axis
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{min(width, 32)}")).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    mixed = bits ^ (place * _GOLDEN)
    # each of these can be undone: no two bits of one place become the same
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        mixed = (mixed ^ (mixed >> shift)) * np.uint32(factor)
    mixed ^= mixed >> 16
    # an axis at a time, the last one last, which a processor does several elements at once: four
    # times as fast
    while mixed.ndim:
        mixed = jax.lax.optimization_barrier(jnp.sum(mixed, axis=0, dtype=jnp.uint32))
    return mixed


@dataclasses.dataclass(frozen=True)
class ArrayChecksums:
    """Fingerprints of the arrays of a tree: `values` uint32 [N], which may not be there yet, and
    the N paths."""

    paths: tuple[str, ...]
    values: jax.Array

    def read(self) -> dict[str, str]:
        """{path: fingerprint}; waits for the devices."""
        return {
            path: f"{value:08x}"
            for path, value in zip(self.paths, np.asarray(self.values).tolist(), strict=True)
        }


def checksum_arrays(state: Any) -> ArrayChecksums:
    """Fingerprints of a tree of arrays, on every host; they are computed behind, of the arrays as
    they are now.

    >>> checksum_arrays({"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.int32(7)}).read()
    {'a': '42d88fd1', 'b': '948ba1e6'}
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    layouts = [leaf.sharding for _, leaf in leaves if isinstance(leaf, jax.Array)]
    mesh = next(
        (layout.mesh for layout in layouts if isinstance(layout, jax.sharding.NamedSharding)), None
    )
    return ArrayChecksums(tuple(path_text(path) for path, _ in leaves), _compiled(mesh)(state))


@functools.cache
def _compiled(mesh: jax.sharding.Mesh | None) -> Any:
    whole = None if mesh is None else parallel.replicated(mesh)
    return parallel.Program(
        lambda tree: jnp.stack([_one(leaf) for leaf in jax.tree.leaves(tree)]),
        name="fingerprints",
        out_shardings=whole,
    )


def changed_arrays(state: Any, noted: Mapping[str, str]) -> list[str]:
    """Paths of the arrays that are not those of which the fingerprints were noted, or were not
    noted."""
    return [
        path for path, value in checksum_arrays(state).read().items() if noted.get(path) != value
    ]
