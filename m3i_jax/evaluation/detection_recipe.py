"""What the recipes of detection on published data sets share: encoder, data and, by the name of the
head, its published settings.

A head is a function that sets maps, augmentation, head and optimizer, listed in HEADS. Each recipe
of configs/transfer gives a `DetectionData`, which has a `Schedule` for every head that it offers.
[R] marks values of the public reference, [P] of the paper, [C] choices of this project."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from m3i_jax.config import default_config
from m3i_jax.errors import UserError
from m3i_jax.evaluation.dense_encoder import (
    WINDOW,
    build_dense_encoder,
    continue_dense_run,
    global_blocks,
)


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


def _vitdet(config: ml_collections.ConfigDict, schedule: Schedule, *, vit: bool) -> None:
    """Maps of a ViT, augmentation and schedule as in detectron2's project ViTDet, for a ViT-B."""
    if vit:
        config.dense.maps.update(
            {
                "window": WINDOW,  # [R]
                "global_blocks": global_blocks(config.model.encoder.depth),  # [R]
                "relative": "decomposed",  # [R]
            }
        )
        config.model.encoder.final_norm = False  # [R]
        config.model.encoder.drop_path = 0.1  # [R]
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
    """ViTDet's Mask R-CNN as in detectron2's project of that name, for a ViT-B. A ViT-L there takes
    layer decay 0.8 and drop path 0.4."""
    _vitdet(config, schedule, vit=vit)
    config.optim.weight_decay = 0.1  # [R]
    config.optim.decayed = "but_norms"  # [R]
    config.optim.layer_decay = 0.7  # [R]
    config.optim.clip = 0.0  # [R]


def _dino(config: ml_collections.ConfigDict, schedule: Schedule, *, vit: bool) -> None:
    """DINO with four levels, and boxes without masks: on a ViT as in detrex (IDEA), on an
    InternImage as in its own repository. The images are those of ViTDet [C], squares of one size;
    the references resize them to many."""
    _vitdet(config, schedule, vit=vit)
    config.dense.detect.update(
        {
            "head": "dino",
            "masks": False,
            "strides": (8, 16, 32, 64),  # [R]; the last is made by the head
            "score_threshold": 0.0,  # [R]
            "detections": 300,  # [R]
        }
    )
    config.dense.detect.dino.remat = True
    config.optim.weight_decay = 1e-4  # [R]
    config.optim.clip = 0.1  # [R]
    if vit:
        config.optim.encoder_lr = 0.1  # [R]
        config.optim.layer_decay = 1.0  # [R]
        config.optim.decayed = "but_norms"
        return
    config.dense.detect.dino.update(
        {
            "shared_heads": False,
            "projection_bias": False,
            "box_noise": 1.0,
            "denoising": 1000 if _is_large(config) else 100,
        }  # [R]
    )
    config.optim.layer_decay = 0.94 if _is_large(config) else 0.9  # [R]
    config.optim.decayed = "ranks"  # [R]
    config.optim.warmup_steps = min(500, config.train.steps)  # [R]


def _is_large(config: ml_collections.ConfigDict) -> bool:
    """Whether the encoder is an InternImage-H, whose published settings differ."""
    return bool(config.model.intern_image.width >= 320)


def _mask2former(config: ml_collections.ConfigDict, schedule: Schedule, *, vit: bool) -> None:
    """Mask2Former for instances as its authors train it on COCO with a ResNet-50."""
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
    config.optim.warmup_steps = min(10, config.train.steps)  # [R]
    config.optim.decayed = "but_norms"  # [R]
    config.optim.encoder_lr = 0.1  # [R]
    config.optim.layer_decay = 1.0  # [R]


# Canvases of DINO's multi-scale training: short sides as in the references, and long sides of 5 : 3
# up to the limit, so that few pixels are padding [C]. The references resize every image by itself.
BUCKETS = (480, 800, 576, 960, 672, 1120, 800, 1344)
LARGE_BUCKETS = (
    608,
    1024,
    1024,
    1728,
    1408,
    2016,
    1792,
    2016,
)  # InternImage-H: 600 to 1,800, 2,000


def _resize_to_buckets(config: ml_collections.ConfigDict) -> None:
    """Images of several static sizes, windows of half of them but for InternImage-H, and evaluation
    with the published limits of both sides."""
    large = _is_large(config)
    config.dense.geometry.update(
        {
            "rule": "buckets",
            "buckets": LARGE_BUCKETS if large else BUCKETS,
            "crop_p": 0.0 if large else 0.5,  # [R]
            "test_short": 1000 if large else 800,  # [R]
        }
    )
    config.data.image_size = 2016 if large else 1344  # [R], rounded up to a multiple of 32


# Other detectors are added here, and a Schedule of theirs to the recipes of the data sets.
HEADS: dict[str, Callable[..., None]] = {
    "mask_rcnn": _mask_rcnn,
    "dino": _dino,
    "mask2former": _mask2former,
}


def build_detection(
    data: DetectionData,
    *,
    path: str,
    from_: str,
    model: str,
    head: str,
    epochs: float,
    batch_size: int,
    image_size: int,
    multi_scale: bool = False,
) -> ml_collections.ConfigDict:
    """Settings of a run of detection on a published data set.

    Args:
      data: the data set.
      path: directory of the images and annotations.
      from_: working directory of a run, or a weights file; "": train from scratch. Of a run of
        detection, pyramid and head are taken, too.
      model: preset, used without `from_`.
      head: name of HEADS.
      epochs: passes over the images; 0: those of the published run.
      batch_size: images per step; 0: as published.
      image_size: side of the square that images are fitted into.
      multi_scale: train on the canvases of BUCKETS instead, with an InternImage.

    Raises:
      UserError: the recipe has no schedule for this head; or as of `build_dense_encoder`.
    """
    if head not in HEADS or head not in data.schedules:
        raise UserError(f"{data.recipe}: head={head} is none of {', '.join(data.schedules)}")
    schedule = data.schedules[head]
    batch_size, epochs = batch_size or schedule.batch, epochs or schedule.epochs
    config, flag = default_config(), f"{data.recipe}:from"
    config.task = "detect"
    vit = build_dense_encoder(config, from_=from_, model=model, image_size=image_size, flag=flag)

    config.data.source = "coco"
    config.data.path = path
    config.data.classes, config.data.size = data.classes, data.images
    config.data.annotations, config.data.holdout_annotations = data.annotations
    config.data.threads = 8
    config.dense.geometry.max_objects = data.max_objects
    config.train.batch_size = batch_size
    config.train.epochs = epochs
    config.train.steps = round(
        schedule.steps * epochs / schedule.epochs * schedule.batch / batch_size
    )
    config.train.eval_every = data.eval_every
    config.evaluate.batch_size = batch_size
    config.evaluate.query_limit = data.eval_images
    config.dense.update_from_flattened_dict(data.settings)
    HEADS[head](config, schedule, vit=vit)
    if multi_scale:
        _resize_to_buckets(config)
    continue_dense_run(config, from_=from_, flag=flag)
    return config
