"""Dynamic weighting: the averages, lambda, and the transform in an optax chain."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m3i_jax.objective import balance


def run(norms, decay=0.9):
    tx = balance.track_balance(decay)
    state = tx.init({"w": jnp.ones(3)})
    step = jax.jit(
        lambda state, norms: tx.update({"w": jnp.ones(3)}, state, feature_grad_norms=norms)[1]
    )
    states = [state]
    for pair in norms:
        states.append(step(states[-1], tuple(map(jnp.float32, pair))))
    return states


def test_first_norm_initialises_the_average():
    states = run([(2.0, 8.0), (4.0, 6.0), (1.0, 1.0)])
    ssp, sp = 2.0, 8.0
    assert (float(states[1].ssp), float(states[1].sp)) == (ssp, sp)
    for state, (a, b) in zip(states[2:], [(4.0, 6.0), (1.0, 1.0)], strict=True):
        ssp, sp = 0.9 * ssp + 0.1 * a, 0.9 * sp + 0.1 * b
        np.testing.assert_allclose((state.ssp, state.sp), (ssp, sp), rtol=1e-6)
    assert [int(s.count) for s in states] == [0, 1, 2, 3]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0.0, -1.0])
def test_zero_and_non_finite_norms_leave_the_average(bad):
    states = run([(2.0, 8.0), (bad, 4.0), (2.0, bad)])
    np.testing.assert_allclose((states[2].ssp, states[2].sp), (2.0, 7.6), rtol=1e-6)
    np.testing.assert_allclose((states[3].ssp, states[3].sp), (2.0, 7.6), rtol=1e-6)
    assert int(states[3].count) == 3


def test_late_group_starts_at_its_first_norm():
    states = run([(2.0, 0.0), (2.0, np.nan), (2.0, 5.0), (2.0, 10.0)])
    assert [float(s.sp) for s in states[:3]] == [0, 0, 0]
    np.testing.assert_allclose([float(s.sp) for s in states[3:]], [5.0, 5.5], rtol=1e-6)


def test_lambda_is_gamma_until_both_groups_have_a_norm():
    states = run([(4.0, 0.0), (4.0, 2.0)])
    weights = [float(jax.jit(lambda s: balance.balance_weight(s, gamma=3.0))(s)) for s in states]
    np.testing.assert_allclose(weights, [3.0, 3.0, 6.0], rtol=1e-6)


def test_lambda_is_gamma_times_the_ratio_and_clipped():
    state = balance.BalanceState(jnp.int32(1), jnp.float32(3.0), jnp.float32(1.5))
    assert float(balance.balance_weight(state)) == pytest.approx(2.0)
    assert float(balance.balance_weight(state, gamma=0.25)) == pytest.approx(0.5)
    assert float(balance.balance_weight(state, limits=(0.0, 1.5))) == 1.5
    assert float(balance.balance_weight(state, limits=(5.0, 10.0))) == 5.0
    tiny = balance.BalanceState(jnp.int32(1), jnp.float32(3.0), jnp.float32(1e-30))
    assert float(balance.balance_weight(tiny)) == 1e4


def test_lambda_makes_the_gradients_equal_at_gamma_one():
    a, b = np.random.default_rng(0).normal(size=(2, 4, 5, 3)).astype(np.float32)
    states = run([(balance.feature_norm(a), balance.feature_norm(5 * b))], decay=0.0)
    lam = balance.balance_weight(states[1])
    np.testing.assert_allclose(
        balance.feature_norm(lam * 5 * b), balance.feature_norm(a), rtol=1e-5
    )


def test_lambda_and_norms_send_no_gradient():
    def loss(x):
        state = balance.BalanceState(jnp.int32(1), x, 2 * x)
        tx = balance.track_balance(0.5)
        _, new = tx.update({}, state, feature_grad_norms=(x * x, x))
        return balance.balance_weight(state)

    assert float(jax.jit(jax.grad(loss))(2.0)) == 0


def test_in_a_chain_updates_pass_through():
    plain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    balanced = optax.named_chain(("balance", balance.track_balance(0.9)), ("rest", plain))
    params = {"w": jnp.arange(3.0), "b": jnp.ones(2)}
    grads = jax.tree.map(lambda x: x + 1, params)
    expected, _ = jax.jit(plain.update)(grads, plain.init(params), params)
    got, state = jax.jit(balanced.update)(
        grads, balanced.init(params), params, feature_grad_norms=(1.0, 2.0)
    )
    jax.tree.map(np.testing.assert_allclose, got, expected)
    assert float(state["balance"].sp) == 2.0
    assert all(x.dtype == jnp.float32 for x in state["balance"][1:])


def test_feature_norm():
    tree = {
        "z": np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32),
        "cls": [np.full(2, 3.0, np.float32)],
    }
    expected = np.sqrt((tree["z"] ** 2).sum() + 18)
    np.testing.assert_allclose(jax.jit(balance.feature_norm)(tree), expected, rtol=1e-6)
    assert float(balance.feature_norm({})) == 0


def test_feature_norm_is_float32_for_bfloat16_inputs():
    many = jnp.full((512, 64), 1.0, jnp.bfloat16)  # a bfloat16 sum would saturate at 256
    norm = balance.feature_norm(many)
    assert norm.dtype == jnp.float32 and float(norm) == pytest.approx(np.sqrt(512 * 64))


def test_feature_norm_combines_parts_of_a_batch():
    z = np.random.default_rng(0).normal(size=(8, 5, 3)).astype(np.float32)
    parts = [balance.feature_norm(z[k : k + 2]) for k in range(0, 8, 2)]
    np.testing.assert_allclose(balance.feature_norm(parts), balance.feature_norm(z), rtol=1e-6)


def test_errors():
    for decay in (-0.1, 1.0, np.nan):
        with pytest.raises(ValueError, match="decay"):
            balance.track_balance(decay)
    tx = balance.track_balance(0.9)
    with pytest.raises(ValueError, match="feature_grad_norms"):
        tx.update({}, tx.init({}))
    for limits in ((-1.0, 2.0), (3.0, 2.0)):
        with pytest.raises(ValueError, match="limits"):
            balance.balance_weight(tx.init({}), limits=limits)


def test_steps_share_one_trace():
    """The state keeps shapes, dtypes and weak types, so that no step recompiles."""
    tx, updates = balance.track_balance(0.9), {"w": jnp.ones(3)}

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state, norms):
        return tx.update(updates, state, feature_grad_norms=norms)[1]

    first = state = tx.init(updates)
    for norms in ((2.0, 0.0), (3.0, 1.0), (float("nan"), 4.0)):
        state = step(state, norms)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, first)
