"""Semantic segmentation on images of one's own: UperNet, Mask2Former or a linear head with the
trainer of pre-training.

    python -m m3i_jax.main --config configs/transfer/segment.py --workdir runs/segment_scenes
    python -m m3i_jax.main --config configs/transfer/segment.py:path=DIR,from=RUN \\
      --workdir runs/mine

Without data, it trains on built-in scenes of shapes for some minutes. DIR holds images/ and
annotations/ with the same folders in both: a PNG map for every image, 0 = unlabelled, x = class
x - 1, or with `data.map_unlabelled=255` x = class x. With `annotations`, a file in COCO's form, its
objects are the maps. `from` is the working directory of a run or a weights file that `init_from`
reads.

configs/transfer/ade20k.py has the published settings. Here, for data sets of thousands of images,
rate and length are a choice of this project: AdamW with 3e-3 (Mask2Former: 1e-3) below
384 channels and 1e-4 from there on, and a cosine schedule.
"""

from ml_collections import ConfigDict

from m3i_jax.config import default_config
from m3i_jax.evaluation.dense_recipes import build_dense_encoder, continue_dense_run
from m3i_jax.models import backbones
from m3i_jax.published_dense_settings import map_blocks

SMALL = 512  # pixels below which the head is small


def head_width(head: str, size: int) -> int:
    """Channels of a head for crops of that size: Mask2Former's group norms need 64 or more."""
    if head == "mask2former":
        return 64 if size < SMALL else 256
    return 32 if size < SMALL else 512


def get_config(
    path: str = "",
    annotations: str = "",
    from_: str = "",
    model: str = "",
    head: str = "upernet",
    image_size: int = 0,
    epochs: float = 0.0,
    steps: int = 0,
    batch_size: int = 16,
) -> ConfigDict:
    """Settings of a segmentation run.

    Args:
      path: directory with images/ and annotations/, or the images of `annotations`; empty: built-in
        scenes.
      annotations: JSON file in COCO's form.
      from_: working directory of the run that trained the encoder, or a weights file; empty: train
        from scratch.
      model: preset, used without `from`; empty: vit_tiny for scenes, vit_s16 otherwise.
      head: upernet, mask2former or linear.
      image_size: side of a crop; 0: 96 for scenes, 512 otherwise.
      epochs: passes over the images; 0: 40, or 2 over the scenes.
      steps: optimizer steps instead of epochs; 0: from epochs.
      batch_size: images per step.
    """
    config = default_config()
    config.task = "segment"
    scenes = not path and not annotations
    size = image_size or (96 if scenes else SMALL)
    is_vit = build_dense_encoder(
        config,
        from_=from_,
        model=model or ("vit_tiny" if scenes else "vit_s16"),
        image_size=size,
        flag="configs/transfer/segment.py:from",
    )
    if is_vit:
        blocks = map_blocks(config.model.encoder.depth) if head == "upernet" else ()
        config.dense.maps.update({"relative": "table", "blocks": blocks})
    config.model.encoder.drop_path = 0.1 if config.model.encoder.depth >= 12 else 0.0

    # Data.
    config.data.source = "scenes" if scenes else "coco" if annotations else "maps"
    config.data.path = path
    config.data.annotations = annotations
    config.data.size = 3300 if scenes else 0
    config.data.holdout = 0.1 if scenes else 0.2
    config.data.threads = 2
    config.dense.geometry.update(
        {
            "rule": "range",
            "long": 4 * size,
            "short": size,
            "scale": (1.0, 1.0) if scenes else (0.5, 2.0),
            "category_share": 1.0 if scenes else 0.75,
            "photometric": not scenes,
        }
    )

    # Head. Its classifier starts with a variance of 1 / (3 fan-in), as PyTorch's layers do: with
    # the published N(0, 0.01^2) the narrow head of a short run hardly moves at first.
    width = head_width(head, size)
    config.dense.segment.update(
        {
            "head": head,
            "width": width,
            "aux_width": 0 if size < SMALL else 256,
            "divide_by": "labelled",
            "classifier_std": (3 * width) ** -0.5,
            "dropout": 0.0 if size < SMALL else 0.1,
        }
    )
    if size < SMALL:
        config.dense.segment.mask2former.update(
            {
                "queries": 20,
                "heads": 4,
                "encoder_depth": 2,
                "encoder_hidden": 128,
                "depth": 3,
                "hidden": 128,
                "points": 1024,
            }
        )

    # Optimization.
    config.train.batch_size = batch_size
    config.train.epochs = epochs or (2.0 if scenes else 40.0)
    config.train.steps = steps
    config.train.eval_every = 0
    config.optim.lr = 3e-3 if config.model.encoder.width < 384 else 1e-4
    if head == "mask2former":  # its transformers are post-norm
        config.optim.lr = min(config.optim.lr, 1e-3)
    config.optim.warmup_epochs = 0.05 * config.train.epochs
    config.optim.warmup_steps = steps // 20 if steps else -1
    config.optim.weight_decay = 0.05
    config.optim.b2 = 0.999
    config.optim.clip = 1.0
    if from_ and backbones.get_backbone(config.model).depth(config.model) >= 12:
        config.optim.layer_decay = 0.8 if is_vit else 0.9  # an InternImage has 30 layers or more
    config.evaluate.batch_size = batch_size
    continue_dense_run(config, from_=from_, flag="configs/transfer/segment.py:from")
    return config
