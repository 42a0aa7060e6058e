"""Softmax losses near 0, at CLIP's largest scale: equal to a float64 softmax in numpy, never
negative.

A float32 similarity of 100 is rounded by up to 4e-6, an error of as much in each exp(difference): a
mean over many rows is closer than 1e-5; a loss that one row decides is only as close as its
rounding, which 1e-4 covers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from m3i_jax.objective import contrastive, losses
from m3i_jax.objective.numerics import softmax_cross_entropy
from tests.objective.numeric import normal

SCALE = 100.0


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cross_entropy(logits, index):
    """-log softmax in float64; log1p keeps all digits of a small loss."""
    own = np.take_along_axis(logits, index[..., None], -1)
    others = np.exp(logits - own)
    np.put_along_axis(others, index[..., None], 0, -1)
    return np.log1p(others.sum(-1))


def pairs(closeness, *shape):
    """Two arrays of paired rows; the loss at SCALE decreases with their distance."""
    a = normal(*shape)
    return a, (a + closeness * normal(*shape, seed=1)).astype(np.float32)


def wanted_text(u, v, scale=SCALE):
    logits, own = scale * unit(u) @ unit(v).T, np.arange(len(u))
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)).sum() / 2


def wanted_nt_xent(a, b):
    z = np.concatenate([unit(a), unit(b)])
    logits = np.where(np.eye(len(z), dtype=bool), -np.inf, SCALE * z @ z.T)
    return cross_entropy(logits, np.roll(np.arange(len(z)), len(a))).sum() / 2


def wanted_dense(a, b):
    logits = SCALE * np.einsum("bnd,knd->nbk", unit(a), unit(b))
    return cross_entropy(logits, np.broadcast_to(np.arange(len(a)), logits.shape[:2])).sum()


def wanted_against(a, b):
    others = np.exp(
        SCALE
        * (
            np.einsum("bnd,kd->bnk", unit(a), unit(b.mean(1)))
            - (unit(a) * unit(b)).sum(-1)[..., None]
        )
    )
    return np.log1p(np.where(np.eye(len(a), dtype=bool)[:, None], 0, others).sum(-1)).sum()


def wanted_boltzmann(a, b):
    return cross_entropy(SCALE * unit(a) @ unit(b).T, np.arange(len(a))).sum()


LOSSES = {
    "text": (lambda a, b: losses.text(a, b, np.log(SCALE)), wanted_text, 1),
    "text in chunks": (lambda a, b: losses.text(a, b, np.log(SCALE), chunk=9), wanted_text, 1),
    "boltzmann": (
        lambda a, b: losses.boltzmann(a, b, jnp.arange(len(a)), temperature=1 / SCALE),
        wanted_boltzmann,
        1,
    ),
    "dense_boltzmann": (
        lambda a, b: contrastive.dense_boltzmann(a, b, temperature=1 / SCALE),
        wanted_dense,
        2,
    ),
    "dense_against": (
        lambda a, b: contrastive.densecl(a, b, b.mean(1), temperature=1 / SCALE),
        wanted_against,
        2,
    ),
    "nt_xent": (lambda a, b: contrastive.nt_xent(a, b, temperature=1 / SCALE), wanted_nt_xent, 1),
}


def shape_of(positions, rows, width):
    return (rows, width) if positions == 1 else (rows, positions, width)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("rows", "width", "closeness", "rtol"),
    [(1024, 64, 1.1, 1e-5), (64, 32, 0.5, 1e-4), (64, 32, 0.01, 1e-4)],
)
def test_a_small_loss_is_that_of_float64(name, rows, width, closeness, rtol):
    """Mean losses of 1e-2, 1e-5 and 1e-17, without the rounding error of a similarity, 4e-6."""
    loss, expected, positions = LOSSES[name]
    a, b = pairs(closeness, *shape_of(positions, rows, width))
    total, _ = jax.jit(loss)(a, b)
    assert 0 < expected(a, b) < 0.03 * rows * positions
    np.testing.assert_allclose(total, expected(a, b), rtol=rtol)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_a_small_loss_is_that_of_float64(name):
    """Along a random direction of the first array, by central differences of the float64 loss."""
    loss, expected, positions = LOSSES[name]
    a, b = pairs(0.5, *shape_of(positions, 64, 32))
    move = normal(*a.shape, seed=2)
    got = jnp.vdot(jax.jit(jax.grad(lambda a: loss(a, b)[0]))(a), move)
    a64, step = a.astype(np.float64), 1e-6
    difference = (expected(a64 + step * move, b) - expected(a64 - step * move, b)) / (2 * step)
    np.testing.assert_allclose(got, difference, rtol=2e-4)


@pytest.mark.parametrize("chunk", [0, 100])
def test_rows_split_over_devices_have_the_same_small_loss(chunk):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:8])
    a, b = pairs(1.1, 1024, 64)
    split = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))) for x in (a, b)]
    total, _ = jax.jit(lambda a, b: losses.text(a, b, np.log(SCALE), chunk=chunk))(*split)
    np.testing.assert_allclose(total, wanted_text(a, b), rtol=1e-5)


def test_a_sure_classifier_costs_what_float64_says():
    logits = np.float32([[90.0, 80.0, 75.5], [3.0, -9.25, -20.0], [0.0, 60.0, -60.0]])
    label = np.array([0, 0, 1])
    total, _ = losses.category(logits, label, smoothing=0.0)
    np.testing.assert_allclose(
        total, cross_entropy(logits.astype(np.float64), label).sum(), rtol=1e-6
    )
    np.testing.assert_allclose(
        softmax_cross_entropy(logits, label),
        cross_entropy(logits.astype(np.float64), label),
        rtol=1e-6,
    )


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_is_negative(name):
    loss, _, positions = LOSSES[name]
    totals = jax.jit(jax.vmap(lambda a: loss(a, a)[0]))(normal(20, *shape_of(positions, 32, 512)))
    assert totals.min() >= 0
