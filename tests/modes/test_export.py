"""--mode=export: files with the names and shapes that other libraries expect and with exact values;
a StableHLO program that runs without this package; the model card."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from m3i_jax import config as configuration
from m3i_jax import main as command
from m3i_jax import schema
from m3i_jax.data.preprocessing import Preprocessing
from m3i_jax.errors import UserError
from m3i_jax.evaluation import feature_extraction, load
from m3i_jax.interop import export_formats, tensor_files, vit_weights
from m3i_jax.models import intern_image_layer, presets
from m3i_jax.modes import export, export_files, model_card
from m3i_jax.parallel import kernel_calls
from m3i_jax.training import teachers
from tests import saved, toy
from tests.interop import published
from tests.interop.published_vit import ENCODERS, shapes, weights

SIZES = {"width": 32, "depth": 2, "heads": 2, "patch": 8, "grid": 4}
ENCODER = "model__encoder__"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    workdir = tmp_path_factory.mktemp("exported")
    params, average = saved.run(workdir, toy.settings())
    (workdir / "data.txt").write_text(
        "source 1 = folder, 800 images, fingerprint 0123456789abcdef\n"
    )
    lines = [
        {"step": 2, "loss": 3.0, "lr": 1.0},
        {"step": 4, "loss": 2.5},
        {"step": 4, "eval/knn/top1": 0.75},
    ]
    (workdir / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "lo'
    )
    return workdir, params, average


def exported(workdir: pathlib.Path, format: str, *more: str) -> pathlib.Path:
    assert (
        command.main(["--mode=export", f"--format={format}", "--workdir", str(workdir), *more]) == 0
    )
    return workdir / "export" / format


def test_timm(run, capsys: pytest.CaptureFixture[str]) -> None:
    directory = exported(run[0], "timm")
    table = tensor_files.read_tensors(directory / "model.safetensors")
    wanted = {
        name: shape
        for name, shape in shapes(ENCODERS["timm"], **SIZES).items()
        if not name.startswith("norm.")
    }
    assert table.shapes == wanted  # no final norm, as in the run
    back = vit_weights.load_vit(table).arrays
    for path, array in saved.flat({"encoder": run[1]["encoder"]}).items():
        np.testing.assert_array_equal(back[path], array, err_msg=path)
    config = json.loads((directory / "config.json").read_text())
    assert config["model_args"]["embed_dim"] == 32 and config["model_args"]["final_norm"] is False
    # timm's _parse_model_cfg takes `model_args`, and of the other keys the number of classes
    _, arguments = export_formats.timm_arguments(
        dataclasses.asdict(toy.settings().model.encoder), 32
    )
    given = config["model_args"] | {"num_classes": config["num_classes"]}
    assert given == arguments and given["global_pool"] == "avg"
    out = capsys.readouterr().out
    assert "timm.create_model('vit_base_patch16_224', img_size=32" in out
    assert ("equal" in out) != (
        "not compared with timm, which is not installed; to compare: pip install 'm3i-jax[torch]'"
        in out
    )


def test_hugging_face_and_the_momentum_average(run, capsys: pytest.CaptureFixture[str]) -> None:
    directory = exported(run[0], "hf", "--config.evaluate.encoder=ema")
    table = tensor_files.read_tensors(directory / "model.safetensors")
    assert table.shapes == shapes(ENCODERS["hf"], **SIZES)
    np.testing.assert_array_equal(
        table["encoder.layer.1.output.dense.weight"],
        run[2]["encoder"]["blocks"]["mlp"]["fc2"]["kernel"][1].T,
    )
    np.testing.assert_array_equal(table["layernorm.weight"], np.ones(32))
    config = json.loads((directory / "config.json").read_text())
    assert (
        config["layer_norm_eps"] == 1e-6
        and config["intermediate_size"] == 128
        and config["architectures"] == ["ViTModel"]
    )
    pixels = json.loads((directory / "preprocessor_config.json").read_text())
    assert pixels["size"] == {"shortest_edge": 37} and pixels["image_mean"] == [0.485, 0.456, 0.406]
    assert "hidden_states[-1]" in capsys.readouterr().out


def test_a_clip_encoder_has_the_names_of_both_versions_of_transformers(
    tmp_path: pathlib.Path,
) -> None:
    """4 reads `vision_model.` alone, 5 both forms; here they are the same encoder."""
    tree = vit_weights.load_vit(weights(ENCODERS["clip"], **SIZES)).arrays
    config = toy.settings(
        model__encoder__embedding_norm="true",
        model__encoder__final_norm="true",
        data__image_size=32,
    )
    seen = Preprocessing.of(config).described()
    encoder = dataclasses.asdict(config.model.encoder)
    assert export_formats.hugging_face_config(tmp_path, tree, encoder, seen) == "CLIPVisionModel"
    table = tensor_files.read_tensors(tmp_path)
    assert all(name.startswith("vision_model.") for name in table.shapes)
    plain = {name.removeprefix("vision_model."): table[name] for name in table.shapes}
    for form in (table, plain):
        back = vit_weights.load_vit(form)
        assert back.layout == "clip" and not back.unknown
        for path, array in tree.items():
            if path not in ("encoder/patch_embed/bias", "encoder/positions"):
                np.testing.assert_array_equal(back.arrays[path], array, err_msg=path)


def test_exported_weights_load_as_the_same_function(run) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    expected = load.load(str(run[0]), pool="mean").features(images)
    for format in ("timm", "npz"):
        directory = exported(run[0], format)
        got = load.load(str(directory / "vit.npz" if format == "npz" else directory), pool="mean")
        np.testing.assert_allclose(got.features(images), expected, atol=1e-5)
    # Google's layout has the tanh form of GELU where nothing says otherwise
    (directory / "preprocessing.json").unlink()
    assert load.load(str(directory / "vit.npz")).config.model.encoder.activation == "gelu_tanh"


def test_what_arrays_do_not_show_is_stored(tmp_path: pathlib.Path) -> None:
    """The eps of timm's config.json is always 1e-6, and its MLPs are rounded down."""
    config = toy.settings(model__encoder__norm_eps=1e-2, model__encoder__mlp_ratio=2.8)
    saved.run(tmp_path, config)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    expected = load.load(str(tmp_path), pool="mean").features(images)
    directory = exported(tmp_path, "timm")
    got = load.load(str(directory), pool="mean").features(images)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    arguments = json.loads((directory / "config.json").read_text())["model_args"]
    hidden = tensor_files.read_tensors(directory).shapes["blocks.0.mlp.fc1.bias"][0]
    assert int(arguments["embed_dim"] * arguments["mlp_ratio"]) == hidden == 90


@pytest.fixture(scope="module")
def intern(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run of the smallest InternImage preset."""
    workdir, config = tmp_path_factory.mktemp("intern"), configuration.default_config()
    presets.apply_preset(config, "internimage_pico")
    config.data.update({"image_size": 32, "classes": 5, "captions": "no", "size": 80})
    config.objective.forms = ("sim",)
    config.model.decoder.update({"width": 32, "depth": 1, "heads": 2})
    saved.run(workdir, configuration.resolve(config))
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("format", ["hf", "npz"])
def test_an_intern_image_under_its_published_names(
    intern: pathlib.Path, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    expected = load.load(str(intern), pool="mean").features(images)
    directory = exported(intern, format)
    assert "its stem has strides (2, 1), theirs (2, 2)" in capsys.readouterr().out
    path = directory if format == "hf" else directory / "intern_image.npz"
    wanted = published.shapes(published.PICO._replace(fused=128, pooled=1))
    names = {name for name in wanted if name.startswith(("patch_embed", "levels", "dcnv3_head"))}
    assert tensor_files.read_tensors(path).shapes == {
        f"model.{name}" if format == "hf" else name: wanted[name] for name in names
    }
    got = load.load(str(path))
    # the files hold no size: preprocessing.json and the processor's do
    assert got.config.data.image_size == 32
    np.testing.assert_allclose(got.features(images), expected, atol=1e-5 * np.abs(expected).max())


def test_timm_has_no_intern_image(intern: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--mode=export", "--format=timm", "--workdir", str(intern)]) == 2
    assert (
        "--format=timm: has no model for the backbone intern_image; use stablehlo, orbax,"
        " hf, npz" in capsys.readouterr().err
    )


def test_orbax(run) -> None:
    directory = exported(run[0], "orbax")
    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore((directory / "parameters").absolute())
    assert saved.flat(tree).keys() == saved.flat(run[1]).keys()
    np.testing.assert_array_equal(tree["encoder"]["cls_token"], run[1]["encoder"]["cls_token"])
    assert "model.encoder.width = 32" in (directory / "config.txt").read_text()
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3)).astype(np.uint8)
    again, model = load.load(str(directory)), load.load(str(run[0]))
    assert again.pool == model.pool == "attention"
    np.testing.assert_array_equal(again.features(images), model.features(images))
    with pytest.raises(UserError, match="is an export, of one copy of the weights"):
        load.load(str(directory), weights="ema")
    metadata = directory / "parameters" / "_METADATA"
    whole = metadata.read_bytes()
    metadata.write_bytes(whole[:100])  # copied in part
    with pytest.raises(UserError, match="cannot be read.*export it again") as caught:
        load.load(str(directory))
    assert "NoneType" not in str(caught.value)
    metadata.unlink()
    with pytest.raises(UserError, match="_METADATA is missing or damaged"):
        load.load(str(directory))
    metadata.write_bytes(whole)


def test_an_export_needs_no_teacher(tmp_path: pathlib.Path) -> None:
    """Loading reads no target: not where its run distilled a file that is elsewhere now."""
    file, run = tmp_path / "teacher.safetensors", tmp_path / "run"
    tensor_files.write_safetensors(file, weights(ENCODERS["timm"], **SIZES))
    own = toy.settings(objective__forms="distill", objective__teachers=repr((str(file),)))
    saved.run(run, own)
    with_file, directory = load.load(str(run)), exported(run, "orbax")
    file.unlink()
    teachers._IN_RUNS.clear()
    teachers.open_teacher.cache_clear()
    model = load.load(str(directory))
    assert model.pool == with_file.pool == "cls"
    assert model.config.objective.teachers == ("teacher.safetensors",)  # as it was trained
    jax.tree.map(np.testing.assert_array_equal, model.params, with_file.params)


def test_settings_of_an_export_name_no_directory() -> None:
    """Of relative paths and lists, too; what is left is read as settings."""
    config = toy.settings()
    data = dataclasses.replace(
        config.data,
        mixture=("folder:own/photos=3", "coco:/b/images@/b/notes/train.json|c/val.json"),
        keep=("lists/keep.parquet", "all"),
        annotations="notes/train.json",
        path="s3://bucket/x",
    )
    text = model_card.portable_settings(
        dataclasses.replace(config, data=data, init_from="/a/b.npz")
    )
    read = configuration.config_from_text(text, "").to_dict()
    assert read["data"]["mixture"] == ("folder:photos=3", "coco:val.json")
    assert read["data"]["keep"] == ("keep.parquet", "all") and read["init_from"] == "b.npz"
    assert (read["data"]["annotations"], read["data"]["path"]) == ("train.json", "s3://bucket/x")


FRESH = """
import sys, jax, jax.export, numpy as np
path, images, out = sys.argv[1:]
program = jax.export.deserialize(bytearray(open(path, 'rb').read()))
np.savez(out, **{str(n): program.call(np.load(images)[:n]) for n in (1, 3)})
assert not any(name.startswith(("m3i_jax", "flax")) for name in sys.modules)
"""


def test_stablehlo_runs_in_a_fresh_process_for_any_batch(
    run, tmp_path: pathlib.Path, capsys
) -> None:
    pytest.importorskip("flatbuffers")
    features, excluded = feature_extraction.extract_features, []

    def noted(*arguments):
        excluded.append(kernel_calls.excluded())
        return features(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extraction, "extract_features", noted)
        directory = exported(run[0], "stablehlo")
    assert len(excluded) > 1 and all(excluded)  # what it is compared with has no kernels either
    assert "images [b, 32, 32, 3] as float32 [b, 24], for cpu" in capsys.readouterr().out
    seen = json.loads((directory / "preprocessing.json").read_text())
    assert (seen["image_size"], seen["short_side"], seen["crop"], seen["resample"]) == (
        32,
        37,
        0.875,
        "bicubic",
    )
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    np.save(tmp_path / "pictures.npy", images)
    arguments = [
        str(directory / "features.stablehlo"),
        str(tmp_path / "pictures.npy"),
        str(tmp_path / "out.npz"),
    ]
    subprocess.run([sys.executable, "-c", FRESH, *arguments], check=True, cwd=tmp_path)
    # attention: this objective trained it
    expected = load.load(str(run[0])).features(images, ready=True)
    with np.load(tmp_path / "out.npz") as got:
        for n in ("1", "3"):
            assert got[n].shape == (int(n), 24)
            np.testing.assert_allclose(got[n], expected[: int(n)], atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"model__remat": "names", "model__scan": "true"}, id="vit"),
        pytest.param(
            {**toy.INTERN, "model__remat": "full"}, id="intern_image", marks=pytest.mark.slow
        ),
    ],
)
def test_a_program_for_any_batch_of_a_run_with_remat(
    changes: dict[str, str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of images, which remat computes one by one, have no place in it."""
    pytest.importorskip("flatbuffers")
    monkeypatch.setattr(export, "_PLATFORMS", ("cpu",))
    monkeypatch.setattr(intern_image_layer, "chunk_rows", lambda *_: 1.0)  # as on a TPU
    config = toy.settings(objective__forms="sim", **changes)
    params = {"encoder": saved.random(config)["encoder"]}
    export._to_stablehlo(tmp_path, load.LoadedEncoder(config, params, "mean", ""), "")
    program = jax.export.deserialize(bytearray((tmp_path / "features.stablehlo").read_bytes()))
    images = np.random.default_rng(1).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    one_by_one = [program.call(images[k : k + 1])[0] for k in range(4)]
    np.testing.assert_allclose(program.call(images), np.stack(one_by_one), atol=1e-5)


def test_an_export_replaces_an_earlier_one_as_a_whole_or_not_at_all(
    run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = lambda: {
        str(path.relative_to(tmp_path)): path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    model = load.load(str(run[0]))
    monkeypatch.setattr(load, "load", lambda *_, **__: model)
    parts = (toy.settings(), str(tmp_path), tmp_path / "npz", "npz")

    def broken(directory: pathlib.Path, *_: object) -> list[str]:
        (directory / "half.npz").write_bytes(b"")
        raise UserError("no place left")

    with pytest.raises(UserError, match="no place left"):
        export._export(*parts, broken, lambda _: None)
    assert not list(tmp_path.iterdir())
    export._export(*parts, export._to_npz, lambda _: None)
    earlier = files()
    assert set(earlier) == {"npz/vit.npz", "npz/preprocessing.json", "npz/README.md"}
    with pytest.raises(UserError, match="no place left"):
        export._export(*parts, broken, lambda _: None)
    assert files() == earlier
    for left in (".npz.new", ".npz.old"):  # of a process that was killed
        (tmp_path / left).mkdir()
        (tmp_path / left / "half.npz").write_bytes(b"")
    export._export(*parts, export._to_npz, lambda _: None)
    assert files() == earlier


def test_an_export_killed_between_its_renames_keeps_the_earlier_one(tmp_path: pathlib.Path) -> None:
    (tmp_path / ".hf.old").mkdir()
    (tmp_path / ".hf.old" / "a.txt").write_text("earlier")
    with (
        pytest.raises(UserError),
        export_files.replaced_directory(tmp_path / "hf"),
    ):
        raise UserError("again")
    assert (tmp_path / "hf" / "a.txt").read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_preprocessing_of_a_square_is_a_sentence() -> None:
    for squash, words in (("false", "resize the short side to 37"), ("true", "resize each side")):
        config = toy.settings(evaluate__squash=squash)
        line = export._preprocessing_line(load.LoadedEncoder(config, {}, "mean", ""))
        assert words in line, line


def test_the_model_card(run) -> None:
    # the latter is of other weights
    for directory, share in ((run[0], 0.625), (pathlib.Path("elsewhere"), 0.8125)):
        about = {"checkpoint": str(directory / "checkpoints" / "4"), "step": 4, "encoder": "ema"}
        (run[0] / "eval.json").write_text(
            json.dumps(about | {"results": {"linear": {"eval/linear/top1": share}}})
        )
        text = (
            exported(run[0], "npz", "--config.report.licence=CC-BY-4.0") / "README.md"
        ).read_text()
        assert ("| eval/linear/top1, ema (--mode=eval) | 0.625 | 4 |" in text) == (
            share == 0.625
        ) and "0.8125" not in text
    (run[0] / "eval.json").unlink()
    wanted = [
        f"{run[0].name} (step 4, online), written as npz",
        "vit, patch 8, 2 blocks of 32",
        "fingerprint 0123456789abcdef",
    ]
    for words in [
        *wanted,
        "CC-BY-4.0",
        "| eval/knn/top1 | 0.75 | 4 |",
        "| loss | 2.5 | 4 |",
        "data.image_size = 32",
        "m3i",
    ]:
        assert words in text, words
    assert "| lr |" not in text and str(run[0]) not in text


def test_metrics_of_the_model_card_that_were_measured_by_other_settings(run) -> None:
    """Whatever the export does not have: the weights, and how images were resized."""
    seen = Preprocessing(image_size=32, crop=0.5, squash=True).described()
    about = {"checkpoint": str(run[0] / "checkpoints" / "4"), "step": 4, "encoder": "ema"}
    results = {"results": {"knn": {"eval/knn/top1": 0.5}}, "preprocessing": seen}
    (run[0] / "eval.json").write_text(json.dumps(about | results))
    rows = model_card._metrics(
        run[0], schema.Evaluate(encoder="ema", crop=1.0, interpolation="bilinear", squash=True)
    )
    (run[0] / "eval.json").unlink()
    other = "encoder=online, crop=0.875, interpolation=bicubic, squash=false"
    assert rows[2:] == [
        "| loss | 2.5 | 4 |",
        f"| eval/knn/top1, {other} | 0.75 | 4 |",
        "| eval/knn/top1, ema, crop=0.5, interpolation=bicubic (--mode=eval) | 0.5 | 4 |",
    ]


def test_paths_of_a_mixture() -> None:
    entries = ("folder:own/photos", "tars:own/date=7/x", "folder:own/b=0.5", "tfds:food101=size")
    config = toy.settings()
    data = dataclasses.replace(config.data, mixture=entries)
    found = model_card.configured_paths(dataclasses.replace(config, data=data))
    assert found == {"own/photos", "own/date=7/x", "own/b"}


def test_refusals(
    run, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved.run(tmp_path, toy.settings(**{f"{ENCODER}cls_token": "false", "objective__forms": "mim"}))
    rope = {"positions": "rope", "norm": "rms"}
    changes = {f"{ENCODER}{name}": value for name, value in rope.items()}
    saved.run(tmp_path / "rope", toy.settings(**changes, objective__forms="mim"))
    for arguments, words in (
        ([f"--workdir={tmp_path / 'rope'}", "--format=npz"], "--format=npz: has no names for"),
        ([f"--workdir={run[0]}"], "--format: is missing; give one of timm, hf"),
        ([f"--workdir={run[0]}", "--format=onnx"], "--format: 'onnx' is not one of timm"),
        ([f"--workdir={tmp_path / 'x'}", "--format=timm"], "has no config.txt"),
        ([f"--workdir={tmp_path}", "--format=hf"], "always have a cls token"),
    ):
        assert command.main(["--mode=export", *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    assert command.main(["--mode=show", "--config", "configs/quickstart.py", "--format=timm"]) == 2
    assert "--format: does not belong to --mode=show" in capsys.readouterr().err
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"m3i-jax\[export\]"):
        export.run(toy.settings(), workdir=str(run[0]), format="stablehlo")


def test_a_difference_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="the export is wrong"):
        export._difference("tokens", np.ones((2, 3)), np.ones((2, 3)) + 0.01)
    with pytest.raises(RuntimeError, match="the export is wrong"):
        export._difference("tokens", np.ones((2, 3)), np.full((2, 3), np.nan))
    assert "at most 1e-06" in export._difference("tokens", np.ones(3), np.ones(3) + 1e-6)
