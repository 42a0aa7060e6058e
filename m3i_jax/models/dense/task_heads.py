"""The heads of detection and of semantic segmentation as values, by their names in the settings. A
head has its losses and its inference, and says which maps it reads; no task asks a head by name.

B images, H W their size, M objects, K categories."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.models.dense import (
    dino,
    dino_encoder,
    mask2former,
    mask2former_instances,
    mask2former_task,
    mask_rcnn,
    pixel_heads,
    upernet,
)
from m3i_jax.models.layers import Params

Values = dict[str, tuple[jax.Array, jax.Array]]
Maps = Mapping[int, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionHead:
    """One kind of detection head. `settings` is `dense.detect`; B images, M objects.

    Attributes:
      init: (settings, {stride: channels}, classes, key) to parameters.
      losses: (settings, parameters, {stride: map}, sizes, boxes, classes, masks or None, a key per
        image, frequency_K=images that have each category or None) to (losses, other numbers), each
        {name: (sum, images)}; the arguments are those of `mask_rcnn.losses`.
      divisor: (settings, classes int32 [B, M] of a whole batch, -1 where there is no object) to
        the number that the sums of the losses are divided by, or one for each by its name.
      detect: (settings, parameters, {stride: map}, sizes) to boxes, scores, classes, valid and cut
        as of `mask_rcnn.detect`, and if it predicts masks, masks in the frames of their boxes, or
        mask_logits and mask_stride as of `mask2former_instances.detect`.
      masks: whether it can predict masks, "no", "yes", or "always".
      category_parameters: patterns of the paths of parameters that belong to single categories, as
        of `Task.category_parameters`.
      raw_strides: settings to the strides of an encoder's own maps that it reads as they are;
        None: it reads a feature pyramid of `settings.width` channels at `settings.strides`. An
        encoder whose maps all have one stride always gets a pyramid.
    """

    init: Callable[[schema.Detect, Mapping[int, int], int, jax.Array], Params]
    losses: Callable[..., tuple[Values, Values]]
    divisor: Callable[[schema.Detect, jax.Array], jax.Array | dict[str, jax.Array]]
    detect: Callable[[schema.Detect, Params, Maps, jax.Array], dict[str, jax.Array]]
    masks: str
    category_parameters: tuple[str, ...]
    raw_strides: Callable[[schema.Detect], tuple[int, ...]] | None = None


_DETECTION_HEADS = {
    "mask_rcnn": DetectionHead(
        init=mask_rcnn.init,
        losses=mask_rcnn.losses,
        divisor=lambda settings, classes_BxM: jnp.float32(len(classes_BxM)),
        detect=mask_rcnn.detect,
        masks="yes",
        category_parameters=("^head/box/(classes|deltas)/", "^head/mask/masks/"),
    ),
    "dino": DetectionHead(
        init=dino.init,
        losses=dino.losses,
        divisor=lambda settings, classes_BxM: dino.object_divisor(classes_BxM),
        detect=dino.detect,
        masks="no",
        category_parameters=("^head/labels$", "^head/.*heads/(layers/)?classes/"),
        raw_strides=dino_encoder.levels_read,
    ),
    "mask2former": DetectionHead(
        init=mask2former_instances.init,
        losses=mask2former_instances.losses,
        divisor=mask2former_instances.instance_divisors,
        detect=mask2former_instances.detect,
        masks="always",
        category_parameters=("^head/decoder/classes/",),
        raw_strides=lambda settings: settings.strides,
    ),
}


CATEGORY_PARAMETERS = tuple(
    p for head in _DETECTION_HEADS.values() for p in head.category_parameters
)


def detection_head(settings: schema.Detect) -> DetectionHead:
    """Returns the head that the settings name.

    Raises:
      UserError: masks are asked of a head that has none, or no masks of one that needs them.

    >>> detection_head(schema.Detect(head="dino", masks=False)).masks
    'no'
    """
    head = _DETECTION_HEADS[settings.head]
    if not settings.masks and head.masks == "always":
        raise UserError(
            f"config.dense.detect.masks: the head {settings.head} learns boxes from masks alone;"
            " set dense.detect.masks=true"
        )
    if settings.masks and head.masks == "no":
        raise UserError(
            f"config.dense.detect.masks: the head {settings.head} predicts boxes without masks; set"
            " dense.detect.masks=false"
        )
    return head


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationHead:
    """The interface of a head of segmentation.

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
      averaged: whether `logits` are scores that its authors average over views of an image as they
        are; else their softmax is (see `dense.segment.test_average`).
    """

    init: Callable[..., tuple[Params, Params]]
    loss: Callable[..., tuple[dict[str, jax.Array], dict[str, jax.Array], Params]]
    divisor: Callable[..., jax.Array | dict[str, jax.Array]]
    logits: Callable[..., jax.Array]
    plain_pyramid: str = "rescale"
    coarsest: bool = False
    averaged: bool = False


_SEGMENTATION_HEADS = {
    "upernet": SegmentationHead(
        init=upernet.init,
        loss=pixel_heads.upernet_loss,
        divisor=pixel_heads.pixel_divisor,
        logits=pixel_heads.upernet_logits,
    ),
    "linear": SegmentationHead(
        init=pixel_heads.init_linear_classifier,
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
    """Returns the head that the settings name.

    >>> segmentation_head(schema.Segment(head="linear")).coarsest
    True
    """
    return _SEGMENTATION_HEADS[settings.head]
