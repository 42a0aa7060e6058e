"""Settings of detectors and segmenters as published: maps of plain ViTs, and in `HEADS` a function
for each kind of detection head that sets maps, augmentation, head and optimizer.

Each recipe of configs/transfer gives a `DetectionData`, which has a `Schedule` for every head that
it offers. What belongs to an encoder is in its `Backbone`. [R] marks values of the public
reference, [P] of the paper, [C] choices of this project."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from m3i_jax.models import backbones
from m3i_jax.models.transfer import DenseRates

WINDOW = 14  # side of ViTDet's windows in patches
# Canvases of DINO's multi-scale training: short sides as in the references, and long sides of 5 : 3
# up to the limit, so that few pixels are padding [C]. The references resize every image by itself.
BUCKETS = (480, 800, 576, 960, 672, 1120, 800, 1344)
LARGE_BUCKETS = (608, 1024, 1024, 1728, 1408, 2016, 1792, 2016)  # InternImage-H: 600 to 1,800


def global_blocks(depth: int) -> tuple[int, ...]:
    """Returns the last block of each quarter of a ViT, as in ViTDet; of each half of one of fewer
    than eight blocks.

    >>> global_blocks(12), global_blocks(4)
    ((2, 5, 8, 11), (1, 3))
    """
    parts = 4 if depth >= 8 else min(2, depth)
    return tuple(depth * (i + 1) // parts - 1 for i in range(parts))


def map_blocks(depth: int, parts: int = 4) -> tuple[int, ...]:
    """Returns the blocks whose outputs are the maps of mmsegmentation's ViT: 3, 5, 7, 11 of 12;
    else the last of equal parts, as far as there are enough.

    >>> map_blocks(12), map_blocks(24), map_blocks(4), map_blocks(2)
    ((3, 5, 7, 11), (7, 11, 15, 23), (0, 1, 2, 3), ())
    """
    if depth < parts:
        return ()
    if depth % 12 == 0 and parts == 4:
        unit = depth // 12
        return (4 * unit - 1, 6 * unit - 1, 8 * unit - 1, 12 * unit - 1)
    return tuple(depth * (i + 1) // parts - 1 for i in range(parts))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Length and learning rate of a published run.

    Attributes:
      steps, epochs, batch: of the published run; other numbers of epochs and batch sizes are scaled
        from it, so that as many images are seen per epoch.
      milestones: steps at which the learning rate falls to a tenth, and again.
      lr: peak learning rate at this batch.
    """

    steps: int
    epochs: float
    batch: int
    milestones: tuple[int, ...]
    lr: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionData:
    """A data set in COCO's form.

    Attributes:
      recipe: path of the recipe, for messages.
      classes: number of categories.
      images: of training, for modes that do not open the data.
      annotations: files for training and evaluation, below the directory of the images.
      max_objects: objects per image of a batch.
      eval_every: steps between evaluations.
      eval_images: images of an evaluation, at most.
      schedules: by the name of the head.
      settings: `dense.*` settings of the data set for all heads, such as repeats of images.
      large_buckets: canvases of multi-scale training of an InternImage-H.
    """

    recipe: str
    classes: int
    images: int
    annotations: tuple[str, str]
    max_objects: int
    eval_every: int
    eval_images: int
    schedules: Mapping[str, Schedule]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    large_buckets: tuple[int, ...] = LARGE_BUCKETS


def set_dense_rates(config: ml_collections.ConfigDict) -> DenseRates | None:
    """Set drop path and the settings that the encoder has for dense tasks by its own authors,
    whatever its classifiers have.

    Args:
      config: changed in place.

    Returns:
      the published rates of its size; None for an encoder without any, such as a ViT, whose
      settings are ViTDet's.

    >>> from m3i_jax.config import default_config
    >>> config = default_config(); config.model.backbone = "intern_image"
    >>> set_dense_rates(config).drop_path, config.optim.offset_lr  # of H
    (0.5, 1.0)
    """
    backbone = backbones.get_backbone(config.model)
    config.update_from_flattened_dict(backbone.dense_settings)
    rates = backbone.dense_rates(config.model)
    if rates is not None:
        config.model.encoder.drop_path = rates.drop_path
        config.model.encoder.drop_path_rule = "linear"
    return rates


def _vit_rates(config: ml_collections.ConfigDict) -> tuple[float, float, str]:
    """(layer decay, drop path, what decays) of a ViT in ViTDet on COCO: of B, L and H by the number
    of blocks [R]."""
    depth = backbones.get_backbone(config.model).depth(config.model)
    if depth >= 32:
        return 0.9, 0.5, "all"
    return (0.8, 0.4, "but_norms") if depth >= 24 else (0.7, 0.1, "but_norms")


def _vitdet(config: ml_collections.ConfigDict, schedule: Schedule, *, vit: bool) -> None:
    """Maps of a ViT, augmentation and schedule as in detectron2's project ViTDet."""
    if vit:
        config.dense.maps.update(
            {
                "window": WINDOW,  # [R]
                "global_blocks": global_blocks(
                    backbones.get_backbone(config.model).depth(config.model)
                ),  # [R]
                "relative": "decomposed",  # [R]
            }
        )
        config.model.encoder.final_norm = False  # [R]
        config.model.encoder.drop_path = _vit_rates(config)[1]  # [R]
        config.model.encoder.drop_path_rule = "linear"
    # Compiled for a v5e chip, a ViT-B at 1,024 pixels keeps all values of up to two images;
    # remat=names halves the memory of a step and moves more of it (tests/bench/README.md).
    config.model.remat = "none" if vit else "full"
    config.dense.geometry.update({"rule": "jitter", "scale": (0.1, 2.0), "flip_p": 0.5})  # [R]
    config.optim.lr = schedule.lr * config.train.batch_size / schedule.batch  # [R]; linear [C]
    config.optim.schedule = "steps"
    config.optim.milestones = tuple(step / schedule.steps for step in schedule.milestones)
    config.optim.warmup_steps = min(250, config.train.steps)  # [R]
    config.optim.warmup_start = 0.001  # [R]
    config.optim.b2 = 0.999  # [R]


def _mask_rcnn(config: ml_collections.ConfigDict, schedule: Schedule, *, vit: bool) -> None:
    """ViTDet's Mask R-CNN as in detectron2's project of that name. On an InternImage, decays and
    drop path are those of its repository, images, schedule, pyramid and head those of ViTDet [C].
    """
    _vitdet(config, schedule, vit=vit)
    config.optim.clip = 0.0  # [R]
    if rates := set_dense_rates(config):
        config.optim.weight_decay = 0.05  # [R]
        config.optim.decayed = "ranks"  # [R]
        config.optim.layer_decay = rates.boxes  # [R]
        return
    config.optim.weight_decay = 0.1  # [R]
    decay, _, decayed = _vit_rates(config)
    config.optim.decayed = decayed if vit else "but_norms"  # [R]
    config.optim.layer_decay = decay if vit else 1.0  # [R]


def _dino(config: ml_collections.ConfigDict, schedule: Schedule, *, vit: bool) -> None:
    """DINO with four levels, and boxes without masks: on a ViT pyramid and schedule of detrex, and
    the head of DINO's authors (in detrex a box noise of 1.0, heads for every layer and positions of
    temperature 10,000), on an InternImage as in its own repository. The images are those of ViTDet
    [C], squares of one size; the references resize them to many. Left out: detrex's tenth of the
    rate for the pyramid, and InternImage's layer decay for the embeddings of levels."""
    _vitdet(config, schedule, vit=vit)
    config.dense.detect.update(
        {
            "head": "dino",
            "masks": False,
            "strides": (8, 16, 32, 64),  # [R]; on an InternImage the head makes the last
            "score_threshold": 0.0,  # [R]
            "detections": 300,  # [R]; InternImage-T: 100
        }
    )
    config.dense.detect.dino.remat = True
    config.optim.weight_decay = 1e-4  # [R]
    config.optim.clip = 0.1  # [R]
    if vit:
        config.optim.encoder_lr = 0.1  # [R]
        config.optim.layer_decay = 1.0  # [R]
        config.optim.decayed = "but_norms"  # [C]; detrex decays the position table, too
        if backbones.get_backbone(config.model).depth(config.model) >= 24:
            config.optim.milestones = (0.8,)  # [R]; and warm-up as in ViTDet
        else:
            config.optim.warmup_steps = 0  # [R]
        return
    rates = set_dense_rates(config)
    large = rates is not None and rates.large
    config.dense.detect.dino.update(
        {
            "shared_heads": False,
            "projection_bias": False,
            "box_noise": 1.0,
            "denoising": 1000 if large else 100,
        }  # [R]
    )
    # [R]; in the files for two composed copies it is stated and has no effect on the encoder: it
    # goes by names that the copies do not have
    config.optim.layer_decay = rates.queries if rates else 0.9
    config.optim.decayed = "ranks"  # [R]
    config.optim.head_offset_lr = 1e-3 if large else 1.0  # [R]
    config.optim.warmup_steps = min(500, config.train.steps)  # [R]
    if large:  # [R] of COCO and LVIS: after the warm-up the rate stays; of other data [C]
        config.optim.schedule, config.optim.milestones = "constant", ()


def _mask2former(config: ml_collections.ConfigDict, schedule: Schedule, *, vit: bool) -> None:
    """Mask2Former for instances as its authors train it on COCO with a ResNet-50. They evaluate
    images of up to 800 x 1,333 pixels, here they fit the square of the training [C]."""
    _vitdet(config, schedule, vit=vit)
    config.dense.detect.update(
        {
            "head": "mask2former",
            "strides": (4, 8, 16, 32),  # [R]
            "score_threshold": 0.0,  # [R]
        }
    )
    config.dense.detect.mask2former.remat = True
    config.optim.weight_decay = 0.05  # [R]
    config.optim.clip = 0.01  # [R]
    config.optim.warmup_steps = 0  # [R]: its warm-up starts at the full rate
    config.optim.decayed = "but_norms"  # [R]
    set_dense_rates(config)
    config.optim.encoder_lr = 0.1  # [R]
    config.optim.layer_decay = 1.0  # [R]


def resize_to_buckets(config: ml_collections.ConfigDict, large_buckets: tuple[int, ...]) -> None:
    """Images of several static sizes, windows of half of them but for InternImage-H, and evaluation
    with the published limits of both sides."""
    rates = backbones.get_backbone(config.model).dense_rates(config.model)
    large = rates is not None and rates.large
    config.dense.geometry.update(
        {
            "rule": "buckets",
            "buckets": large_buckets if large else BUCKETS,
            "crop_p": 0.0 if large else 0.5,  # [R]
            "test_short": 1000 if large else 800,  # [R]
        }
    )
    config.data.image_size = 2016 if large else 1344  # [R], rounded up to a multiple of 32


# Those of other detectors are added here, and a Schedule of theirs to the recipes of data sets.
HEADS: dict[str, Callable[..., None]] = {
    "mask_rcnn": _mask_rcnn,
    "dino": _dino,
    "mask2former": _mask2former,
}
