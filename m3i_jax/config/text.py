"""Settings as text: `config.txt` of a run, the differences between two runs, and `--help`."""

import pathlib

import ml_collections

from m3i_jax import run_files, schema
from m3i_jax.config.values import default_config, python_literal, setting_table, typed_value
from m3i_jax.errors import UserError, refuse_system_errors, shorten

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
    "model.remat",
    "model.scan",
    "model.keep_gathered",
    "objective.text_chunk",
    "evaluate.",
    "parallel.",
    "report.",
)


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


def config_difference(old: str, new: str) -> list[str]:
    """Returns the differences `key: old -> new` between two texts of `config_to_text`, without the
    keys of FREE. A setting that is missing in the old text had its default.

    >>> config_difference("seed = 0\\ntrain.keep = 2\\n", "seed = 1\\ntrain.keep = 3\\n")
    ['seed: 0 -> 1']
    """
    old_values, new_values = (
        dict(line.split(" = ", 1) for line in text.splitlines() if " = " in line)
        for text in (old, new)
    )
    defaults = {key: repr(value) for key, (_, value, _, _) in setting_table().items()}
    changed = [
        key
        for key in {**old_values, **new_values}
        if old_values.get(key, defaults.get(key)) != new_values.get(key)
        and not key.startswith(FREE)
    ]
    return [
        f"{key}: {old_values.get(key, 'absent')} -> {new_values.get(key, 'absent')}"
        for key in changed
    ]


def help_table() -> str:
    """Returns every key with its default, its meaning and its choices, as columns."""
    rows = []
    for key, (_, value, text, choices) in setting_table().items():
        suffix = f" ({' | '.join(map(str, choices))})" if choices else ""
        rows.append((f"--config.{key}", repr(value), text + suffix))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "\n".join(f"  {k:<{widths[0]}}  {v:<{widths[1]}}  {t}" for k, v, t in rows)
