"""`m3i_jax.load` of runs of detection and segmentation: predictions in pixels of images of any
size, equal to those that the evaluations of the run are computed from."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from m3i_jax import config as configuration
from m3i_jax.data import annotated_eval, decode
from m3i_jax.data.sources.base import Record
from m3i_jax.data.sources.scenes import ScenesSource
from m3i_jax.errors import UserError
from m3i_jax.evaluation import detection_results
from m3i_jax.evaluation.dense_recipes import continue_dense_run
from m3i_jax.evaluation.load import build_encoder
from m3i_jax.evaluation.load_dense import LoadedDense, as_images
from m3i_jax.modes import export_dense
from m3i_jax.training.task import make_task
from tests import dense_toy

IMAGES = [np.asarray(ScenesSource(6, 40)[i].image) for i in range(2)]
IMAGES.append(np.tile(IMAGES[0], (2, 1, 1)))  # higher than wide


@functools.cache
def loaded(task: str) -> LoadedDense:
    """A model with initial parameters, without a run."""
    changes = dense_toy.MASK2FORMER if task == "mask2former" else {}
    config = dense_toy.dense_settings("segment" if changes else task, **changes)
    made = make_task(config)
    params = jax.jit(made.init)(jax.random.key(0)) | {"running": made.init_statistics()}
    names = tuple(f"class {k}" for k in range(config.data.classes))
    return LoadedDense(config, params, names, "a toy")


@pytest.mark.parametrize(
    "task", ["detect", pytest.param("dino", marks=pytest.mark.slow), "instances"]
)
def test_detections_are_those_of_an_evaluation(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of images of any size: an evaluation leaves out those that training cannot crop."""
    model = loaded(task)
    side = model.config.data.image_size
    images = [*IMAGES, IMAGES[0][:3]]
    with monkeypatch.context() as patch:
        patch.setattr(decode, "PIXEL_LIMIT", 100)
        detected = model.detect(images)
    monkeypatch.setattr(decode, "MIN_SIDE", 1)
    for image, found in zip(images, detected, strict=True):
        fitted = annotated_eval.fit_image(Record("", image), side)
        outputs = model.function(model.params, fitted.image[None], np.array([fitted.size]))
        row = {name: np.asarray(value)[0] for name, value in outputs.items()}
        wanted = detection_results.original_detections(
            row, content=fitted.size, size=image.shape[:2]
        )
        np.testing.assert_array_equal(found.boxes, wanted.boxes)
        np.testing.assert_array_equal(found.classes, wanted.classes)
        if task == "dino":
            assert found.masks is None and len(found.boxes) == 5
        else:
            assert found.masks is not None and found.masks.shape[1:] == image.shape[:2]
        if task == "instances":
            assert found.masks is not None and len(found.boxes) == 5
            for box, mask in zip(found.boxes, found.masks, strict=True):
                rows, columns = np.nonzero(mask)
                edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert box.tolist() == edges
        assert len(found.names) == len(found.boxes)
        assert (found.boxes[:, 2:] <= [image.shape[1], image.shape[0]]).all()


@pytest.mark.parametrize("task", ["segment", "mask2former"])
def test_maps_have_the_size_of_their_images(task: str) -> None:
    model = loaded(task)
    maps = model.segment(IMAGES)
    assert [each.shape for each in maps] == [image.shape[:2] for image in IMAGES]
    assert max(int(each.max()) for each in maps) < len(model.names)
    np.testing.assert_array_equal(model.segment(IMAGES[1])[0], maps[1])
    side = model.config.data.image_size  # a square of this side is one window, as it is
    square = np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8)
    made = model.function(model.params, square[None], np.array([[side, side]], np.int32))
    wanted = np.asarray(made["logits"])[0].argmax(-1)
    assert len(np.unique(wanted)) > 1 or task == "mask2former"  # whose queries are alike at first
    np.testing.assert_array_equal(model.segment(square)[0], wanted)


@pytest.mark.parametrize(
    ("task", "output"),
    [
        ("mask2former", "logits [1, 32, 32, 3]"),
        pytest.param("instances", "mask_logits [1, 5, 8, 8]", marks=pytest.mark.slow),
    ],
)
def test_the_program_of_mask2former_is_the_model(
    task: str, output: str, tmp_path: pathlib.Path
) -> None:
    """As StableHLO for all platforms; written and read again."""
    lines = export_dense._to_stablehlo(tmp_path, loaded(task))
    assert (tmp_path / "model.stablehlo").stat().st_size > 1000
    assert output in lines[0] and lines[0].endswith("for cpu, cuda, tpu")
    assert float(lines[-1].split(": ")[1]) < 1e-5


def test_whole_images_have_maps_of_their_size() -> None:
    """Windows of the images' own sizes, multiples of 16 pixels."""
    model = loaded("mask2former")
    segment = dataclasses.replace(model.config.dense.segment, test_whole=16)
    dense = dataclasses.replace(model.config.dense, segment=segment)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, dense=dense))
    image = np.tile(IMAGES[0], (1, 2, 1))
    assert [each.shape for each in model.segment([image])] == [image.shape[:2]]


def test_the_other_prediction_and_features_are_refused() -> None:
    with pytest.raises(UserError, match=r"detect, and .segment\(\) needs a run of segment"):
        loaded("detect").segment(IMAGES)
    with pytest.raises(UserError, match="has no features"):
        loaded("segment").features(IMAGES)
    with pytest.raises(ValueError, match=r"shape \(0, 4, 3\)"):
        list(as_images(np.zeros((0, 4, 3), np.uint8)))


@pytest.mark.parametrize("orbax", [False, True])
def test_a_recipe_goes_on_from_an_export(orbax: bool, tmp_path: pathlib.Path) -> None:
    """Its settings are those of its run: sizes of encoder and head, whatever holds its arrays."""
    own = dense_toy.dense_settings("segment")
    (tmp_path / "config.txt").write_text(configuration.config_to_text(own))
    if orbax:
        (tmp_path / "parameters").mkdir()
    else:
        (tmp_path / "model.json").write_text("{}")
    config = configuration.default_config()
    config.task, config.dense.segment.head = "segment", own.dense.segment.head
    config.dense.segment.width = 2 * own.dense.segment.width
    build_encoder(config, str(tmp_path), "from")
    assert continue_dense_run(config, from_=str(tmp_path), flag="from")
    assert config.model.encoder.width == own.model.encoder.width
    assert config.dense.segment.width == own.dense.segment.width
    assert config.init.only == ("^encoder/", "^pyramid/", "^head/")
    assert config.init_from == str(tmp_path)
    assert config.init.weights == configuration.default_config().init.weights


def test_images_of_any_kind(tmp_path: pathlib.Path) -> None:
    """Paths, a directory, Pillow images, gray, transparent and float arrays, as of an encoder."""
    gray = (np.arange(20 * 24) % 256).astype(np.uint8).reshape(20, 24)
    rgb = np.repeat(gray[..., None], 3, -1)
    path = tmp_path / "gray.png"
    Image.fromarray(gray).save(path)
    opaque = np.concatenate([rgb, np.full((20, 24, 1), 255, np.uint8)], -1)
    for given in (path, str(path), tmp_path, Image.fromarray(gray), gray, opaque, rgb / 255, [rgb]):
        (image,) = as_images(given)
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, rgb)
    (image,) = as_images(np.zeros((4, 5, 4), np.uint8), background=7)
    assert (image == 7).all()
    model = loaded("segment")
    np.testing.assert_array_equal(model.segment(str(path))[0], model.segment(rgb)[0])
