"""Box and mask head of Mask R-CNN: the proposals that enter their losses, the losses, and the
choice of detections, in static shapes.

Boxes are (x0, y0, x1, y1) in pixels, float32 under any compute precision. Categories are 0..K-1;
background is K. Functions of one image have no axis B.

B images, R regions (sampled proposals or detections), F regions that may be foreground, M objects,
P proposals, K categories, D detections, C channels, T side of the pooled map.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.models.dense.proposals import Proposals, Sample
from m3i_jax.models.initializers import InitSpec, fill
from m3i_jax.models.intern_image_layer import convolve, dense_layer, norm_layer
from m3i_jax.models.layers import Params
from m3i_jax.objective.assignment import match_boxes, sample_labels
from m3i_jax.objective.boxes import box_iou, clip_boxes, decode_boxes, encode_boxes, nms
from m3i_jax.objective.dense_losses import binary_cross_entropy, federated_cross_entropy

IOU = 0.5  # with an object, from which a region is foreground
CODE = (10.0, 10.0, 5.0, 5.0)  # weights of the box codec
BOX_SIDE, MASK_SIDE = 7, 14  # of the maps that the heads read; a mask has twice MASK_SIDE


class Detections(NamedTuple):
    """boxes_Dx4, score_D, class_D int32 and valid_D of one image, by falling score; and the number
    of scored boxes beyond the candidates of suppression."""

    boxes_Dx4: jax.Array
    score_D: jax.Array
    class_D: jax.Array
    valid_D: jax.Array
    cut: jax.Array


def _conv_shapes(width_in: int, width: int, convs: int) -> dict[str, Any]:
    shapes: dict[str, Any] = {}
    for i in range(convs):
        shapes[f"conv_{i}"] = {"kernel": (3, 3, width if i else width_in, width)}
        shapes[f"norm_{i}"] = {"scale": (width,), "bias": (width,)}
    return shapes


def _first_values(path: str, shape: tuple[int, ...]) -> InitSpec:
    layer, last = path.split("/")[-2:]
    if last in ("scale", "bias"):
        return "constant", float(last == "scale")
    if layer.startswith("conv_"):
        return "normal", math.sqrt(2 / (9 * shape[-1]))
    if layer == "deconv":  # torch takes the fan of the input for that of the output
        return "normal", math.sqrt(2 / (4 * shape[0]))
    if layer == "hidden":
        return "uniform", math.sqrt(3 / shape[0])
    return "normal", 0.01 if layer == "classes" else 0.001


def init_box(settings: schema.Detect, width_in: int, classes: int, rng: jax.Array) -> Params:
    """Returns parameters of the box head: `conv_0`, `norm_0`, ..., `hidden`, `classes`, `deltas`.

    Convolutions N(0, 2 / fan out), `hidden` uniform within sqrt(3 / fan in), `classes` N(0,
    0.01^2), `deltas` N(0, 0.001^2), biases 0. The rows of `hidden` are (row, column, channel).

    >>> call = lambda key: init_box(schema.Detect(), 256, 80, key)
    >>> shapes = jax.eval_shape(call, jax.random.key(0))
    >>> shapes["classes"]["kernel"].shape, shapes["deltas"]["kernel"].shape
    ((1024, 81), (1024, 320))
    """
    shapes = _conv_shapes(width_in, settings.width, settings.box_convs)
    last = (settings.width if settings.box_convs else width_in) * BOX_SIDE**2
    for name, n, m in (
        ("hidden", last, settings.box_hidden),
        ("classes", settings.box_hidden, classes + 1),
        ("deltas", settings.box_hidden, 4 * classes),
    ):
        shapes[name] = {"kernel": (n, m), "bias": (m,)}
    return fill(rng, shapes, _first_values)


def init_mask(settings: schema.Detect, width_in: int, classes: int, rng: jax.Array) -> Params:
    """Returns parameters of the mask head: `conv_0`, `norm_0`, ..., `deconv`, `masks`. The columns
    of `deconv` are (row, column, channel).

    Convolutions N(0, 2 / fan out), `masks` N(0, 0.001^2), biases 0.

    >>> call = lambda key: init_mask(schema.Detect(), 256, 80, key)
    >>> shapes = jax.eval_shape(call, jax.random.key(0))
    >>> shapes["deconv"]["kernel"].shape, shapes["masks"]["kernel"].shape
    ((256, 1024), (256, 80))
    """
    width = settings.width
    shapes = _conv_shapes(width_in, width, settings.mask_convs)
    last = width if settings.mask_convs else width_in
    shapes["deconv"] = {"kernel": (last, 4 * width), "bias": (width,)}
    shapes["masks"] = {"kernel": (width, classes), "bias": (classes,)}
    return fill(rng, shapes, _first_values)


def _convolutions(params: Params, x_RxTxTxC: jax.Array, convs: int) -> jax.Array:
    for i in range(convs):
        x_RxTxTxC = convolve(params[f"conv_{i}"], x_RxTxTxC, 1)
        x_RxTxTxC = jax.nn.relu(norm_layer(params[f"norm_{i}"], x_RxTxTxC))
    return x_RxTxTxC


def apply_box(
    settings: schema.Detect, params: Params, x_RxTxTxC: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns logits [R, K + 1] and deltas [R, K, 4], float32.

    >>> settings = schema.Detect(width=8, box_hidden=16)
    >>> call = lambda key, x: apply_box(settings, init_box(settings, 8, 3, key), x)
    >>> [y.shape for y in jax.eval_shape(call, jax.random.key(0), jnp.zeros((2, 7, 7, 8)))]
    [(2, 4), (2, 3, 4)]
    """
    x_RxTxTxC = _convolutions(params, x_RxTxTxC, settings.box_convs)
    rows = x_RxTxTxC.shape[0]
    h_RxH = jax.nn.relu(dense_layer(params["hidden"], x_RxTxTxC.reshape(rows, -1)))
    logits = dense_layer(params["classes"], h_RxH, jnp.float32)
    return logits, dense_layer(params["deltas"], h_RxH, jnp.float32).reshape(rows, -1, 4)


def apply_mask(
    settings: schema.Detect, params: Params, x_RxTxTxC: jax.Array, class_R: jax.Array
) -> jax.Array:
    """Returns logits [R, 2 T, 2 T] float32 of the mask of one category each. Those of the other
    categories are not computed: no loss and no detection reads them.

    >>> settings = schema.Detect(width=8)
    >>> call = lambda key, x, k: apply_mask(settings, init_mask(settings, 8, 3, key), x, k)
    >>> x, k = jnp.zeros((2, 14, 14, 8)), jnp.zeros(2, jnp.int32)
    >>> jax.eval_shape(call, jax.random.key(0), x, k).shape
    (2, 28, 28)
    """
    x_RxTxTxC = _convolutions(params, x_RxTxTxC, settings.mask_convs)
    (r, t), dtype = x_RxTxTxC.shape[:2], x_RxTxTxC.dtype
    up = dense_layer(
        {"kernel": params["deconv"]["kernel"], "bias": jnp.tile(params["deconv"]["bias"], 4)},
        x_RxTxTxC,
    )
    up_RxTxTx4xC = jax.nn.relu(up).reshape(r, t, t, 4, -1)
    column_RxC = params["masks"]["kernel"].T[class_R].astype(dtype)
    logits_RxTxTx4 = jnp.einsum(
        "rhwsc,rc->rhws", up_RxTxTx4xC, column_RxC, preferred_element_type=jnp.float32
    )
    logits_RxTxTx4 += params["masks"]["bias"][class_R].astype(jnp.float32)[:, None, None, None]
    # sub-pixels, as (row, column), to their places
    return logits_RxTxTx4.reshape(r, t, t, 2, 2).swapaxes(2, 3).reshape(r, 2 * t, 2 * t)


def sample_regions(
    settings: schema.Detect,
    proposals: Proposals,
    boxes_Mx4: jax.Array,
    valid_M: jax.Array,
    uniform_Q: jax.Array,
) -> tuple[jax.Array, Sample]:
    """Returns the regions of one image that enter the losses: boxes [R, 4] and what they are.

    Objects are proposals, too. Foreground has an IoU of at least 0.5 with its best object; all else
    is background.

    Args:
      uniform_Q: uniform random numbers, one for each of the P proposals and the M objects.

    >>> boxes = jnp.array([[0.0, 0, 8, 8], [0, 0, 8, 7], [20, 20, 30, 30]])
    >>> found = Proposals(boxes[1:], jnp.zeros(2), jnp.array([True, True]))
    >>> settings = schema.Detect(rois=4, roi_foreground=0.5)
    >>> regions, sample = sample_regions(
    ...     settings, found, boxes[:1], jnp.array([True]), jnp.array([0.1, 0.2, 0.3])
    ... )
    >>> print(sample.foreground_S, sample.weight_S, sample.index_S)
    [ True  True False] [1. 1. 1.] [2 0 1]
    """
    boxes_Qx4 = jax.lax.stop_gradient(jnp.concatenate([proposals.boxes_Px4, boxes_Mx4]))
    valid_Q = jnp.concatenate([proposals.valid_P, valid_M])
    label_Q, object_Q = match_boxes(
        box_iou(boxes_Mx4, boxes_Qx4), valid_M, low=IOU, high=IOU, keep_best=False
    )
    label_Q = jnp.where(valid_Q, label_Q, -1)
    count = min(settings.rois, label_Q.shape[0])
    index_R, foreground_R, weight_R = sample_labels(
        label_Q, uniform_Q, count, min(count, foreground_regions(settings))
    )
    sample = Sample(index_R, foreground_R, weight_R, object_Q[index_R])
    return jnp.where(weight_R[:, None] > 0, boxes_Qx4[index_R], 0.0), sample


def foreground_regions(settings: schema.Detect) -> int:
    """Returns the largest number of foreground regions of an image.

    >>> foreground_regions(schema.Detect())
    128
    """
    return int(settings.rois * settings.roi_foreground)


def box_losses(
    settings: schema.Detect,
    logits_RxK1: jax.Array,
    deltas_RxKx4: jax.Array,
    regions_Rx4: jax.Array,
    boxes_Mx4: jax.Array,
    classes_M: jax.Array,
    sample: Sample,
    uniform_K: jax.Array | None = None,
    frequency_K: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Classification loss and L1 error of the deltas of one image, each summed over the regions,
    the second over those in the foreground and their category's deltas, and divided by the number
    of regions.

    Args:
      classes_M: int32, those of objects that `sample` names are 0..K-1.
      uniform_K: uniform random numbers by which the federated loss draws categories.
      frequency_K: images that have each category, for the federated loss; None: all equal.

    >>> box, one = jnp.array([[0.0, 0, 8, 8]]), jnp.ones(1)
    >>> sample = Sample(jnp.array([0]), one > 0, one, jnp.array([0]))
    >>> values = box_losses(
    ...     schema.Detect(), jnp.zeros((1, 3)), jnp.zeros((1, 2, 4)), box, box + 2.0,
    ...     jnp.array([1]), sample
    ... )
    >>> print(*(value.round(4) for value in values))  # ln 3; 10 * 2 / 8 for x, and for y
    1.0986 5.0
    """
    classes = deltas_RxKx4.shape[1]
    class_R = classes_M[sample.object_S]
    target_R = jnp.where(sample.foreground_S, class_R, classes)
    count = jnp.maximum(sample.weight_S.sum(), 1)
    if settings.loss == "softmax":
        log_RxK1 = jax.nn.log_softmax(logits_RxK1)
        loss_R = -jnp.take_along_axis(log_RxK1, target_R[:, None], 1)[:, 0]
        classified = (loss_R * sample.weight_S).sum() / count
    else:
        assert uniform_K is not None
        total, _ = federated_cross_entropy(
            logits_RxK1[:, :classes],
            target_R,
            sample.weight_S,
            uniform_K=uniform_K,
            frequency_K=frequency_K,
            count=settings.federated_classes,
        )
        classified = total / count
    at_F = slice(0, max(1, foreground_regions(settings)))
    weight_F = (sample.weight_S * sample.foreground_S)[at_F]
    error_F = jnp.abs(
        _of_class(deltas_RxKx4[at_F], class_R[at_F])
        - encode_boxes(boxes_Mx4[sample.object_S[at_F]], regions_Rx4[at_F], CODE)
    ).sum(-1)
    return classified, (error_F * weight_F).sum() / count


def _of_class(x_RxKx4: jax.Array, class_R: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_RxKx4, class_R[:, None, None].clip(0), 1)[:, 0]


def mask_loss(logits_FxSxS: jax.Array, targets_FxSxS: jax.Array, weight_F: jax.Array) -> jax.Array:
    """Returns the mean binary cross-entropy of one image over the pixels of its foreground regions;
    0 without one.

    >>> logits, weight = jnp.zeros((2, 2, 2)), jnp.array([1.0, 0.0])
    >>> print(mask_loss(logits, logits, weight).round(4), mask_loss(logits, logits, 0 * weight))
    0.6931 0.0
    """
    total, count = binary_cross_entropy(logits_FxSxS, targets_FxSxS, weight_F)
    return total / jnp.maximum(count, 1)


def select_detections(
    settings: schema.Detect,
    logits_PxK1: jax.Array,
    deltas_PxKx4: jax.Array,
    proposals: Proposals,
    size_2: jax.Array,
) -> Detections:
    """Returns detections of one image: category and box of every proposal by every category whose
    score is above the threshold, without those that a better one of their category suppresses.

    The best `settings.candidates` scored boxes enter the suppression.

    Args:
      size_2: (height, width) of the image without padding.

    >>> boxes = jnp.array([[0.0, 0, 8, 8], [0, 0, 8, 7]])
    >>> found = Proposals(boxes, jnp.zeros(2), jnp.array([True, True]))
    >>> settings, size = schema.Detect(detections=2), jnp.array([8, 8])
    >>> logits = jnp.array([[4.0, 0, 0], [5, 0, 0]])  # two categories and background
    >>> best = select_detections(settings, logits, jnp.zeros((2, 2, 4)), found, size)
    >>> best.class_D[:1].tolist(), best.boxes_Dx4[0].tolist(), best.valid_D.tolist()
    ([0], [0.0, 0.0, 8.0, 7.0], [True, False])
    """
    if settings.loss == "softmax":
        score_PxK = jax.nn.softmax(logits_PxK1)[:, :-1]
    else:
        score_PxK = jax.nn.sigmoid(logits_PxK1[:, :-1])
    classes = score_PxK.shape[1]
    scored_PxK = proposals.valid_P[:, None] & (score_PxK > settings.score_threshold)
    all_scores = jnp.where(scored_PxK, score_PxK, -jnp.inf).ravel()
    candidates = min(settings.candidates, all_scores.shape[0])
    score_N, index_N = jax.lax.top_k(all_scores, candidates)
    place_N, class_N = index_N // classes, index_N % classes
    boxes_Nx4 = clip_boxes(
        decode_boxes(deltas_PxKx4[place_N, class_N], proposals.boxes_Px4[place_N], CODE), size_2
    )
    valid_N = jnp.isfinite(score_N) & jnp.isfinite(boxes_Nx4).all(-1)
    boxes_Nx4 = jnp.where(valid_N[:, None], boxes_Nx4, 0.0)
    keep_N = nms(boxes_Nx4, score_N, settings.nms, groups_N=class_N, valid_N=valid_N)
    score_D, best_D = jax.lax.top_k(
        jnp.where(keep_N, score_N, -jnp.inf), min(settings.detections, candidates)
    )
    valid_D = jnp.isfinite(score_D)
    return Detections(
        boxes_Dx4=boxes_Nx4[best_D],
        score_D=jnp.where(valid_D, score_D, 0.0),
        class_D=jnp.where(valid_D, class_N[best_D], 0).astype(jnp.int32),
        valid_D=valid_D,
        cut=jnp.maximum(scored_PxK.sum() - candidates, 0),
    )
