"""Detection and instance segmentation on images of one's own, with the trainer of pre-training:
ViTDet's Mask R-CNN, with head=mask2former masks by Mask2Former, or with head=dino boxes by DINO.

    python -m m3i_jax.main --config configs/transfer/detect.py --workdir runs/detect_scenes
    python -m m3i_jax.main --workdir runs/mine \\
      --config configs/transfer/detect.py:annotations=FILE.json,images=DIR,from=RUN

Without data, it trains on built-in scenes of shapes for some minutes. `annotations` is a file in
COCO's form, with or without masks (masks=false); a fifth of the images is held out unless
--config.data.holdout_annotations names another file. `from` is the working directory of a run or a
weights file that `init_from` reads.

configs/transfer/coco.py and lvis.py have the published settings. Here, for data sets of thousands
of images, rate and length are a choice of this project: AdamW with 2e-3 (DINO and
Mask2Former: 1e-3) below 384 channels and 1e-4 from there on, a cosine schedule, and images scaled
by 0.5 to 1.5.
"""

import os

from ml_collections import ConfigDict

from m3i_jax.config import default_config
from m3i_jax.errors import UserError
from m3i_jax.evaluation.dense_recipes import build_dense_encoder, continue_dense_run
from m3i_jax.models import backbones
from m3i_jax.published_dense_settings import global_blocks

SMALL = 512  # pixels below which strides, anchors and heads are small


def get_config(
    annotations: str = "",
    images: str = "",
    from_: str = "",
    model: str = "",
    image_size: int = 0,
    epochs: float = 0.0,
    steps: int = 0,
    batch_size: int = 16,
    masks: bool = True,
    head: str = "mask_rcnn",
) -> ConfigDict:
    """Settings of a detection run.

    Args:
      annotations: JSON file in COCO's form; empty: built-in scenes.
      images: directory of its images; empty: that of the file.
      from_: working directory of the run that trained the encoder, or a weights file; empty: train
        from scratch.
      model: preset, used without `from`; empty: vit_tiny for scenes, vit_s16 otherwise.
      image_size: side of the square that images are fitted into; 0: 96 for scenes, 512 otherwise.
      epochs: passes over the images; 0: 36, or 2 over the scenes.
      steps: optimizer steps instead of epochs; 0: from epochs.
      batch_size: images per step.
      masks: predict masks; the annotations must have them. DINO predicts none.
      head: mask_rcnn, dino or mask2former.
    """
    if images and not annotations:
        raise UserError(
            f"configs/transfer/detect.py: images={images} needs annotations=, the file of their"
            " boxes; without both, built-in scenes are trained on"
        )
    config = default_config()
    config.task = "detect"
    scenes = not annotations
    size = image_size or (96 if scenes else SMALL)
    is_vit = build_dense_encoder(
        config,
        from_=from_,
        model=model or ("vit_tiny" if scenes else "vit_s16"),
        image_size=size,
        flag="configs/transfer/detect.py:from",
    )
    grid = size // config.model.encoder.patch_size
    if is_vit:
        config.dense.maps.update(
            {
                "window": 14 if grid > 28 else -(-grid // 2),
                "global_blocks": global_blocks(config.model.encoder.depth),
                "relative": "decomposed",
            }
        )
    config.model.encoder.drop_path = 0.1 if config.model.encoder.depth >= 12 else 0.0

    # Data.
    config.data.source = "scenes" if scenes else "coco"
    config.data.path = "" if scenes else images or os.path.dirname(annotations) or "."
    config.data.annotations = annotations
    config.data.size = 3300 if scenes else 0
    config.data.holdout = 0.1 if scenes else 0.2
    config.data.threads = 2
    config.dense.geometry.scale = (1.0, 1.0) if scenes else (0.5, 1.5)
    config.dense.geometry.max_objects = 20 if scenes else 100

    # Heads.
    config.dense.detect.masks = masks and head != "dino"
    config.dense.detect.head = head
    if head == "dino":
        config.dense.detect.update(
            {"strides": (8, 16, 32, 64), "score_threshold": 0.0, "detections": 300}
        )
    if head == "mask2former":
        config.dense.detect.update({"strides": (4, 8, 16, 32), "score_threshold": 0.0})
    if size < SMALL and head == "mask2former":
        config.dense.geometry.mask_size = 56
        config.dense.detect.update({"width": 64, "detections": 100})
        config.dense.detect.mask2former.update(
            {
                "queries": 40,
                "heads": 4,
                "encoder_depth": 2,
                "encoder_hidden": 128,
                "depth": 3,
                "hidden": 128,
                "points": 1024,
            }
        )
    elif size < SMALL and head == "dino":
        # Box AP of an InternImage-pico on the scenes of tests/bench/README.md after 493 steps, one
        # seed: 22.1 with strides 8 to 32 and 28.6 with 4 to 16, at almost the same FLOPs; 33.1 if
        # lower detections of the same class and place are dropped, which short runs do not learn
        # to suppress. Every token is a query, up to 100.
        sides = [-(-size // stride) for stride in (4, 8, 16)]
        queries = min(100, sum(side**2 for side in sides))
        config.dense.detect.update({"strides": (4, 8, 16), "width": 64, "detections": 100})
        config.dense.detect.dino.update(
            {
                "queries": queries,
                "heads": 4,
                "encoder_depth": 2,
                "depth": 3,
                "hidden": 128,
                "denoising": 20,
                "nms": 0.7,
            }
        )
    elif size < SMALL:
        scale = size / 96
        config.dense.geometry.mask_size = 56
        config.dense.detect.update(
            {
                "strides": (4, 8, 16, 32),
                "anchor_sizes": tuple(round(side * scale) for side in (12, 24, 48, 96)),
                "canonical": (round(56 * scale), 8),
                "width": 48,
                "rpn_convs": 1,
                "rpn_samples": 64,
                "proposals": (500, 200),
                "test_proposals": (500, 200),
                "rois": 24,
                "box_convs": 0,
                "box_hidden": 128,
                "mask_convs": 2,
                "candidates": 500,
            }
        )

    # Optimization.
    config.train.batch_size = batch_size
    config.train.epochs = epochs or (2.0 if scenes else 36.0)
    config.train.steps = steps
    config.train.eval_every = 0
    rate = 2e-3 if head == "mask_rcnn" else 1e-3
    config.optim.lr = rate if config.model.encoder.width < 384 else 1e-4
    config.optim.warmup_epochs = 0.05 * config.train.epochs
    config.optim.warmup_steps = steps // 20 if steps else -1
    config.optim.weight_decay = 0.05
    config.optim.b2 = 0.999
    config.optim.clip = 1.0
    if from_ and backbones.get_backbone(config.model).depth(config.model) >= 12:
        config.optim.layer_decay = 0.8 if is_vit else 0.9  # an InternImage has 30 layers or more
    config.evaluate.batch_size = batch_size
    continue_dense_run(config, from_=from_, flag="configs/transfer/detect.py:from")
    own = config.dense.detect.get(head)
    if own is not None and "queries" in own:  # every object needs one
        queries = own.queries
        config.dense.geometry.max_objects = min(config.dense.geometry.max_objects, queries)
    return config
