"""The table of sharding rules: the first pattern that matches a parameter's path decides over which
mesh axes its trailing dimensions are split. Moments and target follow the same rules, since their
paths end in the parameter's path."""

import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

# (pattern of the path, axes of the last dimensions). Leading dimensions, such as the layer axis of
# stacked blocks, are never split.
ShardingRules = tuple[tuple[str, tuple[str | None, ...]], ...]
RULES: ShardingRules = (
    (r"(qkv|fc1|query|key|value|input)/kernel$", ("fsdp", "tensor")),
    (r"(out|fc2|output)/kernel$", ("tensor", "fsdp")),
    (r"token_table$", ("tensor", "fsdp")),
    (r"(^|/)prototypes$", ("fsdp", None)),
    (r"kernel$", ("fsdp", None)),
    (r"", ()),
)
SMALL = 2**14  # elements; below this a collective costs more than the copy
_added: list[tuple[str, tuple[str | None, ...]]] = []


def add_rules(rules: ShardingRules) -> None:
    """Add the rules of a backbone. They are tried before RULES and after those added earlier.

    >>> add_rules(())
    """
    _added.extend(rule for rule in rules if rule not in _added)


def path_text(path: tuple[Any, ...]) -> str:
    """A key path of jax.tree_util as text, `opt/target/params/blocks/norm1/scale`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The partition of one array; an axis that does not divide its dimension is dropped.

    >>> from m3i_jax.parallel import make_mesh
    >>> mesh = make_mesh((1, 1, 1), jax.devices()[:1])
    >>> partition_spec("encoder/norm/scale", (768,), mesh) == PartitionSpec()
    True
    """
    size = 1
    for n in shape:
        size *= n
    axes = next(axes for pattern, axes in (*_added, *RULES) if re.search(pattern, path))
    if size < SMALL or not axes or len(shape) < len(axes):
        return PartitionSpec()
    dims = shape[len(shape) - len(axes) :]
    split = [
        axis if axis and mesh.shape[axis] > 1 and n % mesh.shape[axis] == 0 else None
        for axis, n in zip(axes, dims, strict=True)
    ]
    if not any(split):
        return PartitionSpec()
    return PartitionSpec(*[None] * (len(shape) - len(axes)), *split)


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """A NamedSharding for every array (or ShapeDtypeStruct) of a tree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(path_text(path), leaf.shape, mesh)),
        tree,
    )
