"""Mask R-CNN on a feature pyramid: parameters, losses and detections of a batch.

Losses are per image: those of each image are divided by its own counts, and the batch's value is
their mean over the images. So a value does not depend on how a batch is cut into microbatches,
devices and hosts, and equals that of the references, which run one image a process.

What needs much memory an image (matching, suppression, reading maps in boxes) runs for a few images
at a time on the device that has them, so that no more is needed for more of them, and no device
waits for another. Heads run on the regions of all images at once.

B images, A anchors, M objects, P proposals, R regions of an image, K categories, D detections.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax import parallel, schema
from m3i_jax.errors import UserError
from m3i_jax.models.dense import proposals, regions
from m3i_jax.models.dense.map_sampling import mask_targets, multilevel_roi_align
from m3i_jax.models.dense.proposals import Pyramid
from m3i_jax.models.layers import Params

_AT_ONCE = 2**26  # numbers of the largest intermediate array of some images, on a device
Values = dict[str, tuple[jax.Array, jax.Array]]


def init(
    settings: schema.Detect, channels: Mapping[int, int], classes: int, rng: jax.Array
) -> Params:
    """Returns parameters {"rpn", "box", "mask"}; without `settings.masks` no mask.

    Args:
      channels: {stride: channels of its map}, the same for all.
      classes: number of categories, without background.

    Raises:
      ValueError: levels differ in their channels, or are not those of the settings.
      UserError: not one anchor size per stride.

    >>> settings = schema.Detect()
    >>> channels = dict.fromkeys(settings.strides, 256)
    >>> shapes = jax.eval_shape(lambda key: init(settings, channels, 80, key), jax.random.key(0))
    >>> sum(leaf.size for leaf in jax.tree.leaves(shapes))
    19446768
    """
    if set(channels) != set(settings.strides) or len(set(channels.values())) != 1:
        raise ValueError(
            f"channels {dict(channels)} of the pyramid; the levels must be those of dense.detect."
            f"strides, {settings.strides}, with equal channels"
        )
    if len(settings.anchor_sizes) != len(settings.strides):
        raise UserError(
            f"config.dense.detect.anchor_sizes: {settings.anchor_sizes} are"
            f" {len(settings.anchor_sizes)} sizes for the {len(settings.strides)} strides"
            f" {settings.strides}; give one for each stride"
        )
    width, keys = next(iter(channels.values())), jax.random.split(rng, 3)
    params = {
        "rpn": proposals.init_rpn(settings, width, keys[0]),
        "box": regions.init_box(settings, width, classes, keys[1]),
    }
    if settings.masks:
        params["mask"] = regions.init_mask(settings, width, classes, keys[2])
    return params


def _map_images(one: Callable[..., Any], numbers: int, *arrays_Bx: Any) -> Any:
    """`one` of every image; so many at a time that arrays of `numbers` an image fit."""
    rows, at_once = jax.tree.leaves(arrays_Bx)[0].shape[0], max(1, _AT_ONCE // max(1, numbers))
    if not parallel.is_single_device(rows):
        return jax.vmap(one)(*arrays_Bx)  # the partitioner could not split a loop over images

    def run(*some_Bx: Any) -> Any:
        if jax.tree.leaves(some_Bx)[0].shape[0] <= at_once:
            return jax.vmap(one)(*some_Bx)
        return jax.lax.map(lambda row: one(*row), some_Bx, batch_size=at_once)

    return parallel.per_device(run, *arrays_Bx)


def _anchors(settings: schema.Detect, pyramid: Pyramid) -> list[jax.Array]:
    sizes = {stride: pyramid[stride].shape for stride in settings.strides}
    grids = {stride: (shape[1], shape[2]) for stride, shape in sizes.items()}
    return proposals.pyramid_anchors(settings, grids)


def _align(
    settings: schema.Detect, pyramid: Pyramid, boxes_BxRx4: jax.Array, side: int
) -> jax.Array:
    """What the maps have in boxes, [B R, side, side, C]. The coarsest map is for proposals only."""
    maps = {stride: pyramid[stride] for stride in settings.strides[:-1] or settings.strides}
    canonical = (settings.canonical[0], settings.canonical[1])
    (height, width, channels), rois = maps[min(maps)].shape[1:], boxes_BxRx4.shape[1]
    pooled_BxRxTxTxC = _map_images(
        lambda maps, boxes: multilevel_roi_align(maps, boxes, side, canonical),
        rois * side * max(height, width) * channels,
        maps,
        boxes_BxRx4,
    )
    return pooled_BxRxTxTxC.reshape(-1, *pooled_BxRxTxTxC.shape[2:])


def losses(
    settings: schema.Detect,
    params: Params,
    pyramid: Pyramid,
    size_Bx2: jax.Array,
    boxes_BxMx4: jax.Array,
    classes_BxM: jax.Array,
    masks_BxMxSxS: jax.Array | None,
    keys_B: jax.Array,
    *,
    frequency_K: Any = None,
) -> tuple[Values, Values]:
    """Returns the training losses and other values for the log, each {name: (sum over images,
    images)}.

    Args:
      params: as of `init`.
      pyramid: {stride: [B, H, W, C]}.
      size_Bx2: int32, (height, width) of the images without padding.
      boxes_BxMx4: float32, pixels.
      classes_BxM: int32; -1 where there is no object.
      masks_BxMxSxS: 0 or 1, each in the frame of its box; None where `settings.masks` is off.
      keys_B: a random key per image, the same at every restart.
      frequency_K: images that have each category, for the federated loss (LVIS's image_count);
        None: all equal.

    Returns:
      losses: rpn_cls, rpn_loc, cls, box_reg and mask; their sum is the objective.
      counts: foreground anchors, proposals and foreground regions per image.

    >>> settings = schema.Detect(width=8, box_hidden=8)
    >>> channels = dict.fromkeys(settings.strides, 8)
    >>> params = jax.eval_shape(lambda key: init(settings, channels, 3, key), jax.random.key(0))
    >>> maps = {s: jnp.zeros((2, 128 // s, 128 // s, 8)) for s in settings.strides}
    >>> targets = jnp.zeros((2, 5, 4)), jnp.zeros((2, 5), int), jnp.zeros((2, 5, 14, 14))
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> call = lambda params: losses(settings, params, maps, jnp.full((2, 2), 128), *targets, keys)
    >>> [sorted(values) for values in jax.eval_shape(call, params)]
    [['box_reg', 'cls', 'mask', 'rpn_cls', 'rpn_loc'],
     ['foreground_anchors', 'foreground_regions', 'proposals']]
    """
    anchors = sum(len(level) for level in _anchors(settings, pyramid))
    classes = params["box"]["classes"]["bias"].shape[0] - 1
    draws = draw_uniforms(settings, anchors, boxes_BxMx4.shape[1], classes, keys_B)
    if frequency_K is not None:
        draws["frequency"] = jnp.broadcast_to(
            jnp.asarray(frequency_K, jnp.float32), draws["categories"].shape
        )
    return losses_from_draws(
        settings,
        params,
        pyramid,
        size_Bx2,
        boxes_BxMx4,
        classes_BxM,
        masks_BxMxSxS,
        draws,
    )


def draw_uniforms(
    settings: schema.Detect, anchors: int, objects: int, classes: int, keys_B: jax.Array
) -> dict[str, jax.Array]:
    """Returns the random numbers of the losses of B images, uniform in [0, 1): "anchors" [B, A],
    "regions" [B, P + M] for proposals and objects, and "categories" [B, K] for the federated loss.

    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> draws = draw_uniforms(schema.Detect(), 3000, 5, 80, keys)
    >>> {name: draw.shape for name, draw in draws.items()}
    {'anchors': (2, 3000), 'regions': (2, 1005)}
    """
    counts = {"anchors": anchors, "regions": settings.proposals[1] + objects}
    if settings.loss == "federated":
        counts["categories"] = classes

    def one(key: jax.Array) -> dict[str, jax.Array]:
        return {
            name: jax.random.uniform(jax.random.fold_in(key, purpose), (count,), jnp.float32)
            for purpose, (name, count) in enumerate(counts.items())
        }

    return jax.vmap(one)(keys_B)


def losses_from_draws(
    settings: schema.Detect,
    params: Params,
    pyramid: Pyramid,
    size_Bx2: jax.Array,
    boxes_BxMx4: jax.Array,
    classes_BxM: jax.Array,
    masks_BxMxSxS: jax.Array | None,
    draws: Mapping[str, jax.Array],
) -> tuple[Values, Values]:
    """`losses` with given random numbers, those of `draw_uniforms`."""
    levels = _anchors(settings, pyramid)
    anchors_Ax4 = jnp.concatenate(levels)
    valid_BxM = classes_BxM >= 0
    logits_BxA, deltas_BxAx4 = proposals.apply_rpn(settings, params["rpn"], pyramid)

    def choose(logits_A: Any, deltas_Ax4: Any, size_2: Any, boxes_Mx4: Any, *rest: Any) -> Any:
        valid_M, anchor_draw_A, region_draw_Q = rest
        sampled = proposals.sample_anchors(settings, anchors_Ax4, boxes_Mx4, valid_M, anchor_draw_A)
        found = proposals.select_proposals(
            settings, logits_A, deltas_Ax4, levels, size_2, settings.proposals
        )
        regions_Rx4, chosen = regions.sample_regions(
            settings, found, boxes_Mx4, valid_M, region_draw_Q
        )
        return sampled, found.valid_P.sum(), regions_Rx4, chosen

    objects = boxes_BxMx4.shape[1]
    sampled, found_B, regions_BxRx4, chosen = _map_images(
        choose,
        max(objects * len(anchors_Ax4), _suppressed(settings.proposals[0], levels)),
        *jax.lax.stop_gradient((logits_BxA, deltas_BxAx4)),
        size_Bx2,
        boxes_BxMx4,
        valid_BxM,
        draws["anchors"],
        draws["regions"],
    )
    rpn_cls_B, rpn_loc_B = jax.vmap(
        lambda logits, deltas, boxes, sample: proposals.rpn_losses(
            settings, logits, deltas, anchors_Ax4, boxes, sample
        )
    )(logits_BxA, deltas_BxAx4, boxes_BxMx4, sampled)

    pooled = _align(settings, pyramid, regions_BxRx4, regions.BOX_SIDE)
    images, count = regions_BxRx4.shape[:2]
    logits, deltas = regions.apply_box(settings, params["box"], pooled)
    cls_B, box_reg_B = jax.vmap(functools.partial(regions.box_losses, settings))(
        logits.reshape(images, count, -1),
        deltas.reshape(images, count, -1, 4),
        regions_BxRx4,
        boxes_BxMx4,
        classes_BxM,
        chosen,
        draws.get("categories"),
        draws.get("frequency"),
    )
    values = {"rpn_cls": rpn_cls_B, "rpn_loc": rpn_loc_B, "cls": cls_B, "box_reg": box_reg_B}
    if settings.masks:
        values["mask"] = _mask_losses(
            settings,
            params["mask"],
            pyramid,
            regions_BxRx4,
            chosen,
            (boxes_BxMx4, classes_BxM, masks_BxMxSxS),
        )
    counts = {
        "foreground_anchors": (sampled.weight_S * sampled.foreground_S).sum(1),
        "proposals": found_B.astype(jnp.float32),
        "foreground_regions": (chosen.weight_S * chosen.foreground_S).sum(1),
    }
    total = jnp.float32(images)
    summed, counted = (
        {name: (value_B.sum(), total) for name, value_B in some.items()}
        for some in (values, counts)
    )
    return summed, counted


def _suppressed(candidates: int, levels: list[jax.Array]) -> int:
    """Overlaps of the proposals of an image."""
    return len(levels) * min(candidates, max(len(level) for level in levels)) ** 2


def _mask_losses(
    settings: schema.Detect,
    params: Params,
    pyramid: Pyramid,
    regions_BxRx4: jax.Array,
    chosen: proposals.Sample,
    objects: tuple[Any, Any, Any],
) -> jax.Array:
    """Loss of the masks of each image, [B]."""
    boxes_BxMx4, classes_BxM, masks_BxMxSxS = objects
    most = slice(0, max(1, regions.foreground_regions(settings)))
    regions_BxFx4 = regions_BxRx4[:, most]
    object_BxF = chosen.object_S[:, most]
    weight_BxF = (chosen.weight_S * chosen.foreground_S)[:, most]

    def of_image(
        masks_MxSxS: Any, boxes_Mx4: Any, classes_M: Any, regions_Fx4: Any, object_F: Any
    ) -> tuple[jax.Array, jax.Array]:
        targets = mask_targets(
            masks_MxSxS[object_F], boxes_Mx4[object_F], regions_Fx4, 2 * regions.MASK_SIDE
        )
        return targets, jnp.maximum(classes_M[object_F], 0)

    targets, class_BxF = jax.vmap(of_image)(
        masks_BxMxSxS, boxes_BxMx4, classes_BxM, regions_BxFx4, object_BxF
    )
    pooled = _align(settings, pyramid, regions_BxFx4, regions.MASK_SIDE)
    logits = regions.apply_mask(settings, params, pooled, class_BxF.ravel())
    return jax.vmap(regions.mask_loss)(logits.reshape(targets.shape), targets, weight_BxF)


def detect(
    settings: schema.Detect, params: Params, pyramid: Pyramid, size_Bx2: jax.Array
) -> dict[str, jax.Array]:
    """Returns detections of every image, by falling score.

    Args:
      params: as of `init`.
      pyramid: {stride: [B, H, W, C]}.
      size_Bx2: int32, (height, width) of the images without padding.

    Returns:
      boxes [B, D, 4] in pixels of the input, scores [B, D], classes int32 [B, D], valid bool
      [B, D], where there is a detection; cut int32 [B], scored boxes beyond `settings.candidates`;
      and masks [B, D, 28, 28], probabilities in the frame of the box, unless `settings.masks` is
      off.

    >>> settings = schema.Detect(width=8, box_hidden=8, detections=7)
    >>> channels = dict.fromkeys(settings.strides, 8)
    >>> params = jax.eval_shape(lambda key: init(settings, channels, 3, key), jax.random.key(0))
    >>> maps = {s: jnp.zeros((2, 128 // s, 128 // s, 8)) for s in settings.strides}
    >>> call = lambda params: detect(settings, params, maps, jnp.full((2, 2), 128))
    >>> {name: array.shape for name, array in jax.eval_shape(call, params).items()}
    {'boxes': (2, 7, 4), 'classes': (2, 7), 'cut': (2,), 'masks': (2, 7, 28, 28),
     'scores': (2, 7), 'valid': (2, 7)}
    """
    levels = _anchors(settings, pyramid)
    logits_BxA, deltas_BxAx4 = proposals.apply_rpn(settings, params["rpn"], pyramid)
    found = _map_images(
        lambda logits, deltas, size: proposals.select_proposals(
            settings, logits, deltas, levels, size, settings.test_proposals
        ),
        _suppressed(settings.test_proposals[0], levels),
        logits_BxA,
        deltas_BxAx4,
        size_Bx2,
    )
    pooled = _align(settings, pyramid, found.boxes_Px4, regions.BOX_SIDE)
    images, count = found.boxes_Px4.shape[:2]
    logits, deltas = regions.apply_box(settings, params["box"], pooled)
    best = _map_images(
        functools.partial(regions.select_detections, settings),
        settings.candidates**2,
        logits.reshape(images, count, -1),
        deltas.reshape(images, count, -1, 4),
        found,
        size_Bx2,
    )
    result = {
        "boxes": best.boxes_Dx4,
        "scores": best.score_D,
        "classes": best.class_D,
        "valid": best.valid_D,
        "cut": best.cut,
    }
    if settings.masks:
        pooled = _align(settings, pyramid, best.boxes_Dx4, regions.MASK_SIDE)
        logits = regions.apply_mask(settings, params["mask"], pooled, best.class_D.ravel())
        result["masks"] = jax.nn.sigmoid(logits).reshape(*best.score_D.shape, *logits.shape[1:])
    return result
