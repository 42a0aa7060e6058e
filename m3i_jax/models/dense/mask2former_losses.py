"""Losses of Mask2Former: every set of predictions is matched with the true masks of an image by
itself, and masks are compared at random points.

True masks are never made as maps of an image: they are read at points, from a class map, whose
categories are the masks (`ClassMasks`), or from objects, whose masks are in the frames of their
boxes (`BoxMasks`).

B images, S sets of predictions, Q queries, K categories, M slots for true masks, P points, T side
of the mask of an object.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from m3i_jax import schema
from m3i_jax.models.cpu_codegen import fusion_barrier
from m3i_jax.models.dense.map_sampling import sample_points
from m3i_jax.models.dense.mask_points import read_maps
from m3i_jax.models.dense.masked_decoder import QueryPredictions
from m3i_jax.objective.mask_matching import (
    MatchWeights,
    match_masks,
    point_mask_loss,
    query_class_loss,
    uncertain_points,
)
from m3i_jax.parallel.mesh import is_single_device, per_device

_KEPT = ("mask2former_query", "mask2former_points")  # for the backward pass


class MaskPoints(NamedTuple):
    """Random points of one image and one set of predictions, (x, y) in 0..1.

    Attributes:
      match_Px2: of the matching, the same for all masks.
      candidates_MxNx2: of each mask, from which the least certain are taken.
      fresh_MxFx2: of each mask, taken as they are.
    """

    match_Px2: jax.Array
    candidates_MxNx2: jax.Array
    fresh_MxFx2: jax.Array


class ClassMasks(NamedTuple):
    """The categories of a class map as true masks: at a point, one is the share of the four pixels
    around it that have its category.

    Attributes:
      classes_M: int32, of `present_classes`; -1: an empty slot.
      labels_HxW: the class map.
    """

    classes_M: jax.Array
    labels_HxW: jax.Array

    def shared(self, points_Px2: jax.Array) -> jax.Array:
        """All masks at the same points, float32 [P, M]."""
        return class_shares(self.labels_HxW, points_Px2, self.classes_M)

    def each(self, points_MxPx2: jax.Array) -> jax.Array:
        """Every mask at points of its own, float32 [M, P]."""

        def read(labels_HxW: jax.Array, points_MxPx2: jax.Array, classes_M: jax.Array) -> jax.Array:
            one = lambda at_Px2, c: class_shares(labels_HxW, at_Px2, c[None])[:, 0]
            return jax.vmap(one)(points_MxPx2, classes_M)

        return fusion_barrier(read, self.labels_HxW, points_MxPx2, self.classes_M)


class BoxMasks(NamedTuple):
    """Objects as true masks, which are bilinear inside their boxes and 0 outside.

    Attributes:
      classes_M: int32; -1: an empty slot.
      boxes_Mx4: x0 y0 x1 y1 as shares of the sides of the padded image.
      masks_MxTxT: 0..1, in the frames of the boxes.

    >>> boxes, masks = jnp.array([[0.5, 0.5, 1.0, 1.0]]), jnp.ones((1, 4, 4))
    >>> truth = BoxMasks(jnp.array([2]), boxes, masks)
    >>> truth.shared(jnp.array([[0.6, 0.7], [0.4, 0.7]])).tolist()
    [[1.0], [0.0]]
    """

    classes_M: jax.Array
    boxes_Mx4: jax.Array
    masks_MxTxT: jax.Array

    def shared(self, points_Px2: jax.Array) -> jax.Array:
        """All masks at the same points, float32 [P, M]."""
        read = jax.vmap(_box_mask_values, (0, 0, None), 1)
        return read(self.boxes_Mx4, self.masks_MxTxT, points_Px2)

    def each(self, points_MxPx2: jax.Array) -> jax.Array:
        """Every mask at points of its own, float32 [M, P]."""
        read = jax.vmap(_box_mask_values)
        return fusion_barrier(read, self.boxes_Mx4, self.masks_MxTxT, points_MxPx2)


def _box_mask_values(box_4: jax.Array, mask_TxT: jax.Array, points_Px2: jax.Array) -> jax.Array:
    low_2, side_2, half = box_4[:2], box_4[2:] - box_4[:2], 0.5 / len(mask_TxT)
    place_Px2 = (points_Px2 - low_2) / jnp.maximum(side_2, 1e-9)
    inside_P = ((place_Px2 >= 0) & (place_Px2 <= 1)).all(-1)
    # the outermost cells reach to the sides of the box
    mask_TxTx1 = mask_TxT.astype(jnp.float32)[..., None]
    read_P = sample_points(mask_TxTx1, jnp.clip(place_Px2, half, 1 - half))[:, 0]
    return jnp.where(inside_P, read_P, 0.0)


TrueMasks = ClassMasks | BoxMasks
HeadSettings = schema.Segment | schema.Detect  # both have strides, width and `mask2former`


def class_masks(settings: schema.Segment, labels_BxHxW: jax.Array, classes: int) -> ClassMasks:
    """The true masks of the class maps of B images.

    >>> class_masks(schema.Segment(), jnp.array([[[2, 2, 255, 0]]]), 4).classes_M.tolist()
    [[2, 0, -1, -1]]
    """
    slots = mask_slots(settings, classes)
    classes_BxM, _ = jax.vmap(lambda map_: present_classes(map_, classes, slots))(labels_BxHxW)
    return ClassMasks(classes_BxM, labels_BxHxW)


def mask_slots(settings: schema.Segment, classes: int) -> int:
    """M: how many categories of an image can have a mask.

    >>> mask_slots(schema.Segment(), 150)
    64
    """
    own = settings.mask2former
    return min(classes, own.max_classes, own.queries)


def draw_points(settings: HeadSettings, key: jax.Array, slots: int) -> MaskPoints:
    """Uniform points for one image and one set.

    >>> own = schema.Mask2Former(points=8)
    >>> drawn = draw_points(schema.Segment(mask2former=own), jax.random.key(0), 5)
    >>> [x.shape for x in drawn]
    [(8, 2), (5, 24, 2), (5, 2, 2)]
    """
    own = settings.mask2former
    counts = (own.points, slots * int(own.points * own.oversample))
    fresh = slots * (own.points - uncertain_count(settings))
    all_ = jax.random.uniform(key, (sum(counts) + fresh, 2), jnp.float32)
    match, candidates, rest = jnp.split(all_, np.cumsum(counts))
    return MaskPoints(match, candidates.reshape(slots, -1, 2), rest.reshape(slots, -1, 2))


def uncertain_count(settings: HeadSettings) -> int:
    """How many points of a mask are the least certain candidates.

    >>> uncertain_count(schema.Segment())
    9408
    """
    return int(settings.mask2former.uncertain * settings.mask2former.points)


def present_classes(labels_HxW: jax.Array, classes: int, slots: int) -> tuple[jax.Array, jax.Array]:
    """The categories of a class map by falling number of pixels, int32 [M], then -1; and how many
    categories it has, of which those beyond M slots are cut.

    >>> found, count = present_classes(jnp.array([[2, 2, 255, 0]]), 4, 3)
    >>> found.tolist(), int(count)
    ([2, 0, -1], 2)
    """
    pixels_K = (labels_HxW[..., None] == jnp.arange(classes)).sum((0, 1))
    order_M = jnp.argsort(-pixels_K, stable=True)[:slots]
    return jnp.where(pixels_K[order_M] > 0, order_M, -1).astype(jnp.int32), (pixels_K > 0).sum()


def class_shares(labels_HxW: jax.Array, points_Px2: jax.Array, classes_M: jax.Array) -> jax.Array:
    """The masks of some categories at points, float32 [P, M]: what `sample_points` would read of
    the maps `labels == category`.

    >>> labels = jnp.array([[3, 7]])
    >>> class_shares(labels, jnp.array([[0.25, 0.5], [0.5, 0.5]]), jnp.array([7])).ravel().tolist()
    [0.0, 0.5]
    """
    h, w = labels_HxW.shape
    x_P, y_P = (points_Px2.astype(jnp.float32) * np.array([w, h], np.float32) - 0.5).T
    left_P, top_P = jnp.floor(x_P), jnp.floor(y_P)
    total_PxM = jnp.zeros((len(points_Px2), len(classes_M)))
    for i in (0, 1):
        for j in (0, 1):
            row_P, column_P = top_P + i, left_P + j
            weight_P = (1 - jnp.abs(y_P - row_P)) * (1 - jnp.abs(x_P - column_P))
            inside_P = (row_P >= 0) & (row_P < h) & (column_P >= 0) & (column_P < w)
            cell_P = jnp.clip(row_P, 0, h - 1) * w + jnp.clip(column_P, 0, w - 1)
            label_P = labels_HxW.reshape(-1)[cell_P.astype(jnp.int32)]
            hit_PxM = (label_P[:, None] == classes_M) & inside_P[:, None]
            total_PxM += jnp.where(hit_PxM, weight_P[:, None], 0)
    return total_PxM


def set_losses(
    settings: HeadSettings,
    class_logits_QxK1: jax.Array,
    masks_hxwxQ: jax.Array,
    truth: TrueMasks,
    points: MaskPoints,
) -> tuple[jax.Array, jax.Array]:
    """Losses of one set of predictions of one image.

    Args:
      settings: `mask2former` is read.
      class_logits_QxK1, masks_hxwxQ: the predictions.
      truth: of the image.
      points: where masks are compared.

    Returns:
      float32 [3], without weights: the sum over queries of the weighted cross-entropy of
      categories, the sums over true masks of their binary cross-entropy and dice loss; int32 [M],
      the query of each mask.
    """
    own, classes_M = settings.mask2former, truth.classes_M
    query_M = match_masks(
        class_logits_QxK1,
        sample_points(jax.lax.stop_gradient(masks_hxwxQ), points.match_Px2),
        truth.shared(points.match_Px2),
        classes_M,
        MatchWeights(own.class_weight, own.mask_weight, own.dice_weight),
    )
    query_M = checkpoint_name(query_M, _KEPT[0])
    category, _ = query_class_loss(class_logits_QxK1, query_M, classes_M, own.none_weight)
    matched_Mxhxw = jnp.moveaxis(masks_hxwxQ[..., jnp.maximum(query_M, 0)], -1, 0)
    chosen_MxPx2 = uncertain_points(
        read_maps(jax.lax.stop_gradient(matched_Mxhxw), points.candidates_MxNx2),
        points.candidates_MxNx2,
        points.fresh_MxFx2,
        uncertain_count(settings),
    )
    chosen_MxPx2 = checkpoint_name(chosen_MxPx2, _KEPT[1])
    entropy, overlap, _ = point_mask_loss(
        read_maps(matched_Mxhxw, chosen_MxPx2), truth.each(chosen_MxPx2), classes_M >= 0
    )
    return jnp.stack([category, entropy, overlap]), query_M


def mask2former_losses(
    settings: HeadSettings,
    made: QueryPredictions,
    truth: TrueMasks,
    keys_B: jax.Array,
    points: MaskPoints | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Losses of all sets of predictions, float32 [S, 3]: sums over the images of those of
    `set_losses`; and the queries of the true masks, int32 [S, B, M].

    The sets are computed one after the other, and again in the backward pass, so that only one has
    what it read at its points in memory; matches and points themselves are kept, as they take long
    to find. Every device matches its own images.

    Args:
      settings: `mask2former` is read.
      made: the predictions.
      truth: of every image, [B, ...] each; see `class_masks`.
      keys_B: a key per image, from which points are drawn for every set.
      points: given ones, [S, B, ...] each, instead.
    """
    sets, rows = made.classes_SxBxQxK1.shape[:2]
    slots = truth.classes_M.shape[1]

    def one_image(
        classes_QxK1: jax.Array,
        masks_hxwxQ: jax.Array,
        truth: TrueMasks,
        random: jax.Array | MaskPoints,
    ) -> tuple[jax.Array, jax.Array]:
        if not isinstance(random, MaskPoints):
            random = draw_points(settings, random, slots)
        return set_losses(settings, classes_QxK1, masks_hxwxQ, truth, random)

    def one_set(
        _: None, of_set: tuple[QueryPredictions, jax.Array | MaskPoints]
    ) -> tuple[None, tuple[jax.Array, jax.Array]]:
        (classes_BxQxK1, masks_BxhxwxQ), random = of_set
        if not isinstance(random, MaskPoints):  # the number of the set
            random = jax.vmap(jax.random.fold_in, (0, None))(keys_B, random)
        arrays = (classes_BxQxK1, masks_BxhxwxQ, truth, random)
        run = jax.vmap(one_image)
        sums_Bx3, query_BxM = per_device(run, *arrays) if is_single_device(rows) else run(*arrays)
        return None, (sums_Bx3.sum(0), query_BxM)

    random = jnp.arange(sets, dtype=jnp.uint32) if points is None else points
    keep = jax.checkpoint_policies.save_only_these_names(*_KEPT)
    return jax.lax.scan(jax.checkpoint(one_set, policy=keep), None, (made, random))[1]
