"""--mode=eval: which weights are evaluated, with which settings, and what need not exist any more:
teachers, targets, and the runs beside which a report was shown."""

import dataclasses
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest
from PIL import Image

from m3i_jax import config as configuration
from m3i_jax import main as command
from m3i_jax import schema
from m3i_jax.data.sources import shapes
from m3i_jax.evaluation.feature_extraction import EvalContext
from m3i_jax.interop import tensor_files
from m3i_jax.modes import eval as evaluate
from m3i_jax.modes import eval_header, report
from m3i_jax.training import teachers
from tests import saved, toy
from tests.interop.published_vit import ENCODERS, weights
from tests.modes.test_eval import SMALL, enable, write_run

COUNTED = {key: value for key, value in SMALL.items() if "forms" not in key}


def vit_file(directory: pathlib.Path) -> pathlib.Path:
    file = directory / "vit.safetensors"
    table = weights(ENCODERS["timm"], width=32, depth=2, heads=2, patch=8, grid=4)
    tensor_files.write_safetensors(file, table)
    return file


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[schema.Config, list[EvalContext]]]:
    """(settings, weights) of every evaluation, which measures nothing."""
    found = []

    def spy(setup, about, metrics, trained, untrained=None, *, run=None) -> int:
        found.append((setup.config, [trained, *([untrained()] if untrained else [])]))
        return 0

    monkeypatch.setattr(evaluate, "evaluate", spy)
    return found


def test_targets_of_other_runs_need_not_exist(tmp_path: pathlib.Path, contexts) -> None:
    """A frozen target and a teacher are read by the steps of a run alone: not by its checkpoint,
    its untrained encoder, which has the initial weights, or a file in its place."""
    other, run = tmp_path / "other", tmp_path / "run"
    saved.run(other, toy.settings())
    changes = {
        "objective__forms": "mim",
        "objective__target_encoder": "frozen",
        "objective__target_checkpoint": str(other),
        "objective__teachers": repr((str(other),)),
    }
    write_run(run, ("mim",), moved=0.25, **COUNTED | changes)
    shutil.rmtree(other)
    own = ["--mode=eval", "--workdir", str(run), *enable("knn")]
    for more in (["--untrained"], [f"--checkpoint={vit_file(tmp_path)}"]):
        teachers._IN_RUNS.clear()
        assert command.main([*own, *more]) == 0
    teachers._IN_RUNS.clear()
    (_, (trained, untrained)), (_, (of_file,)) = contexts
    encoders = [
        jax.device_get(context.params["encoder"]) for context in (trained, untrained, of_file)
    ]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b + 0.25, atol=1e-6), encoders[0], encoders[1]
    )
    kernels = [encoder["patch_embed"]["kernel"] for encoder in encoders]
    assert np.abs(kernels[2] - kernels[0]).max() > 1e-3


@pytest.mark.parametrize("form", ["mim", "distill"])
def test_a_file_is_evaluated_without_the_teachers_of_its_settings(
    tmp_path: pathlib.Path, contexts, form: str
) -> None:
    """With a --config, in a new directory: no run has their shapes, and none is needed."""
    gone = repr((str(tmp_path / "teacher.npz"),))
    own = toy.settings(**COUNTED, objective__forms=form, objective__teachers=gone)
    file = tmp_path / "recipe.py"
    file.write_text(
        "from m3i_jax import config\n"
        f"TEXT = {configuration.config_to_text(own)!r}\n"
        "def get_config():\n    return config.config_from_text(TEXT, '')\n"
    )
    place = ["--mode=eval", "--config", str(file), "--workdir", str(tmp_path / "new")]
    assert command.main([*place, f"--checkpoint={vit_file(tmp_path)}", *enable("knn")]) == 0
    ((config, [context]),) = contexts
    assert not config.objective.teachers and context.params["encoder"]


def test_init_settings_of_a_run_are_not_of_another_file(
    tmp_path: pathlib.Path, contexts, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that started from an average evaluates a file without one; the command can ask."""
    run = tmp_path / "run"
    run.mkdir()
    began = toy.settings(
        **COUNTED, objective__forms="mim", init_from="gone", init__weights="ema", init__strict=True
    )
    (run / "config.txt").write_text(configuration.config_to_text(began))
    own = ["--mode=eval", "--workdir", str(run), f"--checkpoint={vit_file(tmp_path)}"]
    assert command.main([*own, *enable("knn")]) == 0
    ((config, _),) = contexts
    assert config.init == schema.Init(only=("^encoder/",))
    capsys.readouterr()
    assert command.main([*own, *enable("knn"), "--config.init.weights=ema"]) == 2
    assert "no momentum copy" in capsys.readouterr().err
    assert command.main([*own, *enable("knn"), "--config.init.strict=true"]) == 0
    assert contexts[-1][0].init == schema.Init(only=("^encoder/",), strict=True)


def test_data_without_captions_in_the_place_of_those_of_a_run(
    tmp_path: pathlib.Path, contexts
) -> None:
    """A file has no text tower; captions that the command asks for are missed."""
    own = toy.settings(**COUNTED | {"data__captions": "yes"}, objective__forms="mim")
    (tmp_path / "config.txt").write_text(configuration.config_to_text(own))
    call = ["--mode=eval", f"--workdir={tmp_path}", f"--checkpoint={vit_file(tmp_path)}"]
    for i in range(8):
        image = Image.fromarray(np.full((20, 20, 3), 30 * i, np.uint8))
        (tmp_path / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "data" / "ab"[i % 2] / f"{i}.png")
    call += [f"--data={tmp_path / 'data'}", *enable("knn")]
    assert command.main(call) == 0 and contexts[0][0].data.captions == "no"
    assert command.main([*call, "--config.data.captions=yes"]) == 2


def test_the_average_of_a_file_has_results_of_its_name(tmp_path: pathlib.Path) -> None:
    """Also in the directory of a run that started from no weights. Those of the online encoder are
    others, which it would continue."""
    plain, file = toy.settings(**COUNTED, objective__forms="mim"), vit_file(tmp_path)
    (tmp_path / "config.txt").write_text(configuration.config_to_text(plain))
    command_line = ["--mode=eval", f"--workdir={tmp_path}", f"--checkpoint={file}"]
    images, headers = shapes.ShapesSource(4), []
    for more in ([], ["--config.init.weights=ema"]):
        flags, overrides = command._parse([*command_line, *more])
        settings = command._settings(flags, overrides)
        given = command.given_settings(overrides, settings, file=False)
        config = evaluate.evaluate_weights(settings, str(file), given)
        setup = types.SimpleNamespace(
            config=config, train=images, held_out=images, identity="shapes"
        )
        headers.append(eval_header.described(setup, str(file), 0))
    assert [about["encoder"] for about in headers] == ["online", "ema"]
    assert {**headers[1], "encoder": "online"} == headers[0]


def test_results_stay_where_the_report_cannot_be_written(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The saved report.beside names a run that was deleted since."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    beside = schema.Config(report=schema.Report(beside=(str(tmp_path / "gone"),)))
    setup = types.SimpleNamespace(config=beside, workdir=tmp_path, classes=())
    about = {"checkpoint": "c", "step": 1, "encoder": "online", "data": {}}
    context = EvalContext({}, {}, lambda: None)
    metrics = {"knn": lambda context: {"eval/knn/top1": 0.5}}
    assert evaluate.evaluate(setup, about, metrics, context) == 0
    out = capsys.readouterr().out
    assert (tmp_path / "eval.json").is_file() and "eval/knn/top1" in out
    assert "warning: report.html was not written: config.report.beside" in out
    setup.config = dataclasses.replace(beside, report=schema.Report())
    assert evaluate.evaluate(setup, about, metrics, context) == 0
    assert f"{tmp_path / 'report.html'}, with these figures" in capsys.readouterr().out
    assert report.write_report(setup.config, tmp_path).is_file()
