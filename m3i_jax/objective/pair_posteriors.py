"""Posteriors whose two sides both receive gradients: two views of an image (VICReg, LeJEPA), and
images with their captions as pairs (SigLIP).

Nothing in a squared error of two views keeps them from being constant: an objective adds an entropy
term (`entropy_terms`), without which it collapses.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax

from m3i_jax.objective import regression_losses
from m3i_jax.objective.posteriors import LossInputs, LossSum, Regression, Softmax, moments
from m3i_jax.objective.sigmoid_pairs import text_sigmoid_sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquaredError(Regression):
    """Squared error per element of two representations as they are, not normalised, with gradient
    through both. The mean squared distance of two views from their mean is a quarter of it.

    >>> import jax.numpy as jnp
    >>> total = SquaredError(scale=25.0).cost(jnp.eye(2), 0 * jnp.eye(2), jnp.ones(2), LossInputs())
    >>> print(total.sum)
    25.0
    """

    scale: float = 1.0
    grad_through_target: ClassVar[bool] = True

    def prepare(self, target: jax.Array) -> jax.Array:
        return target

    def cost(
        self, prediction: jax.Array, target: jax.Array, where: jax.Array, given: LossInputs
    ) -> LossSum:
        total, count = regression_losses.squared_error(prediction, target, where)
        return LossSum(self.scale * total, count, moments(prediction, target, where))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSigmoid(Softmax):
    """A binary decision for every pair of an image and a caption (SigLIP), with trained scale and
    bias, whose initial values are fields. Its bits are those of a softmax over the same products:
    the bound of InfoNCE.

    >>> import jax.numpy as jnp
    >>> zero = {"logit_scale": jnp.zeros(()), "logit_bias": jnp.zeros(())}
    >>> given = LossInputs(parameters=zero)
    >>> total = TextSigmoid().cost(jnp.eye(2), jnp.eye(2), jnp.ones(2), given).sum
    >>> print(f"{total / 2:.4f}")  # log(1 + exp(-1)) + log 2
    1.0064
    """

    scale: float = 10.0
    bias: float = -10.0

    @property
    def scalars(self) -> Mapping[str, float]:
        return {"logit_scale": math.log(self.scale), "logit_bias": self.bias}

    def cost(
        self, prediction: jax.Array, target: jax.Array, where: jax.Array, given: LossInputs
    ) -> LossSum:
        trained = given.parameters
        total, count, nll = text_sigmoid_sums(
            prediction,
            target,
            trained["logit_scale"],
            trained["logit_bias"],
            where,
            group_B=given.group,
            chunk=given.chunk,
            axes=given.axes,
        )
        return LossSum(total, count, self.evidence(nll, count, count))
