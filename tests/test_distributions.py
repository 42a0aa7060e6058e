"""Wheel and sdist: what they hold, and that they work where there is no checkout.

Clean environments are virtual environments without packages, into which a path file brings the
packages of this one, so that no network is needed. The light environment gets only the packages
that `pip install m3i-jax` would bring.
"""

import ast
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import m3i_jax

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = [
    *("m3i_jax", "configs", "launch", "tests", ".ci", ".github", ".gitignore", "setup.py"),
    *(".pre-commit-config.yaml", "CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md"),
    *("pyproject.toml", "requirements.txt"),
]
# Scripts that need the tests, which a wheel does not have.
DEVELOPMENT = {"bench.sh", "faults.sh", "soak.sh", "test.sh"}
BUILD = "import sys; from setuptools import build_meta as b; b.{}(sys.argv[1])"
SECONDS = 1800


def execute(*command: str, cwd: pathlib.Path, status: int = 0, **environment: str) -> str:
    """Output and errors of a command without this checkout on its path."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=kept | {"JAX_PLATFORMS": "cpu"} | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == status, f"status {done.returncode}:\n{done.stdout[-6000:]}"
    return done.stdout


def built(project: pathlib.Path, what: str, target: pathlib.Path) -> pathlib.Path:
    target.mkdir(exist_ok=True)
    execute(sys.executable, "-c", BUILD.format(f"build_{what}"), str(target), cwd=project)
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A copy of the project, since a build leaves files behind."""
    copy = tmp_path_factory.mktemp("distributions") / "project"
    copy.mkdir()
    for name in PROJECT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    return copy


@pytest.fixture(scope="session")
def wheel(project: pathlib.Path) -> pathlib.Path:
    return built(project, "wheel", project.parent / "wheel")


@pytest.fixture(scope="session")
def sdist(project: pathlib.Path, wheel: pathlib.Path) -> pathlib.Path:
    return built(project, "sdist", project.parent / "sdist")


def files_of(folder: pathlib.Path, *patterns: str) -> set[str]:
    """Files of a folder, relative to the folder that holds it."""
    return {
        path.relative_to(folder.parent).as_posix()
        for pattern in patterns
        for path in folder.rglob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_a_wheel_is_the_program_with_recipes_and_launchers(wheel: pathlib.Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        texts = {
            name.partition("/")[2]: archive.read(name).decode()
            for name in names
            if ".dist-info/" in name
        }
    recipes = files_of(ROOT / "configs", "*")
    launchers = {
        name
        for name in files_of(ROOT / "launch", "*")
        if pathlib.PurePosixPath(name).name not in DEVELOPMENT
    }
    assert {"configs/folder.py", "configs/transfer/coco.py", "launch/host.sh"} <= (
        recipes | launchers
    )
    wanted = files_of(ROOT / "m3i_jax", "*.py", "*.pyi", "py.typed")
    wanted |= {f"m3i_jax/{name}" for name in recipes | launchers}
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert texts["entry_points.txt"].split() == [
        "[console_scripts]",
        *("m3i-jax", "=", "m3i_jax.__main__:run_command"),
    ]
    assert f"\nVersion: {m3i_jax.__version__}\n" in texts["METADATA"]
    assert "\nProvides-Extra: train\n" in texts["METADATA"]
    assert "licenses/LICENSE" in texts


def test_an_sdist_is_the_whole_project(sdist: pathlib.Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {
            member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()
        }
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\0")
    wanted = {name for name in tracked if name and (ROOT / name).is_file()} or files_of(
        ROOT / "tests", "*.py"
    )
    assert not wanted - names, f"not in the sdist: {sorted(wanted - names)}"
    assert not [name for name in names if "__pycache__" in name or name.startswith("runs/")]


def distributions(requirements: list[str]) -> set[str]:
    """These and what they need here, by their metadata; of each, without its extras."""
    found: set[str] = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        extras = ["", *requirement.extras]
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if not applies or name in found:
            continue
        found.add(name)
        for line in importlib.metadata.distribution(name).requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in extras):
                needed.marker = None
                waiting.append(needed)
    return found


def packages_of(names: set[str], target: pathlib.Path) -> None:
    """Links to the top-level packages of some distributions."""
    target.mkdir()
    for name in names:
        distribution = importlib.metadata.distribution(name)
        for file in distribution.files or ():
            top = pathlib.PurePosixPath(file).parts[0]
            source = pathlib.Path(str(distribution.locate_file(top)))
            if top not in ("..", "__pycache__") and not (target / top).exists():
                (target / top).symlink_to(source)


def environment(
    place: pathlib.Path, packages: pathlib.Path, distribution: pathlib.Path
) -> pathlib.Path:
    """The commands of a new virtual environment that finds packages and has a distribution."""
    venv.EnvBuilder(symlinks=True).create(place)
    site = pathlib.Path(
        sysconfig.get_path("purelib", "venv", {"base": str(place), "platbase": str(place)})
    )
    (site / "packages.pth").write_text(f"{packages}\n")
    execute(
        *(sys.executable, "-m", "pip", "--python", str(place / "bin" / "python"), "install"),
        *("--quiet", "--no-index", "--no-deps", "--no-build-isolation", str(distribution)),
        cwd=place,
    )
    return place / "bin"


def pip_here() -> bool:
    # without looking for the module: setuptools then hands out the standard library's distutils
    # for the rest of the process, and cannot be imported itself
    return any(importlib.metadata.distributions(name="pip"))


LIGHT = """
import jax, numpy as np
import m3i_jax
from m3i_jax import *
from m3i_jax.models import intern_image, vit, dcnv3
from m3i_jax import roi_align
total, count = gaussian(np.ones((4, 8), np.float32), np.zeros((4, 8), np.float32))
assert float(total) > 0, total
assert np.asarray(roi_align(np.ones((4, 4, 1)), np.array([[0.0, 0, 4, 4]]), 2, 1)).shape
for network in (
    m3i_jax.ViT.preset("vit_s16", image_size=32),
    m3i_jax.InternImage.preset("internimage_pico"),
):
    params = jax.eval_shape(network.init, jax.random.key(0))
    assert jax.eval_shape(network, params, jax.numpy.zeros((1, 32, 32, 3))).shape[0] == 1
try:
    m3i_jax.load("runs/first")
except ImportError as error:
    print("load:", error)
print(m3i_jax.__file__)
"""


@pytest.mark.skipif(not pip_here(), reason="pip is not installed")
def test_a_light_installation_has_losses_and_encoders_and_names_the_extra(
    wheel: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = archive.read(name).decode()
    requirements = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    packages_of(distributions(requirements), tmp_path / "packages")
    absent = {"grain", "ml_collections", "tokenizers", "PIL", "torch"}
    assert not absent & {path.name for path in (tmp_path / "packages").iterdir()}
    commands = environment(tmp_path / "light", tmp_path / "packages", wheel)
    out = execute(str(commands / "python"), "-c", LIGHT, cwd=tmp_path)
    assert "load: m3i_jax.load needs clu, " in out and "pip install 'm3i-jax[train]'" in out
    assert str(tmp_path / "light") in out.splitlines()[-1]
    calls = (
        [str(commands / "m3i-jax"), "--help"],
        [str(commands / "python"), "-m", "m3i_jax.main", "--version"],
    )
    for command in calls:
        out = execute(*command, cwd=tmp_path, status=2)
        assert out.startswith("m3i_jax: the command line needs clu, ") and out.count("\n") == 1
        assert "pip install 'm3i-jax[train]'" in out


def tiny() -> list[str]:
    """The overrides that make a run of two steps, those of tests/test_readme.py."""
    tree = ast.parse((ROOT / "tests" / "test_readme.py").read_text())
    (value,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TINY"
    ]
    return [f"--config.{item}" for item in ast.literal_eval(value)]


@pytest.mark.slow
@pytest.mark.skipif(not pip_here(), reason="pip is not installed")
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_an_installation_runs_without_a_checkout(
    kind: str, request: pytest.FixtureRequest, tmp_path: pathlib.Path
) -> None:
    """Install, first steps of the quickstart, its page, a copy of a recipe, and doctests of the
    installed package; of the sdist, the smoke tests that it ships."""
    distribution = request.getfixturevalue(kind)
    here = pathlib.Path(sysconfig.get_path("purelib"))
    commands = environment(tmp_path / "clean", here, distribution)
    work = tmp_path / "work"
    work.mkdir()
    program, python = str(commands / "m3i-jax"), str(commands / "python")
    version = f"m3i_jax {m3i_jax.__version__}"
    assert execute(program, "--version", cwd=work).strip() == version
    assert execute(python, "-m", "m3i_jax", "--version", cwd=work).strip() == version
    quick = ["--config", "configs/quickstart.py", "--workdir", "runs/first", *tiny()]
    out = execute(program, *quick, cwd=work)
    installed = tmp_path / "clean" / "lib"
    (line,) = re.findall(r"^configuration: (.*), which ships with m3i_jax", out, re.MULTILINE)
    assert pathlib.Path(line).is_relative_to(installed) and (work / "runs/first/panels").is_dir()
    execute(program, "--workdir", "runs/first", "--mode=report", cwd=work)
    assert (work / "runs/first/report.html").is_file()
    out = execute(program, "init", "mine", cwd=work)
    assert (work / "mine/folder.py").read_text() == (ROOT / "configs/folder.py").read_text()
    out = execute(program, "--mode=show", "--config", "mine/folder.py:path=images", cwd=work)
    assert "configuration: mine/folder.py\n" in out
    doctests = [python, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--pyargs"]
    doctests += ["-o", "doctest_optionflags=ELLIPSIS NORMALIZE_WHITESPACE NUMBER"]
    doctests += ["--doctest-modules", "m3i_jax.objective.losses", "m3i_jax.config.recipes"]
    assert " passed" in execute(*doctests, cwd=work)
    if kind == "sdist":
        with tarfile.open(distribution) as archive:
            archive.extractall(tmp_path / "unpacked", filter="data")
        (unpacked,) = (tmp_path / "unpacked").iterdir()
        smoke = [python, "-m", "pytest", "-q", "-n", "0", "-m", "smoke"]
        out = execute(*smoke, cwd=unpacked)
        assert re.search(r"\b[1-9]\d* passed", out) and "failed" not in out
