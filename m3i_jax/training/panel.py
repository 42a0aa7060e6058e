"""The arrays of a panel: what the model reads and predicts of a few images, for people."""

import jax
import jax.numpy as jnp

from m3i_jax.training import predictions, pretrain_gradients, targets, views
from m3i_jax.training.plan import Plan
from m3i_jax.training.state import State
from m3i_jax.training.views import Batch


def panel_outputs(plan: Plan, state: State, batch: Batch) -> dict[str, jax.Array]:
    """Patches and features [R, N, ...] of a batch for a panel.

    input, input_view       what the first pass reads, and the own view that it is made from
    <term>/view             the target view of each dense term
    <term>/picture          predicted pixels, with the mean and deviation of the true patch
    <term>/prediction, <term>/target    predicted features and those that they are compared with
    """
    config = plan.config
    patches, features = pretrain_gradients.views_and_targets(plan, state, batch)
    inputs = views.pass_inputs(config, plan.passes, batch)
    first = plan.passes[0]
    out = {
        "input": views.encoder_input(config, first, inputs[first], patches),
        "input_view": views.image_rows(config, first, "own", patches[first.view]),
    }
    indices = tuple(
        i
        for i in plan.dense
        if plan.terms[i].target.encoder != "online"
        and not targets.has_prototypes(plan.target_key(plan.terms[i]))
    )
    z = views.encode_passes(config, inputs, patches, state.params["encoder"])
    predicted = predictions.predict_images(plan, state.params, z, inputs, indices)
    for i, prediction in predicted.items():
        term = plan.terms[i]
        assert term.target.view is not None
        raw, view = (
            views.image_rows(config, term.reads, term.image, x)
            for x in (features[plan.target_key(term)], patches[term.target.view])
        )
        raw = raw.astype(jnp.float32)
        target = targets.normalize_target(term, raw)
        cells = predictions.query_cells(term, inputs[term.reads])
        if cells is not None:  # the others show their target
            rows = jnp.arange(cells.shape[0])[:, None]
            prediction = target.at[rows, cells].set(prediction.astype(target.dtype))
        out[f"{term.name}/view"] = view
        if term.target.of == "pixels":
            std, mean = raw.std(-1, ddof=1, keepdims=True), raw.mean(-1, keepdims=True)
            out[f"{term.name}/picture"] = prediction * std + mean
        else:
            out[f"{term.name}/prediction"] = prediction.astype(jnp.float32)
            out[f"{term.name}/target"] = target
    return out
