"""First weights from elsewhere: what `init_from` names, laid over the initial parameters of a run,
and an account of every array.

A source is the workdir of a run (any mesh) or a file of another project; both are seen as {path:
shape} of our own paths, so that a subset is a subset of paths, whatever the source. Nothing is left
to chance silently: what matched, what is not there, what differs in shape or setting is said; an
encoder that fits in part, a position table that would be replaced by another, or no match at all is
refused. What an encoder may lack is what pre-training adds to it: the mask token, and the fusion of
an InternImage unless it is frozen."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from m3i_jax import config as configuration
from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.interop import position_tables, tensor_files, vit_weights
from m3i_jax.models import backbones
from m3i_jax.models.vit import fixed_positions
from m3i_jax.parallel.sharding import path_text
from m3i_jax.training import checkpoint, checkpoint_dir

TABLE, MASK_TOKEN = "encoder/positions", "encoder/mask_token"
# two tables are the same: float32 frequencies make errors of the size of the rounded index
_CLOSE = 1e-3


@dataclasses.dataclass
class WeightSource:
    """Weights somewhere else.

    Attributes: name: what it is, for messages. shapes: {path: shape} of everything that is there
      under a path of ours, without a fixed position table. read: {path: sharding or None} -> {path:
      array}; None: numpy. settings: of `model.encoder` and the pixels (mean, std, image_size), as
      far as the source tells; of an InternImage `backbone`, `scan` and `intern_image` of `model`
      too, and of a file the `preset` that it is.
      unused: {what: arrays} that have no place here.
      notes: what was changed while reading.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    settings: dict[str, Any]
    unused: dict[str, int]
    notes: list[str]


def open_weights(
    place: str, *, weights: str = "online", key: str = "config.init_from"
) -> WeightSource:
    """The weights of a run or a file.

    Args:
      place: workdir, file, or Hugging Face directory.
      weights: online, or ema: the momentum copy.
      key: what named the place, for messages.

    Raises:
      UserError: nothing there that can be read, no layout that is known, no momentum copy.
    """
    path = pathlib.Path(place)
    if not path.exists():
        raise UserError(
            f"{key}: there is no {place!r}; give the workdir of a run, or a file of weights"
            f" ({', '.join(tensor_files.ENDINGS[:4])})"
        )
    if checkpoint_dir.is_run(place):
        return _of_run(place, weights, key)
    try:
        found = vit_weights.load_vit(
            tensor_files.read_tensors(place),
            momentum=weights == "ema",
            config=vit_weights.read_sidecar_configs(place),
        )
    except UserError as error:
        raise UserError(
            f"{key}: {error}" if place in str(error) else f"{key}: {place}: {error}"
        ) from error
    except (
        Exception
    ) as error:  # arrays of a known name and another shape: the person needs the name of the file
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{key}: {place}: its arrays are not those of its names ({type(error).__name__}:"
            f" {reason}); is it whole?"
        ) from error

    def read(wanted: Mapping[str, Any]) -> dict[str, Any]:
        return {path: _placed(found.arrays[path], sharding) for path, sharding in wanted.items()}

    unused = found.unused | (
        {"of unknown names, such as " + found.unknown[0]: len(found.unknown)}
        if found.unknown
        else {}
    )
    settings = {
        **backbones.recognize_weights(
            {
                path.removeprefix("encoder/"): array.shape
                for path, array in found.arrays.items()
                if path.startswith("encoder/")
            }
        ),
        **found.settings,
    }
    return WeightSource(
        f"{place} ({found.layout})",
        {p: a.shape for p, a in found.arrays.items()},
        read,
        settings,
        unused,
        found.notes,
    )


def _of_run(workdir: str, weights: str, key: str) -> WeightSource:
    run = checkpoint.RunWeights(workdir, key)
    there = {
        path.removeprefix("params/"): path for path in run.shapes if path.startswith("params/")
    }
    if weights == "ema":
        average = {
            path.removeprefix("opt/target/params/"): path
            for path in run.shapes
            if path.startswith("opt/target/params/")
        }
        if not average:
            raise UserError(f"{key}: {workdir!r} has no momentum average; use the online weights")
        there |= average

    def read(wanted: Mapping[str, Any]) -> dict[str, Any]:
        got = run.read({there[path]: sharding for path, sharding in wanted.items()})
        if wrong := [path for path in wanted if not _finite(got[there[path]])]:
            raise UserError(
                f"{key}: {workdir!r}: {wrong[0]} has numbers that are not finite (NaN or Inf),"
                f" {len(wrong)} of {len(wanted)} arrays do; give an earlier checkpoint or"
                " another run"
            )
        return {path: got[there[path]] for path in wanted}

    config = configuration.resolve(configuration.load_from_workdir(workdir, key))
    pixels = {
        "mean": config.data.augment.mean,
        "std": config.data.augment.std,
        "image_size": config.data.image_size,
    }
    model = {
        "backbone": config.model.backbone,
        **{
            section: dataclasses.asdict(getattr(config.model, section))
            for section in backbones.get_backbone(config.model).sections
        },
    }
    settings = {**dataclasses.asdict(config.model.encoder), **model, **pixels}
    name = f"{workdir} (step {run.step:,}, {'momentum average' if weights == 'ema' else 'online'})"
    return WeightSource(
        name, {path: run.shapes[full] for path, full in there.items()}, read, settings, {}, []
    )


def _finite(array: Any) -> bool:
    """Whether all numbers of an array are finite; of one that is spread over hosts, those that lie
    here."""
    parts = (
        [shard.data for shard in array.addressable_shards]
        if isinstance(array, jax.Array)
        else [array]
    )
    return all(bool(np.isfinite(np.asarray(part)).all()) for part in parts)


def _placed(array: Any, sharding: Any) -> Any:
    value = np.asarray(array, np.float32)
    return (
        value
        if sharding is None
        else jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
    )


def initialize_from(
    config: schema.Config, params: Any, shardings: Any, say: Callable[[str], None] = print
) -> Any:
    """Initial parameters with everything in place of them that `config.init_from` has and
    `config.init` asks for.

    Args:
      config: settings of this run.
      params: its initial parameters.
      shardings: of the same structure.
      say: gets the account, a line a call.

    Raises: UserError: nothing matches; the encoder fits in part; it is frozen and would have a
      fusion at random; its position table is another one; with init.strict, anything is missing.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    here = {path_text(path): leaf for path, leaf in leaves}
    layout = {
        path_text(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shardings)
    }
    source = open_weights(config.init_from, weights=config.init.weights)
    wanted = {path for path in here if _asked(config.init.only, path)}
    table = _table(config, source) if _asked(config.init.only, TABLE) else PositionTable(None, "")
    same = {
        path for path in wanted if path != TABLE and source.shapes.get(path) == here[path].shape
    }
    differ = sorted(path for path in wanted - same if path != TABLE and path in source.shapes)
    missed = sorted(
        path for path in wanted - same - set(differ) if path != TABLE or table.value is None
    )
    _refuse(config, source, here, wanted, same, differ, missed)
    got = source.read({path: layout[path] for path in sorted(same)})
    if TABLE in wanted and table.value is not None:
        got[TABLE] = _placed(table.value, layout[TABLE])
    elif table.cls is not None and "encoder/cls_token" in got:
        got["encoder/cls_token"] = got["encoder/cls_token"] + table.cls
    for line in _account(config, source, here, got, differ, missed, table.told):
        say(line)
    return jax.tree.unflatten(
        structure, [got.get(path, leaf).astype(leaf.dtype) for path, leaf in here.items()]
    )


def _asked(patterns: Iterable[str], path: str) -> bool:
    patterns = tuple(patterns)
    return not patterns or any(re.search(pattern, path) for pattern in patterns)


@dataclasses.dataclass
class PositionTable:
    """What becomes of a source's position table: `value` [1, T, D] for a learned one here; told:
    what was done; cls: its row for cls, where the table here is fixed and has none."""

    value: np.ndarray | None
    told: str
    cls: np.ndarray | None = None


def _table(config: schema.Config, source: WeightSource) -> PositionTable:
    e, kind = config.model.encoder, source.settings.get("positions", "sincos")
    if (
        "encoder/patch_embed/kernel" not in source.shapes
        or source.settings.get("width", e.width) != e.width
    ):
        return PositionTable(None, "")  # another encoder, which is said elsewhere, or none
    if e.positions == "learned":
        if kind != "learned":
            old = _grid(source, config)
            fixed = fixed_positions(
                dataclasses.replace(e, positions=kind, position_grid=old), config.grid
            )
            told = f"{TABLE} starts as the source's fixed table of {old} x {old}"
            return PositionTable(
                position_tables.resize_position_table(fixed[None], config.grid, cls=e.cls_token),
                told,
            )
        if TABLE not in source.shapes:
            return PositionTable(None, "")
        there = source.read({TABLE: None})[TABLE]
        old = position_tables.table_grid(there.shape[1])
        told = (
            f"{TABLE} was resized from {old} x {old} to {config.grid} x {config.grid} by bicubic"
            " interpolation"
        )
        return PositionTable(
            position_tables.resize_position_table(there, config.grid, cls=e.cls_token),
            told if old != config.grid else "",
        )
    if kind != "learned":
        old, made = _grid(source, config), e.position_grid or config.grid
        told = (
            f"positions were of a grid of {old} there and are of {made} here;"
            f" config.model.encoder.position_grid={old} resizes them"
        )
        return dataclasses.replace(
            _same_kind(source, kind, e.positions), told="" if old == made else told
        )
    if TABLE not in source.shapes:
        return PositionTable(None, "")
    there = source.read({TABLE: None})[TABLE]
    old = position_tables.table_grid(there.shape[1])
    had = there.shape[1] - old * old
    for possible in ("sincos", "sincos_columns"):
        fixed = fixed_positions(dataclasses.replace(e, positions=possible, position_grid=0), old)
        if np.abs(there[0, had:] - fixed).max() < _CLOSE:
            told = (
                "the position table there is the fixed one of"
                f" model.encoder.positions={e.positions}"
            )
            return dataclasses.replace(
                _same_kind(source, possible, e.positions),
                told=told,
                cls=there[:, :1] if had else None,
            )
    return _same_kind(source, "learned", e.positions)


def _grid(source: WeightSource, config: schema.Config) -> int:
    """Patches a side for which a run made its fixed positions."""
    patch = config.model.encoder.patch_size
    return (
        source.settings.get("position_grid")
        or source.settings.get("image_size", config.grid * patch) // patch
    )


def _same_kind(source: WeightSource, there: str, here: str) -> PositionTable:
    if there != here:
        raise UserError(
            f"config.init_from: {source.name}: its blocks were trained with"
            f" model.encoder.positions={there}, and here it is {here}; set"
            f" config.model.encoder.positions={there}, or leave the encoder out by config.init.only"
        )
    return PositionTable(None, "")


def _refuse(
    config: schema.Config,
    source: WeightSource,
    here: Mapping[str, Any],
    wanted: set[str],
    same: set[str],
    differ: list[str],
    missed: list[str],
) -> None:
    only = f" that match config.init.only={','.join(config.init.only)}" if config.init.only else ""
    where = f"config.init_from: {source.name}"
    if not wanted:
        raise UserError(
            f"{where}: no path here matches config.init.only={','.join(config.init.only)}; there"
            f" are {', '.join(list(here)[:3])}"
        )
    if wrong := [path for path in differ if path.startswith("encoder/")]:
        path = wrong[0]
        raise UserError(
            f"{where}: its encoder is another one ({len(wrong)} arrays differ, first {path}:"
            f" {source.shapes[path]} there, {here[path].shape} here); {_to_fit(source)}"
        )
    if not same:
        near = {path: vit_weights.nearest_names(path, source.shapes, 1) for path in sorted(wanted)}
        told = (
            "; ".join(f"{path}: there {there[0]}" for path, there in near.items() if there)
            or f"there: {', '.join(list(source.shapes)[:3])}"
        )
        raise UserError(
            f"{where}: none of the {len(wanted)} arrays here{only} is there ({told[:300]}); a run"
            " never starts at random unasked"
        )
    added = _added_parameters(config)
    if lost := [
        path for path in missed if path.startswith("encoder/") and not path.startswith(added)
    ]:
        raise UserError(
            f"{where}: its encoder fits in part ({len(lost)} arrays are not there, first"
            f" {lost[0]}); {_to_fit(source)}, or ask for less by config.init.only"
        )
    if config.model.encoder.freeze and (
        lost := [path for path in missed if path.startswith("encoder/") and path != MASK_TOKEN]
    ):
        raise UserError(
            f"{where}: has no {lost[0]}, which a frozen encoder would keep at random values;"
            f" {backbones.get_backbone(config.model).without_added(config.model)}"
        )
    if config.init.strict and (lost := differ + missed):
        told = (
            f"{len(lost)} of {len(wanted)} arrays are not there or differ in shape, first {lost[0]}"
        )
        raise UserError(
            f"{where}: {told}; narrow config.init.only, or use config.init.strict=false"
        )
    if config.init.strict and (others := _settings(config, source)):
        raise UserError(
            f"{where}: is used there with other settings ({'; '.join(others)}); set them, or use"
            " config.init.strict=false"
        )


def _added_parameters(config: schema.Config) -> tuple[str, ...]:
    """Prefixes of parameters that pre-training adds to a published encoder."""
    backbone = backbones.get_backbone(config.model)
    return tuple(f"encoder/{prefix}" for prefix in backbone.added_parameters)


def _to_fit(source: WeightSource) -> str:
    """What to do so that the encoder here is the source's."""
    settings = source.settings
    if "preset" in settings:
        return f"it is {settings['preset']}: use that model"
    backbone = backbones.registered_backbones().get(settings.get("backbone", ""), backbones.VIT)
    groups = {
        "encoder": {name: settings[name] for name in backbone.shape_settings if name in settings},
        **{section: settings[section] for section in backbone.sections if section in settings},
    }
    sizes = " and ".join(
        f"config.model.{group} to {', '.join(f'{name}={value}' for name, value in values.items())}"
        for group, values in groups.items()
        if values
    )
    return f"set {sizes}" if sizes else "use the same model settings"


def _settings(config: schema.Config, source: WeightSource) -> list[str]:
    """Settings that shapes do not show and that the source was trained with otherwise."""
    e, out, backbone = config.model.encoder, [], backbones.get_backbone(config.model)
    for name in backbone.silent_settings:
        there = source.settings.get(name, getattr(e, name))
        if there != getattr(e, name):
            out.append(f"model.encoder.{name}={there} there, {getattr(e, name)} here")
    same_kind = config.model.backbone == source.settings.get("backbone")
    for section in backbone.sections if same_kind else ():
        for name, there in source.settings[section].items():
            here = getattr(getattr(config.model, section), name)
            if name not in backbone.init_settings and there != here:
                out.append(f"model.{section}.{name}={there} there, {here} here")
    for name in ("mean", "std"):
        here = getattr(config.data.augment, name)
        there = source.settings.get(name, here)
        if not np.allclose(there, here, atol=1e-3):
            out.append(f"data.augment.{name}={tuple(there)} there, {here} here")
    for name in ("final_norm", "embedding_norm"):
        if source.settings.get(name) and not getattr(e, name):
            out.append(f"model.encoder.{name}=true there, false here")
    return out


def _account(
    config: schema.Config,
    source: WeightSource,
    here: Mapping[str, Any],
    got: Mapping[str, Any],
    differ: list[str],
    missed: list[str],
    table: str,
) -> list[str]:
    """The lines that say what came from where."""
    numbers = sum(math.prod(here[path].shape) for path in got)
    lines = [
        f"init_from {source.name}: {len(got)} of {len(here)} arrays, {numbers:,} numbers:"
        f" {', '.join(_grouped(got, here))}"
    ]
    lines += [f"  {note}" for note in [*source.notes, table] if note]
    if missed:
        lines.append(f"  not there, start at random: {', '.join(_grouped(missed, here))}")
    added = _added_parameters(config)
    if random := [path for path in missed if path.startswith(added) and path != MASK_TOKEN]:
        lines.append(
            f"  not in published encoders: {', '.join(_grouped(random, here))}; the encoder's"
            " features are random until they are trained"
        )
    if differ:
        told = ", ".join(
            f"{path} {source.shapes[path]} there, {here[path].shape} here" for path in differ[:5]
        )
        more = f", and {len(differ) - 5} more" if len(differ) > 5 else ""
        lines.append(f"  of another shape, start at random: {told}{more}")
    left = sorted(set(source.shapes) - set(here) - {TABLE})
    if left or source.unused:
        names = [
            *_grouped(left, source.shapes),
            *(f"{what} ({count})" for what, count in source.unused.items()),
        ]
        lines.append(f"  there and not used: {', '.join(names)}")
    if others := _settings(config, source):
        lines.append(f"  set otherwise: {'; '.join(others)}")
    return lines


def _grouped(paths: Iterable[str], among: Iterable[str]) -> list[str]:
    """Parts, where all of a part is meant, and single paths where not.

    >>> _grouped(["a/x", "a/y", "b/x"], ["a/x", "a/y", "b/x", "b/y"])
    ['a (2)', 'b/x']
    """
    whole: dict[str, int] = {}
    for path in among:
        part = path.split("/")[0]
        whole[part] = whole.get(part, 0) + 1
    mine: dict[str, list[str]] = {}
    for path in paths:
        mine.setdefault(path.split("/")[0], []).append(path)
    out = []
    for part, found in mine.items():
        if len(found) == whole.get(part):
            out.append(f"{part} ({len(found)})" if len(found) > 1 or found[0] != part else part)
        else:
            out += found[:4] + ([f"and {len(found) - 4} more of {part}"] if len(found) > 4 else [])
    return out
