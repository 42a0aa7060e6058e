"""The posterior of methods that predict a soft assignment to prototypes (DINO, iBOT, DINOv2, CAPI),
and the choice of the constraint on its targets."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax.objective import information, prototype_targets
from m3i_jax.objective.posteriors import Form, LossInputs, LossSum
from m3i_jax.objective.terms import ClusterHead, ProjectionHead, Term, Terms

CONSTRAINTS = ("centering", "sinkhorn", "position_sinkhorn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrototypeSoftmax(Form):
    """Cross-entropy of softmax(logits / temperature) with the target encoder's assignment. The
    marginal of its bits is the mean assignment.

    Prediction and target of `cost` are logits and distributions over the K prototypes of a
    `ProjectionHead` that has some; `constraint` names what made the distributions of the target
    encoder's logits over the whole batch.

    Attributes:
      temperature: of the prediction.
      constraint: on the marginal of the targets: `centering`, `sinkhorn`, or `position_sinkhorn`,
        which balances the tokens of every position by themselves (CAPI).
      target_temperature: of the targets, at the start of the run and after its rise.

    >>> logits, target = jnp.zeros((2, 4)), jnp.eye(4)[:2]
    >>> cost = PrototypeSoftmax().cost(logits, target, jnp.ones(2), LossInputs())
    >>> print(f"{cost.sum / cost.count:.4f}")  # log 4
    1.3863
    """

    temperature: float = 0.1
    constraint: str = "centering"
    target_temperature: tuple[float, float] = (0.04, 0.07)

    def __post_init__(self) -> None:
        if self.constraint not in CONSTRAINTS:
            raise ValueError(
                f"constraint {self.constraint!r}: must be one of {', '.join(CONSTRAINTS)}"
            )

    def cost(
        self, prediction: jax.Array, target: jax.Array, where: jax.Array, given: LossInputs
    ) -> LossSum:
        total, count = prototype_targets.soft_cross_entropy(
            prediction, target, where, temperature=self.temperature
        )
        counts_K = (where[..., None] * target).reshape(-1, target.shape[-1]).sum(0)
        evidence = {"nll": total, "counts": counts_K}
        return LossSum(total, count, jax.lax.stop_gradient(evidence))

    def bits(self, evidence: dict[str, jax.Array], count: jax.Array) -> jax.Array:
        nll = evidence["nll"] / jnp.maximum(count, 1)
        return information.category_bits(nll, evidence["counts"])

    def assign(
        self, logits_xK: jax.Array, center_K: jax.Array, rise: jax.Array | float
    ) -> jax.Array:
        """The targets of all rows of a batch, of the target encoder's logits.

        Args:
          logits_xK: of the whole batch, of all views of a space: [M, K] of images, [M, N, K] of
            tokens.
          center_K: the running mean of the logits, for `centering`.
          rise: how far the temperature has risen, in 0..1.
        """
        first, last = self.target_temperature
        tau = first + (last - first) * jnp.asarray(rise, jnp.float32)
        if self.constraint == "centering":
            return prototype_targets.centering(logits_xK, center_K, temperature=tau)
        balance = functools.partial(prototype_targets.sinkhorn, temperature=tau)
        if self.constraint == "position_sinkhorn" and logits_xK.ndim == 3:
            return jax.vmap(balance, in_axes=1, out_axes=1)(logits_xK)
        return balance(logits_xK.reshape(-1, logits_xK.shape[-1])).reshape(logits_xK.shape)


def space_name(space: ProjectionHead | ClusterHead, of: str) -> str:
    """The name under which the assignments of a space are balanced: those of images and those of
    tokens are two sets, also where they share prototypes.

    >>> space_name(ProjectionHead(name="global", prototypes="unit"), "tokens")
    'global_tokens'
    """
    return f"{space.name}_{of}"


def prototype_terms(terms: Terms) -> dict[str, Term]:
    """{name of a space with prototypes: one of the terms that predict in it}.

    Raises:
      ValueError: two terms of a space whose posteriors make other targets of the same logits.
    """
    out: dict[str, Term] = {}
    for term in terms:
        space = term.space
        if isinstance(term.posterior, PrototypeSoftmax) and space is not None:
            name = space_name(space, term.target.of)
            other = out.setdefault(name, term)
            if other.posterior != term.posterior:
                raise ValueError(
                    f"the terms {other.name} and {term.name} predict assignments to the same"
                    f" prototypes, and their posteriors differ: {other.posterior} and"
                    f" {term.posterior}"
                )
    return out


def with_constraint(
    terms: Terms, *, constraint: str = "method", target_temperature: tuple[float, ...] = ()
) -> Terms:
    """The terms with another constraint or temperature of the assignments that they predict.

    Args:
      terms: the objective.
      constraint: centering or sinkhorn; method keeps the terms' own.
      target_temperature: at the start and after the rise; () keeps the terms' own.
    """
    changes: dict[str, Any] = {} if constraint == "method" else {"constraint": constraint}
    if target_temperature:
        changes["target_temperature"] = tuple(target_temperature)
    return tuple(
        dataclasses.replace(t, posterior=dataclasses.replace(t.posterior, **changes))
        if changes and isinstance(t.posterior, PrototypeSoftmax)
        else t
        for t in terms
    )
