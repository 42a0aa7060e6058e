"""First values of parameters. Modules only declare names and shapes; the rules by name that fill
them are here.

L blocks, D width.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax.models.layers import Block, Params

# value, bound or standard deviation
InitSpec = tuple[Literal["constant", "uniform", "normal"], float]


def shapes_of(module: nn.Module, *inputs: Any) -> Params:
    """Returns the parameters of a module as a tree of shapes.

    >>> from m3i_jax.models.layers import Dense
    >>> shapes_of(Dense(3, jnp.float32), jnp.zeros((1, 2)))["kernel"].shape
    (2, 3)
    """
    return jax.eval_shape(module.init, jax.random.key(0), *inputs).get("params", {})


def fill(
    rng: jax.Array, shapes: Params, rule: Callable[[str, tuple[int, ...]], InitSpec]
) -> dict[str, Any]:
    """Returns initial values of a tree of parameters by a rule, float32. All are slices of one
    draw: one random call per array would make the program several times as slow to compile.

    Args:
      rng: key.
      shapes: tree of arrays, of their shapes and dtypes, or of shapes alone.
      rule: (path, shape) to (constant, value), (uniform, bound) or (normal, std).

    >>> fill(jax.random.key(0), {"a": (2,)}, lambda path, shape: ("constant", 3.0))["a"].tolist()
    [3.0, 3.0]
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(
        shapes, is_leaf=lambda node: isinstance(node, tuple)
    )
    named = [
        ("/".join(str(getattr(k, "key", k)) for k in path), tuple(getattr(leaf, "shape", leaf)))
        for path, leaf in paths
    ]
    rules = [(shape, *rule(path, shape)) for path, shape in named]
    total = sum(math.prod(shape) for shape, kind, _ in rules if kind != "constant")
    open_unit = jax.random.uniform(
        rng, (total,), jnp.float32, minval=np.nextafter(np.float32(-1), np.float32(0)), maxval=1.0
    )
    leaves, offset = [], 0
    for shape, kind, value in rules:
        if kind == "constant":
            # an array of weak type would change type with the first update
            leaves.append(jnp.full(shape, value, jnp.float32))
            continue
        part = open_unit[offset : offset + math.prod(shape)].reshape(shape)
        offset += part.size
        leaves.append(
            value * part if kind == "uniform" else value * math.sqrt(2) * jax.lax.erf_inv(part)
        )
    return jax.tree.unflatten(structure, leaves)


def init_params(
    rng: jax.Array,
    shapes: Params,
    normal: Mapping[str, float] | None = None,
    values: Mapping[str, float] | None = None,
) -> Params:
    """Returns initial values of the parameters of a tower, float32.

    A `scale` is 1 and a `bias` 0. A `kernel` [in, out] is Xavier-uniform, bound sqrt(6 / (in +
    out)): qkv as one [D, 3 D] matrix (MAE, SiameseIM; MoCo v3 takes the bound of each of q, k and
    v), a patch embedding as a [P, D] matrix. Names in `normal` are N(0, std^2) instead.

    Args:
      rng: key.
      shapes: as of `fill`.
      normal: {end of a path: std}; the first that matches.
      values: {name of a parameter: value}, such as that of layer scale.

    Raises:
      ValueError: a parameter without a rule.

    >>> from m3i_jax.models.layers import Dense
    >>> shapes = shapes_of(Dense(50, jnp.float32), jnp.zeros((1, 100)))
    >>> tree = init_params(jax.random.key(0), shapes)
    >>> round(float(jnp.abs(tree["kernel"]).max()), 3), float(jnp.abs(tree["bias"]).max())
    (0.2, 0.0)
    """

    def rule(path: str, shape: tuple[int, ...]) -> InitSpec:
        last = path.split("/")[-1]
        if last in ("scale", "bias"):
            return "constant", float(last == "scale")
        if values and last in values:
            return "constant", values[last]
        std = next((std for end, std in (normal or {}).items() if path.endswith(end)), None)
        if std is not None:
            return "normal", std
        if last == "kernel":
            return "uniform", math.sqrt(6 / sum(shape))
        raise ValueError(f"parameter {path} of shape {shape} has no rule for its first values")

    return fill(rng, shapes, rule)


def init_blocks(
    one: Block,
    rng: jax.Array,
    *,
    width: int,
    depth: int,
    normal: Mapping[str, float] | None = None,
    values: Mapping[str, float] | None = None,
) -> Params:
    """Returns parameters of `depth` blocks, drawn independently and stacked on a leading axis:
    every leaf is [L, ...]. `normal` and `values` as of `init_params`.

    >>> from m3i_jax.models.layers import block
    >>> one = block(8, 2, 4.0, "float32")
    >>> call = lambda key: init_blocks(one, key, width=8, depth=3)
    >>> shapes = jax.eval_shape(call, jax.random.key(0))
    >>> shapes["attention"]["qkv"]["kernel"].shape
    (3, 8, 24)
    """
    shapes = shapes_of(one, jnp.zeros((1, 1, width)))
    return jax.lax.map(
        lambda key: init_params(key, shapes, normal, values), jax.random.split(rng, depth)
    )
