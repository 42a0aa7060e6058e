"""Small views in a step: encoded together, with resized positions, at the cost of their tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import parallel, schema
from m3i_jax.models import m3i, vit
from m3i_jax.objective import positions
from m3i_jax.objective.derived_terms import with_small_views
from m3i_jax.objective.registry import form
from m3i_jax.objective.terms import Pass, token_term
from m3i_jax.profiling import flops
from m3i_jax.training import trainer, views
from tests.bench import formula
from tests.training.forward import batch_of, parameters, plan_of

HEAD = {"model__head__prototypes": 12, "model__head__hidden": 20, "model__head__width": 8}


def test_views_of_one_size_go_through_the_encoder_together_and_are_those_of_each() -> None:
    plan = plan_of(
        "dino",
        data__small_views="2 x 16 at 0.1-0.3,1 x 8 at 0.1-0.2",
        model__encoder__drop_path=0.5,
        model__encoder__depth=2,
        **HEAD,
    )
    batch, params = batch_of(plan), parameters(plan)["encoder"]

    @jax.jit
    def both(batch, params):
        inputs = views.pass_inputs(plan.config, plan.passes, batch)
        patches = views.augmented_patches(plan.config, batch, plan.views)
        alone = {
            p: m3i.encode(plan.config, params, patches[p.view], keep=inputs[p].keep)
            for p in plan.passes
        }
        return views.encode_passes(plan.config, inputs, patches, params), alone

    together, alone = both(batch, params)
    assert [p.view for p in plan.passes] == [0, 1, 2, 3, 4]
    assert [together[p].shape[1] for p in plan.passes] == [17, 17, 5, 5, 2]
    for p in plan.passes:
        np.testing.assert_allclose(together[p], alone[p], atol=2e-5)
    program = jax.make_jaxpr(both)(batch, params).pretty_print(use_color=False)
    assert "(16, 4, 192)" in program or "[16,4,192]" in program  # 2 x 8 rows in one product


@pytest.mark.parametrize("rule", ["sincos", "learned"])
def test_positions_of_a_small_view_are_resized(rule: str) -> None:
    encoder = schema.Encoder(patch_size=4, width=8, depth=1, heads=2, positions=rule)
    config = schema.Config(
        data=schema.Data(image_size=16), model=schema.Model(encoder=encoder, dtype="float32")
    )
    params = vit.init(config.model, jax.random.key(0), grid=4)
    x = np.random.default_rng(0).normal(size=(2, 9, 48)).astype(np.float32)
    table = (
        np.asarray(params["positions"])[0, 1:] if rule == "learned" else positions.sincos_2d(4, 8)
    )
    cls = np.asarray(params["positions"])[0, :1] if rule == "learned" else np.zeros((1, 8))
    small = np.concatenate([cls, positions.resized(table, 3)]).astype(np.float32)
    learned = dataclasses.replace(
        config.model, encoder=dataclasses.replace(encoder, positions="learned")
    )
    want = vit.apply(learned, {**params, "positions": small[None]}, x, grid=3)
    np.testing.assert_allclose(m3i.encode(config, params, x), want, atol=1e-5)
    if rule == "sincos":  # and not the first rows of the table
        plain = vit.apply(config.model, params, x, grid=3)
        assert np.abs(np.asarray(plain - want)).max() > 1e-2


def test_small_views_cost_their_tokens() -> None:
    """8 small views, as published, against a formula from shapes; and against a step without."""
    changes = {
        "model__encoder__patch_size": 16,
        "model__encoder__width": 96,
        "model__encoder__depth": 1,
        "model__encoder__freeze_patch_embed": False,
        "data__image_size": 224,
        **HEAD,
    }

    def count(small: str) -> tuple[float, float]:
        more = {"data__small_views": small} if small else {}
        plan = plan_of("dino", **changes, **more)
        one = trainer.Trainer(plan.config, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), 0)
        batch = trainer.abstract_batch(one.config)
        with jax.sharding.use_abstract_mesh(one.mesh.abstract_mesh):
            counted = flops.count_flops(one.trace, one.template, batch)
        return counted.total / plan.config.train.batch_size, formula.step(one.task.plan)

    (whole, wanted), (plain, plain_wanted) = count("8 x 96 at 0.05-0.4"), count("")
    assert whole == pytest.approx(wanted, rel=1e-3)
    assert plain == pytest.approx(plain_wanted, rel=1e-3)
    # forward and backward of 8 sequences of 36 patches and cls, and of their heads
    tokens = 3 * 1 * formula.block(37, 96) + 2 * 36 * 768 * 96
    head = 3 * (96 * 20 + 20 * 20 + 20 * 8 + 8 * 12)
    assert (whole - plain) / (2 * 8 * (tokens + head)) == pytest.approx(1, abs=0.02)


def test_a_row_reads_any_number_of_small_views() -> None:
    row = form("ibot")
    for count in (0, 1, 10):
        made = with_small_views(row, count)
        assert [t.reads.view for t in made if t.reads.view > 1] == 2 * [*range(2, 2 + count)]
        for name, weight in (("global", 1.0), ("dense", 0.5)):
            assert sum(t.weight for t in made if t.name == name) == pytest.approx(weight)
    assert with_small_views(form("byol"), 3) == form("byol")
    with pytest.raises(ValueError, match="mask of an image"):
        with_small_views((token_term(Pass(view=2, masked=True), 0),), 2)
    only = tuple(t for t in row if t.reads.view > 1)
    with pytest.raises(ValueError, match="data.small_views has none"):
        with_small_views(only, 0)


def test_the_third_probability_is_that_of_small_views() -> None:
    plan = plan_of("dino", data__small_views="1 x 16 at 0.1-0.3", **HEAD)
    augment = dataclasses.replace(plan.config.data.augment, solarize_p=(0.0, 0.0, 1.0))
    config = dataclasses.replace(
        plan.config, data=dataclasses.replace(plan.config.data, augment=augment)
    )
    batch = batch_of(plan)
    large, small = (views.augmented_patches(c, batch, plan.views) for c in (plan.config, config))
    for view in (0, 1):
        np.testing.assert_array_equal(large[view], small[view])
    assert (np.asarray(large[2]) != np.asarray(small[2])).any()
    assert jnp.isfinite(small[2]).all()
