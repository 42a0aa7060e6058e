"""The objective of M3I Pre-training (section 3 of the paper) and the boxes, labels and losses of
dense tasks as pure functions of arrays, for this project and for others.

- `losses`: -log of the posteriors: Gaussian, Boltzmann, category, text
- `regression_losses`: smooth L1 and cosine
- `contrastive`: losses that compare the images of a batch: dense InfoNCE, NT-Xent, Barlow Twins,
  prototypes
- `sigmoid_pairs`: the sigmoid loss of images and captions, by a ring over devices
- `caption_posterior`: cross-entropy of the tokens of captions
- `prototype_targets`: soft assignments to prototypes: what balances them, and their loss
- `posteriors`: all of these as values
- `entropy`: estimators of the entropy as losses: KoLeo, VICReg, SIGReg, uniformity, coding rate
- `entropy_terms`: these as values, and as terms of an objective
- `terms`: the rows of the paper's Table 1 as data
- `published`, `published_recent`, `published_terms`: public methods where they differ from those
  rows, those younger than the paper, and what several of them share
- `derived_terms`: objectives made of others: rows together, small views, teachers
- `registry`: all objectives by name; `register_form` adds one from outside
- `information`: the bound of Eq. 2 in bits
- `collapse`: monitors of collapsing targets
- `masks`: which cells of a mixed input show which image (numpy, host)
- `rng`: uniform numbers and permutations keyed by stream position (numpy, host)
- `mixing`: pair, mix and un-mix
- `positions`: sin-cos positions, absolute and relative to the input view
- `balance`: lambda of Eq. 13 as an optax transform
- `ema`: the momentum target encoder as an optax transform
- `boxes`: overlaps, the codec of box regression, anchors, non-maximum suppression
- `assignment`: labels of anchors by IoU, random samples of fixed size, optimal assignment
- `box_matching`: predicted boxes and objects as sets (DETR): cost, matching, losses
- `mask_matching`: predicted masks and true ones as sets (Mask2Former): cost, matching, losses at
  points
- `dense_losses`: losses of segmentation and detection
- `segmentation_scores`: confusion matrix and mean IoU

This package imports jax, numpy, optax and chex, and of the project `m3i_jax.registries` alone, for
`register_form`. Submodules are loaded on first use, so that a data worker that only draws masks
never imports JAX.
"""

import importlib
from types import ModuleType

__all__ = [
    "balance",
    "caption_posterior",
    "contrastive",
    "derived_terms",
    "entropy",
    "entropy_terms",
    "posteriors",
    "sigmoid_pairs",
    "information",
    "masks",
    "rng",
    "terms",
    "mixing",
    "prototype_targets",
    "published",
    "published_recent",
    "published_terms",
    "positions",
    "losses",
    "registry",
    "regression_losses",
    "collapse",
    "ema",
    "boxes",
    "assignment",
    "box_matching",
    "mask_matching",
    "dense_losses",
    "segmentation_scores",
]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
