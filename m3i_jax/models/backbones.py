"""The registry of backbones: every kind of encoder that a run can have, by its name in
`model.backbone`.

A backbone of another project, without a fork:

    backbones.register_backbone("my_mlp", Backbone(init=..., apply=..., presets=..., ...))

in the configuration file, or in a module that it imports. `model.backbone=my_mlp` then trains it
with every objective. A program that reads the run later (evaluation, `m3i_jax.load`) imports the
same module first.
"""

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
from m3i_jax.registries import Registry, not_one_of

BACKBONES: Registry[Backbone] = Registry(
    "backbone",
    unknown=lambda name, names: UserError(
        "config.model.backbone: "
        + not_one_of(repr(name), names, "import the module that registers it")
    ),
)


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
    BACKBONES.check(name, backbone)
    for other, known in BACKBONES.as_dict().items():
        if other != name and (shared := known.presets.keys() & backbone.presets.keys()):
            raise ValueError(
                f"backbone {name!r}: preset {min(shared)!r} belongs to {other}; choose another name"
            )
    registered = BACKBONES.register(name, backbone)
    sharding.add_rules(registered.sharding_rules)
    return registered


register_backbone("vit", VIT)
register_backbone("intern_image", INTERN_IMAGE)


def registered_backbones() -> dict[str, Backbone]:
    """Returns all backbones by name.

    >>> {"vit", "intern_image"} <= registered_backbones().keys()
    True
    """
    return BACKBONES.as_dict()


def get_backbone(model: schema.Model) -> Backbone:
    """Returns the backbone of these settings.

    Raises:
      UserError: no backbone has the name `model.backbone`.

    >>> get_backbone(schema.Model()).describe(schema.Model())
    '12 blocks of 768'
    """
    return BACKBONES[model.backbone]


def validate_backbone(config: schema.Config) -> None:
    """Raise UserError for the first setting that the backbone of a configuration cannot work with.

    >>> validate_backbone(schema.Config())
    """
    backbone = get_backbone(config.model)
    backbone.validate(config)
    # readers of features skip a first token by this setting
    if config.model.encoder.cls_token and not backbone.has_cls_token:
        raise UserError(
            f"config.model.encoder.cls_token: {config.model.backbone} has no cls token; set it to"
            " false"
        )


def recognize_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Returns settings of an encoder by its parameters, as of `Backbone.recognize`; {} for none
    that is known.

    Args:
      shapes: {path below the encoder: shape}.

    >>> recognize_weights({"patch_embed/kernel": (768, 768)})["backbone"], recognize_weights({})
    ('vit', {})
    """
    matches = (backbone.recognize(shapes) for backbone in BACKBONES.values())
    return next((settings for settings in matches if settings is not None), {})


def section_names() -> tuple[str, ...]:
    """Sections of `model` that belong to one backbone.

    >>> section_names()
    ('intern_image',)
    """
    return tuple(name for backbone in BACKBONES.values() for name in backbone.sections)


def backbone_drop_rates(model: schema.Model) -> np.ndarray:
    """Returns the rate of stochastic depth of every layer, [L] float32.

    >>> backbone_drop_rates(schema.Model(encoder=schema.Encoder(depth=3, drop_path=0.25))).tolist()
    [0.0, 0.125, 0.25]
    """
    return layers.linear_drop_rates(
        get_backbone(model).depth(model), model.encoder.drop_path, model.encoder.drop_path_rule
    )
