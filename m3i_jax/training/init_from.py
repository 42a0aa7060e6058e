"""Initial weights from `config.init_from`, laid over the initial parameters of a run.

The log lists which arrays matched, which are missing and which differ in shape or setting. An
encoder that fits in part, a position table of another kind and a source without any match are
refused. An encoder may lack what pre-training adds to it, the mask token, and the fusion of an
InternImage unless it is frozen; and what maps add to it. Tables of relative positions are resized;
those that a run does not have are refused, since the features would be others. The layers of a head
that are of categories restart where the source has other categories."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.interop import vit_weights
from m3i_jax.models import backbones, composite, relative_bias, vit
from m3i_jax.objective import positions
from m3i_jax.parallel.sharding import path_text
from m3i_jax.training import silent_settings
from m3i_jax.training.init_positions import TABLE, PositionTable, initial_positions
from m3i_jax.training.task import State
from m3i_jax.training.weight_source import RUNNING, WeightSource, open_on_all_hosts, put_array

_RELATIVE = ("encoder/relative/", f"encoder/{composite.SECOND}relative/")
MASK_TOKEN = "encoder/mask_token"
# {arrays without which features are others: (setting of the encoder, whether its value has them)}
_OPTIONS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "encoder/registers": ("registers", bool),
    "encoder/blocks/mlp/gate/": ("activation", lambda value: value == "swiglu"),
    "encoder/blocks/attention/norm_q/": ("qk_norm", bool),
}


@dataclasses.dataclass(frozen=True)
class Match:
    """Matches of the arrays of a run with those of a source, by path.

    Attributes: selected: arrays that `config.init.only` selects. same: of equal shape. differ: of
      another shape. missing: absent from the source. restarted: not selected since they are of
      other categories than the source's.
    """

    selected: set[str]
    same: set[str]
    differ: list[str]
    missing: list[str]
    restarted: list[str] = dataclasses.field(default_factory=list)


def initialize_from(
    config: schema.Config,
    params: Any,
    shardings: Any,
    log: Callable[[str], None] = print,
    *,
    classes: tuple[str, ...] = (),
    of_categories: tuple[str, ...] = (),
) -> Any:
    """Returns initial parameters, replaced by the arrays of `config.init_from` that `config.init`
    selects.

    Args:
      config: settings of this run.
      params: its initial parameters.
      shardings: of the same structure.
      log: gets the log lines, one a call.
      classes: names of the categories of this run, () if they are not known.
      of_categories: patterns of the paths that have a row, column or bias of each category. If the
        source's categories are others, by name, number or order, these keep their initial values.

    Raises: UserError: nothing matches; the encoder fits in part; it is frozen and its fusion would
      be random; its position table is of another kind; with init.strict, an array is missing.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    target = {path_text(path): leaf for path, leaf in leaves}
    layout = {
        path_text(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shardings)
    }
    source = open_on_all_hosts(config.init_from, weights=config.init.weights)
    source = _for_both_copies(source, target)
    selected = {path for path in target if _matches(config.init.only, path)}
    restarted: list[str] = []
    if of_categories and source.classes and classes and source.classes != classes:
        restarted = sorted(path for path in selected if _matches(of_categories, path))
        selected -= set(restarted)
    table = (
        initial_positions(config, source, _own_grid(config, target))
        if _matches(config.init.only, TABLE)
        else PositionTable(None, "")
    )
    same = {p for p in selected if p != TABLE and source.shapes.get(p) == target[p].shape}
    loaded, notes = _resized_relative(source, target, layout, sorted(selected - same))
    same |= loaded.keys()
    differ = sorted(p for p in selected - same if p != TABLE and p in source.shapes)
    missing = sorted(p for p in selected - same - set(differ) if p != TABLE or table.value is None)
    match = Match(selected, same, differ, missing, restarted)
    _check_match(config, source, target, match)
    loaded |= source.read({path: layout[path] for path in sorted(same - loaded.keys())})
    if TABLE in selected and table.value is not None:
        loaded[TABLE] = put_array(table.value, layout[TABLE])
    elif table.cls is not None and "encoder/cls_token" in loaded:
        loaded["encoder/cls_token"] = loaded["encoder/cls_token"] + table.cls
    for line in _log_lines(config, source, target, loaded, match, [table.message, *notes]):
        log(line)
    return jax.tree.unflatten(
        structure, [loaded.get(path, leaf).astype(leaf.dtype) for path, leaf in target.items()]
    )


def with_statistics(state: State, location: str) -> State:
    """Returns the state of a dense task with the running statistics of a file of weights, if it has
    some, in the place of initial ones: for its evaluation.

    Raises:
      UserError: as of `open_weights`.
    """
    source = open_on_all_hosts(location)
    names = {path: path.removeprefix(RUNNING) for path in source.shapes if path.startswith(RUNNING)}
    if not names:
        return state
    arrays = {names[path]: array for path, array in source.read(dict.fromkeys(names)).items()}

    def one(path: Any, leaf: Any) -> Any:
        theirs = arrays.get(path_text(path))
        if theirs is None or theirs.shape != leaf.shape:
            raise UserError(
                f"{location}: has no running statistics for {path_text(path)} of {leaf.shape}"
            )
        return put_array(theirs, leaf.sharding)

    running = state.opt["running"]
    statistics = jax.tree_util.tree_map_with_path(one, running.statistics)
    opt = {**state.opt, "running": running._replace(statistics=statistics)}
    return State(step=state.step, params=state.params, opt=opt)


def _for_both_copies(source: WeightSource, target: Mapping[str, Any]) -> WeightSource:
    """A source of one encoder for a run with two composed copies, for both."""
    second = f"encoder/{composite.SECOND}"
    if any(path.startswith(second) for path in source.shapes):
        return source
    origin = {path: path.replace(second, "encoder/") for path in target if path.startswith(second)}
    origin = {path: of for path, of in origin.items() if of in source.shapes}

    def read(layout: Mapping[str, Any]) -> dict[str, Any]:
        arrays = source.read({origin.get(path, path): at for path, at in layout.items()})
        # arrays of their own: a step may not donate one twice
        return {
            path: jnp.copy(arrays[origin[path]]) if path in origin else arrays[path]
            for path in layout
        }

    shapes = {**source.shapes, **{path: source.shapes[of] for path, of in origin.items()}}
    return dataclasses.replace(source, shapes=shapes, read=read) if origin else source


def _matches(patterns: Iterable[str], path: str) -> bool:
    patterns = tuple(patterns)
    return not patterns or any(re.search(pattern, path) for pattern in patterns)


def _own_grid(config: schema.Config, target: Mapping[str, Any]) -> int:
    """Patches a side for which this run has its positions."""
    if TABLE in target:
        return positions.table_grid(target[TABLE].shape[1])
    return vit.position_size(config) // config.model.encoder.patch_size


def _resized_relative(
    source: WeightSource, target: Mapping[str, Any], layout: Mapping[str, Any], paths: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """Tables of relative positions of maps of another size, {path: array}, and notes."""
    out = {}
    for path in paths:
        theirs, ours = source.shapes.get(path), target[path].shape
        if path.startswith(_RELATIVE) and theirs and theirs[1:] == ours[1:]:
            name, table = path.split("/")[-1], source.read({path: None})[path]
            with contextlib.suppress(ValueError):  # with and without cls: shapes that differ
                resized = relative_bias.resize_table(name, jnp.asarray(table), ours[0])
                out[path] = put_array(np.asarray(resized), layout[path])
    sizes = {f"{source.shapes[p][0]} to {target[p].shape[0]} rows" for p in out}
    return out, [
        f"{len(out)} tables of relative positions were resized from {', '.join(sorted(sizes))}"
    ] if out else []  # fmt: skip


def _check_match(
    config: schema.Config, source: WeightSource, target: Mapping[str, Any], match: Match
) -> None:
    """Refuse a match that would leave a part of the encoder, or all of the run, random."""
    only = ",".join(config.init.only)
    where = f"config.init_from: {source.name}"
    how = silent_settings.how_to_fit(config, source.settings)
    if not match.selected:
        raise UserError(
            f"{where}: no array of this run matches config.init.only={only}; its arrays are"
            f" {', '.join(list(target)[:3])}, ..."
        )
    if paths := [path for path in match.differ if path.startswith("encoder/")]:
        path = paths[0]
        raise UserError(
            f"{where}: its encoder has other shapes ({len(paths)} arrays differ, first {path}:"
            f" {source.shapes[path]} in the source, {target[path].shape} in this run);"
            f" {how}"
        )
    if not match.same:
        nearest = {
            path: vit_weights.nearest_names(path, source.shapes, 1)
            for path in sorted(match.selected)
        }
        names = (
            "; ".join(f"nearest to {path}: {names[0]}" for path, names in nearest.items() if names)
            or f"it has {', '.join(list(source.shapes)[:3])}"
        )
        raise UserError(
            f"{where}: has none of the {len(match.selected)} arrays"
            f"{f' that match config.init.only={only}' if only else ''} ({names[:300]}); give"
            " another source, or leave config.init_from out to start from random weights"
        )
    of_maps, added = _map_parameters(config), _added_parameters(config)
    lost = [p for p in source.shapes if of_maps and p.startswith(of_maps) and p not in target]
    if lost and any(p.startswith("encoder/") for p in match.selected):
        raise UserError(
            f"{where}: its features are computed with {lost[0]} ({len(lost)} such arrays), which"
            f" this run lacks; {how}, and config.dense.maps.relative and layer_scale as there, or"
            " select less by config.init.only"
        )
    for prefix, (name, has) in _OPTIONS.items():
        lost = [p for p in source.shapes if p.startswith(prefix)]
        blocks = any(p.startswith("encoder/blocks/") for p in match.same)
        if lost and blocks and not has(getattr(config.model.encoder, name)):
            raise UserError(
                f"{where}: its features are computed with {lost[0]}, which this run lacks; {how},"
                " or select less by config.init.only"
            )
    absent = [
        p for p in match.missing if p.startswith("encoder/") and not p.startswith(added + of_maps)
    ]
    if absent:
        raise UserError(
            f"{where}: its encoder fits in part ({len(absent)} arrays are missing, first"
            f" {absent[0]}); {how}, or select less by config.init.only"
        )
    known = (MASK_TOKEN, *of_maps)
    untrained = [p for p in match.missing if p.startswith("encoder/") and not p.startswith(known)]
    if config.model.encoder.freeze and untrained:
        raise UserError(
            f"{where}: has no {untrained[0]}, which a frozen encoder would keep at random values;"
            f" {backbones.get_backbone(config.model).without_added(config.model)}"
        )
    if config.init.strict and (paths := match.differ + match.missing):
        raise UserError(
            f"{where}: {len(paths)} of {len(match.selected)} arrays are missing or differ in shape,"
            f" first {paths[0]}; narrow config.init.only, or use config.init.strict=false"
        )
    if config.init.strict and (differences := _setting_differences(config, source)):
        raise UserError(
            f"{where}: was trained with other settings ({'; '.join(differences)}); set them, or use"
            " config.init.strict=false"
        )


def _added_parameters(config: schema.Config) -> tuple[str, ...]:
    """Prefixes of parameters that pre-training adds to a published encoder."""
    backbone = backbones.get_backbone(config.model)
    return tuple(f"encoder/{prefix}" for prefix in backbone.added_parameters)


def _map_parameters(config: schema.Config) -> tuple[str, ...]:
    """Prefixes of parameters that maps add to an encoder."""
    return tuple(f"encoder/{prefix}" for prefix in composite.of_run(config).map_parameters)


def _setting_differences(config: schema.Config, source: WeightSource) -> list[str]:
    """Settings that no shape shows and that the source was trained with otherwise."""
    trained = silent_settings.settings_of_source(config, source.settings)
    pairs = silent_settings.setting_differences(trained, config)
    # `initial_positions` refuses other kinds, or makes a learned table of a fixed one
    if pairs.pop(silent_settings.POSITIONS, None):
        pairs.pop(silent_settings.GRID, None)
    for name in ("mean", "std"):
        ours = getattr(config.data.augment, name)
        theirs = source.settings.get(name, ours)
        if not np.allclose(theirs, ours, atol=1e-3):
            pairs[f"data.augment.{name}"] = (tuple(theirs), ours)
    for name in ("final_norm", "embedding_norm"):
        if source.settings.get(name) and not getattr(config.model.encoder, name):
            pairs[f"model.encoder.{name}"] = ("true", "false")
    return [
        f"{key}={theirs} in the source, {ours} in this run" for key, (theirs, ours) in pairs.items()
    ]


def _log_lines(
    config: schema.Config,
    source: WeightSource,
    target: Mapping[str, Any],
    loaded: Mapping[str, Any],
    match: Match,
    changes: list[str],
) -> list[str]:
    """What was loaded, what is missing, differs or was not used."""
    count = sum(math.prod(target[path].shape) for path in loaded)
    lines = [
        f"init_from {source.name}: {len(loaded)} of {len(target)} arrays, {count:,} numbers:"
        f" {', '.join(_grouped(loaded, target))}"
    ]
    lines += [f"  {note}" for note in [*source.notes, *changes] if note]
    of_maps = [p for p in match.missing if p.startswith(_map_parameters(config) or ("/",))]
    if missing := [p for p in match.missing if p not in of_maps]:
        lines.append(f"  missing, initialized randomly: {', '.join(_grouped(missing, target))}")
    if of_maps:
        lines.append(
            f"  of maps, at their first values: {len(of_maps)} arrays such as {of_maps[0]}"
        )
    added = _added_parameters(config)
    if random := [p for p in match.missing if p.startswith(added) and p != MASK_TOKEN]:
        lines.append(
            f"  not in published encoders: {', '.join(_grouped(random, target))}; the encoder's"
            " features are random until they are trained"
        )
    if match.restarted and source.classes:
        lines.append(
            f"  heads restart at random for other categories ({len(source.classes)} in the source):"
            f" {', '.join(_grouped(match.restarted, target))}"
        )
    if match.differ:
        shapes = ", ".join(
            f"{path} {source.shapes[path]} in the source, {target[path].shape} in this run"
            for path in match.differ[:5]
        )
        more = f", and {len(match.differ) - 5} more" if len(match.differ) > 5 else ""
        lines.append(f"  of another shape, initialized randomly: {shapes}{more}")
    unused = sorted(set(source.shapes) - set(target) - {TABLE})
    unused = [path for path in unused if not path.startswith(RUNNING)]
    if unused or source.unused:
        parts = [
            *_grouped(unused, source.shapes),
            *(f"{name} ({count})" for name, count in source.unused.items()),
        ]
        lines.append(f"  in the source and not used: {', '.join(parts)}")
    if differences := _setting_differences(config, source):
        lines.append(f"  other settings: {'; '.join(differences)}")
    return lines


def _grouped(paths: Iterable[str], among: Iterable[str]) -> list[str]:
    """Names of the parts whose arrays are all in `paths`, with their count; else single paths.

    >>> _grouped(["a/x", "a/y", "b/x"], ["a/x", "a/y", "b/x", "b/y"])
    ['a (2)', 'b/x']
    """
    totals: dict[str, int] = {}
    for path in among:
        part = path.split("/")[0]
        totals[part] = totals.get(part, 0) + 1
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(path.split("/")[0], []).append(path)
    out = []
    for part, names in groups.items():
        if len(names) == totals.get(part):
            out.append(f"{part} ({len(names)})" if len(names) > 1 or names[0] != part else part)
        else:
            out += names[:4] + ([f"and {len(names) - 4} more of {part}"] if len(names) > 4 else [])
    return out
