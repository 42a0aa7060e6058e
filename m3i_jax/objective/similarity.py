"""Similarities of all pairs of two lists and their softmax cross-entropies, as one matrix or in
chunks, one of which is in memory at a time.

B rows of both lists, C rows of a chunk, E width.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from m3i_jax.objective.manual_axes import custom_vjp
from m3i_jax.objective.numerics import ABSENT, EXACT


class Pairs(NamedTuple):
    """Rows of one list, from which the existing pairs follow.

    Attributes:
      row: index of the row, [B].
      counts: bool [B], rows that take part; None: all.
      group: [B], different rows of equal group form no pair; None: all pairs exist.
    """

    row: jax.Array
    counts: jax.Array | None = None
    group: jax.Array | None = None


def similarities(u_BxE: jax.Array, v_CxE: jax.Array, of_B: Pairs, of_C: Pairs) -> jax.Array:
    """Returns dot products [B, C] in float32; ABSENT where no pair exists.

    >>> row = Pairs(jnp.arange(2), group=jnp.array([5, 5]))
    >>> (similarities(jnp.eye(2), jnp.eye(2), row, row) > ABSENT / 2).tolist()
    [[True, False], [False, True]]
    """
    logits_BxC = jnp.matmul(u_BxE, v_CxE.T, precision=EXACT)
    if of_B.counts is not None and of_C.counts is not None:
        logits_BxC = jnp.where(of_B.counts[:, None] & of_C.counts[None, :], logits_BxC, ABSENT)
    if of_B.group is not None and of_C.group is not None:
        twin_BxC = (of_B.group[:, None] == of_C.group[None, :]) & (
            of_B.row[:, None] != of_C.row[None, :]
        )
        logits_BxC = jnp.where(twin_BxC, ABSENT, logits_BxC)
    return logits_BxC


def candidate_counts(group_B: jax.Array, weight_B: jax.Array) -> jax.Array:
    """Returns how many candidates the softmax of each row has, float32 [B]: the rows of positive
    weight, without others of its group. Of a row of weight 0 the number has no meaning.

    >>> candidate_counts(jnp.array([5, 5, 7, 5]), jnp.array([1.0, 1, 1, 0])).tolist()[:3]
    [2.0, 2.0, 3.0]
    """
    exists_B, order_B = jnp.asarray(weight_B) > 0, jnp.argsort(group_B)
    sorted_B = group_B[order_B]
    before_B1 = jnp.pad(jnp.cumsum(exists_B[order_B]), (1, 0))
    first_B, end_B = (jnp.searchsorted(sorted_B, group_B, side=side) for side in ("left", "right"))
    same_B = before_B1[end_B] - before_B1[first_B]
    return (exists_B.sum() - same_B + 1).astype(jnp.float32)


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def chunked_cross_entropy(chunk: int, u_BxE: jax.Array, v_BxE: jax.Array, rows: Pairs) -> jax.Array:
    """Returns the mean of two cross-entropies of every row over the products `u v'`: its v among
    all v, and its u among all u.

    Equal to `numerics.softmax_cross_entropy` of the whole matrix and of its transpose. At most
    [B, chunk] similarities are in memory at a time. With u split over devices by rows,
    each holds [B / devices, chunk]; v is gathered, and the sums over images are reduced, a chunk at
    a time.

    Args:
      chunk: rows of v per chunk; the last chunk has the remainder.
      u_BxE, v_BxE: float32; both receive gradients.
      rows: the rows and their pairs.

    Returns:
      float32 [B], nats, never negative.

    >>> rows = Pairs(jnp.arange(2))
    >>> print(chunked_cross_entropy(1, jnp.eye(2), jnp.eye(2), rows).round(4))  # log(1 + exp(-1))
    [0.3133 0.3133]
    """
    return _forward(chunk, u_BxE, v_BxE, rows)[0]


def _over_chunks(chunk: int, add: Callable[..., Any], start: Any, rows: Any) -> tuple[Any, Any]:
    """(result, arrays of all rows) of a scan of `add(running, part) -> (running, arrays of the
    part)` over chunks of rows, then over the remainder."""
    count = jax.tree.leaves(rows)[0].shape[0]
    full = count - count % chunk
    cut = jax.tree.map(lambda x: x[:full].reshape(-1, chunk, *x.shape[1:]), rows)
    running, arrays = jax.lax.scan(add, start, cut)
    arrays = jax.tree.map(lambda x: x.reshape(full, *x.shape[2:]), arrays)
    if full == count:
        return running, arrays
    running, last = add(running, jax.tree.map(lambda x: x[full:], rows))
    return running, jax.tree.map(lambda *x: jnp.concatenate(x), arrays, last)


def _own(of_B: Pairs, of_C: Pairs) -> jax.Array:
    """Bool [B, C]: the positive pairs."""
    return of_B.row[:, None] == of_C.row[None, :]


def _forward(chunk: int, u_BxE: jax.Array, v_BxE: jax.Array, rows: Pairs) -> tuple[jax.Array, Any]:
    def add(
        running: tuple[jax.Array, ...], part: Any
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, jax.Array]]:
        own_B, largest_B, sum_B = running
        logits_BxC, hit_BxC = similarities(u_BxE, part[0], rows, part[1]), _own(rows, part[1])
        matched_BxC, others_BxC = (
            jnp.where(hit_BxC, logits_BxC, 0.0),
            jnp.where(hit_BxC, ABSENT, logits_BxC),
        )
        new_B = jnp.maximum(largest_B, others_BxC.max(1))
        sum_B = sum_B * jnp.exp(largest_B - new_B) + jnp.exp(others_BxC - new_B[:, None]).sum(1)
        own_C = matched_BxC.sum(0)
        over_images_C = jax.nn.softplus(
            jax.nn.logsumexp(jnp.where(hit_BxC, ABSENT, logits_BxC - own_C), axis=0)
        )
        return (own_B + matched_BxC.sum(1), new_B, sum_B), (own_C, over_images_C)

    start_B = u_BxE[:, 0] * 0  # sharded like the rows
    start = start_B, start_B + 2 * ABSENT, start_B
    (own_B, largest_B, sum_B), (of_images_B, over_images_B) = _over_chunks(
        chunk, add, start, (v_BxE, rows)
    )
    # Both terms are differences of similarities, so their rounding error is relative to the loss
    # and not to a similarity.
    over_captions_B = jax.nn.softplus((largest_B - own_B) + jnp.log(sum_B))
    kept = u_BxE, v_BxE, rows, (own_B, over_captions_B), (of_images_B, over_images_B)
    return (over_captions_B + over_images_B) / 2, kept


def _backward(chunk: int, kept: Any, g_B: jax.Array) -> tuple[jax.Array, jax.Array, Pairs]:
    u_BxE, v_BxE, rows, (own_B, cost_B), by_images = kept

    def add(du_BxE: jax.Array, part: Any) -> tuple[jax.Array, jax.Array]:
        v_CxE, of_C, (own_C, cost_C), g_C = part
        logits_BxC, hit_BxC = similarities(u_BxE, v_CxE, rows, of_C), _own(rows, of_C)

        def softmax(own: jax.Array, cost: jax.Array) -> jax.Array:
            """Gradient of the cost by the logits: probabilities, and for the positive pair minus
            the sum of the other probabilities."""
            return jnp.where(hit_BxC, jnp.expm1(-cost), jnp.exp(logits_BxC - own - cost))

        dlogits_BxC = (
            g_B[:, None] * softmax(own_B[:, None], cost_B[:, None]) + g_C * softmax(own_C, cost_C)
        ) / 2
        du_BxE += jnp.matmul(dlogits_BxC, v_CxE, precision=EXACT)
        return du_BxE, jnp.matmul(dlogits_BxC.T, u_BxE, precision=EXACT)

    du_BxE, dv_BxE = _over_chunks(chunk, add, jnp.zeros_like(u_BxE), (v_BxE, rows, by_images, g_B))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, jax.dtypes.float0), rows)
    return du_BxE, dv_BxE, nothing


chunked_cross_entropy.defvjp(_forward, _backward)
