"""Muon (Jordan et al. 2024; Liu et al. 2025, "Muon is scalable for LLM training"): the momentum of
every matrix of the blocks is made nearly orthogonal before it is added.

The matrices are the kernels of stacked blocks. Each layer is one matrix, and so are query,
key and value, although they are one array. All else, embeddings, position tables, tokens, norms,
biases, poolings and heads, is trained with AdamW, at the same learning rate: the update of a matrix
is scaled to the root mean square of AdamW's. Under an fsdp axis a device needs whole matrices: they
are dealt out, some layers to every device, orthogonalised there, and the results go back to their
shards.

L layers, n matrices, a b rows and columns.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from m3i_jax import parallel
from m3i_jax.parallel.sharding import path_text

# of the quintic iteration x <- c0 x + (c1 a + c2 a a) x, a = x x'; Jordan et al.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
_EPS = 1e-8
_MATRIX = re.compile(r"(^|/)(blocks|layers|projector)/(?!.*(offset|mask))(.*/)?kernel$")


def is_matrix(path: str, shape: tuple[int, ...]) -> bool:
    """Returns whether Muon trains a parameter: a kernel [L, a, b] of stacked blocks.

    >>> is_matrix("encoder/blocks/mlp/fc1/kernel", (12, 768, 3072))
    True
    >>> is_matrix("encoder/patch_embed/kernel", (768, 768)), is_matrix("pool/out/kernel", (8, 8))
    (False, False)
    """
    return len(shape) == 3 and _MATRIX.search(path) is not None


def _parts(path: str) -> int:
    """Matrices side by side in one kernel: query, key and value, or the last two."""
    return 3 if path.endswith("/qkv/kernel") else 2 if path.endswith("/key_value/kernel") else 1


def orthogonalize(x_nxaxb: jax.Array) -> jax.Array:
    """Returns every matrix with singular values of about 1 (0.7 to 1.2): five Newton-Schulz steps,
    in the type of x, on the side with fewer rows.

    >>> x = jnp.array([[[3.0, 0.0], [0.0, 0.5]]])
    >>> bool((jnp.abs(jnp.linalg.svd(orthogonalize(x))[1] - 1) < 0.35).all())
    True
    """
    wide = x_nxaxb.shape[1] <= x_nxaxb.shape[2]
    x = x_nxaxb if wide else x_nxaxb.swapaxes(1, 2)
    x = x / (jnp.sqrt(jnp.square(x).sum((1, 2), keepdims=True)) + _EPS)
    c0, c1, c2 = COEFFICIENTS
    for _ in range(STEPS):
        a = x @ x.swapaxes(1, 2)
        x = c0 * x + (c1 * a + c2 * (a @ a)) @ x
    return x if wide else x.swapaxes(1, 2)


def orthogonal_update(path: str, momentum_Lxaxb: jax.Array, rms: float) -> jax.Array:
    """Returns the update of a stacked kernel before the learning rate, of the same shape: every
    matrix of every layer orthogonal, times `rms` sqrt(max(a, b)), so that a number of it has about
    this size.

    >>> run = lambda moved: orthogonal_update("blocks/attention/qkv/kernel", moved, 0.2)
    >>> jax.eval_shape(run, jnp.ones((2, 4, 12))).shape
    (2, 4, 12)
    """
    layers, rows, columns = momentum_Lxaxb.shape
    parts = _parts(path)
    split = momentum_Lxaxb.reshape(layers, rows, parts, columns // parts)
    x_nxaxb = split.swapaxes(1, 2).reshape(-1, rows, columns // parts)
    x_nxaxb = rms * math.sqrt(max(x_nxaxb.shape[1:])) * _dealt(orthogonalize, x_nxaxb)
    return x_nxaxb.reshape(layers, parts, rows, -1).swapaxes(1, 2).reshape(momentum_Lxaxb.shape)


def _dealt(function: Callable[[jax.Array], jax.Array], x_nxaxb: jax.Array) -> jax.Array:
    """`function` of matrices that are dealt out along the fsdp axis, which splits their rows or
    columns. Matrices of zeros fill up to a multiple of its devices."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = mesh.shape["fsdp"] if "fsdp" in mesh.axis_names else 1
    if devices == 1:
        return function(x_nxaxb)
    count = x_nxaxb.shape[0]
    padded = jnp.pad(x_nxaxb, ((0, -count % devices), (0, 0), (0, 0)))
    whole = parallel.hint(padded, "fsdp", None, None)
    return parallel.hint(function(whole), "fsdp", None, None)[:count]


class MuonState(NamedTuple):
    """steps taken, and mu: momentum of the matrices."""

    steps: jax.Array
    mu: Any


def scale_by_muon(momentum: float, rms: float) -> optax.GradientTransformation:
    """Nesterov momentum, then `orthogonal_update`; for trees of matrices alone.

    `m <- momentum m + (1 - momentum) g`, and the update is of
    `momentum m / (1 - momentum^(t+1)) + (1 - momentum) g / (1 - momentum^t)` at step t from 1, as
    `optax.contrib.muon` has it.
    """

    def update(grads: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        count = optax.safe_increment(state.steps)
        steps = count.astype(jnp.float32)
        mu = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state.mu, grads)
        of_m = momentum / (1 - momentum ** (steps + 1))
        of_g = (1 - momentum) / (1 - momentum**steps)
        updates = jax.tree_util.tree_map_with_path(
            lambda path, m, g: orthogonal_update(path_text(path), of_m * m + of_g * g, rms),
            mu,
            grads,
        )
        return updates, MuonState(count, mu)

    return optax.GradientTransformation(
        lambda params: MuonState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params)),
        update,
    )


def muon_or_adam(
    *, momentum: float, rms: float, b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
    """`scale_by_muon` for matrices of blocks, `optax.scale_by_adam` for everything else. Decay and
    learning rate follow in the chain.

    >>> tx = muon_or_adam(momentum=0.95, rms=0.2, b1=0.9, b2=0.95, eps=1e-8)
    >>> params = {"blocks": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))}}
    >>> updates, _ = tx.update(params, tx.init(params))
    >>> updates["blocks"]["bias"][0].round(3).tolist()
    [1.0, 1.0, 1.0]
    """

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: "muon" if is_matrix(path_text(path), leaf.shape) else "adam", params
        )

    rules = {
        "muon": scale_by_muon(momentum, rms),
        "adam": optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
    }
    return optax.partition(rules, labels)
