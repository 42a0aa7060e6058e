"""The decoder of DINO: queries with boxes that every layer refines, and the heads that read them.

A query is a content and a box, (centre, sides) in shares of the image. The layer's position comes
from the box, which deformable attention reads the maps around. Boxes are float32 under any compute
precision, and without gradient from layer to layer; but the prediction of a layer is counted from
the box that the layer before made with gradient, so that a layer learns from the next one, too
(look forward twice).

B images, T queries (noised objects, then matched ones), N tokens of the maps, D width, L levels, K
categories, I layers.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.models.attention import attend, from_heads, to_heads
from m3i_jax.models.attention_tpu import MASKED_LOGIT
from m3i_jax.models.dense.deformable_attention import Shapes
from m3i_jax.models.dense.deformable_layers import (
    deformable,
    init_deformable,
    post_norm,
    sine_features,
    valid_ratios,
    valid_tokens,
)
from m3i_jax.models.initializers import InitSpec, fill
from m3i_jax.models.intern_image_layer import dense_layer
from m3i_jax.models.layers import Params

PRIOR = 0.01  # probability of every category at the start
_TEMPERATURE = 10_000.0  # of the positions of boxes
_EDGE = 1e-3  # nearest to 0 and 1 that a share is taken to have a logit


def box_logit(share_x: jax.Array) -> jax.Array:
    """Returns the inverse of a sigmoid, of shares in 0.001..0.999.

    >>> box_logit(jnp.array([0.5, 1.0])).round(3).tolist()
    [0.0, 6.908]
    """
    share_x = jnp.clip(share_x, 0.0, 1.0)
    return jnp.log(jnp.maximum(share_x, _EDGE)) - jnp.log(jnp.maximum(1 - share_x, _EDGE))


def linear_shapes(width: int, out: int) -> dict[str, tuple[int, ...]]:
    """Returns shapes of a dense layer, `kernel` and `bias`."""
    return {"kernel": (width, out), "bias": (out,)}


def _head_shapes(width: int, classes: int) -> dict[str, Any]:
    boxes = {f"fc{i}": linear_shapes(width, 4 if i == 3 else width) for i in (1, 2, 3)}
    return {"classes": linear_shapes(width, classes), "boxes": boxes}


def init_query_heads(width: int, classes: int, rng: jax.Array) -> Params:
    """Returns parameters of a class head, a linear layer, and a box head, three with ReLU between.

    Kernels and biases are uniform within 1 / sqrt(fan in); the last layer of boxes is 0, and the
    bias of classes makes a probability of 0.01.

    >>> params = init_query_heads(8, 3, jax.random.key(0))
    >>> params["classes"]["bias"].round(3).tolist()
    [-4.595, -4.595, -4.595]
    """

    def rule(path: str, shape: tuple[int, ...]) -> InitSpec:
        if path == "classes/bias":
            return "constant", -math.log((1 - PRIOR) / PRIOR)
        if path.startswith("boxes/fc3"):
            return "constant", 0.0
        return "uniform", width**-0.5

    return fill(rng, _head_shapes(width, classes), rule)


def box_delta(params: Params, x_xD: jax.Array) -> jax.Array:
    """Returns what the box head adds to the logits of a box, float32 [..., 4]."""
    for name in ("fc1", "fc2"):
        x_xD = jax.nn.relu(dense_layer(params[name], x_xD))
    return dense_layer(params["fc3"], x_xD, jnp.float32)


def init_decoder(
    settings: schema.Detect, levels: int, classes: int, rng: jax.Array
) -> dict[str, Any]:
    """Returns parameters `layers`, each leaf [I, ...], `position`, `norm` and `heads`, which with
    `dino.shared_heads` are one pair, otherwise one per layer, `heads/layers`.

    Kernels are Xavier-uniform, those of queries, keys and values as one matrix of three; biases 0.

    >>> settings = schema.Detect(width=8, dino=schema.Dino(heads=2, hidden=16, depth=3))
    >>> params = jax.eval_shape(lambda key: init_decoder(settings, 2, 5, key), jax.random.key(0))
    >>> sorted(params), params["layers"]["fc1"]["kernel"].shape
    (['heads', 'layers', 'norm', 'position'], (3, 8, 16))
    """
    width, dino = settings.width, settings.dino
    affine = {"scale": (width,), "bias": (width,)}
    shapes = {
        "attention": {
            name: linear_shapes(width, width) for name in ("query", "key", "value", "out")
        },
        "norm1": affine,
        "norm2": affine,
        "fc1": linear_shapes(width, dino.hidden),
        "fc2": linear_shapes(dino.hidden, width),
        "norm3": affine,
    }

    def rule(path: str, shape: tuple[int, ...]) -> InitSpec:
        if path.endswith(("scale", "bias")):
            return "constant", float(path.endswith("scale"))
        inputs = path.startswith("attention/") and not path.startswith("attention/out")
        return "uniform", math.sqrt(6 / (4 * width if inputs else sum(shape)))

    def layer(key: jax.Array) -> dict[str, Any]:
        of_reading, of_rest = jax.random.split(key)
        reading = init_deformable(of_reading, width, dino.heads, levels, dino.sampled)
        return fill(of_rest, shapes, rule) | {"reading": reading}

    of_layers, of_position, of_heads = jax.random.split(rng, 3)
    outer = {
        "position": {"fc1": linear_shapes(2 * width, width), "fc2": linear_shapes(width, width)},
        "norm": affine,
    }
    head = functools.partial(init_query_heads, width, classes)
    if dino.shared_heads:
        heads = head(of_heads)
    else:
        heads = {"layers": jax.lax.map(head, jax.random.split(of_heads, dino.depth))}
    return {
        "layers": jax.lax.map(layer, jax.random.split(of_layers, dino.depth)),
        **fill(of_position, outer, rule),
        "heads": heads,
    }


def _self_attention(
    params: Params, x_BxTxD: jax.Array, position_BxTxD: jax.Array, heads: int, bias: Any
) -> jax.Array:
    placed_BxTxD = x_BxTxD + position_BxTxD
    q, k, v = (
        to_heads(dense_layer(params[name], x), 1, heads)[0]
        for name, x in (("query", placed_BxTxD), ("key", placed_BxTxD), ("value", x_BxTxD))
    )
    return dense_layer(params["out"], from_heads(attend(q, k, v, None, bias)))


def decode(
    settings: schema.Detect,
    params: Params,
    content_BxTxD: jax.Array,
    boxes_BxTx4: jax.Array,
    memory_BxNxD: jax.Array,
    shapes: Shapes,
    valid_BxLx2: jax.Array,
    visible_BxTxT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns class logits [B, I, T, K] and boxes [B, I, T, 4] of every layer, float32.

    Args:
      params: as of `init_decoder`.
      content_BxTxD: of the queries at the start.
      boxes_BxTx4: float32, where they start.
      memory_BxNxD: tokens of the maps, after the encoder.
      shapes: (height, width) of the levels.
      valid_BxLx2: `deformable_layers.valid_cells`.
      visible_BxTxT: bool, keys that a query attends to; None: all.

    >>> settings = schema.Detect(width=8, dino=schema.Dino(heads=2, hidden=16, depth=3))
    >>> def run(key, content, boxes, memory, cells):
    ...     params = init_decoder(settings, 1, 5, key)
    ...     return decode(settings, params, content, boxes, memory, ((4, 4),), cells)
    >>> arrays = jnp.zeros((1, 2, 8)), jnp.zeros((1, 2, 4)), jnp.zeros((1, 16, 8))
    >>> logits, boxes = jax.eval_shape(run, jax.random.key(0), *arrays, jnp.array([[[4, 3]]]))
    >>> logits.shape, boxes.shape
    ((1, 3, 2, 5), (1, 3, 2, 4))
    """
    dino, width = settings.dino, settings.width
    ratio_BxLx4 = jnp.tile(valid_ratios(shapes, valid_BxLx2), 2)
    inside_BxN = valid_tokens(shapes, valid_BxLx2)
    bias: tuple[jax.Array, ...] = ()
    if visible_BxTxT is not None:
        bias = (jnp.where(visible_BxTxT, 0.0, MASKED_LOGIT)[:, None, :, None],)
    dtype = memory_BxNxD.dtype

    def run(x_BxTxD: jax.Array, boxes_BxTx4: jax.Array, one: Params) -> jax.Array:
        reference_BxTxLx4 = boxes_BxTx4[:, :, None] * ratio_BxLx4[:, None]
        x, y, w, h = (
            sine_features(reference_BxTxLx4[:, :, 0, i], width // 2, _TEMPERATURE) for i in range(4)
        )
        sines_BxTxF = jnp.concatenate([y, x, w, h], -1).astype(dtype)
        hidden = jax.nn.relu(dense_layer(params["position"]["fc1"], sines_BxTxF))
        position_BxTxD = dense_layer(params["position"]["fc2"], hidden)
        attended = _self_attention(one["attention"], x_BxTxD, position_BxTxD, dino.heads, bias)
        x_BxTxD = post_norm(one["norm1"], x_BxTxD + attended)
        read = deformable(
            one["reading"],
            x_BxTxD + position_BxTxD,
            reference_BxTxLx4,
            memory_BxNxD,
            shapes,
            dino.heads,
            inside_BxN,
        )
        x_BxTxD = post_norm(one["norm2"], x_BxTxD + read)
        hidden = jax.nn.relu(dense_layer(one["fc1"], x_BxTxD))
        return post_norm(one["norm3"], x_BxTxD + dense_layer(one["fc2"], hidden))

    if dino.remat:
        run = jax.checkpoint(run)

    def layer(carry: Any, stacked: Any) -> tuple[Any, Any]:
        x_BxTxD, start_BxTx4 = carry  # the boxes with their gradient, for the prediction alone
        one, own = stacked
        heads = own or params["heads"]
        boxes_BxTx4 = jax.lax.stop_gradient(start_BxTx4)
        x_BxTxD = run(x_BxTxD, boxes_BxTx4, one)
        y_BxTxD = post_norm(params["norm"], x_BxTxD)
        logits_BxTxK = dense_layer(heads["classes"], y_BxTxD, jnp.float32)
        predicted_BxTx4 = jax.nn.sigmoid(
            box_delta(heads["boxes"], y_BxTxD) + box_logit(start_BxTx4)
        )
        refined_BxTx4 = jax.nn.sigmoid(box_delta(heads["boxes"], x_BxTxD) + box_logit(boxes_BxTx4))
        return (x_BxTxD, refined_BxTx4), (logits_BxTxK, predicted_BxTx4)

    start = content_BxTxD.astype(dtype), jax.lax.stop_gradient(boxes_BxTx4.astype(jnp.float32))
    stacked = params["layers"], params["heads"].get("layers", {})
    _, made = jax.lax.scan(layer, start, stacked)
    logits_BxIxTxK, boxes_BxIxTx4 = (x.swapaxes(0, 1) for x in made)
    return logits_BxIxTxK, boxes_BxIxTx4
