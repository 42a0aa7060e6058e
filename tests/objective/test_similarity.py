"""The text posterior in chunks: equal to one matrix, without such a matrix in memory, on one device
and on eight."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.special import logsumexp

from m3i_jax.objective import losses, similarity
from tests.objective.numeric import check_gradient, normal

BATCH, WIDTH = 12, 5
GROUP = np.array([0, 1, 1, 2, 3, 3, 3, 4, 5, 6, 0, 7])
WHERE = np.array([1, 1, 0, 1, 0.5, 1, 1, 2, 1, 0, 1, 1], np.float32)


def cost(u, v, s, where=None, group=None, chunk=0):
    return losses.text(u, v, s, where, group_B=group, chunk=chunk)[0]


def compiled(chunk, batch, width, devices=1):
    """The compiled gradient of the loss for rows that are split over devices; it is not run."""
    mesh = jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    rows = jax.ShapeDtypeStruct(
        (batch, width), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data"))
    )
    group = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=rows.sharding)
    gradient = jax.value_and_grad(
        lambda u, v, s, group: cost(u, v, s, jnp.ones(batch), group, chunk), (0, 1, 2)
    )
    return (
        jax.jit(gradient).lower(rows, rows, jax.ShapeDtypeStruct((), jnp.float32), group).compile()
    )


def largest(program):
    """Size of the largest array of a compiled program on one device."""
    return max(
        int(np.prod([int(n) for n in dims.split(",")]))
        for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", program.as_text())
    )


@pytest.mark.parametrize("chunk", [1, 4, 5, 7, 12, 20])
@pytest.mark.parametrize(("where", "group"), [(None, None), (WHERE, None), (WHERE, GROUP)])
def test_chunks_change_no_number(chunk, where, group):
    arguments = normal(BATCH, WIDTH), normal(BATCH, WIDTH, seed=1), jnp.float32(2.0)
    run = jax.jit(jax.value_and_grad(cost, (0, 1, 2)), static_argnames="chunk")
    whole, parts = (run(*arguments, where, group, chunk=c) for c in (0, chunk))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), parts, whole)


def test_chunked_cross_entropy_is_scipy():
    u, v = normal(BATCH, WIDTH), normal(BATCH, WIDTH, seed=1)
    logits = u.astype(np.float64) @ v.T
    logits[(GROUP[:, None] == GROUP) & ~np.eye(BATCH, dtype=bool)] = -np.inf
    rows = similarity.Pairs(jnp.arange(BATCH), group=jnp.asarray(GROUP))
    expected = (logsumexp(logits, 1) + logsumexp(logits, 0)) / 2 - np.diag(logits)
    np.testing.assert_allclose(
        jax.jit(similarity.chunked_cross_entropy, static_argnums=0)(3, u, v, rows),
        expected,
        rtol=1e-5,
    )


def test_gradient_of_chunks_is_that_of_differences():
    check_gradient(
        lambda u, v, s: cost(u, v, s, chunk=2), normal(4, 3), normal(4, 3, seed=1), np.float32(1.5)
    )


def test_rows_that_do_not_count_may_hold_anything():
    u, v = normal(BATCH, WIDTH), normal(BATCH, WIDTH, seed=1)
    bad = np.where(WHERE[:, None] > 0, u, np.nan)
    run = jax.jit(jax.value_and_grad(lambda u: cost(u, v, 2.0, WHERE, GROUP, chunk=5)))
    (value, gradient), (expected, other) = run(bad), run(u)
    assert (
        float(value) == float(expected)
        and np.array_equal(gradient, other)
        and not gradient[2].any()
    )
    nothing = jax.jit(lambda where: cost(u, v, 2.0, where, chunk=5))(np.zeros(BATCH))
    assert float(nothing) == 0


def test_memory_grows_with_the_chunk_and_not_with_the_square_of_the_batch():
    batch, chunk = 2048, 64
    whole, parts = (compiled(c, batch, 16).memory_analysis().temp_size_in_bytes for c in (0, chunk))
    assert whole > 4 * batch * batch
    assert parts < 4 * (5 * batch * chunk + 8 * batch * 16 + batch * chunk)


def test_batch_40_000_of_eight_devices():
    """A device holds the similarities of its rows with one chunk; without chunks, an eighth of the
    matrix."""
    batch = 40_000
    for chunk in (500, 499):
        assert largest(compiled(chunk, batch, 64, devices=8)) == max(
            batch // chunk * chunk * 64, batch // 8 * chunk
        )
    assert largest(compiled(0, batch, 64, devices=8)) == batch * batch // 8
