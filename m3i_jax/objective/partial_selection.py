"""The smallest entries of rows where their order does not matter.

XLA's CPU compiler sorts a heap of the entries that it keeps, which for a quarter of a row takes
three times as long as what is done here: the entry that divides them is found bit by bit, by
counting, and the ones below it move together. M rows, N entries, S selected.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax.objective.manual_axes import vary_like

_BLOCK = 64  # entries that one small product counts


def smallest_indices(x_MxN: jax.Array, count: int) -> jax.Array:
    """Where the `count` smallest entries of every row are, int32 [M, S], in any order; of equal
    entries the first.

    Args:
      x_MxN: float32, not negative; NaN is greatest.
      count: S, at most N.

    >>> found = smallest_indices(jnp.array([[3.0, 1.0, 2.0], [0.0, 5.0, 0.0]]), 2)
    >>> np.sort(found).tolist()
    [[1, 2], [0, 2]]
    """
    forms: dict[str, Any] = {
        "cpu": lambda x: _by_counting(x, count),
        "default": lambda x: jax.lax.top_k(-x, count)[1],
    }
    index_MxS: jax.Array = jax.lax.platform_dependent(x_MxN, **forms)
    return index_MxS


def _by_counting(x_MxN: jax.Array, count: int) -> jax.Array:
    rows, entries = x_MxN.shape
    # numbers that are not negative have the order of their bits
    bits_MxN = jax.lax.bitcast_convert_type(x_MxN, jnp.int32)

    def add_bit(i: jax.Array, low_M: jax.Array) -> jax.Array:
        higher_M = low_M | (1 << (30 - i))
        below_M = jnp.where(bits_MxN < higher_M[:, None], 1.0, 0.0).sum(1)
        return jnp.where(below_M < count, higher_M, low_M)

    start_M = vary_like(jnp.zeros(rows, jnp.int32), x_MxN)
    last_M = jax.lax.fori_loop(0, 31, add_bit, start_M)  # the greatest selected
    below_MxN, equal_MxN = bits_MxN < last_M[:, None], bits_MxN == last_M[:, None]
    before_MxN = _running_count(below_MxN)
    ties_MxN = before_MxN[:, -1:] + _running_count(equal_MxN)
    to_MxN = jnp.where(below_MxN, before_MxN, jnp.where(equal_MxN, ties_MxN, count + 1)) - 1
    index_MxN = jnp.broadcast_to(jnp.arange(entries, dtype=jnp.int32), x_MxN.shape)
    out_MxS, row_Mx1 = jnp.zeros((rows, count), jnp.int32), jnp.arange(rows)[:, None]
    return out_MxS.at[row_Mx1, to_MxN.astype(jnp.int32)].set(index_MxN, mode="drop")


def _running_count(flags_MxN: jax.Array) -> jax.Array:
    """How many flags of a row are set up to and with each, float32 [M, N]: products with triangles
    of ones, which are faster than jnp.cumsum on a CPU."""
    rows, entries = flags_MxN.shape
    blocks = -(-entries // _BLOCK)
    padded = jnp.pad(flags_MxN.astype(jnp.float32), [(0, 0), (0, blocks * _BLOCK - entries)])
    up_to = np.triu(np.ones((_BLOCK, _BLOCK), np.float32))
    before = np.triu(np.ones((blocks, blocks), np.float32), 1)
    with jax.named_scope("flops=0"):  # no work of the model
        inside = jnp.matmul(padded.reshape(rows, blocks, _BLOCK), up_to)
        earlier = jnp.matmul(inside[..., -1], before)
    return (inside + earlier[..., None]).reshape(rows, -1)[:, :entries]
