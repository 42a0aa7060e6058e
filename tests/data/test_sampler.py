"""The order of the stream is a closed form: a permutation an epoch, and the same from anywhere."""

import time

import numpy as np
import pytest
from scipy import stats

from m3i_jax.data import sampler


def test_hash_is_splitmix64():
    # golden: the first outputs of SplitMix64 seeded with 0 and with 1234567 (Vigna's reference
    # implementation)
    assert sampler.hash64(0).tolist() == [0xE220A8397B1DCDAF]
    assert sampler.hash64(1234567).tolist() == [6457827717110365317]


def test_hash_separates_its_words():
    h = sampler.hash64(np.arange(100)[:, None], np.arange(100)[None])
    assert h.shape == (100, 100) and len(np.unique(h)) == 10_000


@pytest.mark.parametrize("size", [*range(1, 40), 97, 1000, 4096, 10_007])
def test_permutation(size):
    for key in (1, 2):
        assert sorted(sampler.permute(np.arange(size), size, sampler.hash64(key)).tolist()) == list(
            range(size)
        )


def test_permutations_look_random():
    size, keys = 10, 20_000
    where = sampler.permute(
        np.repeat(np.arange(size), keys), size, np.tile(sampler.hash64(np.arange(keys)), size)
    ).reshape(size, keys)
    counts = np.stack([np.bincount(row, minlength=size) for row in where])
    assert stats.chisquare(counts.ravel()).pvalue > 0.001
    pairs = np.bincount(where[3] * size + where[4], minlength=size * size).reshape(size, size)
    assert (np.diag(pairs) == 0).all()
    assert stats.chisquare(pairs[~np.eye(size, dtype=bool)]).pvalue > 0.001


def test_every_epoch_visits_every_record_once_in_another_order():
    epochs = sampler.sample_index(3, np.arange(5 * 101), 101).reshape(5, 101)
    assert (np.sort(epochs, 1) == np.arange(101)).all()
    assert len({tuple(row) for row in epochs.tolist()}) == 5
    assert not (sampler.sample_index(4, np.arange(101), 101) == epochs[0]).all()


def test_any_part_of_the_stream_is_the_stream():
    whole = sampler.sample_index(1, np.arange(1000), 77)
    for start in (0, 1, 76, 77, 500):
        assert (sampler.sample_index(1, np.arange(start, 1000), 77) == whole[start:]).all()
    backwards = sampler.sample_index(1, np.arange(1000)[::-1], 77)
    assert (backwards[::-1] == whole).all()


def test_attempts_are_other_draws():
    positions = np.arange(2000)
    first, second = (sampler.sample_index(0, positions, 500, attempt) for attempt in (0, 1))
    assert 0 < (first == second).sum() < 20  # one in 500 by chance
    assert second.min() >= 0 and second.max() < 500


def test_a_far_position_costs_nothing():
    begun = time.perf_counter()
    where = sampler.sample_index(0, 10**15 + np.arange(256), 400_000_000)
    assert time.perf_counter() - begun < 0.5
    assert where.min() >= 0 and where.max() < 400_000_000 and len(np.unique(where)) == 256
