"""Assigns ground truth to predictions: labels of anchors and proposals by IoU, a random sample of
fixed size from them, and the optimal assignment of a set of predictions.

Shapes are static: padding is marked by `valid`, and what is not there has weight 0. Every function
works under `jax.jit` and `jax.vmap`; nothing has a gradient.

M, R ground-truth objects; N anchors or proposals; C predictions."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from m3i_jax.objective.manual_axes import vary_like
from m3i_jax.objective.numerics import assert_equal_shape, assert_rank, assert_shape, float32

# States of the loops of `hungarian`: prices of rows and columns, column of a row, row of a column;
_Prices = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
# row, length of the path, lengths, rows before and `done` of the columns, last column;
_Search = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]
# column, and the matching.
_Walk = tuple[jax.Array, jax.Array, jax.Array]


def match_boxes(
    iou_MxN: ArrayLike, valid_M: ArrayLike, *, low: float, high: float, keep_best: bool
) -> tuple[jax.Array, jax.Array]:
    """Labels every anchor or proposal by its IoU with the ground truth, as detectron2 does.

    An anchor belongs to the box with which its IoU is greatest, the first of equals. Below `low` it
    is background, below `high` ignored, else foreground. With `keep_best`, each anchor whose IoU
    with some box equals the best that this box has with any anchor becomes foreground, too, so that
    no box goes without; it still belongs to its own best box, which may be another. A box that
    overlaps no anchor makes foreground of all anchors that do not overlap it (its best is 0), as in
    the reference.

    Args:
      iou_MxN: IoU of every box with every anchor, `box_iou`.
      valid_M: bool, which boxes exist; the others are padding.
      low, high: thresholds, low <= high; .3 and .7 in the region proposal network, .5 and .5 in the
        box head.
      keep_best: True in the region proposal network, False in the box head.

    Returns:
      (label, index), int32 [N]: 1 foreground, 0 background, -1 ignored; the row of the box that an
      anchor belongs to. Without boxes, all anchors are background, of row 0.

    Raises:
      ValueError: shapes that do not belong together, or low > high.

    >>> iou = jnp.array([[0.8, 0.5, 0.1, 0.0], [0.0, 0.0, 0.2, 0.1], [0.0, 0.9, 0.0, 0.0]])
    >>> valid = jnp.array([True, True, False])
    >>> label, index = match_boxes(iou, valid, low=0.3, high=0.7, keep_best=True)
    >>> label.tolist(), index.tolist()
    ([1, -1, 1, 0], [0, 0, 1, 1])
    """
    iou_MxN, valid_M = float32(iou_MxN), jnp.asarray(valid_M, bool)
    assert_rank(iou_MxN, 2)
    assert_shape(valid_M, iou_MxN.shape[:1], custom_message="one `valid` per row of iou")
    if low > high:
        raise ValueError(f"low {low} is greater than high {high}")
    if not iou_MxN.size:
        nothing_N = jnp.zeros(iou_MxN.shape[1], jnp.int32)
        return nothing_N, nothing_N
    iou_MxN = jax.lax.stop_gradient(jnp.where(valid_M[:, None], iou_MxN, -1.0))
    best_N, index_N = iou_MxN.max(0), iou_MxN.argmax(0).astype(jnp.int32)
    label_N = jnp.where(best_N < low, 0, jnp.where(best_N < high, -1, 1)).astype(jnp.int32)
    if keep_best:
        # A padded row is -1 everywhere: every anchor would equal its best.
        equal_MxN = (iou_MxN == iou_MxN.max(1, keepdims=True)) & valid_M[:, None]
        label_N = jnp.where(equal_MxN.any(0), 1, label_N)
    return label_N, index_N


def sample_labels(
    label_N: ArrayLike, uniform_N: ArrayLike, count: int, foreground: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws `count` of the labelled anchors or proposals, at most `foreground` of them foreground;
    background takes the rest, and ignored ones are never drawn.

    Foreground comes first, so that what concerns foreground alone (boxes, masks) reads the first
    `foreground` slots.

    Args:
      label_N: int, 1 foreground, 0 background, anything else is never drawn: `match_boxes`.
      uniform_N: uniform random numbers in [0, 1), one per anchor; the same numbers draw the same
        sample. Those of an image must depend on its position in the stream alone.
      count: slots.
      foreground: most foreground slots, 0..count.

    Returns:
      (index, is_foreground, weight), [count] each: int32 positions in 0..N-1; bool; float32, 1 for
      a drawn slot, 0 where there were not enough anchors. A slot of weight 0 has some valid index.

    Raises:
      ValueError: shapes that do not belong together, no label, or foreground > count.

    >>> label = jnp.array([0, 1, -1, 1, 1, 0, 0])
    >>> uniform = jnp.array([0.3, 0.1, 0.9, 0.7, 0.2, 0.8, 0.4])
    >>> [x.tolist() for x in sample_labels(label, uniform, count=4, foreground=2)]
    [[3, 4, 5, 6], [True, True, False, False], [1.0, 1.0, 1.0, 1.0]]
    """
    label_N, uniform_N = jnp.asarray(label_N), float32(uniform_N)
    assert_rank(label_N, 1)
    assert_equal_shape([label_N, uniform_N], custom_message="one random number per label")
    if not 0 <= foreground <= count:
        raise ValueError(f"foreground {foreground} is not in 0..{count}, the count")
    size = len(label_N)
    if size == 0:
        raise ValueError("there is no label to sample from")

    def draw(kind: int, most: int) -> tuple[jax.Array, jax.Array]:
        """Returns (indices, how many of them are of this kind)."""
        score_N = jnp.where(label_N == kind, uniform_N, -1.0)
        score, index = jax.lax.top_k(score_N, min(max(most, 1), size))
        return index, (score >= 0)[:most].sum()

    positive, positives = draw(1, foreground)
    negative, negatives = draw(0, count)
    slot = jnp.arange(count)
    is_foreground = slot < positives
    index = jnp.where(
        is_foreground,
        positive[jnp.minimum(slot, len(positive) - 1)],
        negative[jnp.clip(slot - positives, 0, len(negative) - 1)],
    )
    weight = (slot < positives + negatives).astype(jnp.float32)
    return index.astype(jnp.int32), is_foreground, weight


def hungarian(cost_RxC: ArrayLike, valid_R: ArrayLike | None = None) -> jax.Array:
    """Returns the assignment of least total cost: a column of its own for every valid row (the
    Hungarian algorithm as shortest augmenting paths; Crouse, IEEE TAES 2016).

    Rows are added one after the other; padded rows cost no time. Each step of a path is one vector
    operation over all columns, so make the smaller side, the objects, the rows. The result is exact
    up to the rounding of float32 sums. Where several assignments have the same cost, which one is
    returned is not specified.

    Args:
      cost_RxC: cost of every pair, R <= C. A cost that is not finite forbids the pair: it is taken
        only where no assignment is without it.
      valid_R: bool, which rows exist; None: all.

    Returns:
      int32 [R], the column of each row; -1 for rows that do not exist.

    Raises:
      ValueError: shapes that do not belong together, or more rows than columns.

    >>> hungarian(jnp.array([[1.0, 2.0, 9.0], [1.0, 5.0, 9.0], [0.0, 0.0, 0.0]]),
    ...           jnp.array([True, True, False])).tolist()
    [1, 0, -1]
    """
    cost_RxC = jax.lax.stop_gradient(float32(cost_RxC))
    assert_rank(cost_RxC, 2)
    rows, columns = cost_RxC.shape
    if rows > columns:
        raise ValueError(
            f"{rows} rows and {columns} columns: every row needs a column of its own; transpose"
        )
    if valid_R is None:
        valid_R = jnp.ones(rows, bool)
    valid_R = jnp.asarray(valid_R, bool)
    assert_shape(valid_R, (rows,), custom_message="one `valid` per row of cost")
    if rows == 0:
        return jnp.zeros(0, jnp.int32)
    alike: tuple[jax.Array, jax.Array] = vary_like((cost_RxC, valid_R), (cost_RxC, valid_R))
    cost_RxC, valid_R = alike
    cost_RxC = _finite_cost(cost_RxC, valid_R)
    column_C = jnp.arange(columns)

    def add_row(row: jax.Array, carry: _Prices) -> _Prices:
        """Finds the cheapest path from a new row to a free column, and follows it back."""
        u_R, v_C, column_R, row_C = carry

        def search(state: _Search) -> _Search:
            here, least, length_C, before_C, done_C, _ = state
            reach_C = least + cost_RxC[here] - u_R[here] - v_C
            better_C = ~done_C & (reach_C < length_C)
            length_C = jnp.where(better_C, reach_C, length_C)
            before_C = jnp.where(better_C, here, before_C)
            open_C = jnp.where(done_C, jnp.inf, length_C)
            nearest = jnp.argmin(open_C)
            return (
                row_C[nearest],
                open_C[nearest],
                length_C,
                before_C,
                done_C | (column_C == nearest),
                nearest,
            )

        start = (
            row,
            jnp.float32(0),
            jnp.full(columns, jnp.inf, jnp.float32),
            jnp.full(columns, -1, row.dtype),
            jnp.zeros(columns, bool),
            jnp.zeros((), column_C.dtype),
        )
        start = vary_like(start, cost_RxC)
        state = jax.lax.while_loop(lambda state: (state[0] >= 0) & valid_R[row], search, start)
        _, least, length_C, before_C, done_C, last = state
        gain_C = jnp.where(done_C, least - length_C, 0.0)
        matched_R = column_R >= 0
        u_R = u_R + jnp.where(matched_R, gain_C[column_R], 0.0)
        u_R = u_R.at[row].add(least)
        v_C = v_C - gain_C

        def follow(state: _Walk) -> _Walk:
            column, column_R, row_C = state
            here = before_C[column]
            following = jnp.where(here == row, -1, column_R[here])
            return following, column_R.at[here].set(column), row_C.at[column].set(here)

        first = jnp.where(valid_R[row], last, -1)
        _, column_R, row_C = jax.lax.while_loop(
            lambda state: state[0] >= 0, follow, (first, column_R, row_C)
        )
        return u_R, v_C, column_R, row_C

    carry = (
        jnp.zeros(rows, jnp.float32),
        jnp.zeros(columns, jnp.float32),
        jnp.full(rows, -1, column_C.dtype),
        jnp.full(columns, -1, column_C.dtype),
    )
    last_row = jnp.max(jnp.where(valid_R, jnp.arange(rows) + 1, 0))
    _, carry = jax.lax.while_loop(
        lambda state: state[0] < last_row,
        lambda state: (state[0] + 1, add_row(*state)),
        vary_like((jnp.zeros((), column_C.dtype), carry), cost_RxC),
    )
    column_R: jax.Array = carry[2].astype(jnp.int32)
    return column_R


def _finite_cost(cost_RxC: jax.Array, valid_R: jax.Array) -> jax.Array:
    """Costs whose forbidden pairs cost more than any assignment of allowed ones. An infinite cost
    would make NaN of differences."""
    allowed_RxC = jnp.isfinite(cost_RxC) & valid_R[:, None]
    most = jnp.max(jnp.where(allowed_RxC, cost_RxC, -jnp.inf), initial=-jnp.inf)
    least = jnp.min(jnp.where(allowed_RxC, cost_RxC, jnp.inf), initial=jnp.inf)
    spread = jnp.where(most >= least, most - least, 0.0) + 1
    forbidden = jnp.where(most >= least, most, 0.0) + spread * cost_RxC.shape[0]
    return jnp.where(allowed_RxC, cost_RxC, forbidden)
