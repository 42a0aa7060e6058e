"""Collapse monitors against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax.objective import collapse, losses

target_std, effective_rank, second_moment = map(
    jax.jit, (collapse.target_std, collapse.effective_rank, losses.second_moment)
)
spread, alignment, uniformity = map(
    jax.jit, (collapse.centered_energy, collapse.alignment, collapse.uniformity)
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_target_std_is_numpy():
    x = 3 + normal(4, 9, 6) * np.arange(1, 7, dtype=np.float32)
    np.testing.assert_allclose(target_std(x), x.reshape(-1, 6).std(0).mean(), rtol=1e-5)
    where = np.random.default_rng(1).random((4, 9)) < 0.5
    expected = x[where].std(0).mean()
    x[~where] = np.nan
    np.testing.assert_allclose(target_std(x, where), expected, rtol=1e-5)


def test_target_std_detects_collapse():
    x = np.tile(normal(1, 8), (50, 1))
    assert float(target_std(x)) < 1e-6
    assert float(target_std(losses.layer_normalize(x))) < 1e-6
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
    expected = np.exp(-(share * np.log(share)).sum())
    assert float(effective_rank(second_moment(t))) == pytest.approx(expected, rel=1e-4)
    assert float(effective_rank(7 * second_moment(t))) == pytest.approx(expected, rel=1e-4)


def test_effective_rank_of_zero_matrix_is_zero():
    assert float(effective_rank(np.zeros((4, 4)))) == 0


def test_centered_energy_is_numpy_and_scale_free():
    t = 0.5 + normal(50, 6)
    expected = 1 - (t.mean(0) ** 2).sum() / (t**2).sum(1).mean()
    assert float(spread(t.mean(0), second_moment(t))) == pytest.approx(expected, rel=1e-4)
    assert float(spread(100 * t.mean(0), second_moment(100 * t))) == pytest.approx(
        expected, rel=1e-4
    )


def test_centered_energy_detects_collapse_after_layer_norm():
    t = np.tile(normal(1, 8), (50, 1))
    for x in (t, np.asarray(losses.layer_normalize(t))):
        assert 0 <= float(spread(x.mean(0), second_moment(x))) < 1e-5
    assert float(spread(np.zeros(3), np.zeros((3, 3)))) == 0
    assert float(spread(np.zeros(3), np.eye(3))) == 1


def unit(x):
    return x / np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True)


def test_alignment_is_numpy():
    a, b, where = normal(6, 5), normal(6, 5, seed=1), np.array([1, 0, 0.5, 1, 0, 2], np.float32)
    square = ((unit(a) - unit(b)) ** 2).sum(1)
    np.testing.assert_allclose(alignment(a, b), square.mean(), rtol=1e-5)
    np.testing.assert_allclose(alignment(3 * a, 0.2 * b), square.mean(), rtol=1e-5)
    a[1], b[4] = np.nan, np.inf
    np.testing.assert_allclose(
        alignment(a, b, where), (square * where).sum() / where.sum(), rtol=1e-5
    )
    assert float(alignment(a, a, where)) == 0 and float(alignment(a, b, np.zeros(6))) == 0


@pytest.mark.parametrize("t", [2.0, 500.0])
def test_uniformity_is_numpy(t):
    """At the largest t, exp(-t |u - v|^2) underflows to 0 in float32."""
    x = normal(6, 5)

    def expected(rows):
        u = unit(rows)
        log_pairs = [-t * ((u[i] - u[j]) ** 2).sum() for i in range(len(u)) for j in range(i)]
        return np.logaddexp.reduce(log_pairs) - np.log(len(log_pairs))

    np.testing.assert_allclose(
        jax.jit(collapse.uniformity, static_argnames="t")(x, t=t), expected(x), rtol=1e-5
    )
    where = np.array([1, 0, 1, 1, 0, 1], bool)
    kept, x[~where] = expected(x[where]), np.nan
    np.testing.assert_allclose(
        jax.jit(collapse.uniformity, static_argnames="t")(x, where, t=t), kept, rtol=1e-5
    )


def test_uniformity_weights_count_like_copies_of_other_images():
    x, w = normal(4, 3), np.array([2.0, 1.0, 0.5, 1.0])
    u = unit(x)
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    kernel = sum(w[i] * w[j] * np.exp(-2 * ((u[i] - u[j]) ** 2).sum()) for i, j in pairs) / sum(
        w[i] * w[j] for i, j in pairs
    )
    np.testing.assert_allclose(uniformity(x, w), np.log(kernel), rtol=1e-5)


def test_uniformity_excludes_self_pairs():
    assert float(uniformity(np.array([[1.0, 0.0], [-1.0, 0.0]]))) == -8


def test_uniformity_at_collapse_and_without_images():
    collapsed = float(uniformity(np.tile(normal(1, 300), (40, 1))))
    assert -1e-4 < collapsed <= 0
    assert float(uniformity(normal(200, 64))) < -3.5
    assert (
        float(uniformity(normal(3, 4), np.array([0, 1, 0]))) == 0
        and float(uniformity(normal(3, 4), np.zeros(3))) == 0
    )


def test_monitors_take_bfloat16_and_have_no_gradient():
    x, y = normal(6, 4), normal(6, 4, seed=1)
    for f in (
        target_std,
        uniformity,
        lambda x: alignment(x, y),
        lambda x: spread(x.mean(0), second_moment(x)),
    ):
        low = jax.jit(f)(jnp.asarray(x, jnp.bfloat16))
        value, grad = jax.jit(jax.value_and_grad(f))(x)
        assert low.dtype == jnp.float32 and float(low) == pytest.approx(float(value), rel=0.02)
        assert not np.any(grad)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        collapse.effective_rank(np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"\(2,\).*\(3\)"):
        collapse.target_std(np.zeros((3, 4)), np.zeros(2))
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(3, 3\)"):
        collapse.centered_energy(np.zeros(3), np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        collapse.centered_energy(np.zeros((3, 4)), np.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(2, 4\)"):
        collapse.alignment(np.zeros((3, 4)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"\(3, 4, 5\)"):
        collapse.uniformity(np.zeros((3, 4, 5)))
    with pytest.raises(ValueError, match=r"\(2,\).*\(3\)"):
        collapse.uniformity(np.zeros((3, 4)), np.zeros(2))
