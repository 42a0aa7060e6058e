"""Losses under settings of JAX that a program may have: 64-bit mode, strict promotion of types, the
search for NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import m3i_jax
from m3i_jax import schema
from m3i_jax.augment import dense_photometric, mixup, photometric
from tests.objective.numeric import normal
from tests.objective.public_losses import LOSSES


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_float32_in_64_bit_mode(name):
    function, rows, shared = LOSSES[name]
    with jax.enable_x64(True):
        value, grads = jax.eval_shape(
            jax.value_and_grad(lambda shared: function(rows, shared)), jnp.asarray(shared)
        )
    assert value.dtype == grads.dtype == jnp.float32


@pytest.mark.parametrize("name", LOSSES)
def test_losses_promote_types_explicitly(name):
    function, rows, shared = LOSSES[name]
    rows = jax.tree.map(jnp.asarray, rows)
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(jax.grad(lambda shared: function(rows, shared)), jnp.asarray(shared))


@pytest.mark.parametrize("kind", ["uint8", "int8", "int16"])
def test_labels_of_few_bits_are_promoted_explicitly(kind):
    x, label = normal(4, 3), np.array([0, 1, 2, 2])
    wanted = m3i_jax.category(x, label)[0], m3i_jax.boltzmann(x, x[:3], label)[0]
    few = jnp.asarray(label, kind)
    with jax.numpy_dtype_promotion("strict"):
        got = m3i_jax.category(x, few)[0], m3i_jax.boltzmann(x, x[:3], few)[0]
    assert got == wanted


def test_values_of_64_bit_mode_are_those_of_32():
    """Estimators with random directions, assignments, first values, and the draws of colours."""
    x, cost = normal(16, 4), normal(3, 5, seed=1)
    position = np.array([[0, 7], [0, 8]], np.uint32)
    layer = m3i_jax.DCNv3(width=2, groups=1)

    def values():
        return {
            "sigreg": m3i_jax.sigreg(x, key=jax.random.key(0), slices=8),
            "coding_rate": m3i_jax.coding_rate(x),
            "token_similarity": m3i_jax.token_similarity(x[None], x[None, :, ::-1]),
            "hungarian": m3i_jax.hungarian(cost),
            "first values": layer.init(jax.random.key(0)),
            "colours": photometric.draw_photometric(
                position, seed=0, view=0, settings=schema.Augment()
            ),
            "mixup": mixup.draw_mixup(
                position, seed=0, size=8, settings=schema.Augment(mixup=0.8, cutmix=1.0)
            ),
            "colours of maps": dense_photometric.draw_distortion(position, seed=0),
        }

    wanted = jax.jit(values)()
    with jax.enable_x64(True):
        got = jax.jit(values)()

    def compare(a, b):
        floats = jnp.issubdtype(a.dtype, jnp.floating)
        assert not floats or a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    jax.tree.map(compare, got, wanted)


def test_a_label_beyond_32_bits_does_not_exist():
    with jax.enable_x64(True):
        label = jnp.array([2**32 + 1, 1], jnp.int64)
        cost = m3i_jax.boltzmann(jnp.zeros((2, 3)), jnp.zeros((2, 3)), label)[0]
        assert np.isnan(cost)
        assert np.isfinite(m3i_jax.boltzmann(jnp.zeros((2, 3)), jnp.zeros((2, 3)), label % 2)[0])


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32"])
def test_averages_promote_types_explicitly(kind):
    tx = m3i_jax.track_target(lambda k: jnp.float32(0.75))
    params = {"a": jnp.asarray([1.0, 3.0], kind), "n": jnp.arange(2)}
    zero = jax.tree.map(jnp.zeros_like, params)

    def run():
        state = tx.init(jax.tree.map(lambda x: x + x, params))
        return tx.update(zero, state, params)[1].params

    with jax.numpy_dtype_promotion("strict"):
        got = run()
    assert got["a"].dtype == kind
    np.testing.assert_array_equal(got["a"].astype(np.float32), [1.75, 5.25])
    assert got["n"].tolist() == [0, 1]


def nan_free_calls():
    z = normal(3, 4)
    where = np.array([1.0, 0, 1])
    tokens = normal(2, 3, 5)
    return {
        "category": lambda label: m3i_jax.category(z, np.array([1, label, 0])),
        "category of weight 0": lambda label: m3i_jax.category(z, np.array([1, label, 0]), where),
        "boltzmann": lambda label: m3i_jax.boltzmann(z, z, np.array([1, label, 0]), where),
        "dense_boltzmann": lambda label: m3i_jax.dense_boltzmann(
            tokens,
            tokens,
            np.array([[1.0] * 3, [0.0] * 3]),
            index_B=np.array([0, label]),
            temperature=1.0,
        ),
        "caption": lambda label: m3i_jax.caption(
            tokens, np.array([[1, 2, label], [0, 4, 3]]), np.array([[1, 1, 0], [1.0] * 3])
        ),
        "pixel_cross_entropy": lambda label: m3i_jax.pixel_cross_entropy(
            z, np.array([1, label, 0]), label
        ),
    }


@pytest.mark.parametrize("name", nan_free_calls())
def test_labels_of_weight_0_make_no_nan_anywhere(name):
    call = nan_free_calls()[name]
    wanted = call(-1)
    with jax.debug_nans(True):
        got = call(-1)
    assert [float(x) for x in got] == [float(x) for x in wanted]


def test_counted_labels_that_do_not_exist_are_found():
    assert np.isnan(m3i_jax.category(normal(2, 3), np.array([3, 0]))[0])
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        m3i_jax.category(normal(2, 3), np.array([3, 0]))
