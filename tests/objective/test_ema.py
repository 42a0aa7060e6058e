"""The momentum target: schedule, average, and the transform at the end of an optax chain."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m3i_jax.objective import ema


def encoder(params):
    return params["encoder"]


def test_cosine_momentum_golden():
    schedule = jax.jit(ema.cosine_momentum(0.995, 1000))
    values = [float(schedule(k)) for k in (0, 250, 500, 750, 1000)]
    np.testing.assert_allclose(values, [0.995, 0.9957322, 0.9975, 0.9992678, 1.0], atol=1e-7)


def test_cosine_momentum_is_the_formula_and_ends_at_one():
    k = np.arange(0, 130, 7)
    expected = 1 - (1 - 0.9) * (1 + np.cos(np.pi * np.minimum(k / 100, 1))) / 2
    np.testing.assert_allclose(jax.vmap(ema.cosine_momentum(0.9, 100))(k), expected, atol=2e-7)
    assert float(ema.cosine_momentum(0.9, 100)(10_000)) == 1.0


def test_target_starts_as_a_copy():
    params = {"encoder": {"w": jnp.arange(3.0)}, "decoder": jnp.ones(2)}
    state = ema.track_target(0.9, encoder).init(params)
    np.testing.assert_array_equal(state.params["w"], params["encoder"]["w"])
    assert jax.tree.structure(state.params) == jax.tree.structure(params["encoder"])
    assert (
        state.params["w"].unsafe_buffer_pointer() != params["encoder"]["w"].unsafe_buffer_pointer()
    )
    assert int(state.count) == 0


@pytest.mark.parametrize("momentum", [0.75, ema.cosine_momentum(0.5, 8)])
def test_average_of_the_parameters_after_the_step(momentum):
    tx = optax.named_chain(("sgd", optax.sgd(0.5)), ("target", ema.track_target(momentum, encoder)))
    params = {"encoder": jnp.array([1.0, -2.0]), "decoder": jnp.array(3.0)}
    state, average = tx.init(params), np.array([1.0, -2.0])
    step = jax.jit(
        lambda g, s, p: (lambda u, s: (optax.apply_updates(p, u), s))(*tx.update(g, s, p))
    )
    for k in range(1, 6):
        grads = {"encoder": jnp.array([0.3 * k, 1.0]), "decoder": jnp.array(1.0)}
        params, state = step(grads, state, params)
        m = float(momentum(k)) if callable(momentum) else momentum
        average = m * average + (1 - m) * np.asarray(params["encoder"])
        np.testing.assert_allclose(state["target"].params, average, rtol=5e-6)
    assert int(state["target"].count) == 5


def test_momentum_schedule_gets_the_update_count():
    seen = []
    tx = ema.track_target(lambda k: seen.append(int(k)) or 0.5)
    state = tx.init(jnp.ones(2))
    for _ in range(3):
        _, state = tx.update(jnp.ones(2), state, jnp.ones(2))
    assert seen == [1, 2, 3]


def test_momentum_of_zero_and_one():
    params, updates = jnp.array([1.0, 2.0]), jnp.array([10.0, 20.0])
    for momentum, expected in ((1.0, [1.0, 2.0]), (0.0, [11.0, 22.0])):
        tx = ema.track_target(momentum)
        np.testing.assert_array_equal(
            tx.update(updates, tx.init(params), params)[1].params, expected
        )


def test_updates_pass_through_with_other_arguments():
    plain = optax.adamw(1e-2)
    tx = optax.named_chain(("adamw", plain), ("target", ema.track_target(0.9, encoder)))
    params = {"encoder": jnp.arange(3.0), "decoder": jnp.ones(2)}
    grads = jax.tree.map(lambda x: x - 0.5, params)
    expected, _ = jax.jit(plain.update)(grads, plain.init(params), params)
    got, state = jax.jit(tx.update)(grads, tx.init(params), params, feature_grad_norms=(1.0, 1.0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)
    assert jax.tree.structure(state) == jax.tree.structure(jax.eval_shape(tx.init, params))


def test_dtypes_are_kept():
    params = {"w": jnp.ones(4, jnp.bfloat16), "n": jnp.array([1, 2], jnp.int32)}
    tx = ema.track_target(0.5)
    updates = {"w": jnp.full(4, 2.0, jnp.bfloat16), "n": jnp.array([5, 5], jnp.int32)}
    state = tx.update(updates, tx.init(params), params)[1]
    assert state.params["w"].dtype == jnp.bfloat16 and float(state.params["w"][0]) == 2.0
    assert state.params["n"].tolist() == [6, 7]


def test_parameters_and_state_can_be_donated_together():
    tx = ema.track_target(0.5)
    params, state = jax.jit(lambda: (lambda p: (p, tx.init(p)))(jnp.ones(8)))()
    step = jax.jit(lambda p, s: (p + 1, tx.update(jnp.ones(8), s, p)[1]), donate_argnums=(0, 1))
    params, state = step(params, state)
    np.testing.assert_allclose(state.params, 1.5)


def test_errors():
    for momentum in (-0.1, 1.1):
        with pytest.raises(ValueError, match="momentum"):
            ema.track_target(momentum)
    tx = ema.track_target(0.9)
    with pytest.raises(ValueError, match="params"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    with pytest.raises(ValueError, match="start"):
        ema.cosine_momentum(1.5, 10)
    with pytest.raises(ValueError, match="steps"):
        ema.cosine_momentum(0.9, 0)


def test_steps_share_one_trace():
    """The state keeps shapes, dtypes and weak types, so that no step recompiles."""
    tx = ema.track_target(ema.cosine_momentum(0.9, 10))
    params = {"w": jnp.ones(3, jnp.bfloat16), "count": jnp.int32(3)}

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state, params):
        return tx.update(jax.tree.map(jnp.zeros_like, params), state, params)[1]

    first = state = tx.init(params)
    for _ in range(3):
        state = step(state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, first)
