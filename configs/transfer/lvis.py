"""LVIS detection and instance segmentation as in the paper's Table 11: ViTDet's Mask R-CNN with the
federated loss and repeated images of rare categories; or with head=dino as in Table 2.

    python -m m3i_jax.main --config configs/transfer/lvis.py:path=DIR,from=RUN \\
      --workdir runs/lvis

DIR holds COCO's train2017/ and val2017/, and lvis_v1_{train,val}.json in annotations/. `from` is
the working directory of a run or a weights file that `init_from` reads; of a run of detection, see
configs/transfer/coco.py. The published settings are those of detectron2's ViTDet project; [R] marks
them. Those of its ViT-H need --config.optim.lr=1e-4 --config.model.encoder.drop_path=0.4, and the
paper's Table 2 --config.data.holdout_annotations=annotations/lvis_v1_minival.json. Images are
repeated by a closed form of the position: an epoch has as many images as the repeat factors sum to,
each image floor or ceil of its factor times, where detectron2 draws the fraction anew every epoch.
"""

from ml_collections import ConfigDict

from m3i_jax.evaluation.dense_recipes import build_detection
from m3i_jax.published_dense_settings import DetectionData, Schedule

LVIS = DetectionData(
    recipe="configs/transfer/lvis.py",
    classes=1203,
    images=100_170,
    annotations=("annotations/lvis_v1_train.json", "annotations/lvis_v1_val.json"),
    max_objects=300,
    eval_every=20_000,
    eval_images=20_000,
    schedules={
        "mask_rcnn": Schedule(
            steps=156_250, epochs=100, batch=64, milestones=(138_889, 150_463), lr=2e-4
        ),  # [R]
        # [C]: as on COCO; public runs of DINO are those of InternImage-H, 80,000 steps at one rate
        "dino": Schedule(steps=75_000, epochs=12, batch=16, milestones=(68_750,), lr=1e-4),
    },
    settings={
        "geometry.repeat": 0.001,  # [R]
        "detect.loss": "federated",  # [R]
        "detect.federated_classes": 50,  # [R]; background counts as one of them
        "detect.score_threshold": 0.02,  # [R]
        "detect.detections": 300,  # [R]
        "detect.candidates": 4096,
    },
    large_buckets=(608, 1024, 800, 1344, 1024, 1728, 1216, 2016),  # [R]: 600 to 1,200 pixels
)


def get_config(
    path: str = "",
    from_: str = "",
    model: str = "vit_b16",
    head: str = "mask_rcnn",
    epochs: float = 0.0,
    batch_size: int = 0,
    image_size: int = 1024,
    multi_scale: bool = False,
) -> ConfigDict:
    """Settings of a run on LVIS.

    Args:
      path: directory of the images and annotations.
      from_: working directory of the run that trained the encoder, or a weights file; empty: train
        from scratch.
      model: preset, used without `from`.
      head: mask_rcnn, or dino, which predicts boxes without masks.
      epochs: 0: as published, 100 [P]; 25 in the paper's ablations; dino 12.
      batch_size: images per step; 0: as published, 64; dino 16.
      image_size: side of the square that images are fitted into.
      multi_scale: train on images of several static sizes, as DINO is; with an InternImage.
    """
    return build_detection(
        LVIS,
        path=path,
        from_=from_,
        model=model,
        head=head,
        epochs=epochs,
        batch_size=batch_size,
        image_size=image_size,
        multi_scale=multi_scale,
    )
