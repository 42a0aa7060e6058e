"""The calls that `--mode=show` lists are those of a step."""

import jax

from m3i_jax import parallel
from m3i_jax.profiling import flops
from m3i_jax.training import plan_table, predictions, trainer, views
from tests import toy


def test_rows_of_heads_add_up_to_what_a_step_predicts() -> None:
    """To the last digit: one call of a decoder for two terms; one of a projection to prototypes for
    four passes; and four of a projection without, each of which one or two terms read."""
    config = toy.settings(
        objective__forms="('m3i', 'dino', 'simdino')",
        data__small_views="('2 x 16 at 0.05-0.32',)",
        model__head__prototypes=32,
    )
    one = trainer.Trainer(config, parallel.make_mesh((1, 1, 1), jax.devices()[:1]), toy.VOCABULARY)
    plan, params, batch = one.task.plan, one.template.params, trainer.abstract_batch(config)
    totals: list[float] = []

    def count(*call):
        counted = flops.count_flops(*call)
        totals.append(counted.total)
        return counted

    rows = plan_table.call_rows(plan, params, batch, count)
    heads = [
        n for row, n in zip(rows, totals, strict=True) if row[0] in ("decoder", "projectionhead")
    ]
    inputs, patches = jax.eval_shape(
        lambda b: (
            views.pass_inputs(config, plan.passes, b),
            views.augmented_patches(config, b, plan.views, exact=plan.exact),
        ),
        batch,
    )
    z = jax.eval_shape(
        lambda *given: views.encode_passes(config, *given), inputs, patches, params["encoder"]
    )
    indices = plan.where("pixels", "tokens", "pooled")
    shapes = jax.eval_shape(
        lambda *given: predictions.head_inputs(plan, *given, indices), params, z, inputs
    )
    calls = predictions.image_calls(plan, shapes)
    assert sorted(map(len, calls)) == [1, 1, 1, 1, 2, 4]
    assert len(heads) == 1 + 4 + 4  # a row for each input of a projection
    step = lambda *given: predictions.predict_images(plan, *given, indices)
    assert sum(heads) == flops.count_flops(step, params, z, inputs).total > 0
