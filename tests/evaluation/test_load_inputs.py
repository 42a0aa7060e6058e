"""`m3i_jax.load`: images as users hold them, encoders of the Hugging Face Hub, short descriptions,
progress bars."""

import dataclasses
import io
import pathlib
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

import m3i_jax
from m3i_jax import main as command
from m3i_jax import progress
from m3i_jax.data import decode, image_inputs
from m3i_jax.errors import UserError
from m3i_jax.evaluation import load
from m3i_jax.modes import model_card
from tests import saved, toy

SIDE = 40


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    place = tmp_path_factory.mktemp("run")
    saved.run(place, toy.settings(objective__forms="mim"))
    return place


@pytest.fixture(scope="module")
def model(workdir: pathlib.Path) -> load.LoadedEncoder:
    return m3i_jax.load(workdir, pool="mean")


def noise(*shape: int, dtype: str = "uint8") -> np.ndarray:
    high = {"uint8": 256, "uint16": 65536}[dtype]
    return np.random.default_rng(sum(shape)).integers(0, high, shape).astype(dtype)


@pytest.mark.parametrize(
    ("pixels", "mode"),
    [
        (noise(SIDE, 50), "L"),
        (noise(SIDE, 50, 2), "LA"),
        (noise(SIDE, 50, 3), "RGB"),
        (noise(SIDE, 50, 4), "RGBA"),
        (noise(SIDE, 50, dtype="uint16"), "I;16"),
        (noise(SIDE, 50) > 100, "1"),
    ],
)
def test_arrays_equal_files_of_them(pixels: np.ndarray, mode: str, tmp_path: pathlib.Path) -> None:
    """The file is decoded as in an evaluation; the array, a Pillow image and the path give the same
    pixels. Floats of 8-bit channels differ by a rounding."""
    image = Image.fromarray(pixels)
    assert image.mode == mode
    image.save(tmp_path / "image.png")
    expected = decode.decode_image((tmp_path / "image.png").read_bytes(), background=7)
    for same in (pixels, image, tmp_path / "image.png", str(tmp_path / "image.png")):
        np.testing.assert_array_equal(image_inputs.rgb_pixels(same, background=7), expected)
    column = pixels[..., None] if pixels.ndim == 2 else pixels
    np.testing.assert_array_equal(image_inputs.rgb_pixels(column, background=7), expected)
    scale = {"bool": 1, "uint8": 255, "uint16": 65535}[pixels.dtype.name]
    floats = image_inputs.rgb_pixels(pixels / scale, background=7)
    assert floats.dtype == np.float32 and np.abs(floats * 255 - expected).max() < 1.01


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_rotated_image_is_turned_as_its_file(kind: str) -> None:
    """Pillow itself turns a TIFF, when it loads it."""
    image, exif = Image.fromarray(noise(SIDE, 60, 3)), Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, kind, exif=exif)
    turned = image_inputs.rgb_pixels(Image.open(buffer))
    assert turned.shape == (60, SIDE, 3)
    np.testing.assert_array_equal(turned, decode.decode_image(buffer.getvalue()))


def test_batches_lists_and_directories(model: load.LoadedEncoder, tmp_path: pathlib.Path) -> None:
    gray = noise(5, SIDE, SIDE)
    rgb = np.repeat(gray[..., None], 3, -1)
    expected = model.features(rgb)
    assert expected.shape == (5, 32)
    (tmp_path / "b").mkdir()
    names = ("a.png", "b/c.png", "b/d.png", "b/e.png", "b/f.png")
    for name, pixels in zip(names, gray, strict=True):
        Image.fromarray(pixels).save(tmp_path / name)
    for same in (
        gray,
        list(gray),
        (image for image in rgb),
        str(tmp_path),
        [tmp_path / "a.png", tmp_path / "b"],
        [gray[0], Image.fromarray(rgb[1]), str(tmp_path / "b" / "d.png"), *rgb[3:]],
    ):
        np.testing.assert_allclose(model.features(same), expected, atol=1e-6)
    np.testing.assert_allclose(model.features(gray[0]), expected[:1], atol=1e-6)
    np.testing.assert_allclose(model.features(tmp_path / "a.png"), expected[:1], atol=1e-6)
    assert image_inputs.image_files(tmp_path)[1].name == "c.png"


def test_one_image_with_its_channels_first_is_no_batch_of_gray_images(
    model: load.LoadedEncoder,
) -> None:
    for channels, dtype in ((3, "uint8"), (3, "float32"), (4, "uint16")):
        image = np.zeros((channels, SIDE, SIDE), dtype)
        with pytest.raises(ValueError, match=r"channels first .*transpose\(1, 2, 0\).*list\(image"):
            model.features(image)
        assert model.features(image.transpose(1, 2, 0)).shape == (1, 32)
        assert model.features(list(image)).shape == (channels, 32)
    assert model.features(np.zeros((3, SIDE, 3))).shape == (1, 32)  # an image of three rows


def test_files_of_a_directory_that_are_no_images_have_rows_of_nan(
    model: load.LoadedEncoder, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = noise(2, SIDE, SIDE)
    for name, image in zip(("a.png", "c.png"), pixels, strict=True):
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "b.png").write_text("no image")
    found = model.features(tmp_path)
    assert np.isnan(found[1]).all() and found.shape == (3, 32)
    np.testing.assert_allclose(found[[0, 2]], model.features(pixels), atol=1e-5)
    (record,) = caplog.records
    assert "1 of 3 files cannot be used" in record.message and "b.png: " in record.message
    with pytest.raises(ValueError, match="b.png' is not a usable image: .*; leave it out"):
        model.features([tmp_path / "a.png", tmp_path / "b.png"])


def test_refused_images(model: load.LoadedEncoder, tmp_path: pathlib.Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    for wrong, error, words in (
        (noise(SIDE, SIDE, 5)[None], ValueError, r"must be \[H, W\] or"),
        (np.zeros((SIDE, SIDE), np.int64), ValueError, "and type int64"),
        (np.full((SIDE, SIDE), 1.5), ValueError, r"must lie in 0\.\.1"),
        (str(tmp_path / "text.png"), ValueError, "text.png' is not a usable image: undecodable"),
        (str(tmp_path / "absent.png"), ValueError, "absent.png' cannot be read"),
        (str(tmp_path / "empty"), UserError, "is an empty folder"),
        (7, ValueError, "type int"),
    ):
        with pytest.raises(error, match=words):
            model.features(wrong)


def test_the_description_is_short(model: load.LoadedEncoder, workdir: pathlib.Path) -> None:
    text = repr(model)
    assert len(text) < 200 + len(str(workdir)) and "\n" not in text
    for words in ("LoadedEncoder(", "2 blocks of 32", "32 pixels", "pool=mean", "step 4"):
        assert words in text
    assert f"{sum(leaf.size for leaf in saved.flat(model.params).values()):,} parameters" in text


@pytest.fixture
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """An empty cache of huggingface_hub, without a network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def push(directory: pathlib.Path, cache: pathlib.Path, name: str, revision: str) -> None:
    """The cache as a download of a directory leaves it."""
    place = cache / f"models--{name.replace('/', '--')}"
    commit = f"{revision:x<40}"
    shutil.copytree(directory, place / "snapshots" / commit)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / revision).write_text(commit)


@pytest.mark.parametrize("format", [pytest.param("hf", marks=pytest.mark.slow), "timm"])
def test_an_export_comes_back_from_the_hub(
    format: str, workdir: pathlib.Path, model: load.LoadedEncoder, cache: pathlib.Path
) -> None:
    """What --mode=export writes is a repository of the Hub as it is, with the same features."""
    assert command.main(["--mode=export", f"--format={format}", "--workdir", str(workdir)]) == 0
    directory = workdir / "export" / format
    assert {"README.md", "config.json", "model.safetensors"} <= {
        file.name for file in directory.iterdir()
    }
    push(directory, cache, "me/encoder", "main")
    push(directory, cache, "me/encoder", "v2")
    images = noise(2, 48, SIDE, 3)
    for location in ("hf://me/encoder", "hf://me/encoder@v2"):
        loaded = m3i_jax.load(location)
        np.testing.assert_allclose(loaded.features(images), model.features(images), atol=1e-4)
        assert location in repr(loaded) and str(cache) not in repr(loaded)


def test_refusals_of_the_hub(cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for location, words in (
        ("hf://first", "names no repository; write hf://OWNER/NAME"),
        ("hf://a/b@", "names no repository"),
        ("hf://../b/c", "names no repository"),
        ("hf://me/absent", "hf://me/absent: cannot be read"),
    ):
        with pytest.raises(UserError, match=words) as error:
            m3i_jax.load(location)
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'm3i-jax\[hub\]'"):
        load.fetch_weights("hf://me/encoder")


def test_the_card_names_no_directory_of_this_machine(workdir: pathlib.Path) -> None:
    config = toy.settings(
        objective__forms="mim", data__source="folder", data__path="private/me/photos",
        report__licence="My own licence", report__beside="/home/me/runs/other",
    )  # fmt: skip
    model = load.load(str(workdir))
    model = dataclasses.replace(model, config=config)
    (workdir / "data.txt").write_text("source 1 = folder '/home/me/photos', 8 images\n")
    text = model_card.model_card_text(model, workdir, "timm")
    (workdir / "data.txt").unlink()
    assert text.startswith("---\nlibrary_name: timm\nlicense: other\n")
    assert 'license_name: "My own licence"' in text and "hf://OWNER/NAME" in text
    for hidden in ("/home", "me/photos", "private", str(workdir), "/runs"):
        assert hidden not in text, hidden
    assert "source 1 = folder 'photos', 8 images" in text and "data.path = 'photos'" in text
    config = toy.settings(objective__forms="mim", report__licence="Apache-2.0")
    text = model_card.model_card_text(dataclasses.replace(model, config=config), workdir, "npz")
    assert "license: apache-2.0\n" in text and "hf://" not in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_only_on_a_terminal(
    model: load.LoadedEncoder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = noise(70, 32, 32, 3)
    model.features(images)
    assert capsys.readouterr().err == ""
    terminal = Terminal()
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(sys, "stderr", terminal)
    model.features(images)
    assert "features" in terminal.getvalue() and "/70" in terminal.getvalue()
    assert terminal.getvalue().rstrip(" ").endswith("\r")  # the line is cleared
    monkeypatch.setattr(sys, "stderr", None)  # pythonw, or a daemon
    assert not progress.shows_progress()
