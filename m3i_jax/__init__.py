"""M3I Pre-training (CVPR 2023) in JAX.

For other projects, the pure functions of the objective, which need jax, numpy, optax and chex:

    from m3i_jax import gaussian, boltzmann, category, text     # posteriors: (sum, count)
    from m3i_jax import smooth_l1, cosine, nt_xent, prototypes  # those of other public methods
    from m3i_jax import koleo, sigreg, variance_covariance      # entropy terms
    from m3i_jax import blockwise, mix, split, gather, partner  # masks and mixing
    from m3i_jax import sincos_2d, relative_positions           # positions
    from m3i_jax import track_balance, balance_weight, track_target  # optax transforms
    from m3i_jax import register_form                           # an objective of your own
    from m3i_jax import box_iou, encode_boxes, anchors, nms     # boxes of dense tasks
    from m3i_jax import sigmoid_focal, dice, miou               # their losses and scores

    from m3i_jax import roi_align, paste_masks                  # maps read at boxes; need flax
    from m3i_jax import deformable_attention                    # and at places of every query
    from m3i_jax import ViT, InternImage, DCNv3, dcnv3          # networks as plain functions and as
                                                                # modules of flax Linen and NNX

and, of the whole package, an encoder as a function of images:

    m3i_jax.load("runs/first").features(images)  # or "hf://OWNER/NAME", or a file of weights

Everything is imported on first use.
"""

import importlib
import warnings
from typing import Any

from m3i_jax.version import __version__

# {module of m3i_jax.objective: its public names}
_PUBLIC = {
    "losses": (
        "boltzmann",
        "category",
        "gaussian",
        "layer_normalize",
        "patch_normalize",
        "second_moment",
        "text",
    ),
    "regression_losses": ("cosine", "smooth_l1", "squared_error", "token_similarity"),
    "entropy": (
        "SIGREG_FLOOR",
        "coding_rate",
        "koleo",
        "moment_energy",
        "nearest_entropy",
        "sigreg",
        "sphere_log_area",
        "uniformity_loss",
        "variance_covariance",
        "variance_covariance_sums",
    ),
    "entropy_terms": ("EntropyTerm",),
    "sigmoid_pairs": ("text_sigmoid", "text_sigmoid_sums"),
    "caption_posterior": ("caption",),
    "contrastive": (
        "assignments",
        "barlow_twins",
        "densecl",
        "dense_boltzmann",
        "nt_xent",
        "prototypes",
    ),
    "information": ("MARGINALS", "category_bits", "gaussian_bits", "softmax_bits"),
    "collapse": ("alignment", "effective_rank", "centered_energy", "target_std", "uniformity"),
    "masks": ("blockwise", "uniform"),
    "mixing": ("gather", "mix", "partner", "split", "unmix"),
    "positions": ("coordinates", "same_view_positions", "relative_positions", "sincos_2d"),
    "balance": ("feature_norm", "track_balance", "balance_weight"),
    "ema": ("cosine_momentum", "track_target"),
    "posteriors": (),
    "prototype_targets": ("centering", "sinkhorn", "soft_cross_entropy", "track_centers"),
    "published": ("PUBLISHED",),
    "terms": ("FORMS", "Pass", "Target", "Term"),
    "registry": ("register_form",),
    "boxes": (
        "anchors",
        "box_area",
        "box_iou",
        "clip_boxes",
        "decode_boxes",
        "encode_boxes",
        "generalized_box_iou",
        "nms",
    ),
    "assignment": ("hungarian", "match_boxes", "sample_labels"),
    "dense_losses": (
        "binary_cross_entropy",
        "dice",
        "federated_categories",
        "federated_cross_entropy",
        "pixel_cross_entropy",
        "sigmoid_focal",
    ),
    "segmentation_scores": ("confusion_matrix", "miou"),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
# {name before version 0.2: name now}
_RENAMED = {
    # modules
    "posterior": "losses",
    "regression": "regression_losses",
    "contrast": "contrastive",
    "regularize": "collapse",
    "target": "ema",
    "families": "posteriors",
    "named": "published",
    "methods": "terms",
    # functions and tables
    "decorrelation": "barlow_twins",
    "dense_against": "densecl",
    "spread": "centered_energy",
    "identity": "same_view_positions",
    "relative": "relative_positions",
    "weight": "balance_weight",
    "METHODS": "PUBLISHED",
}

# {public name: (module of m3i_jax.models, its name there)}; they need flax
_MODELS = {
    **{
        name: ("dense.map_sampling", name)
        for name in ("roi_align", "multilevel_roi_align", "paste_masks", "mask_targets")
    },
    "deformable_attention": ("dense.deformable_attention", "deformable_attention"),
    "dcnv3": ("dcnv3", "dcnv3"),
    "ViT": ("networks", "ViT"),
    "InternImage": ("networks", "InternImage"),
    "DCNv3": ("networks", "DCNv3"),
}

__all__ = ["__version__", *_PUBLIC, *_HOME]  # without `load`: a star import stays light


def __getattr__(name: str) -> Any:
    if name == "load":
        importlib.import_module("m3i_jax.installation").require_program("m3i_jax.load")
        return importlib.import_module("m3i_jax.evaluation.load").load
    if name in _MODELS:
        module, defined = _MODELS[name]
        return getattr(importlib.import_module(f"m3i_jax.models.{module}"), defined)
    if name in _RENAMED:
        current = _RENAMED[name]
        warnings.warn(
            f"m3i_jax.{name} is now m3i_jax.{current}; the old name will be removed",
            DeprecationWarning,
            stacklevel=2,
        )
        return __getattr__(current)
    module = _HOME.get(name, name)
    if module not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    loaded = importlib.import_module(f"m3i_jax.objective.{module}")
    return getattr(loaded, name) if name in _HOME else loaded


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *_MODELS, "load"])
