"""The recipes that ship with the package: where they are, which file `--config` means, and copies
to edit."""

import ast
import difflib
import pathlib
import re
import shutil

from m3i_jax.config.values import MAX_VALUE_LENGTH
from m3i_jax.errors import UserError, shorten
from m3i_jax.version import __version__

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]
# inside the package if it was installed from a wheel, beside it in a checkout
SHIPPED = next(
    (path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir()),
    _PACKAGE / "configs",
)
_NOT_A_FILE = "must name a local Python file, such as configs/quickstart.py"
DEFAULT_RECIPE = "configs/folder.py"
# Scripts of launch/ that need the tests of a checkout.
_DEVELOPMENT = ("bench.sh", "faults.sh", "soak.sh", "test.sh")


def shipped_recipes() -> list[str]:
    """Returns names of the recipes that ship, as `--config` takes them.

    >>> shipped_recipes()[:2], "configs/transfer/coco.py" in shipped_recipes()
    (['configs/folder.py', 'configs/forms.py'], True)
    """
    found = (path.relative_to(SHIPPED) for path in SHIPPED.rglob("*.py"))
    return [f"configs/{path.as_posix()}" for path in sorted(found, key=lambda p: (len(p.parts), p))]


def _closest_first(name: str) -> tuple[list[str], bool]:
    """The recipes that ship, those of similar file names first; whether there are any of them."""
    stems = {recipe: pathlib.PurePath(recipe).name for recipe in shipped_recipes()}
    close = difflib.get_close_matches(pathlib.PurePath(name).name, stems.values(), 3)
    order = {stem: number for number, stem in enumerate(close)}
    return sorted(stems, key=lambda recipe: order.get(stems[recipe], len(order))), bool(close)


def find_config_file(spec: str) -> pathlib.Path:
    """Returns the file that `--config FILE[:name=value,...]` means: the local one if it exists,
    else the recipe of that name that ships.

    Raises:
      UserError: FILE is no Python file, or there is neither; the message says where it was looked
        for, and lists what ships, names close to FILE first.

    >>> find_config_file("configs/folder.py:path=images").name
    'folder.py'
    """
    file = spec.partition(":")[0]
    path = pathlib.Path(file)
    if len(spec) > MAX_VALUE_LENGTH or "\0" in spec:
        raise UserError(f"--config {shorten(spec)}: {_NOT_A_FILE}")
    if path.suffix != ".py":  # includes URLs, of which `file` is the part before the first colon
        raise UserError(f"--config {spec}: {_NOT_A_FILE}")
    if path.is_file():
        return path
    if path.as_posix() in shipped_recipes():
        return SHIPPED.parent / path
    names, close = _closest_first(path.name)
    siblings = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
    local = difflib.get_close_matches(path.name, siblings, 1)
    near = str(path.parent / local[0]) if local else names[0] if close else ""
    raise UserError(
        f"--config {file}: there is no such file"
        + (f"; did you mean {near}? Looked" if near else "; looked")
        + (" there and" if path.is_absolute() else f" in {pathlib.Path.cwd()} and")
        + f" in {SHIPPED.parent}, where these ship: {', '.join(names)}"
    )


def describe_config_file(path: pathlib.Path) -> str:
    """Returns a line for the log: which file `find_config_file` found, and whether it ships.

    >>> describe_config_file(find_config_file("configs/folder.py"))
    'configuration: ...configs/folder.py, which ships with m3i_jax ...'
    """
    ships = f"which ships with m3i_jax {__version__}"
    if path.resolve().is_relative_to(SHIPPED):
        return f"configuration: {path}, {ships}"
    if path.as_posix() in shipped_recipes():
        return f"configuration: {path} of this directory, not the file of that name {ships}"
    return f"configuration: {path}"


def _example(source: str, name: str, target: str) -> str:
    """The first command in the docstring of a recipe, on one line and for its copy."""
    text = re.sub(r"\\\n\s*", "", ast.get_docstring(ast.parse(source)) or "")
    commands = [line.strip() for line in text.splitlines() if "--config" in line and name in line]
    command = commands[0] if commands else f"python -m m3i_jax.main --config {name} --workdir DIR"
    return command.replace("python -m m3i_jax.main", "m3i-jax").replace(name, target)


def copy_recipe(directory: str, name: str = DEFAULT_RECIPE) -> str:
    """Copy a recipe that ships into a directory, and return the command that runs the copy.

    A recipe imports nothing but the package, so that one file is all of it.

    Raises:
      UserError: no recipe of that name ships, or the directory has such a file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     copy_recipe(directory)
    'm3i-jax --config .../folder.py:path=DIR --workdir runs/folder'
    """
    if name not in shipped_recipes():
        names, close = _closest_first(name)
        raise UserError(
            f"init --config {shorten(name)}: no such recipe ships"
            + (f"; did you mean {names[0]}? There are" if close else "; there are")
            + f" {', '.join(names)}"
        )
    source = SHIPPED.parent / name
    target = pathlib.Path(directory) / source.name
    if target.exists():
        raise UserError(f"init {directory}: {target} exists; choose another directory, or move it")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return _example(source.read_text(), name, str(target))


def copy_launchers(directory: str) -> pathlib.Path:
    """Copy the launch scripts into DIRECTORY/launch; they install this version of the package.

    Raises:
      UserError: the directory has a launch folder.
    """
    target = pathlib.Path(directory) / "launch"
    if target.exists():
        raise UserError(f"init {directory}: {target} exists; choose another directory, or move it")
    shutil.copytree(SHIPPED.parent / "launch", target, ignore=shutil.ignore_patterns(*_DEVELOPMENT))
    (target / "VERSION").write_text(f"{__version__}\n")
    return target
