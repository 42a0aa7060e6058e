"""CAPI as a row: both of its losses against numpy float64, what its gradients reach, the division
of its batch, FLOPs, and errors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import parallel, validation
from m3i_jax.errors import UserError
from m3i_jax.models import decoder, m3i
from m3i_jax.objective import masks, positions
from m3i_jax.objective.terms import MASKED
from m3i_jax.profiling import flops
from m3i_jax.training import plan_table, pretrain_task, trainer, views
from tests import toy
from tests.bench import formula
from tests.training.forward import forward, parameters, plan_of
from tests.training.test_prototype_rows import balanced, softmax, unit

SETTINGS = {
    "data__mask": "inverse_block",
    "data__mask_ratio": 0.625,
    "model__encoder__cls_token": False,
    "model__encoder__final_norm": True,
    "model__head__prototypes": 12,
    "model__pool__kind": "mean",
}


def test_capi_clusters_at_each_position_and_predicts_hidden_cells() -> None:
    plan = plan_of("capi", **SETTINGS)
    got, config = forward(plan), plan.config
    assert plan.passes == (MASKED,) and got.z[MASKED].shape == (8, 6, 32)
    encode = jax.jit(
        lambda tree, b: m3i.encode(config, tree, views.augmented_patches(config, b, (0,))[0])
    )
    z = np.asarray(encode(got.trees["ema"]["encoder"], got.batch), np.float64)
    head = {
        k: np.asarray(v, np.float64)
        for k, v in got.params["heads"]["clusters"].items()
        if k != "clusters"
    }
    clusters = got.params["heads"]["clusters"]["clusters"]
    logits = unit(z) @ np.asarray(clusters["kernel"], np.float64) + np.asarray(
        clusters["bias"], np.float64
    )
    q = np.stack([balanced(logits[:, n], 0.06) for n in range(16)], 1)
    cost = lambda targets, x: -(targets * np.log(softmax(x / 0.12))).sum(-1)
    of_clusters = cost(q, logits).mean()
    cells = [
        np.stack([np.flatnonzero(row) for row in m])
        for m in (got.batch["mask"], ~got.batch["mask"])
    ]

    @jax.jit
    def decode(tree, z):
        raw = jnp.asarray(positions.same_view_positions(4, config.model.decoder.width))
        queries = decoder.decoder_queries(config.model, tree, raw)[cells[1]]
        return decoder.apply(config.model, tree, z, jnp.asarray(cells[0]), queries, grid=4)

    rows = decode(got.params["decoder"], got.z[MASKED])
    prototypes = unit(head["prototypes"]) * head["prototype_norms"][:, None]
    prediction = unit(np.asarray(rows, np.float64)) @ prototypes.T
    of_hidden = cost(np.take_along_axis(q, cells[1][..., None], 1), prediction).mean()
    assert got.losses["loss/clusters"] == pytest.approx(of_clusters, rel=1e-4)
    assert got.losses["loss/dense"] == pytest.approx(of_hidden, rel=1e-4)
    assert got.losses["loss/ssp"] == pytest.approx((of_clusters + of_hidden) / 2, rel=1e-4)
    share = np.take_along_axis(q, cells[1][..., None], 1).mean((0, 1))
    bits = (-(share * np.log(share)).sum() - of_hidden) / math.log(2)
    assert got.losses["info/dense"] == pytest.approx(bits, rel=1e-3, abs=1e-4)
    assert "head" not in got.params["decoder"]


def test_only_the_clusters_learn_from_the_clustering() -> None:
    """Gradients of a step, in which the loss of hidden cells reaches no cluster and the loss of
    clusters nothing else; two microbatches have those of one."""
    out = []
    for parts in (1, 2):
        plan = plan_of("capi", train__microbatches=parts, **SETTINGS)
        params = parameters(plan)
        ema = jax.tree.map(lambda x: 0.9 * x, m3i.target_parts(plan.config, plan.terms, params))
        assert sorted(ema) == ["encoder"]
        batch = {k: jnp.asarray(v) for k, v in toy.batch(plan.config).items()}

        @jax.jit
        def run(params, ema, batch, plan=plan):
            return pretrain_task.objective_gradients(
                plan, params, {"ema": ema}, batch, jnp.ones(())
            )[:2]

        out.append(run(params, ema, batch))
    (grads, metrics), (of_parts, metrics_of_parts) = out
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(of_parts), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    for name in ("loss/dense", "loss/clusters", "collapse/marginal_bits/clusters_tokens"):
        assert float(metrics[name]) == pytest.approx(float(metrics_of_parts[name]), rel=1e-4)
    head = grads["heads"]["clusters"]
    # of cross-entropy with the softmax of the same logits: the sum over clusters is 0
    assert float(jnp.abs(head["clusters"]["bias"].sum())) < 1e-6
    assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(head))
    assert float(metrics["collapse/marginal_bits/clusters_tokens"]) > 0.9 * math.log2(12)


def test_flops_are_those_of_the_shapes() -> None:
    changes = {
        **SETTINGS,
        "data__image_size": 128,
        "data__mask_ratio": 0.65,
        "train__batch_size": 64,
        "model__encoder__patch_size": 16,
        "model__encoder__width": 96,
        "model__encoder__freeze_patch_embed": False,
        "model__head__prototypes": 64,
    }
    plan = plan_of("capi", **changes)
    one = trainer.Trainer(plan.config, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), 0)
    with jax.sharding.use_abstract_mesh(one.mesh.abstract_mesh):
        counted = flops.count_flops(one.trace, one.template, trainer.abstract_batch(one.config))
    per_image = counted.total / plan.config.train.batch_size
    assert per_image == pytest.approx(formula.step(one.task.plan), rel=1e-3)
    calls = plan_table.call_rows(
        one.task.plan, one.template.params, trainer.abstract_batch(one.config), flops.count_flops
    )
    assert [(row[0], row[2]) for row in calls] == [
        ("encoder", "dense, clusters"),
        ("EMA target", "dense, clusters"),
        ("decoder", "dense"),
        ("clusters", "clusters"),
    ]
    assert float(calls[-1][3]) == pytest.approx(2 * 64 * 96 * 64 / 1e9, rel=1e-3)


def test_inverse_blocks_show_every_cell_equally_often() -> None:
    mask = masks.inverse_block(3, 10, 2000, grid=14, hidden=127)
    assert (mask.sum(1) == 69).all() and abs(mask.mean(0) - 69 / 196).max() < 0.05
    again = masks.inverse_block(3, 500, 10, grid=14, hidden=127)
    np.testing.assert_array_equal(mask[490:500], again)  # a row depends on its position alone
    # one block: by a cyclic shift, its cells are in rows of equal length but for the last
    for row in mask[:50].reshape(-1, 14, 14):
        lengths = np.sort(row.sum(1)[row.any(1)])
        assert len(set(lengths[1:])) == 1 and lengths[0] <= lengths[1]
    with pytest.raises(ValueError, match="one cell must be visible"):
        masks.inverse_block(0, 0, 1, grid=4, hidden=16)


def test_what_cannot_work_is_one_line() -> None:
    with pytest.raises(UserError, match=r"model\.head\.prototypes: 1 .*at least 2"):
        plan_of("capi", **{**SETTINGS, "model__head__prototypes": 1})
    config = plan_of("capi", **{**SETTINGS, "model__head__prototypes": 4}).config
    with pytest.raises(UserError, match=r"model\.head\.prototypes: 4 .* 8 devices"):
        validation.validate_devices(config, (1, 8, 1))
    with pytest.raises(UserError, match="data.mask"):
        plan_of("capi", **{**SETTINGS, "data__mask": "block"})
