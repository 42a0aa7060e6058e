"""Mixup, CutMix and random erasing against numpy and their distributions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.augment import mixup as mixup_draws

SIZE, ROWS = 20, 4000


@functools.cache
def draw_rows(mixup: float, cutmix: float, blend_p: float = 1.0) -> mixup_draws.MixupDraws:
    position = np.stack([np.zeros(ROWS), np.arange(ROWS)], 1).astype(np.uint32)
    settings = schema.Augment(mixup=mixup, cutmix=cutmix, blend_p=blend_p)
    return jax.device_get(
        jax.jit(functools.partial(mixup_draws.draw_mixup, seed=3, size=SIZE, settings=settings))(
            position
        )
    )


def area(box: np.ndarray) -> np.ndarray:
    return (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])


def test_shares_of_a_pair_and_of_all() -> None:
    """Mixup's are Beta(0.8, 0.8): mean 1/2, variance 1 / (4 (2 * 0.8 + 1)). Half of the pairs are
    cut; both of a pair alike."""
    made = draw_rows(0.8, 1.0)
    for part in made:
        np.testing.assert_array_equal(part[::2], part[1::2])
    assert 0.45 < made.cut.mean() < 0.55
    mixed = made.share[~made.cut]
    assert abs(mixed.mean() - 0.5) < 0.04 and abs(mixed.var() - 1 / (4 * 2.6)) < 0.01
    assert not made.box[~made.cut].any()
    np.testing.assert_allclose(
        made.share[made.cut], 1 - area(made.box[made.cut]) / SIZE**2, atol=1e-6
    )
    boxes = made.box[::2][made.cut[::2]]
    whole = boxes[(boxes[:, :2] > 0).all(1) & (boxes[:, 2:] < SIZE).all(1)]
    middle = whole[:, :2] + whole[:, 2:]
    assert abs(np.corrcoef(middle.T)[0, 1]) < 0.25  # not on a line


@pytest.mark.parametrize("share", [0.0, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("u", [(0.0, 0.0), (0.5, 0.99), (0.2, 0.6)])
def test_the_box_of_cutmix_in_numpy(share: float, u: tuple[float, float]) -> None:
    half = int(np.sqrt(1 - share) * SIZE) // 2
    y, x = int(u[0] * SIZE), int(u[1] * SIZE)
    wanted = [max(y - half, 0), max(x - half, 0), min(y + half, SIZE), min(x + half, SIZE)]
    got = mixup_draws.cut_box(jnp.float32(share), jnp.float32(u[0]), jnp.float32(u[1]), SIZE)
    assert got.tolist() == wanted


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_one_of_the_two_or_none(mixup: float, cutmix: float) -> None:
    made = draw_rows(mixup, cutmix)
    assert made.cut.all() == bool(cutmix) and made.cut.any() == bool(cutmix)
    assert (made.share < 1).any() == bool(mixup or cutmix)


def test_some_pairs_are_left_alone() -> None:
    made = draw_rows(0.8, 1.0, 0.3)
    assert 0.65 < (made.share == 1).mean() < 0.76  # 0.7, and empty boxes


def test_a_position_has_its_own_draw_wherever_it_stands() -> None:
    position = np.array([[0, 41], [0, 40], [0, 7]], np.uint32)
    made = mixup_draws.draw_mixup(
        position, seed=3, size=SIZE, settings=schema.Augment(mixup=0.8, cutmix=1.0)
    )
    np.testing.assert_allclose(made.share, draw_rows(0.8, 1.0).share[[41, 40, 7]], rtol=1e-6)
    draw = functools.partial(
        mixup_draws.draw_mixup, size=SIZE, settings=schema.Augment(mixup=0.8, cutmix=1.0)
    )
    far = position ^ np.array([1, 0], np.uint32)  # 2**32 samples on
    assert (draw(far, seed=3).share != made.share).any()
    assert (draw(position, seed=4).share != made.share).any()
    erase = functools.partial(mixup_draws.random_erase, jnp.zeros((3, 8, 8, 3)), probability=1.0)
    erased = [erase(p, seed=seed) for p, seed in ((position, 1), (position, 2), (far, 1))]
    assert len({np.asarray(x).tobytes() for x in erased}) == 3


def test_erasing_fills_one_box_with_noise() -> None:
    rows, size = 300, 32
    position = np.stack([np.zeros(rows), np.arange(rows)], 1).astype(np.uint32)
    images = jnp.full((rows, size, size, 3), 7.0)
    out = np.asarray(
        jax.jit(functools.partial(mixup_draws.random_erase, seed=1, probability=0.25))(
            images, position
        )
    )
    changed = (out != 7).all(-1)
    happened = changed.any((1, 2))
    assert 0.18 < happened.mean() < 0.32
    heights, widths = changed.any(2).sum(1)[happened], changed.any(1).sum(1)[happened]
    # full rectangles
    np.testing.assert_array_equal(changed.sum((1, 2))[happened], heights * widths)
    first = changed.any(2).argmax(1)[happened], changed.any(1).argmax(1)[happened]
    place = np.stack([first[0] / (size - heights), first[1] / (size - widths)])  # 0 to 1
    assert (place.min(1) < 0.2).all() and (place.max(1) > 0.8).all()
    assert abs(np.corrcoef(place)[0, 1]) < 0.5
    shares = heights * widths / size**2
    assert shares.min() > 0.015 and shares.max() < 0.36 and shares.std() > 0.05
    aspects = heights / widths
    assert (
        aspects.min() > 0.25
        and aspects.max() < 4.2
        and (aspects > 1.2).any()
        and (aspects < 0.8).any()
    )
    noise = out[changed]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    np.testing.assert_array_equal(out[~happened], images[~happened])
