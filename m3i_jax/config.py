"""The door of the configuration: a ConfigDict comes in, frozen dataclasses go out, and every
mistake is named on one line.

config = default()                      # a locked ml_collections.ConfigDict, the tree of
schema.Config config.optim.lr = 3e-4 settings = resolve(config)              # schema.Config,
checked; nothing downstream reads a ConfigDict or a flag"""

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import math
import os
import pathlib
import re
import traceback
import typing
from typing import Any

import ml_collections

from m3i_jax import run_files, schema
from m3i_jax.errors import UserError, one_line, refuse_system_errors, shorten

OURS = pathlib.Path(__file__).resolve().parent.parent / "configs"
LONGEST = 100_000  # characters of the text of a value; lists of thousands of paths have fewer
_EXAMPLE = {
    int: "numbers such as (-1,1,1)",
    float: "numbers such as (0.2,1.0)",
    str: "names such as mim,clip",
}
# Keys that change what is written, how fast or in how much memory, never what is computed: a run
# may resume with other values of them.
FREE = (
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.panel_every",
    "train.eval_every",
    "train.watchdog",
    "data.threads",
    "data.workers",
    "data.patience",
    "data.missing",
    "model.remat",
    "model.scan",
    "model.keep_gathered",
    "objective.text_chunk",
    "evaluate.",
    "parallel.",
    "report.",
)


def _tree(node: Any) -> dict[str, Any]:
    return {
        f.name: _tree(v) if dataclasses.is_dataclass(v := getattr(node, f.name)) else v
        for f in dataclasses.fields(node)
    }


def default_config() -> ml_collections.ConfigDict:
    """The default configuration (the paper's ViT-B/16 run, Table 7) as a locked ConfigDict.

    >>> default_config().optim.lr
    0.001
    """
    return ml_collections.ConfigDict(_tree(schema.Config())).lock()


def setting_table(
    node: Any = None, prefix: str = ""
) -> dict[str, tuple[Any, Any, str, tuple[Any, ...]]]:
    """Every setting as {dotted key: (type, value, help, choices)}, in the order of the schema.

    >>> setting_table()["optim.b2"][:2]
    (<class 'float'>, 0.95)
    """
    node = node or schema.Config()
    out: dict[str, tuple[Any, Any, str, tuple[Any, ...]]] = {}
    types = typing.get_type_hints(type(node))
    for field in dataclasses.fields(node):
        value, key = getattr(node, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            out |= setting_table(value, key + ".")
        else:
            out[key] = (
                types[field.name],
                value,
                field.metadata.get("help", ""),
                field.metadata.get("choices", ()),
            )
    return out


def _type_name(kind: Any) -> str:
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return plain[kind] if kind in plain else f"a list of {_EXAMPLE[_item(kind)]}"


def _item(kind: Any) -> type:
    return typing.get_args(kind)[0]


def unknown_key_error(
    key: str, known: typing.Iterable[str], where: str = "config.", what: str = "key"
) -> UserError:
    """The error for a key, or something else of a name, that does not exist: names the nearest one
    that does."""
    known = list(known)
    near = (
        difflib.get_close_matches(key, known, 1, 0.5)
        or [k for k in known if k.split(".")[-1] == key.split(".")[-1]][:1]
    )
    hint = f"; did you mean {where}{near[0]}?" if near else f"; --help lists every {what}"
    return UserError(f"{where}{key}: there is no such {what}{hint}")


def _typed(name: str, kind: Any, value: Any) -> Any:
    """`value` as `kind` without guessing: whole numbers pass as numbers, lists as tuples, nothing
    else changes type; `name` is told."""
    wrong = UserError(f"{name}: {shorten(value)} is not {_type_name(kind)}")
    if kind in (int, float):
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or (kind is int and not isinstance(value, int))
        ):
            raise wrong
        try:
            if math.isfinite(value):
                return kind(value)
        except OverflowError:  # a whole number of more than 308 digits, which no float is
            pass
        raise UserError(f"{name}: {shorten(value)} is not finite")
    if kind in (bool, str):
        if not isinstance(value, kind):
            raise wrong
        return value
    if not isinstance(value, (tuple, list)):
        raise wrong
    return tuple(_typed(name, _item(kind), v) for v in value)


def _evaluated(text: str) -> Any:
    """The Python literal that a text is; nothing is called. Raises ValueError for anything else,
    and for what is too long or nested too deep for Python's parser.

    >>> _evaluated("(1, 0.5)")
    (1, 0.5)
    """
    if len(text) > LONGEST:
        raise ValueError(f"has {len(text):,} characters, more than {LONGEST:,}")
    try:
        return ast.literal_eval(text)
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(one_line(error)) from None


def _literal(name: str, kind: Any, text: str) -> Any:
    """The text of an override as `kind`; only Python literals, nothing is evaluated."""
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{name}: {shorten(text)} is not true or false")
        return text.lower() == "true"
    if kind not in (int, float) and _item(kind) is str and text[:1] not in ("(", "["):
        return tuple(filter(None, (item.strip() for item in text.split(","))))
    try:
        value = _evaluated(text)
    except ValueError:
        raise UserError(f"{name}: {shorten(text)} is not {_type_name(kind)}") from None
    return (value,) if kind not in (int, float) and isinstance(value, (int, float)) else value


def apply_overrides(config: ml_collections.ConfigDict, assignments: typing.Iterable[str]) -> None:
    """Apply `a.b=v` assignments in place.

    >>> config = default_config(); apply_overrides(config, ["optim.lr=1e-4"]); config.optim.lr
    0.0001
    """
    known = setting_table()
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if key not in known:
            raise unknown_key_error(key, known)
        if not equals:
            raise UserError(f"config.{key}: has no value; write --config.{key}=VALUE")
        kind = known[key][0]
        parent = config
        for part in key.split(".")[:-1]:
            parent = parent[part]
        with parent.ignore_type():
            parent[key.split(".")[-1]] = _typed(
                f"config.{key}", kind, _literal(f"config.{key}", kind, text)
            )


def load_config(spec: str, overrides: typing.Iterable[str] = ()) -> ml_collections.ConfigDict:
    """The ConfigDict of `FILE[:name=value,...]`: calls FILE's `get_config` with the arguments,
    typed by its defaults. `overrides` are not applied, but a file that lies in the data that they
    name is not run.

    Raises UserError for a missing file, a file without `get_config`, an unknown argument or a value
    of the wrong type."""
    file, _, text = spec.partition(":")
    path = pathlib.Path(file)
    if len(spec) > LONGEST or "\0" in spec:
        raise UserError(
            f"--config {shorten(spec)}: must name a local Python file, such as"
            " configs/quickstart.py"
        )
    if path.suffix != ".py":  # nor an address, of which the part before its colon is left
        raise UserError(
            f"--config {spec}: must name a local Python file, such as configs/quickstart.py"
        )
    if not path.is_file():
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else [], 1
        )
        raise UserError(
            f"--config {file}: there is no such file"
            + (f"; did you mean {path.parent / near[0]}?" if near else "")
        )
    _before_it_runs(file, text, overrides)
    found = importlib.util.spec_from_file_location(f"m3i_jax_config_{path.stem}", path)
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(
                f"--config {file}: has no function get_config; define one that returns"
                " m3i_jax.config.default(), changed"
            )
        get_config = module.get_config
        arguments = _arguments(file, inspect.signature(get_config), text)
        config = get_config(**arguments)
    except UserError:
        raise
    except KeyboardInterrupt:
        raise
    except SystemExit as error:
        raise UserError(
            f"--config {_reason(file, error)}; a configuration returns its settings and ends"
            " nothing"
        ) from error
    except BaseException as error:  # a person's own config file: whatever is wrong with it is theirs to read on one line
        raise UserError(f"--config {_reason(file, error)}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f"--config {file}: get_config returned {type(config).__name__}; it must return"
            " m3i_jax.config.default(), changed"
        )
    return config


def _reason(file: str, error: BaseException) -> str:
    """The file, the line of it that failed, and why, of an error that is not ours."""
    frames, here = traceback.extract_tb(error.__traceback__), pathlib.Path(file).resolve()
    lines = [frame.lineno for frame in frames if pathlib.Path(frame.filename).resolve() == here]
    where = f"{file}, line {lines[-1]}" if lines else file
    # a KeyError's own text is quoted
    text = one_line(error.args[0] if isinstance(error, KeyError) and error.args else error)
    # a locked ConfigDict; the rest of its text is the whole section
    if absent := re.search(r'Key "(.*?)" does not exist', text):
        known = setting_table()
        near = difflib.get_close_matches(
            absent[1], {part for key in known for part in key.split(".")}, 1
        )
        places = [f"config.{key}" for key in known if near and near[0] in key.split(".")]
        hint = (
            f"did you mean {places[0] if len(places) == 1 else near[0]}?"
            if near
            else "--help lists every key"
        )
        return f"{where}: there is no such key {absent[1]!r}; {hint}"
    return f"{where}: {type(error).__name__}: {text}"


def reject_config_in_data(file: str, data: Any) -> None:
    """Refuse a configuration file that lies in the data that it reads: a configuration is run, data
    never is.

    >>> made = default_config(); made.data.update({"source": "folder", "path": "/data/pictures"})
    >>> reject_config_in_data("configs/folder.py", made.data)
    """
    for entry in data.mixture if data.source == "mixture" else [f"{data.source}:{data.path}"]:
        kind, _, place = entry.partition(":")
        if kind not in ("shapes", "tfds"):
            _apart(file, place)
    for place in (data.directory, data.split, data.holdout_split):
        if place.startswith(("/", "~")):
            _apart(file, place)


def _apart(file: str, place: str) -> None:
    """Refuse a configuration file that lies in a directory of data, or in that of a pattern, split
    or weight of it."""
    place = place.split("@")[0].split("*")[0]
    for named in filter(None, {place, place.rpartition("=")[0]}):
        folder = os.path.realpath(os.path.expanduser(named))
        if (
            "://" not in named
            and os.path.isdir(folder)
            and pathlib.Path(os.path.realpath(file)).is_relative_to(folder)
        ):
            raise UserError(
                f"--config {file}: lies in the data, {shorten(named)}, and nothing that comes with"
                " data is run; copy it if it is yours"
            )


def _before_it_runs(file: str, text: str, overrides: typing.Iterable[str]) -> None:
    """What can be refused before a configuration file is run: an argument that it does not take,
    and a file that lies in what the command gives as data. Which argument that is, only the file
    knows, and it may be hostile: each of them counts, unless the file is one of this project, which
    `reject_config_in_data` is asked about when it has run."""
    taken = _takes(file)
    pieces = [piece.partition("=") for piece in re.split(r"[,;](?=[A-Za-z_]\w*[=:])", text)]
    if not pathlib.Path(file).resolve().is_relative_to(OURS):
        for name, _, value in pieces:
            if taken is None or name in taken or ":" in name:
                _apart(file, re.sub(r"^\w+:(?!//)", "", value))
    for key, _, value in (assignment.partition("=") for assignment in overrides):
        if key in (
            "data.path",
            "data.directory",
            "data.mixture",
            "data.split",
            "data.holdout_split",
        ):
            for entry in value.strip("()[]").split(","):
                _apart(file, re.sub(r"^\w+:(?!//)", "", entry.strip(" '\"")))


def _takes(file: str) -> set[str] | None:
    """The arguments of `get_config` in a file that is read and not run; None if they cannot be
    known."""
    try:
        tree = ast.parse(pathlib.Path(file).read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "get_config" and not node.args.kwarg:
            return {
                one.arg.rstrip("_")
                for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            }
    return None


def _arguments(file: str, signature: inspect.Signature, text: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for piece in filter(None, re.split(r",(?=[A-Za-z_]\w*=)", text)):
        name, equals, value = piece.partition("=")
        if f"{name}_" in signature.parameters:  # from=, which Python keeps for itself
            name = f"{name}_"
        if name not in signature.parameters or not equals:
            taken = [n.rstrip("_") for n in signature.parameters]
            near = difflib.get_close_matches(name, taken, 1)
            names = ", ".join(f"{n}=" for n in taken) or "none"
            raise UserError(
                f"--config {file}:{name}: there is no such argument; "
                + (f"did you mean {near[0]}=?" if near else f"it takes {names}")
            )
        kind, where = _kind(signature.parameters[name]), f"--config {file}:{name.rstrip('_')}"
        out[name] = _typed(where, kind, _literal(where, kind, value))
    for name, parameter in signature.parameters.items():
        if parameter.default is parameter.empty and name not in out:
            raise UserError(
                f"--config {file}: the argument {name} is missing; write --config"
                f" {file}:{name.rstrip('_')}=VALUE"
            )
    return out


def _kind(parameter: inspect.Parameter) -> Any:
    """The type of an argument of `get_config`: that of its default; without one, as it is
    annotated; else text."""
    default, plain = parameter.default, {"int": int, "float": float, "bool": bool, "str": str}
    if isinstance(default, tuple):
        return tuple[type(default[0]) if default else str, ...]  # type: ignore[misc]
    if type(default) in plain.values():
        return type(default)
    return plain.get(getattr(parameter.annotation, "__name__", parameter.annotation), str)


def _build(cls: type, node: Any, prefix: str, known: dict[str, Any]) -> Any:
    if not isinstance(node, (dict, ml_collections.ConfigDict)):
        raise UserError(f"config.{prefix[:-1]}: {shorten(node)} is not a section of settings")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    types, values = typing.get_type_hints(cls), {}
    for name in node:
        if name not in fields:
            raise unknown_key_error(prefix + str(name), known)
        kind, value = types[name], node[name]
        if dataclasses.is_dataclass(kind):
            values[name] = _build(typing.cast(type, kind), value, prefix + name + ".", known)
            continue
        value, choices = (
            _typed(f"config.{prefix}{name}", kind, value),
            fields[name].metadata.get("choices", ()),
        )
        if choices and value not in choices:
            near = difflib.get_close_matches(str(value), [str(c) for c in choices], 1)
            raise UserError(
                f"config.{prefix}{name}: {shorten(value)} is none of {', '.join(map(str, choices))}"
                + (f"; did you mean {near[0]}?" if near else "")
            )
        values[name] = value
    return cls(**values)


def resolve(config: ml_collections.ConfigDict) -> schema.Config:
    """The checked, frozen settings of a ConfigDict.

    Raises UserError that names the key, the value and the fix for unknown keys, wrong types and
    impossible values.

    >>> resolve(default_config()).tokens
    196
    """
    from m3i_jax import validation

    built = _build(schema.Config, config, "", setting_table())
    validation.validate_settings(built)
    return built


def config_to_text(config: schema.Config) -> str:
    """One `key = value` a line, in the order of the schema: what is saved with a run and compared
    when it resumes.

    >>> config_to_text(schema.Config()).splitlines()[0]
    'seed = 0'
    """
    return "".join(
        f"{key} = {value!r}\n" for key, (_, value, _, _) in setting_table(config).items()
    )


def config_from_text(text: str, where: str) -> ml_collections.ConfigDict:
    """The ConfigDict of a text of `config_to_text`: the settings of a run from its `config.txt`.
    What it does not name is at its default.

    Args:
      text: lines `key = value`.
      where: its file, for error messages.

    Raises:
      UserError: a key that does not exist, or a value that is no literal.

    >>> config_from_text("optim.lr = 0.5\\n", "config.txt").optim.lr
    0.5
    """
    config, known = default_config(), setting_table()
    for line in filter(None, text.splitlines()):
        key, equals, value = line.partition(" = ")
        if key not in known or not equals:
            raise UserError(
                f"{where}: {shorten(key)} is no setting of this version of m3i_jax; use the version"
                " that made the run"
            )
        parent = config
        *way, last = key.split(".")
        for part in way:
            parent = parent[part]
        try:
            with parent.ignore_type():
                parent[last] = _typed(f"{where}: {key}", known[key][0], _evaluated(value))
        except ValueError:
            raise UserError(
                f"{where}: {key}: {shorten(value)} is no value; the file was changed"
            ) from None
    return config


def load_from_workdir(workdir: str, flag: str) -> ml_collections.ConfigDict:
    """The settings of the run in a directory. Raises UserError, naming `flag`, if there is none."""
    file = pathlib.Path(workdir) / "config.txt"
    if not file.is_file():
        raise UserError(f"{flag}: {workdir!r} has no config.txt; give the --workdir of a run")
    with refuse_system_errors():
        text = run_files.read_run_text(
            file, "restore it; the command that trained the run writes it anew if it is deleted"
        )
        return config_from_text(text, str(file))


def config_difference(old: str, new: str) -> list[str]:
    """The lines `key: old -> new` in which two texts of `config_to_text` differ, keys that never
    change the result left out. A setting that the old text does not know yet was at its default.

    >>> config_difference("seed = 0\\ntrain.keep = 2\\n", "seed = 1\\ntrain.keep = 3\\n")
    ['seed: 0 -> 1']
    """
    was, now = (
        dict(line.split(" = ", 1) for line in text.splitlines() if " = " in line)
        for text in (old, new)
    )
    born = {key: repr(value) for key, (_, value, _, _) in setting_table().items()}
    changed = [
        k
        for k in {**was, **now}
        if was.get(k, born.get(k)) != now.get(k) and not k.startswith(FREE)
    ]
    return [f"{k}: {was.get(k, 'absent')} -> {now.get(k, 'absent')}" for k in changed]


def help_table() -> str:
    """Every key with its default and meaning, made from the dataclasses."""
    rows = []
    for key, (_, value, text, choices) in setting_table().items():
        rows.append(
            (
                f"--config.{key}",
                repr(value),
                text + (f" ({' | '.join(map(str, choices))})" if choices else ""),
            )
        )
    widths = [max(len(r[i]) for r in rows) for i in (0, 1)]
    return "\n".join(f"  {k:<{widths[0]}}  {v:<{widths[1]}}  {t}" for k, v, t in rows)


def rescale(config: ml_collections.ConfigDict, batch_size: int) -> None:
    """Set the batch size, and below the paper's 4,096 images learning rate and target momentum by
    the linear rule from the values there.

    lr * B / 4096; 1 - (1 - m) * B / 4096, so that the target moves as far an epoch; warm-up and
    length are counted in epochs already. Above 4,096 both stay: the paper has the same two at 4,096
    and at 40,000.

    >>> config = default_config(); rescale(config, 1024); config.optim.lr, round(config.optim.ema, 5)
    (0.00025, 0.99875)
    >>> config = default_config(); rescale(config, 40_000); config.optim.lr, config.optim.ema, config.train.batch_size
    (0.001, 0.995, 40000)
    """
    share = min(1.0, batch_size / config.train.batch_size)
    config.optim.lr *= share
    config.optim.ema = 1 - (1 - config.optim.ema) * share
    config.train.batch_size = batch_size


def scale_for_custom_data(
    config: ml_collections.ConfigDict, *, epochs: float, batch_size: int
) -> None:
    """Set the length and the batch of a run on a user's own images, and leave open what follows
    from them, from the number of images and from their size (training/scaling.py): rate, momentum,
    warm-up, crops and colours. A value that is set later is kept.

    The pooling starts at full size: at 0.02 its token is near zero for most of a short run of a
    narrow encoder.

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
    config.train.update({"epochs": epochs, "batch_size": batch_size})
