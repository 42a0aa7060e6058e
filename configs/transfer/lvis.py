"""LVIS detection and instance segmentation as in the paper's Table 11: ViTDet's Mask R-CNN with the
federated loss and repeated images of rare categories.

    python -m m3i_jax.main --config configs/transfer/lvis.py:path=DIR,from=RUN \\
      --workdir runs/lvis

DIR holds COCO's train2017/ and val2017/, and lvis_v1_{train,val}.json in annotations/. `from` is
the working directory of a run or a weights file that `init_from` reads. The published settings are
those of detectron2's ViTDet project; [R] marks them. Images are repeated by a closed form of the
position: an epoch has as many images as the repeat factors sum to, each image floor or ceil of its
factor times, where detectron2 draws the fraction anew every epoch.
"""

from ml_collections import ConfigDict

from m3i_jax.config import default_config
from m3i_jax.evaluation.dense_encoder import WINDOW, build_dense_encoder, global_blocks

STEPS, EPOCHS, BATCH = 156_250, 100, 64  # [R]
WARMUP = 250  # steps [R]
MILESTONES = (138_889 / STEPS, 150_463 / STEPS)  # [R]
IMAGE_SIZE = 1024  # [R]


def get_config(
    path: str = "",
    from_: str = "",
    model: str = "vit_b16",
    epochs: float = EPOCHS,
    batch_size: int = BATCH,
    image_size: int = IMAGE_SIZE,
) -> ConfigDict:
    """Settings of a run on LVIS.

    Args:
      path: directory of the images and annotations.
      from_: working directory of the run that trained the encoder, or a weights file; empty: train
        from scratch.
      model: preset, used without `from`.
      epochs: 100 [P]; 25 in the paper's ablations.
      batch_size: images per step.
      image_size: side of the square that images are fitted into.
    """
    config = default_config()
    config.task = "detect"
    is_vit = build_dense_encoder(
        config,
        from_=from_,
        model=model,
        image_size=image_size,
        flag="configs/transfer/lvis.py:from",
    )
    if is_vit:
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
    config.model.remat = "full"  # 12 maps of 4,096 tokens and their attention do not fit otherwise

    # Data.
    config.data.source = "coco"
    config.data.path = path
    config.data.classes = 1203
    config.data.annotations = "annotations/lvis_v1_train.json"
    config.data.holdout_annotations = "annotations/lvis_v1_val.json"
    config.data.threads = 8
    config.dense.geometry.update(
        {"rule": "jitter", "scale": (0.1, 2.0), "flip_p": 0.5}  # [R]
    )
    config.dense.geometry.max_objects = 300
    config.dense.geometry.repeat = 0.001  # [R]

    # Heads.
    config.dense.detect.update(
        {
            "loss": "federated",  # [R]
            "federated_classes": 50,  # [R]; background counts as one of them
            "score_threshold": 0.02,  # [R]
            "detections": 300,  # [R]
            "candidates": 4096,
        }
    )

    # Optimization.
    config.train.batch_size = batch_size
    config.train.epochs = epochs
    config.train.steps = round(STEPS * epochs / EPOCHS * BATCH / batch_size)
    config.train.eval_every = 20_000
    config.optim.lr = 2e-4 * batch_size / BATCH  # [R]; linear in the batch [C]
    config.optim.schedule = "steps"
    config.optim.milestones = MILESTONES
    config.optim.warmup_steps = min(WARMUP, config.train.steps)
    config.optim.warmup_start = 0.001  # [R]
    config.optim.b2 = 0.999  # [R]
    config.optim.weight_decay = 0.1  # [R]
    config.optim.decayed = "but_norms"  # [R]
    config.optim.layer_decay = 0.7  # [R]
    config.optim.clip = 0.0  # [R]
    config.evaluate.batch_size = batch_size
    config.evaluate.query_limit = 20_000
    return config
