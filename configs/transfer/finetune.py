"""Fine-tune an encoder on categories: M3I's Table 8 on any source, with the trainer of
pre-training.

    python -m m3i_jax.main --config configs/transfer/finetune.py:path=DIR,from=RUN \\
      --workdir runs/finetuned
    python -m m3i_jax.main --config configs/transfer/finetune.py:path=/data/imagenet,from=RUN \\
      --config.data.split=train --config.data.holdout_split=val --workdir runs/finetuned

`from` is the working directory of a run or a weights file that `init_from` reads (timm, Hugging
Face, MAE and others). Its model, image size and pixel mean and deviation are adopted, and its
encoder initialises this run. [P] marks the paper's Table 8, [M] MAE and SiameseIM, whose recipe it
is, [C] a choice of this project.

Learning rate, layer decay, crops, mixup and CutMix, erasing and RandAugment, which the paper chose
for 128 million samples, follow here from the number of samples and the batch (training/scaling.py).
ImageNet with the paper's batch and epochs gets the paper's values; 6,000 images get weaker
augmentation and another rate (configs/README.md). --mode=show prints the values.

With another image size, positions are computed for the grid of the pre-trained model and resized.
`ema` below 1 also keeps an average of all parameters, which --config.evaluate.encoder=ema
evaluates.
"""

from ml_collections import ConfigDict

from m3i_jax.config import default_config
from m3i_jax.evaluation.load import build_encoder
from m3i_jax.models import backbones, presets, vit

BATCH = 1024  # [P]


def get_config(
    path: str = "",
    from_: str = "",
    model: str = "vit_b16",
    source: str = "folder",
    epochs: float = 0.0,
    batch_size: int = BATCH,
    image_size: int = 0,
    ema: float = 1.0,
) -> ConfigDict:
    """Settings of a fine-tuning run.

    Args:
      path: the images, one folder per class.
      from_: working directory of the run that trained the encoder, or a weights file; empty: train
        from scratch.
      model: preset, used without `from`.
      source: kind of the source.
      epochs: 0: the paper's.
      batch_size: images per step.
      image_size: 0: that of the run.
      ema: momentum of the average of all parameters; 1: no average.
    """
    config = default_config()
    if from_:
        build_encoder(config, from_, "configs/transfer/finetune.py:from")
    else:
        config.model.update(presets.preset(model))
    backbone = backbones.get_backbone(config.model)
    own = backbone.finetuning
    if image_size and image_size != config.data.image_size:
        if backbone.resizes_positions and config.model.encoder.positions != "rope":
            config.model.encoder.position_grid = (
                vit.position_size(config) // config.model.encoder.patch_size
            )
        config.data.image_size = image_size

    # Data.
    config.data.source = source
    config.data.path = path
    config.data.captions = "no"
    config.data.threads = 4
    config.data.crop_scale = ()  # (0.08, 1) [M] in long runs
    config.data.rand_augment.update({"ops": 2, "p": -1.0})  # [P: 9 / 0.5]; p 0.5 in long runs
    # [M]
    config.data.augment.update(
        {"jitter_p": 0.0, "grayscale_p": 0.0, "blur_p": (0.0, 0.0), "solarize_p": (0.0, 0.0)}
    )
    config.data.augment.erase_p = -1.0  # 0.25 [P] in long runs
    config.data.augment.blend_p = -1.0  # 1 [M] in long runs
    # [P]; Table 8's probability is the alpha of the Beta distribution [M]
    config.data.augment.mixup = 0.8
    config.data.augment.cutmix = 1.0  # [P]; the same

    # Head: mean of the patch tokens, normalised, and a linear layer.
    config.objective.forms = ("finetune",)
    config.objective.label_smoothing = 0.1  # [P]
    config.model.pool.kind = "mean"  # [M]
    config.model.pool.projection = False
    config.model.category_std = 2e-5  # [M]
    config.model.encoder.drop_path = own.drop_path(config.model)  # [P]; L and H [M]
    config.model.encoder.drop_path_rule = "linear"  # [M]
    config.model.encoder.final_norm = False  # [M]: replaced by the norm of the pooled token
    config.model.encoder.freeze_patch_embed = False

    # Optimization.
    config.train.batch_size = batch_size
    config.train.epochs = epochs or own.epochs  # [P]: 100, InternImage-H 30
    config.train.panel_every = 0
    config.train.eval_every = -1
    config.optim.lr = 0.0  # 2e-3 [P] in long runs at the paper's batch
    config.optim.min_lr = 1e-6  # [M]
    # [P]; at most a tenth of a shorter run [C]
    config.optim.warmup_epochs = min(5.0, 0.1 * config.train.epochs)
    config.optim.weight_decay = 0.1  # [P]
    config.optim.b2 = 0.999  # [P]
    config.optim.layer_decay = 0.0  # 0.65 [P] in long runs; from 24 blocks on 0.75 [M]
    config.optim.clip = 0.0  # [M]
    config.optim.ema = ema
    config.optim.ema_schedule = "constant"
    config.optim.ema_of = "all" if ema < 1 else "targets"
    config.update_from_flattened_dict(own.settings)
    if from_:
        config.optim.warmup_epochs = min(own.warmup_epochs, config.optim.warmup_epochs)

    if config.data.image_size > 224:
        config.evaluate.crop = 1.0  # [M]
    config.evaluate.query_limit = 50_000  # [M]: all validation images of ImageNet
    config.evaluate.knn = False  # the head's accuracy is evaluated instead
    return config
