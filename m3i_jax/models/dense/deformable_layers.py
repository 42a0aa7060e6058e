"""Layers around multi-scale deformable attention that DINO and Mask2Former share: the attention
with its projections, the layer of an encoder of maps, and the positions that both read.

Maps are one sequence of tokens, the cells of all levels one level after the other, each row by row.
An image fills the upper left part of every map; what is padding follows from its size alone, as
rows and columns of cells per level (`valid_cells`).

B images, N tokens, Q queries, D width, H heads, L levels, P points, F features, h w size of a map.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import parallel
from m3i_jax.models.dense.deformable_attention import Shapes, deformable_attention
from m3i_jax.models.initializers import InitSpec, fill
from m3i_jax.models.intern_image_layer import dense_layer
from m3i_jax.models.layers import Params, layer_norm

_EPS = 1e-5  # of the norms, PyTorch's default


def post_norm(params: Params, x_xD: jax.Array) -> jax.Array:
    """Layer norm with `scale` and `bias` and the epsilon of DETR-like heads, 1e-5, of rows that
    stay on their devices.

    >>> params = {"scale": jnp.ones(2), "bias": jnp.zeros(2)}
    >>> post_norm(params, jnp.array([1.0, 3.0])).round(3).tolist()
    [-1.0, 1.0]
    """
    return layer_norm(parallel.hold_rows(x_xD), params["scale"], params["bias"], _EPS)


def _linear(width: int, out: int) -> dict[str, tuple[int, ...]]:
    return {"kernel": (width, out), "bias": (out,)}


def _offset_bias(heads: int, levels: int, points: int) -> np.ndarray:
    """Head m looks along the angle 2 pi m / H, its longer coordinate 1; its point p goes p + 1
    cells that way. [H L P 2]."""
    angle = np.arange(heads, dtype=np.float32) * np.float32(2 * math.pi / heads)
    way = np.stack([np.cos(angle), np.sin(angle)], -1)
    way /= np.abs(way).max(-1, keepdims=True)
    steps = np.arange(1, points + 1, dtype=np.float32)[:, None]
    return np.tile((way[:, None, None] * steps), (1, levels, 1, 1)).astype(np.float32).reshape(-1)


def init_deformable(
    rng: jax.Array, width: int, heads: int, levels: int, points: int
) -> dict[str, Any]:
    """Returns parameters of `deformable`: `offsets` [D, H L P 2], `weights` [D, H L P], `value` and
    `output` [D, D], each `kernel` and `bias`, the columns in the order of their letters.

    As published: head m starts with points 1 to P cells away in a direction of its own, whatever
    the query, and equal weights; value and output are Xavier-uniform, biases 0.

    Raises:
      ValueError: heads that do not divide the width.

    >>> params = init_deformable(jax.random.key(0), 8, 4, 1, 2)
    >>> params["offsets"]["bias"].reshape(4, 2, 2)[:2].round().tolist()
    [[[1.0, 0.0], [2.0, 0.0]], [[-0.0, 1.0], [-0.0, 2.0]]]
    """
    if width % heads:
        raise ValueError(f"{heads} heads do not divide the width {width}")
    shapes = {"value": _linear(width, width), "output": _linear(width, width)}

    def rule(path: str, shape: tuple[int, ...]) -> InitSpec:
        if path.endswith("bias"):
            return "constant", 0.0
        return "uniform", math.sqrt(6 / sum(shape))

    places = heads * levels * points
    return fill(rng, shapes, rule) | {
        "offsets": {
            "kernel": jnp.zeros((width, 2 * places)),
            "bias": jnp.asarray(_offset_bias(heads, levels, points)),
        },
        "weights": {"kernel": jnp.zeros((width, places)), "bias": jnp.zeros(places)},
    }


def deformable(
    params: Params,
    query_BxQxD: jax.Array,
    reference_BxQxLxR: jax.Array,
    value_BxNxD: jax.Array,
    shapes: Shapes,
    heads: int,
    valid_BxN: jax.Array | None = None,
) -> jax.Array:
    """Multi-scale deformable attention with its projections, [B, Q, D] in the type of the query.
    The residual and the norm are the caller's.

    A query's offsets are in cells of each level, or, where its reference is a box, in shares 1 / 2P
    of the box's sides.

    Args:
      params: as of `init_deformable`, whose number of points follows from them.
      query_BxQxD: with its position added.
      reference_BxQxLxR: float32, (x, y) or a box (centre x, y, width, height) for every level, in
        units of the level's whole map, padding included; an axis L of 1 is the same for all.
      value_BxNxD: tokens of the maps, without positions.
      shapes: (height, width) of every level; static.
      heads: H.
      valid_BxN: bool, False: a token of the padding, which is read as 0; None: all are read.

    Raises:
      ValueError: shapes that do not fit each other.

    >>> query, value, centre = jnp.ones((1, 3, 8)), jnp.ones((1, 20, 8)), jnp.ones((1, 3, 1, 2)) / 2
    >>> def run(key):
    ...     params = init_deformable(key, 8, 2, 2, 4)
    ...     return deformable(params, query, centre, value, ((4, 4), (2, 2)), 2)
    >>> jax.eval_shape(run, jax.random.key(0)).shape
    (1, 3, 8)
    """
    (b, queries, _), levels = query_BxQxD.shape, len(shapes)
    if reference_BxQxLxR.shape[-1] not in (2, 4):
        raise ValueError(
            f"references have {reference_BxQxLxR.shape[-1]} coordinates; they must have 2 (x, y)"
            " or 4 (x, y, width, height)"
        )
    value = dense_layer(params["value"], value_BxNxD)
    if valid_BxN is not None:
        value = jnp.where(valid_BxN[..., None], value, 0)
    wide = jnp.float32
    logits = dense_layer(params["weights"], query_BxQxD, wide).reshape(b, queries, heads, -1)
    weights = jax.nn.softmax(logits).reshape(b, queries, heads, levels, -1)
    offsets = dense_layer(params["offsets"], query_BxQxD, wide).reshape(*weights.shape, 2)
    reference = reference_BxQxLxR.astype(wide)[:, :, None, :, None]
    if reference.shape[-1] == 2:
        locations = reference + offsets / np.array(shapes, np.float32)[:, None, ::-1]
    else:
        points = weights.shape[-1]
        locations = reference[..., :2] + offsets * (reference[..., 2:] * (0.5 / points))
    value = value.reshape(*value.shape[:2], heads, -1)
    return dense_layer(params["output"], deformable_attention(value, shapes, locations, weights))


def _encoder_rule(path: str, shape: tuple[int, ...], fan: int) -> InitSpec:
    if path.endswith("scale"):
        return "constant", 1.0
    if path.startswith("norm"):
        return "constant", 0.0
    if path.endswith("bias"):  # PyTorch's default, which the published code leaves
        return "uniform", fan**-0.5
    return "uniform", math.sqrt(6 / sum(shape))


def init_deformable_encoder(
    rng: jax.Array, width: int, heads: int, levels: int, points: int, hidden: int, depth: int
) -> dict[str, Any]:
    """Returns parameters of `deformable_encoder`: those of its layers, stacked on a leading axis.

    A layer has `attention` (`init_deformable`), `norm1`, `fc1` [D, hidden], `fc2` [hidden, D] and
    `norm2`; fc1 and fc2 are Xavier-uniform, their biases uniform within 1 / sqrt(fan in).

    >>> init = lambda key: init_deformable_encoder(key, 8, 2, 3, 4, 16, 6)
    >>> params = jax.eval_shape(init, jax.random.key(0))
    >>> params["fc1"]["kernel"].shape, params["attention"]["offsets"]["bias"].shape
    ((6, 8, 16), (6, 48))
    """
    affine = {"scale": (width,), "bias": (width,)}
    shapes = {
        "norm1": affine,
        "fc1": _linear(width, hidden),
        "fc2": _linear(hidden, width),
        "norm2": affine,
    }

    def rule(path: str, shape: tuple[int, ...]) -> InitSpec:
        return _encoder_rule(path, shape, hidden if path.startswith("fc2") else width)

    def one(key: jax.Array) -> dict[str, Any]:
        of_attention, of_rest = jax.random.split(key)
        attention = init_deformable(of_attention, width, heads, levels, points)
        return fill(of_rest, shapes, rule) | {"attention": attention}

    return jax.lax.map(one, jax.random.split(rng, depth))


def deformable_encoder_layer(
    params: Params,
    x_BxNxD: jax.Array,
    position_BxNxD: jax.Array,
    reference_BxNxLx2: jax.Array,
    shapes: Shapes,
    heads: int,
    valid_BxN: jax.Array | None = None,
) -> jax.Array:
    """Applies one post-norm layer: every token reads all maps around its own place, then an MLP
    with ReLU. [B, N, D] in the type of x.

    Args:
      params: of one layer, as of `init_deformable_encoder` without the leading axis.
      x_BxNxD, position_BxNxD: tokens, and what is added to them as queries.
      reference_BxNxLx2: `encoder_references`.
      shapes, heads, valid_BxN: as of `deformable`.

    >>> def run(key, x):
    ...     params = init_deformable_encoder(key, 8, 2, 1, 4, 16, 1)
    ...     one, centres = jax.tree.map(lambda leaf: leaf[0], params), encoder_references(((4, 4),))
    ...     return deformable_encoder_layer(one, x, x, centres, ((4, 4),), 2)
    >>> jax.eval_shape(run, jax.random.key(0), jnp.ones((1, 16, 8))).shape
    (1, 16, 8)
    """
    query = x_BxNxD + position_BxNxD.astype(x_BxNxD.dtype)
    x_BxNxD += deformable(
        params["attention"], query, reference_BxNxLx2, x_BxNxD, shapes, heads, valid_BxN
    )
    x_BxNxD = post_norm(params["norm1"], x_BxNxD)
    hidden = parallel.hold_rows(jax.nn.relu(dense_layer(params["fc1"], x_BxNxD)))
    return post_norm(params["norm2"], x_BxNxD + dense_layer(params["fc2"], hidden))


def deformable_encoder(
    params: Params,
    x_BxNxD: jax.Array,
    position_BxNxD: jax.Array,
    shapes: Shapes,
    heads: int,
    valid_BxLx2: jax.Array | None = None,
    *,
    remat: bool = False,
) -> jax.Array:
    """Applies the encoder of DINO and the pixel decoder of Mask2Former: layers of deformable
    self-attention over the tokens of all levels, [B, N, D].

    Args:
      params: as of `init_deformable_encoder`; every leaf is [depth, ...].
      x_BxNxD: tokens of all levels.
      position_BxNxD: sine positions plus level embedding; an axis B of 1 is the same for all.
      shapes, heads: as of `deformable`.
      valid_BxLx2: `valid_cells`; None: there is no padding (Mask2Former does not tell it).
      remat: compute the layers again in the backward pass instead of keeping their activations.

    >>> def run(key, x, cells):
    ...     params = init_deformable_encoder(key, 8, 2, 2, 4, 16, 2)
    ...     return deformable_encoder(params, x, x, ((4, 4), (2, 2)), 2, cells)
    >>> cells = jnp.array([[[4, 3], [2, 2]]])
    >>> jax.eval_shape(run, jax.random.key(0), jnp.ones((1, 20, 8)), cells).shape
    (1, 20, 8)
    """
    reference = encoder_references(shapes, valid_BxLx2)
    inside = None if valid_BxLx2 is None else valid_tokens(shapes, valid_BxLx2)
    step: Any = functools.partial(deformable_encoder_layer, shapes=shapes, heads=heads)
    if remat:
        step = jax.checkpoint(step)

    def layer(x_BxNxD: jax.Array, one: Params) -> tuple[jax.Array, None]:
        return step(one, x_BxNxD, position_BxNxD, reference, valid_BxN=inside), None

    return jax.lax.scan(layer, x_BxNxD, params)[0]


def valid_cells(
    size_Bx2: jax.Array, image: tuple[int, int], shapes: Sequence[tuple[int, int]]
) -> jax.Array:
    """Returns rows and columns of every level that show an image and not its padding, int32 [B, L,
    2]: those whose first pixel, by nearest neighbour, is of the image.

    Args:
      size_Bx2: int, (height, width) of the images in pixels.
      image: (height, width) of the batch, padding included.
      shapes: (height, width) of the levels.

    >>> valid_cells(jnp.array([[33, 64]]), (64, 64), ((8, 8), (2, 2))).tolist()
    [[[5, 8], [2, 2]]]
    """
    size_Bx1x2 = jnp.asarray(size_Bx2, jnp.int32)[:, None]
    return -(-size_Bx1x2 * np.array(shapes, np.int32) // np.array(image, np.int32))


def valid_tokens(shapes: Shapes, valid_BxLx2: jax.Array) -> jax.Array:
    """Returns which tokens of all levels are of the image, bool [B, N], of `valid_cells`.

    >>> valid_tokens(((2, 2), (1, 1)), jnp.array([[[2, 1], [1, 1]]])).astype(int).tolist()
    [[1, 0, 1, 0, 1]]
    """
    parts = []
    for level, (height, width) in enumerate(shapes):
        rows, columns = (valid_BxLx2[:, level, axis, None] for axis in (0, 1))
        inside = (jnp.arange(height) < rows)[:, :, None] & (jnp.arange(width) < columns)[:, None]
        parts.append(inside.reshape(len(inside), -1))
    return jnp.concatenate(parts, 1)


def valid_ratios(shapes: Shapes, valid_BxLx2: jax.Array) -> jax.Array:
    """Returns the share (x, y) of every level's columns and rows that show the image, float32 [B,
    L, 2]. A coordinate over the image times it is one over the whole map.

    >>> valid_ratios(((4, 2),), jnp.array([[[3, 1]]])).tolist()
    [[[0.5, 0.75]]]
    """
    return (valid_BxLx2.astype(jnp.float32) / np.array(shapes, np.float32))[..., ::-1]


def encoder_references(shapes: Shapes, valid_BxLx2: jax.Array | None = None) -> jax.Array:
    """Returns the place (x, y) of every token on every level, float32 [B, N, L, 2]: its cell's
    centre, over the size of the image, times the valid ratio of the level that is read.

    Args:
      shapes: (height, width) of the levels.
      valid_BxLx2: `valid_cells`; None: no padding, and B is 1.

    >>> encoder_references(((1, 2), (1, 1)))[0, :, 0].tolist()
    [[0.25, 0.5], [0.75, 0.5], [0.5, 0.5]]
    """
    if valid_BxLx2 is None:
        valid_BxLx2 = jnp.array(shapes)[None]
    parts = []
    for level, (height, width) in enumerate(shapes):
        y, x = (
            (jnp.arange(n, dtype=jnp.float32) + 0.5) / valid_BxLx2[:, level, axis, None]
            for axis, n in ((0, height), (1, width))
        )
        both = jnp.stack(
            jnp.broadcast_arrays(x[:, None, :], y[:, :, None]), -1
        )  # of the image's own size
        parts.append(both.reshape(len(both), -1, 2))
    return jnp.concatenate(parts, 1)[:, :, None] * valid_ratios(shapes, valid_BxLx2)[:, None]


def sine_features(u_x: jax.Array, features: int, temperature: float) -> jax.Array:
    """Sines and cosines, interleaved, of coordinates in 0..1 at falling frequencies, float32 [...,
    features]: of the angle 2 pi u / temperature^(2 i / features), i = 0 0 1 1 2 2 ...

    >>> sine_features(jnp.array([0.25]), 4, 1.0).round(3).tolist()
    [[1.0, 0.0, 1.0, 0.0]]
    """
    if features % 2:
        raise ValueError(f"{features} features are not pairs of sine and cosine")
    pair = np.arange(features // 2, dtype=np.float64)
    rate = (2 * math.pi * temperature ** (-2 * pair / features)).astype(np.float32)
    angle = u_x.astype(jnp.float32)[..., None] * rate
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1).reshape(*u_x.shape, features)


def sine_positions(
    shape: tuple[int, int],
    width: int,
    temperature: float,
    valid_Bx2: jax.Array | None = None,
    *,
    shift: float = 0.0,
) -> jax.Array:
    """Sine position embedding of the cells of one map, float32 [B, h w, D]: D / 2 features of the
    row, then D / 2 of the column (DETR's, normalised).

    The coordinate is the number of valid rows up to and with the cell's, over all valid rows; 0 in
    columns of padding.

    Args:
      shape: (height, width) of the map.
      width: D.
      temperature: 20 in DINO, 10 000 in Mask2Former and Deformable DETR.
      valid_Bx2: rows and columns of each image, `valid_cells` of this level; None: no padding, and
        B is 1.
      shift: what is taken off the number: 0.5 in Deformable DETR.

    >>> sine_positions((2, 2), 4, 10_000.0)[0, :, :2].round(3).tolist()  # of the row: half, whole
    [[0.0, -1.0], [0.0, -1.0], [-0.0, 1.0], [-0.0, 1.0]]
    """
    if valid_Bx2 is None:
        valid_Bx2 = jnp.array([shape])
    rows_B, columns_B = (valid_Bx2[:, axis, None, None] for axis in (0, 1))
    row, column = jnp.arange(shape[0])[:, None], jnp.arange(shape[1])
    y = jnp.where(column < columns_B, jnp.minimum(row + 1, rows_B), 0).astype(jnp.float32)
    x = jnp.where(row < rows_B, jnp.minimum(column + 1, columns_B), 0).astype(jnp.float32)
    # the last count of a row or column of padding is 0, and its coordinate -shift / 1e-6
    y, x = (
        (n - shift) / (n[last] + 1e-6) for n, last in ((y, np.s_[:, -1:]), (x, np.s_[:, :, -1:]))
    )
    both = [sine_features(u, width // 2, temperature) for u in (y, x)]
    return jnp.concatenate(both, -1).reshape(len(y), -1, width)
