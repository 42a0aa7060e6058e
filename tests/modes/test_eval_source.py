"""--mode=eval of a checkpoint with settings of another run: what no shape of an array shows."""

import pathlib

import pytest

from m3i_jax import config as configuration
from m3i_jax import main as command
from m3i_jax import modes, schema
from m3i_jax.errors import UserError
from m3i_jax.modes import eval_source
from tests import saved, toy

BASE = {"objective__forms": "weakly_supervised"}


def logged(
    directory: pathlib.Path, ours: schema.Config, theirs: schema.Config, *given: str
) -> list[str]:
    """What is logged of a run with these settings, without arrays."""
    (directory / "config.txt").write_text(configuration.config_to_text(theirs))
    lines: list[str] = []
    eval_source.check_settings(ours, directory, "--checkpoint", given, lines.append)
    return lines


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("model.encoder.heads", 4, "4 (2 here)"),
        ("model.encoder.norm_eps", 1e-5, "1e-05 (1e-06 here)"),
        ("model.encoder.activation", "quick_gelu", "quick_gelu (gelu here)"),
        ("model.encoder.positions", "sincos_columns", "sincos_columns (sincos here)"),
        ("model.encoder.position_grid", 2, "2 (4 here)"),
    ],
)
def test_another_network_is_refused_unless_the_command_sets_it(
    tmp_path: pathlib.Path, key: str, value: object, shown: str
) -> None:
    ours, theirs = toy.settings(**BASE), toy.settings(**BASE, **{key.replace(".", "__"): value})
    with pytest.raises(UserError, match="--checkpoint: the network of") as error:
        logged(tmp_path, ours, theirs)
    text = str(error.value)
    assert f"{key}={shown}" in text and text.endswith(f" --config.{key}={value}")
    assert logged(tmp_path, ours, theirs, key) == [f"{tmp_path} was trained with {key}={shown}"]
    assert not logged(tmp_path, ours, ours)


@pytest.mark.parametrize("dense", [{}, {"task": "segment", "data__classes": 2}])
def test_a_grid_of_fixed_positions_is_that_in_effect(tmp_path: pathlib.Path, dense: dict) -> None:
    """Whichever setting it follows from, of pre-training and of a dense task."""
    ours, theirs = toy.settings(**dense), toy.settings(**dense, data__image_size=64)
    with pytest.raises(UserError, match=r"model.encoder.position_grid=8 \(4 here\)") as error:
        logged(tmp_path, ours, theirs)
    assert str(error.value).endswith(
        "add --config.model.encoder.position_grid=8 --config.data.image_size=64"
    )
    (line,) = logged(tmp_path, ours, theirs, "data.image_size")  # the command wants this size
    assert line.endswith("was trained with model.encoder.position_grid=8 (4 here)")
    if dense:
        explicit = toy.settings(**dense, dense__maps__image_size=32)
        assert not logged(tmp_path, ours, explicit)
        turned = dense | {"model__encoder__positions": "rope"}  # which have no table
        theirs = toy.settings(**turned, dense__maps__image_size=64)
        assert not logged(tmp_path, toy.settings(**turned), theirs)


def test_a_base_of_rotary_positions_is_compared_where_there_are_some(
    tmp_path: pathlib.Path,
) -> None:
    base, turned = {"model__encoder__rope_base": 50.0}, {"model__encoder__positions": "rope"}
    assert not logged(tmp_path, toy.settings(**BASE), toy.settings(**BASE, **base))
    with pytest.raises(UserError, match=r"rope_base=50.0 \(100.0 here\)"):
        logged(tmp_path, toy.settings(**BASE, **turned), toy.settings(**BASE, **turned, **base))


def test_what_changes_figures_alone_is_logged(tmp_path: pathlib.Path) -> None:
    mean = {"data__augment__mean": "(0.5,0.5,0.5)"}
    ours = toy.settings(**BASE, model__encoder__positions="rope")
    theirs = toy.settings(**BASE, **mean, model__encoder__positions="rope", data__image_size=64)
    (line,) = logged(tmp_path, ours, theirs)
    assert "data.image_size=64 (32 here)" in line  # rotary positions are of no grid
    assert "data.augment.mean=(0.5, 0.5, 0.5) (" in line and "std" not in line
    chosen = ("data.image_size", "data.augment.mean")
    assert not logged(tmp_path, ours, theirs, *chosen)
    # 64 pixels with positions of 32: those of this run
    resized = {"data__image_size": 64, "model__encoder__position_grid": 4}
    (line,) = logged(tmp_path, toy.settings(**BASE), toy.settings(**BASE, **resized))
    assert line.endswith("was trained with data.image_size=64 (32 here)")


def test_an_average_is_evaluated_if_it_moved_in_the_run_of_the_checkpoint(
    tmp_path: pathlib.Path,
) -> None:
    """Whatever momentum the settings of the command have."""
    moves = toy.settings(**BASE, evaluate__encoder="ema")
    stays = toy.settings(**BASE, evaluate__encoder="ema", optim__ema=1)
    modes.refuse_missing("eval", stays, "")  # `theirs` are read later
    assert not logged(tmp_path, stays, moves)
    for ours in (stays, moves):
        with pytest.raises(UserError, match="has no momentum average, .* with optim.ema=1;"):
            logged(tmp_path, ours, stays)
    online = toy.settings(**BASE, optim__ema=1)
    assert len(logged(tmp_path, online, stays)) == 1  # evaluate.encoder differs


def test_heads_of_parts_that_the_checkpoint_has(tmp_path: pathlib.Path) -> None:
    ours = toy.settings(**BASE)
    theirs = toy.settings(**BASE, model__text__heads=4, model__captioner__heads=4)
    saved.run(tmp_path, theirs)
    with pytest.raises(UserError, match=r"trained with model.text.heads=4 \(2 here\) and"):
        logged(tmp_path, ours, theirs)
    assert len(logged(tmp_path, ours, theirs, "model.text.heads")) == 1


@pytest.mark.parametrize(("kind", "read"), [("attention", "heads"), ("mean", "norm")])
def test_settings_of_a_pooling_that_it_does_not_read_are_not_compared(
    tmp_path: pathlib.Path, kind: str, read: str
) -> None:
    base = {"objective__forms": "supervised", "model__pool__kind": kind, "data__captions": "no"}
    base["model__pool__projection"] = str(kind == "attention")  # batch norms are of linear probes
    ours, values = toy.settings(**base), {"heads": 4, "norm": "batch"}
    saved.run(tmp_path, ours)
    if kind == "mean":  # a batch norm of attention is refused by itself
        assert not logged(tmp_path, ours, toy.settings(**base, model__pool__heads=4))
    with pytest.raises(UserError, match=f"trained with model.pool.{read}="):
        logged(tmp_path, ours, toy.settings(**base, **{f"model__pool__{read}": values[read]}))


def test_the_command_is_refused_before_data_are_opened(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs whose arrays have the same shapes; the settings of one are not those of the
    other."""
    for name, heads in (("one", 2), ("two", 4)):
        (tmp_path / name).mkdir()
        saved.run(tmp_path / name, toy.settings(**BASE, model__encoder__heads=heads))
    own = ["--mode=eval", "--workdir", str(tmp_path / "one")]
    assert command.main([*own, f"--checkpoint={tmp_path / 'two'}"]) == 2
    error = capsys.readouterr().err
    assert "model.encoder.heads=4 (2 here)" in error and error.count("\n") == 1
    assert not (tmp_path / "one" / "index").exists()
