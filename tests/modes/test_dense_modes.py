"""The modes on a run of segmentation, and what a run of detection writes at its end: real files,
made by short runs through the command line in process."""

import inspect
import json
import pathlib
import shutil
import types
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import m3i_jax
from m3i_jax import main as command
from m3i_jax import run_files, schema
from m3i_jax.data.sources import scenes
from m3i_jax.data.sources.segmentations import decode_mask
from m3i_jax.errors import UserError
from m3i_jax.modes import task_views
from m3i_jax.reporting import dense_panels
from m3i_jax.training import checkpoint_dir, loop, saved_arrays
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
    "model.decoder.positions": "absolute",  # of a run of MAE; the default objective refuses it
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


Sheets = list[dict[str, Any]]


def note_sheets(patch: pytest.MonkeyPatch) -> Sheets:
    """Returns a list that gets the arguments of every call that writes a sheet."""
    calls: Sheets = []
    for name in ("write_detection_sheet", "write_object_sheet", "write_map_sheet"):
        write = getattr(dense_panels, name)
        names = list(inspect.signature(write).parameters)

        def noted(*args: Any, _write: Any = write, _names: Any = names, **more: Any) -> None:
            calls.append(dict(zip(_names, args, strict=False)) | more)
            _write(*args, **more)

        patch.setattr(dense_panels, name, noted)
    return calls


@pytest.fixture
def sheets(monkeypatch: pytest.MonkeyPatch) -> Sheets:
    return note_sheets(monkeypatch)


@pytest.fixture(scope="module")
def run_and_sheets(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Sheets]:
    path = tmp_path_factory.mktemp("segment")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        calls = note_sheets(patch)
        assert command.main(arguments(path)) == loop.DONE
    return path, calls


@pytest.fixture(scope="module")
def run(run_and_sheets: tuple[pathlib.Path, Sheets]) -> pathlib.Path:
    return run_and_sheets[0]


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


@pytest.mark.parametrize("format", ["npz", "orbax"])
def test_an_export_is_loaded_and_names_no_path(
    run: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """A copy of its directory predicts as the run does; it has settings and a model card."""
    monkeypatch.chdir(ROOT)
    assert command.main(["--mode=export", "--workdir", str(run), f"--format={format}"]) == 0
    shutil.copytree(run / "export" / format, tmp_path / "copy")
    texts = [path.read_text() for path in (tmp_path / "copy").glob("*.*") if path.suffix != ".npz"]
    assert len(texts) == 3 and not any(str(run) in text for text in texts)
    card = (tmp_path / "copy" / "README.md").read_text()
    assert "pipeline_tag: image-segmentation" in card and 'model.segment("' in card
    verified, plain = [], checkpoint_dir.find_damage
    monkeypatch.setattr(
        checkpoint_dir, "find_damage", lambda step, *log: verified.append(step) or plain(step)
    )
    read, arrays = [], saved_arrays.ExportedArrays.read
    monkeypatch.setattr(
        saved_arrays.ExportedArrays,
        "read",
        lambda one, paths: read.extend(paths) or arrays(one, paths),
    )
    model, copied = m3i_jax.load(str(run)), m3i_jax.load(str(tmp_path / "copy"))
    assert len(verified) == 1 and len(read) == len(set(read)) == (format == "orbax") * len(
        jax.tree.leaves(copied.params)
    )
    jax.tree.map(np.testing.assert_array_equal, copied.params, model.params)
    image = np.random.default_rng(0).integers(0, 256, (20, 50, 3)).astype(np.uint8)
    np.testing.assert_array_equal(copied.segment(image)[0], model.segment(image)[0])
    assert copied.names == model.names
    (tmp_path / "copy" / ("model.npz" if format == "npz" else "config.txt")).unlink()
    with pytest.raises(UserError, match=r"program without arrays|model.safetensors"):
        m3i_jax.load(str(tmp_path / "copy"))


def test_other_maps_are_evaluated_beside_the_run(
    run: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The written scenes, read by the source of ADE20k's layout, by settings or by --data, also
    with their classes in another order. Data of other classes and without maps are refused."""
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
    turned = tmp_path / "turned"
    shutil.copytree(tmp_path / "scenes", turned)
    classes = (turned / "classes.txt").read_text().splitlines()
    (turned / "classes.txt").write_text("\n".join(classes[::-1]))
    for file in turned.glob("annotations/*/*.png"):
        numbers = np.asarray(Image.open(file)).astype(int)
        numbers = np.where(numbers, len(classes) + 1 - numbers, 0)
        Image.fromarray(numbers.astype(np.uint8)).save(file)
    assert command.main([*by_flag, str(turned)]) == 0
    turned_results = json.loads((run / "eval-turned" / "eval.json").read_text())["results"]
    assert turned_results["segmentation"] == values
    capsys.readouterr()
    names = tmp_path / "scenes" / "classes.txt"
    names.write_text("\n".join([*names.read_text().split("\n")[:-2], "unicorn", ""]))
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "1.png")
    for more, words in (
        ([str(tmp_path / "scenes")], "classes, of which 1, such as 'unicorn', are not among"),
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
    task: str,
    sheets: Sheets,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At their size and mirrored, images, objects and maps are those of the source."""
    monkeypatch.chdir(ROOT)
    recipe = f"configs/transfer/{task}.py"
    command_line = ["--mode=preview", "--config", recipe, "--workdir", str(tmp_path)]
    changes = {"data.size": 40, "dense.geometry.rule": "jitter", "dense.geometry.flip_p": 1.0}
    texts = [f"--config.{key}={value}" for key, value in changes.items()]
    assert command.main([*command_line, *texts]) == 0
    with Image.open(tmp_path / "preview.png") as page:
        colors = len(page.convert("RGB").getcolors(2**24) or ())
    assert page.size[0] == 1024 and colors > 100
    (sheet,) = sheets
    source = scenes.ScenesSource(40, side=96)
    assert len(sheet["words"]) == len(set(sheet["words"])) == 8
    objects = 0
    for row, key in enumerate(sheet["words"]):
        record = source[int(key.rsplit("-", 1)[1])]
        assert isinstance(record.image, np.ndarray) and isinstance(record.map, np.ndarray)
        np.testing.assert_array_equal(sheet["images"][row], record.image[:, ::-1])
        if task == "segment":
            np.testing.assert_array_equal(sheet["truth"][row], record.map[:, ::-1])
            continue
        given, width = record.objects, record.image.shape[1]
        assert given is not None
        drawn, left = sheet["objects"][row], np.flatnonzero(~given.crowd).tolist()
        assert len(drawn.boxes) == len(left)
        for k, box in enumerate(drawn.boxes):  # in the order of the batch, which is not ours
            expected = np.abs(given.boxes[:, [2, 1, 0, 3]] - np.array([width, 0, width, 0]))
            near = [i for i in left if np.abs(expected[i] - box).max() < 1e-3]
            assert near, (box, expected)
            left.remove(near[0])
            mask = decode_mask(given.segmentations[near[0]], *given.size)[:, ::-1] > 0
            assert drawn.classes[k] == given.classes[near[0]]
            assert (drawn.masks[k] & mask).sum() / (drawn.masks[k] | mask).sum() > 0.9
            objects += 1
    assert task == "segment" or objects > 8


def test_panels_show_what_the_model_predicts(
    run_and_sheets: tuple[pathlib.Path, Sheets],
) -> None:
    """The last panel is of the weights that `load` reads."""
    run, calls = run_and_sheets
    model, sheet = m3i_jax.load(str(run)), calls[-1]
    assert set(sheet["words"]) == {"step 2"}
    for image, predicted in zip(sheet["images"], sheet["found"], strict=True):
        height, width = image.shape[:2]
        padded = np.zeros((1, 32, 32, 3), np.uint8)
        padded[0, :height, :width] = image
        out = model.function(model.params, padded, np.array([[height, width]], np.int32))
        logits = np.asarray(out["logits"])[0, :height, :width]
        ranked = np.sort(logits, -1)
        clear = ranked[..., -1] - ranked[..., -2] > 1e-4
        assert clear.mean() > 0.9 and predicted.shape == (height, width)
        np.testing.assert_array_equal(predicted[clear], logits.argmax(-1)[clear])


def test_panels_of_detection_show_the_valid_detections(
    sheets: Sheets, tmp_path: pathlib.Path
) -> None:
    """Of two images, with three places for detections each; masks are those of boxes."""
    outputs = {
        "valid": np.array([[True, False, True], [False, True, False]]),
        "boxes": np.array(
            [[[2, 3, 10, 11], [0, 0, 5, 5], [4, 4, 8, 12]], [[1, 1, 9, 5]] * 3], float
        ),
        "classes": np.arange(6).reshape(2, 3),
        "scores": np.linspace(0.9, 0.4, 6).reshape(2, 3),
        "masks": np.ones((2, 3, 4, 4), np.float32) * np.array([1, 1, 0])[:, None, None],
    }
    batch = {
        "position": np.arange(2),
        "size": np.array([[16, 12], [8, 16]]),
        "image": np.arange(2 * 16 * 16 * 3, dtype=np.uint8).reshape(2, 16, 16, 3),
        "classes": np.array([[1, -1], [0, 2]]),
        "boxes": np.array([[[1, 1, 5, 7], [0, 0, 0, 0]], [[0, 0, 4, 4], [3, 2, 9, 8]]], np.float32),
    }
    setup = types.SimpleNamespace(config=schema.Config(), workdir=tmp_path, classes=tuple("abcdef"))
    trainer = types.SimpleNamespace(panel_outputs=lambda state, few: outputs)
    draw: Any = task_views.task_views("detect").draw_panel
    draw(setup, trainer, 7, None, batch)
    (sheet,) = sheets
    assert (tmp_path / "panels" / "00000007.png").is_file()
    assert [image.shape for image in sheet["images"]] == [(16, 12, 3), (8, 16, 3)]
    assert [drawn.classes.tolist() for drawn in sheet["truth"]] == [[1], [0, 2]]
    first, second = sheet["found"]
    assert (first.classes.tolist(), second.classes.tolist()) == ([0, 2], [4])
    np.testing.assert_allclose(first.scores, [0.9, 0.7])
    np.testing.assert_allclose(first.boxes, [[2, 3, 10, 11], [4, 4, 8, 12]])
    assert [mask.shape for mask in first.masks] == [(16, 12)] * 2
    rows, columns = np.nonzero(first.masks[0])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (3, 10, 2, 9)
    assert len(rows) == 64 and not first.masks[1].any()
