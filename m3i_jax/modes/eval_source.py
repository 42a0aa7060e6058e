"""Settings with which the run of a checkpoint was trained, where --mode=eval reads it with those of
another run or of a file: what no shape of an array shows."""

import dataclasses
import operator
import pathlib
import shlex
from collections.abc import Callable, Collection
from typing import Any

from m3i_jax import config as configuration
from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.models import backbones
from m3i_jax.training import weight_source

# {parts of which one has parameters: settings of `model` that change what they compute}
_HEADS = {
    ("category", "image_projection"): ("pool.kind", "pool.heads", "pool.norm"),
    ("text",): ("text.heads", "text.pool"),
    ("captioner",): ("captioner.heads",),
}
_MAPS = ("window", "global_blocks", "relative", "blocks", "image_size")
# other settings that change figures
_FIGURES = (
    "model.dtype",
    "data.image_size",
    "data.augment.mean",
    "data.augment.std",
    *(f"evaluate.{name}" for name in ("encoder", "features", "crop", "interpolation", "squash")),
)


def check_settings(
    config: schema.Config,
    run: pathlib.Path,
    flag: str,
    given: Collection[str],
    log: Callable[[str], None],
) -> None:
    """Refuse settings with which the network of a run would compute something else than it was
    trained to, unless the command line sets them, and log others that change figures.

    Args:
      config: the settings of the command.
      run: directory of the run; without a config.txt nothing is known.
      flag: what names the run.
      given: keys of the settings that the command line sets.
      log: gets the lines.

    Raises:
      UserError: names the settings that differ, and the way to set them.
    """
    if not (run / "config.txt").is_file():
        return
    try:
        theirs = configuration.resolve(configuration.load_from_workdir(str(run), flag))
    except UserError as error:  # of another version
        log(f"warning: the settings of the checkpoint are not compared: {error}")
        return
    network = _changed(_network_keys(config, theirs), config, theirs)
    network |= _changed(_head_keys(config, theirs, run, flag), config, theirs)
    refused = {key: words for key, words in network.items() if key not in given}
    others = _changed([key for key in _FIGURES if key not in given], config, theirs)
    if refused:
        missing = {**refused, **others}
        raise UserError(
            f"{flag}: the network of {str(run)!r} was trained with {', '.join(refused.values())}"
            " and would compute something else; to evaluate it as it was trained, add"
            f" {' '.join(_assignment(key, theirs) for key in missing)}"
        )
    if differences := {**network, **others}:
        log(f"{run} was trained with {', '.join(differences.values())}")


def _changed(keys: Collection[str], config: schema.Config, theirs: schema.Config) -> dict[str, str]:
    """{key: how its values differ}, of those that do."""
    values = {key: [operator.attrgetter(key)(one) for one in (theirs, config)] for key in keys}
    return {key: f"{key}={old} ({new} here)" for key, (old, new) in values.items() if old != new}


def _assignment(key: str, config: schema.Config) -> str:
    value: Any = operator.attrgetter(key)(config)
    text = str(value).replace(" ", "") if isinstance(value, tuple) else str(value)
    return shlex.quote(f"--config.{key}={text}")


def _network_keys(config: schema.Config, theirs: schema.Config) -> list[str]:
    """Settings of the encoder that change its output and no shape."""
    backbone = backbones.get_backbone(config.model)
    keys = ["model.backbone", *(f"model.encoder.{name}" for name in backbone.silent_settings)]
    for section in backbone.sections:
        fields = dataclasses.fields(getattr(config.model, section))
        names = [each.name for each in fields if each.name not in backbone.init_settings]
        keys += [f"model.{section}.{name}" for name in names]
    if not config.traits.views:
        keys += [f"dense.maps.{name}" for name in _MAPS]
    if backbone.resizes_positions:
        keys.append("model.encoder.positions")
        if config.traits.views and _fixed_grid(config) != _fixed_grid(theirs):
            keys += ["model.encoder.position_grid", "data.image_size"]
    return keys


def _fixed_grid(config: schema.Config) -> int:
    """Cells a side for which fixed positions are computed; 0: they are not fixed."""
    encoder = config.model.encoder
    fixed = encoder.positions.startswith("sincos")
    return (encoder.position_grid or config.data.image_size // encoder.patch_size) if fixed else 0


def _head_keys(
    config: schema.Config, theirs: schema.Config, run: pathlib.Path, flag: str
) -> list[str]:
    """Settings of the parts beside the encoder that change their output and no shape, of those that
    the checkpoint has."""
    keys = {parts: [f"model.{name}" for name in names] for parts, names in _HEADS.items()}
    if not any(_changed(names, config, theirs) for names in keys.values()):
        return []
    saved = weight_source.RunWeights(str(run), flag).shapes
    trained = {path.split("/")[1] for path in saved if path.startswith("params/")}
    return [key for parts, names in keys.items() if trained & set(parts) for key in names]
