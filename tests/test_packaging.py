"""Version and requirements of the package, and the tested set of versions, which satisfies them. No
network."""

import ast
import fnmatch
import gc
import importlib.util
import pathlib
import re
import subprocess
import sys
import tomllib
import traceback
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import m3i_jax
from m3i_jax import installation

ROOT = pathlib.Path(__file__).parent.parent
PYTHONS = ("3.11", "3.13")
# {module: distribution} where the names differ.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "faiss": "faiss-cpu",
    "absl": "absl-py",
    "orbax": "orbax-checkpoint",
    "etils": "etils",
    "sklearn": "scikit-learn",
}


def load(name: str) -> ModuleType:
    """Import a file of the project that is outside the package."""
    spec = importlib.util.spec_from_file_location(f"m3i_jax_{pathlib.Path(name).stem}", ROOT / name)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def setup_arguments() -> Iterator[dict[str, Any]]:
    """The arguments that setup.py passes to setuptools."""
    caught: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", caught.update)
        patch.chdir(ROOT)
        load("setup.py")
    yield caught


def environment(python: str) -> dict[str, str]:
    return {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}


def needed(lines: list[str], python: str) -> dict[str, Requirement]:
    """{distribution: requirement} of the lines that apply to a Python version."""
    parsed = [Requirement(line) for line in lines]
    return {
        canonicalize_name(r.name): r
        for r in parsed
        if r.marker is None or r.marker.evaluate(environment(python))
    }


def pinned(python: str) -> dict[str, Requirement]:
    lines = [
        line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()
    ]
    lines = [line for line in lines if line]
    pins = needed(lines, python)
    applying = [line for line in lines if needed([line], python)]
    assert len(applying) == len(pins), f"a distribution is pinned twice for Python {python}"
    return pins


@pytest.mark.smoke
def test_version_is_stated_once() -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-1] == m3i_jax.__version__
    assert f"\nversion: {m3i_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(
        rf"^## {re.escape(m3i_jax.__version__)}\b",
        (ROOT / "CHANGELOG.md").read_text(),
        re.MULTILINE,
    )


def test_metadata(setup_arguments: dict[str, Any]) -> None:
    assert setup_arguments["name"] == "m3i-jax"
    assert setup_arguments["python_requires"] == ">=3.11"
    assert {"train", "cuda", "tpu", "test", "tensorboard", "wandb", "tfds", "gcs", "fast"} <= set(
        setup_arguments["extras_require"]
    )
    licence = (ROOT / "LICENSE").read_text()
    assert (
        setup_arguments["license"] == "Apache-2.0"
        and "Apache License" in licence
        and "END OF TERMS AND CONDITIONS" in licence
    )


@pytest.mark.parametrize("python", PYTHONS)
def test_tested_set_satisfies_the_requirements(
    setup_arguments: dict[str, Any], python: str
) -> None:
    pins = pinned(python)
    for name, pin in pins.items():
        assert [s.operator for s in pin.specifier] == ["=="], f"{name} is not pinned to one version"
    groups = {"core": setup_arguments["install_requires"], **setup_arguments["extras_require"]}
    # peers of the benchmarks and a cluster: large, and no test of the normal suite needs them
    for big in ("bench", "ray", "torch"):
        groups.pop(big)
    for group, lines in groups.items():
        for name, requirement in needed(lines, python).items():
            assert name in pins, f"{group}: {name} is not in requirements.txt for Python {python}"
            version = next(iter(pins[name].specifier)).version
            assert requirement.specifier.contains(version), (
                f"{group}: {requirement} refuses {version}, which is the tested one"
            )


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_one_jax_for_every_python(setup_arguments: dict[str, Any], python: str) -> None:
    for group in ("cuda", "cuda13", "tpu"):
        applying = [
            line
            for line in setup_arguments["extras_require"][group]
            if "jax" in needed([line], python)
        ]
        assert len(applying) == 1
    old = needed(setup_arguments["install_requires"], python)["jax"].specifier.contains("0.10.2")
    assert old == (Version(python) < Version("3.12"))


def test_every_folder_is_packaged(setup_arguments: dict[str, Any]) -> None:
    rooms = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "m3i_jax").rglob("*.py")}
    assert rooms == set(setup_arguments["packages"]), (
        "a folder without __init__.py is left out of the package"
    )


def third_party(top_only: bool) -> set[str]:
    """Distributions that the package imports: at module level only, or anywhere."""
    laws = load("tests/test_laws.py")
    tops = {
        module.split(".")[0]
        for path in laws.files("m3i_jax")
        for _, module in laws.imports(
            path.read_text(), path.relative_to(ROOT).as_posix(), top_only=top_only
        )
    }
    return {
        canonicalize_name(DISTRIBUTIONS.get(top, top))
        for top in tops - set(sys.stdlib_module_names) - {"m3i_jax"}
    }


@pytest.mark.smoke
def test_imports_are_declared(setup_arguments: dict[str, Any]) -> None:
    light = set(needed(setup_arguments["install_requires"], "3.13"))
    core = light | set(needed(setup_arguments["extras_require"]["train"], "3.13"))
    assert third_party(top_only=True) <= core, (
        "imported at the top of a module, but in neither install_requires nor the extra train"
    )
    extras = {
        name
        for lines in setup_arguments["extras_require"].values()
        for name in needed(lines, "3.13")
    }
    assert third_party(top_only=False) <= core | extras, (
        "imported somewhere, but in no extra of setup.py"
    )


def test_every_extra_is_the_whole_program(setup_arguments: dict[str, Any]) -> None:
    """`pip install 'm3i-jax[tpu]'` trains. What is missing without an extra is named by a
    message, which knows all of it."""
    extras = setup_arguments["extras_require"]
    train = set(extras["train"])
    assert train and all(train <= set(lines) for lines in extras.values())
    assert set(needed(extras["train"], "3.13")) == {
        canonicalize_name(package) for package in installation.PROGRAM.values()
    }
    light = needed(setup_arguments["install_requires"], "3.13")
    assert set(light) == {"jax", "numpy", "flax", "optax", "chex"}


def test_the_scripts_install_the_whole_program() -> None:
    text = (ROOT / "launch" / "environment.sh").read_text()
    assert 'requirement=(-e "${ROOT}[${extra:-train}]" -c "$ROOT/requirements.txt")' in text


def test_public_names_have_types() -> None:
    """Every name that `m3i_jax` imports on first use is in the stub, as a re-export (import x as x)
    or by an assignment, for a name that differs from that in its module."""
    tree = ast.parse((ROOT / "m3i_jax" / "__init__.pyi").read_text())
    typed = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    typed |= {ast.unparse(n.targets[0]) for n in tree.body if isinstance(n, ast.Assign)}
    lazy = {name for name in dir(m3i_jax) if not name.startswith("_")}
    here = {name for name in vars(m3i_jax) if not name.startswith("_") and name not in typed}
    assert typed == (lazy - here) | {"__version__"}
    for name in sorted(typed):
        assert getattr(m3i_jax, name) is not None
    assert (ROOT / "m3i_jax" / "py.typed").exists()


def test_public_modules_are_checked_strictly() -> None:
    """mypy, which launch/test.sh runs, has the flags of --strict for every module of the stub."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    strict = {
        pattern
        for override in project["tool"]["mypy"]["overrides"]
        if override.get("disallow_untyped_defs") and override.get("disallow_any_generics")
        for pattern in override["module"]
    }
    tree = ast.parse((ROOT / "m3i_jax" / "__init__.pyi").read_text())
    modules = {
        f"{node.module}.x" if node.module == "m3i_jax.objective" else node.module or ""
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
    } - {"m3i_jax.version"}
    assert "m3i_jax.objective.losses" in modules and "m3i_jax" in strict
    missing = [m for m in modules if not any(fnmatch.fnmatch(m, pattern) for pattern in strict)]
    assert not missing, f"not strict in pyproject.toml: {missing}"


class Complains:
    """Garbage that formats a traceback when collected, like a task of a closed event loop."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        try:
            {}["a"]["b"]
        except KeyError:
            traceback.format_exc()


def test_garbage_of_earlier_tests_does_not_break_ast_parse() -> None:
    """CPython 3.11 raises SystemError when one tree is parsed during the parsing of another;
    tests/conftest.py prevents that."""
    text = "\n".join(
        f"def f{i}(a, b={i}):\n    return [a, b, {{'k': (a, b)}}]" for i in range(3000)
    )
    before = gc.get_threshold()
    gc.set_threshold(200, 2, 2)
    try:
        for _ in range(200):
            Complains()
        assert len(ast.parse(text).body) == 3000
    finally:
        gc.set_threshold(*before)


@pytest.mark.smoke
def test_core_imports_here() -> None:
    """The libraries of the core can be imported together, and the tests have eight devices."""
    import flax.linen
    import grain
    import jax
    import optax
    import orbax.checkpoint

    assert all(
        (flax.linen.Dense, grain.MapDataset, optax.adamw, orbax.checkpoint.CheckpointManager)
    )
    assert jax.device_count() == 8
    spread = jax.sharding.NamedSharding(
        jax.make_mesh((8,), ("x",)), jax.sharding.PartitionSpec("x")
    )
    total = jax.jit(lambda x: x.sum())(jax.device_put(jax.numpy.arange(8.0), spread))
    assert total == 28.0 and len(total.sharding.device_set) == 8
