"""COCO detection and instance segmentation as in the paper's Table 10: ViTDet's Mask R-CNN.

    python -m m3i_jax.main --config configs/transfer/coco.py:path=DIR,from=RUN,epochs=25 \\
      --workdir runs/coco

DIR holds train2017/, val2017/ and annotations/instances_{train,val}2017.json. `from` is the working
directory of a run or a weights file that `init_from` reads; `model` is any ViT or InternImage
preset without it. The published settings are those of detectron2's ViTDet project, on which the
paper builds; [R] marks them. They are of ViT-B; a ViT-L there takes layer decay 0.8 and drop path
0.4.

--mode=show prints cost and days; nothing of this was trained at its full size by this project.
"""

from ml_collections import ConfigDict

from m3i_jax.config import default_config
from m3i_jax.evaluation.dense_encoder import WINDOW, build_dense_encoder, global_blocks

IMAGES = 117_266  # of train2017 that show an object which is no crowd
STEPS, EPOCHS, BATCH = 184_375, 100, 64  # [R]
WARMUP = 250  # steps [R]
MILESTONES = (163_889 / STEPS, 177_546 / STEPS)  # [R]
IMAGE_SIZE = 1024  # [R]


def get_config(
    path: str = "",
    from_: str = "",
    model: str = "vit_b16",
    epochs: float = EPOCHS,
    batch_size: int = BATCH,
    image_size: int = IMAGE_SIZE,
) -> ConfigDict:
    """Settings of a run on COCO.

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
        flag="configs/transfer/coco.py:from",
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
    config.data.classes = 80
    config.data.annotations = "annotations/instances_train2017.json"
    config.data.holdout_annotations = "annotations/instances_val2017.json"
    config.data.threads = 8
    config.dense.geometry.update(
        {"rule": "jitter", "scale": (0.1, 2.0), "flip_p": 0.5, "max_objects": 100}  # [R]
    )

    # Optimization.
    config.train.batch_size = batch_size
    config.train.epochs = epochs
    config.train.steps = round(STEPS * epochs / EPOCHS * BATCH / batch_size)
    config.train.eval_every = 10_000
    config.optim.lr = 1e-4 * batch_size / BATCH  # [R]; linear in the batch [C]
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
    config.evaluate.query_limit = 5000
    return config
