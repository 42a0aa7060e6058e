"""Target representations of a step, computed first and without gradient (M3I section 3.4): clean
views through the target encoders, each view once, and what a term makes of them: pixels, tokens, a
pooled vector, a projection."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax.models import m3i
from m3i_jax.objective import losses
from m3i_jax.objective.terms import ProjectionHead, Term
from m3i_jax.training.plan import Plan, TargetKey, TargetPass, target_pass

TargetFeatures = dict[TargetKey, jax.Array]


def stack_rows(parts: list[jax.Array]) -> jax.Array:
    """[B, ...] arrays as one [B * R, ...] in which those of an input lie side by side: the batch
    stays sharded as it was."""
    stacked = jnp.stack(parts, 1)
    return stacked.reshape(-1, *stacked.shape[2:])


def unstack_rows(x_BRx: jax.Array, count: int) -> list[jax.Array]:
    """The inverse of `stack_rows`."""
    split = x_BRx.reshape(-1, count, *x_BRx.shape[1:])
    return [split[:, r] for r in range(count)]


def encode_targets(
    plan: Plan, teachers: dict[str, Any], crops: dict[int, jax.Array]
) -> dict[TargetPass, jax.Array]:
    """Tokens [B, T, D] of every target view, cls first; one call of a target encoder for all views
    it reads in one way."""
    out: dict[TargetPass, jax.Array] = {}
    for kind in sorted({(v.encoder, v.blocks) for v in plan.views}):
        mine = [v for v in plan.views if (v.encoder, v.blocks) == kind]
        stacked = stack_rows([crops[v.crop] for v in mine])
        z = m3i.encode(
            plan.config,
            teachers[kind[0]]["encoder"],
            stacked,
            blocks=min(kind[1], plan.config.model.encoder.depth),
        )
        out |= dict(zip(mine, unstack_rows(jax.lax.stop_gradient(z), len(mine)), strict=True))
    return out


def project_target(plan: Plan, tree: Any, space: Any, z_BxTxD: jax.Array) -> jax.Array:
    """Features in the space where a term compares them: [B, N, D] of dense terms, [B, D] of pooled
    ones."""
    first = int(plan.config.model.encoder.cls_token)
    if space is None:
        return z_BxTxD[:, first:]
    if isinstance(space, ProjectionHead):
        return m3i.project(
            plan.config,
            tree.get("heads", {space.name: {}}),
            space,
            pool_target(plan, space, z_BxTxD[:, first:], z_BxTxD[:, 0]),
        )
    return m3i.target_projection(plan.config, tree["decoder"], z_BxTxD)[:, first:]


def pool_target(
    plan: Plan, space: ProjectionHead, tokens_RxKxD: jax.Array, cls_RxD: jax.Array | None
) -> jax.Array:
    """What a projection projects: the mean of the tokens, cls, or every token by itself."""
    if space.pool == "none":
        return tokens_RxKxD
    if space.pool == "cls" and cls_RxD is not None:
        return cls_RxD
    return tokens_RxKxD.astype(jnp.float32).mean(1)


def target_features(
    plan: Plan, teachers: dict[str, Any], crops: dict[int, jax.Array]
) -> TargetFeatures:
    """Every goal of the plan, [B, N, D] or [B, D], without gradient."""
    seen = encode_targets(plan, teachers, crops)
    out: TargetFeatures = {}
    for goal in plan.goals:
        if goal.target.of == "pixels":
            out[goal] = crops[goal.target.crop]  # type: ignore[index]  # pixels always name a crop
        else:
            out[goal] = jax.lax.stop_gradient(
                project_target(
                    plan, teachers[goal.target.encoder], goal.space, seen[target_pass(goal.target)]
                )
            )
    return out


def normalize_target(term: Term, goal: jax.Array) -> jax.Array:
    """A goal as the posterior of a term compares it: pixels by patch, features as the form wants
    them; float32."""
    if term.target.of == "pixels":
        return losses.patch_normalize(goal)
    return term.posterior.prepare(goal)


def moment_key(goal: TargetKey) -> TargetKey:
    """What goals have in common whose features one encoder makes in one space, whatever the view:
    those share a second moment."""
    return goal._replace(target=dataclasses.replace(goal.target, crop=0))


def target_moments(plan: Plan, found: TargetFeatures) -> dict[TargetKey, jax.Array]:
    """Second moment C [D, D] of the learned targets of each kind, over all their tokens and views
    of the batch together."""
    out: dict[TargetKey, list[jax.Array]] = {}
    # in the order of the terms: what comes out of a compiled loop is sorted
    for goal in plan.goals:
        if goal.target.learned and (goal.space in (None, "decoder") or not out):
            rows = losses.layer_normalize(found[goal].reshape(-1, found[goal].shape[-1]))
            out.setdefault(moment_key(goal), []).append(losses.second_moment(rows))
    return {goal: sum(each[1:], each[0]) / len(each) for goal, each in out.items()}
