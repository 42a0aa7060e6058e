"""The heads of detection and of semantic segmentation as values, by their names in the settings. A
head has its losses and its inference, and says which maps it reads; no task asks a head by name.
Another package adds its own in the configuration file of its runs, or in a module that the file
imports:

    task_heads.register_segmentation_head("my_head", SegmentationHead(init=..., loss=..., ...))

and `dense.segment.head=my_head` trains it on the maps of any encoder.

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
from m3i_jax.registries import Registry, not_one_of

Values = dict[str, tuple[jax.Array, jax.Array]]
Maps = Mapping[int, jax.Array]
_IMPORT = "import the module that registers it"
_MASK2FORMER = tuple(
    f"mask2former.{name}"
    for name in (
        "queries",
        "heads",
        "sampled",
        "encoder_depth",
        "encoder_hidden",
        "depth",
        "hidden",
    )
)


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
      shape_settings: keys of `settings` that the shapes of pyramid and head, and what they mean,
        depend on; a run that goes on from another takes them from it.
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
    shape_settings: tuple[str, ...] = ("strides", "width")
    raw_strides: Callable[[schema.Detect], tuple[int, ...]] | None = None


def _refusal(key: str) -> Callable[[str, list[str]], UserError]:
    """The error for a head that does not exist, of the setting that names it."""
    return lambda name, names: UserError(f"{key}: {not_one_of(repr(name), names, _IMPORT)}")


DETECTION_HEADS: Registry[DetectionHead] = Registry(
    "detection head",
    choices=schema.DETECTION_HEADS,
    replace=True,
    unknown=_refusal("config.dense.detect.head"),
)
DETECTION_HEADS.register(
    "mask_rcnn",
    DetectionHead(
        init=mask_rcnn.init,
        losses=mask_rcnn.losses,
        divisor=lambda settings, classes_BxM: jnp.float32(len(classes_BxM)),
        detect=mask_rcnn.detect,
        masks="yes",
        category_parameters=("^head/box/(classes|deltas)/", "^head/mask/masks/"),
        shape_settings=(
            *("strides", "anchor_sizes", "anchor_ratios", "canonical", "width"),
            *("rpn_convs", "box_convs", "box_hidden", "mask_convs"),
        ),
    ),
)
DETECTION_HEADS.register(
    "dino",
    DetectionHead(
        init=dino.init,
        losses=dino.losses,
        divisor=lambda settings, classes_BxM: dino.object_divisor(classes_BxM),
        detect=dino.detect,
        masks="no",
        category_parameters=("^head/labels$", "^head/.*heads/(layers/)?classes/"),
        shape_settings=(
            *("strides", "width", "dino.queries", "dino.heads", "dino.sampled"),
            *("dino.encoder_depth", "dino.depth", "dino.hidden"),
            *("dino.shared_heads", "dino.projection_bias"),
        ),
        raw_strides=dino_encoder.levels_read,
    ),
)
DETECTION_HEADS.register(
    "mask2former",
    DetectionHead(
        init=mask2former_instances.init,
        losses=mask2former_instances.losses,
        divisor=mask2former_instances.instance_divisors,
        detect=mask2former_instances.detect,
        masks="always",
        category_parameters=("^head/decoder/classes/",),
        shape_settings=("strides", "width", *_MASK2FORMER),
        raw_strides=lambda settings: settings.strides,
    ),
)


def register_detection_head(name: str, head: DetectionHead) -> DetectionHead:
    """Make a head known as a value of `dense.detect.head`. It reads the settings of `dense.detect`
    that it shares with others.

    Registering a name from outside again replaces its head, so that a module can be reloaded.

    Raises:
      ValueError: the name is that of a head of this package, or has other characters than letters,
        digits and underscores.

    >>> boxes = dataclasses.replace(DETECTION_HEADS["mask_rcnn"], masks="no")
    >>> with DETECTION_HEADS.temporary():
    ...     _ = register_detection_head("faster_rcnn", boxes)
    ...     detection_head(schema.Detect(head="faster_rcnn", masks=False)).masks
    'no'
    """
    return DETECTION_HEADS.register(name, head)


def detection_head(settings: schema.Detect) -> DetectionHead:
    """Returns the head that the settings name.

    Raises:
      UserError: there is no such head; masks are asked of one that has none, or no masks of one
        that needs them.

    >>> detection_head(schema.Detect(head="dino", masks=False)).masks
    'no'
    """
    head = DETECTION_HEADS[settings.head]
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
      category_parameters, shape_settings: as of `DetectionHead`.
      plain_pyramid: the pyramid that makes maps for it from those of a plain ViT.
      coarsest: whether it reads the coarsest map of the encoder only.
      averaged: whether `logits` are scores that its authors average over views of an image as they
        are; else their softmax is (see `dense.segment.test_average`).
    """

    init: Callable[..., tuple[Params, Params]]
    loss: Callable[..., tuple[dict[str, jax.Array], dict[str, jax.Array], Params]]
    divisor: Callable[..., jax.Array | dict[str, jax.Array]]
    logits: Callable[..., jax.Array]
    category_parameters: tuple[str, ...] = ("^head/classifier/",)
    shape_settings: tuple[str, ...] = ("strides", "width")
    plain_pyramid: str = "rescale"
    coarsest: bool = False
    averaged: bool = False


SEGMENTATION_HEADS: Registry[SegmentationHead] = Registry(
    "segmentation head",
    choices=schema.SEGMENTATION_HEADS,
    replace=True,
    unknown=_refusal("config.dense.segment.head"),
)
SEGMENTATION_HEADS.register(
    "upernet",
    SegmentationHead(
        init=upernet.init,
        loss=pixel_heads.upernet_loss,
        divisor=pixel_heads.pixel_divisor,
        logits=pixel_heads.upernet_logits,
        category_parameters=("^head/(aux_)?classifier/",),
        shape_settings=("strides", "width", "pool_scales", "aux_width"),
    ),
)
SEGMENTATION_HEADS.register(
    "linear",
    SegmentationHead(
        init=pixel_heads.init_linear_classifier,
        loss=pixel_heads.linear_loss,
        divisor=pixel_heads.pixel_divisor,
        logits=pixel_heads.linear_logits,
        coarsest=True,
    ),
)
SEGMENTATION_HEADS.register(
    "mask2former",
    SegmentationHead(
        init=mask2former.init,
        loss=mask2former_task.mask2former_loss,
        divisor=mask2former_task.mask_divisors,
        logits=mask2former_task.mask2former_logits,
        category_parameters=("^head/decoder/classes/",),
        shape_settings=("strides", "width", *_MASK2FORMER),
        plain_pyramid="simple",
        averaged=True,
    ),
)


def register_segmentation_head(name: str, head: SegmentationHead) -> SegmentationHead:
    """Make a head known as a value of `dense.segment.head`, as `register_detection_head` does.

    Raises:
      ValueError: as of `register_detection_head`.

    >>> averaged = dataclasses.replace(SEGMENTATION_HEADS["linear"], averaged=True)
    >>> with SEGMENTATION_HEADS.temporary():
    ...     _ = register_segmentation_head("linear_averaged", averaged)
    ...     segmentation_head(schema.Segment(head="linear_averaged")).averaged
    True
    """
    return SEGMENTATION_HEADS.register(name, head)


def segmentation_head(settings: schema.Segment) -> SegmentationHead:
    """Returns the head that the settings name.

    Raises:
      UserError: there is no such head.

    >>> segmentation_head(schema.Segment(head="linear")).coarsest
    True
    """
    return SEGMENTATION_HEADS[settings.head]
