"""One description of the preprocessing: evaluation, --mode=features, m3i_jax.load and every export
give the same features of the same images, for any evaluate.crop."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from m3i_jax import config as configuration
from m3i_jax import main as command
from m3i_jax.data.preprocessing import Preprocessing
from m3i_jax.evaluation import feature_extraction, load
from m3i_jax.modes import evaluators
from m3i_jax.modes import features as written
from m3i_jax.modes import setup as jobs
from tests import saved, toy

SIDES = ((40, 40), (32, 32), (48, 60), (60, 40))  # one has the model's size already
CROP = 0.7
# Google's layout implies the tanh form of GELU, and Hugging Face's encoders end in a norm
SETTINGS = {
    "data__source": "folder",
    "data__captions": "no",
    "data__classes": 0,
    "data__holdout": 0.0,
    "objective__forms": "mim",
    "model__encoder__activation": "gelu_tanh",
    "model__encoder__final_norm": "true",
    "evaluate__batch_size": 8,
    "data__augment__mean": "(0.4,0.5,0.6)",
    "data__augment__std": "(0.2,0.3,0.25)",
}


def images() -> list[np.ndarray]:
    """Smooth images, so that resizers with other rounding give nearly equal features."""
    r = np.random.default_rng(0)
    waves = [
        np.sin(
            np.mgrid[:h, :w].transpose(1, 2, 0) @ r.uniform(-0.2, 0.2, (2, 3)) + r.uniform(0, 6, 3)
        )
        for h, w in SIDES
    ]
    return [(128 + 100 * wave).astype(np.uint8) for wave in waves]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, np.ndarray]:
    """A run with another evaluate.crop than the default, and the features [N, D] of its
    evaluators."""
    directory = tmp_path_factory.mktemp("seen")
    (directory / "pictures").mkdir()
    for number, image in enumerate(images()):
        Image.fromarray(image).save(directory / "pictures" / f"{number}.png")
    config = toy.settings(**SETTINGS, data__path=str(directory / "pictures"), evaluate__crop=CROP)
    params, _ = saved.run(directory / "run", config)
    job = jobs.open_setup(config, str(directory / "elsewhere"))
    seen = feature_extraction.Extractor(config, job.mesh)(
        {"encoder": params["encoder"]}, evaluators.host_eval_batches(job, job.train, 9)
    )
    return directory / "run", seen.raw


def close(got: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max(), (
        np.abs(got - expected).max() / np.abs(expected).max()
    )


def exported(workdir: pathlib.Path, format: str) -> pathlib.Path:
    assert command.main(["--mode=export", f"--format={format}", "--workdir", str(workdir)]) == 0
    return workdir / "export" / format


def test_the_crop_changes_the_features(run) -> None:
    """With the default crop the features differ, so that the tests below can fail."""
    workdir, expected = run
    model = load.load(str(workdir))
    other = np.stack([Preprocessing(image_size=32).view(image) for image in images()])
    assert np.abs(model.features(other, ready=True) - expected).max() > 0.1 * np.abs(expected).max()


@pytest.mark.row("E10")
def test_load_and_mode_features_use_the_crop(run, tmp_path: pathlib.Path) -> None:
    workdir, expected = run
    close(load.load(str(workdir)).features(images()), expected)
    assert (
        command.main(["--mode=features", "--workdir", str(workdir), f"--out={tmp_path / 'a.npz'}"])
        == 0
    )
    table, about = written.read_feature_file(str(tmp_path / "a.npz"))
    assert table["keys"].tolist() == [f"{n}.png" for n in range(len(SIDES))]
    close(table["features"], expected)
    config = configuration.resolve(configuration.load_from_workdir(str(workdir), "--workdir"))
    assert {key: about[key] for key in ("crop", "short_side", "image_size", "background")} == {
        "crop": config.evaluate.crop,
        "short_side": round(32 / config.evaluate.crop),
        "image_size": 32,
        "background": 255,
    }


@pytest.mark.row("E10")
@pytest.mark.parametrize("format", ["timm", "hf", "npz"])
def test_exports_keep_the_preprocessing(run, format: str) -> None:
    workdir, expected = run
    directory = exported(workdir, format)
    model = load.load(str(directory / "vit.npz" if format == "npz" else directory))
    # their files store the short side, not evaluate.crop
    got, wanted = (
        {**m.preprocessing.described(), "crop": 0} for m in (model, load.load(str(workdir)))
    )
    assert got == wanted and wanted["short_side"] == 46
    close(model.features(images()), expected)


def test_exports_describe_the_preprocessing(run) -> None:
    workdir, _ = run
    directory = exported(workdir, "orbax")
    config = configuration.resolve(
        configuration.config_from_text((directory / "config.txt").read_text(), "config.txt")
    )
    described = json.loads((directory / "preprocessing.json").read_text())
    assert {name: described[name] for name in ("crop", "short_side", "mean")} == {
        "crop": config.evaluate.crop,
        "short_side": round(32 / config.evaluate.crop),
        "mean": [0.4, 0.5, 0.6],
    }


@pytest.mark.row("E10")
def test_timm_uses_the_same_preprocessing(run) -> None:
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    workdir, expected = run
    directory = exported(workdir, "timm")
    config = json.loads((directory / "config.json").read_text())
    see = timm.data.create_transform(
        **timm.data.resolve_data_config({}, pretrained_cfg=config["pretrained_cfg"])
    )
    model = timm.create_model(
        config["architecture"],
        num_classes=0,
        global_pool=config["global_pool"],
        **config["model_args"],
    )
    library = pytest.importorskip("safetensors.torch")
    model.load_state_dict(library.load_file(directory / "model.safetensors"))
    with torch.no_grad():
        got = model.eval()(torch.stack([see(Image.fromarray(image)) for image in images()]))
    close(got.numpy(), expected, 5e-3)


@pytest.mark.row("E10")
def test_transformers_use_the_same_preprocessing(run) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    workdir, expected = run
    directory = exported(workdir, "hf")
    see = transformers.AutoImageProcessor.from_pretrained(directory)
    model = transformers.ViTModel.from_pretrained(directory, add_pooling_layer=False).eval()
    seen = torch.cat(
        [see(Image.fromarray(image), return_tensors="pt")["pixel_values"] for image in images()]
    )
    with torch.no_grad():
        got = model(pixel_values=seen).last_hidden_state[:, 1:].mean(1)
    close(got.numpy(), expected, 5e-3)


def test_an_export_with_another_crop_describes_it(run) -> None:
    workdir, _ = run
    assert (
        command.main(
            [
                "--mode=export",
                "--format=hf",
                "--workdir",
                str(workdir),
                "--config.evaluate.crop=0.5",
            ]
        )
        == 0
    )
    assert json.loads((workdir / "export/hf/preprocessor_config.json").read_text())["size"] == {
        "shortest_edge": 64
    }
    assert "short side resized to 64" in (workdir / "export/hf/README.md").read_text()
