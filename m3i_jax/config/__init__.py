"""Configuration: from a ConfigDict and a command line to checked, frozen dataclasses.

    config = default_config()   # a locked ml_collections.ConfigDict, the tree of schema.Config
    config.optim.lr = 3e-4
    settings = resolve(config)  # schema.Config, checked

Nothing downstream of `resolve` reads a ConfigDict or a flag. Every mistake is reported on one line.
"""

import dataclasses
import typing
from collections.abc import Iterable
from typing import Any

import ml_collections

from m3i_jax import schema, validation
from m3i_jax.config.files import load_config, reject_config_in_data
from m3i_jax.config.recipes import (
    DEFAULT_RECIPE,
    copy_launchers,
    copy_recipe,
    describe_config_file,
    find_config_file,
    shipped_recipes,
)
from m3i_jax.config.values import (
    config_difference,
    config_from_text,
    config_to_text,
    default_config,
    evaluation_difference,
    help_table,
    load_from_workdir,
    parse_value,
    setting_table,
    typed_value,
    unknown_key_error,
)
from m3i_jax.errors import UserError, shorten
from m3i_jax.registries import not_one_of
from m3i_jax.schema.limits import expand_home

__all__ = [
    "DEFAULT_RECIPE",
    "apply_overrides",
    "config_difference",
    "config_from_text",
    "config_to_text",
    "copy_launchers",
    "copy_recipe",
    "default_config",
    "describe_config_file",
    "evaluation_difference",
    "find_config_file",
    "help_table",
    "load_config",
    "load_from_workdir",
    "reject_config_in_data",
    "rescale",
    "resolve",
    "scale_for_custom_data",
    "setting_table",
    "shipped_recipes",
    "unknown_key_error",
]


def apply_overrides(config: ml_collections.ConfigDict, assignments: Iterable[str]) -> None:
    """Apply `key=value` assignments in place.

    >>> config = default_config(); apply_overrides(config, ["optim.lr=1e-4"]); config.optim.lr
    0.0001
    """
    table = setting_table()
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if key not in table:
            raise unknown_key_error(key, table)
        if not equals:
            raise UserError(f"config.{key}: has no value; write --config.{key}=VALUE")
        section = config
        *sections, name = key.split(".")
        for part in sections:
            section = section[part]
        with section.ignore_type():
            section[name] = parse_value(f"config.{key}", table[key][0], text)


def _build(cls: type, node: Any, prefix: str, known: dict[str, Any]) -> Any:
    """The dataclass `cls` with the values of one section of a ConfigDict."""
    if not isinstance(node, (dict, ml_collections.ConfigDict)):
        raise UserError(f"config.{prefix[:-1]}: {shorten(node)} is not a section of settings")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    types, values = typing.get_type_hints(cls), {}
    for name in node:
        if name not in fields:
            raise unknown_key_error(prefix + str(name), known)
        key, kind = f"{prefix}{name}", types[name]
        if dataclasses.is_dataclass(kind):
            values[name] = _build(typing.cast(type, kind), node[name], f"{key}.", known)
            continue
        value = typed_value(f"config.{key}", kind, node[name])
        choices = fields[name].metadata["choices"]
        if choices and value not in choices:
            raise UserError(f"config.{key}: {not_one_of(shorten(value), choices)}")
        values[name] = expand_home(fields[name].metadata["limits"], value)
    return cls(**values)


def resolve(config: ml_collections.ConfigDict) -> schema.Config:
    """Returns the checked, frozen settings of a ConfigDict.

    Raises:
      UserError: an unknown key, a wrong type or an impossible value; the message names the key,
        the value and the fix.

    >>> resolve(default_config()).tokens
    196
    """
    settings: schema.Config = _build(schema.Config, config, "", setting_table())
    validation.validate_settings(settings)
    return settings


def rescale(config: ml_collections.ConfigDict, batch_size: int) -> None:
    """Set the batch size, and scale learning rates and target momentum to it by the linear rule.

    Below `train.batch_size`, the images R that the rates are given for (the paper's 4,096), lr and
    min_lr are multiplied by B / R and the momentum m becomes 1 - (1 - m) * B / R, so that the
    target moves equally far per epoch; warm-up and length are in epochs and stay. Above R all stay,
    as the paper has the same values at 4,096 and 40,000. A method whose rates are given for another
    R: `published_settings.settings_at`.

    >>> config = default_config(); rescale(config, 1024)
    >>> config.optim.lr, round(config.optim.ema, 5)
    (0.00025, 0.99875)
    >>> config = default_config(); config.optim.ema = -1.0; rescale(config, 1024)
    >>> config.optim.ema
    -1.0
    >>> config = default_config(); rescale(config, 40_000)
    >>> config.optim.lr, config.optim.ema, config.train.batch_size
    (0.001, 0.995, 40000)
    """
    scale = min(1.0, batch_size / config.train.batch_size)
    config.optim.lr *= scale
    config.optim.min_lr *= scale
    if config.optim.ema >= 0:  # else it is open, and follows from the batch
        config.optim.ema = 1 - (1 - config.optim.ema) * scale
    config.train.batch_size = batch_size


def scale_for_custom_data(
    config: ml_collections.ConfigDict, *, epochs: float, batch_size: int
) -> None:
    """Set length and batch size for a run on a user's own images.

    Learning rate, momentum, warm-up, crops, colours and how often the run is evaluated are left
    open and follow from batch, number and size of the images (training/scaling.py). A value that is
    set later is kept. Pooling is initialised with 1 / sqrt(inputs): at 0.02, the pooled token of a
    narrow encoder stays near zero for most of a short run.

    >>> config = default_config(); scale_for_custom_data(config, epochs=50.0, batch_size=256)
    >>> config.optim.lr, config.train.batch_size
    (0.0, 256)
    """
    config.data.threads = 4
    config.data.crop_scale = ()
    config.data.augment.update({"jitter_p": -1.0, "grayscale_p": -1.0})
    config.data.augment.update({"blur_p": (), "blur_sigma": (), "solarize_p": ()})
    config.model.pool.std = 0.0
    config.optim.update({"lr": 0.0, "ema": -1.0, "warmup_epochs": -1.0})
    config.train.update({"epochs": epochs, "batch_size": batch_size, "eval_every": -1})
    config.train.panel_every = -1
