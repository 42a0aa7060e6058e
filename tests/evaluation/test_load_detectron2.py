"""Files of detectron2 with a whole Mask R-CNN, as `m3i_jax.load` and recipes read them: the small
system of tests/data/dense, whose values that project made."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

import m3i_jax
from m3i_jax import config as configuration
from m3i_jax import main as command
from m3i_jax.errors import UserError
from m3i_jax.evaluation import detection_results, load_dense
from m3i_jax.interop import dense_weights, tensor_files
from m3i_jax.training import weight_source
from tests.dense_toy import make_trainer
from tests.models.dense import vitdet
from tests.saved import flat

ROOT = pathlib.Path(__file__).parents[2]
FEWER = "--config.dense.detect.detections=2"
MASK_BIAS = "roi_heads.mask_head.predictor.bias"
# of the small system, which no weights say
ANCHORS_AND_THRESHOLDS = (
    "anchor_sizes",
    "canonical",
    "proposals",
    "test_proposals",
    "score_threshold",
    "candidates",
    "detections",
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("detectron2") / "model.safetensors"
    tensor_files.write_safetensors(path, vitdet.state("state/"))
    return str(path)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same as .npz, with the biases of masks of vitdet_image.npz."""
    path = tmp_path_factory.mktemp("detectron2") / "model.npz"
    raised = {MASK_BIAS: vitdet.arrays("vitdet_image")["mask_bias"]}
    np.savez(path, **(vitdet.state("state/") | raised))
    return str(path)


def test_settings_follow_from_names_and_shapes(file: str) -> None:
    settings = weight_source.open_weights(file).settings
    wanted = vitdet.SETS["all"]
    for name in ("strides", "width", "rpn_convs", "box_convs", "box_hidden", "mask_convs"):
        assert settings["detect"][name] == getattr(wanted, name), name
    assert settings["detect"]["masks"] and "loss" not in settings["detect"]
    assert settings["maps"] == {
        "relative": "decomposed",
        "window": vitdet.MAPS.window,
        "global_blocks": vitdet.MAPS.global_blocks,
    }
    image = vitdet.arrays("vitdet")["image"]
    assert settings["dense_size"] == image.shape[1]
    assert settings["image_size"] == vitdet.MAPS.image_size
    lvis = {name: array.shape for name, array in vitdet.state("state/").items()}
    lvis["roi_heads.box_predictor.cls_score.weight"] = (1204, 32)
    assert dense_weights.mask_rcnn_settings(lvis)["detect"]["loss"] == "federated"


def test_load_detects_with_the_weights_of_the_file(file: str) -> None:
    """Anchors and thresholds are no weights: those of the small system are set by hand, and the
    result is compared with the same parameters without a file."""
    model = m3i_jax.load(file, heads=2)
    assert isinstance(model, load_dense.LoadedDense) and model.names == ("0", "1", "2")
    assert model.config.dense.detect.anchor_sizes == (32, 64, 128, 256, 512)
    dense = dataclasses.replace(model.config.dense, detect=vitdet.SETS["all"])
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, dense=dense))
    pixels = vitdet.arrays("vitdet")["image"][:1].clip(0, 255).astype(np.uint8)
    got = model.function(model.params, pixels, np.array([pixels.shape[1:3]], np.int32))
    assert got["valid"].any() and got["masks"].shape[1:] == (6, 28, 28)
    (found,) = model.detect(pixels[0])
    assert len(found.boxes) == int(got["valid"].sum()) and found.masks is not None

    encoder = weight_source.open_weights(file)
    arrays = flat(model.params)
    for path, array in flat(dense_weights.load_mask_rcnn(vitdet.state("state/"))).items():
        np.testing.assert_array_equal(arrays[path], array, err_msg=path)
    assert set(encoder.shapes) == {p for p in arrays if not p.startswith("running/")}
    with pytest.raises(UserError, match="has no features"):
        model.features(pixels)


def stored_detections() -> dict[str, np.ndarray]:
    """An image uint8 [H, W, 3] and what detectron2's predictor finds; masks bool [D, H, W]."""
    stored = vitdet.arrays("vitdet_image")
    width = stored["image"].shape[1]
    return stored | {"masks": np.unpackbits(stored["masks"], -1, count=width).astype(bool)}


def test_detections_of_an_image_are_those_of_detectron2(other: str) -> None:
    """From the pixels of an image of another size to boxes and masks in its own pixels."""
    model = m3i_jax.load(other, heads=2)
    dense = dataclasses.replace(model.config.dense, detect=vitdet.SETS["all"])
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, dense=dense))
    wanted = stored_detections()
    (found,) = model.detect(wanted["image"])
    np.testing.assert_array_equal(found.classes, wanted["classes"])
    np.testing.assert_allclose(found.scores, wanted["scores"], atol=1e-5)
    np.testing.assert_allclose(found.boxes, wanted["boxes"], atol=1e-3)
    assert found.masks is not None and wanted["masks"].any((1, 2)).all()
    # a pixel whose probability is one half may fall to either side
    assert (found.masks != wanted["masks"]).sum() <= 2


@pytest.mark.slow
def test_the_command_evaluates_a_detector(
    other: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects that are the detections of detectron2 are all found, and nothing else is."""
    pytest.importorskip("pycocotools")
    monkeypatch.chdir(ROOT)
    wanted = stored_detections()
    height, width = wanted["image"].shape[:2]
    images = [
        {"id": k + 1, "file_name": f"{k}.png", "height": height, "width": width} for k in range(2)
    ]
    for k in range(3):
        Image.fromarray(wanted["image"]).save(tmp_path / f"{k}.png")
    objects = []
    rows = zip(wanted["boxes"].tolist(), wanted["classes"].tolist(), wanted["masks"], strict=True)
    for (x0, y0, x1, y1), category, mask in rows:
        for image in images:
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": image["id"],
                    "category_id": category + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": float(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": detection_results.mask_to_rle(mask),
                }
            )
    categories = [{"id": k + 1, "name": name} for k, name in enumerate("abc")]
    notes = tmp_path / "notes.json"
    content = {"images": images, "annotations": objects, "categories": categories}
    notes.write_text(json.dumps(content))
    unused = tmp_path / "training.json"  # the mode opens what the run would train on, too
    unused.write_text(json.dumps(content | {"images": [images[0] | {"file_name": "2.png"}]}))
    small = {
        name: value
        for name, value in dataclasses.asdict(vitdet.SETS["all"]).items()
        if name in ANCHORS_AND_THRESHOLDS
    }
    changes = {
        "model.encoder.heads": 2,
        "model.dtype": "float32",
        "data.holdout_annotations": notes,
        "evaluate.batch_size": 8,
        "data.threads": 1,
    } | {f"dense.detect.{name}": value for name, value in small.items()}
    texts = [f"--config.{key}={str(value).replace(' ', '')}" for key, value in changes.items()]
    recipe = f"configs/transfer/detect.py:annotations={unused},images={tmp_path},from={other}"
    recipe += ",image_size=128,batch_size=8"
    place = tmp_path / "out"
    line = ["--config", recipe, "--workdir", str(place), "--mode=eval"]
    assert command.main([*line, "--checkpoint", other, *texts]) == 0
    results = json.loads((place / "eval.json").read_text())
    scores = results["results"]["detection"]
    assert results["checkpoint"] == other
    assert scores["eval/box/AP"] > 0.999 and scores["eval/mask/AP"] > 0.999, scores
    # a setting of the head is one that the result depends on: nothing is taken from the file
    assert command.main([*line, "--checkpoint", other, *texts, FEWER]) == 0
    scores = json.loads((place / "eval.json").read_text())["results"]["detection"]
    assert 0 < scores["eval/box/AP"] < 0.9, scores


def test_a_recipe_starts_from_the_detector(file: str) -> None:
    config = configuration.load_config(
        f"configs/transfer/detect.py:annotations=own.json,from={file},image_size=128,batch_size=8"
    )
    assert tuple(config.init.only) == ("^encoder/", "^pyramid/", "^head/")
    assert (config.dense.maps.window, config.dense.detect.box_hidden) == (3, 32)
    config.model.encoder.heads = 2
    config.model.dtype = "float32"
    config.data.update({"size": 64, "classes": 5, "captions": "no"})
    lines: list[str] = []
    trainer = make_trainer(configuration.resolve(config))
    params = flat(trainer.init(lines.append, classes=tuple("abcde")).params)
    theirs = flat(dense_weights.load_mask_rcnn(vitdet.state("state/")))
    of_categories = ("head/box/classes/", "head/box/deltas/", "head/mask/masks/")
    for path, array in theirs.items():
        if not path.startswith(of_categories):
            np.testing.assert_array_equal(params[path], array, err_msg=path)
    assert any("of another shape, initialized randomly: head/box/classes" in x for x in lines)


def test_an_encoder_alone_and_a_cascade_are_encoders(tmp_path: pathlib.Path) -> None:
    table = vitdet.state("state/")
    parts = {
        "encoder": {n: a for n, a in table.items() if n.startswith("backbone.net.")},
        "cascade": {
            n.replace("roi_heads.box_head.", "roi_heads.box_head.0."): a for n, a in table.items()
        },
    }
    for name, arrays in parts.items():
        path = tmp_path / f"{name}.safetensors"
        tensor_files.write_safetensors(path, arrays)
        source = weight_source.open_weights(str(path))
        assert "detect" not in source.settings
        assert all(shape.startswith("encoder/") for shape in source.shapes)
        assert jax.tree.leaves(source.shapes)
