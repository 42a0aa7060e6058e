"""`m3i_jax.load`: the encoder of a run or of a file, as a function of images of any size and
type."""

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import m3i_jax
from m3i_jax import config as configuration
from m3i_jax import parallel
from m3i_jax.data import eval_batches
from m3i_jax.data.sources import base
from m3i_jax.errors import UserError
from m3i_jax.evaluation import feature_extraction, load
from m3i_jax.interop import intern_image_weights, tensor_files, vit_weights
from m3i_jax.models import m3i, pooling
from m3i_jax.training.trainer import Trainer
from tests import saved, toy
from tests.interop import published
from tests.interop.published_vit import ENCODERS, weights

ROOT = pathlib.Path(__file__).parent.parent.parent
SIZES = {"width": 32, "depth": 2, "heads": 2, "patch": 8, "grid": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    workdir = tmp_path_factory.mktemp("run")
    return str(workdir), *saved.run(workdir, toy.settings())


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)


@pytest.mark.parametrize("evaluated", [pytest.param("online", marks=pytest.mark.slow), "ema"])
def test_the_weights_are_those_that_the_run_evaluates(
    evaluated: str, tmp_path: pathlib.Path
) -> None:
    params, average = saved.run(tmp_path, toy.settings(evaluate__encoder=evaluated))
    trees = {"online": params, "ema": average}
    for asked, expected in (("", evaluated), ("online", "online"), ("ema", "ema")):
        got = m3i_jax.load(tmp_path, weights=asked).params["encoder"]["patch_embed"]["kernel"]
        np.testing.assert_array_equal(got, trees[expected]["encoder"]["patch_embed"]["kernel"])
    other = trees["ema" if evaluated == "online" else "online"]["encoder"]["patch_embed"]["kernel"]
    assert not np.array_equal(
        m3i_jax.load(tmp_path).params["encoder"]["patch_embed"]["kernel"], other
    )


def test_an_average_that_never_moves_is_refused(run, tmp_path: pathlib.Path) -> None:
    """With optim.ema=1, as fine-tuning has, it is the encoder that the run started from."""
    workdir = shutil.copytree(run[0], tmp_path / "run")
    text = configuration.config_to_text(toy.settings(optim__ema="1.0"))
    (workdir / "config.txt").write_text(text)
    with pytest.raises(UserError, match=r"no momentum average \(config.optim.ema=1\); use"):
        m3i_jax.load(workdir, weights="ema")
    m3i_jax.load(workdir, weights="online")


def test_features_of_a_run_equal_those_of_its_parts(run, images: np.ndarray) -> None:
    workdir, params, average = run
    config = toy.settings()
    normal = (images / 255 - np.array(config.data.augment.mean)) / np.array(config.data.augment.std)
    patches = jnp.asarray(
        normal.reshape(5, 4, 8, 4, 8, 3).swapaxes(2, 3).reshape(5, 16, 192), jnp.float32
    )
    for weights_, encoder in (("online", params["encoder"]), ("ema", average["encoder"])):
        tokens = np.asarray(jax.jit(m3i.encode, static_argnums=0)(config, encoder, patches))
        model = m3i_jax.load(workdir, weights=weights_)
        assert model.pool == "attention"  # the objective trains the pooling
        got = {
            pool: dataclasses.replace(model, pool=pool).features(images, ready=True)
            for pool in load.POOLS
            if pool != "auto"
        }
        np.testing.assert_allclose(got["tokens"], tokens, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(got["cls"], tokens[:, 0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(got["mean"], tokens[:, 1:].mean(1), rtol=1e-4, atol=1e-4)
        pooled = pooling.apply(
            config.model,
            jax.tree.map(jnp.asarray, params["pool"]),
            tokens[:, 1:],
            cls_BxD=tokens[:, 0],
        )
        np.testing.assert_allclose(got["attention"], pooled, rtol=1e-3, atol=1e-4)
        assert all(a.dtype == np.float32 and len(a) == 5 for a in got.values())


def test_preprocessing_equals_that_of_evaluation(run) -> None:
    """Images of any size are cropped as `evaluation_batches` crops the same record."""
    workdir, _, _ = run
    smooth = lambda h, w: (
        128
        + 90
        * np.sin(
            np.mgrid[:h, :w].transpose(1, 2, 0)
            @ np.random.default_rng(h).uniform(-0.2, 0.2, (2, 3))
        )
    )
    records = [
        base.Record(str(h), smooth(h, w).astype(np.uint8))
        for h, w in ((40, 70), (90, 33), (32, 32))
    ]
    model = load.load(workdir, pool="mean")
    (batch,) = eval_batches.evaluation_batches(records, range(3), model.preprocessing, 3)
    views = model.features(batch["views"], ready=True)
    np.testing.assert_array_equal(model.features([record.image for record in records]), views)
    floats = [record.image / np.float32(255) for record in records]
    for view, cut in zip(batch["views"], floats, strict=True):  # uint8 views are rounded twice
        assert np.abs(model.preprocessing.view(cut) - view / 255).max() < 1.6 / 255
    expected = feature_extraction.extract_features(
        model.config, "mean", model.params, jnp.asarray(batch["views"])
    )
    np.testing.assert_allclose(views, expected, atol=1e-5)


def test_types_and_counts_of_images(run, images: np.ndarray) -> None:
    model = load.load(run[0], pool="mean")
    whole = model.features(images, ready=True)
    for same, expected in (
        (images / 255, whole),
        (images[0], whole[:1]),
        ([images[0], images[1] / 255], whole[:2]),
        ([Image.fromarray(images[2])], whole[2:3]),
        (images[:0], whole[:0]),
        (np.repeat(images, 14, 0), np.repeat(whole, 14, 0)),  # more images than a device step
    ):
        np.testing.assert_allclose(model.features(same, ready=True), expected, atol=1e-5)
    seen = model.features(images)
    np.testing.assert_allclose(
        model.features([*images[:2], Image.fromarray(images[2])]), seen[:3], atol=1e-5
    )
    assert model.features([]).shape == (0, 32)
    with pytest.raises(ValueError, match="a view has shape"):
        model.features(np.zeros((40, 32, 3), np.uint8), ready=True)
    huge = dataclasses.replace(model, params=jax.tree.map(lambda leaf: 1e30 * leaf, model.params))
    with pytest.raises(
        ValueError, match="features of 5 images are not finite, the first is image 0"
    ):
        huge.features(images)
    refused = [
        (np.zeros((1, 9, 9, 5), np.uint8), "must be"),
        (images.astype(np.int32), "must be"),
        (np.zeros((1, 0, 9, 3), np.uint8), "must be"),
    ]
    refused += [(images * 1.0, "must lie in 0..1"), (images * np.nan, "must lie in 0..1")]
    for wrong, words in refused:
        with pytest.raises(ValueError, match=words):
            model.features(wrong)


def test_files_of_other_projects(tmp_path: pathlib.Path, images: np.ndarray) -> None:
    """Files of the same weights for timm and Hugging Face give the same features, except for the
    eps and the pixel statistics of each layout."""
    table = weights(ENCODERS["timm"], **SIZES)
    tensor_files.write_safetensors(tmp_path / "timm.safetensors", table)
    timm = load.load(str(tmp_path / "timm.safetensors"), heads=2)
    e = timm.config.model.encoder
    assert (e.patch_size, e.width, e.depth, e.heads, e.positions, e.final_norm) == (
        8,
        32,
        2,
        2,
        "learned",
        True,
    )
    assert (
        timm.config.data.image_size == 32
        and timm.config.model.dtype == "float32"
        and timm.pool == "mean"
    )
    (tmp_path / "hf").mkdir()
    tensor_files.write_safetensors(
        tmp_path / "hf" / "model.safetensors",
        vit_weights.store_vit(vit_weights.load_vit(table).arrays, "hf", heads=2),
    )
    (tmp_path / "hf" / "config.json").write_text(
        '{"num_attention_heads": 2, "layer_norm_eps": 1e-6}'
    )
    (tmp_path / "hf" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}'
    )
    hf = load.load(str(tmp_path / "hf"))
    np.testing.assert_array_equal(hf.features(images), timm.features(images))
    other = load.load(str(tmp_path / "timm.safetensors"), heads=4)
    assert np.abs(other.features(images) - timm.features(images)).max() > 1e-3


def intern_image_file(
    directory: pathlib.Path, *, fused: int = 0, hugging_face: bool = True
) -> tuple[str, published.Net, dict]:
    """A file of the smallest InternImage preset as it would be published: (path, net, table with
    the published names)."""
    net = published.PICO._replace(fused=fused, pooled=5)
    table = published.weights(net)
    if not hugging_face:
        tensor_files.write_npz(directory / "intern.npz", table)
        return str(directory / "intern.npz"), net, table
    tensor_files.write_safetensors(
        directory / "model.safetensors",
        {intern_image_weights.hugging_face_name(n): array for n, array in table.items()},
    )
    (directory / "preprocessor_config.json").write_text(
        json.dumps({"crop_size": {"height": 32, "width": 32}})
    )
    return str(directory), net, table


@pytest.mark.parametrize(
    ("fused", "hugging_face"),
    [
        (0, True),
        # one that is fused is exported and loaded in modes/test_export.py
        pytest.param(48, False, marks=pytest.mark.slow),
    ],
)
def test_a_published_intern_image(
    fused: int, hugging_face: bool, tmp_path: pathlib.Path, images: np.ndarray
) -> None:
    """Features equal those of the published net: the mean of its fused map or, without fusion, of
    its last map."""
    path, net, table = intern_image_file(tmp_path, fused=fused, hugging_face=hugging_face)
    model = load.load(path)
    size = model.config.data.image_size
    assert size == (32 if hugging_face else 224) and (
        model.config.model.encoder.patch_size,
        model.pool,
    ) == (8 if fused else 16, "mean")
    model = dataclasses.replace(
        model,
        config=dataclasses.replace(
            model.config, data=dataclasses.replace(model.config.data, image_size=32)
        ),
    )
    theirs = published.Run(
        net,
        table,
        (images / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225]),
    )
    expected = theirs.fused().mean(1) if fused else theirs.maps[3].mean((1, 2))
    got = model.features(images, ready=True)
    assert got.shape == (5, fused or 256) and np.abs(expected).max() > 0.1
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("recipe", ["probe", pytest.param("finetune", marks=pytest.mark.slow)])
def test_recipes_start_from_a_published_intern_image(recipe: str, tmp_path: pathlib.Path) -> None:
    path, _, table = intern_image_file(tmp_path)
    config = configuration.load_config(
        f"configs/transfer/{recipe}.py:path=/pictures,from={path},batch_size=8"
    )
    config.data.update({"size": 64, "classes": toy.CLASSES})
    lines: list[str] = []
    made = Trainer(
        configuration.resolve(config), parallel.make_mesh((1, 1, 1), jax.devices()[:1]), 0
    ).init(lines.append)
    given = vit_weights.load_vit(table).arrays
    for name, array in saved.flat({"encoder": made.params["encoder"]}).items():
        np.testing.assert_array_equal(array, given[name], err_msg=name)
    assert not [
        line for line in lines if "random" in line and "encoder" in line
    ] and "other settings" not in " ".join(lines)


def test_refusals(run, tmp_path: pathlib.Path) -> None:
    tensor_files.write_safetensors(
        tmp_path / "timm.safetensors", weights(ENCODERS["timm"], **SIZES)
    )
    tensor_files.write_safetensors(
        tmp_path / "intern.safetensors",
        {"patch_embed.conv1.weight": np.zeros((32, 3, 3, 3), np.float32)},
    )
    for path, settings, words in (
        ("nowhere", {}, "'nowhere' does not exist"),
        (str(tmp_path / "timm.safetensors"), {"pool": "attention"}, "no trained pooling"),
        (str(tmp_path / "timm.safetensors"), {"pool": "max"}, "is not one of auto"),
        (str(tmp_path / "timm.safetensors"), {"weights": "ema"}, "no momentum copy"),
        (
            str(tmp_path / "intern.safetensors"),
            {},
            "nor one of internimage_pico, internimage_t, .*internimage_g",
        ),
        (str(tmp_path / "intern.safetensors"), {"weights": "ema"}, "no momentum copy"),
    ):
        with pytest.raises(UserError, match=words):
            load.load(path, **settings)


def test_what_is_no_path_of_weights_is_named(run, tmp_path: pathlib.Path) -> None:
    workdir = str(run[0])
    for part in ("checkpoints", "checkpoints/4"):
        with pytest.raises(UserError, match=f"give its workdir, {re.escape(repr(workdir))}"):
            load.load(f"{workdir}/{part}")
    for name in ("vit.txt", "8"):  # a directory of files of weights may have this name
        file = tmp_path / "checkpoints" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"")
        with pytest.raises(UserError) as caught:
            load.load(str(file))
        assert "workdir" not in str(caught.value).partition("give")[0]
        assert "without its settings" not in str(caught.value)
    for wrong in (None, 5, b"runs/first"):
        with pytest.raises(TypeError, match=f"load: path={re.escape(repr(wrong))} is of type"):
            load.load(wrong)


def test_importing_the_package_does_not_load_it() -> None:
    code = (
        "import sys, m3i_jax; assert 'flax' not in sys.modules and callable(m3i_jax.load) and"
        " 'flax' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
