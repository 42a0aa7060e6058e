"""Every operation against torchvision itself: mean absolute error at most 2/255.
`torchvision_reference` wrote the values."""

import numpy as np
import pytest
from PIL import Image

from m3i_jax import schema
from m3i_jax.augment import photometric
from m3i_jax.data import crops
from tests.data import torchvision_reference as reference

TOLERANCE = 2 / 255


@pytest.fixture(scope="module")
def saved() -> dict[str, np.ndarray]:
    with np.load(reference.PLACE, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def unit(values: np.ndarray) -> np.ndarray:
    return values / 255 if values.dtype == np.uint8 else values


def test_the_images_are_those_of_the_file(saved):
    np.testing.assert_array_equal(saved["pictures"], reference.images())
    # An operation that did nothing would not pass.
    for name in ("brightness", "contrast", "saturation", "hue"):
        assert (
            np.abs(unit(saved[f"{name}/tensor"]) - unit(saved["pictures"])).mean((1, 2, 3, 4)).min()
            > 2 * TOLERANCE
        ), name


@pytest.mark.parametrize("kind", ["pillow", "tensor"])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_jitter(saved, name, kind):
    for factor, want in zip(reference.FACTORS[name], saved[f"{name}/{kind}"], strict=True):
        out = np.asarray(getattr(photometric, name)(saved["pictures"], factor))
        assert np.abs(out - unit(want)).mean() <= TOLERANCE, factor


@pytest.mark.parametrize("kind", ["pillow", "tensor"])
def test_grayscale_and_solarize(saved, kind):
    assert (
        np.abs(
            np.asarray(photometric.grayscale(saved["pictures"])) - unit(saved[f"grayscale/{kind}"])
        ).mean()
        <= TOLERANCE
    )
    np.testing.assert_allclose(
        photometric.solarize(saved["pictures"]), unit(saved[f"solarize/{kind}"]), atol=1e-6
    )


def test_blur(saved):
    margin = 7  # torchvision mirrors at the border, we repeat the edge as Pillow does
    for sigma, want in zip(reference.SIGMAS, saved["blur/tensor"], strict=True):
        out = np.asarray(photometric.gaussian_blur(saved["pictures"], sigma))
        assert np.abs(out - want).mean() <= TOLERANCE, sigma
        inner = np.s_[:, margin:-margin, margin:-margin]
        assert np.abs(out[inner] - want[inner]).max() <= 1e-3, sigma


def test_normalize(saved):
    np.testing.assert_allclose(
        photometric.normalize(saved["pictures"], schema.Augment()),
        saved["normalize/tensor"],
        atol=1e-5,
    )


@pytest.mark.parametrize("kind", ["pillow", "tensor"])
@pytest.mark.parametrize("by", ["pillow", "fast"])
def test_crops(saved, kind, by):
    if by == "fast":
        pytest.importorskip("cykooz_resizer", reason="the extra `fast` is not installed")
    name = crops.choose_resizer(by)
    for box, want in zip(reference.BOXES, saved[f"crop/{kind}"], strict=True):
        for image, view in zip(saved["pictures"], want, strict=True):
            side = reference.SIDE
            out = crops.cut_view(
                Image.fromarray(image), box, reference.CROP, height=side, width=side, by=name
            )
            assert np.abs(out.reshape(view.shape) / 255 - unit(view)).mean() <= TOLERANCE, box
