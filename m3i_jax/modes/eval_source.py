"""Settings with which the run of a checkpoint was trained, where --mode=eval reads it with those of
another run or of a file: what no shape of an array shows."""

import operator
import pathlib
import shlex
from collections.abc import Callable, Collection, Mapping
from typing import Any

from m3i_jax import config as configuration
from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.training import saved_arrays, silent_settings

_MAPS = ("window", "global_blocks", "relative", "blocks")
_SIZES = {"data.image_size", "dense.maps.image_size"}  # the grid of fixed positions follows
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
    trained to, unless the command line sets them, and an average that the run does not have; log
    others that change figures.

    Args:
      config: the settings of the command.
      run: directory of the run; without a config.txt nothing is known.
      flag: what names the run.
      given: keys of the settings that the command line sets.
      log: gets the lines.

    Raises:
      UserError: names the settings that differ, and the way to set them; or the average.
    """
    if not (run / "config.txt").is_file():
        return
    try:
        theirs = configuration.resolve(configuration.load_from_workdir(str(run), flag))
    except UserError as error:  # of another version
        log(f"warning: the settings of the checkpoint are not compared: {error}")
        return
    if config.evaluate.encoder == "ema" and not theirs.optim.averages:
        raise UserError(
            f"config.evaluate.encoder: {str(run)!r} has no momentum average, only its initial"
            f" weights, because it was trained with optim.ema={theirs.optim.ema:g}; use online"
        )
    network = silent_settings.setting_differences(theirs, config)
    if not config.traits.views:
        network |= _changed([f"dense.maps.{name}" for name in _MAPS], config, theirs)
    network |= _changed(_head_keys(config, theirs, run, flag), config, theirs)
    refused = {key: pair for key, pair in network.items() if not _is_given(key, given)}
    others = _changed([key for key in _FIGURES if key not in given], config, theirs)
    if refused:
        missing = {key: old for key, (old, _) in {**refused, **others}.items()}
        raise UserError(
            f"{flag}: the network of {str(run)!r} was trained with {_words(refused)} and would"
            " compute something else; to evaluate it as it was trained, add"
            f" {' '.join(_assignment(key, old) for key, old in missing.items())}"
        )
    if differences := {**network, **others}:
        log(f"{run} was trained with {_words(differences)}")


def _changed(
    keys: Collection[str], config: schema.Config, theirs: schema.Config
) -> dict[str, tuple[Any, Any]]:
    """{key: (its value in the run, that of the command)}, of those that differ."""
    pairs = {key: (_value(theirs, key), _value(config, key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _value(config: schema.Config, key: str) -> Any:
    return operator.attrgetter(key)(config)


def _words(pairs: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key}={old} ({new} here)" for key, (old, new) in pairs.items())


def _assignment(key: str, value: Any) -> str:
    text = str(value).replace(" ", "") if isinstance(value, tuple) else str(value)
    return shlex.quote(f"--config.{key}={text}")


def _is_given(key: str, given: Collection[str]) -> bool:
    """Whether the command sets a setting, or one from which its value in effect follows."""
    return key in given or (key == silent_settings.GRID and not _SIZES.isdisjoint(given))


def _head_keys(
    config: schema.Config, theirs: schema.Config, run: pathlib.Path, flag: str
) -> list[str]:
    """Settings of the parts beside the encoder that change their output and no shape, of those that
    the checkpoint has."""
    # {parts of which one has parameters: settings that change what they compute}
    pool = "model.pool.heads" if theirs.model.pool.kind == "attention" else "model.pool.norm"
    keys = {
        ("category", "image_projection"): ["model.pool.kind", pool],
        ("text",): ["model.text.heads", "model.text.pool"],
        ("captioner",): ["model.captioner.heads"],
    }
    if not any(_changed(names, config, theirs) for names in keys.values()):
        return []
    saved = saved_arrays.saved_shapes(str(run), flag)
    trained = {path.split("/")[1] for path in saved if path.startswith("params/")}
    return [key for parts, names in keys.items() if trained & set(parts) for key in names]
