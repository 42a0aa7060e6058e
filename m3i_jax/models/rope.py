"""Rotary positions in two axes (axial RoPE), as in DINOv3: queries and keys are turned by angles of
their own patch, so that a product of the two depends on the difference of their positions.

Half of the angles of a head are of the row, half of the column. Coordinates are the centres of the
patches in -1..1 of the view, whatever its grid. Tokens before the patches (cls, registers) are not
turned. Every value is float32.

Rows and columns of a decoder's queries, `positions.relative_positions`, are of the input view's
grid too, and the decoder gives the tokens that it reads their cells itself
(`positions.sincos_2d`): a target position relative to the input view means the same, whether the
encoder has a table or turns.

B images, T tokens, N patches of a grid, K patches read, H heads, E width of a head.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# cosines and sines [B, T, E / 2]; [1, T, E / 2] for all images
Rotation = tuple[jax.Array | np.ndarray, jax.Array | np.ndarray]


def patch_centres(grid: int | tuple[int, int]) -> np.ndarray:
    """Returns (row, column) of the centre of every patch in -1..1, [N, 2] float64, row by row.

    >>> patch_centres((1, 2)).tolist()
    [[0.0, -0.5], [0.0, 0.5]]
    """
    sides = (grid, grid) if isinstance(grid, int) else grid
    rows, columns = ((np.arange(side) + 0.5) / side * 2 - 1 for side in sides)
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)


def axial_angles(centres_Nx2: np.ndarray, head_width: int, base: float) -> np.ndarray:
    """Returns angles [N, E / 2]: those of the row, then those of the column. The period of angle j
    is base^(4 j / E), where a side of the view is 2.

    Args:
      centres_Nx2: as of `patch_centres`.
      head_width: E, a multiple of 4.
      base: the longest period is a little shorter than this.

    >>> axial_angles(np.array([[0.5, -0.5]]), 8, 100.0).round(3).tolist()
    [[3.142, 0.314, -3.142, -0.314]]
    """
    if head_width % 4:
        raise ValueError(
            f"heads of width {head_width} cannot have rotary positions: the width"
            f" must be a multiple of 4"
        )
    periods = base ** (4 * np.arange(head_width // 4) / head_width)
    return (2 * math.pi * centres_Nx2[:, :, None] / periods).reshape(len(centres_Nx2), -1)


def axial_rotation(
    grid: int | tuple[int, int],
    head_width: int,
    base: float,
    *,
    prefix: int = 0,
    index_BxK: jax.Array | None = None,
) -> Rotation:
    """Returns cosines and sines of the tokens of a view.

    Args:
      grid: patches a side, or (rows, columns).
      head_width, base: as of `axial_angles`.
      prefix: tokens before the patches.
      index_BxK: int, the patches that are read; None: all, and one rotation for all images.

    >>> cos, sin = axial_rotation(2, 4, 100.0, prefix=1)
    >>> cos.shape, sin[0, 0].tolist()
    ((1, 5, 2), [0.0, 0.0])
    """
    angles = axial_angles(patch_centres(grid), head_width, base)
    out: list[Any] = []
    for table, still in ((np.cos(angles), 1.0), (np.sin(angles), 0.0)):
        table_NxF = table.astype(np.float32)
        if index_BxK is None:
            first = np.full((prefix, table_NxF.shape[1]), still, np.float32)
            out.append(np.concatenate([first, table_NxF])[None])
        else:
            read_BxKxF = jnp.asarray(table_NxF)[index_BxK]
            shape = (read_BxKxF.shape[0], prefix, read_BxKxF.shape[2])
            out.append(
                jnp.concatenate([jnp.full(shape, still, jnp.float32), read_BxKxF], 1)
                if prefix
                else read_BxKxF
            )
    return out[0], out[1]


def turn_heads(x_BxTxHxE: jax.Array, rotation: Rotation) -> jax.Array:
    """Turns queries or keys: the numbers j and j + E / 2 of a head are a point of a plane, which is
    turned by angle j. In float32; the type of x.

    >>> x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
    >>> turn_heads(x, (np.zeros((1, 1, 1)), np.ones((1, 1, 1)))).ravel().tolist()
    [0.0, 1.0]
    """
    cos, sin = (jnp.asarray(part, jnp.float32)[:, :, None] for part in rotation)
    half = x_BxTxHxE.shape[-1] // 2
    first, second = jax.lax.split(x_BxTxHxE.astype(jnp.float32), [half, half], axis=3)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(
        x_BxTxHxE.dtype
    )
