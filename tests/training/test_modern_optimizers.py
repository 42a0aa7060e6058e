"""Muon, schedule-free AdamW and the schedule of warm-up, constant rate and decay: against optax and
numpy, on meshes, over a restart."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m3i_jax import config as configuration
from m3i_jax import parallel, schema
from m3i_jax.errors import UserError
from m3i_jax.evaluation import feature_extraction
from m3i_jax.objective import ema, registry
from m3i_jax.training import (
    checkpoint,
    frozen_target,
    muon,
    optimizer,
    schedule_free,
    weight_source,
)
from m3i_jax.training.task import State
from tests import toy

R = np.random.default_rng(0)
PARAMS = {
    "encoder": {
        "blocks": {
            "attention": {"qkv": {"kernel": R.normal(size=(3, 8, 24)), "bias": np.zeros((3, 24))}},
            "mlp": {
                "fc1": {"kernel": R.normal(size=(3, 8, 20))},
                "fc2": {"kernel": R.normal(size=(3, 20, 8))},
            },
        },
        "patch_embed": {"kernel": R.normal(size=(12, 8))},
        "cls_token": R.normal(size=(1, 1, 8)),
    },
}
PARAMS = jax.tree.map(lambda x: np.asarray(x, np.float32), PARAMS)


def gradients(seed: int):
    r = np.random.default_rng(seed)
    return jax.tree.map(lambda x: r.normal(size=x.shape).astype(np.float32), PARAMS)


def newton_schulz(x: np.ndarray) -> np.ndarray:
    """One matrix in float64, written from the definition."""
    flipped = x.shape[0] > x.shape[1]
    x = (x.T if flipped else x).astype(np.float64)
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if flipped else x


def config(**optim) -> schema.Config:
    encoder = schema.Encoder(freeze_patch_embed=False, width=8, heads=2, depth=3)
    settings = {"clip": 0.0, "lr": 0.1, "weight_decay": 0.1, **optim}
    return schema.Config(model=schema.Model(encoder=encoder), optim=schema.Optim(**settings))


def run(settings: schema.Config, steps: int = 3, total: int = 10):
    tx = optimizer.build_chain(settings, steps=total, warmup=0)

    @jax.jit
    def step(grads, opt, params):
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt

    params = jax.tree.map(jnp.asarray, PARAMS)
    opt = tx.init(params)
    for k in range(steps):
        params, opt = step(gradients(k), opt, params)
    return params, opt


def test_muon_is_its_definition_and_optax() -> None:
    """Three steps: every matrix of every layer by itself, query, key and value too, in numpy; the
    MLP also as `optax.contrib.muon` has it; all else as AdamW."""
    params, _ = run(config(rule="muon", schedule="constant"))
    adam, _ = run(config(schedule="constant"))
    for name in ("patch_embed", "cls_token"):
        jax.tree.map(np.testing.assert_array_equal, params["encoder"][name], adam["encoder"][name])
    blocks = params["encoder"]["blocks"]
    np.testing.assert_array_equal(
        blocks["attention"]["qkv"]["bias"], adam["encoder"]["blocks"]["attention"]["qkv"]["bias"]
    )
    start = PARAMS["encoder"]["blocks"]["attention"]["qkv"]["kernel"]
    for layer in range(3):
        for part in range(3):
            columns = slice(8 * part, 8 * part + 8)
            p, m = start[layer, :, columns].astype(np.float64), np.zeros((8, 8))
            for t in range(1, 4):
                grads = gradients(t - 1)["encoder"]["blocks"]["attention"]["qkv"]["kernel"]
                g = grads[layer, :, columns].astype(np.float64)
                m = 0.95 * m + 0.05 * g
                ahead = 0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
                update = 0.2 * 8**0.5 * newton_schulz(ahead)
                p = p - 0.1 * (update + 0.1 * p)
            found = blocks["attention"]["qkv"]["kernel"][layer, :, columns]
            np.testing.assert_allclose(found, p, atol=2e-5)
    theirs = optax.contrib.muon(
        0.1,
        weight_decay=0.1,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda tree: jax.tree.map(
            lambda _: optax.contrib.MuonDimensionNumbers((1,), (2,)), tree
        ),
    )
    mlp = jax.tree.map(jnp.asarray, PARAMS["encoder"]["blocks"]["mlp"])
    state = theirs.init(mlp)
    for k in range(3):
        grads = gradients(k)["encoder"]["blocks"]["mlp"]
        updates, state = jax.jit(theirs.update)(grads, state, mlp)
        mlp = optax.apply_updates(mlp, updates)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), dict(blocks["mlp"]), mlp)


def test_which_parameters_are_matrices() -> None:
    of_muon = {
        "encoder/blocks/attention/qkv/kernel": (2, 8, 24),
        "decoder/projector/mlp/fc1/kernel": (2, 8, 32),
        "text/blocks/mlp/fc2/kernel": (2, 32, 8),
        "head/encoder/layers/mlp/fc1/kernel": (2, 8, 8),
    }
    of_adam = {
        "encoder/blocks/norm1/scale": (2, 8),
        "encoder/registers": (1, 4, 8),
        "encoder/positions": (1, 9, 8),
        "category/kernel": (8, 10),
        "heads/global/projector/layer0/kernel": (8, 8),
        "head/encoder/layers/attention/offsets/kernel": (2, 8, 8),
    }
    assert all(muon.is_matrix(path, shape) for path, shape in of_muon.items())
    assert not any(muon.is_matrix(path, shape) for path, shape in of_adam.items())


@pytest.mark.parametrize("shape", [(1, 4, 1), (1, 2, 2)])
def test_muon_on_a_mesh_computes_the_same(shape, monkeypatch) -> None:
    """Matrices are dealt out whole, here 9 and 3 of them to 4 devices."""
    monkeypatch.setattr(parallel.sharding, "SMALL", 1)
    mesh = parallel.make_mesh(shape, jax.devices()[:4])
    tx = muon.muon_or_adam(momentum=0.95, rms=0.2, b1=0.9, b2=0.95, eps=1e-8)
    grads = gradients(1)
    state = tx.init(PARAMS)
    expected, _ = jax.jit(tx.update)(grads, state)
    layout = parallel.tree_shardings(mesh, grads), parallel.tree_shardings(mesh, state)
    with jax.set_mesh(mesh):
        arguments = jax.device_put((grads, state), layout)
        update = jax.jit(tx.update, in_shardings=layout, out_shardings=layout)
        program = update.lower(*arguments).compile()
        found, _ = program(*arguments)
    if shape == (1, 4, 1):  # whole matrices go to one device, not to all
        text = program.as_text()
        assert "all-to-all" in text and "all-gather" not in text and "all-reduce" not in text
    kernel = found["encoder"]["blocks"]["mlp"]["fc1"]["kernel"]
    assert len({tuple(map(str, s.index)) for s in kernel.addressable_shards}) == 4
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5), jax.device_get(found), expected
    )


def test_schedule_free_is_its_definition() -> None:
    """Three steps in numpy; the matrices decay at y, the token does not."""
    settings = config(rule="schedule_free", schedule="constant", b1=0.8, b2=0.95)
    params, opt = run(settings)
    averaged = schedule_free.averaged_params(opt, params)
    for path, decay in ((("patch_embed", "kernel"), 0.1), (("cls_token",), 0.0)):
        pick = lambda tree, path=path: functools.reduce(lambda n, k: n[k], path, tree["encoder"])
        y = pick(PARAMS).astype(np.float64)
        z, x, v, weights = y.copy(), y.copy(), np.zeros_like(y), 0.0
        for t in range(1, 4):
            g = pick(gradients(t - 1)).astype(np.float64)
            v = 0.95 * v + 0.05 * g**2
            z = z - 0.1 * (g / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + decay * y)
            weights += 0.1**2
            share = 0.1**2 / weights
            x = (1 - share) * x + share * z
            y = 0.8 * x + 0.2 * z
        np.testing.assert_allclose(pick(params), y, atol=2e-5)
        np.testing.assert_allclose(pick(averaged), x, atol=2e-5)


@pytest.mark.parametrize(("sign", "limit"), enumerate(optimizer.LOGIT_SCALE_LIMITS[::-1]))
def test_the_average_of_the_logit_scale_stays_at_its_limit(sign: int, limit: float) -> None:
    """y, z and x after steps that all point beyond it; were z free, x would turn back."""
    settings = config(rule="schedule_free", schedule="constant")
    bounds = optimizer.clamp_parameter("logit_scale", *optimizer.LOGIT_SCALE_LIMITS)
    tx = optimizer.build_chain(settings, steps=200, warmup=0, last=(("bounds", bounds),))
    params = {"logit_scale": jnp.float32(abs(limit - 0.25))}
    grads = {"logit_scale": jnp.float32(1.0 if sign else -1.0)}

    def step(_, both):
        updates, opt = tx.update(grads, both[1], both[0])
        return optax.apply_updates(both[0], updates), opt

    y, opt = jax.lax.fori_loop(0, 200, step, (params, tx.init(params)))
    z, x = opt["schedule_free"].z, schedule_free.averaged_params(opt, y)
    found = [float(tree["logit_scale"]) for tree in (y, z, x)]
    np.testing.assert_allclose(found, limit, atol=0.02)
    assert all(abs(value - 2.3026) < 2.3026 + 1e-5 for value in found)


def test_evaluation_reads_the_average() -> None:
    settings = config(rule="schedule_free", schedule="constant")
    params, opt = run(settings)
    state = State(step=jnp.int32(3), params=params, opt=opt)
    found = feature_extraction.encoder_params(settings, state)
    z = opt["schedule_free"].z
    expected = jax.tree.map(lambda y, z: (y - 0.1 * z) / 0.9, params, z)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, expected)
    adam = dataclasses.replace(state, opt={"adamw": ()})
    assert feature_extraction.encoder_params(settings, adam) is params


def test_the_target_follows_the_average() -> None:
    """What is evaluated, not the point where gradients are taken."""
    settings = config(rule="schedule_free", schedule="constant", b1=0.6)
    target = ema.track_target(0.5, lambda params: params["scale"])
    tx = optimizer.build_chain(settings, steps=9, warmup=0, last=(("target", target),))

    @jax.jit
    def step(params, opt):
        updates, opt = tx.update({"scale": jnp.float32(1.0)}, opt, params)
        params = optax.apply_updates(params, updates)
        return params, opt, schedule_free.averaged_params(opt, params)["scale"]

    params = {"scale": jnp.float32(1.0)}
    opt, expected = tx.init(params), 1.0
    for _ in range(4):
        params, opt, x = step(params, opt)
        expected = 0.5 * expected + 0.5 * float(x)
        np.testing.assert_allclose(float(opt["target"].params), expected, atol=1e-6)
    assert abs(float(x) - float(params["scale"])) > 0.01


def test_prototypes_that_are_held_stay_in_the_average_too() -> None:
    """z of a held parameter does not move, or its average x = (y - (1 - b1) z) / b1 would."""
    settings = schema.Config(
        model=schema.Model(head=schema.Head(prototypes=2)),
        optim=schema.Optim(rule="schedule_free", schedule="constant", freeze_prototypes=0.5),
    )
    tx = optimizer.build_optimizer(settings, registry.form("dino"), steps=6, warmup=0)
    start = {"prototypes": jnp.ones((2, 2)), "projector": {"layer_0": {"kernel": jnp.ones((2, 2))}}}
    start = {"encoder": {"cls_token": jnp.ones((1, 1, 2))}, "heads": {"global": start}}

    @jax.jit
    def step(params, opt):
        more = {"feature_grad_norms": (jnp.ones(()), jnp.ones(())), "mean_logits": {}}
        updates, opt = tx.update(start, opt, params, **more)
        params = optax.apply_updates(params, updates)
        return params, opt, schedule_free.averaged_params(opt, params)

    params, opt, found = start, tx.init(start), []
    for _ in range(4):
        params, opt, averaged = step(params, opt)
        found.append((params["heads"]["global"], averaged["heads"]["global"]))
    moved = [[float(abs(x["prototypes"] - 1).max()) for x in pair] for pair in found]
    np.testing.assert_allclose(moved[:3], 0, atol=1e-6)  # half of six steps
    assert min(moved[3]) > 1e-4
    assert all(float(abs(x["projector"]["layer_0"]["kernel"] - 1).max()) > 1e-4 for x in found[0])


@pytest.mark.parametrize("rule", ["muon", "schedule_free"])
def test_a_restart_changes_no_bit(rule: str, tmp_path) -> None:
    settings = config(rule=rule, schedule="constant")
    tx = optimizer.build_chain(settings, steps=10, warmup=0)

    @jax.jit
    def step(state):
        updates, opt = tx.update(gradients(7), state.opt, state.params)
        return State(state.step + 1, optax.apply_updates(state.params, updates), opt)

    saved = State(jnp.int32(2), *run(settings, 2))
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", 2)
    checkpoints.save(2, saved, {"samples_seen": 32, "fingerprint": "x"})
    checkpoints.wait()
    template = jax.eval_shape(lambda: saved)
    layout = parallel.tree_shardings(parallel.make_mesh((1, 1, 1), jax.devices()[:1]), template)
    restored = checkpoints.restore(2, template, layout)
    checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    jax.tree.map(np.testing.assert_array_equal, step(restored), step(saved))


def test_weights_of_a_schedule_free_run_are_its_average(tmp_path) -> None:
    """What load, --mode=eval, init_from and objective.target_checkpoint read of its checkpoint."""
    settings = toy.settings(optim__rule="schedule_free", optim__schedule="constant")
    params = {"encoder": {"patch_embed": {"kernel": jnp.ones((192, 32))}}, "scalars": jnp.ones(2)}
    z = jax.tree.map(lambda leaf: 3 * leaf, params)
    link = optax.contrib.schedule_free(optax.sgd(1.0), 1.0).init(params)._replace(z=z)
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", 2)
    target = ema.TargetState(
        jnp.int32(1), {"encoder": jax.tree.map(lambda x: 5 * x, params)["encoder"]}
    )
    state = State(jnp.int32(1), params, {"schedule_free": link, "target": target})
    checkpoints.save(1, state, {"samples_seen": 16, "fingerprint": "x"})
    checkpoints.wait()
    checkpoints.close()
    (tmp_path / "config.txt").write_text(configuration.config_to_text(settings))
    path = "encoder/patch_embed/kernel"
    found = weight_source.open_weights(str(tmp_path)).read({path: None})[path]
    np.testing.assert_allclose(found, (1 - 0.1 * 3) / 0.9, rtol=1e-6)
    found = weight_source.open_weights(str(tmp_path), weights="ema").read(
        {path: None, "scalars": None}
    )
    np.testing.assert_allclose(found[path], 5.0)  # the target's own
    np.testing.assert_allclose(found["scalars"], (1 - 0.1 * 3) / 0.9, rtol=1e-6)  # it has none
    encoder = params["encoder"]
    layout = jax.tree.map(lambda leaf: leaf.sharding, encoder)
    found = frozen_target.load_encoder(str(tmp_path), settings, encoder, layout)
    np.testing.assert_allclose(found["patch_embed"]["kernel"], (1 - 0.1 * 3) / 0.9, rtol=1e-6)


def test_schedules() -> None:
    rate = optimizer.lr_schedule(
        schema.Optim(lr=2.0, min_lr=0.5, schedule="wsd", decay_share=0.3), steps=40, warmup=4
    )
    steps = np.arange(40)
    expected = np.select(
        [steps < 4, steps < 28], [2.0 * steps / 4, 2.0], 2.0 - 1.5 * (steps - 28) / 12
    )
    np.testing.assert_allclose([float(rate(k)) for k in steps], expected, rtol=1e-6)
    long = schema.Optim(lr=1.0, schedule="wsd", decay_share=0.9)  # reaches into the warm-up
    rate = optimizer.lr_schedule(long, steps=10, warmup=5)
    np.testing.assert_allclose(
        [float(rate(k)) for k in range(11)],
        [0, 0.2, 0.4, 0.6, 0.8, 1, 0.8, 0.6, 0.4, 0.2, 0],
        atol=1e-6,
    )
    theirs = optax.join_schedules(
        [optax.linear_schedule(0, 1, 5), lambda _: 1.0, optax.linear_schedule(1, 0, 8)], [5, 32]
    )
    ours = optimizer.lr_schedule(
        schema.Optim(lr=1.0, schedule="wsd", decay_share=0.2), steps=40, warmup=5
    )
    np.testing.assert_allclose(
        [float(ours(k)) for k in range(40)], [float(theirs(k)) for k in range(40)], atol=1e-6
    )


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"schedule": "cosine"}, "config.optim.schedule: 'cosine' lowers the learning rate"),
        ({"schedule": "constant", "b1": "0"}, "config.optim.b1: 0.0 must be positive"),
    ],
)
def test_what_schedule_free_refuses(changes, message) -> None:
    optim = {f"optim__{key}": value for key, value in changes.items()}
    with pytest.raises(UserError, match=message):
        toy.settings(optim__rule="schedule_free", **optim)
