"""Settings by which an encoder computes something else of the same arrays: what no shape shows."""

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

from m3i_jax import schema
from m3i_jax.models import backbones, vit

_ENCODER = "model.encoder."
POSITIONS, GRID = f"{_ENCODER}positions", f"{_ENCODER}position_grid"


def silent_settings(config: schema.Config) -> dict[str, Any]:
    """Returns {key: value in effect} of what an encoder computes beside its arrays: settings that
    it does not read are absent, and the grid of fixed positions is that for which they are made,
    whichever setting says so.

    >>> values = silent_settings(schema.Config(data=schema.Data(image_size=384)))
    >>> values["model.encoder.position_grid"], "model.encoder.rope_base" in values
    (24, False)
    """
    model, encoder = config.model, config.model.encoder
    backbone = backbones.get_backbone(model)
    out: dict[str, Any] = {"model.backbone": model.backbone}
    for name in backbone.silent_settings:
        if name != "rope_base" or encoder.positions == "rope":
            out[f"model.encoder.{name}"] = getattr(encoder, name)
    for section in backbone.sections:
        values = getattr(model, section)
        for field in dataclasses.fields(values):
            if field.name not in backbone.init_settings:
                out[f"model.{section}.{field.name}"] = getattr(values, field.name)
    if backbone.resizes_positions:
        out[POSITIONS] = encoder.positions
        if encoder.positions in vit.FIXED:  # the shape of a learned table shows its grid
            out[GRID] = vit.position_size(config) // encoder.patch_size
    return out


def setting_differences(theirs: schema.Config, ours: schema.Config) -> dict[str, tuple[Any, Any]]:
    """Returns {key: (value of another run, value of this one)} of the silent settings of the other
    run that this one does not have.

    >>> grid = schema.Config(model=schema.Model(encoder=schema.Encoder(position_grid=24)))
    >>> setting_differences(grid, schema.Config())
    {'model.encoder.position_grid': (24, 14)}
    >>> setting_differences(grid, schema.Config(data=schema.Data(image_size=384)))
    {}
    """
    own = silent_settings(ours)
    # what this run does not read has no value in effect
    pairs = {
        key: (value, own[key] if key in own else operator.attrgetter(key)(ours))
        for key, value in silent_settings(theirs).items()
    }
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def how_to_fit(config: schema.Config, stored: Mapping[str, Any]) -> str:
    """Returns a request for all settings with which the encoder of a run has the arrays of a source
    and computes the same of them, so that one error names them together.

    Args:
      config: of the run.
      stored: `WeightSource.settings`.

    >>> how_to_fit(schema.Config(), {"width": 384, "positions": "rope", "activation": "swiglu"})
    'set config.model.encoder to width=384, activation=swiglu, positions=rope'
    """
    if "preset" in stored:
        return f"it is {stored['preset']}: use that model"
    backbone = backbones.registered_backbones().get(stored.get("backbone", ""), backbones.VIT)
    pairs = setting_differences(settings_of_source(config, stored), config)
    pairs.pop(GRID, None)  # positions of another grid are resized
    silent = [key.removeprefix(_ENCODER) for key in pairs if key.startswith(_ENCODER)]
    groups = {
        "encoder": {n: stored[n] for n in (*backbone.shape_settings, *silent) if n in stored},
        **{section: stored[section] for section in backbone.sections if section in stored},
    }
    sizes = " and ".join(
        f"config.model.{group} to {', '.join(f'{name}={value}' for name, value in values.items())}"
        for group, values in groups.items()
        if values
    )
    return f"set {sizes}" if sizes else "use the same model settings"


def settings_of_source(config: schema.Config, stored: Mapping[str, Any]) -> schema.Config:
    """Returns a configuration with the encoder of a source of weights.

    Args:
      config: has the settings that the source does not state.
      stored: `WeightSource.settings`.

    >>> found = settings_of_source(schema.Config(), {"heads": 6, "image_size": 384})
    >>> found.model.encoder.heads, silent_settings(found)["model.encoder.position_grid"]
    (6, 24)
    """
    names = {field.name for field in dataclasses.fields(schema.Encoder)}
    encoder = {name: value for name, value in stored.items() if name in names}
    model = dataclasses.replace(
        config.model,
        backbone=stored.get("backbone", config.model.backbone),
        **{
            name: dataclasses.replace(getattr(config.model, name), **stored[name])
            for name in backbones.section_names()
            if isinstance(stored.get(name), Mapping)
        },
    )
    data, dense = config.data, config.dense
    if "image_size" in stored:  # that of its positions, unless a grid is stated
        encoder.setdefault("position_grid", 0)
        data = dataclasses.replace(data, image_size=stored["image_size"])
        maps = dataclasses.replace(dense.maps, image_size=0)
        dense = dataclasses.replace(dense, maps=maps)
    model = dataclasses.replace(model, encoder=dataclasses.replace(model.encoder, **encoder))
    return dataclasses.replace(config, model=model, data=data, dense=dense)
