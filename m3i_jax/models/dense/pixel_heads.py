"""Segmentation heads that classify every pixel: logits per cell, resized to the image, and softmax
cross-entropy. UperNet and the linear head are such.

B images, H W their size, K categories."""

from collections.abc import Callable, Mapping
from types import ModuleType

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.models.dense import linear_head, upernet
from m3i_jax.models.dense.map_sampling import resize_bilinear
from m3i_jax.models.layers import Params
from m3i_jax.objective.dense_losses import pixel_cross_entropy

UNLABELLED = 255
Values = dict[str, jax.Array]


def pixel_divisor(settings: schema.Segment, labels_BxHxW: jax.Array, classes: int) -> jax.Array:
    """What the sums of both losses are divided by: all pixels or the labelled ones, by `divide_by`.

    >>> labels = jnp.array([[[0, 255]]])
    >>> float(pixel_divisor(schema.Segment(divide_by="labelled"), labels, 3))
    1.0
    """
    if settings.divide_by == "all":
        return jnp.float32(labels_BxHxW.size)
    return jnp.maximum((labels_BxHxW != UNLABELLED).sum().astype(jnp.float32), 1)


def pixel_accuracy(scores_BxHxWxK: jax.Array, labels_BxHxW: jax.Array) -> jax.Array:
    """Sum over images of the share of labelled pixels whose greatest score is their category's.

    >>> float(pixel_accuracy(jnp.array([[[[0, 1], [2, 1.0]]]]), jnp.array([[[1, 1]]])))
    0.5
    """
    labelled = labels_BxHxW != UNLABELLED
    right = (scores_BxHxWxK.argmax(-1) == labels_BxHxW) & labelled
    return (right.sum((1, 2)) / jnp.maximum(labelled.sum((1, 2)), 1)).sum()


def pixel_loss(
    module: ModuleType, dropout_width: Callable[[schema.Segment], int]
) -> Callable[..., tuple[Values, Values, Params]]:
    """The loss of a head of logits per cell, see `segmentation_heads.SegmentationHead`.

    Args:
      module: with `apply`, as `upernet.apply`.
      dropout_width: how many uniform numbers per image it reads.
    """

    def loss(
        settings: schema.Segment,
        params: Params,
        statistics: Params,
        maps: Mapping[int, jax.Array],
        labels_BxHxW: jax.Array,
        keys_B: jax.Array,
    ) -> tuple[Values, Values, Params]:
        width, uniform = dropout_width(settings), None
        if settings.dropout and width:
            uniform = jax.vmap(lambda key: jax.random.uniform(key, (width,)))(keys_B)
        logits, aux, new = module.apply(
            settings, params, statistics, maps, train=True, uniform_BxC=uniform
        )
        size = (labels_BxHxW.shape[1], labels_BxHxW.shape[2])
        full = resize_bilinear(logits, size)
        values = {"pixels": pixel_cross_entropy(full, labels_BxHxW, UNLABELLED)[0]}
        if aux is not None:
            at_full = resize_bilinear(aux, size)
            cost = pixel_cross_entropy(at_full, labels_BxHxW, UNLABELLED)[0]
            values["auxiliary"] = settings.aux_weight * cost
        return values, {"pixel_accuracy": pixel_accuracy(full, labels_BxHxW)}, new

    return loss


def pixel_logits(module: ModuleType) -> Callable[..., jax.Array]:
    """The logits at the size of the images, see `segmentation_heads.SegmentationHead`."""

    def logits(
        settings: schema.Segment,
        params: Params,
        statistics: Params,
        maps: Mapping[int, jax.Array],
        size: tuple[int, int],
    ) -> jax.Array:
        made = module.apply(settings, params, statistics, maps, train=False)[0]
        return resize_bilinear(made, size)

    return logits


upernet_loss = pixel_loss(upernet, upernet.dropout_width)
linear_loss = pixel_loss(linear_head, lambda _: 0)
upernet_logits, linear_logits = pixel_logits(upernet), pixel_logits(linear_head)
