"""Segmentation heads that classify every pixel: logits per cell, resized to the image, and softmax
cross-entropy. UperNet and the linear head are such. The linear head is one linear layer on every
cell of the coarsest map, for a quick answer about what an encoder's features hold.

B images, H W their size, C channels, K categories."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.models.dense import upernet
from m3i_jax.models.dense.map_sampling import resize_bilinear
from m3i_jax.models.initializers import fill
from m3i_jax.models.intern_image_layer import dense_layer
from m3i_jax.models.layers import Params
from m3i_jax.objective.dense_losses import pixel_cross_entropy

UNLABELLED = 255
Values = dict[str, jax.Array]


def init_linear_classifier(
    settings: schema.Segment, channels: Mapping[int, int], classes: int, rng: jax.Array
) -> tuple[Params, Params]:
    """Returns parameters, N(0, classifier_std^2) with bias 0; there are no statistics. Arguments as
    of `upernet.init`.

    >>> params, statistics = init_linear_classifier(schema.Segment(), {16: 8}, 5, jax.random.key(0))
    >>> params["classifier"]["kernel"].shape, statistics
    ((8, 5), {})
    """
    shapes = {"classifier": {"kernel": (channels[max(channels)], classes), "bias": (classes,)}}
    std = settings.classifier_std
    return fill(rng, shapes, lambda path, _: ("normal", std * path.endswith("kernel"))), {}


def linear_cell_logits(
    settings: schema.Segment,
    params: Params,
    statistics: Params,
    maps: Mapping[int, jax.Array],
    *,
    train: bool,
    uniform_BxC: jax.Array | None = None,
) -> tuple[jax.Array, None, Params]:
    """Returns logits [B, H, W, K] of the cells of the coarsest map, float32; no auxiliary ones; the
    statistics as they are. Arguments as of `upernet.apply`.

    >>> settings = schema.Segment()
    >>> params, _ = init_linear_classifier(settings, {16: 8}, 5, jax.random.key(0))
    >>> maps = {8: jnp.zeros((1, 6, 4, 2)), 16: jnp.zeros((1, 3, 2, 8))}
    >>> linear_cell_logits(settings, params, {}, maps, train=False)[0].shape
    (1, 3, 2, 5)
    """
    return dense_layer(params["classifier"], maps[max(maps)], jnp.float32), None, statistics


def pixel_divisor(settings: schema.Segment, labels_BxHxW: jax.Array, classes: int) -> jax.Array:
    """Returns what the sums of both losses are divided by: all pixels or the labelled ones, by
    `divide_by`.

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
    apply: Callable[..., Any], dropout_width: Callable[[schema.Segment], int]
) -> Callable[..., tuple[Values, Values, Params]]:
    """Returns the loss of a head of logits per cell, see `task_heads.SegmentationHead`.

    Args:
      apply: of the head, as `upernet.apply`.
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
            uniform = jax.vmap(lambda key: jax.random.uniform(key, (width,), jnp.float32))(keys_B)
        logits, aux, new = apply(
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


def pixel_logits(apply: Callable[..., Any]) -> Callable[..., jax.Array]:
    """Returns the logits at the size of the images, see `task_heads.SegmentationHead`."""

    def logits(
        settings: schema.Segment,
        params: Params,
        statistics: Params,
        maps: Mapping[int, jax.Array],
        size: tuple[int, int],
    ) -> jax.Array:
        made = apply(settings, params, statistics, maps, train=False)[0]
        return resize_bilinear(made, size)

    return logits


upernet_loss = pixel_loss(upernet.apply, upernet.dropout_width)
linear_loss = pixel_loss(linear_cell_logits, lambda _: 0)
upernet_logits = pixel_logits(upernet.apply)
linear_logits = pixel_logits(linear_cell_logits)
