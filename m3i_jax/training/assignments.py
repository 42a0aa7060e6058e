"""Assignments to prototypes in a step: the logits of the target encoder become targets once, over
all rows of the batch and all views of a space, and their means move the centres.

    optimizer              center_link        the centres and the rise of the temperature
                           start_link         prototypes that stay as they are at the start
    step                   assign_targets     logits -> assignments, monitors, mean logits
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from m3i_jax import schema
from m3i_jax.objective.prototype_targets import (
    PrototypeSoftmax,
    PrototypeState,
    prototype_terms,
    space_name,
    track_centers,
)
from m3i_jax.objective.terms import Terms
from m3i_jax.parallel.sharding import path_text
from m3i_jax.training.plan import Plan, TargetKey
from m3i_jax.training.targets import TargetFeatures, has_prototypes
from m3i_jax.training.views import stack_rows, unstack_rows

# the entry of a step's metrics that is no scalar but the input of the centres
MEAN_LOGITS = "mean_logits"


def center_link(
    config: schema.Config, terms: Terms, steps: int
) -> tuple[tuple[str, optax.GradientTransformation], ...]:
    """Returns the link of the optimizer chain that keeps what assignments to prototypes carry from
    step to step; none for an objective without prototypes."""
    names = prototype_terms(terms)
    if not names:
        return ()
    rising = max(config.objective.target_temperature_rise * steps, 1.0)

    def rise(step: Any) -> jax.Array:
        return jnp.minimum(jnp.asarray(step, jnp.float32) / rising, 1.0)

    widths = dict.fromkeys(sorted(names), config.model.head.prototypes)
    return (("prototypes", track_centers(widths, rise=rise)),)


class StartState(NamedTuple):
    """count: int32, updates so far."""

    count: jax.Array  # type: ignore[assignment]  # optax's name; shadows tuple.count


def hold_at_start(steps: float) -> optax.GradientTransformation:
    """Returns an optax transform that makes the updates of prototypes and of their lengths 0 in the
    first steps (DINOv2: a learning rate of 0, while the moments go on).

    >>> tx = hold_at_start(1)
    >>> tree = {"heads": {"global": {"prototypes": jnp.ones(1), "projector": jnp.ones(1)}}}
    >>> first, state = tx.update(tree, tx.init(tree))
    >>> second, _ = tx.update(tree, state)
    >>> [x["heads"]["global"]["prototypes"].item() for x in (first, second)]
    [0.0, 1.0]
    >>> first["heads"]["global"]["projector"].item()
    1.0
    """

    def update(updates: Any, state: StartState, params: Any = None) -> tuple[Any, StartState]:
        del params
        moves = state.count >= steps

        def one(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
            held = re.search(r"^heads/.*/prototype(s|_norms)$", path_text(path))
            return jnp.where(moves, x, jnp.zeros_like(x)) if held else x

        held = jax.tree_util.tree_map_with_path(one, updates)
        return held, StartState(optax.safe_increment(state.count))

    return optax.GradientTransformation(lambda _: StartState(jnp.zeros([], jnp.int32)), update)


def start_link(
    config: schema.Config, terms: Terms, steps: int
) -> tuple[tuple[str, optax.GradientTransformation], ...]:
    """Returns the link that holds prototypes at the start of a run, with
    `optim.freeze_prototypes`."""
    share = config.optim.freeze_prototypes
    return (("start", hold_at_start(share * steps)),) if share and prototype_terms(terms) else ()


def assign_targets(
    plan: Plan, features: TargetFeatures, state: PrototypeState | None
) -> tuple[TargetFeatures, dict[str, Any]]:
    """Returns the targets of a whole batch with assignments in place of the logits of spaces with
    prototypes.

    The views of a space are one problem, as in DINOv2: the centre is the mean over both, and
    Sinkhorn's shares are those of both together.

    Args:
      plan: of the run.
      features: all targets of the batch, as of `targets.target_features`.
      state: of the steps before; None: that of the first step.

    Returns:
      (targets, metrics): {`MEAN_LOGITS`: {space: [K]}} and two entropies in bits for each space,
      that of the mean assignment, at most log2 K, and the mean of those of the assignments; their
      difference is the information that an image has about its assignment.
    """
    posteriors = {name: term.posterior for name, term in prototype_terms(plan.terms).items()}
    spaces: dict[str, list[TargetKey]] = {}
    for key in plan.target_keys:
        if has_prototypes(key):
            spaces.setdefault(space_name(key.space, key.target.of), []).append(key)
    if not spaces:
        return features, {}
    out, metrics = dict(features), dict[str, Any]()
    means: dict[str, jax.Array] = {}
    for name, keys in spaces.items():
        posterior = posteriors[name]
        assert isinstance(posterior, PrototypeSoftmax)
        logits = stack_rows([features[key] for key in keys])
        rows_MxK = logits.reshape(-1, logits.shape[-1])
        center_K = jnp.zeros(rows_MxK.shape[-1]) if state is None else state.centers[name]
        rise = jnp.zeros(()) if state is None else state.rise
        assigned_xK = posterior.assign(logits, center_K, rise)
        assigned = unstack_rows(assigned_xK, len(keys))
        q_MxK = assigned_xK.reshape(rows_MxK.shape)
        out |= dict(zip(keys, assigned, strict=True))
        means[name] = rows_MxK.mean(0)
        bits = 1 / jnp.log(2.0)
        metrics[f"collapse/marginal_bits/{name}"] = (
            bits * jax.scipy.special.entr(q_MxK.mean(0)).sum()
        )
        metrics[f"collapse/assignment_bits/{name}"] = (
            bits * jax.scipy.special.entr(q_MxK).sum(-1).mean()
        )
    return out, {**metrics, MEAN_LOGITS: means}
