"""Gram anchoring (DINOv3) as a row: its loss and bits against numpy float64, an enlarged view of
the target, when the snapshot counts, FLOPs, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import parallel
from m3i_jax.errors import UserError
from m3i_jax.models import m3i, vit
from m3i_jax.objective import ema, terms
from m3i_jax.objective.terms import FULL, Target, token_term
from m3i_jax.profiling import flops
from m3i_jax.training import plan as plans
from m3i_jax.training import targets, term_losses, trainer, unused_settings, views
from tests import toy
from tests.bench import formula
from tests.training.forward import forward, plan_of

SETTINGS = {"model__encoder__final_norm": True, "data__mask_ratio": 0.25}


def bicubic(x, side):
    """The middle two axes of [B, G, G, C], by Keys' kernel with a = -0.75 at every output."""
    old = x.shape[1]
    matrix = np.zeros((side, old))
    for i in range(side):
        at = (i + 0.5) * old / side - 0.5
        for k in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            d = abs(at - k)
            w = 1.25 * d**3 - 2.25 * d**2 + 1 if d <= 1 else -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(k, 0), old - 1)] += w
    return np.einsum("ya,xb,nabc->nyxc", matrix, matrix, x)


def cosines(x):
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return np.einsum("bnd,bmd->bnm", x, x)


def test_gram_is_the_squared_error_of_cosines_to_an_enlarged_view() -> None:
    plan = plan_of("dinov3_gram", **SETTINGS)
    got, config = forward(plan), plan.config
    assert [(p.encoder, p.view, p.enlarge) for p in plan.target_passes] == [
        ("snapshot", 0, 2),
        ("snapshot", 1, 2),
    ]
    patches = jax.jit(lambda b: views.augmented_patches(config, b, (0, 1)))(got.batch)
    encode = jax.jit(lambda tree, x: m3i.encode(config, tree, x))
    errors, wanted = [], []
    for read in plan.passes:
        x = np.asarray(patches[read.view], np.float64).reshape(8, 4, 4, 8, 8, 3)
        image = x.transpose(0, 1, 3, 2, 4, 5).reshape(8, 32, 32, 3)
        large = vit.patchify(bicubic(image, 64).astype(np.float32), 8)
        z = encode(got.trees["snapshot"]["encoder"], large)
        map_ = np.asarray(z, np.float64)[:, 1:].reshape(8, 8, 8, -1)
        target = cosines(bicubic(map_, 4).reshape(8, 16, -1))
        errors.append((cosines(np.asarray(got.z[read], np.float64)[:, 1:]) - target) ** 2)
        wanted.append(target)
    error, target = np.concatenate(errors), np.concatenate(wanted)
    assert got.losses["loss/gram"] == pytest.approx(error.mean(), rel=1e-4)
    assert got.losses["loss/ssp"] == pytest.approx(error.mean(), rel=1e-4)
    others = ~np.eye(16, dtype=bool)
    bits = 15 / 2 * 0.5 * np.log2(target[:, others].var() / error[:, others].mean())
    assert got.losses["info/gram"] == pytest.approx(bits, rel=1e-3, abs=1e-3)


def test_gradients_are_those_of_the_plain_formula() -> None:
    from m3i_jax.objective.regression_losses import token_similarity

    r = np.random.default_rng(0)
    p, t = r.normal(size=(2, 5, 4)), r.normal(size=(2, 5, 6))
    where = np.array([[1, 1, 0, 1, 1], [1, 1, 1, 1, 0.5]])

    def plain(x):
        unit = lambda y: y / jnp.linalg.norm(y, axis=-1, keepdims=True)
        error = jnp.square(jnp.einsum("bnd,bmd->bnm", unit(x), unit(x)) - cosines(t))
        return ((where[:, :, None] * where[:, None] * error).sum((1, 2)) / where.sum(1)).sum()

    want, slope = jax.jit(jax.value_and_grad(plain))(jnp.asarray(p))
    broken = np.where(where[..., None] > 0, p, np.nan)  # a token without weight may be anything
    loss = jax.value_and_grad(lambda x: token_similarity(x, t, where)[0])
    found, of = jax.jit(loss)(jnp.asarray(broken))
    assert float(found) == pytest.approx(float(want), rel=1e-5)
    np.testing.assert_allclose(of, slope, atol=1e-5)


def test_it_counts_from_the_first_snapshot_on_and_adds_no_pass() -> None:
    small = {"model__head__prototypes": 12, "model__head__hidden": 20, "model__head__width": 8}
    plan = plan_of("ibot,dinov3_gram", **SETTINGS, **small)
    assert plan.passes == plan_of("ibot", **SETTINGS, **small).passes
    config, batch = plan.config, toy.batch(plan.config)
    inputs = views.pass_inputs(config, plan.passes, {k: jnp.asarray(v) for k, v in batch.items()})
    for taken in (0.0, 1.0):
        state = ema.SnapshotState(jnp.zeros([], jnp.int32), jnp.asarray(taken), {})
        _, weights = term_losses.loss_weights(plan, inputs, state)
        of_gram = [float(w) for w, t in zip(weights, plan.terms, strict=True) if t.name == "gram"]
        # 1 each beside 1 of cls and 0.5 of tokens, over 8 x 16 tokens
        assert of_gram == pytest.approx([taken / 128 / 3.5] * 2)
    one = trainer.Trainer(config, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), toy.VOCABULARY)
    held = one.template.opt["snapshot"].params
    assert (
        sorted(held) == ["encoder"]
        and "projector" in one.template.opt["target"].params["heads"]["global"]
    )


def test_flops_are_those_of_the_shapes() -> None:
    changes = {
        **SETTINGS,
        "data__image_size": 128,
        "model__encoder__patch_size": 16,
        "model__encoder__width": 96,
        "model__encoder__freeze_patch_embed": False,
    }
    plan = plan_of("dinov3_gram", **changes)
    one = trainer.Trainer(plan.config, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), 0)
    with jax.sharding.use_abstract_mesh(one.mesh.abstract_mesh):
        counted = flops.count_flops(one.trace, one.template, trainer.abstract_batch(one.config))
    per_image = counted.total / plan.config.train.batch_size
    assert per_image == pytest.approx(formula.step(one.task.plan), rel=1e-3)


def test_features_of_an_enlarged_view_are_at_the_cells_of_the_view() -> None:
    """A pass at the size of the view is left as it is; a constant image has the same feature at
    every cell up to positions."""
    plan = plan_of("dinov3_gram", **SETTINGS)
    x = jnp.zeros((2, 16, 192))
    encoder = jax.eval_shape(
        lambda key: m3i.init(plan.config, key, plan.terms, classes=0, vocabulary=0),
        jax.random.key(0),
    )["encoder"]
    shape = lambda p: (
        jax.eval_shape(lambda tree, y: targets.encode_target(plan, p, tree, y), encoder, x).shape
    )
    assert (
        shape(plans.TargetPass("ema", 0, 1, 2))
        == shape(plans.TargetPass("ema", 0, 1))
        == (
            2,
            17,
            32,
        )
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective__snapshot_at": "()"}, "snapshot_at: is empty.*target_checkpoint"),
        ({"objective__snapshot_at": "0.5,1.0"}, "snapshot_at"),
    ],
)
def test_a_snapshot_that_is_never_taken_is_one_line(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        plan_of("dinov3_gram", **SETTINGS, **changes)
    assert "\n" not in str(error.value)


def test_snapshots_that_mean_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="snapshot_at.*no snapshot of the EMA encoder"):
        unused_settings.reject_unused_settings(
            toy.settings(objective__snapshot_at="0.5"), [("byol",)]
        )
    with pytest.raises(ValueError, match="without decoder and projector"):
        token_term(FULL, 0, encoder="snapshot")
    with pytest.raises(ValueError, match="only dense features are resized"):
        Target(of="pooled", view=0, encoder="ema", enlarge=2)
    assert terms.Target(of="tokens", view=0, encoder="ema", enlarge=3).enlarge == 3
