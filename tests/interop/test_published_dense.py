"""Files with the names of InternImage's published detectors and segmenters: recognised, loaded,
compared with an independent rendering (tests/data/make_published_dense.py), and evaluated."""

import functools
import json
import pathlib
from typing import Any

import numpy as np
import pytest

import m3i_jax
from m3i_jax import config as configuration
from m3i_jax import main as command
from m3i_jax.errors import UserError
from m3i_jax.evaluation import load, sliding_windows
from m3i_jax.evaluation.load_dense import LoadedDense
from m3i_jax.interop import published_dense, tensor_files
from m3i_jax.models import intern_image, intern_image_backbone
from m3i_jax.training import init_from, weight_source
from tests.data import published_dense as case
from tests.dense_toy import make_trainer
from tests.saved import flat

ROOT = pathlib.Path(__file__).parents[2]
FILE = ROOT / "tests/data/dense/published_dense.npz"
SYSTEMS = ("dino", "composite", "upernet", "mask2former")


@functools.cache
def stored() -> dict[str, np.ndarray]:
    with np.load(FILE) as file:
        return dict(file)


def weights(system: str) -> dict[str, np.ndarray]:
    shapes = json.loads(str(stored()[f"{system}/shapes"]))
    drawn_as = lambda name: name.replace("neck.0.", "neck.")
    return {
        name: case.parameter(drawn_as(name), tuple(shape)).astype("f4")
        for name, shape in shapes.items()
    }


@pytest.fixture(autouse=True)
def nano(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small encoder as a preset: published files have the sizes of one."""
    net = intern_image._size(16, (1, 1, 2, 1), 1, norm="pre", layer_scale=0.0)
    monkeypatch.setitem(intern_image.PRESETS, "internimage_nano", net)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, out = tmp_path_factory.mktemp("published"), {}
    for system in SYSTEMS:
        out[system] = str(folder / f"{system}.safetensors")
        tensor_files.write_safetensors(out[system], weights(system))
    return out


@functools.cache
def model(path: str) -> LoadedDense:
    loaded = m3i_jax.load(path)
    assert isinstance(loaded, LoadedDense)
    return loaded


@functools.cache
def outputs(path: str) -> dict[str, np.ndarray]:
    loaded = model(path)
    made = loaded.function(loaded.params, case.images(), case.SIZES)
    return {name: np.asarray(value) for name, value in made.items()}


# The composed system has the same head; the weights of one copy are those of UperNet's system.
@pytest.mark.slow
@pytest.mark.parametrize("system", ["dino", "composite"])
def test_detections_of_a_file_are_those_of_its_system(files: dict, system: str) -> None:
    loaded, made = model(files[system]), outputs(files[system])
    maps, detect = loaded.config.dense.maps, loaded.config.dense.detect
    assert maps.composite == (2 if system == "composite" else 1)
    assert (detect.head, detect.strides, detect.width) == ("dino", (8, 16, 32, 64), case.WIDTH)
    assert not detect.dino.shared_heads and not detect.dino.projection_bias
    for i, (height, width) in enumerate(case.SIZES):
        scores = stored()[f"{system}/{i}/scores"]
        valid = made["valid"][i]
        boxes = stored()[f"{system}/{i}/boxes"].clip(0, [width, height] * 2)
        np.testing.assert_allclose(made["scores"][i][valid], scores[valid], rtol=1e-5, atol=1e-6)
        assert (made["classes"][i][valid] == stored()[f"{system}/{i}/labels"][valid]).all()
        np.testing.assert_allclose(made["boxes"][i][valid], boxes[valid], atol=1e-5 * case.SIDE)
        assert valid.all() and len(valid) == case.QUERIES * case.CLASSES
    found = loaded.detect(case.images()[0])[0]
    assert len(found.boxes) > 10 and found.masks is None


@pytest.mark.parametrize("system", ["upernet", pytest.param("mask2former", marks=pytest.mark.slow)])
def test_maps_of_a_file_are_those_of_its_system(files: dict, system: str) -> None:
    loaded = model(files[system])
    assert loaded.config.dense.segment.head == system and loaded.config.task == "segment"
    whole = np.full_like(case.SIZES, case.SIDE)
    assert loaded.params["encoder"]["stage0"]["layers"]["gamma1"].shape == (1, 16)
    images, wanted = case.images(), stored()[f"{system}/logits"]
    made = np.asarray(loaded.function(loaded.params, images[:1], whole[:1])["logits"])
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(made[0, ::4, ::4], wanted[0], atol=1e-5 * scale, rtol=0)
    made = np.asarray(loaded.function(loaded.params, images[1:], case.SIZES[1:])["logits"])
    np.testing.assert_allclose(made[0, ::4, ::4], wanted[1], atol=1e-5 * scale, rtol=0)
    assert loaded.config.data.image_size == 512 and loaded.config.dense.segment.test_whole == 32
    average = loaded.config.dense.segment.test_average
    assert average == ("softmax" if system == "mask2former" else "auto")
    if system == "mask2former":  # of UperNet: evaluation/test_load_dense.py
        (found,) = loaded.segment(images[0][:32])
        assert found.shape == (32, 64) and found.max() < case.MAP_CLASSES


@pytest.mark.parametrize(
    ("system", "classes", "original", "resized", "window"),
    [
        pytest.param("upernet", 19, (1024, 2048), (1024, 2048), 0, marks=pytest.mark.slow),
        ("upernet", 150, (480, 640), (512, 704), 0),  # ADE20K: 683 is rounded up
        ("mask2former", 19, (1024, 2048), (1024, 2048), 1024),  # Cityscapes
        ("mask2former", 40, (480, 640), (480, 640), 0),  # NYU Depth V2
        ("mask2former", 59, (375, 500), (544, 704), 0),  # Pascal Context: 520 x 693
        pytest.param("mask2former", 150, (480, 640), (512, 704), 0, marks=pytest.mark.slow),
        ("mask2former", 171, (480, 640), (512, 704), 0),
    ],
)
def test_a_segmenter_is_evaluated_as_its_data_are(
    system: str, classes: int, original: tuple, resized: tuple, window: int, tmp_path: pathlib.Path
) -> None:
    rows = classes + (system == "mask2former")  # and no object
    table = weights(system)
    for name in table:
        if "conv_seg" in name or "cls_embed" in name:
            table[name] = np.ones((rows, *table[name].shape[1:]), "f4")
    path = tmp_path / "model.safetensors"
    tensor_files.write_safetensors(path, table)
    config = m3i_jax.load(str(path)).config
    size_of, _ = sliding_windows.resize_rule(config)
    settings = sliding_windows.sliding_settings(config, classes=classes, batch=1)
    assert size_of(original, 1.0) == resized and settings.whole == (not window)
    assert not window or (settings.window, settings.stride) == (window, window // 2)
    notes = weight_source.open_weights(str(path)).notes
    assert any("does not say how" in note for note in notes) == (classes == 171)


def test_layer_scale_is_read_where_a_preset_has_none() -> None:
    net = intern_image.PRESETS["internimage_t"]
    shapes = intern_image_backbone._shapes(net.__class__(**{**vars(net), "fused": 0}))
    scaled = dict(shapes)
    for stage, depth in enumerate(net.depths):
        for n in (1, 2):
            scaled[f"stage{stage}/layers/gamma{n}"] = (depth, net.width * 2**stage)
    for each, wanted in ((shapes, 0.0), (scaled, 1.0)):
        found = intern_image_backbone.match_preset(each)
        assert found is not None and found[0] == "internimage_t"
        assert found[1]["intern_image"]["layer_scale"] == wanted


@pytest.mark.parametrize(
    ("system", "name", "words"),
    [
        ("dino", "bbox_head.fc.weight", "weights of DINO's head: unknown names bbox_head.fc"),
        ("composite", "neck.1.x.weight", "weights of DINO's head: unknown names neck.1.x"),
        ("upernet", "decode_head.x.weight", "weights of UperNet: unknown names decode_head.x"),
        ("mask2former", "decode_head.x.bias", "of Mask2Former: unknown names decode_head.x"),
        ("dino", "backbone.x.weight", "not weights of InternImage: unknown names x.weight"),
    ],
)
def test_unknown_names_are_refused_in_a_line(
    system: str, name: str, words: str, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "model.safetensors"
    tensor_files.write_safetensors(path, weights(system) | {name: np.ones((2, 2), "f4")})
    with pytest.raises(UserError, match=words) as error:
        m3i_jax.load(str(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_missing_weight_is_named(tmp_path: pathlib.Path) -> None:
    table = weights("dino")
    del table["bbox_head.cls_branches.1.bias"]
    with pytest.raises(UserError, match=r"bbox_head.cls_branches.1.bias is missing"):
        published_dense.load_published_dense(table)


def test_of_other_heads_the_encoder_is_read(tmp_path: pathlib.Path) -> None:
    """InternImage's Mask R-CNN: its head is another than ViTDet's."""
    table = {n: a for n, a in weights("dino").items() if n.startswith("backbone.")}
    path = tmp_path / "model.safetensors"
    tensor_files.write_safetensors(path, table | {"rpn_head.rpn_conv.bias": np.ones(3, "f4")})
    source = weight_source.open_weights(str(path))
    assert source.settings["preset"] == "internimage_nano" and "detect" not in source.settings
    assert source.unused == {"of heads that are not read, such as rpn_head.rpn_conv.bias": 1}
    assert all(name.startswith("encoder/") for name in source.shapes)
    # its images are those that it classifies, not those that a detector reads
    assert m3i_jax.load(str(path)).config.data.image_size == 224


def test_a_head_without_a_known_encoder_is_a_head(tmp_path: pathlib.Path) -> None:
    """Mask2Former of transformers, whose encoder is a Swin."""
    with np.load(FILE.with_name("mask2former.npz")) as file:
        table = {k[6:]: v.astype("f4") for k, v in file.items() if k.startswith("state/")}
    swin = "model.pixel_level_module.encoder.embeddings.norm.weight"
    path = tmp_path / "model.safetensors"
    tensor_files.write_safetensors(path, table | {swin: np.ones(8, "f4")})
    source = weight_source.open_weights(str(path))
    assert all(name.startswith("head/") for name in source.shapes)
    assert source.settings["segment"]["mask2former"]["queries"] == 7
    with pytest.raises(UserError, match=r"m3i_jax has no encoder like its own .*init.only"):
        m3i_jax.load(str(path))
    table = {"model.decoder.layers.0.encoder_attn.sampling_offsets.weight": np.ones((2, 2))}
    with pytest.raises(UserError, match="weights of Deformable DETR"):
        published_dense.load_published_dense(table)


@pytest.mark.parametrize("system", ["composite", "upernet"])
def test_a_recipe_starts_from_a_file(files: dict, system: str) -> None:
    recipe = "segment.py:" if system == "upernet" else "detect.py:head=dino,"
    path = f"configs/transfer/{recipe}from={files[system]},image_size=64,batch_size=2"
    config = configuration.load_config(path)
    assert tuple(config.init.only) == ("^encoder/", "^pyramid/", "^head/")
    if system == "composite":
        assert config.dense.maps.composite == 2 and config.dense.detect.dino.queries == 12
        assert config.dense.detect.dino.denoising == 20  # the recipe's own
    else:
        assert config.dense.segment.width == 24


def test_an_evaluation_has_the_running_statistics_of_the_file(files: dict) -> None:
    config = configuration.load_config(
        f"configs/transfer/segment.py:from={files['upernet']},image_size=64,batch_size=8"
    )
    config.data.update({"size": 64, "classes": case.MAP_CLASSES, "captions": "no"})
    trainer = make_trainer(configuration.resolve(config))
    state = trainer.init(lambda line: None)
    statistics = flat(init_from.with_statistics(state, files["upernet"]).opt["running"].statistics)
    wanted = {n: a for n, a in weights("upernet").items() if "running" in n}
    assert len(statistics) == len(wanted)
    for theirs, ours in (("mean", "mean"), ("var", "variance")):
        name = f"decode_head.bottleneck.bn.running_{theirs}"
        np.testing.assert_array_equal(statistics[f"head/pooled/{ours}"], wanted[name])
    plain = flat(state.opt["running"].statistics)
    assert not np.any(plain["head/pooled/mean"]) and set(plain) == set(statistics)


@pytest.mark.parametrize("model", ["internimage_t", "vit_s16"])
def test_a_file_of_another_encoder_is_evaluated_at_the_size_of_the_recipe(
    files: dict, model: str
) -> None:
    """Not at the 224 pixels that its encoder classifies."""
    recipe = f"configs/transfer/detect.py:head=dino,model={model},image_size=64"
    config = configuration.load_config(recipe)
    config.data.update({"size": 64, "captions": "no"})
    run = configuration.resolve(config)
    fitted = load.fit_config_to_weights(run, files["dino"], "--checkpoint")
    assert fitted.model.backbone == "intern_image" and fitted.model != run.model
    assert fitted.data.image_size == 64


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_file_is_evaluated_by_command(
    files: dict, system: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    boxes = system in ("dino", "composite")
    recipe = "detect.py:head=dino," if boxes else f"segment.py:head={system},"
    values = {
        "data.size": 40, "evaluate.query_limit": 4, "model.dtype": "float32",
        "data.holdout": 0.2, "evaluate.batch_size": 2,
    }  # fmt: skip
    code = command.main(
        ["--mode=eval", "--config", f"configs/transfer/{recipe}from={files[system]},image_size=64",
         "--checkpoint", files[system], "--workdir", str(tmp_path / "w"),
         *[f"--config.{key}={value}" for key, value in values.items()]]
    )  # fmt: skip
    assert code == 0
    found: dict[str, Any] = json.loads((tmp_path / "w" / "eval.json").read_text())["results"]
    name = "eval/box/AP" if boxes else "eval/segmentation/mIoU"
    (metrics,) = (each for each in found.values() if name in each)
    assert 0 <= metrics[name] <= 1
