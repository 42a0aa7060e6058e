"""Settings of the network that its backbone and its positions do not read."""

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

import ml_collections

from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.models import backbones


def _unused(model: Any) -> Iterator[tuple[str, str]]:
    """(key, why nothing reads it) of the settings that this network does not read, changed or
    not."""
    backbone = backbones.get_backbone(model)
    for section in backbones.section_names():
        if section not in backbone.sections:
            for field in dataclasses.fields(getattr(schema.Model(), section)):
                yield f"model.{section}.{field.name}", f"model.backbone={model.backbone}"
    if backbone.resizes_positions:  # others say themselves what they read
        rope = model.encoder.positions == "rope"
        key = "position_grid" if rope else "rope_base"
        yield f"model.encoder.{key}", f"model.encoder.positions={model.encoder.positions}"


def unread_model_settings(config: schema.Config) -> frozenset[str]:
    """Returns the settings of the network that this network does not read, whatever they are.

    >>> "model.encoder.rope_base" in unread_model_settings(schema.Config())
    True
    """
    model = config.model
    keys = {key for key, _ in _unused(model)}
    if not (model.encoder.cls_token and backbones.get_backbone(model).has_cls_token):
        keys.add("model.decoder.cls")
    return frozenset(keys)


def unused_model_settings(
    config: schema.Config | ml_collections.ConfigDict,
) -> dict[str, tuple[Any, Any, str]]:
    """Returns {key: (value, default, why nothing reads it)} of the settings of the network that
    differ from their defaults and have no effect.

    >>> encoder = schema.Encoder(rope_base=50.0)
    >>> unused_model_settings(schema.Config(model=schema.Model(encoder=encoder)))
    {'model.encoder.rope_base': (50.0, 100.0, 'model.encoder.positions=sincos')}
    """
    plain = schema.Config()
    values = {
        key: (*(operator.attrgetter(key)(each) for each in (config, plain)), why)
        for key, why in _unused(config.model)
    }
    return {key: found for key, found in values.items() if found[0] != found[1]}


def reject_unused_model_settings(config: schema.Config) -> None:
    """Refuse a setting that the network of a run does not read.

    Raises:
      UserError: with the setting, why it does nothing, and its default.

    >>> reject_unused_model_settings(schema.Config())
    """
    for key, (value, default, why) in unused_model_settings(config).items():
        raise UserError(
            f"config.{key}: {value!r} has no effect with {why}; leave it at {default!r}"
        )


def reset_unused_model_settings(config: ml_collections.ConfigDict) -> None:
    """Give their defaults to the settings that the network of a configuration does not read: those
    of another run, which may be of a version that accepted them. Changes it in place."""
    unused = unused_model_settings(config)
    config.update_from_flattened_dict({key: default for key, (_, default, _) in unused.items()})
