"""Against Pillow (8-bit, as torchvision's PIL path) and scipy; and against itself on other
batches."""

import colorsys
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image, ImageEnhance, ImageOps

from m3i_jax import schema
from m3i_jax.augment import photometric

SIZE = 32
TOLERANCE = 2 / 255
OFF = dict(jitter_p=0.0, grayscale_p=0.0, blur_p=(0.0, 0.0), solarize_p=(0.0, 0.0))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Smooth coloured images with edges and a little noise, uint8 [4, S, S, 3]."""
    rng = np.random.default_rng(0)
    smooth = scipy.ndimage.zoom(rng.random((4, 5, 5, 3)), (1, SIZE / 5, SIZE / 5, 1), order=1)
    smooth[:, 8:20, 10:26] = 1 - smooth[:, 8:20, 10:26]
    return np.clip(255 * smooth + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)


def positions(count: int, first: int = 0) -> np.ndarray:
    index = np.arange(first, first + count, dtype=np.uint64)
    return np.stack([index >> np.uint64(32), index & np.uint64(0xFFFFFFFF)], 1).astype(np.uint32)


def test_images_of_an_unknown_range_are_refused() -> None:
    """0..255 as int32 would pass for 0..1."""
    with pytest.raises(ValueError, match="images are int32; give uint8 in 0..255, or floats"):
        photometric.to_float(jnp.zeros((1, 4, 4, 3), jnp.int32))


def pillow(operation, image: np.ndarray) -> np.ndarray:
    return np.asarray(operation(Image.fromarray(image)), np.float64) / 255


def pillow_hue(image: Image.Image, shift: float) -> Image.Image:
    h, s, v = image.convert("HSV").split()
    turned = (np.asarray(h).astype(int) + int(shift * 255)) % 256
    return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), s, v)).convert("RGB")


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4])
@pytest.mark.parametrize(
    "name, enhancer",
    [("brightness", "Brightness"), ("contrast", "Contrast"), ("saturation", "Color")],
)
def test_blends_equal_pillow(images, name, enhancer, factor):
    enhance = getattr(ImageEnhance, enhancer)
    out = np.asarray(getattr(photometric, name)(images, factor))
    want = np.stack([pillow(lambda image: enhance(image).enhance(factor), p) for p in images])
    assert np.abs(out - want).mean() <= TOLERANCE
    assert np.abs(out - want).max() <= 2.01 / 255  # truncation of Pillow, and a rounded gray


@pytest.mark.parametrize("shift", [-0.1, -0.03, 0.1, 0.5])
def test_hue_equals_pillow_and_colorsys(images, shift):
    out = np.asarray(photometric.hue(images, shift))
    want = np.stack([pillow(functools.partial(pillow_hue, shift=shift), p) for p in images])
    assert np.abs(out - want).mean() <= TOLERANCE
    for y, x in [(0, 0), (3, 17), (12, 12), (31, 5)]:
        h, s, v = colorsys.rgb_to_hsv(*(images[1, y, x] / 255))
        np.testing.assert_allclose(
            out[1, y, x], colorsys.hsv_to_rgb((h + shift) % 1, s, v), atol=1e-5
        )


def test_hue_of_grays_and_primaries():
    corners = np.array(list(itertools.product([0.0, 0.5, 1.0], repeat=3)), np.float32)[None]
    out = np.asarray(jax.jit(photometric.hue)(corners, 0.07))[0]
    want = [
        colorsys.hsv_to_rgb((h + 0.07) % 1, s, v)
        for h, s, v in (colorsys.rgb_to_hsv(*c) for c in corners[0])
    ]
    np.testing.assert_allclose(out, want, atol=1e-5)


def test_grayscale_equals_pillow(images):
    want = np.stack([pillow(lambda image: image.convert("L").convert("RGB"), p) for p in images])
    assert np.abs(np.asarray(photometric.grayscale(images)) - want).max() <= 0.51 / 255
    # white stays white
    assert np.asarray(photometric.grayscale(np.full([1, 1, 3], 255, np.uint8))).min() > 0.99999


def test_solarize_equals_pillow(images):
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    for image in (*images, levels):
        want = pillow(ImageOps.solarize, image)
        np.testing.assert_allclose(np.asarray(photometric.solarize(image)), want, atol=1e-6)


@pytest.mark.parametrize("shape", [(32, 32), (64, 31), (7, 224)])
def test_blur_equals_scipy(shape):
    images = np.random.default_rng(1).random((5, *shape, 3), np.float32)
    sigma = np.array([0.1, 0.5, 1.0, 1.5, 2.0], np.float32)
    out = np.asarray(photometric.gaussian_blur(images, sigma))
    for i, s in enumerate(sigma):
        want = scipy.ndimage.gaussian_filter(
            images[i].astype(np.float64), s, mode="nearest", radius=photometric.RADIUS, axes=(0, 1)
        )
        np.testing.assert_allclose(out[i], want, atol=2e-6)


def test_jitter_equals_the_operations_one_by_one_in_all_24_orders(images):
    orders = list(itertools.permutations(range(4)))
    images = jnp.asarray(np.resize(images, (24, SIZE, SIZE, 3))) / 255
    factors = jnp.asarray(
        np.random.default_rng(2).uniform([0.6, 0.6, 0.6, -0.1], [1.4, 1.4, 1.4, 0.1], (24, 4)),
        jnp.float32,
    )
    ranks = jnp.asarray([[order.index(op) for op in range(4)] for order in orders])
    out = photometric.color_jitter(images, factors, ranks)
    operations = [
        photometric.brightness,
        photometric.contrast,
        photometric.saturation,
        photometric.hue,
    ]
    wants = []
    for i, order in enumerate(orders):
        want = images[i]
        for op in order:
            want = operations[op](want, factors[i, op])
        wants.append(want)
    # One level of difference where the mean gray lies on the edge between two.
    assert np.abs(out - np.stack(wants)).max() <= 1.01 / 255
    assert np.abs(out - np.stack(wants)).mean() <= 1e-4
    spread = np.abs(
        np.asarray(out)[::4]
        - np.asarray(photometric.color_jitter(images, factors, ranks[::-1]))[::4]
    ).mean()
    assert spread > 1e-3  # the order matters, so the equality above says something


def test_jitter_equals_pillow_in_sequence(images):
    factors, order = [1.3, 0.7, 1.2, 0.06], [2, 0, 3, 1]
    steps = [
        lambda image: ImageEnhance.Brightness(image).enhance(factors[0]),
        lambda image: ImageEnhance.Contrast(image).enhance(factors[1]),
        lambda image: ImageEnhance.Color(image).enhance(factors[2]),
        lambda image: pillow_hue(image, factors[3]),
    ]
    image = Image.fromarray(images[0])
    for op in order:
        image = steps[op](image)
    ranks = jnp.asarray([[order.index(op) for op in range(4)]])
    out = photometric.color_jitter(images[:1], jnp.asarray([factors]), ranks)[0]
    assert np.abs(np.asarray(out) - np.asarray(image) / 255.0).mean() <= TOLERANCE


def test_statistics_of_the_draws():
    count, a = 20_000, schema.Augment()
    for view in (0, 1):
        d = jax.tree.map(
            np.asarray,
            photometric.draw_photometric(positions(count), seed=3, view=view, settings=a),
        )
        rates = {"gray": 0.2, "blur": a.blur_p[view], "solarize": a.solarize_p[view]}
        for name, p in rates.items():
            assert abs(getattr(d, name).mean() - p) <= 4 * np.sqrt(p * (1 - p) / count), name
        applied = (d.factors != [1, 1, 1, 0]).any(1)
        assert abs(applied.mean() - 0.8) <= 4 * np.sqrt(0.16 / count)
        used, spans = d.factors[applied], np.array([0.4, 0.4, 0.2, 0.1])
        assert (used >= np.array([1, 1, 1, 0]) - spans - 1e-6).all() and (
            used <= np.array([1, 1, 1, 0]) + spans + 1e-6
        ).all()
        np.testing.assert_allclose(used.mean(0), [1, 1, 1, 0], atol=0.012)
        np.testing.assert_allclose(used.std(0), spans / np.sqrt(3), rtol=0.02)
        assert d.sigma.min() >= 0.1 and d.sigma.max() <= 2.0 and abs(d.sigma.mean() - 1.05) < 0.02
        _, orders = np.unique(d.ranks @ [64, 16, 4, 1], return_counts=True)
        # chi-square, 23 degrees of freedom, p = 1e-4
        assert len(orders) == 24 and ((orders - count / 24) ** 2 / (count / 24)).sum() < 56.5
        several = np.stack([applied, d.gray, d.blur, d.solarize, d.sigma, d.ranks[:, 0]])
        changing = several[several.std(1) > 0]
        # independent of each other
        assert np.abs(np.corrcoef(changing) - np.eye(len(changing))).max() < 0.03


@functools.cache
def compiled(view, settings):
    return jax.jit(functools.partial(photometric.augment, seed=0, view=view, settings=settings))


def augment(views, position, view=0, **changes):
    return np.asarray(
        compiled(view, dataclasses.replace(schema.Augment(), **changes))(views, position)
    )


def test_a_row_depends_on_its_own_image_and_position_alone(images):
    batch, where = np.resize(images, (8, SIZE, SIZE, 3)), positions(8, first=2**32 - 4)
    out = augment(batch, where, view=1)
    order = np.array([5, 2, 7, 0, 1, 6, 3, 4])
    np.testing.assert_array_equal(augment(batch[order], where[order], view=1), out[order])
    others, elsewhere = 255 - batch, positions(8, first=77)
    others[3:5], elsewhere[3:5] = batch[3:5], where[3:5]
    np.testing.assert_array_equal(augment(others, elsewhere, view=1)[3:5], out[3:5])
    same = augment(np.repeat(images[:1], 8, 0), where, view=1)
    assert all(
        np.abs(same[i] - same[j]).max() > 1e-3 for i, j in itertools.combinations(range(8), 2)
    )
    whole, part = (
        photometric.draw_photometric(where[rows], seed=0, view=1, settings=schema.Augment())
        for rows in (slice(0, 8), slice(5, 6))
    )
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[5:6], b), whole, part)


def test_eight_devices_give_what_one_gives(images):
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batch, where = np.resize(images, (8, SIZE, SIZE, 3)), positions(8)
    out = augment(*jax.device_put((batch, where), rows), view=1)
    np.testing.assert_allclose(out, augment(batch, where, view=1), atol=1e-6)


def test_seed_view_and_both_words_of_the_position_are_keys():
    settings = schema.Augment(jitter_p=1.0)

    def factors(high, low, seed=0, view=0):
        position = jnp.array([[high, low]], jnp.uint32)
        return tuple(
            photometric.draw_photometric(position, seed=seed, view=view, settings=settings)
            .factors[0]
            .tolist()
        )

    assert (
        len(
            {
                factors(0, 7),
                factors(1, 7),
                factors(0, 8),
                factors(7, 0),
                factors(0, 7, seed=1),
                factors(0, 7, view=1),
            }
        )
        == 6
    )


def test_switched_off_is_the_identity(images):
    images = np.concatenate([images] * 2)
    out = augment(images, positions(8), **OFF)
    np.testing.assert_allclose(out, np.float32(images) / 255, atol=1e-7)
    # Jitter that was compiled in but not drawn changes nothing, not a bit.
    rare = augment(images, positions(8), **(OFF | dict(jitter_p=1e-9)))
    np.testing.assert_array_equal(rare, out)


def test_the_chain_is_the_operations_in_order(images):
    settings = schema.Augment()
    batch = np.resize(images, (8, SIZE, SIZE, 3))
    seen = np.zeros(3, int)
    for first in range(0, 48, 8):
        where = positions(8, first)
        out = augment(batch, where, view=1)
        assert out.dtype == np.float32 and out.min() >= 0 and out.max() <= 1
        d = photometric.draw_photometric(where, seed=0, view=1, settings=settings)
        chosen = [
            np.asarray(active)[:, None, None, None] for active in (d.gray, d.blur, d.solarize)
        ]
        want = photometric.color_jitter(batch, d.factors, d.ranks)
        want = np.where(chosen[0], photometric.grayscale(want), want)
        want = np.where(chosen[1], photometric.gaussian_blur(want, d.sigma), want)
        want = np.where(chosen[2], photometric.solarize(want), want)
        assert np.abs(out - want).mean() < 1e-3
        np.testing.assert_array_equal(np.abs(out - out[..., :1]).max((1, 2, 3)) < 1e-5, d.gray)
        seen += [c.sum() for c in chosen]
    assert (seen > 0).all()  # every operation took part


def test_normalize(images):
    a = schema.Augment()
    want = (images / 255.0 - np.array(a.mean)) / np.array(a.std)
    np.testing.assert_allclose(photometric.normalize(images, a), want, atol=1e-5)
    np.testing.assert_allclose(photometric.normalize(np.float32(images) / 255, a), want, atol=1e-5)


def test_costs_a_few_tens_of_megaflop():
    views = jax.ShapeDtypeStruct((2, 224, 224, 3), np.uint8)
    chain = jax.jit(
        functools.partial(photometric.augment, seed=0, view=1, settings=schema.Augment())
    )
    flops = chain.lower(views, jax.ShapeDtypeStruct((2, 2), np.uint32)).cost_analysis()["flops"] / 2
    assert 20e6 < flops < 60e6


def test_wrong_shapes_are_named(images):
    with pytest.raises(ValueError, match=r"\(4, 32, 32, 3\) and \(3, 2\)"):
        photometric.augment(images, positions(3), seed=0, view=0, settings=schema.Augment())
