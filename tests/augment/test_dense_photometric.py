"""mmsegmentation's colour changes against values that OpenCV made (by
tests/data/make_opencv_values.py), and their distribution."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax.augment import dense_photometric as dp

VALUES = np.load(pathlib.Path(__file__).parent.parent / "data" / "dense" / "opencv.npz")


def test_hsv_of_opencv() -> None:
    hsv = np.asarray(jax.jit(dp.rgb_to_hsv)(jnp.asarray(VALUES["rgb"], jnp.int32)))
    assert (hsv == VALUES["hsv"]).all()
    back = np.asarray(jax.jit(dp.hsv_to_rgb)(jnp.asarray(VALUES["hsv"], jnp.int32)))
    assert np.abs(back - VALUES["back"].astype(int)).max() <= 1
    assert (back != VALUES["back"]).mean() < 0.01


def test_all_combinations_of_changes() -> None:
    choices = VALUES["choices"]
    draws = dp.DistortionDraws(
        active=jnp.asarray(choices[:, :4] > 0),
        contrast_first=jnp.asarray(choices[:, 4] > 0),
        brightness=jnp.asarray(choices[:, 5], jnp.float32),
        contrast=jnp.asarray(choices[:, 6], jnp.float32),
        saturation=jnp.asarray(choices[:, 7], jnp.float32),
        hue=jnp.asarray(choices[:, 8], jnp.int32),
    )
    images = jnp.asarray(np.repeat(VALUES["scene"][None], len(choices), 0))
    ours = np.asarray(jax.jit(dp.distort)(images, draws))
    assert ours.dtype == np.uint8
    different = ours.astype(int) - VALUES["distorted"].astype(int)
    # a number on the border of two may fall on either side, which HSV may double
    assert (different != 0).mean() < 0.01 and np.abs(different).max() <= 4
    unchanged = ~(choices[:, :4] > 0).any(1)
    assert unchanged.sum() == 2 and (ours[unchanged] == VALUES["scene"]).all()


def test_the_distribution_of_the_draws() -> None:
    position = np.stack([np.zeros(4000), np.arange(4000)], 1).astype(np.uint32)
    draws = jax.tree.map(np.asarray, jax.jit(lambda p: dp.draw_distortion(p, seed=3))(position))
    assert (np.abs(draws.active.mean(0) - 0.5) < 0.03).all()
    assert abs(draws.contrast_first.mean() - 0.5) < 0.03
    assert -32 <= draws.brightness.min() < -31 and 31 < draws.brightness.max() <= 32
    for factor in (draws.contrast, draws.saturation):
        assert 0.5 <= factor.min() < 0.51 and 1.49 < factor.max() <= 1.5
    assert sorted(set(draws.hue.tolist())) == list(range(-18, 18))
    columns = np.concatenate(
        [draws.active, np.stack([draws.brightness, draws.contrast, draws.saturation], 1)], 1
    )
    assert np.abs(np.corrcoef(columns.T) - np.eye(7)).max() < 0.06


@pytest.mark.parametrize("first", [0, 2**32])
def test_an_image_depends_on_its_position_alone(first) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    at = first + np.arange(6)
    position = np.stack([at >> 32, at & 0xFFFFFFFF], 1).astype(np.uint32)
    run = jax.jit(lambda x, p: dp.dense_photometric(x, p, seed=1))
    whole = np.asarray(run(images, position))
    assert (np.asarray(run(images[::-1], position[::-1]))[::-1] == whole).all()
    other = np.asarray(jax.jit(lambda x, p: dp.dense_photometric(x, p, seed=2))(images, position))
    assert (other != whole).any()
    far = position ^ np.array([1, 0], np.uint32)  # 2**32 samples on, or before
    assert (np.asarray(run(images, far)) != whole).any()


def test_images_of_another_type_are_refused() -> None:
    """Floats in 0..1 became black."""
    position = jnp.zeros((1, 2), jnp.uint32)
    with pytest.raises(ValueError, match="type float32; pass uint8"):
        dp.dense_photometric(jnp.ones((1, 2, 2, 3)), position, seed=0)
