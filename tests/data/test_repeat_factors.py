"""Images of rare categories come in proportion to their repeat factors, in an order that is a
closed form of the position."""

import numpy as np
import pytest

from m3i_jax.data import repeat_factors as repeats
from m3i_jax.data.sampler import sample_index


def scenes(images=400, classes=30, seed=0):
    """Categories of images, the c-th as frequent as 1 / (c + 1); the last never occurs."""
    rng, weight = np.random.default_rng(seed), 1 / np.arange(1, classes)
    numbers = rng.integers(0, 5, images)
    return [rng.choice(classes - 1, n, p=weight / weight.sum()) for n in numbers]


def test_factors_are_those_of_a_loop():
    images = scenes()
    share = repeats.category_shares(images, 30)
    expected_share = [sum(c in image for image in images) / len(images) for c in range(30)]
    np.testing.assert_allclose(share, expected_share)
    expected = []
    for image in images:
        wanted = [max(1.0, (0.2 / share[c]) ** 0.5) for c in image.tolist()]
        expected.append(max(wanted, default=1.0))
    factors = repeats.repeat_factors(share, images, 0.2)
    np.testing.assert_allclose(factors, expected)
    assert factors.max() > 3 and (factors == 1).sum() > 50
    assert (repeats.repeat_factors(share, images, 0.0) == 1).all()
    assert repeats.repeat_factors(share, [], 0.2).shape == (0,)


@pytest.fixture(scope="module")
def ends():
    images = scenes()
    return np.cumsum(repeats.repeat_factors(repeats.category_shares(images, 30), images, 0.2))


def test_every_epoch_has_each_image_as_often_as_its_factor_rounded(ends):
    size, weight = repeats.weighted_epoch_size(ends), np.diff(ends, prepend=0)
    expected = weight * size / ends[-1]
    assert ends[-1] <= size < ends[-1] + 1
    stream = repeats.records_at_weighted(ends, 3, np.arange(200 * size)).reshape(200, size)
    counts = np.stack([np.bincount(epoch, minlength=len(ends)) for epoch in stream])
    assert (counts >= np.floor(expected - 1e-9)).all() and (counts.min(0) >= 1).all()
    assert (counts <= np.ceil(expected + 1e-9)).all()
    # the mean of 200 epochs; a count has a standard deviation of at most 1/2
    assert np.abs(counts.mean(0) - expected).max() < 5 * 0.5 / 200**0.5
    assert abs(counts.mean(0) - expected).mean() < 0.03
    assert len({tuple(epoch) for epoch in stream.tolist()}) == 200


def test_neighbours_on_the_line_are_apart_in_the_stream(ends):
    size = repeats.weighted_epoch_size(ends)
    epoch = repeats.records_at_weighted(ends, 3, np.arange(size))
    assert abs(np.corrcoef(epoch, np.arange(size))[0, 1]) < 0.15
    assert (np.diff(epoch) == 0).mean() < 0.05


def test_any_part_of_the_stream_is_the_stream(ends):
    size = repeats.weighted_epoch_size(ends)
    full = repeats.records_at_weighted(ends, 1, np.arange(4 * size))
    for start in (1, size - 1, size, 2 * size + 7):
        part = repeats.records_at_weighted(ends, 1, np.arange(start, 4 * size))
        np.testing.assert_array_equal(part, full[start:])
    backwards = repeats.records_at_weighted(ends, 1, np.arange(4 * size)[::-1])
    np.testing.assert_array_equal(backwards[::-1], full)
    assert (repeats.records_at_weighted(ends, 2, np.arange(4 * size)) != full).mean() > 0.9


def test_equal_weights_visit_every_image_once_an_epoch():
    ends = np.cumsum(np.ones(101))
    epochs = repeats.records_at_weighted(ends, 5, np.arange(7 * 101)).reshape(7, 101)
    assert (np.sort(epochs, 1) == np.arange(101)).all()
    np.testing.assert_array_equal(epochs.ravel(), sample_index(5, np.arange(7 * 101), 101))


def test_attempts_are_other_draws(ends):
    positions = np.arange(3000)
    first, second = (repeats.records_at_weighted(ends, 0, positions, n) for n in (0, 1))
    assert 0 < (first == second).sum() < 60
    assert second.min() >= 0 and second.max() < len(ends)


def test_a_far_position_of_many_images_needs_no_replay():
    weight = 1 + np.random.default_rng(0).exponential(0.3, 100_000)
    ends = np.cumsum(weight)
    size = repeats.weighted_epoch_size(ends)
    where = repeats.records_at_weighted(ends, 0, 10**12 * size + np.arange(size))
    counts = np.bincount(where, minlength=len(ends))
    assert (counts >= np.floor(weight)).all()
    assert (counts <= np.ceil(weight * size / ends[-1])).all()
