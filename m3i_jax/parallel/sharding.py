"""One ordered table of path rules: the first pattern that matches a parameter's path decides over
which mesh axes its trailing dimensions are split. Moments and target are found by the same rules,
since their paths end in the parameter's path."""

import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

# (pattern of the path, axes of the last dimensions). Leading dimensions, such as the layer axis of
# stacked blocks, are never split.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(qkv|fc1|query|key|value|input|deep|shallow)/kernel$", ("fsdp", "tensor")),
    (r"(out|fc2|output)/kernel$", ("tensor", "fsdp")),
    # columns are groups, as those of DCNv3's input are
    (r"dcn/(offsets|mask|center)/kernel$", ("fsdp", "tensor")),
    (r"depthwise/kernel$", ()),  # small, and computed with in float32
    (r"token_table$", ("tensor", "fsdp")),
    (r"kernel$", ("fsdp", None)),
    (r"", ()),
)
SMALL = 2**14  # elements; below this a collective costs more than the copy


def path_text(path: tuple[Any, ...]) -> str:
    """A key path of jax.tree_util as text, `opt/target/params/blocks/norm1/scale`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The partition of one array; an axis that does not divide its dimension is dropped.

    >>> from m3i_jax.parallel import make_mesh
    >>> partition_spec("encoder/norm/scale", (768,), make_mesh((1, 1, 1), jax.devices()[:1])) == PartitionSpec()
    True
    """
    size = 1
    for n in shape:
        size *= n
    axes = next(axes for pattern, axes in RULES if re.search(pattern, path))
    if size < SMALL or not axes or len(shape) < len(axes):
        return PartitionSpec()
    dims = shape[len(shape) - len(axes) :]
    kept = [
        axis if axis and mesh.shape[axis] > 1 and n % mesh.shape[axis] == 0 else None
        for axis, n in zip(axes, dims, strict=True)
    ]
    if not any(kept):
        return PartitionSpec()
    return PartitionSpec(*[None] * (len(shape) - len(axes)), *kept)


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """A NamedSharding for every array (or ShapeDtypeStruct) of a tree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(path_text(path), leaf.shape, mesh)),
        tree,
    )
