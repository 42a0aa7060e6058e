"""Which file `--config` means, and what `init` copies: a local file wins, and the recipes that ship
are found everywhere."""

import ast
import os
import pathlib
import sys

import pytest

from m3i_jax import config as configuration
from m3i_jax import main as command
from m3i_jax.config import recipes
from m3i_jax.errors import UserError
from m3i_jax.modes import show as show_mode
from tests.quick_show import leave_out_estimates

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def elsewhere(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    leave_out_estimates(monkeypatch)
    return tmp_path


def show(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = command.main([*arguments, "--mode=show"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_recipe_that_ships_is_found_from_everywhere(
    elsewhere: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = show(capsys, "--config", "configs/quickstart.py:steps=777")
    assert code == 0, err
    assert out.startswith(f"configuration: {ROOT / 'configs/quickstart.py'}, which ships with")
    assert "\ntrain.steps = 777\n" in out
    assert configuration.load_config("configs/transfer/probe.py:path=a").data.path == "a"


def test_a_local_file_wins(
    elsewhere: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (elsewhere / "configs").mkdir()
    local = elsewhere / "configs/quickstart.py"
    local.write_text(
        (ROOT / "configs/quickstart.py").read_text().replace("return config", "config.seed = 5\n"
        "    return config")
    )  # fmt: skip
    code, out, err = show(capsys, "--config", "configs/quickstart.py")
    assert code == 0, err
    first = out.splitlines()[0]
    assert first.startswith("configuration: configs/quickstart.py of this directory, not the file")
    assert "\nseed = 5\n" in out
    monkeypatch.setattr(show_mode, "run", lambda *_, **__: 0)
    # another one is still the one that ships
    assert "which ships" in show(capsys, "--config", "configs/folder.py:path=a")[1].splitlines()[0]
    own = elsewhere / "own.py"
    own.write_text(local.read_text())
    assert show(capsys, "--config", "own.py")[1].splitlines()[0] == "configuration: own.py"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("configs/quickstrat.py", "configs/quickstart.py"),
        ("folder.py", "configs/folder.py"),
        ("configs/coco.py", "configs/transfer/coco.py"),
        ("/no/such/directory/tars.py", "configs/tars.py"),
    ],
)
def test_a_file_that_is_nowhere(name: str, nearest: str, elsewhere: pathlib.Path) -> None:
    with pytest.raises(UserError) as caught:
        configuration.find_config_file(name)
    text = str(caught.value)
    assert text.startswith(
        f"--config {name}: there is no such file; did you mean {nearest}? Looked"
    )
    where = " there and in " if name.startswith("/") else f" in {elsewhere} and in "
    assert where in text and "\n" not in text
    listed = text.partition(" where these ship: ")[2].split(", ")
    assert listed[0] == nearest and sorted(listed) == sorted(configuration.shipped_recipes())


def test_nothing_is_close_and_a_local_file_is(elsewhere: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"there is no such file; looked in .* where these ship"):
        configuration.find_config_file("0000000.py")
    (elsewhere / "mine.py").touch()
    with pytest.raises(UserError, match=r"did you mean mine.py\? Looked"):
        configuration.find_config_file("mime.py")


def test_all_recipes_ship_and_each_is_complete() -> None:
    """A copy of one file is the whole recipe: it imports the package and its libraries only."""
    names = configuration.shipped_recipes()
    assert names == sorted(names, key=lambda name: (name.count("/"), name))
    assert set(names) == {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.py")
    }
    for name in names:
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", None) or node.names[0].name
                assert not getattr(node, "level", 0)
                assert module.split(".")[0] in {
                    "m3i_jax",
                    "ml_collections",
                    *sys.stdlib_module_names,
                }


@pytest.mark.parametrize("name", configuration.shipped_recipes())
def test_init_copies_a_recipe_and_prints_its_command(
    name: str, elsewhere: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["init", "mine", "--config", name]) == 0
    copy = elsewhere / "mine" / pathlib.Path(name).name
    assert copy.read_text() == (ROOT / name).read_text()
    line = capsys.readouterr().out.splitlines()[-1].split()
    assert line[0] == "m3i-jax" and "--workdir" in line
    given = line[line.index("--config") + 1].strip("'")
    assert given.partition(":")[0] == f"mine/{copy.name}"
    configuration.load_config(given.partition(":")[0])


def test_init_refuses_what_it_would_overwrite_and_what_does_not_ship(
    elsewhere: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["init", "mine"]) == 0
    (elsewhere / "mine/folder.py").write_text("# edited")
    for arguments, wanted in (
        (["init", "mine"], "init mine: mine/folder.py exists"),
        (["init", "mine", "--config", "flder.py"], "did you mean configs/folder.py?"),
        (["init"], "DIR"),
    ):
        capsys.readouterr()
        assert command.main(arguments) == 2
        err = capsys.readouterr().err
        assert wanted in err and err.count("\n") == 1
    assert (elsewhere / "mine/folder.py").read_text() == "# edited"


def test_init_copies_the_launch_scripts_with_their_version(
    elsewhere: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["init", "mine", "--launch"]) == 0
    copied = {path.name for path in (elsewhere / "mine/launch").iterdir()}
    there = {path.name for path in (ROOT / "launch").iterdir()}
    assert copied == there - set(recipes._DEVELOPMENT) | {"VERSION"}
    assert (elsewhere / "mine/launch/VERSION").read_text() == f"{recipes.__version__}\n"
    assert os.listdir(elsewhere / "mine").count("folder.py") == 1
    capsys.readouterr()
    assert command.main(["init", "mine", "--launch"]) == 2
    assert "mine/launch exists" in capsys.readouterr().err
