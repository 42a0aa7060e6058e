"""Pairing, mixing and un-mixing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax.objective import masks, mixing

B, N, K, P = 6, 16, 8, 5
MASK = masks.blockwise(0, 0, B, grid=4, hidden=N - K)
X = np.random.default_rng(0).normal(size=(B, N, P)).astype(np.float32)
OTHER = np.arange(B) ^ 1

partner, mix, gather = map(jax.jit, (mixing.partner, mixing.mix, mixing.gather))
split, unmix = (jax.jit(f, static_argnames="own") for f in (mixing.split, mixing.unmix))


def test_partner_is_the_neighbour():
    np.testing.assert_array_equal(partner(X), X[OTHER])
    np.testing.assert_array_equal(partner(partner(X)), X)
    assert partner(np.arange(B, dtype=np.uint8)).dtype == jnp.uint8


def test_mix_is_the_formula():
    m = MASK[..., None].astype(np.float32)
    np.testing.assert_array_equal(mix(X, MASK), m * X + (1 - m) * X[OTHER])


@pytest.mark.parametrize("shape", [(B, N), (B, N, 2, 3)])
def test_mix_of_any_rank_and_type(shape):
    x = np.random.default_rng(1).integers(0, 255, shape).astype(np.uint8)
    expected = np.where(MASK.reshape(MASK.shape + (1,) * (len(shape) - 2)), x, x[OTHER])
    got = mix(x, MASK)
    np.testing.assert_array_equal(got, expected)
    assert got.dtype == jnp.uint8


def test_swapping_roles_leaves_the_mix_unchanged():
    np.testing.assert_array_equal(mix(X[OTHER], ~MASK), mix(X, MASK))


def test_mixing_pixels_is_mixing_embeddings():
    kernel, bias = (
        np.random.default_rng(2).normal(size=(P, 7)).astype(np.float32),
        np.arange(7, dtype=np.float32),
    )
    np.testing.assert_allclose(
        mix(X, MASK) @ kernel + bias, mix(X @ kernel + bias, MASK), rtol=1e-5, atol=1e-5
    )


def test_mix_sends_each_gradient_to_the_cell_that_was_shown():
    weight = np.random.default_rng(3).normal(size=X.shape).astype(np.float32)
    grad = jax.jit(jax.grad(lambda x: (mixing.mix(x, MASK) * weight).sum()))(X)
    shown = MASK[..., None] * weight + (~MASK[OTHER])[..., None] * weight[OTHER]
    np.testing.assert_allclose(grad, shown, rtol=1e-6)


@pytest.mark.parametrize(("grid", "hidden"), [(4, 8), (4, 5), (4, 0), (4, 16), (14, 98)])
def test_split_partitions_the_cells(grid, hidden):
    mask = masks.blockwise(1, 0, B, grid=grid, hidden=hidden)
    own, other = split(mask, own=grid**2 - hidden)
    assert (
        own.shape == (B, grid**2 - hidden)
        and other.shape == (B, hidden)
        and own.dtype == other.dtype == jnp.int32
    )
    for b in range(B):
        np.testing.assert_array_equal(own[b], np.flatnonzero(mask[b]))
        np.testing.assert_array_equal(other[b], np.flatnonzero(~mask[b]))


def test_gather():
    index = np.random.default_rng(4).integers(0, N, (B, 3))
    np.testing.assert_array_equal(gather(X, index), X[np.arange(B)[:, None], index])
    np.testing.assert_array_equal(gather(X[..., 0], index), X[np.arange(B)[:, None], index, 0])
    grad = jax.jit(jax.grad(lambda x: mixing.gather(x, np.zeros((B, 3), int)).sum()))(X)
    # an index that occurs three times counts three times
    np.testing.assert_array_equal(grad[:, 0], np.full((B, P), 3.0))
    assert not np.any(grad[:, 1:])


@pytest.mark.parametrize("hidden", [8, 5])
def test_unmix_takes_a_mixed_sequence_apart(hidden):
    mask = masks.blockwise(2, 0, B, grid=4, hidden=hidden)
    own, other = unmix(mix(X, mask), mask, own=N - hidden)
    for b in range(B):
        np.testing.assert_array_equal(own[b], X[b][mask[b]])
        np.testing.assert_array_equal(other[b], X[b ^ 1][~mask[b]])


def test_unmix_is_two_gathers_with_the_same_gradient():
    weight = np.random.default_rng(5).normal(size=X.shape).astype(np.float32)

    def loss(separate, x):
        own, other = separate(x)
        return (own * weight[:, :K]).sum() + 2 * (other * weight[:, K:]).sum()

    def gathers(x):
        own, other = mixing.split(MASK, K)
        return mixing.gather(x, own), mixing.gather(x, other)

    permuted = jax.jit(jax.grad(lambda x: loss(lambda x: mixing.unmix(x, MASK, K), x)))
    gathered = jax.jit(jax.grad(lambda x: loss(gathers, x)))
    np.testing.assert_array_equal(permuted(X), gathered(X))
    assert "scatter" not in permuted.lower(X).as_text() and "scatter" in gathered.lower(X).as_text()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: mixing.partner(np.zeros((3, 2))), r"\(3, 2\)"),
        (lambda: mixing.partner(np.zeros(())), r"even"),
        (lambda: mixing.mix(np.zeros((3, 4)), np.zeros((3, 4), bool)), r"\(3, 4\)"),
        (lambda: mixing.mix(np.zeros((2, 4, 1)), np.zeros((2, 5), bool)), r"\(2, 4, 1\).*\(2, 5\)"),
        (lambda: mixing.split(np.zeros(4, bool), 2), r"\(4,\)"),
        (lambda: mixing.split(np.zeros((2, 4), bool), 5), r"own is 5.*\(2, 4\)"),
        (lambda: mixing.gather(np.zeros((2, 4)), np.zeros((3, 1), int)), r"\(2, 4\).*\(3, 1\)"),
        (
            lambda: mixing.unmix(np.zeros((2, 5, 1)), np.zeros((2, 4), bool), 2),
            r"\(2, 5, 1\).*\(2, 4\)",
        ),
    ],
)
def test_wrong_shapes_are_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()
