"""The heads of semantic segmentation as values, by the name in the settings: a head has its losses
and its inference, and says which maps it reads, so that the task asks no head by name.

B images, H W their size, K categories."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from m3i_jax import schema
from m3i_jax.models.dense import linear_head, mask2former, mask2former_task, pixel_heads, upernet
from m3i_jax.models.layers import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationHead:
    """What the task of segmentation needs of a head.

    Attributes:
      init: (settings, channels {stride: C}, classes, rng) -> (parameters, running statistics).
      loss: (settings, params, statistics, maps {stride: [B, h, w, C]}, labels int32 [B, H, W], a
        random key per image) -> (losses with their weights, each a sum; other values, each a sum
        over images; new statistics). Keys belong to the loss alone.
      divisor: (settings, labels, classes) -> what the losses are divided by, of the whole batch: a
        number, or one for each by its name. It depends on the labels alone, so that the parts of a
        batch add up to the whole.
      logits: (settings, params, statistics, maps, size) -> [B, H, W, K], whose greatest entry is
        the category.
      plain_pyramid: the pyramid that makes maps for it from those of a plain ViT.
      coarsest: whether it reads the coarsest map of the encoder only.
      averaged: whether `logits` are scores that are averaged over views of an image as they are;
        else their softmax is.
    """

    init: Callable[..., tuple[Params, Params]]
    loss: Callable[..., tuple[dict[str, jax.Array], dict[str, jax.Array], Params]]
    divisor: Callable[..., jax.Array | dict[str, jax.Array]]
    logits: Callable[..., jax.Array]
    plain_pyramid: str = "rescale"
    coarsest: bool = False
    averaged: bool = False


_HEADS = {
    "upernet": SegmentationHead(
        init=upernet.init,
        loss=pixel_heads.upernet_loss,
        divisor=pixel_heads.pixel_divisor,
        logits=pixel_heads.upernet_logits,
    ),
    "linear": SegmentationHead(
        init=linear_head.init,
        loss=pixel_heads.linear_loss,
        divisor=pixel_heads.pixel_divisor,
        logits=pixel_heads.linear_logits,
        coarsest=True,
    ),
    "mask2former": SegmentationHead(
        init=mask2former.init,
        loss=mask2former_task.mask2former_loss,
        divisor=mask2former_task.mask_divisors,
        logits=mask2former_task.mask2former_logits,
        plain_pyramid="simple",
        averaged=True,
    ),
}


def segmentation_head(settings: schema.Segment) -> SegmentationHead:
    """The head that the settings name.

    >>> segmentation_head(schema.Segment(head="linear")).coarsest
    True
    """
    return _HEADS[settings.head]


def init(
    settings: schema.Segment, channels: Mapping[int, int], classes: int, rng: jax.Array
) -> tuple[Any, Any]:
    """Parameters and running statistics of the head; see `upernet.init`.

    >>> params, _ = init(schema.Segment(head="linear"), {16: 8}, 5, jax.random.key(0))
    >>> sorted(params)
    ['classifier']
    """
    return segmentation_head(settings).init(settings, channels, classes, rng)
