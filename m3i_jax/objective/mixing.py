"""Mixing and un-mixing of image pairs, M3I section 3.4: `I_mix = m * I_i + (1 - m) * I_j` with a
mask m that is constant on patches.

The partner of row b of a batch is row b ^ 1, so rows 2k and 2k + 1 are partners. Every image has
the role i (own, m = 1) in its own row and the role j in its partner's. A batch that is sharded in
even parts needs no communication. With non-overlapping patches, mixing pixels equals mixing
embeddings.

B images, N cells, K own cells, H = N - K cells of the partner, T tokens, D width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from m3i_jax.objective.manual_axes import custom_vjp
from m3i_jax.objective.numerics import assert_rank, assert_shape


def partner(x: ArrayLike) -> jax.Array:
    """Returns the partner of each row: rows 2k and 2k + 1 of the first axis are exchanged.

    Args:
      x: [B, ...], B even.

    Returns:
      the same shape and type. Applied twice it gives x.

    Raises:
      ValueError: an odd number of rows, or a scalar.

    >>> import jax.numpy as jnp
    >>> partner(jnp.arange(6)).tolist()
    [1, 0, 3, 2, 5, 4]
    """
    x = jnp.asarray(x)
    if x.ndim < 1 or x.shape[0] % 2:
        raise ValueError(
            f"x has shape {x.shape}; the first axis must be even, because rows are mixed in pairs"
        )
    return jnp.flip(x.reshape(x.shape[0] // 2, 2, *x.shape[1:]), 1).reshape(x.shape)


def mix(x_BxN: ArrayLike, mask_BxN: ArrayLike) -> jax.Array:
    """Returns the mixed input: cell n of row b is its own where the mask is True and its partner's
    elsewhere (M3I section 3.4).

    Args:
      x_BxN: [B, N, ...] patches or embeddings with the cells on axis 1, B even.
      mask_BxN: bool [B, N]; True = own.

    Returns:
      the shape and type of x. Exchanging the rows of every pair and inverting the mask gives the
      same array.

    Raises:
      ValueError: an odd number of rows, or a mask whose shape is not [B, N].

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1, 2, 3], [7, 8, 9]])
    >>> mix(x, jnp.array([[True, False, True], [True, True, False]])).tolist()
    [[1, 8, 3], [7, 8, 3]]
    """
    x_BxN, mask_BxN = jnp.asarray(x_BxN), jnp.asarray(mask_BxN).astype(bool)
    _check_check_cells(x_BxN, mask_BxN)
    return jnp.where(
        mask_BxN.reshape(mask_BxN.shape + (1,) * (x_BxN.ndim - 2)), x_BxN, partner(x_BxN)
    )


def split(mask_BxN: ArrayLike, own: int) -> tuple[jax.Array, jax.Array]:
    """Returns indices of the cells that show the own image, and of those that show the partner.

    Args:
      mask_BxN: bool [B, N] with exactly `own` True a row, as the functions of `masks` guarantee;
        True = own. The count is not checked, which would need a transfer to the host.
      own: K, a Python number, because shapes are static.

    Returns:
      (own int32 [B, K], other int32 [B, N - K]), ascending; together each row is a permutation of
      0..N-1.

    Raises:
      ValueError: a mask that is not [B, N], or own outside 0..N.

    >>> import jax.numpy as jnp
    >>> own, other = split(jnp.array([[True, False, True, False]]), 2)
    >>> own.tolist(), other.tolist()
    ([[0, 2]], [[1, 3]])
    """
    mask_BxN = jnp.asarray(mask_BxN).astype(bool)
    assert_rank(mask_BxN, 2, custom_message="mask must be [B, N]")
    if not 0 <= own <= mask_BxN.shape[1]:
        raise ValueError(
            f"own is {own}, but the mask has shape {mask_BxN.shape}: it must lie in"
            f" 0..{mask_BxN.shape[1]}"
        )
    order_BxN = jnp.argsort(~mask_BxN, axis=1, stable=True).astype(jnp.int32)
    return order_BxN[:, :own], order_BxN[:, own:]


def gather(x_BxT: ArrayLike, index_BxK: ArrayLike) -> jax.Array:
    """Returns tokens of given indices: `out[b, k] = x[b, index[b, k]]`.

    Args:
      x_BxT: [B, T, ...].
      index_BxK: integer [B, K] in 0..T-1 (not checked).

    Returns:
      [B, K, ...] of the type of x.

    Raises:
      ValueError: an index that is not [B, K] for the B of x.

    >>> import jax.numpy as jnp
    >>> gather(jnp.array([[[1.], [2.], [3.]]]), jnp.array([[2, 0]])).tolist()
    [[[3.0], [1.0]]]
    """
    x_BxT, index_BxK = jnp.asarray(x_BxT), jnp.asarray(index_BxK)
    assert_rank(index_BxK, 2, custom_message="index must be [B, K]")
    assert_shape(
        x_BxT, (index_BxK.shape[0], None, ...), custom_message=f"x, with index {index_BxK.shape}"
    )
    index = index_BxK.reshape(index_BxK.shape + (1,) * (x_BxT.ndim - 2))
    return jnp.take_along_axis(x_BxT, index, axis=1, mode="promise_in_bounds")


def unmix(x_BxN: ArrayLike, mask_BxN: ArrayLike, own: int) -> tuple[jax.Array, jax.Array]:
    """Returns the tokens of a mixed sequence, separated by image.

    Equal to gathering both index sets of `split`, but computed as one permutation, whose backward
    pass is the inverse permutation and needs no scatter.

    Args:
      x_BxN: [B, N, ...] tokens of the mixed input, one a cell (without cls).
      mask_BxN: bool [B, N] with exactly `own` True a row; True = own.
      own: K, a Python number.

    Returns:
      (own [B, K, ...], other [B, N - K, ...]) in ascending order of cells. `other[b]` shows the
      partner, image b ^ 1.

    Raises:
      ValueError: a mask that is not [B, N] for x, or own outside 0..N.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1., 8., 3.], [7., 8., 3.]])
    >>> own, other = unmix(x, jnp.array([[True, False, True], [True, True, False]]), 2)
    >>> own.tolist(), other.tolist()
    ([[1.0, 3.0], [7.0, 8.0]], [[8.0], [3.0]])
    """
    x_BxN = jnp.asarray(x_BxN)
    _check_check_cells(x_BxN, jnp.asarray(mask_BxN))
    order_BxN = jnp.concatenate(split(mask_BxN, own), 1)
    sorted_BxN = _permute(x_BxN, order_BxN)
    return sorted_BxN[:, :own], sorted_BxN[:, own:]


@custom_vjp
def _permute(x_BxN: jax.Array, order_BxN: jax.Array) -> jax.Array:
    return gather(x_BxN, order_BxN)


def _permute_forward(x_BxN: jax.Array, order_BxN: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gather(x_BxN, order_BxN), order_BxN


def _permute_backward(order_BxN: jax.Array, g_BxN: jax.Array) -> tuple[jax.Array, np.ndarray]:
    inverse_BxN = jnp.argsort(order_BxN, axis=1)
    return gather(g_BxN, inverse_BxN), np.zeros(order_BxN.shape, jax.dtypes.float0)


_permute.defvjp(_permute_forward, _permute_backward)


def _check_check_cells(x: jax.Array, mask: jax.Array) -> None:
    assert_rank(mask, 2, custom_message="mask must be [B, N]")
    assert_shape(x, (*mask.shape, ...), custom_message=f"x, with mask {mask.shape}")
