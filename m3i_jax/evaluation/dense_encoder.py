"""The encoder of a dense run, for its recipe: model, weights and maps; and the heads of another
dense run, to go on from it."""

import ml_collections

from m3i_jax.evaluation.load import build_encoder, settings_of_weights
from m3i_jax.interop import dense_weights, published_dense, tensor_files
from m3i_jax.models import backbones, presets
from m3i_jax.training import checkpoint_dir

WINDOW = 14  # side of ViTDet's windows in patches
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
    """The last block of each quarter of a ViT, as in ViTDet; of each half of one of fewer than
    eight blocks.

    >>> global_blocks(12), global_blocks(4)
    ((2, 5, 8, 11), (1, 3))
    """
    parts = 4 if depth >= 8 else min(2, depth)
    return tuple(depth * (i + 1) // parts - 1 for i in range(parts))


def map_blocks(depth: int, parts: int = 4) -> tuple[int, ...]:
    """The blocks whose outputs are the maps of mmsegmentation's ViT: 3, 5, 7, 11 of 12; else the
    last of equal parts, as far as there are enough.

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
