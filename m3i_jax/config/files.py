"""Configuration files: `--config FILE.py[:name=value,...]` runs `get_config` of a local file, or of
a recipe that ships.

A configuration file is code and data must never be run: a file that lies in a data directory is
refused before it runs, and again when the settings are known.
"""

import ast
import difflib
import fnmatch
import glob
import importlib.util
import inspect
import os
import pathlib
import re
import traceback
from collections.abc import Iterable
from typing import Any

import ml_collections

from m3i_jax.config.recipes import SHIPPED, find_config_file
from m3i_jax.config.values import parse_value, setting_table
from m3i_jax.errors import UserError, one_line, shorten

_DATA_KEYS = ("data.path", "data.directory", "data.mixture", "data.split", "data.holdout_split")
_CHANGED_DEFAULT = "m3i_jax.config.default_config() with changes"


def load_config(spec: str, overrides: Iterable[str] = ()) -> ml_collections.ConfigDict:
    """Returns the ConfigDict that `get_config` of a configuration file returns.

    Args:
      spec: `FILE[:name=value,...]`; `find_config_file` finds FILE, and the arguments have the
        types of `get_config`'s defaults.
      overrides: `key=value` of the command line. They are not applied, but a file that lies in
        the data that they name is not run.

    Raises:
      UserError: a missing file, a file without `get_config`, an unknown argument, a value of the
        wrong type, or an error within the file.
    """
    file, _, text = spec.partition(":")
    path = find_config_file(spec).absolute()  # a configuration may change the working directory
    _refuse_before_running(str(path), text, overrides)
    module_spec = importlib.util.spec_from_file_location(f"m3i_jax_config_{path.stem}", path)
    assert module_spec and module_spec.loader
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(
                f"--config {file}: has no function get_config; define one that returns"
                f" {_CHANGED_DEFAULT}"
            )
        arguments = _parse_arguments(file, inspect.signature(module.get_config), text)
        config = module.get_config(**arguments)
    except (UserError, KeyboardInterrupt):
        raise
    except SystemExit as error:
        raise UserError(
            f"--config {_describe_error(file, path, error)}; a configuration must return its"
            " settings and not exit"
        ) from error
    except BaseException as error:  # any error of a user's file is the user's to read on one line
        raise UserError(f"--config {_describe_error(file, path, error)}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f"--config {file}: get_config returned {type(config).__name__}; it must return"
            f" {_CHANGED_DEFAULT}"
        )
    return config


def _describe_error(file: str, path: pathlib.Path, error: BaseException) -> str:
    """File, line and reason of an error that a configuration file raised."""
    frames, path = traceback.extract_tb(error.__traceback__), path.resolve()
    lines = [frame.lineno for frame in frames if pathlib.Path(frame.filename).resolve() == path]
    where = f"{file}, line {lines[-1]}" if lines else file
    # str() of a KeyError puts its text in quotes.
    text = one_line(error.args[0] if isinstance(error, KeyError) and error.args else error)
    # A locked ConfigDict; the rest of its message is the whole section.
    if unknown := re.search(r'Key "(.*?)" does not exist', text):
        keys = setting_table()
        parts = {part for key in keys for part in key.split(".")}
        near = difflib.get_close_matches(unknown[1], parts, 1)
        candidates = [f"config.{key}" for key in keys if near and near[0] in key.split(".")]
        hint = "--help lists every key"
        if near:
            hint = f"did you mean {candidates[0] if len(candidates) == 1 else near[0]}?"
        return f"{where}: there is no such key {unknown[1]!r}; {hint}"
    return f"{where}: {type(error).__name__}: {text}"


def reject_config_in_data(file: str, data: Any) -> None:
    """Refuse a configuration file that lies in the data directories of the settings `data`: a
    configuration is run, and files that come with data must never be run.

    >>> from m3i_jax.config import default_config
    >>> config = default_config(); config.data.update({"source": "folder", "path": "/data/images"})
    >>> reject_config_in_data("configs/folder.py", config.data)
    """
    for entry in data.mixture if data.source == "mixture" else [f"{data.source}:{data.path}"]:
        kind, _, path = entry.partition(":")
        if kind not in ("shapes", "tfds"):
            _reject_below(file, path)
    for path in (data.directory, data.split, data.holdout_split):
        if path.startswith(("/", "~")):
            _reject_below(file, path)


def _reject_below(file: str, data_path: str) -> None:
    """Refuse a configuration file below a data directory, or beside the files of a glob, with and
    without what may be a split or a weight after the path."""
    real = pathlib.Path(os.path.realpath(file))
    paths = {data_path, data_path.rpartition("=")[0]}
    paths |= {cut for path in paths for cut in (path.rpartition("@")[0], path.split("@")[0])}
    for path in sorted(path for path in paths if path and "://" not in path):
        place = os.path.expanduser(path)
        folder, parent = os.path.realpath(place.split("*")[0]), os.path.dirname(place)
        within = place[0] != "*" and os.path.isdir(folder) and real.is_relative_to(folder)
        if within or (
            parent
            and glob.has_magic(place)
            and fnmatch.fnmatchcase(str(real.parent), os.path.realpath(parent))
        ):
            raise UserError(
                f"--config {file}: lies in the data, {shorten(path)}, and files that come with"
                " data are never run; copy the file to another directory if it is yours"
            )


def _refuse_before_running(file: str, text: str, overrides: Iterable[str]) -> None:
    """Refuse a file that lies in a data directory which the command line names.

    Only the file knows which of its arguments are data paths, and it may be hostile: every argument
    counts as one, unless the file is shipped with this project. `reject_config_in_data` checks a
    shipped file after it has run.
    """
    accepted = _argument_names(file)
    pieces = [piece.partition("=") for piece in re.split(r"[,;](?=[A-Za-z_]\w*[=:])", text)]
    if not pathlib.Path(file).resolve().is_relative_to(SHIPPED):
        for name, _, value in pieces:
            if accepted is None or name in accepted or ":" in name:
                _reject_below(file, re.sub(r"^\w+:(?!//)", "", value))
    for key, _, value in (assignment.partition("=") for assignment in overrides):
        if key in _DATA_KEYS:
            for entry in value.strip("()[]").split(","):
                _reject_below(file, re.sub(r"^\w+:(?!//)", "", entry.strip(" '\"")))


def _argument_names(file: str) -> set[str] | None:
    """The arguments of `get_config`, parsed without running the file; None if unknown."""
    try:
        tree = ast.parse(pathlib.Path(file).read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "get_config" and not node.args.kwarg:
            arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            return {argument.arg.rstrip("_") for argument in arguments}
    return None


def _parse_arguments(file: str, signature: inspect.Signature, text: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for piece in filter(None, re.split(r",(?=[A-Za-z_]\w*=)", text)):
        name, equals, value = piece.partition("=")
        if f"{name}_" in signature.parameters:  # `from` is a Python keyword: the argument is from_
            name = f"{name}_"
        if name not in signature.parameters or not equals:
            accepted = [n.rstrip("_") for n in signature.parameters]
            near = difflib.get_close_matches(name, accepted, 1)
            names = ", ".join(f"{n}=" for n in accepted) or "none"
            raise UserError(
                f"--config {file}:{name}: there is no such argument; "
                + (f"did you mean {near[0]}=?" if near else f"it takes {names}")
            )
        if name in values:
            raise UserError(
                f"--config {file}:{name.rstrip('_')}: is given twice; remove one of them"
            )
        kind, where = _argument_type(signature.parameters[name]), name.rstrip("_")
        values[name] = parse_value(f"--config {file}:{where}", kind, value)
    for name, parameter in signature.parameters.items():
        if parameter.default is parameter.empty and name not in values:
            raise UserError(
                f"--config {file}: the argument {name} is missing; write --config"
                f" {file}:{name.rstrip('_')}=VALUE"
            )
    return values


def _argument_type(parameter: inspect.Parameter) -> Any:
    """The type of an argument of `get_config`: that of its default, else its annotation, else
    str."""
    default, scalars = parameter.default, {"int": int, "float": float, "bool": bool, "str": str}
    if isinstance(default, tuple):
        return tuple[type(default[0]) if default else str, ...]  # type: ignore[misc]
    if type(default) in scalars.values():
        return type(default)
    return scalars.get(getattr(parameter.annotation, "__name__", parameter.annotation), str)
