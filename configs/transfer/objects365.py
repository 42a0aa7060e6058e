"""Objects365, the first step of the chains of the paper's Table 2: a detector is trained on it for
26 epochs and goes on to COCO or LVIS.

    python -m m3i_jax.main --config configs/transfer/objects365.py:path=DIR,from=RUN \\
      --workdir runs/objects
    python -m m3i_jax.main --workdir runs/coco \\
      --config configs/transfer/coco.py:path=COCO,from=runs/objects,epochs=12
    python -m m3i_jax.main --workdir runs/lvis \\
      --config configs/transfer/lvis.py:path=COCO,from=runs/objects,epochs=12

DIR holds the images in any folders, and zhiyuan_objv2_{train,val}.json of version 2 in
annotations/. The runs that go on take encoder, pyramid and head of this one; layers that belong to
categories restart, and the log names them. The annotations have boxes and no masks, so this run
predicts none, and the mask head of the next one starts at random.

The paper's detector there is DINO on InternImage-H with a composite backbone; for Mask R-CNN there
is no published run: its schedule is COCO's at the paper's length [C]. Nothing of this was trained
by this project.
"""

from ml_collections import ConfigDict

from m3i_jax.evaluation.dense_recipes import build_detection
from m3i_jax.published_dense_settings import DetectionData, Schedule

# Images of the training set, as Ultralytics' Objects365.yaml of YOLOv5 and YOLOv8 counts them
# (1,742,289) and https://huggingface.co/datasets/jxu124/objects365 counts the entries of the
# annotations (1,742,292). Only the length of the schedule depends on it, by two millionths.
IMAGES, EPOCHS, BATCH = 1_742_289, 26, 64  # see above; [P]; [C]
STEPS = IMAGES * EPOCHS // BATCH
OBJECTS365 = DetectionData(
    recipe="configs/transfer/objects365.py",
    classes=365,
    images=IMAGES,
    annotations=(
        "annotations/zhiyuan_objv2_train.json",
        "annotations/zhiyuan_objv2_val.json",
    ),
    max_objects=100,
    eval_every=50_000,
    eval_images=5000,
    schedules={
        "mask_rcnn": Schedule(
            steps=STEPS,
            epochs=EPOCHS,
            batch=BATCH,
            milestones=(round(8 / 9 * STEPS), round(26 / 27 * STEPS)),
            lr=1e-4,
        ),
        "dino": Schedule(
            steps=STEPS, epochs=EPOCHS, batch=BATCH, milestones=(round(11 / 12 * STEPS),), lr=2e-4
        ),  # [C]
    },
    settings={"detect.masks": False},
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
    """Settings of a run on Objects365.

    Args:
      path: directory of the images and annotations.
      from_: working directory of the run that trained the encoder, or a weights file; empty: train
        from scratch.
      model: preset, used without `from`.
      head: mask_rcnn or dino.
      epochs: 0: 26 [P].
      batch_size: images per step; 0: 64.
      image_size: side of the square that images are fitted into.
      multi_scale: train on images of several static sizes, as DINO is; with an InternImage.
    """
    return build_detection(
        OBJECTS365,
        path=path,
        from_=from_,
        model=model,
        head=head,
        epochs=epochs,
        batch_size=batch_size,
        image_size=image_size,
        multi_scale=multi_scale,
    )
