"""Plans, parameters and one forward pass of an objective, for tests of what it computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax.models import m3i
from m3i_jax.objective import terms
from m3i_jax.training import plan as plans
from m3i_jax.training import targets, term_losses, views
from tests import toy

# Jitted as a whole: each operation alone would be compiled alone, a hundred of them in a second.
augmented_patches = jax.jit(
    views.augmented_patches, static_argnums=(0, 2), static_argnames=("exact",)
)
encode = jax.jit(m3i.encode, static_argnums=(0,), static_argnames=("blocks",))
SMALL = {
    "model__encoder__depth": 1,
    "model__encoder__drop_path": 0.0,
    "train__batch_size": 8,
    "model__text__depth": 1,
}
# Widths of heads: their defaults, as published, are most of the time of a pass of such a network.
HEAD = {"model__head__hidden": 20, "model__head__width": 6}


def plan_of(forms: str | terms.Terms, **changes: object) -> plans.Plan:
    config = toy.settings(**{**SMALL, **changes})
    if isinstance(forms, str):
        return plans.build_plan(
            dataclasses.replace(
                config,
                objective=dataclasses.replace(config.objective, forms=tuple(forms.split(","))),
            )
        )
    return plans.Plan(config, forms)


def parameters(plan: plans.Plan):
    params = m3i.init(
        plan.config, jax.random.key(0), plan.terms, classes=toy.CLASSES, vocabulary=toy.VOCABULARY
    )
    # Not where heads of zero bias and unit scale start, where many a wrong composition would give
    # the same numbers.
    leaves, tree = jax.tree.flatten(jax.device_get(params))
    r = np.random.default_rng(1)
    return jax.tree.unflatten(
        tree, [leaf + 0.02 * r.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    )


def batch_of(plan: plans.Plan, **changes: object) -> dict:
    return {k: jnp.asarray(v) for k, v in {**toy.batch(plan.config), **changes}.items()}


@dataclasses.dataclass
class Forward:
    plan: plans.Plan
    params: dict
    trees: dict
    batch: dict
    inputs: dict
    z: dict
    targets: dict
    losses: dict


def forward(plan: plans.Plan, batch=None, params=None, state=None) -> Forward:
    """Losses by name, and the arrays on the way to them, without any gradient. `state`: centres of
    assignments to prototypes."""
    batch, params = batch or batch_of(plan), params or parameters(plan)
    parts = m3i.target_parts(plan.config, plan.terms, params)
    trees = {
        "ema": jax.tree.map(lambda a: a * np.float32(0.9), parts),
        "frozen": jax.tree.map(lambda a: a * np.float32(1.1), parts),
        "snapshot": jax.tree.map(lambda a: a * 1.2, parts),
        "shared": parts,
        targets.TRAINED: m3i.trained_parts(plan.terms, params),
    }

    @jax.jit
    def run(params, trees, batch):
        arguments, z = loss_arguments(plan, params, trees, batch, state)
        counts, weights = term_losses.loss_weights(plan, arguments["inputs"])
        ssp, sp = (
            term_losses.group_loss(plan, g, **arguments)(params, z)[1] for g in ("ssp", "sp")
        )
        losses = term_losses.loss_metrics(plan, ssp | sp, counts, weights)
        return arguments["inputs"], z, arguments["bundle"].rows, losses

    inputs, z, features, losses = run(params, trees, batch)
    losses = {name: float(value) for name, value in losses.items()}
    return Forward(plan, params, trees, batch, inputs, z, features, losses)


def loss_arguments(
    plan: plans.Plan, params, trees: dict, batch: dict, state=None
) -> tuple[dict, dict]:
    """(keyword arguments of `group_loss` for one microbatch, features of every pass)."""
    inputs = views.pass_inputs(plan.config, plan.passes, batch)
    patches = views.augmented_patches(plan.config, batch, plan.views, exact=plan.exact)
    features = targets.target_features(plan, trees, patches, batch["mask"])
    features, _ = targets.assign_targets(plan, features, state)
    moments = targets.target_moments(plan, features)
    arguments = {
        "weights": term_losses.loss_weights(plan, inputs)[1],
        "batch": batch,
        "inputs": inputs,
        "bundle": term_losses.TargetBundle(rows=features, batch=features, moments=moments),
        "cached": None,
    }
    return arguments, views.encode_passes(plan.config, inputs, patches, params["encoder"])
