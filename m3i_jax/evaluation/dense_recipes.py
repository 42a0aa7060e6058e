"""Settings that the recipes of dense tasks share: encoder, weights and maps; the heads of another
run to go on from; and for detection the data set and the published settings of a head, by its name.

In `HEADS`, a head is a function that sets maps, augmentation, head and optimizer. Each recipe
of configs/transfer gives a `DetectionData`, which has a `Schedule` for every head that it offers.
[R] marks values of the public reference, [P] of the paper, [C] choices of this project."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from m3i_jax.config import default_config
from m3i_jax.errors import UserError
from m3i_jax.evaluation.load import build_encoder, settings_of_weights
from m3i_jax.interop import dense_weights, published_dense, tensor_files
from m3i_jax.models import backbones, presets
from m3i_jax.training import checkpoint_dir

WINDOW = 14  # side of ViTDet's windows in patches
# Canvases of DINO's multi-scale training: short sides as in the references, and long sides of 5 : 3
# up to the limit, so that few pixels are padding [C]. The references resize every image by itself.
BUCKETS = (480, 800, 576, 960, 672, 1120, 800, 1344)
LARGE_BUCKETS = (608, 1024, 1024, 1728, 1408, 2016, 1792, 2016)  # InternImage-H: 600 to 1,800
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
# settings that the shapes of pyramid and head, and what they mean, depend on
HEAD_SETTINGS = {
    "detect": (
        "strides",
        "anchor_sizes",
        "anchor_ratios",
        "canonical",
        "width",
        "rpn_convs",
        "box_convs",
        "box_hidden",
        "mask_convs",
        "dino.queries",
        "dino.heads",
        "dino.sampled",
        "dino.encoder_depth",
        "dino.depth",
        "dino.hidden",
        "dino.shared_heads",
        "dino.projection_bias",
        *_MASK2FORMER,
    ),
    "segment": ("head", "strides", "width", "pool_scales", "aux_width", *_MASK2FORMER),
}


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


def build_dense_encoder(
    config: ml_collections.ConfigDict,
    *,
    from_: str,
    model: str,
    image_size: int,
    flag: str,
) -> bool:
    """Set model, image size, preprocessing and `init_from` of a dense run.

    Args:
      config: changed in place.
      from_: working directory of a run, or a file of weights; "" to train from scratch.
      model: preset, used without `from_`.
      image_size: side of the images of this run in pixels.
      flag: names `from_` in messages.

    Returns:
      whether the encoder is a plain ViT, of which a recipe sets `dense.maps`.
    """
    pretrained = image_size
    if from_:
        source = build_encoder(config, from_, flag)
        # of a dense run, the images to which its position table belongs
        pretrained = source.dense.maps.image_size or source.data.image_size
    else:
        config.model.update(presets.preset(model))
    vit = config.model.backbone == "vit"
    if vit:
        config.dense.maps.image_size = pretrained
        config.model.encoder.position_grid = 0
        config.model.scan = config.model.encoder.depth >= 12  # else compile time grows with depth
    config.model.encoder.freeze_patch_embed = False
    config.data.image_size = image_size
    config.data.captions = "no"
    config.train.panel_every = 1000
    config.evaluate.knn = False
    return vit and backbones.get_backbone(config.model).stages is not None


def continue_dense_run(config: ml_collections.ConfigDict, *, from_: str, flag: str) -> bool:
    """Start from pyramid and head, too, if `from_` has those of the same task and kind of head: a
    run that was trained on other data before, such as Objects365 before COCO, or a file of
    detectron2 with a Mask R-CNN, or one of InternImage with DINO, UperNet or Mask2Former. Their
    sizes and the maps are then those of the source. Layers of categories restart if the names of
    the categories differ, with a line in the log; running statistics of batch norms start anew.

    Args:
      config: changed in place, after all other settings of a recipe.
      from_, flag: as of `build_dense_encoder`.

    Returns:
      whether it has them.
    """
    if not from_:
        return False
    if not checkpoint_dir.is_run(from_):
        table = tensor_files.read_tensors(from_)
        found = (
            "detect" if dense_weights.has_mask_rcnn(table) else published_dense.dense_task(table)
        )
        if found != config.task:
            return False
    source = settings_of_weights(from_, flag)
    if source.task != config.task:
        return False
    if source.dense[config.task].head != config.dense[config.task].head:
        return False
    config.dense.maps.update(source.dense.maps)
    if config.model.backbone == "vit":
        config.dense.maps.image_size = source.dense.maps.image_size or source.data.image_size
    ours, theirs = config.dense[config.task], source.dense[config.task]
    for name in HEAD_SETTINGS[config.task]:
        section, _, field = name.rpartition(".")
        if section:
            ours[section][field] = theirs[section][field]
        else:
            ours[name] = theirs[name]
    config.init.only = ("^encoder/", "^pyramid/", "^head/")
    return True


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class InternImageRates:
    """How InternImage's repository trains a size of it on dense tasks [R].

    Attributes:
      drop_path: rate of its last layer, rising linearly from 0; of detectors and segmenters.
      boxes, pixels: layer decay of detectors with an FPN, and of segmenters.
      queries: layer decay of DINO.
    """

    drop_path: float
    boxes: float = 1.0
    pixels: float = 1.0
    queries: float = 0.9


# By the channels of the first stage: T, S, B, L, XL, H, G. There is no published detector with an
# FPN on H and G, and no DINO on S, B and XL; their layer decays are those of their neighbours [C].
_INTERN_IMAGE = {
    64: InternImageRates(drop_path=0.2),
    80: InternImageRates(drop_path=0.3),
    112: InternImageRates(drop_path=0.4),
    160: InternImageRates(drop_path=0.4, boxes=0.94, pixels=0.94),
    192: InternImageRates(drop_path=0.4, boxes=0.94, pixels=0.94),
    320: InternImageRates(drop_path=0.5, boxes=0.94, pixels=0.95, queries=0.94),
    512: InternImageRates(drop_path=0.5, boxes=0.94, pixels=0.95, queries=0.94),
}


def set_intern_image(config: ml_collections.ConfigDict) -> InternImageRates | None:
    """Set drop path and the rate of DCNv3's offsets as InternImage's repository has them for dense
    tasks, whatever its classifiers have.

    Args:
      config: changed in place, if the encoder is an InternImage.

    Returns:
      the rates of the largest published size that is not larger; None for another encoder, or one
      smaller than all of these.
    """
    if config.model.backbone != "intern_image":
        return None
    config.optim.offset_lr = 1.0
    sizes = [width for width in _INTERN_IMAGE if width <= config.model.intern_image.width]
    if not sizes:
        return None
    rates = _INTERN_IMAGE[max(sizes)]
    config.model.encoder.drop_path = rates.drop_path
    config.model.encoder.drop_path_rule = "linear"
    return rates


def _vit_rates(config: ml_collections.ConfigDict) -> tuple[float, float]:
    """(layer decay, drop path) of a ViT in ViTDet: of B, L and H by the number of blocks [R]."""
    depth = config.model.encoder.depth
    return (0.9, 0.5) if depth >= 32 else (0.8, 0.4) if depth >= 24 else (0.7, 0.1)


def _vitdet(config: ml_collections.ConfigDict, schedule: Schedule, *, vit: bool) -> None:
    """Maps of a ViT, augmentation and schedule as in detectron2's project ViTDet."""
    if vit:
        config.dense.maps.update(
            {
                "window": WINDOW,  # [R]
                "global_blocks": global_blocks(config.model.encoder.depth),  # [R]
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
    drop path are those of its own repository, images and schedule those of ViTDet [C]."""
    _vitdet(config, schedule, vit=vit)
    config.optim.clip = 0.0  # [R]
    if rates := set_intern_image(config):
        config.optim.weight_decay = 0.05  # [R]
        config.optim.decayed = "ranks"  # [R]
        config.optim.layer_decay = rates.boxes  # [R]
        return
    config.optim.weight_decay = 0.1  # [R]
    config.optim.decayed = "but_norms"  # [R]
    config.optim.layer_decay = _vit_rates(config)[0] if vit else 1.0  # [R]


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
        config.optim.decayed = "but_norms"  # [R]
        config.optim.warmup_steps = 0  # [R]
        return
    config.dense.detect.dino.update(
        {
            "shared_heads": False,
            "projection_bias": False,
            "box_noise": 1.0,
            "denoising": 1000 if _is_large(config) else 100,
        }  # [R]
    )
    rates = set_intern_image(config)
    # [R]; in the files for two composed copies it is stated and has no effect: it goes by names
    # that the copies do not have
    config.optim.layer_decay = rates.queries if rates else 0.9
    config.optim.decayed = "ranks"  # [R]
    config.optim.head_offset_lr = 1e-3 if _is_large(config) else 1.0  # [R]
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
    config.optim.warmup_steps = 0  # [R]: its warm-up starts at the full rate
    config.optim.decayed = "but_norms"  # [R]
    set_intern_image(config)
    config.optim.encoder_lr = 0.1  # [R]
    config.optim.layer_decay = 1.0  # [R]


def _resize_to_buckets(config: ml_collections.ConfigDict, large_buckets: tuple[int, ...]) -> None:
    """Images of several static sizes, windows of half of them but for InternImage-H, and evaluation
    with the published limits of both sides."""
    large = _is_large(config)
    config.dense.geometry.update(
        {
            "rule": "buckets",
            "buckets": large_buckets if large else BUCKETS,
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
    """Returns settings of a run of detection on a published data set.

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
        raise UserError(f"{data.recipe}: head={head} is not one of {', '.join(data.schedules)}")
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
        _resize_to_buckets(config, data.large_buckets)
    continue_dense_run(config, from_=from_, flag=flag)
    return config
