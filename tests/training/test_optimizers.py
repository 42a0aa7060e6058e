"""LARS step by step in numpy, under a schedule, with norms that are 0."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m3i_jax.training import update_rules


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lars_is_its_definition(weight_decay: float) -> None:
    """For matrices: decay, trust ratio 0.001 |p| / |g|, 1 where either norm is 0; the rate stands
    outside the momentum. Vectors plainly."""
    r = np.random.default_rng(0)
    shapes = {"kernel": (4, 3), "zero": (2, 2), "bias": (3,)}
    params = {name: r.normal(size=shape) for name, shape in shapes.items()}
    params["zero"][:] = 0
    rate = lambda step: 0.5 * (1 + step)
    tx = optax.chain(*update_rules.lars(rate, weight_decay=weight_decay))
    ours = {name: jnp.asarray(x, jnp.float32) for name, x in params.items()}
    state, buffer = tx.init(ours), {name: np.zeros(shape) for name, shape in shapes.items()}
    for step in range(6):
        grads = {name: r.normal(size=shape) for name, shape in shapes.items()}
        if step == 2:
            grads["kernel"][:] = 0
        updates, state = tx.update(
            {name: jnp.asarray(x, jnp.float32) for name, x in grads.items()}, state, ours
        )
        ours = optax.apply_updates(ours, updates)
        for name, p in params.items():
            g = grads[name]
            if p.ndim > 1:
                g = g + weight_decay * p
                norms = np.linalg.norm(p), np.linalg.norm(g)
                g = g * (0.001 * norms[0] / norms[1] if min(norms) > 0 else 1.0)
            buffer[name] = 0.9 * buffer[name] + g
            params[name] = p - rate(step) * buffer[name]
        for name, p in params.items():
            np.testing.assert_allclose(ours[name], p, rtol=2e-5, atol=1e-6)
    assert np.abs(params["zero"]).max() > 0.1  # a matrix of zeros leaves it
