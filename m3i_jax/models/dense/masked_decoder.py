"""The masked decoder of Mask2Former: learned queries read the maps of the pixel decoder, coarse to
fine and again, each only where its last mask was, and predict a category and a mask after every
layer.

Post-norm layers of masked cross-attention, self-attention and an MLP with ReLU. A mask is the
product of a query's embedding with the mask features.

B images, Q queries, D width, L maps, T cells of a map, h w size of the mask features, K categories.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.models.dense.deformable_layers import post_norm
from m3i_jax.models.dense.map_sampling import resize_bilinear
from m3i_jax.models.initializers import InitSpec
from m3i_jax.models.intern_image_layer import dense_layer
from m3i_jax.models.layers import Params


class QueryPredictions(NamedTuple):
    """What the queries say after each of S = 1 + layers steps.

    Attributes:
      classes_SxBxQxK1: logits of the categories and, last, of none, float32.
      masks_SxBxhxwxQ: logits of the masks, float32.
    """

    classes_SxBxQxK1: jax.Array
    masks_SxBxhxwxQ: jax.Array


def _linear(inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {"kernel": (inputs, outputs), "bias": (outputs,)}


def _norm(width: int) -> dict[str, tuple[int, ...]]:
    return {"scale": (width,), "bias": (width,)}


def masked_decoder_shapes(settings: schema.Segment | schema.Detect, classes: int) -> dict[str, Any]:
    """The tree of parameters, as shapes.

    >>> settings = schema.Segment(width=8, mask2former=schema.Mask2Former(depth=1))
    >>> sorted(masked_decoder_shapes(settings, 5))[:4]
    ['classes', 'layer_0', 'levels', 'mask_0']
    """
    own, d = settings.mask2former, settings.width
    attention = {name: _linear(d, d) for name in ("query", "key", "value", "output")}
    layer = {
        "cross": attention,
        "cross_norm": _norm(d),
        "self": attention,
        "self_norm": _norm(d),
        "hidden": _linear(d, own.hidden),
        "output": _linear(own.hidden, d),
        "norm": _norm(d),
    }
    return {
        "queries": (own.queries, d),
        "positions": (own.queries, d),
        "levels": (len(settings.strides) - 1, d),
        **{f"layer_{i}": layer for i in range(own.depth)},
        "norm": _norm(d),
        "classes": _linear(d, classes + 1),
        **{f"mask_{i}": _linear(d, d) for i in range(3)},
    }


def masked_decoder_values(path: str, shape: tuple[int, ...]) -> InitSpec:
    """First values: queries, their positions and levels N(0, 1); Xavier-uniform matrices, those of
    query, key and value as one; those of the classifier and of the embedding of masks uniform
    within 1 / sqrt(D); biases 0, where PyTorch's are uniform within that, too.

    >>> masked_decoder_values("layer_0/norm/scale", (8,))
    ('constant', 1.0)
    """
    layer, last = ("/" + path).split("/")[-2:]
    if last in ("queries", "positions", "levels"):
        return "normal", 1.0
    if layer == "classes" or layer.startswith("mask_"):
        return "uniform", shape[0] ** -0.5 if last == "kernel" else 0.0
    if last in ("scale", "bias"):
        return "constant", float(last == "scale")
    outputs = 3 * shape[1] if layer in ("query", "key", "value") else shape[1]
    return "uniform", math.sqrt(6 / (shape[0] + outputs))


def attend_queries(
    params: Params,
    query_BxQxD: jax.Array,
    key_BxTxD: jax.Array,
    value_BxTxD: jax.Array,
    heads: int,
    blocked_BxQxT: jax.Array | None = None,
) -> jax.Array:
    """Multi-head attention with projections `query`, `key`, `value` and `output`, [B, Q, D].

    Args:
      params: of the projections.
      query_BxQxD, key_BxTxD, value_BxTxD: before their projections.
      heads: that divide D.
      blocked_BxQxT: what each query does not see; it must see something.

    >>> params = dict.fromkeys(("query", "key", "value", "output"), {"kernel": jnp.eye(2)})
    >>> x = jnp.array([[[1.0, 0.0], [0.0, 2.0]]])
    >>> blocked = jnp.array([[[True, False]] * 2])
    >>> attend_queries(params, x, x, x, 1, blocked).tolist()
    [[[0.0, 2.0], [0.0, 2.0]]]
    """
    split = lambda x: x.reshape(*x.shape[:2], heads, -1)
    query = split(dense_layer(params["query"], query_BxQxD))
    key = split(dense_layer(params["key"], key_BxTxD))
    value = split(dense_layer(params["value"], value_BxTxD))
    logits_BxHxQxT = jnp.einsum(
        "bqhc,bthc->bhqt",
        query * query.shape[-1] ** -0.5,
        key,
        preferred_element_type=jnp.float32,
    )
    if blocked_BxQxT is not None:
        logits_BxHxQxT = jnp.where(blocked_BxQxT[:, None], -jnp.inf, logits_BxHxQxT)
    weights_BxHxQxT = jax.nn.softmax(logits_BxHxQxT).astype(value.dtype)
    read = jnp.einsum("bhqt,bthc->bqhc", weights_BxHxQxT, value)
    return dense_layer(params["output"], read.reshape(query_BxQxD.shape))


def blocked_cells(masks_BxhxwxQ: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Which cells of a map of that size each query does not see, bool [B, Q, T]: those where its
    mask, at that size, is below one half; none where that would be all. No gradient.

    >>> masks = jnp.array([[[[-1.0, -1.0], [2.0, -1.0]]]])
    >>> blocked_cells(masks, (1, 2))[0].tolist()
    [[True, False], [False, False]]
    """
    small_BxHxWxQ = resize_bilinear(jax.lax.stop_gradient(masks_BxhxwxQ), size)
    blocked_BxTxQ = (jax.nn.sigmoid(small_BxHxWxQ) < 0.5).reshape(
        small_BxHxWxQ.shape[0], -1, small_BxHxWxQ.shape[-1]
    )
    blocked_BxTxQ &= ~blocked_BxTxQ.all(1, keepdims=True)
    return blocked_BxTxQ.swapaxes(1, 2)


def _layer(
    heads: int,
    params: Params,
    x_BxQxD: jax.Array,
    positions_QxD: jax.Array,
    memory_BxTxD: jax.Array,
    places_1xTxD: jax.Array,
    blocked_BxQxT: jax.Array,
) -> jax.Array:
    placed = x_BxQxD + positions_QxD
    read = attend_queries(
        params["cross"], placed, memory_BxTxD + places_1xTxD, memory_BxTxD, heads, blocked_BxQxT
    )
    x_BxQxD = post_norm(params["cross_norm"], x_BxQxD + read)
    placed = x_BxQxD + positions_QxD
    read = attend_queries(params["self"], placed, placed, x_BxQxD, heads)
    x_BxQxD = post_norm(params["self_norm"], x_BxQxD + read)
    hidden = jax.nn.relu(dense_layer(params["hidden"], x_BxQxD))
    return post_norm(params["norm"], x_BxQxD + dense_layer(params["output"], hidden))


def _predict(
    params: Params, x_BxQxD: jax.Array, features_BxhxwxD: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x_BxQxD = post_norm(params["norm"], x_BxQxD)
    classes_BxQxK1 = dense_layer(params["classes"], x_BxQxD, jnp.float32)
    for i in range(3):
        x_BxQxD = dense_layer(params[f"mask_{i}"], x_BxQxD)
        x_BxQxD = jax.nn.relu(x_BxQxD) if i < 2 else x_BxQxD
    masks_BxhxwxQ = jnp.einsum(
        "bhwd,bqd->bhwq", features_BxhxwxD, x_BxQxD, preferred_element_type=jnp.float32
    )
    return classes_BxQxK1, masks_BxhxwxQ


def decode_queries(
    settings: schema.Segment | schema.Detect,
    params: Params,
    maps: list[jax.Array],
    places: list[jax.Array],
    features_BxhxwxD: jax.Array,
) -> QueryPredictions:
    """Predictions of the queries before the first layer and after each.

    Args:
      settings: `width` and `mask2former` are read.
      params: of `masked_decoder_shapes`.
      maps: [B, H, W, D] of the pixel decoder, coarse to fine; layer i reads number i modulo L.
      places: positions [1, H W, D] of the cells of each map.
      features_BxhxwxD: mask features.
    """
    own, dtype = settings.mask2former, features_BxhxwxD.dtype
    batch = len(features_BxhxwxD)
    sizes = [(x.shape[1], x.shape[2]) for x in maps]
    levels = params["levels"].astype(dtype)
    memories = [
        x.reshape(batch, -1, x.shape[-1]) + level for x, level in zip(maps, levels, strict=True)
    ]
    positions_QxD = params["positions"].astype(dtype)
    x_BxQxD = jnp.broadcast_to(params["queries"].astype(dtype), (batch, *params["queries"].shape))
    layer: Callable[..., jax.Array] = functools.partial(_layer, own.heads)
    if own.remat:
        layer = jax.checkpoint(layer)
    made = [_predict(params, x_BxQxD, features_BxhxwxD)]
    for i in range(own.depth):
        level = i % len(maps)
        blocked_BxQxT = blocked_cells(made[-1][1], sizes[level])
        x_BxQxD = layer(
            params[f"layer_{i}"],
            x_BxQxD,
            positions_QxD,
            memories[level],
            places[level].astype(dtype),
            blocked_BxQxT,
        )
        made.append(_predict(params, x_BxQxD, features_BxhxwxD))
    classes, masks = zip(*made, strict=True)
    return QueryPredictions(jnp.stack(classes), jnp.stack(masks))
