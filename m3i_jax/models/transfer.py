"""How published runs train an encoder for other tasks, as values: what a backbone states of itself,
and recipes and scaling rules read. [P] marks the paper, [R] the reference of an encoder.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from m3i_jax import schema

IMAGENET = 1_281_167  # training images of ImageNet-1k


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """A published run that the scaling rules reproduce.

    Attributes:
      lr: peak learning rate.
      batch: images a step.
      samples: images of the run.
      most: highest learning rate of a short run at width 96.
    """

    lr: float
    batch: int
    samples: float
    most: float


FINETUNING = Reference(lr=2e-3, batch=1024, samples=100.0 * IMAGENET, most=1e-3)  # [P]: Table 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetuning:
    """How an encoder is fine-tuned on categories. The defaults are those of the paper's ViT.

    Attributes:
      reference: the run with pre-trained weights from which learning rates are scaled.
      epochs: its length.
      warmup_epochs: at most, with pre-trained weights.
      layer_decay: settings of `model` -> decay of learning rates by layer in a run of this length.
      drop_path: settings of `model` -> stochastic depth of the last layer, linear from 0.
      settings: {key: value} where they differ from those of the ViT.
    """

    reference: Reference = FINETUNING
    epochs: float = 100.0
    warmup_epochs: float = 5.0
    layer_decay: Callable[[schema.Model], float] = lambda _: 0.65
    drop_path: Callable[[schema.Model], float] = lambda _: 0.1
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseRates:
    """How a size of an encoder is trained on dense tasks by its own authors.

    Attributes:
      drop_path: rate of its last layer, rising linearly from 0; of detectors and segmenters.
      boxes, pixels: layer decay of detectors with an FPN, and of segmenters.
      queries: layer decay of DINO.
      pixel_lr: factor of the learning rate of UperNet, and pixel_clip: its gradient norm.
      large: whether heads have the sizes and images of InternImage-H.
    """

    drop_path: float
    boxes: float = 1.0
    pixels: float = 1.0
    queries: float = 0.9
    pixel_lr: float = 1.0
    pixel_clip: float = 0.0
    large: bool = False
