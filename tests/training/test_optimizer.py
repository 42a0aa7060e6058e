"""The optimizer chain: what is decayed, the schedules, every link against numpy, and the state that
must survive a restart."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m3i_jax import schema
from m3i_jax.config import load_config
from m3i_jax.models import m3i
from m3i_jax.objective import derived_terms, ema
from m3i_jax.objective import terms as objective_terms
from m3i_jax.parallel.sharding import path_text
from m3i_jax.training import optimizer
from tests import toy

BLOCK = [
    "attention/out/bias",
    "attention/qkv/bias",
    "mlp/fc1/bias",
    "mlp/fc2/bias",
    "norm1/bias",
    "norm1/scale",
    "norm2/bias",
    "norm2/scale",
]
NOT_DECAYED = {
    *(f"{tower}/blocks/{leaf}" for tower in ("encoder", "decoder", "text") for leaf in BLOCK),
    "encoder/cls_token",
    "encoder/patch_embed/bias",
    "decoder/embed/bias",
    "decoder/head/bias",
    "decoder/mask_token",
    "decoder/position_map/bias",
    *(f"pool/{name}/bias" for name in ("query", "key", "value", "out")),
    *(
        f"pool/{name}/{leaf}"
        for name in ("norm_query", "norm_key", "norm_value")
        for leaf in ("scale", "bias")
    ),
    "category/bias",
    "text/norm/scale",
    "text/norm/bias",
    "text/positions",
    "logit_scale",
}
ROOT = pathlib.Path(__file__).parents[2]
ZERO = {"feature_grad_norms": (0.0, 0.0)}


def shapes(config: schema.Config):
    return jax.eval_shape(
        lambda key: m3i.init(
            config,
            key,
            objective_terms.FORMS["m3i"],
            classes=toy.CLASSES,
            vocabulary=toy.VOCABULARY,
        ),
        jax.random.key(0),
    )


def names(tree, keep=lambda leaf: True) -> set[str]:
    return {
        path_text(path) for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if keep(leaf)
    }


@pytest.mark.parametrize("final_norm", [False, True])
def test_exactly_these_leaves_are_not_decayed(final_norm: bool) -> None:
    params = shapes(toy.settings(model__encoder__final_norm=final_norm))
    norm = {"encoder/norm/scale", "encoder/norm/bias"} if final_norm else set()
    assert names(optimizer.decay_mask(params), lambda kept: not kept) == NOT_DECAYED | norm
    frozen = optimizer.decay_mask(params, frozen=("encoder/patch_embed/",))
    assert names(frozen, lambda kept: not kept) == NOT_DECAYED | norm | {
        "encoder/patch_embed/kernel"
    }
    assert names(frozen) == names(params)  # a tree of the same structure, so that it can be a mask


def test_kernels_and_the_token_table_are_decayed() -> None:
    decayed = names(optimizer.decay_mask(shapes(toy.settings())), bool)
    assert all(name.endswith(("kernel", "token_table")) for name in decayed)
    assert {
        "text/token_table",
        "category/kernel",
        "decoder/position_map/kernel",
        "encoder/blocks/attention/qkv/kernel",
    } <= decayed


def test_lengths_of_prototypes_and_of_stages_are_not_decayed() -> None:
    head = {"prototypes": np.zeros((4, 2)), "prototype_norms": np.zeros(4)}
    params = {
        "heads": {"global": head | {"projector": {"layer_0": {"kernel": np.zeros((2, 2))}}}},
        "encoder": {"gamma": {"stage1": np.zeros(2)}},
    }
    assert names(optimizer.decay_mask(params), bool) == {"heads/global/projector/layer_0/kernel"}


@pytest.mark.parametrize("name", ["siglip", "siglip2", "cap", "cappa", "locca"])
def test_methods_of_big_vision_decay_kernels_alone(name: str) -> None:
    """By 1e-4 a step at the peak, where AdamW multiplies by the rate: no table of tokens."""
    config = load_config(f"{ROOT}/configs/forms.py:form={name},batch_size=32768")
    assert config.optim.lr * config.optim.weight_decay == pytest.approx(1e-4)
    mask = optimizer.decay_mask(shapes(toy.settings()), rule=config.optim.decayed)
    decayed = names(mask, bool)
    assert decayed == {n for n in names(mask) if n.endswith("/kernel")} and len(decayed) > 9
    assert "text/token_table" in names(mask)


def test_clip_and_slip_decay_what_has_several_axes() -> None:
    """SLIP's code, which trains both: also tables and tokens, but no norm and no bias."""
    for name in ("clip", "slip"):
        rule = load_config(f"{ROOT}/configs/forms.py:form={name}").optim.decayed
        decayed = names(optimizer.decay_mask(shapes(toy.settings()), rule=rule), bool)
        assert {"text/token_table", "text/positions", "encoder/cls_token"} <= decayed
        assert not any(n.endswith(("scale", "bias")) for n in decayed)


def test_learning_rate_golden() -> None:
    """Table 7: 1e-3, 40 of 1600 epochs of ImageNet at 4096 images, cosine to 0."""
    rate = jax.jit(optimizer.lr_schedule(schema.Optim(), steps=499_200, warmup=12_480))
    got = [float(rate(k)) for k in (0, 6_240, 12_480, 134_160, 255_840, 377_520, 499_200, 600_000)]
    half = 1e-3 * 0.5 * (1 + math.sqrt(0.5))
    np.testing.assert_allclose(
        got, [0, 5e-4, 1e-3, half, 5e-4, 1e-3 - half, 0, 0], rtol=1e-6, atol=1e-10
    )


def test_a_run_of_more_steps_than_an_int32_can_be_planned() -> None:
    """442 million images, thirty times, four at once: where the largest batch is sought on a small
    chip."""
    rate = jax.jit(optimizer.lr_schedule(schema.Optim(lr=1.0), steps=2**32, warmup=2**31 + 2**10))
    assert (
        0 < float(rate(10)) < 1e-8
        and 0 < float(jax.jit(ema.cosine_momentum(0.0, 2**32))(2**20)) < 1e-6
    )


@pytest.mark.parametrize(
    ("steps", "warmup", "low"), [(100, 10, 0.0), (100, 0, 1e-3), (50, 50, 0.1), (7, 3, 0.25)]
)
def test_learning_rate_is_the_formula(steps: int, warmup: int, low: float) -> None:
    k = np.arange(steps + 20, dtype=np.float64)
    share = np.clip((k - warmup) / max(steps - warmup, 1), 0, 1)
    wanted = np.where(
        k < warmup, 0.5 * k / max(warmup, 1), low + (0.5 - low) * 0.5 * (1 + np.cos(np.pi * share))
    )
    got = jax.vmap(
        optimizer.lr_schedule(schema.Optim(lr=0.5, min_lr=low), steps=steps, warmup=warmup)
    )(np.arange(steps + 20))
    np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=1e-7)


def test_momentum_is_a_plain_number() -> None:
    momentum = optimizer.ema_momentum(schema.Optim(ema=0.9), steps=10)
    assert [type(momentum(k)) for k in (0, 5)] == [float, float]
    assert [momentum(k) for k in (0, 5, 10)] == pytest.approx([0.9, 0.95, 1.0], abs=1e-7)


def test_keep_within_is_a_clamp_of_the_parameter_after_every_update() -> None:
    tx = optimizer.clamp_parameter("x", 0.0, 2.0)
    params = {"x": jnp.float32(1.0), "y": jnp.float32(1.0)}
    state, seen = tx.init(params), []
    for change in (0.5, 0.5, 0.7, -1.0, -1.5, 0.25):
        updates, state = tx.update(
            {"x": jnp.float32(change), "y": jnp.float32(change)}, state, params
        )
        params = optax.apply_updates(params, updates)
        seen.append(float(params["x"]))
    assert seen == pytest.approx([1.5, 2.0, 2.0, 1.0, 0.0, 0.25])
    assert float(params["y"]) == pytest.approx(0.45)  # of the sum, never clamped
    updates = {"y": jnp.float32(5.0)}
    # a run without captions has no logit scale
    assert tx.update(updates, state, {"y": jnp.float32(0.0)})[0] is updates


def small(logit_scale: float = 1.0) -> dict:
    r = np.random.default_rng(0)
    draw = lambda *shape: r.normal(size=shape).astype(np.float32)
    return {
        "encoder": {
            "patch_embed": {"kernel": draw(3, 2), "bias": draw(2)},
            "blocks": {"fc1": {"kernel": draw(2, 2, 3), "bias": draw(2, 3)}},
        },
        "decoder": {"mask_token": draw(1, 1, 2), "head": {"kernel": draw(2, 2)}},
        "logit_scale": np.float32(logit_scale),
    }


def gradients(params: dict, step: int, *, frozen: bool = True) -> dict:
    r = np.random.default_rng(step + 1)
    out = jax.tree.map(lambda x: np.asarray(r.normal(size=x.shape), np.float32), params)
    if frozen:
        out["encoder"]["patch_embed"] = jax.tree.map(np.zeros_like, out["encoder"]["patch_embed"])
    return out


def run(
    config: schema.Config,
    params: dict,
    *,
    count: int,
    frozen: bool = True,
    steps: int = 20,
    warmup: int = 0,
) -> list[tuple[dict, dict]]:
    """(params, state) after every update, the start included."""
    tx = optimizer.build_optimizer(config, objective_terms.FORMS["m3i"], steps=steps, warmup=warmup)
    update = jax.jit(
        lambda g, s, p: (lambda u, s: (optax.apply_updates(p, u), s))(
            *tx.update(g, s, p, feature_grad_norms=(2.0, 4.0))
        )
    )
    seen = [(params, tx.init(params))]
    for k in range(count):
        seen.append(update(gradients(params, k, frozen=frozen), seen[-1][1], seen[-1][0]))
    return seen


def as_numpy(tree) -> dict[str, np.ndarray]:
    return {
        path_text(path): np.asarray(leaf, np.float64)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def adamw(
    o: schema.Optim, params: dict, *, count: int, steps: int, warmup: int, frozen: bool
) -> dict[str, np.ndarray]:
    """Loshchilov and Hutter's Algorithm 2 in float64, with the gradient clipped by its global norm
    first."""
    p = as_numpy(params)
    mean, square = ({name: np.zeros_like(x) for name, x in p.items()} for _ in range(2))
    for k in range(count):
        grads = as_numpy(gradients(params, k, frozen=frozen))
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        factor = min(1.0, o.clip / norm) if o.clip else 1.0
        share = (k - warmup) / (steps - warmup)
        rate = (
            o.lr * k / warmup
            if k < warmup
            else o.min_lr + (o.lr - o.min_lr) * 0.5 * (1 + math.cos(math.pi * share))
        )
        for name, g in grads.items():
            mean[name] = o.b1 * mean[name] + (1 - o.b1) * factor * g
            square[name] = o.b2 * square[name] + (1 - o.b2) * (factor * g) ** 2
            step = (mean[name] / (1 - o.b1 ** (k + 1))) / (
                np.sqrt(square[name] / (1 - o.b2 ** (k + 1))) + o.eps
            )
            decay = name.endswith("kernel") and not name.startswith("encoder/patch_embed")
            p[name] = p[name] - rate * (step + o.weight_decay * decay * p[name])
    return p


# A large epsilon, since Adam divides the gradient by its own size: with a small one clipping hardly
# shows in the result.
@pytest.mark.parametrize(
    ("clip", "eps", "warmup"), [(1.0, 1e-8, 0), (0.5, 0.1, 2), (1e6, 0.1, 0), (0.0, 0.1, 0)]
)
def test_three_steps_are_adamw_in_numpy(clip: float, eps: float, warmup: int) -> None:
    config = toy.settings(
        optim__clip=clip, optim__eps=eps, optim__lr=0.1, optim__min_lr=0.02, optim__weight_decay=0.3
    )
    params = small()
    got = as_numpy(run(config, params, count=3, warmup=warmup)[-1][0])
    wanted = adamw(config.optim, params, count=3, steps=20, warmup=warmup, frozen=True)
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=2e-5, atol=2e-6, err_msg=name)


def test_the_frozen_patch_embedding_does_not_move() -> None:
    start, *_, (end, _) = run(toy.settings(optim__lr=0.1), small(), count=3)
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(
            end["encoder"]["patch_embed"][name], start[0]["encoder"]["patch_embed"][name]
        )
    kernels = (tree["encoder"]["blocks"]["fc1"]["kernel"] for tree in (end, start[0]))
    assert np.abs(np.subtract(*kernels)).max() > 0.01


def test_a_patch_embedding_that_is_trained_is_decayed() -> None:
    """Zero gradients: all that moves a kernel is the decay, all else stays."""
    config = toy.settings(
        optim__lr=0.1, optim__weight_decay=0.5, model__encoder__freeze_patch_embed=False
    )
    tx, params = (
        optimizer.build_optimizer(config, objective_terms.FORMS["m3i"], steps=20, warmup=0),
        small(),
    )
    updates = jax.jit(
        lambda p: tx.update(jax.tree.map(jnp.zeros_like, p), tx.init(p), p, **ZERO)[0]
    )(params)
    got = as_numpy(updates)
    for name, value in as_numpy(params).items():
        np.testing.assert_allclose(
            got[name],
            -0.1 * 0.5 * value if name.endswith("kernel") else 0 * value,
            rtol=1e-6,
            err_msg=name,
        )


@pytest.mark.parametrize(("sign", "limit"), [(1.0, math.log(100)), (-1.0, 0.0)])
def test_the_logit_scale_stays_within_ln_1_and_ln_100(sign: float, limit: float) -> None:
    params, seen = small(2.0), []
    tx = optimizer.build_optimizer(
        toy.settings(optim__lr=1.5), objective_terms.FORMS["m3i"], steps=20, warmup=0
    )

    @jax.jit
    def step(params, state):
        updates, state = tx.update(
            jax.tree.map(lambda x: jnp.full_like(x, -sign), params), state, params, **ZERO
        )
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(4):
        params, state = step(params, state)
        seen.append(float(params["logit_scale"]))
    # the first step of Adam is the learning rate, here inside the range
    assert seen[0] == pytest.approx(2.0 + sign * 1.5, abs=1e-4)
    assert seen[1:] == pytest.approx([limit] * 3, abs=1e-6)
    # nothing else is clamped
    assert float(jnp.abs(params["decoder"]["head"]["kernel"]).max()) > 4.7


def test_the_chain_has_named_links_in_this_order() -> None:
    state = run(toy.settings(), small(), count=0)[0][1]
    assert list(state) == ["balance", "clip", "adamw", "bounds", "target"]
    assert jax.tree.structure(state["target"].params["encoder"]) == jax.tree.structure(
        small()["encoder"]
    )


def test_the_target_is_the_average_of_the_encoder_after_every_update() -> None:
    config = toy.settings(optim__ema=0.6, optim__lr=0.1)
    seen = run(config, small(), count=3)
    average = as_numpy(seen[0][0]["encoder"])
    for k, (params, state) in enumerate(seen[1:], 1):
        m = 1 - (1 - 0.6) * (1 + math.cos(math.pi * k / 20)) / 2
        average = {
            name: m * average[name] + (1 - m) * new
            for name, new in as_numpy(params["encoder"]).items()
        }
        for name, value in as_numpy(state["target"].params["encoder"]).items():
            np.testing.assert_allclose(
                value, average[name], rtol=1e-5, atol=1e-6, err_msg=f"{name} after {k}"
            )
    assert int(seen[-1][1]["target"].count) == 3


def test_the_balance_statistics_see_the_norms_and_leave_the_update_alone() -> None:
    seen = run(toy.settings(), small(), count=2)
    balance = seen[-1][1]["balance"]
    assert (int(balance.count), float(balance.ssp), float(balance.sp)) == (2, 2.0, 4.0)
    with pytest.raises(ValueError, match="feature_grad_norms"):
        optimizer.build_optimizer(
            toy.settings(), objective_terms.FORMS["m3i"], steps=20, warmup=0
        ).update(small(), seen[0][1], small())


def test_a_frozen_target_never_moves() -> None:
    terms = derived_terms.with_options(objective_terms.FORMS["sim"], target_encoder="frozen")
    tx, params = (
        optimizer.build_optimizer(toy.settings(optim__lr=0.1), terms, steps=20, warmup=0),
        small(),
    )
    before = as_numpy(params["encoder"])
    state = tx.init(params)
    assert list(state) == ["balance", "clip", "adamw", "bounds", "target", "frozen"]

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params, **ZERO)
        return optax.apply_updates(params, updates), state

    for _ in range(2):
        params, state = step(params, state)
    for name, value in as_numpy(state["frozen"].params["encoder"]).items():
        np.testing.assert_array_equal(value, before[name])
    assert any((as_numpy(params["encoder"])[name] != before[name]).any() for name in before)
