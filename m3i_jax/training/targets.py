"""Target representations of a step, computed first and without gradient (M3I section 3.4): clean views through the target encoders, each
view once, and what a term makes of them: pixels, tokens, a pooled vector, a projection."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax.models import m3i
from m3i_jax.objective import posterior
from m3i_jax.objective.methods import Projection, Term
from m3i_jax.training.plan import Goal, Plan, View, view

Goals = dict[Goal, jax.Array]


def together(parts: list[jax.Array]) -> jax.Array:
    """[B, ...] arrays as one [B * R, ...] in which those of an input lie side by side: the batch stays sharded as it was."""
    stacked = jnp.stack(parts, 1)
    return stacked.reshape(-1, *stacked.shape[2:])


def apart(x_BRx: jax.Array, count: int) -> list[jax.Array]:
    """The inverse of `together`."""
    split = x_BRx.reshape(-1, count, *x_BRx.shape[1:])
    return [split[:, r] for r in range(count)]


def features(plan: Plan, teachers: dict[str, Any], crops: dict[int, jax.Array]) -> dict[View, jax.Array]:
    """Tokens [B, T, D] of every target view, cls first; one call of a target encoder for all views it reads in one way."""
    out: dict[View, jax.Array] = {}
    for kind in sorted({(v.encoder, v.blocks) for v in plan.views}):
        mine = [v for v in plan.views if (v.encoder, v.blocks) == kind]
        stacked = together([crops[v.crop] for v in mine])
        z = m3i.encode(plan.config, teachers[kind[0]]["encoder"], stacked, blocks=min(kind[1], plan.config.model.encoder.depth))
        out |= dict(zip(mine, apart(jax.lax.stop_gradient(z), len(mine)), strict=True))
    return out


def in_space(plan: Plan, tree: Any, space: Any, z_BxTxD: jax.Array) -> jax.Array:
    """Features in the space where a term compares them: [B, N, D] of dense terms, [B, D] of pooled ones."""
    first = int(plan.config.model.encoder.cls_token)
    if space is None:
        return z_BxTxD[:, first:]
    if isinstance(space, Projection):
        return m3i.project(plan.config, tree.get("heads", {space.name: {}}), space, pool(plan, space, z_BxTxD[:, first:], z_BxTxD[:, 0]))
    return m3i.target_projection(plan.config, tree["decoder"], z_BxTxD)[:, first:]


def pool(plan: Plan, space: Projection, tokens_RxKxD: jax.Array, cls_RxD: jax.Array | None) -> jax.Array:
    """What a projection projects: the mean of the tokens, cls, or every token by itself."""
    if space.pool == "none":
        return tokens_RxKxD
    if space.pool == "cls" and cls_RxD is not None:
        return cls_RxD
    return tokens_RxKxD.astype(jnp.float32).mean(1)


def goals(plan: Plan, teachers: dict[str, Any], crops: dict[int, jax.Array]) -> Goals:
    """Every goal of the plan, [B, N, D] or [B, D], without gradient."""
    seen = features(plan, teachers, crops)
    out: Goals = {}
    for goal in plan.goals:
        if goal.target.of == "pixels":
            out[goal] = crops[goal.target.crop]  # type: ignore[index]  # pixels always name a crop
        else:
            out[goal] = jax.lax.stop_gradient(in_space(plan, teachers[goal.target.encoder], goal.space, seen[view(goal.target)]))
    return out


def prepared(term: Term, goal: jax.Array) -> jax.Array:
    """A goal as the posterior of a term compares it: pixels by patch, features as the form wants them; float32."""
    if term.target.of == "pixels":
        return posterior.patch_normalize(goal)
    return term.posterior.prepare(goal)


def kind(goal: Goal) -> Goal:
    """What goals have in common whose features one encoder makes in one space, whatever the view: those share a second moment."""
    return goal._replace(target=dataclasses.replace(goal.target, crop=0))


def moments(plan: Plan, found: Goals) -> dict[Goal, jax.Array]:
    """Second moment C [D, D] of the learned targets of each kind, over all their tokens and views of the batch together."""
    out: dict[Goal, list[jax.Array]] = {}
    for goal in plan.goals:  # in the order of the terms: what comes out of a compiled loop is sorted
        if goal.target.learned and (goal.space in (None, "decoder") or not out):
            rows = posterior.layer_normalize(found[goal].reshape(-1, found[goal].shape[-1]))
            out.setdefault(kind(goal), []).append(posterior.second_moment(rows))
    return {goal: sum(each[1:], each[0]) / len(each) for goal, each in out.items()}
