"""--mode=features: every image of a source once and in order, by a run or by other weights;
resuming; refusals."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from m3i_jax import config as configuration
from m3i_jax import main as command
from m3i_jax import schema
from m3i_jax.data import eval_batches, splits
from m3i_jax.errors import UserError
from m3i_jax.evaluation import load, load_dense
from m3i_jax.interop import tensor_files
from m3i_jax.modes import features
from tests import saved, toy
from tests.interop.published_vit import ENCODERS, weights

SOURCE = {
    "data__source": "shapes",
    "data__size": 40,
    "data__holdout": 0.25,
    "evaluate__batch_size": 8,
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("run")
    saved.run(directory, toy.settings(**SOURCE))
    return directory


def written(workdir: pathlib.Path, out: pathlib.Path, *more: str) -> int:
    return command.main(["--mode=features", "--workdir", str(workdir), f"--out={out}", *more])


def test_every_image_once_and_in_order(
    workdir: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert written(workdir, tmp_path / "a.npz") == 0
    table, about = features.read_feature_file(str(tmp_path / "a.npz"))
    train, held_out = splits.open_splits(toy.settings(**SOURCE).data)
    assert len(train) + len(held_out) == 40 and len(held_out) > 4
    assert table["held_out"].tolist() == [False] * len(train) + [True] * len(held_out)
    assert table["keys"].tolist() == [
        source[i].key for source in (train, held_out) for i in range(len(source))
    ]
    assert table["labels"].tolist() == [
        source[i].label for source in (train, held_out) for i in range(len(source))
    ]
    model, every = load.load(str(workdir)), range(len(held_out))
    views = np.concatenate(
        [
            b["views"][b["valid"]]
            for b in eval_batches.evaluation_batches(held_out, every, model.preprocessing, 8)
        ]
    )
    np.testing.assert_allclose(
        table["features"][len(train) :], model.features(views, ready=True), atol=1e-5
    )
    assert (
        about["pool"] == "attention"
        and about["classes"] == list(train.classes)
        and about["skipped"] == {}
    )
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]
    assert f"40 x 24 in {tmp_path / 'a.npz'}" in capsys.readouterr().out


def test_a_run_that_began_from_weights_is_read_and_not_those(
    workdir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Of a fine-tuned run, whose settings name the weights that it began from, also after these
    were deleted. Other weights that the command names are read."""
    started, tuned = tmp_path / "started", tmp_path / "tuned"
    shutil.copytree(workdir, started)
    saved.run(tuned, toy.settings(**SOURCE, init_from=str(started)), seed=2)
    table = {}
    assert written(tuned, tmp_path / "other.npz", f"--config.init_from={workdir}") == 0
    assert written(tuned, tmp_path / "before.npz", f"--config.init_from={started}") == 0
    before, about = features.read_feature_file(str(tmp_path / "before.npz"))
    assert about["weights"].startswith(str(started))
    shutil.rmtree(started)
    assert written(tuned, tmp_path / "own.npz") == 0
    for name in ("own", "other"):
        table[name], about = features.read_feature_file(str(tmp_path / f"{name}.npz"))
        assert about["weights"].startswith(str(tuned if name == "own" else workdir))
    assert np.abs(table["own"]["features"] - table["other"]["features"]).max() > 1e-2
    np.testing.assert_allclose(before["features"], table["other"]["features"], atol=1e-5)
    gone = [f"--config.init_from={started}"]
    assert written(workdir, tmp_path / "x.npz", *gone) == 2


def test_a_run_as_init_from_is_read_as_it_is_evaluated(
    workdir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """By its average, if that is what it evaluates, unless the command says which weights; and not
    as the weights that the run in the working directory started from were read."""
    averaged, tuned = tmp_path / "averaged", tmp_path / "tuned"
    averaged.mkdir(), tuned.mkdir()
    saved.run(averaged, toy.settings(**SOURCE, evaluate__encoder="ema"))
    began = toy.settings(**SOURCE, init_from=str(averaged), init__weights="ema")
    (tuned / "config.txt").write_text(configuration.config_to_text(began))
    online = "--config.init.weights=online"
    for run, more, words in (
        (averaged, [], "momentum average"),
        (averaged, [online], "online"),
        (workdir, [], "online"),
    ):
        arguments = ["--config.data.size=8", f"--config.init_from={run}", *more]
        assert written(tuned, tmp_path / "a.npz", *arguments) == 0
        assert words in features.read_feature_file(str(tmp_path / "a.npz"))[1]["weights"]


def test_a_file_of_settings_says_how_weights_are_read(
    workdir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """As the command does; those that a run saved are of the weights that it started from."""
    (tmp_path / "own.py").write_text(
        "from m3i_jax import config\n\ndef get_config():\n"
        f"    made = config.load_from_workdir({str(workdir)!r}, 'own.py')\n"
        "    made.init.weights = 'ema'\n    return made\n"
    )
    own = ["--config", str(tmp_path / "own.py"), "--config.data.size=8"]
    for more, words in (([], "momentum average"), (["--config.init.weights=online"], "online")):
        arguments = [*own, f"--config.init_from={workdir}", *more]
        assert written(tmp_path / "new", tmp_path / "a.npz", *arguments) == 0
        assert words in features.read_feature_file(str(tmp_path / "a.npz"))[1]["weights"]


def stopped_at_the_second_part(monkeypatch: pytest.MonkeyPatch) -> list:
    """(first index, preprocessing, settings) of every requested part of 16 images; the second is
    interrupted."""
    monkeypatch.setattr(features, "_PART", 16)
    read, asked = eval_batches.evaluation_batches, []

    def stops(source, indices, preprocessing, rows, **settings):
        asked.append((indices.start, preprocessing, settings))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return read(source, indices, preprocessing, rows, **settings)

    monkeypatch.setattr(features.eval_batches, "evaluation_batches", stops)
    return asked


def test_an_interrupted_run_is_resumed(
    workdir: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert written(workdir, tmp_path / "whole.npz") == 0
    asked = stopped_at_the_second_part(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        written(workdir, tmp_path / "a.npz")
    assert sorted(p.name for p in (tmp_path / "a.npz.parts").iterdir()) == [
        "about.json",
        "train.0.npz",
    ]
    assert not (tmp_path / "a.npz").exists()
    assert written(workdir, tmp_path / "a.npz") == 0
    # interrupted at the second part and resumed there; then the held-out images
    assert [start for start, *_ in asked] == [0, 16, 16, 0, 16]
    whole, stopped = (
        features.read_feature_file(str(tmp_path / name))[0] for name in ("whole.npz", "a.npz")
    )
    for name in whole:
        assert whole[name].dtype == stopped[name].dtype
        if name != "features":
            np.testing.assert_array_equal(whole[name], stopped[name])
    np.testing.assert_allclose(whole["features"], stopped["features"], atol=1e-5)


def test_other_weights_and_other_images(
    workdir: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = weights(ENCODERS["timm"], width=32, depth=1, heads=2, patch=8, grid=2)
    tensor_files.write_safetensors(tmp_path / "vit.safetensors", table)
    arguments = [f"--config.init_from={tmp_path / 'vit.safetensors'}", "--config.data.size=20"]
    assert written(workdir, tmp_path / "a.npz", *arguments) == 0
    got, about = features.read_feature_file(str(tmp_path / "a.npz"))
    assert (
        got["features"].shape == (20, 32)
        and about["image_size"] == 16
        and about["pool"] == "mean"
        and "(timm)" in about["weights"]
    )
    assert np.isfinite(got["features"]).all() and np.std(got["features"], 0).min() > 0
    assert (
        written(workdir, tmp_path / "b.npz", *arguments, "--config.evaluate.features=attention")
        == 2
    )
    assert (
        "config.evaluate.features: 'attention' needs a trained pooling" in capsys.readouterr().err
    )


def test_evaluation_settings_are_used_and_parts_of_other_settings_removed(
    workdir: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = stopped_at_the_second_part(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        written(workdir, tmp_path / "a.npz")
    wanted = {
        "evaluate.crop": 1.0,
        "evaluate.interpolation": "bilinear",
        "evaluate.squash": "true",
        "data.threads": 3,
        "data.missing": "replace",
        "data.background": 0,
    }
    assert (
        written(
            workdir,
            tmp_path / "a.npz",
            *(f"--config.{key}={value}" for key, value in wanted.items()),
        )
        == 0
    )
    # from the start, since the crop differs
    assert [start for start, *_ in asked] == [0, 16, 0, 16, 0, 16]
    for preprocessing, settings in (found for _, *found in asked[2:]):
        how = preprocessing.crop, preprocessing.interpolation, preprocessing.squash
        assert how == (1.0, "bilinear", True)
        assert preprocessing.background == 0 and settings == {
            "threads": 3,
            "missing": "replace",
        }
    assert features.read_feature_file(str(tmp_path / "a.npz"))[1]["crop"] == 1.0
    assert written(workdir, tmp_path / "b.npz", "--config.evaluate.features=mean") == 0
    table, about = features.read_feature_file(str(tmp_path / "b.npz"))
    # 24 of the attention pooling
    assert about["pool"] == "mean" and table["features"].shape == (40, 32)


def test_parts_of_other_features_are_removed(workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    kept = tmp_path / "a.npz.parts"
    kept.mkdir()
    (kept / "about.json").write_text(json.dumps({"weights": "others"}))
    np.savez(kept / "train.0.npz", keys=np.array(["wrong"]))
    assert written(workdir, tmp_path / "a.npz") == 0
    assert "wrong" not in features.read_feature_file(str(tmp_path / "a.npz"))[0]["keys"]


def test_parts_of_a_file_that_was_written_anew_are_removed(
    workdir: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted run of other weights under the same name is not continued."""
    shape = dict(width=32, depth=1, heads=2, patch=8, grid=2)
    table, file = weights(ENCODERS["timm"], **shape), tmp_path / "vit.safetensors"
    tensor_files.write_safetensors(file, table)
    arguments = [f"--config.init_from={file}"]
    asked = stopped_at_the_second_part(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        written(workdir, tmp_path / "a.npz", *arguments)
    table["cls_token"] = table["cls_token"] + 1
    tensor_files.write_safetensors(file, table)
    assert written(workdir, tmp_path / "a.npz", *arguments) == 0
    assert [start for start, *_ in asked] == [0, 16, 0, 16, 0, 16]


def test_a_detector_has_no_features(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = schema.Config(task="detect")
    found = load_dense.LoadedDense(dense, {}, ("a",), "runs/detect (step 4)")
    monkeypatch.setattr(load, "load", lambda *arguments, **options: found)
    with pytest.raises(UserError, match=r"^config.init_from: runs/detect .*config.task=detect"):
        features._model(toy.settings(init_from="runs/detect"), "", "")


def test_refusals(
    workdir: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        (["--workdir", str(workdir)], "--out: is missing"),
        (
            ["--workdir", str(workdir), "--out=x.h5"],
            "--out: 'x.h5' must be a file that ends in .npz",
        ),
        (["--workdir", str(tmp_path), "--out=x.npz"], "has no config.txt"),
        (
            ["--config", "configs/quickstart.py", "--workdir", str(tmp_path), "--out=x.npz"],
            "has no run; give one, or weights by",
        ),
    ):
        assert command.main(["--mode=features", *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error


def test_features_that_are_not_finite_are_named(
    workdir: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The fourth image of the second batch; the others are written."""
    train, _ = splits.open_splits(toy.settings(**SOURCE).data)
    inner, calls = load.LoadedEncoder.function.func, []

    def function(self):
        def run(params, views):
            calls.append(1)
            out = np.array(inner(self)(params, views))
            out[3] = np.nan if len(calls) == 2 else out[3]
            return out

        return run

    monkeypatch.setattr(load.LoadedEncoder, "function", property(function))
    assert written(workdir, tmp_path / "a.npz") == 0
    out = capsys.readouterr().out
    assert f"warning: {train.key(11)}: the features of this image are not finite" in out
    with np.load(tmp_path / "a.npz") as file:
        finite = np.isfinite(file["features"]).all(1)
    assert np.flatnonzero(~finite).tolist() == [11] and len(finite) > 20
