"""The registry of backbones: every kind of encoder that a run can have, by its name in
`model.backbone`.

A backbone of another project, without a fork:

    backbones.register_backbone("my_mlp", Backbone(init=..., apply=..., presets=..., ...))

in the configuration file, or in a module that it imports. `model.backbone=my_mlp` then trains it
with every objective. A program that reads the run later (evaluation, `m3i_jax.load`) imports the
same module first.
"""

import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np

from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.models import layers
from m3i_jax.models.backbone import Backbone
from m3i_jax.models.intern_image_backbone import INTERN_IMAGE
from m3i_jax.models.vit_backbone import VIT
from m3i_jax.parallel import sharding

_BACKBONES: dict[str, Backbone] = {}


def register_backbone(name: str, backbone: Backbone) -> Backbone:
    """Make a backbone known under a name, and its presets and sharding rules with it.

    Registering the same value again changes nothing, so that a module may be imported twice.

    Args:
      name: value of `model.backbone`: letters, digits and underscores.
      backbone: the value. Its presets need not set `backbone`.

    Returns:
      The backbone.

    Raises:
      ValueError: the name or one of the presets' names belongs to another backbone, or the name has
        other characters.

    >>> register_backbone("vit", VIT) is get_backbone(schema.Model())
    True
    """
    if not name.isidentifier():
        raise ValueError(f"backbone {name!r}: a name consists of letters, digits and underscores")
    if _BACKBONES.get(name, backbone) is not backbone:
        raise ValueError(f"backbone {name!r} exists already; choose another name")
    for other, known in _BACKBONES.items():
        if other != name and (shared := known.presets.keys() & backbone.presets.keys()):
            raise ValueError(
                f"backbone {name!r}: preset {min(shared)!r} belongs to {other}; choose another name"
            )
    sharding.add_rules(backbone.sharding_rules)
    return _BACKBONES.setdefault(name, backbone)


register_backbone("vit", VIT)
register_backbone("intern_image", INTERN_IMAGE)


def registered_backbones() -> dict[str, Backbone]:
    """Returns all backbones by name.

    >>> {"vit", "intern_image"} <= registered_backbones().keys()
    True
    """
    return dict(_BACKBONES)


def get_backbone(model: schema.Model) -> Backbone:
    """Returns the backbone of these settings.

    Raises:
      UserError: no backbone has the name `model.backbone`.

    >>> get_backbone(schema.Model()).describe(schema.Model())
    '12 blocks of 768'
    """
    if model.backbone in _BACKBONES:
        return _BACKBONES[model.backbone]
    near = difflib.get_close_matches(model.backbone, _BACKBONES, 1)
    hint = f"did you mean {near[0]}?" if near else "import the module that registers it"
    raise UserError(
        f"config.model.backbone: {model.backbone!r} is not one of {', '.join(_BACKBONES)}; {hint}"
    )


def validate_backbone(config: schema.Config) -> None:
    """Raise UserError for the first setting that the backbone of a configuration cannot work with.

    >>> validate_backbone(schema.Config())
    """
    get_backbone(config.model).validate(config)


def recognize_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Returns settings of an encoder by its parameters, as of `Backbone.recognize`; {} for none
    that is known.

    Args:
      shapes: {path below the encoder: shape}.

    >>> recognize_weights({"patch_embed/kernel": (768, 768)})["backbone"], recognize_weights({})
    ('vit', {})
    """
    matches = (backbone.recognize(shapes) for backbone in _BACKBONES.values())
    return next((settings for settings in matches if settings is not None), {})


def section_names() -> tuple[str, ...]:
    """Sections of `model` that belong to one backbone.

    >>> section_names()
    ('intern_image',)
    """
    return tuple(name for backbone in _BACKBONES.values() for name in backbone.sections)


def backbone_drop_rates(model: schema.Model) -> np.ndarray:
    """Returns the rate of stochastic depth of every layer, [L] float32.

    >>> backbone_drop_rates(schema.Model(encoder=schema.Encoder(depth=3, drop_path=0.25))).tolist()
    [0.0, 0.125, 0.25]
    """
    return layers.linear_drop_rates(
        get_backbone(model).depth(model), model.encoder.drop_path, model.encoder.drop_path_rule
    )
