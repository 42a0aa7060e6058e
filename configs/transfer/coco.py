"""COCO detection and instance segmentation: ViTDet's Mask R-CNN as in the paper's Table 10; or
with head=dino as in Table 2, or head=mask2former.

    python -m m3i_jax.main --config configs/transfer/coco.py:path=DIR,from=RUN,epochs=25 \\
      --workdir runs/coco

DIR holds train2017/, val2017/ and annotations/instances_{train,val}2017.json. `from` is the working
directory of a run or a weights file that `init_from` reads; `model` is any ViT or InternImage
preset without it. From a run of configs/transfer/objects365.py, as in the paper's Table 2, pyramid
and head are taken, too, and only what belongs to the categories restarts.

The published settings are those of detectron2's ViTDet project, on which the paper builds; DINO's
are those of detrex with the head of its authors, Mask2Former's those of its authors, and on an
InternImage those of its repository (see m3i_jax/published_dense_settings.py). [R] marks them.
--mode=show prints cost and days; nothing of this was trained at its full size by this project.
"""

from ml_collections import ConfigDict

from m3i_jax.evaluation.dense_recipes import build_detection
from m3i_jax.published_dense_settings import DetectionData, Schedule

COCO = DetectionData(
    recipe="configs/transfer/coco.py",
    classes=80,
    images=117_266,  # that show an object which is no crowd
    annotations=(
        "annotations/instances_train2017.json",
        "annotations/instances_val2017.json",
    ),
    max_objects=100,
    eval_every=10_000,
    eval_images=5000,
    schedules={
        "mask_rcnn": Schedule(
            steps=184_375, epochs=100, batch=64, milestones=(163_889, 177_546), lr=1e-4
        ),  # [R]
        "dino": Schedule(
            steps=90_000, epochs=12, batch=16, milestones=(82_500,), lr=1e-4
        ),  # [R]: detrex
        "mask2former": Schedule(
            steps=368_750, epochs=50, batch=16, milestones=(327_778, 355_092), lr=1e-4
        ),  # [R]: its authors
    },
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
    """Settings of a run on COCO.

    Args:
      path: directory of the images and annotations.
      from_: working directory of the run that trained the encoder, or a weights file; empty: train
        from scratch.
      model: preset, used without `from`.
      head: mask_rcnn; dino, which predicts boxes without masks; or mask2former, which predicts
        masks and the boxes around them.
      epochs: 0: as published, 100 [P]; 25 in the paper's ablations; 75 of ViTDet's H; dino 12;
        mask2former 50.
      batch_size: images per step; 0: as published, 64; dino and mask2former 16.
      image_size: side of the square that images are fitted into.
      multi_scale: train on images of several static sizes, as DINO is; with an InternImage.
    """
    return build_detection(
        COCO,
        path=path,
        from_=from_,
        model=model,
        head=head,
        epochs=epochs,
        batch_size=batch_size,
        image_size=image_size,
        multi_scale=multi_scale,
    )
