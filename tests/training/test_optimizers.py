"""LARS step by step in numpy, under a schedule, with norms that are 0; and the rate in the log."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m3i_jax import schema
from m3i_jax.training import optimizer, step, update_rules
from m3i_jax.training.task import State, StepGradients


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
    for k in range(6):
        grads = {name: r.normal(size=shape) for name, shape in shapes.items()}
        if k == 2:
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
            params[name] = p - rate(k) * buffer[name]
        for name, p in params.items():
            np.testing.assert_allclose(ours[name], p, rtol=2e-5, atol=1e-6)
    assert np.abs(params["zero"]).max() > 0.1  # a matrix of zeros leaves it


def test_every_layer_of_a_stack_has_its_trust_ratio() -> None:
    """As where each block of a network has separate arrays."""
    r = np.random.default_rng(1)
    p, g = (r.normal(size=(3, 4, 2)) * np.array([1, 10, 100])[:, None, None] for _ in range(2))
    p[2] = 0
    tx = optax.chain(*update_rules.lars(1.0, momentum=0.0))
    for path in ("blocks", "pool"):
        params = {path: {"kernel": jnp.asarray(p, jnp.float32)}}
        grads = {path: {"kernel": jnp.asarray(g, jnp.float32)}}
        updates, _ = tx.update(grads, tx.init(params), params)
        axes = (1, 2) if path == "blocks" else (0, 1, 2)
        norms = [np.sqrt((x**2).sum(axes, keepdims=True)) for x in (p, g)]
        ratio = np.where(norms[0] > 0, 0.001 * norms[0] / norms[1], 1.0)
        np.testing.assert_allclose(updates[path]["kernel"], -ratio * g, rtol=1e-5)


def test_the_log_has_the_rate_of_the_update() -> None:
    """A skipped step does not move the schedule, and is left out where the log computes it."""
    optim = schema.Optim(rule="lars", b1=0.0, clip=0.0, lr=1.0, warmup_steps=0)
    settings = schema.Config(optim=optim, train=schema.Train(steps=8))
    tx = optimizer.build_chain(settings, steps=8, warmup=0)
    rate = optimizer.lr_schedule(optim, steps=8, warmup=0)

    class Bias:
        config = settings

        def gradients(self, params: Any, opt: Any, batch: jax.Array) -> StepGradients:
            return StepGradients({"bias": batch}, batch, {}, {})

    params = {"bias": jnp.zeros(())}
    state, logged, moved = State(jnp.int32(0), params, tx.init(params)), [], []
    for k, batch in enumerate((1.0, np.nan, 1.0, np.nan, 1.0), 1):
        before = float(state.params["bias"])
        state, metrics = step.train_step(Bias(), tx, state, jnp.float32(batch))
        if not metrics["skipped/not_finite"]:
            logged.append(float(rate(k - int(metrics["skipped/steps"]) - 1)))
            moved.append(before - float(state.params["bias"]))
    np.testing.assert_allclose(moved, logged, rtol=1e-5)
    np.testing.assert_allclose(moved, [float(rate(k)) for k in range(3)], rtol=1e-5)
