"""Collapse monitors against numpy."""

import jax
import numpy as np
import pytest

from m3i_jax.objective import posterior, regularize

target_std, effective_rank, second_moment = map(jax.jit, (regularize.target_std, regularize.effective_rank, posterior.second_moment))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_target_std_is_numpy():
    x = 3 + normal(4, 9, 6) * np.arange(1, 7, dtype=np.float32)
    np.testing.assert_allclose(target_std(x), x.reshape(-1, 6).std(0).mean(), rtol=1e-5)
    where = np.random.default_rng(1).random((4, 9)) < 0.5
    wanted = x[where].std(0).mean()
    x[~where] = np.nan
    np.testing.assert_allclose(target_std(x, where), wanted, rtol=1e-5)


def test_target_std_sees_collapse():
    x = np.tile(normal(1, 8), (50, 1))
    assert float(target_std(x)) < 1e-6
    assert float(target_std(posterior.layer_normalize(x))) < 1e-6
    assert float(target_std(x, np.zeros(50))) == 0


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_effective_rank_counts_equal_directions(rank):
    q = np.linalg.qr(normal(8, 8))[0]
    moment = (q[:, :rank] * 5.0) @ q[:, :rank].T
    assert float(effective_rank(moment)) == pytest.approx(rank, rel=1e-3)


def test_effective_rank_is_the_entropy_of_eigenvalues():
    t = normal(200, 6) * np.array([3, 2, 1, 1, 0.5, 0.1], np.float32)
    share = np.linalg.eigvalsh(t.T @ t / 200)
    share = share / share.sum()
    wanted = np.exp(-(share * np.log(share)).sum())
    assert float(effective_rank(second_moment(t))) == pytest.approx(wanted, rel=1e-4)
    assert float(effective_rank(7 * second_moment(t))) == pytest.approx(wanted, rel=1e-4)


def test_effective_rank_of_nothing_is_zero():
    assert float(effective_rank(np.zeros((4, 4)))) == 0


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        regularize.effective_rank(np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        regularize.target_std(np.zeros((3, 4)), np.zeros(2))
