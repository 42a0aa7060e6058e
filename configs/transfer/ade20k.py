"""ADE20k segmentation as in the paper's Table 12: UperNet on the maps of four blocks; or with
head=mask2former as in Table 2.

    python -m m3i_jax.main --config configs/transfer/ade20k.py:path=DIR,from=RUN \\
      --workdir runs/ade

DIR is ADEChallengeData2016: images/{training,validation}/ and annotations/ alike. `from` is
the working directory of a run or a weights file that `init_from` reads; without it, `model` is any
ViT or InternImage preset. The published settings are those of mmsegmentation's MAE UperNet, whose
recipe is the usual one of this table, on an InternImage those of its repository; [R] marks them.
With head=mask2former they are those of InternImage-H, which is trained with
image_size=896,steps=80000, on smaller ones those of the head's authors but for the power of the
schedule (0.9), and on a ViT a choice of this project. UperNet is trained on L and XL with
image_size=640, and on H and G with 896.

From a run of segmentation, as in the paper's Table 2 from COCO-Stuff, pyramid and head are taken,
too, and only the classifiers restart. InternImage-H on COCO-Stuff with maps in ADE20k's form (0 =
unlabelled), at twice the rate and without clipping, and then on ADE20k:

    H=head=mask2former,image_size=896,steps=80000
    python -m m3i_jax.main --config configs/transfer/ade20k.py:path=STUFF,from=RUN,$H \\
      --workdir runs/stuff --config.data.classes=171 --config.data.split=train2017 \\
      --config.data.holdout_split=val2017 --config.optim.lr=2e-5 --config.optim.clip=0
    python -m m3i_jax.main --config configs/transfer/ade20k.py:path=DIR,from=runs/stuff,$H \\
      --workdir runs/ade

Colours are changed on the device; images are resized on the host by Pillow or as in OpenCV, see
data/geometry.py. --mode=show prints cost and days; nothing of this was trained at its full size by
this project.
"""

from ml_collections import ConfigDict

from m3i_jax.config import default_config
from m3i_jax.evaluation.dense_recipes import build_dense_encoder, continue_dense_run
from m3i_jax.models import backbones
from m3i_jax.models.transfer import DenseRates
from m3i_jax.published_dense_settings import map_blocks, set_dense_rates

STEPS, BATCH = 160_000, 16  # [R]
IMAGES = 20_210  # of training, for modes that do not open the data
WARMUP = 1499  # steps [R]
IMAGE_SIZE = 512  # [R]

SIDES = (768, 832, 896, 960, 1024)  # of InternImage-H's evaluation at several scales, over 896 [R]


def _upernet_of_intern_image(config: ConfigDict, rates: DenseRates) -> None:
    """UperNet of InternImage's repository: its sizes from L on with a smaller rate and clipping."""
    config.dense.segment.width = 512  # [R]
    config.dense.segment.test_whole = 32  # [R]
    config.optim.lr *= rates.pixel_lr  # [R]: to 2e-5 and 6e-5
    config.optim.layer_decay = rates.pixels  # [R]
    config.optim.clip = rates.pixel_clip  # [R]


def _mask2former(
    config: ConfigDict, rates: DenseRates | None, *, is_vit: bool, multi_scale: bool
) -> None:
    """Mask2Former; on an InternImage of 320 channels or more, that of InternImage-H. In its code
    layer decay also slows queries, embeddings of levels and the maps to classes and masks."""
    segment, optim = config.dense.segment, config.optim
    segment.width = 256  # [R]
    segment.test_whole = 32  # [R]
    optim.clip = 0.1  # [R]
    if rates and rates.large:
        segment.width = 1024  # [R]
        segment.mask2former.update(
            {"queries": 200, "heads": 32, "encoder_hidden": 4096, "hidden": 4096}  # [R]
        )
        optim.lr *= 0.1  # [R]
        if multi_scale:
            segment.test_scales = tuple(side / 896 for side in SIDES)
            segment.test_average = "softmax"  # [R]
    elif not is_vit:
        optim.layer_decay, optim.encoder_lr = 1.0, 0.1  # [R]: its authors
        optim.clip, optim.warmup_steps, optim.decayed = 0.01, 0, "but_norms"  # [R]
        config.dense.geometry.category_share = 1.0  # [R]


def get_config(
    path: str = "",
    from_: str = "",
    model: str = "vit_b16",
    head: str = "upernet",
    steps: int = STEPS,
    batch_size: int = BATCH,
    image_size: int = IMAGE_SIZE,
    multi_scale: bool = False,
) -> ConfigDict:
    """Settings of a run on ADE20k.

    Args:
      path: directory of images and annotations.
      from_: working directory of the run that trained the encoder, or a weights file; empty: train
        from scratch.
      model: preset, used without `from`.
      head: upernet, mask2former, or linear for a quick answer.
      steps: optimizer steps; 31,578 and 126,313 are 25 and 100 epochs.
      batch_size: images per step.
      image_size: side of a crop.
      multi_scale: evaluate at six scales, mirrored too.
    """
    config = default_config()
    config.task = "segment"
    is_vit = build_dense_encoder(
        config,
        from_=from_,
        model=model,
        image_size=image_size,
        flag="configs/transfer/ade20k.py:from",
    )
    if is_vit:
        config.dense.maps.update(
            {
                "relative": "table",  # [R]
                "layer_scale": 1.0,  # [R]
                "blocks": map_blocks(backbones.get_backbone(config.model).depth(config.model))
                if head == "upernet"
                else (),  # [R]
            }
        )
        config.model.encoder.final_norm = False  # [R]
        config.model.encoder.drop_path = 0.1  # [R]
        config.model.encoder.drop_path_rule = "linear"

    # Data.
    config.data.source = "maps"
    config.data.path = path
    config.data.classes, config.data.size = 150, IMAGES
    config.data.split = "training"
    config.data.holdout_split = "validation"
    config.data.threads = 8
    config.dense.geometry.update(
        {
            "rule": "range",  # [R]
            "long": 4 * image_size,  # [R]
            "short": image_size,  # [R]
            "scale": (0.5, 2.0),  # [R]
            "category_share": 0.75,  # [R]
            "photometric": True,  # [R]
        }
    )

    # Head.
    config.dense.segment.head = head
    config.dense.segment.width = 768  # [R]; mmsegmentation's default is 512
    config.dense.segment.test_stride = image_size * 2 // 3  # [R]
    if multi_scale:
        config.dense.segment.test_scales = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # [R]
        config.dense.segment.test_flip = True  # [R]

    # Optimization.
    config.train.batch_size = batch_size
    config.train.steps = steps
    config.train.eval_every = 16_000  # [R]
    config.optim.lr = 1e-4 * batch_size / BATCH  # [R]; linear in the batch [C]
    config.optim.schedule = "poly"
    config.optim.warmup_steps = min(WARMUP, steps)
    config.optim.warmup_start = 1e-6  # [R]
    config.optim.b2 = 0.999  # [R]
    config.optim.weight_decay = 0.05  # [R]
    config.optim.decayed = "ranks"  # [R]
    config.optim.layer_decay = 0.65  # [R]
    config.optim.clip = 0.0  # [R]
    config.evaluate.batch_size = batch_size
    rates = set_dense_rates(config)
    if rates and head == "upernet":
        _upernet_of_intern_image(config, rates)
    elif not is_vit:
        config.optim.layer_decay = rates.pixels if rates else 1.0  # [R] for InternImage-H
    if head == "mask2former":
        _mask2former(config, rates, is_vit=is_vit, multi_scale=multi_scale)
    continue_dense_run(config, from_=from_, flag="configs/transfer/ade20k.py:from")
    return config
