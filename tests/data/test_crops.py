"""Geometry of the views: boxes have torchvision's semantics, and a view shows its box."""

import math

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from m3i_jax import schema
from m3i_jax.data import crops, pipeline
from m3i_jax.errors import UserError


def draws(height: int, width: int, n: int = 4000, **options) -> np.ndarray:
    u = np.random.default_rng(0).random((n, 22)).tolist()
    return np.array([crops.crop_box(row, height, width, **options) for row in u])


@pytest.mark.parametrize(
    ("height", "width"), [(100, 100), (375, 500), (500, 20), (17, 4000), (16, 16)]
)
def test_boxes_lie_inside(height, width):
    top, left, h, w = draws(height, width).T
    assert (top >= 0).all() and (left >= 0).all() and (h >= 1).all() and (w >= 1).all()
    assert (top + h <= height).all() and (left + w <= width).all()


def test_area_and_aspect_have_the_distribution_of_a_random_resized_crop():
    # In a square image far larger than the crops no try is refused: the share of the area is
    # uniform, the logarithm of the aspect too.
    top, left, h, w = draws(4000, 4000, scale=(0.1, 0.4)).T
    assert stats.kstest(h * w / 4000**2, stats.uniform(0.1, 0.3).cdf).pvalue > 0.01
    assert (
        stats.kstest(np.log(w / h), stats.uniform(math.log(3 / 4), math.log(16 / 9)).cdf).pvalue
        > 0.01
    )
    assert stats.kstest(top / (4000 - h), stats.uniform.cdf).pvalue > 0.01
    assert stats.kstest(left / (4000 - w), stats.uniform.cdf).pvalue > 0.01


def test_a_refused_attempt_is_followed_by_the_next():
    wide = [1.0 - 1e-9, 1.0 - 1e-9]  # all of the area at aspect 4/3: too wide for a square
    assert crops.crop_box(wide + [0.0, 0.5] + [0.5] * 18, 100, 100, scale=(0.25, 1.0)) == (
        25,
        25,
        50,
        50,
    )


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (100, 1000, (0, 433, 100, 133)),
        (1000, 100, (433, 0, 133, 100)),
        (16, 5000, (0, 2489, 16, 21)),
    ],
)
def test_after_ten_refusals_the_central_crop(height, width, box):
    # torchvision's fallback: the whole short side, the aspect clamped to 3/4 .. 4/3
    assert crops.crop_box([1.0 - 1e-9] * 22, height, width) == box


def coordinates(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8)


@pytest.mark.parametrize(
    "box", [(0, 0, 200, 250), (10, 20, 100, 50), (150, 200, 50, 50), (3, 7, 20, 30)]
)
def test_a_view_shows_its_box(box):
    size, (top, left, h, w) = 32, box
    view = crops.cut_view(
        Image.fromarray(coordinates(200, 250)), box, size, height=200, width=250
    ).reshape(size, size, 3)
    at = np.arange(size)
    x, y = left + (at + 0.5) * w / size - 0.5, top + (np.arange(size) + 0.5) * h / size - 0.5
    inner = slice(2, -2)
    assert np.abs(view[inner, inner, 0] - x[None, inner]).max() <= 1
    assert np.abs(view[inner, inner, 1] - y[inner, None]).max() <= 1


def test_a_reduced_image_gives_the_same_view():
    image = Image.fromarray(coordinates(200, 248))
    box = (20, 40, 120, 160)
    full, half = (
        crops.cut_view(p, box, 16, height=200, width=248).astype(int)
        for p in (image, image.reduce(2))
    )
    assert np.abs(full - half).max() <= 1


def test_the_last_pixel_is_inside():
    image = Image.fromarray(coordinates(100, 101).repeat(3, 0)[:100])
    for width in range(303, 330):  # 101 / width * width may round above 101
        assert crops.cut_view(image, (0, 0, 300, width), 8, height=300, width=width).size == 192


def test_antialiasing():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    view = crops.cut_view(Image.fromarray(stripes), (0, 0, 256, 256), 32, height=256, width=256)
    inner = view.reshape(32, 32, 3)[:, 1:-1]  # at the border half of the filter is missing
    assert np.abs(inner.astype(int) - 127.5).max() <= 1


@pytest.mark.parametrize(
    ("height", "width"), [(256, 256), (300, 400), (500, 333), (31, 97), (1000, 64)]
)
@pytest.mark.parametrize("size", [224, 96])
def test_the_evaluation_view_is_resize_then_centre_crop(height, width, size):
    """The reference is torchvision's Resize and CenterCrop, done by Pillow in two steps."""
    # Away from black and white: between its two passes Pillow clips overshoot, and it may take the
    # passes in either order.
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(100, 156, (height, width, 3), np.uint8))
    short = round(size * 256 / 224)
    h, w = (
        (short, int(short * width / height))
        if height <= width
        else (int(short * height / width), short)
    )
    top, left = round((h - size) / 2), round((w - size) / 2)
    expected = np.asarray(
        image.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    )
    box = crops.central_box(height, width, size)
    view = crops.cut_view(image, box, size, height=height, width=width).reshape(size, size, 3)
    assert np.abs(view.astype(int) - expected).max() <= 2


def test_sufficient_size_keeps_the_gap():
    boxes = [(0, 0, 50, 80), (0, 0, 300, 90)]
    height, width = crops.sufficient_size(boxes, 600, 900, 16, 2.0)
    for _, _, h, w in boxes:
        assert h * height / 600 >= 32 - 1e-9 and w * width / 900 >= 32 - 1e-9
    assert min(h * height / 600 for _, _, h, _ in boxes) == pytest.approx(32)


def test_the_resizer_is_part_of_the_identity_of_the_stream(monkeypatch):
    class Five:
        name = "five"

        def __len__(self):
            return 5

        def fingerprint(self):
            return "0123456789abcdef"

    config = schema.Config(data=schema.Data(resizer="auto"))
    identities = {}
    for name in ("pillow", "fast 4", "fast 5"):
        monkeypatch.setattr(crops, "choose_resizer", lambda setting, name=name: name)
        identities[name] = (
            pipeline.stream_fingerprint(config, Five()),
            pipeline.stream_identity(config, Five()),
        )
    assert len({mark for mark, _ in identities.values()}) == 3
    assert "resizer fast 4" in identities["fast 4"][1] and "resizer" not in identities["pillow"][1]
    assert pipeline.earlier_fingerprints(config, Five()) == ()

    # no view is cut of annotated images; runs that were saved with its name go on
    dense = schema.Config(task="detect", data=config.data)
    marks, texts = set(), set()
    for name in ("pillow", "fast 4"):
        monkeypatch.setattr(crops, "choose_resizer", lambda setting, name=name: name)
        marks.add(pipeline.stream_fingerprint(dense, Five()))
        texts.add(pipeline.stream_identity(dense, Five()))
    assert marks == {identities["pillow"][0]} and texts == {identities["pillow"][1]}
    assert pipeline.earlier_fingerprints(dense, Five()) == (identities["fast 4"][0],)


def test_a_missing_resizer_is_named(monkeypatch):
    monkeypatch.setattr(crops.decode_fast, "is_installed", lambda package: False)
    crops.choose_resizer.cache_clear()
    try:
        assert crops.choose_resizer("auto") == "pillow"
        with pytest.raises(
            UserError, match="data.resizer='fast' needs the package cykooz-resizer: pip install"
        ):
            crops.choose_resizer("fast")
        with pytest.raises(UserError, match="data.resizer='nearest' is not a resizer"):
            crops.choose_resizer("nearest")
    finally:
        crops.choose_resizer.cache_clear()
