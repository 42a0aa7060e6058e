"""Scaling rules: values of the open settings from the batch, the length of the run, the encoder and
the image size; and warnings about runs that are too short to learn.

The paper's values are for runs of 500 million samples. On a few thousand images the same values, or
values lowered in proportion to the batch, change nothing: the learning rates of all steps sum to
less than the initial weights, and the target encoder keeps its initial weights. The rules were
fitted to measurements (tests/data/tables/scaling.md) and equal the paper's values at the paper's
batch and length. A setting that is not open is never changed.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.models import backbones
from m3i_jax.models.transfer import FINETUNING, IMAGENET, Reference
from m3i_jax.objective import terms
from m3i_jax.training import optimizer, plan
from m3i_jax.training.update_rules import update_rule

MIN_LR_SUM = 0.03  # initial matrices have a std of 0.1 at width 96, 0.04 at 768
_SUMMED = 4097  # steps of which the rates are summed
SHORT_RUN = 1e6  # samples up to which a run has the weakest augmentation
EVAL_EVERY = schema.Train().eval_every
# settings that may be open, and the value that means open
OPEN: dict[str, Any] = {
    "optim.lr": 0.0,
    "optim.ema": -1.0,
    "optim.warmup_epochs": -1.0,
    "optim.layer_decay": 0.0,
    "data.crop_scale": (),
    "data.augment.jitter_p": -1.0,
    "data.augment.grayscale_p": -1.0,
    "data.augment.blur_p": (),
    "data.augment.blur_sigma": (),
    "data.augment.solarize_p": (),
    "data.augment.erase_p": -1.0,
    "data.augment.blend_p": -1.0,
    "data.rand_augment.p": -1.0,
    "train.eval_every": -1,
    "train.panel_every": -1,
}


# M3I's ablations, the shortest runs with the values of Table 7
PRETRAINING = Reference(lr=1e-3, batch=4096, samples=400.0 * IMAGENET, most=4e-3)


def scaling_strength(reference: Reference, samples: float) -> float:
    """Returns the share of the reference's augmentation strength: 0 up to SHORT_RUN samples, 1 from
    the reference's number of samples, linear in the logarithm between.

    >>> [round(scaling_strength(PRETRAINING, n), 2) for n in (6e4, 1e6, 2e7, 1e9)]
    [0.0, 0.0, 0.48, 1.0]
    """
    return min(
        1.0, max(0.0, math.log(samples / SHORT_RUN) / math.log(reference.samples / SHORT_RUN))
    )


def scaled_lr(reference: Reference, *, batch: int, samples: float, width: int) -> float:
    """Peak learning rate of AdamW: `lr * sqrt(batch / batch0) * (samples0 / samples)^0.4`, with
    each factor only below the reference's value; at most `most * (96 / width)^(2/3)` in runs of up
    to SHORT_RUN samples and `lr` in those of the reference, geometric between (`scaling_strength`).

    Args:
      reference: lr, batch0, samples0 and most.
      batch, samples: images of a step and of the run.
      width: of the encoder.

    >>> runs = ((4096, 6e8), (40_000, 1.3e10), (256, 6e8))
    >>> [round(scaled_lr(PRETRAINING, batch=b, samples=n, width=768), 6) for b, n in runs]
    [0.001, 0.001, 0.00025]
    >>> [round(scaled_lr(PRETRAINING, batch=64, samples=n, width=96), 4) for n in (6e4, 1e6, 1e7)]
    [0.004, 0.0015, 0.0006]
    >>> [round(scaled_lr(FINETUNING, batch=64, samples=6e4, width=w), 5) for w in (96, 768)]
    [0.001, 0.00025]
    """
    scaled = reference.lr * math.sqrt(min(1.0, batch / reference.batch))
    scaled *= max(1.0, reference.samples / samples) ** 0.4
    short = reference.most * (96 / width) ** (2 / 3)
    return min(scaled, short * (reference.lr / short) ** scaling_strength(reference, samples))


def scaled_momentum(*, batch: int, steps: float, ema: float = 0.995) -> float:
    """Returns the initial momentum of the EMA target. Its memory of 1 / (1 - m) steps covers as
    many samples as the paper's at a batch of 4,096, but at most a twentieth of the run and at least
    ten steps.

    >>> runs = ((4096, 125_000), (1024, 2e6), (64, 924), (64, 50))
    >>> [round(scaled_momentum(batch=b, steps=s), 6) for b, s in runs]
    [0.995, 0.99875, 0.978355, 0.9]
    """
    return 1 - min(0.1, max((1 - ema) * min(1.0, batch / PRETRAINING.batch), 20 / steps))


def scaled_crop_scale(share: float, *, size: int) -> tuple[float, float]:
    """Returns the range of a crop's area as a share of the image. The lower end is 0.5 at strength
    0 and the reference's 0.08 at strength 1, and leaves at least 16 pixels a side, unless half of
    the image has fewer.

    >>> scaled_crop_scale(1.0, size=224), scaled_crop_scale(0.0, size=224)
    ((0.08, 1.0), (0.5, 1.0))
    >>> scaled_crop_scale(1.0, size=32)
    (0.25, 1.0)
    """
    return round(max(0.5 * (0.08 / 0.5) ** share, min(0.5, (16 / size) ** 2)), 4), 1.0


def scaled_blur_sigma(size: int) -> tuple[float, float]:
    """Returns the range of the blur in pixels, in proportion to the image: 0.1 to 2 of 224.

    >>> scaled_blur_sigma(224), scaled_blur_sigma(32)
    ((0.1, 2.0), (0.0143, 0.2857))
    """
    return round(0.1 * size / 224, 4), round(2 * size / 224, 4)


def scaled_eval_every(*, steps: float, epoch: float) -> int:
    """Returns the steps between evaluations: an eighth of a short run, so that its curves have a
    shape, at least two epochs, since an evaluation encodes the training images once, and at most
    those of a long run.

    Args:
      steps, epoch: steps of the run and of an epoch.

    >>> runs = ((4452, 87.5), (1000, 300), (2_000_000, 5005), (100_000, 97_000))
    >>> [scaled_eval_every(steps=steps, epoch=epoch) for steps, epoch in runs]
    [557, 600, 5000, 5000]
    """
    return max(1, min(EVAL_EVERY, math.ceil(max(steps / 8, 2 * epoch))))


def reference(config: schema.Config) -> Reference:
    """Returns the published run from which a configuration is scaled."""
    if not any(name in terms.TRANSFER for name in config.objective.forms):
        return PRETRAINING
    if not config.init_from:
        return dataclasses.replace(FINETUNING, most=PRETRAINING.most)
    return backbones.get_backbone(config.model).finetuning.reference


def fill_open_settings(config: schema.Config) -> schema.Config:
    """Returns the configuration with values for its open settings. `data.size` must be known.

    Raises:
      UserError: the learning rate is open, and AdamW's do not fit `optim.rule`; or the one that
        follows is below `optim.min_lr`, so that it would rise.

    >>> optim, train = schema.Optim(lr=0.0, ema=-1.0), schema.Train(epochs=400.0)
    >>> config = schema.Config(data=schema.Data(size=IMAGENET), optim=optim, train=train)
    >>> filled = fill_open_settings(config).optim; filled.lr, filled.ema
    (0.001, 0.995)
    """
    t, size, known = config.train, config.data.image_size, reference(config)
    samples = float(t.steps * t.batch_size or max(t.epochs * config.data.size, t.batch_size))
    share, steps = scaling_strength(known, samples), samples / t.batch_size
    width = config.model.encoder.width
    decay = backbones.get_backbone(config.model).finetuning.layer_decay(config.model)
    lr = scaled_lr(known, batch=t.batch_size, samples=samples, width=width)
    eval_every = scaled_eval_every(steps=steps, epoch=config.data.size / t.batch_size)
    values = {
        "optim.lr": float(f"{lr:.4g}"),
        "optim.ema": round(scaled_momentum(batch=t.batch_size, steps=steps), 7),
        "optim.layer_decay": round(decay**share, 4),
        "data.crop_scale": scaled_crop_scale(share, size=size),
        "data.augment.jitter_p": round(0.8 * share, 4),
        "data.augment.grayscale_p": round(0.2 * share, 4),
        "data.augment.blur_p": (round(share, 4), round(0.1 * share, 4)),
        "data.augment.blur_sigma": scaled_blur_sigma(size),
        "data.augment.solarize_p": (0.0, round(0.2 * share, 4)),
        "data.augment.erase_p": round(0.25 * share, 4),
        "data.augment.blend_p": round(share, 4),
        "data.rand_augment.p": round(0.5 * share, 4),
        "optim.warmup_epochs": 0.1 * samples / max(config.data.size, 1),
        "train.eval_every": eval_every,
        "train.panel_every": eval_every,
    }
    missing = open_settings(config)
    if "optim.lr" in missing and not update_rule(config.optim.rule).rates_of_adam:
        raise UserError(
            f"config.optim.lr: 0 takes a learning rate that was measured with AdamW, which does not"
            f" fit optim.rule={config.optim.rule}; set optim.lr"
        )
    for key in missing:
        config = _with(config, key.split("."), values[key])
    o = config.optim
    if o.min_lr > o.lr:  # what is given is compared where it is read
        raise UserError(
            f"config.optim.min_lr: {o.min_lr!r} exceeds the learning rate that follows from batch"
            f" and length, {o.lr!r}; lower it, or set optim.lr"
        )
    return config


def summed_rates(optim: schema.Optim, *, steps: int, warmup: int) -> float:
    """Returns the sum of the learning rates of all steps of a run, whatever its schedule; of runs
    of more than a few thousand steps from some of them, in equal distances.

    >>> constant = schema.Optim(lr=0.5, schedule="constant")
    >>> [summed_rates(each, steps=8, warmup=0) for each in (constant, schema.Optim(lr=0.5))]
    [4.0, 2.25]
    """
    at = np.linspace(0, steps - 1, min(steps, _SUMMED))
    rates = jax.vmap(optimizer.lr_schedule(optim, steps=steps, warmup=warmup))(at)
    return float(np.asarray(rates, np.float64).mean() * steps)


def scaling_warnings(config: schema.Config, *, steps: int, warmup: int) -> list[str]:
    """Warnings if the learning rate is too small to change the weights, or the momentum too large
    to change the target, within the length of the run, and of settings that the schedule of the
    learning rate does not read.

    Args:
      config: settings without open ones.
      steps, warmup: length of the run and of its warm-up.
    """
    o = config.optim
    warnings = optimizer.unread_settings(o)
    lr_sum = f"{summed_rates(o, steps=steps, warmup=warmup):.2g}"
    bounded = update_rule(o.rule).bounded and not config.model.encoder.freeze
    if bounded and float(lr_sum) < MIN_LR_SUM:
        warnings.append(
            f"warning: optim.lr={o.lr:.3g}: the learning rates of all {steps:,} steps sum to"
            f" {lr_sum}, the most by which AdamW can change a weight; runs below {MIN_LR_SUM}"
            " hardly learned. Use the scaling rule (optim.lr=0), raise it, or train longer"
        )
    updates = (1 - o.ema) * steps * (0.5 if o.ema_schedule == "cosine" else 1.0)
    averages = o.ema_of == "all" and o.averages
    if config.traits.views:
        passes = plan.build_plan(config).target_passes
        averages |= any(view.encoder == "ema" for view in passes)
    if averages and updates < 1:
        memory = 1 / max(1 - o.ema, 1e-12)
        left = f"{math.exp(-updates):.0%}"
        warnings.append(
            f"warning: optim.ema={o.ema:.6g}: the memory of the average, {memory:,.0f} steps, is"
            f" too long for a run of {steps:,}: at its end {left} of the average are the initial"
            " weights. Use the scaling rule (optim.ema=-1), lower it, or train longer"
        )
    return warnings


def open_settings(config: schema.Config) -> list[str]:
    """Keys of the open settings of a configuration."""
    return [key for key, value in OPEN.items() if _read(config, key) == value]


def _read(node: Any, key: str) -> Any:
    for part in key.split("."):
        node = getattr(node, part)
    return node


def _with(node: Any, path: list[str], value: Any) -> Any:
    first, *rest = path
    return dataclasses.replace(
        node, **{first: _with(getattr(node, first), rest, value) if rest else value}
    )
