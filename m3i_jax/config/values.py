"""Keys, types and values of settings: the table of all settings, the conversion of values, and
settings as text: `config.txt` of a run, the differences between two runs, and `--help`."""

import ast
import dataclasses
import difflib
import math
import pathlib
import typing
from collections.abc import Iterable
from typing import Any

import ml_collections

from m3i_jax import run_files, schema
from m3i_jax.errors import UserError, one_line, refuse_system_errors, shorten

MAX_VALUE_LENGTH = 100_000  # characters; a list of thousands of paths has fewer
_EXAMPLE = {
    int: "numbers such as (-1,1,1)",
    float: "numbers such as (0.2,1.0)",
    str: "names such as mim,clip",
}
# Keys that change output files, speed or memory but no result: a run may resume with other values.
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
    "data.index",
    "model.remat",
    "model.scan",
    "model.keep_gathered",
    "objective.text_chunk",
    "evaluate.",
    "compare.",
    "curate.",
    "parallel.",
    "report.",
)


def _as_dict(node: Any) -> dict[str, Any]:
    return {
        f.name: _as_dict(v) if dataclasses.is_dataclass(v := getattr(node, f.name)) else v
        for f in dataclasses.fields(node)
    }


def default_config() -> ml_collections.ConfigDict:
    """Returns the default configuration (the paper's ViT-B/16 run, Table 7) as a locked ConfigDict.

    >>> default_config().optim.lr
    0.001
    """
    return ml_collections.ConfigDict(_as_dict(schema.Config())).lock()


def setting_table(
    node: Any = None, prefix: str = ""
) -> dict[str, tuple[Any, Any, str, tuple[Any, ...]]]:
    """Returns every setting as {dotted key: (type, value, help, choices)}, in the order of the
    schema.

    >>> setting_table()["optim.b2"][:2]
    (<class 'float'>, 0.95)
    """
    node = node or schema.Config()
    table: dict[str, tuple[Any, Any, str, tuple[Any, ...]]] = {}
    types = typing.get_type_hints(type(node))
    for field in dataclasses.fields(node):
        value, key = getattr(node, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            table |= setting_table(value, key + ".")
        else:
            metadata = field.metadata
            table[key] = (types[field.name], value, metadata["help"], metadata["choices"])
    return table


def item_type(kind: Any) -> type:
    """Returns the type of the entries of a list type.

    >>> item_type(tuple[int, ...])
    <class 'int'>
    """
    return typing.get_args(kind)[0]


def _type_name(kind: Any) -> str:
    scalars = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return scalars[kind] if kind in scalars else f"a list of {_EXAMPLE[item_type(kind)]}"


def unknown_key_error(
    key: str, known: Iterable[str], where: str = "config.", what: str = "key"
) -> UserError:
    """Returns the error for an unknown key (or other `what`); it suggests the closest known one."""
    known = list(known)
    near = (
        difflib.get_close_matches(key, known, 1, 0.5)
        or [k for k in known if k.split(".")[-1] == key.split(".")[-1]][:1]
    )
    hint = f"; did you mean {where}{near[0]}?" if near else f"; --help lists every {what}"
    return UserError(f"{where}{key}: there is no such {what}{hint}")


def typed_value(name: str, kind: Any, value: Any) -> Any:
    """`value` as type `kind`: an int is accepted as a float and a list as a tuple; nothing else is
    converted.

    Raises:
      UserError: another type, or a number that is not finite; the message begins with `name`.
    """
    wrong_type = UserError(f"{name}: {shorten(value)} is not {_type_name(kind)}")
    if kind in (int, float):
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or (kind is int and not isinstance(value, int))
        ):
            raise wrong_type
        try:
            if math.isfinite(value):
                return kind(value)
        except OverflowError:  # an integer of more than 308 digits, larger than any float
            pass
        raise UserError(f"{name}: {shorten(value)} is not finite")
    if kind in (bool, str):
        if not isinstance(value, kind):
            raise wrong_type
        return value
    if not isinstance(value, (tuple, list)):
        raise wrong_type
    return tuple(typed_value(name, item_type(kind), v) for v in value)


def python_literal(text: str) -> Any:
    """Returns the value of a Python literal; no name is looked up and nothing is called.

    Raises:
      ValueError: any other text, and a text too long or nested too deeply for Python's parser.

    >>> python_literal("(1, 0.5)")
    (1, 0.5)
    """
    if len(text) > MAX_VALUE_LENGTH:
        raise ValueError(f"has {len(text):,} characters, more than {MAX_VALUE_LENGTH:,}")
    try:
        return ast.literal_eval(text)
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(one_line(error)) from None


def parse_value(name: str, kind: Any, text: str) -> Any:
    """Returns the value of type `kind` that a command line gives as text, such as `1e-4` or
    `mim,clip`.

    Raises:
      UserError: a text that is no value of this type; the message begins with `name`.
    """
    value: Any = text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{name}: {shorten(text)} is not true or false")
        value = text.lower() == "true"
    elif kind is not str:
        is_list = kind not in (int, float)
        if is_list and item_type(kind) is str and text[:1] not in ("(", "["):
            value = tuple(filter(None, (item.strip() for item in text.split(","))))
        else:
            try:
                value = python_literal(text)
            except ValueError:
                raise UserError(f"{name}: {shorten(text)} is not {_type_name(kind)}") from None
            if is_list and isinstance(value, (int, float)):
                value = (value,)
    return typed_value(name, kind, value)


def config_to_text(config: schema.Config) -> str:
    """Returns one line `key = value` per setting, in the order of the schema. It is saved with a
    run and compared when the run resumes.

    >>> config_to_text(schema.Config()).splitlines()[0]
    'seed = 0'
    """
    return "".join(
        f"{key} = {value!r}\n" for key, (_, value, _, _) in setting_table(config).items()
    )


def config_from_text(text: str, where: str) -> ml_collections.ConfigDict:
    """Returns the ConfigDict of a text of `config_to_text`. Settings that the text omits have their
    defaults.

    Args:
      text: lines `key = value`.
      where: the file, for error messages.

    Raises:
      UserError: an unknown key, or a value that is no literal.

    >>> config_from_text("optim.lr = 0.5\\n", "config.txt").optim.lr
    0.5
    """
    config, table = default_config(), setting_table()
    for line in filter(None, text.splitlines()):
        key, equals, value = line.partition(" = ")
        if key not in table or not equals:
            raise UserError(
                f"{where}: {shorten(key)} is not a setting of this version of m3i_jax; use the"
                " version that trained the run"
            )
        section = config
        *sections, name = key.split(".")
        for part in sections:
            section = section[part]
        try:
            with section.ignore_type():
                section[name] = typed_value(f"{where}: {key}", table[key][0], python_literal(value))
        except ValueError:
            raise UserError(
                f"{where}: {key}: {shorten(value)} is not a valid value; the file was changed by"
                " hand: restore it"
            ) from None
    return config


def load_from_workdir(workdir: str, flag: str) -> ml_collections.ConfigDict:
    """Returns the settings of the run in a directory.

    Raises:
      UserError: the directory holds no run; the message begins with `flag`.
    """
    file = pathlib.Path(workdir) / "config.txt"
    if not file.is_file():
        raise UserError(f"{flag}: {workdir!r} has no config.txt; give the --workdir of a run")
    with refuse_system_errors():
        text = run_files.read_run_text(
            file, "restore it; the command that trained the run writes it anew if it is deleted"
        )
        return config_from_text(text, str(file))


def config_difference(old: str, new: str, *, also: str = "") -> list[str]:
    """Returns the differences `key: old -> new` between two texts of `config_to_text`. A setting
    that is missing in a text had its default.

    Args:
      old, new: the texts.
      also: a section of FREE, such as "evaluate."; the other keys of FREE are left out.

    >>> config_difference("seed = 0\\ntrain.keep = 2\\n", "seed = 1\\ntrain.keep = 3\\n")
    ['seed: 0 -> 1']
    >>> config_difference("evaluate.k = 20\\n", "evaluate.k = 10\\n", also="evaluate.")
    ['evaluate.k: 20 -> 10']
    """
    old_values, new_values = (
        dict(line.split(" = ", 1) for line in text.splitlines() if " = " in line)
        for text in (old, new)
    )
    defaults = {key: repr(value) for key, (_, value, _, _) in setting_table().items()}
    changed = [
        key
        for key in {**old_values, **new_values}
        if old_values.get(key, defaults.get(key)) != new_values.get(key, defaults.get(key))
        and (not key.startswith(FREE) or (also and key.startswith(also)))
    ]
    return [
        f"{key}: {old_values.get(key, 'absent')} -> {new_values.get(key, 'absent')}"
        for key in changed
    ]


def evaluation_difference(old: str, new: str) -> list[str]:
    """Returns the lines of `config_difference` about evaluations: the training may go on with other
    settings of them, but their values may not be comparable.

    >>> evaluation_difference("seed = 0\\nevaluate.k = 20\\n", "seed = 1\\nevaluate.k = 10\\n")
    ['evaluate.k: 20 -> 10']
    """
    lines = config_difference(old, new, also="evaluate.")
    return [
        line
        for line in lines
        if line.startswith("evaluate.") and not line.startswith("evaluate.batch_size:")
    ]


def help_table() -> str:
    """Returns every key with its default, its meaning and its choices, as columns."""
    rows = []
    for key, (_, value, text, choices) in setting_table().items():
        suffix = f" ({' | '.join(map(str, choices))})" if choices else ""
        rows.append((f"--config.{key}", repr(value), text + suffix))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "\n".join(f"  {k:<{widths[0]}}  {v:<{widths[1]}}  {t}" for k, v, t in rows)
