"""Train a classifier on a frozen encoder: the linear probe of M3I's Table 9 with its augmentation,
or an attentive probe, with the trainer of pre-training. --mode=eval with
--config.evaluate.probe=true or --config.evaluate.attentive=true trains such probes on fixed views,
the linear one on the feature that the objective trains; lengths and rates are those of `evaluate.`.

    python -m m3i_jax.main --config configs/transfer/probe.py:path=DIR,from=RUN --workdir runs/probe
    python -m m3i_jax.main --config configs/transfer/probe.py:path=DIR,from=RUN,kind=attentive \\
      --workdir runs/attentive

[P] marks the paper's Table 9, [M] MAE and SiameseIM, [C] a choice of this project. Before the batch
norm, MAE has cls after the last norm, and SiameseIM the mean of the tokens after a norm; here it is
the mean alone. The learning rate is proportional to the batch size. In training, batch norm uses
the statistics of the batch; in evaluation, the mean and variance over the unaugmented views of
evaluate.train_limit training images instead of a running average.
"""

from ml_collections import ConfigDict

from m3i_jax.config import default_config
from m3i_jax.errors import UserError
from m3i_jax.evaluation.load import build_encoder
from m3i_jax.models import presets

BATCH = 16_384  # [P]


def get_config(
    path: str = "",
    from_: str = "",
    kind: str = "linear",
    model: str = "vit_b16",
    source: str = "folder",
    epochs: float = 90.0,
    batch_size: int = 0,
) -> ConfigDict:
    """Settings of a probe.

    Args:
      path: the images, one folder per class.
      from_: working directory of the run that trained the encoder, or a weights file.
      kind: linear or attentive.
      model: preset, used without `from`.
      source: kind of the source.
      epochs: passes over the images.
      batch_size: 0: 16,384, or 1,024 for an attentive probe; at most the number of images.
    """
    if kind not in ("linear", "attentive"):
        raise UserError(f"configs/transfer/probe.py: kind={kind} is not one of linear, attentive")
    config, linear = default_config(), kind == "linear"
    if from_:
        build_encoder(config, from_, "configs/transfer/probe.py:from")
    else:
        config.model.update(presets.preset(model))
    config.data.source = source
    config.data.path = path
    config.data.captions = "no"
    config.data.threads = 4
    # [P]: crop and flip
    config.data.augment.update(
        {"jitter_p": 0.0, "grayscale_p": 0.0, "blur_p": (0.0, 0.0), "solarize_p": (0.0, 0.0)}
    )
    config.objective.forms = ("supervised",)
    config.objective.label_smoothing = 0.0  # [M]
    config.model.encoder.freeze = True
    config.model.encoder.drop_path = 0.0
    if linear:
        # [P]: batch norm without scale and offset
        config.model.pool.update({"kind": "mean", "norm": "batch", "projection": False})
        config.model.category_std = 0.01  # [M]
    else:
        # [C]: a learned query as in CAE's attentive probe, which reads cls, too, and has SGD
        config.model.pool.update({"kind": "attention", "query": "learned"})
    batch = batch_size or (BATCH if linear else 1024)
    config.train.batch_size = batch
    config.train.epochs = epochs  # [P]
    config.train.panel_every = 0
    config.optim.rule = "lars" if linear else "adamw"  # [P]; attentive [C]
    # [P]; attentive: 1e-3 at 1,024 images [C]
    config.optim.lr = (3.2 if linear else 16e-3) * batch / BATCH
    config.optim.warmup_epochs = epochs / 9  # [P]: 10 of 90
    config.optim.weight_decay = 0.0 if linear else 0.05  # [P]; attentive [C]
    config.optim.clip = 0.0  # [M]
    config.optim.ema = 1.0
    config.optim.ema_schedule = "constant"
    config.evaluate.query_limit = 50_000  # [M]: all validation images of ImageNet
    config.evaluate.knn = False
    return config
