"""m3i_jax: M3I Pre-training (CVPR 2023) in JAX. What other projects import are the pure functions
of the objective:

    from m3i_jax import gaussian, boltzmann, category, text         # posteriors: (sum, count) from
    m3i_jax import smooth_l1, cosine, nt_xent, prototypes      # those of other public methods from
    m3i_jax import blockwise, mix, split, gather, partner      # masks and mixing from m3i_jax
    import sincos_2d, relative                         # positions from m3i_jax import
    track_balance, weight, track_target         # optax transforms from m3i_jax import register_form
    # an objective of your own, for objective.forms

They need jax, numpy, optax and chex, and are loaded on first use. And, of the whole package,
weights as a function of images:

    m3i_jax.load("runs/first").features(images)
"""

import importlib
from typing import Any

from m3i_jax.version import __version__

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
    "regression_losses": ("cosine", "smooth_l1"),
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
    "published": ("PUBLISHED",),
    "terms": ("FORMS", "Pass", "Target", "Term"),
    "registry": ("register_form",),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = ["__version__", *_PUBLIC, *_HOME]  # without `load`: a star import stays light


def __getattr__(name: str) -> Any:
    if name == "load":
        return importlib.import_module("m3i_jax.evaluation.load").load
    module = _HOME.get(name, name)
    if module not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = importlib.import_module(f"m3i_jax.objective.{module}")
    return getattr(found, name) if name in _HOME else found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "load"])
