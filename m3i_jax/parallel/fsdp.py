"""The one exception to sharding by `jit` alone: on a mesh with an fsdp axis, functions of rows
gather their weights themselves, under `shard_map`; blocks that run one after the other a block at a
time.

Left to itself the partitioner gathers whole stacks, or leaf by leaf in float32, or moves
activations instead. Here nothing is left to decide: the split leaves of a block are cast to the
compute precision and laid side by side in one matrix, whose rows are those of the split dimension.
It is gathered once in the forward and, unless kept, once more in the backward; the transpose is one
reduce-scatter of the block's gradients. Leaves that are whole everywhere stay float32, and their
gradients are added up once a stack."""

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

# by this name a policy of jax.checkpoint keeps weights that were gathered
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
    """`run(open, params, x, along, beside)`, on every device its own rows and its own part of the
    weights where there is an fsdp axis.

    Args: run: a function of rows. It calls `open` on parameters before they are used, of stacked
      blocks on those of one block, inside whatever is recomputed.
      params: parameters, laid out by the path rules.
      x_Bx: rows; the output has as many.
      along_LxBx: tree of arrays that every block has rows of; None: none.
      beside_Bx: tree of arrays with the same rows for all; None: none.
      dtype: precision that weights are gathered in, and their gradients scattered.
      stacked: whether every parameter has a leading axis [L, ...] that `open` does not see.

    Returns: what `run` returns. Outside a mesh, without an fsdp axis that splits one of the
      parameters, within another call, or with rows that do not divide among the devices, `open`
      does nothing.

    >>> add = lambda open, params, x, *_: x + open(params)["bias"].sum()
    >>> print(with_fsdp_gather(add, {"bias": jnp.ones(3)}, jnp.zeros(2), dtype="float32", stacked=False))
    [3. 3.]
    """
    mesh = jax.sharding.get_abstract_mesh()
    arrays = (params, x_Bx, along_LxBx, beside_Bx)
    whole = lambda layer: layer
    if (
        mesh.empty
        or not set(DATA) <= set(mesh.axis_names)
        or mesh.manual_axes
        or mesh.shape[_SHARDS] == 1
    ):
        return run(whole, *arrays)
    places = jax.tree_util.tree_map_with_path(
        lambda path, leaf: _place(path_text(path), leaf.shape, mesh), params
    )
    if max(jax.tree.leaves(places), default=-1) < 0 or x_Bx.shape[0] % math.prod(
        mesh.shape[axis] for axis in DATA
    ):
        return run(whole, *arrays)
    # An axis that splits products stays with the partitioner.
    axes = {axis for axis in mesh.axis_names if axis in DATA or mesh.shape[axis] == 1}
    specs = jax.tree.map(
        lambda leaf, place: PartitionSpec(
            *(_SHARDS if i == place else None for i in range(leaf.ndim))
        ),
        params,
        places,
    )
    rows, layer_rows = PartitionSpec(DATA), PartitionSpec(None, DATA)
    inner = [place - stacked if place >= 0 else -1 for place in jax.tree.leaves(places)]
    opened = functools.partial(
        _open, inner, mesh.shape[_SHARDS], jnp.dtype(dtype), axes == set(mesh.axis_names)
    )
    return jax.shard_map(
        lambda *parts: run(opened, *parts),
        in_specs=(specs, rows, layer_rows, rows), out_specs=rows, axis_names=axes, check_vma=False,
    )(*arrays)  # fmt: skip


def mean_over_devices(x: jax.Array) -> jax.Array:
    """The mean over the devices that hold rows of a batch, inside `with_fsdp_gather`; x itself
    elsewhere, where an array is all of its rows.

    >>> print(mean_over_devices(jnp.ones(2)))
    [1. 1.]
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in DATA if axis in mesh.manual_axes)
    return jax.lax.pmean(x, axes) if axes else x


def _place(path: str, shape: tuple[int, ...], mesh: AbstractMesh) -> int:
    """The dimension of a leaf that is split, -1: none."""
    axes = tuple(partition_spec(path, shape, mesh))
    return axes.index(_SHARDS) if _SHARDS in axes else -1


def _open(places: list[int], devices: int, dtype: Any, packed: bool, layer: Any) -> Any:
    """The whole parameters from a device's part of them. `packed`: those split into as many rows
    travel together."""
    leaves, structure = jax.tree.flatten(layer)
    groups: dict[Any, list[int]] = collections.defaultdict(list)
    for i, (leaf, place) in enumerate(zip(leaves, places, strict=True)):
        if place >= 0:  # columns that another axis splits are not laid side by side
            groups[leaf.shape[place] if packed else (i,)].append(i)
    for mine in groups.values():
        # the split dimension first, all else in columns
        parts = [jnp.moveaxis(leaves[i].astype(dtype), places[i], 0) for i in mine]
        flat = [part.reshape(part.shape[0], -1) if packed else part for part in parts]
        buffer = flat[0] if len(flat) == 1 else jnp.concatenate(flat, 1)
        whole = jax.lax.all_gather(buffer, _SHARDS, axis=0, tiled=True)
        # Rows of the gradient, too, lie one behind the other: laid out by columns, the TPU compiler
        # adds it up whole on every device.
        gathered = checkpoint_name(
            with_layout_constraint(whole, Layout(tuple(range(whole.ndim)))), FSDP_GATHERED
        )
        pieces = (
            jax.lax.split(gathered, [each.shape[1] for each in flat], 1)
            if len(flat) > 1
            else [gathered]
        )
        for i, part, piece in zip(mine, parts, pieces, strict=True):
            leaves[i] = jnp.moveaxis(
                piece.reshape(part.shape[0] * devices, *part.shape[1:]), 0, places[i]
            )
    return jax.tree.unflatten(structure, leaves)
