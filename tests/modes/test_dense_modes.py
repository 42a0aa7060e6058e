"""The modes on a run of segmentation, and what a run of detection writes at its end: real files,
made by short runs through the command line in process."""

import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

import m3i_jax
from m3i_jax import main as command
from m3i_jax import run_files
from m3i_jax.data.sources import scenes
from m3i_jax.training import loop
from tests import scene_files
from tests.dense_toy import SEGMENT, SHARED, flags

ROOT = pathlib.Path(__file__).parents[2]
VALUES = (SHARED | SEGMENT) | {
    "data.size": 24,
    "data.holdout": 0.3,
    "data.image_size": 32,
    "model.encoder.patch_size": 8,
    "model.encoder.depth": 2,
    "model.encoder.heads": 2,
    "model.dtype": "float32",
    "dense.maps.blocks": (),
    "train.steps": 2,
    "train.log_every": 1,
    "train.panel_every": 1,
    "optim.warmup_steps": 1,
    "evaluate.batch_size": 8,
    "evaluate.query_limit": 4,
}


def arguments(run: pathlib.Path, *more: str, **changes: object) -> list[str]:
    values = VALUES | {key.replace("__", "."): value for key, value in changes.items()}
    values.pop("data.classes")
    texts = flags("segment", values, str(values["dense.segment.head"]))
    return ["--config", "configs/transfer/segment.py", "--workdir", str(run), *texts, *more]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("segment")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert command.main(arguments(path)) == loop.DONE
    return path


def test_a_run_writes_scores_panels_figures_and_names(run: pathlib.Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = [row["eval/segmentation/mIoU"] for row in rows if "eval/segmentation/mIoU" in row]
    assert len(scores) == 2 and all(0 <= score <= 1 for score in scores)
    assert len(list((run / "panels").glob("*.png"))) == 3
    kinds = {path.stem.split("-", 1)[1] for path in (run / "pictures").glob("*.png")}
    assert kinds == {"classes", "confusion", "worst"}
    names = run_files.read_run_json(run / "classes.json")["classes"]
    assert tuple(names) == scenes.ScenesSource(4).map_classes
    assert "worst images" in (run / "report.html").read_text()


def test_the_model_of_a_run_predicts(run: pathlib.Path) -> None:
    model = m3i_jax.load(str(run))
    (pixels,) = model.segment(np.zeros((20, 50, 3), np.uint8))
    assert pixels.shape == (20, 50) and model.names[pixels[0, 0]] in model.names
    assert model.names == scenes.ScenesSource(4).map_classes


def test_exports_have_the_whole_model(
    run: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    command_line = ["--mode=export", "--workdir", str(run)]
    assert command.main([*command_line, "--format=npz"]) == 0
    with np.load(run / "export" / "npz" / "model.npz") as file:
        assert {"encoder/patch_embed/kernel", "head/classifier/kernel"} <= set(file.files)
    assert command.main([*command_line, "--format=stablehlo"]) == 0
    program = jax.export.deserialize(
        bytearray((run / "export" / "stablehlo" / "model.stablehlo").read_bytes())
    )
    model = m3i_jax.load(str(run))
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3)).astype(np.uint8)
    size = np.array([[32, 20]], np.int32)
    np.testing.assert_allclose(
        program.call(image, size)["logits"],
        model.function(model.params, image, size)["logits"],
        atol=1e-5,
    )
    capsys.readouterr()
    assert command.main([*command_line, "--format=timm"]) == 2
    assert "has no place for the head of config.task=segment" in capsys.readouterr().err


def test_other_maps_are_evaluated_beside_the_run(
    run: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The written scenes, read by the source of ADE20k's layout, by settings or by --data. Data of
    other classes and without maps are refused."""
    monkeypatch.chdir(ROOT)
    scene_files.write_scenes(str(tmp_path / "scenes"), images=6, held_out=4, side=40)
    changes = [
        "--config.data.source=maps",
        f"--config.data.path={tmp_path / 'scenes'}",
        "--config.data.split=train",
        "--config.data.holdout_split=val",
        "--config.data.size=0",
    ]
    assert command.main(["--mode=eval", "--workdir", str(run), *changes]) == 0
    (result,) = run.glob("eval-*/eval.json")
    values = json.loads(result.read_text())["results"]["segmentation"]
    assert set(values) == {f"eval/segmentation/{name}" for name in ("mIoU", "mAcc", "aAcc")}
    assert not (run / "eval.json").exists()
    by_flag = ["--mode=eval", "--workdir", str(run), "--data"]
    assert command.main([*by_flag, str(tmp_path / "scenes")]) == 0
    assert (
        json.loads((run / "eval-scenes" / "eval.json").read_text())["results"]["segmentation"]
        == values
    )
    capsys.readouterr()
    names = tmp_path / "scenes" / "classes.txt"
    names.write_text("\n".join([*names.read_text().split("\n")[:-2], "unicorn", ""]))
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "1.png")
    for more, words in (
        ([str(tmp_path / "scenes")], "classes, such as"),
        ([f"folder:{tmp_path}"], "has neither class maps nor objects"),
        (["scenes:30", "--untrained"], "has no --mode=eval --untrained"),
    ):
        assert command.main([*by_flag, *more]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (["--mode=features", "--out=x.npz"], "'segment' has no --mode=features"),
        (["--mode=compare"], "'segment' has no --mode=compare"),
    ],
)
def test_modes_of_features_refuse(
    mode: list[str],
    message: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    recipe = ["--config", "configs/transfer/segment.py", "--workdir", str(tmp_path)]
    assert command.main([*recipe, *mode]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_the_preview_shows_annotations(
    task: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    recipe = f"configs/transfer/{task}.py"
    command_line = ["--mode=preview", "--config", recipe, "--workdir", str(tmp_path)]
    assert command.main([*command_line, "--config.data.size=40"]) == 0
    with Image.open(tmp_path / "preview.png") as page:
        colors = len(page.convert("RGB").getcolors(2**24) or ())
    assert page.size[0] == 1024 and colors > 100
