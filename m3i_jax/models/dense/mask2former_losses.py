"""Losses of Mask2Former on class maps: the true masks of an image are its categories, every set of
predictions is matched with them by itself, and masks are compared at random points.

A mask is never made as a map: at a point, it is the share of the four pixels around it that have
its category.

B images, S sets of predictions, Q queries, K categories, M slots for true masks, P points.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import schema
from m3i_jax.models.dense.map_sampling import sample_points
from m3i_jax.models.dense.masked_decoder import QueryPredictions
from m3i_jax.objective.mask_matching import (
    MatchWeights,
    match_masks,
    point_mask_loss,
    query_class_loss,
    uncertain_points,
)
from m3i_jax.parallel.mesh import is_single_device, per_device


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


def mask_slots(settings: schema.Segment, classes: int) -> int:
    """M: how many categories of an image can have a mask.

    >>> mask_slots(schema.Segment(), 150)
    64
    """
    own = settings.mask2former
    return min(classes, own.max_classes, own.queries)


def draw_points(settings: schema.Segment, key: jax.Array, slots: int) -> MaskPoints:
    """Uniform points for one image and one set.

    >>> own = schema.Mask2Former(points=8)
    >>> drawn = draw_points(schema.Segment(mask2former=own), jax.random.key(0), 5)
    >>> [x.shape for x in drawn]
    [(8, 2), (5, 24, 2), (5, 2, 2)]
    """
    own = settings.mask2former
    counts = (own.points, slots * int(own.points * own.oversample))
    fresh = slots * (own.points - uncertain_count(settings))
    all_ = jax.random.uniform(key, (sum(counts) + fresh, 2))
    match, candidates, rest = jnp.split(all_, np.cumsum(counts))
    return MaskPoints(match, candidates.reshape(slots, -1, 2), rest.reshape(slots, -1, 2))


def uncertain_count(settings: schema.Segment) -> int:
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
    settings: schema.Segment,
    class_logits_QxK1: jax.Array,
    masks_hxwxQ: jax.Array,
    labels_HxW: jax.Array,
    classes_M: jax.Array,
    points: MaskPoints,
) -> tuple[jax.Array, jax.Array]:
    """Losses of one set of predictions of one image.

    Args:
      settings: `mask2former` is read.
      class_logits_QxK1, masks_hxwxQ: the predictions.
      labels_HxW: the class map.
      classes_M: `present_classes`.
      points: where masks are compared.

    Returns:
      float32 [3], without weights: the sum over queries of the weighted cross-entropy of
      categories, the sums over true masks of their binary cross-entropy and dice loss; int32 [M],
      the query of each mask.
    """
    own = settings.mask2former
    query_M = match_masks(
        class_logits_QxK1,
        sample_points(jax.lax.stop_gradient(masks_hxwxQ), points.match_Px2),
        class_shares(labels_HxW, points.match_Px2, classes_M),
        classes_M,
        MatchWeights(own.class_weight, own.mask_weight, own.dice_weight),
    )
    category, _ = query_class_loss(class_logits_QxK1, query_M, classes_M, own.none_weight)
    matched_Mxhxwx1 = jnp.moveaxis(masks_hxwxQ[..., jnp.maximum(query_M, 0)], -1, 0)[..., None]
    read = lambda points_MxPx2: jax.vmap(sample_points)(matched_Mxhxwx1, points_MxPx2)[..., 0]
    chosen_MxPx2 = uncertain_points(
        read(points.candidates_MxNx2),
        points.candidates_MxNx2,
        points.fresh_MxFx2,
        uncertain_count(settings),
    )
    shares = jax.vmap(lambda at_Px2, c: class_shares(labels_HxW, at_Px2, c[None])[:, 0])
    entropy, overlap, _ = point_mask_loss(
        read(chosen_MxPx2), shares(chosen_MxPx2, classes_M), classes_M >= 0
    )
    return jnp.stack([category, entropy, overlap]), query_M


def mask2former_losses(
    settings: schema.Segment,
    made: QueryPredictions,
    labels_BxHxW: jax.Array,
    keys_B: jax.Array,
    points: MaskPoints | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Losses of all sets of predictions, float32 [S, 3]: sums over the images of those of
    `set_losses`; and the queries of the true masks, int32 [S, B, M].

    The sets are computed one after the other, and again in the backward pass, so that only one has
    its points in memory; every device matches its own images.

    Args:
      settings: `mask2former` is read.
      made: the predictions.
      labels_BxHxW: class maps.
      keys_B: a key per image, from which points are drawn for every set.
      points: given ones, [S, B, ...] each, instead.
    """
    sets, rows, queries, with_none = made.classes_SxBxQxK1.shape
    slots = mask_slots(settings, with_none - 1)
    classes_BxM, _ = jax.vmap(lambda map_: present_classes(map_, with_none - 1, slots))(
        labels_BxHxW
    )

    def one_image(
        classes_QxK1: jax.Array,
        masks_hxwxQ: jax.Array,
        labels_HxW: jax.Array,
        classes_M: jax.Array,
        random: jax.Array | MaskPoints,
    ) -> tuple[jax.Array, jax.Array]:
        if not isinstance(random, MaskPoints):
            random = draw_points(settings, random, slots)
        return set_losses(settings, classes_QxK1, masks_hxwxQ, labels_HxW, classes_M, random)

    def one_set(
        _: None, of_set: tuple[QueryPredictions, jax.Array | MaskPoints]
    ) -> tuple[None, tuple[jax.Array, jax.Array]]:
        (classes_BxQxK1, masks_BxhxwxQ), random = of_set
        if not isinstance(random, MaskPoints):  # the number of the set
            random = jax.vmap(jax.random.fold_in, (0, None))(keys_B, random)
        arrays = (classes_BxQxK1, masks_BxhxwxQ, labels_BxHxW, classes_BxM, random)
        run = jax.vmap(one_image)
        sums_Bx3, query_BxM = per_device(run, *arrays) if is_single_device(rows) else run(*arrays)
        return None, (sums_Bx3.sum(0), query_BxM)

    random = jnp.arange(sets, dtype=jnp.uint32) if points is None else points
    return jax.lax.scan(jax.checkpoint(one_set), None, (made, random))[1]
