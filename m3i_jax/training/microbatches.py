"""Division of a batch into microbatches and back, so that every device keeps its rows."""

from typing import Any

import jax

from m3i_jax import parallel


def split_microbatches(tree: Any, count: int, units: int) -> Any:
    """[B, ...] -> [k, B/k, ...]. Units of B / units neighbouring rows are dealt in turn, so that
    each device keeps its rows and the rows of a unit stay together on any mesh. Arrays with one row
    a unit are split in the same way.

    >>> import numpy as np
    >>> split_microbatches(np.arange(8), 2, 4).tolist()
    [[0, 1, 4, 5], [2, 3, 6, 7]]
    """

    def one(x: jax.Array) -> jax.Array:
        dealt = x.reshape(units // count, count, -1, *x.shape[1:]).swapaxes(0, 1)
        return parallel.hint(dealt.reshape(count, -1, *x.shape[1:]), None, parallel.DATA)

    return jax.tree.map(one, tree)


def merge_microbatches(tree: Any, count: int, units: int) -> Any:
    """The inverse of `split_microbatches`: rows in the order and with the sharding of the batch.

    >>> import numpy as np
    >>> merge_microbatches(np.array([[0, 1, 4, 5], [2, 3, 6, 7]]), 2, 4).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """

    def one(x: jax.Array) -> jax.Array:
        collected = x.reshape(count, units // count, -1, *x.shape[2:]).swapaxes(0, 1)
        return parallel.hint(collected.reshape(-1, *x.shape[2:]), parallel.DATA)

    return jax.tree.map(one, tree)
