"""Randomness on the host: golden values, independence of keys, uniformity and permutations."""

import math

import numpy as np
import pytest
from scipy import stats

from m3i_jax.objective import rng

MANY = 20_000


def test_uniforms_are_a_function_of_the_position():
    full = rng.uniforms(7, rng.CROP, 100, 32, 6)
    for first, rows in ((100, 1), (103, 5), (131, 1)):
        np.testing.assert_array_equal(
            rng.uniforms(7, rng.CROP, first, rows, 6), full[first - 100 : first - 100 + rows]
        )


def test_uniforms_of_other_keys_are_other_numbers():
    base = rng.uniforms(7, rng.CROP, 0, 50, 8)
    others = [
        rng.uniforms(8, rng.CROP, 0, 50, 8),
        rng.uniforms(7, rng.SWAP, 0, 50, 8),
        rng.uniforms(7, rng.CROP, 50, 50, 8),
    ]
    others += [
        rng.uniforms(7, rng.CROP, 0, 50, 8, part=1),
        rng.uniforms(7, rng.CROP, 2**40, 50, 8),
    ]
    for k, a in enumerate([base, *others]):
        for b in [base, *others][:k]:
            assert not np.intersect1d(a, b).size


def test_uniforms_are_uniform():
    u = rng.uniforms(0, rng.CROP, 0, MANY, 5)
    assert u.dtype == np.float64 and u.shape == (MANY, 5) and u.min() >= 0 and u.max() < 1
    counts = np.apply_along_axis(lambda column: np.histogram(column, 50, (0, 1))[0], 0, u)
    chi_square = ((counts - MANY / 50) ** 2 / (MANY / 50)).sum(0)
    assert (chi_square < 49 + 5 * math.sqrt(2 * 49)).all() and (
        chi_square > 49 - 5 * math.sqrt(2 * 49)
    ).all()
    correlation = np.corrcoef(np.concatenate([u, np.roll(u, 1, 0)], 1).T) - np.eye(10)
    assert np.abs(correlation).max() < 5 / math.sqrt(MANY)


def test_uniforms_golden_stream():
    """A sample must have the same crops and masks after an update of numpy."""
    golden = [8754284111654990, 6397069702274852, 2190875705135625, 1490890088417539]
    np.testing.assert_array_equal(
        (rng.uniforms(1, rng.CROP, 5, 1, 4)[0] * 2**53).astype(np.int64), golden
    )


def test_far_positions_and_large_seeds():
    a = rng.uniforms(2**64 - 1, rng.CROP, 2**63 - 1, 2, 4)
    np.testing.assert_array_equal(a[1], rng.uniforms(2**64 - 1, rng.CROP, 2**63, 1, 4)[0])
    assert rng.uniforms(0, rng.CROP, 0, 0, 4).shape == (0, 4)


def test_purposes_are_different():
    used = [
        v
        for k, v in vars(rng).items()
        if k.isupper() and isinstance(v, int) and not k.startswith("_")
    ]
    assert len(used) == len(set(used)) >= 6 and not set(used) & set(rng.SPARE)


def test_hash_is_splitmix64():
    # golden: the first outputs of SplitMix64 seeded with 0 and with 1234567 (Vigna's reference
    # implementation)
    assert rng.hash64(0).tolist() == [0xE220A8397B1DCDAF]
    assert rng.hash64(1234567).tolist() == [6457827717110365317]


def test_hash_separates_its_words():
    h = rng.hash64(np.arange(100)[:, None], np.arange(100)[None])
    assert h.shape == (100, 100) and len(np.unique(h)) == 10_000


@pytest.mark.parametrize("size", [*range(1, 40), 97, 1000, 4096, 10_007])
def test_permutation(size):
    for key in (1, 2):
        assert sorted(rng.permute(np.arange(size), size, rng.hash64(key)).tolist()) == list(
            range(size)
        )


def test_permutations_look_random():
    size, keys = 10, 20_000
    where = rng.permute(
        np.repeat(np.arange(size), keys), size, np.tile(rng.hash64(np.arange(keys)), size)
    ).reshape(size, keys)
    counts = np.stack([np.bincount(row, minlength=size) for row in where])
    assert stats.chisquare(counts.ravel()).pvalue > 0.001
    pairs = np.bincount(where[3] * size + where[4], minlength=size * size).reshape(size, size)
    assert (np.diag(pairs) == 0).all()
    assert stats.chisquare(pairs[~np.eye(size, dtype=bool)]).pvalue > 0.001
