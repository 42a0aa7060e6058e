"""FSDP: on a mesh with an fsdp axis, functions of rows gather their own weights under `shard_map`,
stacked blocks one block at a time. This is the only exception to sharding by `jit`.

The partitioner would gather whole stacks, or leaf by leaf in float32, or move activations instead.
Here the split leaves of a block are cast to the compute precision and concatenated into one matrix,
whose rows are those of the split dimension. It is gathered once in the forward pass and, unless
kept, once more in the backward pass; the transpose is one reduce-scatter of the block's gradients.
Replicated leaves stay float32, and their gradients are summed once per stack."""

import collections
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AbstractMesh, PartitionSpec

from m3i_jax.parallel.mesh import DATA
from m3i_jax.parallel.sharding import partition_spec, path_text

# name of gathered weights for policies of jax.checkpoint
FSDP_GATHERED = "gathered"
_SHARDS = "fsdp"


def with_fsdp_gather(
    run: Callable[..., jax.Array],
    params: Any,
    x_Bx: jax.Array,
    along_LxBx: Any = None,
    beside_Bx: Any = None,
    *,
    dtype: Any,
    stacked: bool,
) -> jax.Array:
    """`run(gather, params, x, along, beside)`; with an fsdp axis, on every device with its own rows
    and its own part of the weights.

    Args:
      run: a function of rows. It calls `gather` on parameters before it uses them, on those of one
        block if they are stacked, inside the part that is recomputed.
      params: parameters, sharded by the path rules.
      x_Bx: rows; the output has as many.
      along_LxBx: tree of arrays with rows for every block; None: none.
      beside_Bx: tree of arrays with the same rows for all blocks; None: none.
      dtype: precision in which weights are gathered, and their gradients scattered.
      stacked: whether every parameter has a leading axis [L, ...] that `gather` does not see.

    Returns:
      the output of `run`. `gather` is the identity outside a mesh, without an fsdp axis that splits
      one of the parameters, within another call, or with rows that the devices do not divide.

    >>> add = lambda gather, params, x, *_: x + gather(params)["bias"].sum()
    >>> params = {"bias": jnp.ones(3)}
    >>> print(with_fsdp_gather(add, params, jnp.zeros(2), dtype="float32", stacked=False))
    [3. 3.]
    """
    mesh = jax.sharding.get_abstract_mesh()
    arrays = (params, x_Bx, along_LxBx, beside_Bx)
    identity = lambda layer: layer
    if (
        mesh.empty
        or not set(DATA) <= set(mesh.axis_names)
        or mesh.manual_axes
        or mesh.shape[_SHARDS] == 1
    ):
        return run(identity, *arrays)
    split_dims = jax.tree_util.tree_map_with_path(
        lambda path, leaf: _split_dim(path_text(path), leaf.shape, mesh), params
    )
    if max(jax.tree.leaves(split_dims), default=-1) < 0 or x_Bx.shape[0] % math.prod(
        mesh.shape[axis] for axis in DATA
    ):
        return run(identity, *arrays)
    # the partitioner keeps the axis that splits products
    axes = {axis for axis in mesh.axis_names if axis in DATA or mesh.shape[axis] == 1}
    specs = jax.tree.map(
        lambda leaf, dim: PartitionSpec(*(_SHARDS if i == dim else None for i in range(leaf.ndim))),
        params,
        split_dims,
    )
    rows, layer_rows = PartitionSpec(DATA), PartitionSpec(None, DATA)
    dims = [dim - stacked if dim >= 0 else -1 for dim in jax.tree.leaves(split_dims)]
    gather = functools.partial(
        _gather, dims, mesh.shape[_SHARDS], jnp.dtype(dtype), axes == set(mesh.axis_names)
    )
    return jax.shard_map(
        lambda *parts: run(gather, *parts),
        in_specs=(specs, rows, layer_rows, rows), out_specs=rows, axis_names=axes, check_vma=False,
    )(*arrays)  # fmt: skip


def mean_over_devices(x: jax.Array) -> jax.Array:
    """Mean over the devices that hold rows of a batch, inside `with_fsdp_gather`; elsewhere x, as
    an array there has all rows.

    >>> print(mean_over_devices(jnp.ones(2)))
    [1. 1.]
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in DATA if axis in mesh.manual_axes)
    return jax.lax.pmean(x, axes) if axes else x


def _split_dim(path: str, shape: tuple[int, ...], mesh: AbstractMesh) -> int:
    """The dimension of a leaf that the fsdp axis splits; -1: none."""
    axes = tuple(partition_spec(path, shape, mesh))
    return axes.index(_SHARDS) if _SHARDS in axes else -1


def _gather(dims: list[int], devices: int, dtype: Any, packed: bool, layer: Any) -> Any:
    """Full parameters from a device's part. `packed`: leaves split into equally many rows are
    gathered in one collective."""
    leaves, structure = jax.tree.flatten(layer)
    groups: dict[Any, list[int]] = collections.defaultdict(list)
    for i, (leaf, dim) in enumerate(zip(leaves, dims, strict=True)):
        if dim >= 0:  # columns that another axis splits are not concatenated
            groups[leaf.shape[dim] if packed else (i,)].append(i)
    for group in groups.values():
        # the split dimension first, all others in columns
        parts = [jnp.moveaxis(leaves[i].astype(dtype), dims[i], 0) for i in group]
        flat = [part.reshape(part.shape[0], -1) if packed else part for part in parts]
        buffer = flat[0] if len(flat) == 1 else jnp.concatenate(flat, 1)
        full = jax.lax.all_gather(buffer, _SHARDS, axis=0, tiled=True)
        # The gradient is row-major too: with columns first the TPU compiler sums all of it on every
        # device.
        gathered = checkpoint_name(
            with_layout_constraint(full, Layout(tuple(range(full.ndim)))), FSDP_GATHERED
        )
        pieces = (
            jax.lax.split(gathered, [each.shape[1] for each in flat], 1)
            if len(flat) > 1
            else [gathered]
        )
        for i, part, piece in zip(group, parts, pieces, strict=True):
            leaves[i] = jnp.moveaxis(
                piece.reshape(part.shape[0] * devices, *part.shape[1:]), 0, dims[i]
            )
    return jax.tree.unflatten(structure, leaves)
