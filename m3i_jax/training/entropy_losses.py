"""Losses of the entropy terms of an objective, from features of passes that its predictions read.

Shapes: R rows of a pass, T rows of features (R, or R times the tokens of a pass), D width."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax.models import heads
from m3i_jax.objective import stream_keys
from m3i_jax.objective.entropy_terms import EntropyTerm
from m3i_jax.objective.posteriors import LossSum
from m3i_jax.objective.terms import Pass, ProjectionHead, Term
from m3i_jax.training import predictions
from m3i_jax.training.plan import Plan
from m3i_jax.training.predictions import Arrays, Features
from m3i_jax.training.targets import pool_tokens, project_target
from m3i_jax.training.views import Batch, Inputs


def entropy_key(seed: int, batch: Batch) -> jax.Array:
    """Returns the random key of the estimators in a step, from the position of its first image:
    equal on all devices and after a restart.

    >>> entropy_key(0, {"position": jnp.zeros((4, 2), jnp.uint32)}).shape
    ()
    """
    high, low = batch["position"][0]
    base = stream_keys.purpose_key(seed, stream_keys.ENTROPY)
    return jax.random.fold_in(jax.random.fold_in(base, high), low)


def entropy_rows(plan: Plan, term: EntropyTerm, inputs: Inputs) -> int:
    """Returns the number of rows that an entropy term counts: images, or the tokens of an image in
    a pass."""
    read = inputs[term.reads]
    rows = read.mask.shape[0]
    if term.head.pool != "none":
        return rows
    whole = not term.reads.mixed and (not term.reads.masked or term.reads.mask_tokens)
    # the mask has the cells of a large view, also where the pass reads a small one
    tokens = (plan.config.view_size(term.reads.view) // plan.config.model.encoder.patch_size) ** 2
    return rows * (tokens if whole else read.cells(term.image).shape[1])


class OnlineProjections:
    """Projections of online passes without predictor, each computed once: targets with a gradient
    and the features of entropy terms. Predictions without predictor are such projections.

    Args:
      plan: of the run.
      params: the heads.
      z, inputs: of these rows.
      predicted: {term: its prediction}.
    """

    def __init__(
        self, plan: Plan, params: Any, z: Features, inputs: Inputs, predicted: Arrays
    ) -> None:
        self._plan, self._params, self._z, self._inputs = plan, params, z, inputs
        self._known: dict[Any, jax.Array] = {}
        for i, x in predicted.items():
            term = plan.terms[i]
            if isinstance(term.head, ProjectionHead) and term.head.predictor is None:
                self._known[_key(term.reads, term.image, term.head)] = x

    def of_target(self, term: Term) -> jax.Array:
        """Returns [B, D] or [B, N, D]: the target of a term with a gradient, in its projection
        space; the mean of those of several views."""
        assert isinstance(term.head, ProjectionHead) and term.target.view is not None
        projected = []
        for view in (term.target.view, *term.target.others):
            read = Pass(view=view)
            key = _key(read, "own", term.head)
            if key not in self._known:
                space = self._plan.target_key(term).space
                self._known[key] = project_target(self._plan, self._params, space, self._z[read])
            projected.append(self._known[key])
        return sum(projected[1:], projected[0]) / len(projected)

    def __call__(self, term: EntropyTerm) -> jax.Array:
        """[R, D], or [R, K, D] of every token."""
        key = _key(term.reads, term.image, term.head)
        if key not in self._known:
            tokens, _, cls = predictions.visible_tokens(self._plan, term, self._z, self._inputs)
            self._known[key] = heads.apply_projector(
                self._plan.config.model,
                self._params.get("heads", {}).get(term.head.name, {}),
                term.head,
                pool_tokens(term.head, tokens, cls),
            )
        return self._known[key]


def entropy_features(plan: Plan, params: Any, z: Features, inputs: Inputs) -> Arrays:
    """Returns {entropy term: its features, float32}, without those of other predictions."""
    project = OnlineProjections(plan, params, z, inputs, {})
    return {i: project(t).astype(jnp.float32) for i, t in plan.numbered_entropies().items()}


def _key(read: Pass, image: str, head: ProjectionHead) -> Any:
    space = dataclasses.replace(head, predictor=None, match="position")
    if space.projector is None:  # features of the encoder, whatever the name
        space = dataclasses.replace(space, name="")
    return read, image, space


def entropy_cost(plan: Plan, term: EntropyTerm, features: jax.Array, batch: Batch) -> LossSum:
    """Returns the cost of one entropy term: every row counts once.

    Args:
      plan: of the run.
      term: an entropy term.
      features: as of `OnlineProjections`.
      batch: of the rows.
    """
    x_TxD = features.reshape(-1, features.shape[-1]).astype(jnp.float32)
    key = entropy_key(plan.config.seed, batch)
    return term.estimator.cost(x_TxD, jnp.ones(x_TxD.shape[0]), key)
