"""Deformable attention against its definition in float64, written with loops over the four cells
around every sample, in every form and with its gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import m3i_jax
from m3i_jax.models.dense import deformable_attention as attention
from m3i_jax.models.dense.deformable_attention import deformable_attention

SHAPES = ((6, 7), (3, 4), (1, 2))
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def inputs(*, queries=5, heads=2, channels=4, points=3, seed=0):
    """Values, locations, weights and the gradient of the output; some places are outside."""
    rng = np.random.default_rng(seed)
    tokens = sum(h * w for h, w in SHAPES)
    locations = rng.uniform(-0.4, 1.4, (2, queries, heads, len(SHAPES), points, 2))
    locations[rng.random(locations.shape) < 0.1] *= 20
    sizes = np.array(SHAPES)[:, None, ::-1]
    cells = locations * sizes - 0.5
    near = np.abs(cells - np.round(cells)) < 0.02  # a kink is no place to compare slopes
    locations += near * 0.05 / sizes
    weights = rng.dirichlet(np.ones(len(SHAPES) * points), (2, queries, heads))
    arrays = (
        rng.normal(size=(2, tokens, heads, channels)),
        locations,
        weights.reshape(2, queries, heads, len(SHAPES), points),
        rng.normal(size=(2, queries, heads * channels)),
    )
    return tuple(a.astype(np.float32) for a in arrays)


def reference(value, locations, weights, grad):
    """(y, dvalue, dlocations, dweights) in float64, one sample at a time."""
    value, locations, weights, grad = (
        np.asarray(a, np.float64) for a in (value, locations, weights, grad)
    )
    b, queries, heads, levels, points = weights.shape
    grad = grad.reshape(b, queries, heads, -1)
    y, start = np.zeros(grad.shape), np.cumsum([0, *(h * w for h, w in SHAPES)])
    dvalue, dlocations, dweights = (np.zeros(a.shape) for a in (value, locations, weights))
    for i, q, m, level, p in np.ndindex(b, queries, heads, levels, points):
        height, width = SHAPES[level]
        u, v = locations[i, q, m, level, p]
        column, row, weight = u * width - 0.5, v * height - 0.5, weights[i, q, m, level, p]
        for r in range(height):
            for c in range(width):
                hat_y, hat_x = max(0, 1 - abs(row - r)), max(0, 1 - abs(column - c))
                if not hat_y or not hat_x:
                    continue
                cell = start[level] + r * width + c
                along = value[i, cell, m] @ grad[i, q, m]
                y[i, q, m] += weight * hat_y * hat_x * value[i, cell, m]
                dvalue[i, cell, m] += weight * hat_y * hat_x * grad[i, q, m]
                dweights[i, q, m, level, p] += hat_y * hat_x * along
                slopes = np.sign(c - column) * hat_y * width, np.sign(r - row) * hat_x * height
                dlocations[i, q, m, level, p] += weight * along * np.array(slopes)
    return y.reshape(b, queries, -1), dvalue, dlocations, dweights


@functools.cache
def compiled(method):
    def both(value, locations, weights, grad):
        call = lambda *arrays: deformable_attention(arrays[0], SHAPES, *arrays[1:], method=method)
        y, back = jax.vjp(call, value, locations, weights)
        return y, *back(grad)

    return jit(both)


@pytest.mark.parametrize("method", ["auto", "fused", "dense", "band", "kernel", "gather"])
def test_value_and_gradients(method, monkeypatch):
    monkeypatch.setattr(attention, "_BAND_QUERIES", 2)  # five queries: three bands, one padded
    arrays = inputs()
    for name, ours, theirs in zip(
        ("y", "dvalue", "dlocations", "dweights"),
        compiled(method)(*arrays),
        reference(*arrays),
        strict=True,
    ):
        most = 1e-5 if name == "y" else 1e-4
        np.testing.assert_allclose(
            ours, theirs, rtol=0, atol=most * np.abs(theirs).max(), err_msg=f"{method} {name}"
        )


def test_sums_of_bfloat16_values_are_wide():
    value, locations, weights, _ = inputs(seed=1)
    run = jit(lambda value: deformable_attention(value, SHAPES, locations, weights))
    low = jnp.asarray(value, jnp.bfloat16)
    y, exact = run(low), run(low.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    # each level is rounded once and their sum once more
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=0, atol=2**-7)


def test_the_form_follows_platform_and_size():
    def forms(cells, queries, use_kernel=False):
        return dict(attention._methods(cells, queries, use_kernel))

    assert forms(64, 300) == {"cpu": "fused", "tpu": "dense", "default": "dense"}
    assert forms(1000, 20_000) == {"cpu": "fused", "tpu": "band", "default": "gather"}
    assert forms(1000, 20_000, True) == {"cpu": "fused", "tpu": "kernel", "default": "kernel"}


def test_what_does_not_fit_is_refused():
    value, locations, weights, _ = inputs()
    with pytest.raises(ValueError, match=re.escape("have 42 cells and the values 56 tokens")):
        deformable_attention(value, SHAPES[:1], locations[:, :, :, :1], weights[:, :, :, :1])
    with pytest.raises(ValueError, match=re.escape("weights have shape (2, 5, 2, 2, 3)")):
        deformable_attention(value, SHAPES, locations, weights[:, :, :, :2])
    with pytest.raises(ValueError, match="method 'cuda' is not one of auto, dense"):
        deformable_attention(value, SHAPES, locations, weights, method="cuda")


def test_it_is_a_name_of_the_package():
    assert m3i_jax.deformable_attention is deformable_attention
    assert "deformable_attention" in dir(m3i_jax)
