"""The first half of DINO: maps of several strides as one sequence of tokens, the deformable encoder
over them, and the choice of the tokens that queries start from.

B images, N tokens of all levels (levels from the finest, rows, columns), L levels, Q queries, D
width, K categories, C channels of a map.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.models.dense.deformable_attention import Shapes
from m3i_jax.models.dense.deformable_layers import (
    deformable_encoder,
    init_deformable_encoder,
    post_norm,
    sine_positions,
    valid_cells,
    valid_tokens,
)
from m3i_jax.models.dense.dino_decoder import box_delta, init_query_heads, linear_shapes
from m3i_jax.models.dense.map_norms import group_norm
from m3i_jax.models.initializers import InitSpec, fill
from m3i_jax.models.intern_image_layer import convolve, dense_layer
from m3i_jax.models.layers import Params

TEMPERATURE = 20.0  # of the positions of tokens
SIDE = 0.05  # of a proposal of the finest level, as a share of the image
_EDGE = 0.01  # distance from 0 and 1 that the numbers of a proposal must have
_NOWHERE = 1e4  # logit of the boxes of other tokens


class Selected(NamedTuple):
    """logits_BxQxK and boxes_BxQx4 of the selected tokens by the encoder's own heads, float32,
    with gradient; boxes are (centre, sides) in shares of the image."""

    logits_BxQxK: jax.Array
    boxes_BxQx4: jax.Array


def levels_read(settings: schema.Detect) -> tuple[int, ...]:
    """Strides of the maps that the head is given: all but the last, which it makes itself.

    >>> levels_read(schema.Detect(strides=(8, 16, 32, 64)))
    (8, 16, 32)
    """
    return settings.strides[:-1] or settings.strides


def init_encoder(
    settings: schema.Detect, channels: Mapping[int, int], classes: int, rng: jax.Array
) -> dict[str, Any]:
    """Returns the initial parameters: `projections/stride_<n>` (`conv` and `norm`),
    `level_embedding` [L, D], `layers`, and `proposals`: `dense`, `norm` and `heads`.

    Convolutions are Xavier-uniform with biases 0, as the dense layer is, the embedding N(0, 1).

    Args:
      channels: {stride: channels of its map}. Without the last stride, its level is a convolution
        of stride 2 of the map before, as for a backbone of several maps (IDEA); with it, as of a
        pyramid on a plain ViT, a projection like the others (detrex).

    >>> settings = schema.Detect(strides=(8, 16), width=8, dino=schema.Dino(heads=2, hidden=16))
    >>> params = jax.eval_shape(
    ...     lambda key: init_encoder(settings, {8: 12}, 5, key), jax.random.key(0)
    ... )
    >>> [params["projections"][name]["conv"]["kernel"].shape for name in ("stride_8", "stride_16")]
    [(12, 8), (3, 3, 12, 8)]
    """
    width, dino, read = settings.width, settings.dino, levels_read(settings)
    affine = {"scale": (width,), "bias": (width,)}
    projections: dict[str, Any] = {}
    for stride in settings.strides:
        given = stride in channels
        kernel = (channels[stride], width) if given else (3, 3, channels[read[-1]], width)
        conv = {"kernel": kernel} | ({"bias": (width,)} if dino.projection_bias else {})
        projections[f"stride_{stride}"] = {"conv": conv, "norm": affine}
    shapes = {
        "projections": projections,
        "level_embedding": (len(settings.strides), width),
        "proposals": {"dense": linear_shapes(width, width), "norm": affine},
    }

    def rule(path: str, shape: tuple[int, ...]) -> InitSpec:
        if path.endswith(("scale", "bias")):
            return "constant", float(path.endswith("scale"))
        if path == "level_embedding":
            return "normal", 1.0
        window = math.prod(shape[:-2])
        return "uniform", math.sqrt(6 / (window * (shape[-2] + shape[-1])))

    of_layers, of_heads, of_rest = jax.random.split(rng, 3)
    params = fill(of_rest, shapes, rule)
    params["proposals"]["heads"] = init_query_heads(width, classes, of_heads)
    params["layers"] = init_deformable_encoder(
        of_layers,
        width,
        dino.heads,
        len(settings.strides),
        dino.sampled,
        dino.hidden,
        dino.encoder_depth,
    )
    return params


def encode_levels(
    settings: schema.Detect,
    params: Params,
    maps: Mapping[int, jax.Array],
    size_Bx2: jax.Array,
) -> tuple[jax.Array, Shapes, jax.Array]:
    """Returns (tokens after the encoder [B, N, D], (height, width) of every level, valid cells [B,
    L, 2]).

    Args:
      params: as of `init_encoder`.
      maps: {stride: [B, H, W, C]} of the strides that `init_encoder` was given.
      size_Bx2: (height, width) of the images without padding.

    >>> settings = schema.Detect(
    ...     strides=(8, 16), width=8, dino=schema.Dino(heads=2, hidden=16, encoder_depth=1)
    ... )
    >>> @jax.jit
    ... def run(key, x, size):
    ...     params = init_encoder(settings, {8: 12}, 5, key)
    ...     memory, shapes, cells = encode_levels(settings, params, {8: x}, size)
    ...     print(shapes)
    ...     return memory, cells
    >>> memory, cells = run(jax.random.key(0), jnp.zeros((1, 4, 6, 12)), jnp.array([[20, 48]]))
    ((4, 6), (2, 3))
    >>> memory.shape, cells.tolist()
    ((1, 30, 8), [[[3, 6], [2, 3]]])
    """
    levels, read = [], levels_read(settings)
    for stride in settings.strides:
        part = params["projections"][f"stride_{stride}"]
        if part["conv"]["kernel"].ndim == 2:
            y_BxHxWxD = dense_layer(part["conv"], maps[stride])
        else:  # no map of the last stride was given
            y_BxHxWxD = convolve(part["conv"], maps[read[-1]], 2)
        levels.append(group_norm(part["norm"], y_BxHxWxD))
    shapes = tuple((level.shape[1], level.shape[2]) for level in levels)
    image = (shapes[0][0] * settings.strides[0], shapes[0][1] * settings.strides[0])
    valid_BxLx2 = valid_cells(size_Bx2, image, shapes)
    positions = [
        sine_positions(shape, settings.width, TEMPERATURE, valid_BxLx2[:, i])
        + params["level_embedding"][i]
        for i, shape in enumerate(shapes)
    ]
    x_BxNxD = jnp.concatenate(
        [level.reshape(len(level), -1, settings.width) for level in levels], 1
    )
    memory_BxNxD = deformable_encoder(
        params["layers"],
        x_BxNxD,
        jnp.concatenate(positions, 1).astype(x_BxNxD.dtype),
        shapes,
        settings.dino.heads,
        valid_BxLx2,
        remat=settings.dino.remat,
    )
    return memory_BxNxD, shapes, valid_BxLx2


def token_proposals(shapes: Shapes, valid_BxLx2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a box around every token, (centre, sides) in shares of the image [B, N, 4], sides
    doubling from level to level, and which of them may become proposals, bool [B, N]: those of the
    image's own cells whose numbers are all inside 0.01..0.99.

    >>> boxes, usable = token_proposals(((1, 2),), jnp.array([[[1, 1]]]))
    >>> boxes.round(2).tolist(), usable.tolist()
    ([[[0.5, 0.5, 0.05, 0.05], [1.5, 0.5, 0.05, 0.05]]], [[True, False]])
    """
    parts = []
    for level, (height, width) in enumerate(shapes):
        y_BxH, x_BxW = (
            (jnp.arange(n, dtype=jnp.float32) + 0.5) / valid_BxLx2[:, level, axis, None]
            for axis, n in ((0, height), (1, width))
        )
        numbers = (x_BxW[:, None, :], y_BxH[:, :, None], *[jnp.float32(SIDE * 2**level)] * 2)
        parts.append(jnp.stack(jnp.broadcast_arrays(*numbers), -1).reshape(len(x_BxW), -1, 4))
    boxes_BxNx4 = jnp.concatenate(parts, 1)
    inside_BxN = ((boxes_BxNx4 > _EDGE) & (boxes_BxNx4 < 1 - _EDGE)).all(-1)
    return boxes_BxNx4, inside_BxN & valid_tokens(shapes, valid_BxLx2)


def select_tokens(
    settings: schema.Detect,
    params: Params,
    memory_BxNxD: jax.Array,
    shapes: Shapes,
    valid_BxLx2: jax.Array,
) -> Selected:
    """Returns the tokens of the highest class logit, with the boxes that the encoder's head makes
    of their proposals. The matched queries start from these boxes.

    Args:
      params: as of `init_encoder`.
      memory_BxNxD, shapes, valid_BxLx2: of `encode_levels`.

    Raises:
      UserError: there are fewer tokens than queries.

    >>> settings = schema.Detect(
    ...     strides=(8, 16), width=8, dino=schema.Dino(heads=2, hidden=16, queries=3)
    ... )
    >>> def run(key, memory, cells):
    ...     params = init_encoder(settings, {8: 12}, 5, key)
    ...     return select_tokens(settings, params, memory, ((4, 4), (2, 2)), cells)
    >>> arrays = jnp.ones((1, 20, 8)), jnp.array([[[4, 4], [2, 2]]])
    >>> found = jax.eval_shape(run, jax.random.key(0), *arrays)
    >>> found.logits_BxQxK.shape, found.boxes_BxQx4.shape
    ((1, 3, 5), (1, 3, 4))
    """
    part, queries, tokens = params["proposals"], settings.dino.queries, memory_BxNxD.shape[1]
    if queries > tokens:
        raise UserError(
            f"config.dense.detect.dino.queries: {queries} queries start from as many tokens, and"
            f" maps of {', '.join(f'{h} x {w}' for h, w in shapes)} have {tokens}; set at most"
            f" {tokens}"
        )
    proposals_BxNx4, usable_BxN = token_proposals(shapes, valid_BxLx2)
    kept_BxNxD = jnp.where(usable_BxN[..., None], memory_BxNxD, 0)
    y_BxNxD = post_norm(part["norm"], dense_layer(part["dense"], kept_BxNxD))
    logits_BxNxK = dense_layer(part["heads"]["classes"], y_BxNxD, jnp.float32)
    best_BxN = jax.lax.stop_gradient(logits_BxNxK).max(-1)
    index_BxQx1 = jax.lax.top_k(best_BxN, queries)[1][..., None]
    logits_BxQxK, y_BxQxD, start_BxQx4, usable_BxQx1 = (
        jnp.take_along_axis(x, index_BxQx1, 1)
        for x in (logits_BxNxK, y_BxNxD, proposals_BxNx4, usable_BxN[..., None])
    )
    start_BxQx4 = jnp.where(usable_BxQx1, start_BxQx4, 0.5)
    logit_BxQx4 = jnp.log(start_BxQx4 / (1 - start_BxQx4))
    logit_BxQx4 = jnp.where(usable_BxQx1, logit_BxQx4, np.float32(_NOWHERE))
    boxes_BxQx4 = jax.nn.sigmoid(box_delta(part["heads"]["boxes"], y_BxQxD) + logit_BxQx4)
    return Selected(logits_BxQxK, boxes_BxQx4)
