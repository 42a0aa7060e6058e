"""What the recipes of dense tasks share and starts from weights: encoder and maps, the heads of
another run to go on from, and a whole run of detection on a published data set. The published
settings are in published_dense_settings.py."""

import ml_collections

from m3i_jax.config import default_config
from m3i_jax.errors import UserError
from m3i_jax.evaluation.load import build_encoder, settings_of_weights
from m3i_jax.interop import dense_weights, published_dense, tensor_files
from m3i_jax.models import backbones, presets, vit
from m3i_jax.models.dense.task_heads import (
    DETECTION_HEADS,
    SEGMENTATION_HEADS,
    DetectionHead,
    SegmentationHead,
)
from m3i_jax.published_dense_settings import HEADS, DetectionData, resize_to_buckets
from m3i_jax.training import checkpoint_dir


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
      whether a recipe sets `dense.maps`, by which a plain ViT makes maps.
    """
    pretrained = image_size
    if from_:
        source = build_encoder(config, from_, flag)
        pretrained = vit.position_size(source)
    else:
        config.model.update(presets.preset(model))
    backbone = backbones.get_backbone(config.model)
    if backbone.resizes_positions:
        config.dense.maps.image_size = pretrained
        config.model.encoder.position_grid = 0
    if backbone.scans_from is not None:
        config.model.scan = backbone.depth(config.model) >= backbone.scans_from
    config.model.encoder.freeze_patch_embed = False
    config.data.image_size = image_size
    config.data.captions = "no"
    config.train.panel_every = 1000
    config.evaluate.knn = False
    return backbone.reads_maps and backbone.stages is not None


def _head(config: ml_collections.ConfigDict) -> DetectionHead | SegmentationHead:
    if config.task == "detect":
        return DETECTION_HEADS[config.dense.detect.head]
    return SEGMENTATION_HEADS[config.dense.segment.head]


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
    if not checkpoint_dir.has_settings(from_):
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
    if backbones.get_backbone(config.model).resizes_positions:
        config.dense.maps.image_size = vit.position_size(source)
    ours, theirs = config.dense[config.task], source.dense[config.task]
    for name in _head(config).shape_settings:
        section, _, field = name.rpartition(".")
        if section:
            ours[section][field] = theirs[section][field]
        else:
            ours[name] = theirs[name]
    config.init.only = ("^encoder/", "^pyramid/", "^head/")
    return True


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
    is_vit = build_dense_encoder(config, from_=from_, model=model, image_size=image_size, flag=flag)

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
    HEADS[head](config, schedule, vit=is_vit)
    if multi_scale:
        resize_to_buckets(config, data.large_buckets)
    continue_dense_run(config, from_=from_, flag=flag)
    return config
