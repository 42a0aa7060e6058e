"""RandAugment: every operation with its strength against Pillow or numpy, and the draws."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from m3i_jax import schema
from m3i_jax.data import rand_augment

SIDE, MEAN = 24, (124, 116, 104)


def gradient_image(seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(20, 220, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def moved(image: Image.Image, *matrix: float) -> np.ndarray:
    return array(
        image.transform(
            image.size,
            Image.Transform.AFFINE,
            matrix,
            resample=Image.Resampling.BICUBIC,
            fillcolor=MEAN,
        )
    )


# The table of rand-m9-inc1 at magnitude 9 (level 0.9) with a negative sign, and at 5 with a
# positive one; strengths are written out.
BY_HAND = {
    ("rotate", 0.9, -1): lambda im: array(
        im.rotate(-27, resample=Image.Resampling.BICUBIC, fillcolor=MEAN)
    ),
    ("rotate", 0.5, 1): lambda im: array(
        im.rotate(15, resample=Image.Resampling.BICUBIC, fillcolor=MEAN)
    ),
    ("shear_x", 0.9, -1): lambda im: moved(im, 1, -0.27, 0, 0, 1, 0),
    ("shear_y", 0.5, 1): lambda im: moved(im, 1, 0, 0, 0.15, 1, 0),
    ("translate_x", 0.9, -1): lambda im: moved(im, 1, 0, -0.405 * SIDE, 0, 1, 0),
    ("translate_y", 0.5, 1): lambda im: moved(im, 1, 0, 0, 0, 1, 0.225 * SIDE),
    ("auto_contrast", 0.9, 1): lambda im: array(ImageOps.autocontrast(im)),
    ("equalize", 0.9, 1): lambda im: array(ImageOps.equalize(im)),
    ("invert", 0.9, 1): lambda im: 255 - array(im),
    ("posterize", 0.9, 1): lambda im: array(im) & 0b10000000,  # 4 - floor(3.6) = 1 bit
    ("posterize", 0.5, -1): lambda im: array(im) & 0b11000000,
    ("posterize", 1.0, 1): lambda im: 0 * array(im),
    # 256 - floor(230.4)
    ("solarize", 0.9, 1): lambda im: np.where(array(im) < 26, array(im), 255 - array(im)),
    ("solarize", 0.5, 1): lambda im: np.where(array(im) < 128, array(im), 255 - array(im)),
    ("solarize_add", 0.9, 1): lambda im: np.where(
        array(im) < 128, np.minimum(255, array(im) + 99), array(im)
    ),
    ("brightness", 0.9, -1): lambda im: array(ImageEnhance.Brightness(im).enhance(0.19)),
    ("brightness", 0.5, 1): lambda im: array(ImageEnhance.Brightness(im).enhance(1.45)),
    ("brightness", 1.0, -1): lambda im: array(ImageEnhance.Brightness(im).enhance(0.1)),
    ("color", 0.9, 1): lambda im: array(ImageEnhance.Color(im).enhance(1.81)),
    ("contrast", 0.5, -1): lambda im: array(ImageEnhance.Contrast(im).enhance(0.55)),
    ("sharpness", 0.9, 1): lambda im: array(ImageEnhance.Sharpness(im).enhance(1.81)),
}


@pytest.mark.parametrize(("name", "level", "sign"), BY_HAND)
def test_the_table_of_operations(name: str, level: float, sign: float) -> None:
    image = gradient_image()
    actual, expected = (
        array(rand_augment.OPERATIONS[name](image, level, sign)),
        BY_HAND[name, level, sign](image),
    )
    # a strength may round to its neighbour in Pillow's fixed point
    assert np.abs(actual - expected).max() <= 1
    assert np.abs(actual - array(image)).max() > 3


def test_every_operation_is_in_the_table() -> None:
    assert {name for name, *_ in BY_HAND} == set(rand_augment.OPERATIONS) and len(
        rand_augment.OPERATIONS
    ) == 15


def test_draws_have_the_probabilities_of_the_recipe() -> None:
    settings, r = schema.RandAugment(ops=2), np.random.default_rng(0)
    draws = [
        rand_augment.draw_operations(u, settings)
        for u in r.random((4000, 2 * rand_augment.WIDTH)).tolist()
    ]
    counts = np.bincount([len(operations) for operations in draws], minlength=3) / len(draws)
    np.testing.assert_allclose(counts, [0.25, 0.5, 0.25], atol=0.03)
    every = [one for operations in draws for one in operations]
    shares = np.unique([name for name, *_ in every], return_counts=True)[1] / len(every)
    np.testing.assert_allclose(shares, 1 / 15, atol=0.02)
    magnitudes = 10 * np.array([level for _, level, _ in every])
    assert magnitudes.max() <= 10 and abs(np.median(magnitudes) - 9) < 0.05
    assert (
        abs(magnitudes[magnitudes < 10].std() - 0.5) < 0.05
        and abs(np.mean([sign for *_, sign in every])) < 0.05
    )


def test_operations_are_applied_in_their_order() -> None:
    image, names = gradient_image(), list(rand_augment.OPERATIONS)
    u = [
        x
        for name in ("solarize", "rotate")
        for x in ((names.index(name) + 0.5) / 15, 0.0, 0.9, 0.0, 0.0)
    ]
    actual = rand_augment.apply_operations(
        np.asarray(image).reshape(-1), SIDE, u, schema.RandAugment(ops=2, deviation=0.0)
    )
    solarized = Image.fromarray(
        np.where(array(image) < 26, array(image), 255 - array(image)).astype(np.uint8)
    )
    expected = solarized.rotate(27, resample=Image.Resampling.BICUBIC, fillcolor=MEAN)
    np.testing.assert_array_equal(actual, np.asarray(expected).reshape(-1))
    untouched = rand_augment.apply_operations(
        np.asarray(image).reshape(-1), SIDE, u, schema.RandAugment(ops=2, p=0.0)
    )
    np.testing.assert_array_equal(untouched, np.asarray(image).reshape(-1))


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
def test_pixels_outside_have_the_mean_of_the_normalization(name: str) -> None:
    white = np.full(SIDE * SIDE * 3, 255, np.uint8)
    u = [(list(rand_augment.OPERATIONS).index(name) + 0.5) / 15, 0.0, 0.9, 0.0, 0.0]
    settings = schema.RandAugment(ops=1, deviation=0.0)
    for options, color in (({}, MEAN), ({"mean": (0.5, 0.25, 1.0)}, (128, 64, 255))):
        out = rand_augment.apply_operations(white, SIDE, u, settings, **options)
        assert (out.reshape(-1, 3) == color).all(1).any(), options
