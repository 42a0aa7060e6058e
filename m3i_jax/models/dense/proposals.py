"""The region proposal network of Faster R-CNN on a pyramid: a head that all levels share, its
losses on sampled anchors, and its proposals in static shapes.

Boxes are (x0, y0, x1, y1) in pixels of the padded image, float32 under any compute precision.
Functions of one image have no axis B.

B images, A anchors of all levels (levels from the finest, rows, columns, ratios), M objects, L
levels, K candidates of a level, P proposals, S sampled anchors, R ratios, C channels.
"""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.models.initializers import InitSpec, fill
from m3i_jax.models.intern_image_layer import convolve, dense_layer
from m3i_jax.models.layers import Params
from m3i_jax.objective.assignment import match_boxes, sample_labels
from m3i_jax.objective.boxes import (
    anchors,
    box_iou,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    nms,
)
from m3i_jax.objective.dense_losses import binary_cross_entropy

LOW, HIGH = 0.3, 0.7  # IoU below which an anchor is background, and from which it is foreground
CODE = (1.0, 1.0, 1.0, 1.0)  # weights of the box codec
Pyramid = Mapping[int, jax.Array]


class Proposals(NamedTuple):
    """boxes_Px4 float32, score_P (logits) and valid_P of one image, by falling score. Slots that
    are not valid have finite boxes and count nowhere."""

    boxes_Px4: jax.Array
    score_P: jax.Array
    valid_P: jax.Array


class Sample(NamedTuple):
    """Boxes that a loss reads: their index_S, whether each is foreground, the weight (0: an empty
    slot) and the object that it is matched with. Foreground comes first."""

    index_S: jax.Array
    foreground_S: jax.Array
    weight_S: jax.Array
    object_S: jax.Array


def init_rpn(settings: schema.Detect, width_in: int, rng: jax.Array) -> Params:
    """Returns parameters of the head: `conv_0`, ..., `logits`, `deltas`. Kernels N(0, 0.01^2),
    biases 0.

    >>> shapes = jax.eval_shape(lambda key: init_rpn(schema.Detect(), 256, key), jax.random.key(0))
    >>> sum(leaf.size for leaf in jax.tree.leaves(shapes))
    1184015
    """
    ratios, width = len(settings.anchor_ratios), settings.width
    shapes: dict[str, Any] = {}
    for i in range(settings.rpn_convs):
        shape = (3, 3, width if i else width_in, width)
        shapes[f"conv_{i}"] = {"kernel": shape, "bias": (width,)}
    last = width if settings.rpn_convs else width_in
    for name, n in (("logits", ratios), ("deltas", 4 * ratios)):
        shapes[name] = {"kernel": (last, n), "bias": (n,)}

    def rule(path: str, shape: tuple[int, ...]) -> InitSpec:
        return ("normal", 0.01) if path.endswith("kernel") else ("constant", 0.0)

    return fill(rng, shapes, rule)


def apply_rpn(
    settings: schema.Detect, params: Params, pyramid: Pyramid
) -> tuple[jax.Array, jax.Array]:
    """Returns logits [B, A] and deltas [B, A, 4] of all anchors, float32.

    >>> settings = schema.Detect(width=8)
    >>> maps = {s: jnp.zeros((1, 128 // s, 128 // s, 8)) for s in settings.strides}
    >>> call = lambda key: apply_rpn(settings, init_rpn(settings, 8, key), maps)
    >>> [x.shape for x in jax.eval_shape(call, jax.random.key(0))]
    [(1, 4092), (1, 4092, 4)]
    """

    def level(map_BxHxWxC: jax.Array) -> tuple[jax.Array, jax.Array]:
        x_BxHxWxC = map_BxHxWxC
        for i in range(settings.rpn_convs):
            x_BxHxWxC = jax.nn.relu(convolve(params[f"conv_{i}"], x_BxHxWxC, 1))
        rows = x_BxHxWxC.shape[0]
        logits = dense_layer(params["logits"], x_BxHxWxC, jnp.float32)
        deltas = dense_layer(params["deltas"], x_BxHxWxC, jnp.float32)
        return logits.reshape(rows, -1), deltas.reshape(rows, -1, 4)

    logits, deltas = zip(*(level(pyramid[stride]) for stride in settings.strides), strict=True)
    return jnp.concatenate(logits, 1), jnp.concatenate(deltas, 1)


def pyramid_anchors(
    settings: schema.Detect, grids: Mapping[int, tuple[int, int]]
) -> list[jax.Array]:
    """Anchors [h w R, 4] of every level, from the finest. `grids`: (height, width) of the map of
    each stride.

    >>> grids = {stride: (1024 // stride, 1024 // stride) for stride in schema.Detect().strides}
    >>> [len(level) for level in pyramid_anchors(schema.Detect(), grids)]
    [196608, 49152, 12288, 3072, 768]
    """
    return [
        anchors(grids[stride], stride, (size,), settings.anchor_ratios)
        for stride, size in zip(settings.strides, settings.anchor_sizes, strict=True)
    ]


def sample_anchors(
    settings: schema.Detect,
    anchors_Ax4: jax.Array,
    boxes_Mx4: jax.Array,
    valid_M: jax.Array,
    uniform_A: jax.Array,
) -> Sample:
    """Returns the anchors of one image that enter the losses: at most half foreground, the rest
    background.

    An anchor is foreground from an IoU of 0.7 with its best object, or if no anchor overlaps some
    object more; background below 0.3; otherwise it is not sampled.

    Args:
      valid_M: bool, rows of `boxes_Mx4` that are objects.
      uniform_A: uniform random numbers; the greatest of a kind are taken.

    >>> settings = schema.Detect(rpn_samples=2)
    >>> boxes = jnp.array([[0.0, 0, 8, 8], [8, 0, 16, 8], [16, 0, 24, 8]])
    >>> valid = jnp.array([True])
    >>> sample_anchors(settings, boxes, boxes[1:2], valid, jnp.zeros(3)).index_S.tolist()
    [1, 0]
    """
    label_A, object_A = match_boxes(
        box_iou(boxes_Mx4, anchors_Ax4), valid_M, low=LOW, high=HIGH, keep_best=True
    )
    count = min(settings.rpn_samples, label_A.shape[0])
    index_S, foreground_S, weight_S = sample_labels(
        label_A, uniform_A, count, min(count, settings.rpn_samples // 2)
    )
    return Sample(index_S, foreground_S, weight_S, object_A[index_S])


def rpn_losses(
    settings: schema.Detect,
    logits_A: jax.Array,
    deltas_Ax4: jax.Array,
    anchors_Ax4: jax.Array,
    boxes_Mx4: jax.Array,
    sample: Sample,
) -> tuple[jax.Array, jax.Array]:
    """Binary cross-entropy and L1 error of the deltas of one image, each summed over the sampled
    anchors and divided by `rpn_samples`, filled or not.

    >>> one, anchor = jnp.ones(1), jnp.array([[0.0, 0, 8, 8]])
    >>> sample = Sample(jnp.array([0]), one > 0, one, jnp.array([0]))
    >>> settings = schema.Detect(rpn_samples=2)
    >>> values = rpn_losses(settings, 0 * one, jnp.zeros((1, 4)), anchor, anchor + 2.0, sample)
    >>> print(*(value.round(4) for value in values))
    0.3466 0.25
    """
    places = sample.index_S
    total, _ = binary_cross_entropy(logits_A[places], sample.foreground_S, sample.weight_S)
    # foreground comes first, and is at most half
    half = slice(0, max(1, settings.rpn_samples // 2))
    target_Fx4 = encode_boxes(boxes_Mx4[sample.object_S[half]], anchors_Ax4[places[half]], CODE)
    weight_F = (sample.weight_S * sample.foreground_S)[half]
    error_F = jnp.abs(deltas_Ax4[places[half]] - target_Fx4).sum(-1)
    return total / settings.rpn_samples, (error_F * weight_F).sum() / settings.rpn_samples


def select_proposals(
    settings: schema.Detect,
    logits_A: jax.Array,
    deltas_Ax4: jax.Array,
    anchors_of_levels: list[jax.Array],
    size_2: jax.Array,
    counts: tuple[int, ...],
) -> Proposals:
    """Proposals of one image, without gradient: the best anchors of every level, decoded and
    clipped to the image, without empty ones and without those that a better one of their level
    suppresses; then the best of all levels.

    Args:
      size_2: (height, width) of the image without padding.
      counts: (candidates of a level, proposals of an image). Where there are fewer anchors, the
        last proposals are not valid.

    >>> settings = schema.Detect(strides=(8,), anchor_sizes=(8,), anchor_ratios=(1.0,))
    >>> levels = pyramid_anchors(settings, {8: (1, 3)})
    >>> logits, zeros = jnp.array([0.0, 2.0, 1.0]), jnp.zeros((3, 4))
    >>> found = select_proposals(settings, logits, zeros, levels, jnp.array([8, 12]), (3, 2))
    >>> found.boxes_Px4.tolist(), found.valid_P.tolist()
    ([[4.0, 0.0, 12.0, 4.0], [0.0, 0.0, 4.0, 4.0]], [True, True])
    """
    logits_A, deltas_Ax4 = jax.lax.stop_gradient((logits_A, deltas_Ax4))
    candidates, most = counts
    anchors_Ax4 = jnp.concatenate(anchors_of_levels)
    scores, indices, start = [], [], 0
    for level in anchors_of_levels:
        score_K, index_K = jax.lax.top_k(
            logits_A[start : start + len(level)], min(candidates, len(level))
        )
        scores.append(score_K)
        indices.append(index_K + start)
        start += len(level)
    score_Q, index_Q = jnp.concatenate(scores), jnp.concatenate(indices)
    boxes_Qx4 = clip_boxes(decode_boxes(deltas_Ax4[index_Q], anchors_Ax4[index_Q], CODE), size_2)
    finite_Q = jnp.isfinite(boxes_Qx4).all(-1) & jnp.isfinite(score_Q)
    valid_Q = finite_Q & (boxes_Qx4[:, 2:] > boxes_Qx4[:, :2]).all(-1)
    boxes_Qx4 = jnp.where(valid_Q[:, None], boxes_Qx4, 0.0)
    keep_Q = _suppress_levels(
        settings.rpn_nms, boxes_Qx4, score_Q, valid_Q, [len(score) for score in scores]
    )
    kept_Q = jnp.where(keep_Q, score_Q, -jnp.inf)
    missing = max(0, most - kept_Q.shape[0])
    score_P, best_P = jax.lax.top_k(jnp.pad(kept_Q, (0, missing), constant_values=-jnp.inf), most)
    valid_P = jnp.isfinite(score_P)
    boxes_Px4 = jnp.pad(boxes_Qx4, ((0, missing), (0, 0)))[best_P]
    return Proposals(boxes_Px4, jnp.where(valid_P, score_P, 0.0), valid_P)


def _suppress_levels(
    threshold: float, boxes_Qx4: jax.Array, score_Q: jax.Array, valid_Q: jax.Array, sizes: list[int]
) -> jax.Array:
    """Which boxes stay, bool [Q]. Levels of one size, which lie side by side, are suppressed at
    once, each for itself."""
    keep, start = [], 0
    for size, levels in ((n, len(list(group))) for n, group in itertools.groupby(sizes)):
        of = slice(start, start + levels * size)
        keep_LxK = jax.vmap(lambda b, s, v: nms(b, s, threshold, valid_N=v))(
            boxes_Qx4[of].reshape(levels, size, 4),
            score_Q[of].reshape(levels, size),
            valid_Q[of].reshape(levels, size),
        )
        keep.append(keep_LxK.ravel())
        start = of.stop
    return jnp.concatenate(keep)
