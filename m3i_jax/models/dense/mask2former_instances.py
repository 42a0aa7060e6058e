"""Mask2Former as a head of detection: true masks are objects, and detections are the best pairs of
query and category, with a mask and the box around it. See `task_heads.DetectionHead`.

The losses are divided as in segmentation, by numbers of the whole batch: of objects (at least 1)
for those of masks, and of the weights of all queries for the classification.

B images, M objects, Q queries, K categories, D detections, h w size of the masks."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.models.dense import mask2former, mask2former_task
from m3i_jax.models.dense.map_sampling import resize_bilinear
from m3i_jax.models.dense.mask2former_losses import BoxMasks, mask2former_losses
from m3i_jax.models.layers import Params

Values = dict[str, tuple[jax.Array, jax.Array]]
Maps = Mapping[int, jax.Array]


def init(
    settings: schema.Detect, channels: Mapping[int, int], classes: int, rng: jax.Array
) -> Params:
    """Parameters {"pixel", "decoder"}, see `mask2former.init`.

    Raises:
      UserError: settings of which no such head can be made, or another loss.
    """
    if settings.loss != "softmax":
        raise UserError(
            f"config.dense.detect.loss: {settings.loss!r} has no effect, because the head"
            " mask2former learns a softmax over all categories; use softmax, or another head"
        )
    try:
        return mask2former.init(settings, channels, classes, rng)[0]
    except ValueError as error:
        raise UserError(
            f"config.dense.detect: the head mask2former cannot be made: {error}; change these"
            " settings"
        ) from None


def instance_divisors(settings: schema.Detect, classes_BxM: jax.Array) -> dict[str, jax.Array]:
    """What the sums of the losses are divided by; see `mask2former_task.mask_divisors`.

    >>> found = instance_divisors(schema.Detect(), jnp.array([[3, 3, 1], [0, -1, -1]]))
    >>> float(found["mask"])
    4.0
    """
    return mask2former_task.count_divisors(settings.mask2former, (classes_BxM >= 0).sum(1))


def losses(
    settings: schema.Detect,
    params: Params,
    maps: Maps,
    size_Bx2: jax.Array,
    boxes_BxMx4: jax.Array,
    classes_BxM: jax.Array,
    masks_BxMxTxT: jax.Array | None,
    keys_B: jax.Array,
    *,
    frequency_K: Any = None,
) -> tuple[Values, Values]:
    """Training losses, those of `mask2former_task.weighted_losses`, and the objects per image; each
    {name: (sum, images)}. Points are drawn in the padded image, as published, so sizes are not
    read.

    Args:
      params: as of `init`.
      maps: {stride: [B, H, W, C]}.
      size_Bx2, frequency_K: not read.
      boxes_BxMx4: float32, pixels, x0 y0 x1 y1.
      classes_BxM: int32; -1 where there is no object.
      masks_BxMxTxT: 0 or 1, in the frames of the boxes.
      keys_B: a random key per image, the same at every restart.

    Raises:
      UserError: more objects than queries.
    """
    del size_Bx2, frequency_K
    own = settings.mask2former
    if boxes_BxMx4.shape[1] > own.queries:
        raise UserError(
            f"config.dense.detect.mask2former.queries: {own.queries} queries cannot be matched with"
            f" {boxes_BxMx4.shape[1]} objects; set at least as many, or a smaller"
            " dense.geometry.max_objects"
        )
    assert masks_BxMxTxT is not None
    height, width = _canvas(settings, maps)
    made = mask2former.apply(settings, params, maps)
    shares_BxMx4 = boxes_BxMx4 / jnp.array([width, height] * 2, jnp.float32)
    truth = BoxMasks(classes_BxM, shares_BxMx4, masks_BxMxTxT)
    sums_Sx3, _ = mask2former_losses(settings, made, truth, keys_B)
    values = mask2former_task.weighted_losses(own, sums_Sx3)
    images, objects = jnp.float32(len(classes_BxM)), (classes_BxM >= 0).sum().astype(jnp.float32)
    return {name: (x, images) for name, x in values.items()}, {"objects": (objects, images)}


def _canvas(settings: schema.Detect, maps: Maps) -> tuple[int, int]:
    """(height, width) of the padded images."""
    finest = settings.strides[0]
    return maps[finest].shape[1] * finest, maps[finest].shape[2] * finest


def detect(
    settings: schema.Detect, params: Params, maps: Maps, size_Bx2: jax.Array
) -> dict[str, jax.Array]:
    """Detections of every image, by falling score; see `instances`.

    Args:
      params: as of `init`.
      maps: {stride: [B, H, W, C]}.
      size_Bx2: int32, (height, width) of the images without padding.

    Returns:
      boxes [B, D, 4] in pixels of the input, scores [B, D], classes int32 [B, D], valid bool
      [B, D], cut int32 [B], 0; mask_logits float32 [B, D, h, w] of the padded input at the first
      of the strides, and mask_stride int32 [B], that stride.

    >>> own = schema.Mask2Former(queries=6, heads=2, encoder_depth=1, depth=2, hidden=4)
    >>> settings = schema.Detect(strides=(4, 8), width=8, detections=5, mask2former=own)
    >>> params = jax.eval_shape(lambda key: init(settings, {4: 3, 8: 5}, 7, key), jax.random.key(0))
    >>> maps = {4: jnp.zeros((2, 4, 6, 3)), 8: jnp.zeros((2, 2, 3, 5))}
    >>> call = lambda params: detect(settings, params, maps, jnp.full((2, 2), 16))
    >>> found = jax.eval_shape(call, params)
    >>> found["boxes"].shape, found["mask_logits"].shape
    ((2, 5, 4), (2, 5, 4, 6))
    """
    made, canvas = mask2former.apply(settings, params, maps), _canvas(settings, maps)
    found = jax.vmap(lambda *arrays: instances(settings, *arrays, canvas=canvas))(
        made.classes_SxBxQxK1[-1], made.masks_SxBxhxwxQ[-1], size_Bx2
    )
    return found | {
        "cut": jnp.zeros(len(size_Bx2), jnp.int32),
        "mask_stride": jnp.full(len(size_Bx2), settings.strides[0], jnp.int32),
    }


def instances(
    settings: schema.Detect,
    class_logits_QxK1: jax.Array,
    masks_hxwxQ: jax.Array,
    size_2: jax.Array,
    *,
    canvas: tuple[int, int],
) -> dict[str, jax.Array]:
    """The best pairs of query and category of one image by the probability of the category, each
    with the mask of its query. The score is this probability times the mean probability of the
    mask over its pixels, those above one half at the size of the canvas. Masks may overlap.

    Args:
      settings: `detections` and `score_threshold` are read.
      class_logits_QxK1: of the categories and, last, of none.
      masks_hxwxQ: logits of the masks.
      size_2: (height, width) of the image without padding.
      canvas: (height, width) with padding, to which the masks are resized.

    Returns:
      boxes, scores, classes, valid and mask_logits, as of `detect`, by falling score; a detection
      without pixels is not valid.

    >>> masks = jnp.full((4, 4, 1), -9.0).at[1:3, 2:].set(9.0)
    >>> settings = schema.Detect(detections=2)
    >>> found = instances(settings, jnp.zeros((1, 3)), masks, jnp.array([4, 4]), canvas=(4, 4))
    >>> found["boxes"][0].tolist(), found["scores"].round(2).tolist()
    ([2.0, 1.0, 4.0, 3.0], [0.33..., 0.33...])
    """
    (height, width), categories = canvas, class_logits_QxK1.shape[1] - 1
    share_QxK = jax.nn.softmax(class_logits_QxK1.astype(jnp.float32))[:, :-1]
    count = min(settings.detections, share_QxK.size)
    share_D, pair_D = jax.lax.top_k(share_QxK.reshape(-1), count)
    logits_Dxhxw = jnp.moveaxis(masks_hxwxQ.astype(jnp.float32)[..., pair_D // categories], -1, 0)
    content_HxW = (jnp.arange(height) < size_2[0])[:, None] & (jnp.arange(width) < size_2[1])

    def one(logits_hxw: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The mean probability of a mask, and its box; one after the other, for memory."""
        logits_HxW = resize_bilinear(logits_hxw[None, ..., None], canvas)[0, ..., 0]
        inside_HxW = (logits_HxW > 0) & content_HxW
        total = jnp.where(inside_HxW, jax.nn.sigmoid(logits_HxW), 0).sum()
        sides = []
        for axis, side in ((0, width), (1, height)):
            there = inside_HxW.any(axis)
            sides.append((there.argmax(), jnp.where(there.any(), side - there[::-1].argmax(), 0)))
        (x0, x1), (y0, y1) = sides
        return total / (inside_HxW.sum() + 1e-6), jnp.stack([x0, y0, x1, y1]).astype(jnp.float32)

    mean_D, boxes_Dx4 = jax.lax.map(one, logits_Dxhxw)
    score_D = share_D * mean_D
    order_D = jnp.argsort(-score_D, stable=True)
    score_D, boxes_Dx4 = score_D[order_D], boxes_Dx4[order_D]
    valid_D = (score_D > settings.score_threshold) & (boxes_Dx4[:, 2] > boxes_Dx4[:, 0])
    class_D = (pair_D % categories).astype(jnp.int32)[order_D]
    return {
        "boxes": jnp.where(valid_D[:, None], boxes_Dx4, 0.0),
        "scores": jnp.where(valid_D, score_D, 0.0),
        "classes": jnp.where(valid_D, class_D, 0),
        "valid": valid_D,
        "mask_logits": logits_Dxhxw[order_D],
    }
