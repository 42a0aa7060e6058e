"""The laws of the house that a machine can check (m3i_jax/README.md states them; those of names and
words are in test_names.py). Each checker takes source text and returns complaints. It is first
tried on a small offender, then run over the project."""

import ast
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "m3i_jax"
LONGEST = 500

# A room (a folder of the package, or a module beside them) may import itself and these. Lower rooms
# never know higher ones.
BASE = {"schema", "errors", "version", "privacy", "progress", "run_files", "registries"}
BELOW_TRAINING = BASE | {
    "config",
    "published_settings",
    "objective",
    "models",
    "augment",
    "data",
    "parallel",
    "reporting",
    "profiling",
    "interop",
}
ROOMS: dict[str, set[str]] = {
    "version": set(),
    "errors": set(),
    "library_errors": {"errors"},
    "interrupts": set(),
    "installation": set(),
    "privacy": set(),
    "registries": set(),
    "progress": set(),
    "run_files": {"errors", "privacy"},
    "schema": {"errors"},
    "objective": {"registries"},
    # the last two for `load` and `roi_align` and the like, when they are asked for
    "__init__": {"objective", "version", "evaluation", "models", "installation"},
    "published_rates": set(),
    "published_views": set(),
    "published_caption_settings": {"published_rates", "published_views"},
    "published_settings": BASE
    | {"config", "published_caption_settings", "published_rates", "published_views"},
    "published_dense_settings": BASE | {"models"},
    "validation": BASE | {"objective"},
    "config": BASE | {"objective", "validation"},
    "models": BASE | {"objective", "parallel"},
    "augment": BASE | {"objective"},
    "data": BASE | {"objective", "interrupts"},
    "parallel": BASE,
    "reporting": BASE,
    "profiling": BASE | {"parallel", "reporting"},
    "interop": BASE | {"objective"},
    "training": BELOW_TRAINING | {"library_errors", "interrupts"},
    "evaluation": BASE
    | {"config", "objective", "models", "augment", "data", "parallel"}
    | {"training", "interop", "published_dense_settings"},
    "modes": BELOW_TRAINING | {"training", "evaluation", "validation", "interrupts"},
    "main": BELOW_TRAINING
    | {"training", "evaluation", "validation", "modes", "library_errors", "interrupts"}
    | {"installation"},
    "__main__": {"main", "interrupts", "installation"},
}
# The pure room: what another project gets with it.
PURE = {"jax", "jaxlib", "numpy", "optax", "chex"}
# A library that is kept to one place, so that it can be replaced there.
KEPT = {
    "flax": ("models/", "training/task.py"),
    "orbax": ("training/checkpoint.py", "training/saved_arrays.py"),
}
# Imported inside the function that needs them, or not at all.
LAZY = {
    "tensorflow",
    "tensorflow_datasets",
    "faster_coco_eval",
    "pycocotools",
    "torch",
    "torchvision",
    "wandb",
    "tensorboardX",
    "tensorboard",
    "clu",
    "fsspec",
    "pyarrow",
    "ray",
    "gcsfs",
    "simplejpeg",
    "cykooz_resizer",
    "timm",
    "transformers",
    "huggingface_hub",
    "tqdm",
}
# Not even inside a function, except where their files are read and compared.
NEVER = {"tensorflow": "no room", "torch": "interop", "torchvision": "no room"}
UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve"}
UNSAFE_CALLS = ("eval", "exec", "builtins.eval", "builtins.exec", "os.system", "os.popen")
UNSAFE_ARGUMENTS = ("shell", "allow_pickle")


def calls(node: ast.Call, *names: str) -> str:
    """The dotted name that is called if it is one of these, or "". The last part is compared first:
    to write out every call of the project takes seconds."""
    last = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if not any(name.split(".")[-1] == last for name in names):
        return ""
    called = ast.unparse(node.func)
    return called if called in names else ""


def mentions(source: str, names: Collection[str]) -> bool:
    """Whether a source has one of these words: without, it need not be parsed."""
    return bool(re.search(rf"\b({'|'.join(names)})\b", source))


def imports(
    source: str, name: str = "m3i_jax/x.py", *, top_only: bool = False
) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import; `from a import b` gives a.b, relative imports are
    resolved against `name`, and importlib is seen through as far as its text is written out."""
    package = list(pathlib.PurePosixPath(name).parent.parts)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    there: list[ast.AST] = [ast.parse(source)]
    while there:
        node = there.pop()
        if not (top_only and isinstance(node, functions)):
            there.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and calls(node, "importlib.import_module", "import_module", "__import__")
            and node.args
        ):
            first = (
                node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            )
            if isinstance(first, ast.Constant):
                yield node.lineno, str(first.value)


def room_of(name: str) -> str:
    """The room of a file of the package: m3i_jax/data/crops.py -> data, m3i_jax/main.py -> main."""
    parts = pathlib.PurePosixPath(name).parts
    return parts[1] if len(parts) > 2 else pathlib.PurePosixPath(name).stem


def one_way(source: str, name: str) -> list[str]:
    room, found = room_of(name), []
    if room not in ROOMS:
        return [
            f"{name}: the room '{room}' is not in the table ROOMS of tests/test_laws.py: say there"
            " what it may import"
        ]
    for line, module in imports(source, name):
        parts = module.split(".")
        if parts[0] != "m3i_jax":
            continue
        other = parts[1] if len(parts) > 1 and parts[1] in ROOMS else "__init__"
        if other != room and other not in ROOMS[room]:
            found.append(f"{name}:{line}: {room} imports {module}, which may not be known there")
    return found


def pure(source: str, name: str) -> list[str]:
    if room_of(name) != "objective":
        return []
    allowed = PURE | {"m3i_jax"} | set(sys.stdlib_module_names)
    return [
        f"{name}:{line}: objective imports {m}"
        for line, m in imports(source, name)
        if m.split(".")[0] not in allowed
    ]


def kept(source: str, name: str) -> list[str]:
    if not mentions(source, KEPT):
        return []
    inside = name.removeprefix("m3i_jax/")
    return [
        f"{name}:{line}: {module} outside {' and '.join(KEPT[library])}"
        for line, module in imports(source, name)
        if (library := module.split(".")[0]) in KEPT and not inside.startswith(KEPT[library])
    ]


def lazy(source: str, name: str) -> list[str]:
    if not mentions(source, LAZY | NEVER.keys()):
        return []
    eager = [
        (line, m) for line, m in imports(source, name, top_only=True) if m.split(".")[0] in LAZY
    ]
    never = [
        (line, m)
        for line, m in imports(source, name)
        if NEVER.get(m.split(".")[0], room_of(name)) != room_of(name)
    ]
    return [f"{name}:{line}: {m} when the module is imported" for line, m in eager] + [
        f"{name}:{line}: {m} in the core" for line, m in never
    ]


def short(source: str, name: str) -> list[str]:
    lines = len(source.splitlines())
    return [f"{name}: {lines} lines, at most {LONGEST}"] if lines > LONGEST else []


def safe(source: str, name: str) -> list[str]:
    words = {call.split(".")[-1] for call in UNSAFE_CALLS} | UNSAFE_MODULES | {*UNSAFE_ARGUMENTS}
    if not mentions(source, words):
        return []
    found = [
        (line, m)
        for line, m in imports(source, name)
        if m.split(".")[0] in UNSAFE_MODULES or m in ("os.system", "os.popen")
    ]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            if called := calls(node, *UNSAFE_CALLS):
                found.append((node.lineno, called))
            on = {
                k.arg
                for k in node.keywords
                if k.arg and not (isinstance(k.value, ast.Constant) and not k.value.value)
            }
            found += [(node.lineno, f"{one}=True") for one in UNSAFE_ARGUMENTS if one in on]
    return [f"{name}:{line}: {what}" for line, what in found]


def documented(source: str, name: str) -> list[str]:
    found = ast.get_docstring(ast.parse(source))
    return [] if found else [f"{name}: no docstring that says what the module is"]


def files(*folders: str) -> list[pathlib.Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


LAWS: dict[str, tuple[Callable[[str, str], list[str]], tuple[str, ...]]] = {
    "imports run one way": (one_way, ("m3i_jax",)),
    "objective is pure": (pure, ("m3i_jax",)),
    "flax and orbax are kept in their places": (kept, ("m3i_jax",)),
    "optional means lazy": (lazy, ("m3i_jax", "configs")),
    "no long file": (short, ("m3i_jax", "configs", "tests")),
    "nothing runs text or unpickles": (safe, ("m3i_jax", "configs", "tests")),
    "every module says what it is": (documented, ("m3i_jax", "configs")),
}

# law -> (name of a file, source that breaks the law, source that does not)
OFFENDERS: list[tuple[str, str, str, str]] = [
    (
        "imports run one way",
        "m3i_jax/objective/a.py",
        "from m3i_jax import schema",
        "from m3i_jax.objective import masks",
    ),
    (
        "imports run one way",
        "m3i_jax/objective/a.py",
        "def f():\n    import m3i_jax.config",
        "import m3i_jax.objective.masks",
    ),
    (
        "imports run one way",
        "m3i_jax/models/vit.py",
        "from m3i_jax.training import step",
        "from m3i_jax.models.layers import dense",
    ),
    (
        "imports run one way",
        "m3i_jax/models/vit.py",
        "from ..training.state import State",
        "from .layers import dense",
    ),
    (
        "imports run one way",
        "m3i_jax/data/a.py",
        "from m3i_jax.models.vit import patchify",
        "from m3i_jax.objective import masks",
    ),
    (
        "imports run one way",
        "m3i_jax/reporting/a.py",
        "from m3i_jax.training.task import State",
        "from m3i_jax.errors import UserError",
    ),
    (
        "imports run one way",
        "m3i_jax/training/a.py",
        "from m3i_jax import evaluation",
        "from m3i_jax import parallel",
    ),
    (
        "imports run one way",
        "m3i_jax/evaluation/a.py",
        "import m3i_jax.main",
        "import m3i_jax.training.step",
    ),
    (
        "imports run one way",
        "m3i_jax/schema/data.py",
        "from m3i_jax.config import resolve",
        "import dataclasses",
    ),
    (
        "imports run one way",
        "m3i_jax/models/vit.py",
        "from m3i_jax import gaussian",
        "from m3i_jax.objective.losses import gaussian",
    ),
    (
        "imports run one way",
        "m3i_jax/__init__.py",
        "importlib.import_module('m3i_jax.config')",
        "importlib.import_module(f'm3i_jax.objective.{x}')",
    ),
    ("imports run one way", "m3i_jax/cellar/a.py", "import numpy", ""),
    (
        "objective is pure",
        "m3i_jax/objective/a.py",
        "import flax.linen",
        "import chex, math, optax\nimport jax.numpy as jnp",
    ),
    (
        "objective is pure",
        "m3i_jax/objective/a.py",
        "def f():\n    from scipy import stats",
        "from jax.scipy import stats",
    ),
    (
        "flax and orbax are kept in their places",
        "m3i_jax/training/step.py",
        "import flax.struct",
        "import optax",
    ),
    (
        "flax and orbax are kept in their places",
        "m3i_jax/data/a.py",
        "def f():\n    import orbax.checkpoint as ocp",
        "import grain",
    ),
    (
        "flax and orbax are kept in their places",
        "m3i_jax/training/task.py",
        "import orbax.checkpoint",
        "import flax.struct",
    ),
    (
        "flax and orbax are kept in their places",
        "m3i_jax/models/vit.py",
        "from orbax import checkpoint",
        "from flax import linen",
    ),
    (
        "optional means lazy",
        "m3i_jax/reporting/a.py",
        "try:\n    import wandb\nexcept ImportError:\n    pass",
        "def f():\n    import wandb",
    ),
    (
        "optional means lazy",
        "m3i_jax/data/a.py",
        "def f():\n    import tensorflow as tf",
        "def f():\n    import tensorflow_datasets",
    ),
    (
        "optional means lazy",
        "m3i_jax/data/a.py",
        "class A:\n    from torch import nn",
        "class A:\n    def f(self):\n        import simplejpeg",
    ),
    ("optional means lazy", "m3i_jax/interop/a.py", "import torch", "def f():\n    import torch"),
    (
        "optional means lazy",
        "m3i_jax/data/a.py",
        "def f():\n    import torch",
        "def f():\n    import simplejpeg",
    ),
    ("no long file", "m3i_jax/a.py", "x = 1\n" * (LONGEST + 1), "x = 1\n" * LONGEST),
    ("nothing runs text or unpickles", "a.py", "eval('1')", "model.eval()"),
    ("nothing runs text or unpickles", "a.py", "exec(text)", "executor(text)"),
    (
        "nothing runs text or unpickles",
        "a.py",
        "def f():\n    from pickle import loads",
        "import json",
    ),
    (
        "nothing runs text or unpickles",
        "a.py",
        "import os\nos.system('ls')",
        "import os\nos.getcwd()",
    ),
    (
        "nothing runs text or unpickles",
        "a.py",
        "subprocess.run('ls', shell=True)",
        "subprocess.run(['ls'], shell=False)",
    ),
    (
        "nothing runs text or unpickles",
        "a.py",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=False)",
    ),
    ("every module says what it is", "a.py", "x = 1", '"""One number."""\nx = 1'),
]


@pytest.mark.parametrize(("law", "name", "offending", "lawful"), OFFENDERS)
def test_the_checker_itself(law: str, name: str, offending: str, lawful: str) -> None:
    check = LAWS[law][0]
    assert check(offending, name), f"'{law}' does not see {offending!r} in {name}"
    if name != "m3i_jax/cellar/a.py":
        assert not check(lawful, name)


def test_every_law_has_an_offender() -> None:
    assert {law for law, *_ in OFFENDERS} == set(LAWS)


def test_rooms_have_an_order() -> None:
    """The table itself must be one way: following it from any room never leads back."""

    def reach(room: str, seen: tuple[str, ...]) -> None:
        assert room not in seen, " -> ".join([*seen, room])
        for other in ROOMS[room]:
            reach(other, (*seen, room))

    for room in ROOMS:
        reach(room, ())


@pytest.mark.smoke
@pytest.mark.parametrize("law", LAWS)
def test_law(law: str) -> None:
    check, folders = LAWS[law]
    paths = files(*folders)
    assert paths, f"no Python file in {', '.join(folders)}"
    complaints = [
        c for path in paths for c in check(path.read_text(), path.relative_to(ROOT).as_posix())
    ]
    assert not complaints, f"{law}:\n" + "\n".join(complaints)


def modules_after(statement: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter after `statement`."""
    code = f"import sys\n{statement}\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.smoke
def test_the_pure_functions_come_alone() -> None:
    """Another project that imports one loss gets jax, numpy, optax and chex, and not the trainer's
    libraries."""
    heavy = {
        "flax",
        "orbax",
        "grain",
        "ml_collections",
        "tokenizers",
        "PIL",
        "ftfy",
        "tensorflow",
        "torch",
        "wandb",
        "tensorboardX",
    }
    alone = modules_after("import jax, numpy, optax, chex")
    ours = modules_after(
        "import m3i_jax\nassert m3i_jax.__all__\nfor name in m3i_jax.__all__: getattr(m3i_jax,"
        " name)"
    )
    assert {"m3i_jax", "jax"} <= ours
    assert not heavy & (ours - alone), (
        f"import m3i_jax also brings {sorted(heavy & (ours - alone))}"
    )
    allowed = alone | {"m3i_jax"} | set(sys.stdlib_module_names)
    assert not {m for m in ours - allowed if not m.startswith("_")}
    assert heavy & modules_after("import ml_collections"), "the check itself sees nothing"
