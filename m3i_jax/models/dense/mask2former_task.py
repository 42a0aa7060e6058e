"""Mask2Former as a head of segmentation: its losses with their weights and divisors, and its class
maps. See `task_heads.SegmentationHead`.

Both divisors follow from the class maps of the whole batch alone: the number of true masks (at
least 1) for the losses of masks, and the weights of all queries for the classification. So parts of
a batch, and devices, add up to the whole.

B images, H W their size, K categories, S sets of predictions."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.models.dense import mask2former
from m3i_jax.models.dense.map_sampling import resize_bilinear
from m3i_jax.models.dense.mask2former_losses import (
    class_masks,
    mask2former_losses,
    mask_slots,
)
from m3i_jax.models.dense.pixel_heads import Values, pixel_accuracy
from m3i_jax.models.layers import Params

KINDS = ("class", "mask", "dice")


def classes_of_images(labels_BxHxW: jax.Array, classes: int) -> jax.Array:
    """How many categories each class map has, int32 [B].

    >>> classes_of_images(jnp.array([[[2, 255, 0]], [[255, 255, 255]]]), 3).tolist()
    [2, 0]
    """
    there_BxK = (labels_BxHxW[..., None] == jnp.arange(classes)).any((1, 2))
    return there_BxK.sum(-1)


def mask_divisors(
    settings: schema.Segment, labels_BxHxW: jax.Array, classes: int
) -> dict[str, jax.Array]:
    """Divisors of the last set of predictions and, `auxiliary_`, of the earlier ones.

    >>> labels = jnp.array([[[2, 0]], [[255, 255]]])
    >>> found = mask_divisors(schema.Segment(), labels, 3)
    >>> float(found["mask"]), round(float(found["class"]), 3)  # of 200 queries, 2 have a mask
    (2.0, 21.8)
    """
    counts_B = jnp.minimum(classes_of_images(labels_BxHxW, classes), mask_slots(settings, classes))
    return count_divisors(settings.mask2former, counts_B)


def count_divisors(own: schema.Mask2Former, counts_B: jax.Array) -> dict[str, jax.Array]:
    """`mask_divisors` of images with so many true masks.

    >>> float(count_divisors(schema.Mask2Former(), jnp.array([0, 3]))["dice"])
    3.0
    """
    masks = counts_B.sum().astype(jnp.float32)
    queries = own.queries * len(counts_B)
    weights = jnp.maximum(masks + own.none_weight * (queries - masks), 1e-6)
    least = jnp.maximum(masks, 1)
    own_kinds = dict(zip(KINDS, (weights, least, least), strict=True))
    return own_kinds | {f"auxiliary_{kind}": value for kind, value in own_kinds.items()}


def weighted_losses(own: schema.Mask2Former, sums_Sx3: jax.Array) -> Values:
    """The sums of `mask2former_losses` with their weights: `class`, `mask` and `dice` of the last
    set of predictions and, with `auxiliary_`, of the earlier ones together.

    >>> {name: float(x) for name, x in weighted_losses(schema.Mask2Former(), jnp.eye(3)).items()}
    {'class': 0.0, 'mask': 0.0, 'dice': 5.0, 'auxiliary_class': 2.0, 'auxiliary_mask': 5.0, ...
    """
    weights = jnp.array([own.class_weight, own.mask_weight, own.dice_weight], jnp.float32)
    weighted_Sx3 = sums_Sx3 * weights
    values = dict(zip(KINDS, weighted_Sx3[-1], strict=True))
    earlier_3 = weighted_Sx3[:-1].sum(0)
    return values | {f"auxiliary_{kind}": x for kind, x in zip(KINDS, earlier_3, strict=True)}


def mask2former_loss(
    settings: schema.Segment,
    params: Params,
    statistics: Params,
    maps: Mapping[int, jax.Array],
    labels_BxHxW: jax.Array,
    keys_B: jax.Array,
) -> tuple[Values, Values, Params]:
    """The losses of `weighted_losses`, on class maps. Beside them, per image: accuracy of pixels at
    the stride of the masks, true masks, and categories that have none because they are too many."""
    own = settings.mask2former
    made = mask2former.apply(settings, params, maps)
    truth = class_masks(settings, labels_BxHxW, made.classes_SxBxQxK1.shape[-1] - 1)
    sums_Sx3, _ = mask2former_losses(settings, made, truth, keys_B)
    values = weighted_losses(own, sums_Sx3)

    classes_BxQxK1, masks_BxhxwxQ = jax.lax.stop_gradient((made[0][-1], made[1][-1]))
    _, h, w, _ = masks_BxhxwxQ.shape
    scores = mask2former.semantic_scores(classes_BxQxK1, masks_BxhxwxQ, (h, w))
    rows, columns = (
        ((jnp.arange(n) + 0.5) * (full / n)).astype(jnp.int32)
        for n, full in ((h, labels_BxHxW.shape[1]), (w, labels_BxHxW.shape[2]))
    )
    count_B = classes_of_images(labels_BxHxW, classes_BxQxK1.shape[-1] - 1)
    slots = mask_slots(settings, classes_BxQxK1.shape[-1] - 1)
    infos = {
        "pixel_accuracy": pixel_accuracy(scores, labels_BxHxW[:, rows][:, :, columns]),
        "masks": jnp.minimum(count_B, slots).sum().astype(jnp.float32),
        "classes_cut": jnp.maximum(count_B - slots, 0).sum().astype(jnp.float32),
    }
    return values, infos, statistics


def mask2former_logits(
    settings: schema.Segment,
    params: Params,
    statistics: Params,
    maps: Mapping[int, jax.Array],
    size: tuple[int, int],
) -> jax.Array:
    """Scores of the categories at the size of the images, from the last predictions: of resized
    masks, or, as mmsegmentation has them, scores of masks that are resized."""
    made = mask2former.apply(settings, params, maps)
    classes_BxQxK1, masks_BxhxwxQ = made.classes_SxBxQxK1[-1], made.masks_SxBxhxwxQ[-1]
    if settings.test_average != "softmax":
        return mask2former.semantic_scores(classes_BxQxK1, masks_BxhxwxQ, size)
    _, h, w, _ = masks_BxhxwxQ.shape
    scores_BxhxwxK = mask2former.semantic_scores(classes_BxQxK1, masks_BxhxwxQ, (h, w))
    return resize_bilinear(scores_BxhxwxK, size)
