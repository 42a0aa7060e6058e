"""Posteriors P^(z_y | prediction) as values; every row of Table 1 names one (M3I section 3.1).

`cost` returns the loss, a negative log-likelihood, and the sums from which `bits` estimates the
information that the prediction carries about its target. Both add up over parts of a batch; for
`Boltzmann` and `DenseCL` because `LossInputs.keys` holds the targets of the whole batch. They do
not add up for `NTXent`, `BarlowTwins` and `Prototypes`, which compare the images of one part with
each other.

`SquaredError`, `NTXent` and `BarlowTwins` have gradients through both sides. Nothing in a squared
error of two views keeps them from being constant: an objective adds an entropy term
(`entropy_terms`), without which it collapses.

R rows (images), N positions, D width, B images of a batch, K prototypes, C classes, E joint width.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from m3i_jax.objective import contrastive, information, losses, regression_losses
from m3i_jax.objective.numerics import float32, l2_normalize, zero_masked_rows
from m3i_jax.objective.sigmoid_pairs import text_sigmoid_sums
from m3i_jax.objective.similarity import candidate_counts


class LossSum(NamedTuple):
    """sum, count: of the loss. evidence: further sums without gradient, for `bits`."""

    sum: jax.Array
    count: jax.Array  # type: ignore[assignment]  # the loss's name; shadows tuple.count
    evidence: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossInputs:
    """Inputs of a posterior beside prediction and target.

    Attributes:
      moment_weight, moment: the weight of the second-moment term, and C [D, D] over all targets.
      temperature: for a softmax that does not fix its own.
      smoothing: label smoothing.
      keys, index: targets of the whole batch [B, ...], and the keys of the rows, [R].
      parameters: prototypes [K, D], the logarithm of the inverse temperature of text, or the
        `scalars` of the posterior.
      group: [R], rows of equal number are no negatives of each other.
      chunk: captions compared at a time; 0: all.
      axes: axes of the mesh that split the rows; (): none, or not known.
      parallel: bool [R], captions whose tokens are predicted at once.
    """

    moment_weight: float = 0.0
    moment: jax.Array | None = None
    temperature: float = 0.2
    smoothing: float = 0.1
    keys: jax.Array | None = None
    index: jax.Array | None = None
    parameters: Any = None
    group: jax.Array | None = None
    chunk: int = 0
    axes: tuple[str, ...] = ()
    parallel: jax.Array | None = None


class Posterior:
    """The base of posteriors. A subclass defines `cost`, and is a frozen dataclass, because terms
    are compared and hashed.

    Attributes:
      batch_keys: whether `cost` needs the targets of the whole batch.
      grad_through_target: whether the target may have a gradient; the loss then prevents its
        collapse.
    """

    batch_keys: ClassVar[bool] = False
    grad_through_target: ClassVar[bool] = False

    @property
    def scalars(self) -> Mapping[str, float]:
        """Numbers that it trains, by name, with their first values."""
        return {}

    def prepare(self, target: Any, /) -> Any:
        """Returns the target as `cost` compares it; pixels are prepared by `prepare_pixels`."""
        return target

    def prepare_pixels(self, target: jax.Array, /) -> jax.Array:
        """Returns patches of pixels as `cost` compares them, each normalised by itself."""
        return losses.patch_normalize(target)

    def cost(self, prediction: Any, target: Any, where: Any, given: LossInputs, /) -> LossSum:
        """Returns the loss of arrays [R, N, D] with weights [R, N], or [R, D] with weights [R]."""
        raise NotImplementedError

    def bits(self, evidence: dict[str, jax.Array], count: jax.Array, /) -> jax.Array | None:
        """Returns the information of a prediction about its target; None for a loss that is no
        likelihood."""
        return None


def moments(prediction: jax.Array, target: jax.Array, where: jax.Array) -> dict[str, jax.Array]:
    """Sums of a Gaussian model: squared error, squared targets and the targets themselves."""
    p, t, w = (jax.lax.stop_gradient(x.astype(jnp.float32)) for x in (prediction, target, where))
    p, t, w = zero_masked_rows(p, t, w)
    w_x1 = w[..., None]
    return {
        "error": (w_x1 * jnp.square(p - t)).sum(),
        "square": (w_x1 * jnp.square(t)).sum(),
        "first": (w_x1 * t).sum(tuple(range(t.ndim - 1))),
    }


class Regression(Posterior):
    """Posteriors that predict the target itself, with the bits of a Gaussian of its `moments`."""

    def prepare(self, target: jax.Array) -> jax.Array:
        return losses.layer_normalize(target)

    def bits(self, evidence: dict[str, jax.Array], count: jax.Array) -> jax.Array:
        n, width = jnp.maximum(count, 1), evidence["first"].shape[-1]
        variance = (evidence["square"] / n - jnp.square(evidence["first"] / n).sum()) / width
        return information.gaussian_bits(evidence["error"] / n / width, variance, width)


class Softmax(Posterior):
    """Posteriors that select one of several targets; their marginal is uniform over these."""

    def bits(self, evidence: dict[str, jax.Array], count: jax.Array) -> jax.Array:
        n = jnp.maximum(count, 1)
        return information.softmax_bits(evidence["nll"] / n, evidence["log_choices"] / n)

    @staticmethod
    def evidence(nll: jax.Array, count: jax.Array, choices: Any) -> dict[str, jax.Array]:
        return {
            "nll": jax.lax.stop_gradient(nll),
            "log_choices": count * jnp.log(jnp.maximum(jnp.asarray(choices, jnp.float32), 1.0)),
        }

    @classmethod
    def evidence_of_pairs(
        cls, nll: jax.Array, count: jax.Array, where: jax.Array, group: jax.Array | None
    ) -> dict[str, jax.Array]:
        """Evidence of a softmax over the pairs of the rows, of which rows of equal `group` are no
        candidates of each other: fewer candidates can tell less."""
        out = cls.evidence(nll, count, (where > 0).sum())
        if group is None:
            return out
        log_choices_R = jnp.log(jnp.maximum(candidate_counts(jnp.asarray(group), where), 1.0))
        return out | {"log_choices": (where * log_choices_R).sum()}


class Categorical(Posterior):
    """Posteriors over classes or prototypes; their marginal is the mean of the targets. The
    evidence is nll, and counts of the targets."""

    def bits(self, evidence: dict[str, jax.Array], count: jax.Array) -> jax.Array:
        nll = evidence["nll"] / jnp.maximum(count, 1)
        return information.category_bits(nll, evidence["counts"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian(Regression):
    """Squared error per element; with `second_moment`, plus SiameseIM's anti-collapse term, whose
    weight is `LossInputs.moment_weight`.

    >>> p = jnp.ones((2, 3, 4))
    >>> print(Gaussian().cost(p, p + 1, jnp.ones((2, 3)), LossInputs()).sum)  # 6 rows, 1 an element
    6.0
    """

    second_moment: bool = False

    def cost(
        self, prediction: jax.Array, target: jax.Array, where: jax.Array, given: LossInputs
    ) -> LossSum:
        width = target.shape[-1]
        p, t, w = prediction.reshape(-1, width), target.reshape(-1, width), where.reshape(-1)
        weight = given.moment_weight if self.second_moment else 0.0
        total, count = losses.gaussian(
            p, t, w, second_moment=weight, moment_DxD=given.moment if weight else None
        )
        return LossSum(total, count, moments(p, t, w))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothL1(Regression):
    """Smooth L1 (data2vec and feature distillation: beta 2), to the target normalised without scale
    and offset, or as it is.

    >>> p, t = jnp.zeros((1, 4)), jnp.ones((1, 4))
    >>> print(SmoothL1().cost(p, t, jnp.ones(1), LossInputs()).sum)  # d^2 / (2 beta)
    0.25
    """

    beta: float = 2.0
    normalized: bool = True

    def prepare(self, target: jax.Array) -> jax.Array:
        return losses.layer_normalize(target) if self.normalized else target

    def cost(
        self, prediction: jax.Array, target: jax.Array, where: jax.Array, given: LossInputs
    ) -> LossSum:
        total, count = regression_losses.smooth_l1(prediction, target, where, beta=self.beta)
        return LossSum(total, count, moments(prediction, target, where))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(Regression):
    """2 - 2 cos, the Gaussian of vectors of length 1 (BYOL). `scale` is 2 for a method that adds up
    both directions.

    >>> print(Cosine().cost(jnp.eye(2), jnp.eye(2)[::-1], jnp.ones(2), LossInputs()).sum)
    4.0
    """

    scale: float = 1.0

    def prepare(self, target: jax.Array) -> jax.Array:
        return target

    def cost(
        self, prediction: jax.Array, target: jax.Array, where: jax.Array, given: LossInputs
    ) -> LossSum:
        total, count = regression_losses.cosine(prediction, target, where)
        return LossSum(
            self.scale * total,
            count,
            moments(l2_normalize(float32(prediction)), l2_normalize(float32(target)), where),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSimilarity(Posterior):
    """Squared error of the cosines of all pairs of tokens of an image (Gram anchoring of DINOv3).

    Its information is that of a Gaussian around the predicted cosines, above one around the mean
    cosine of different tokens. Bits are those of a token: every pair belongs to two.

    >>> cost = TokenSimilarity().cost(jnp.eye(2)[None], jnp.ones((1, 2, 2)), jnp.ones((1, 2)), None)
    >>> print(cost.sum / cost.count)
    0.5
    """

    def cost(
        self, prediction: jax.Array, target: jax.Array, where: jax.Array, given: Any
    ) -> LossSum:
        return LossSum(*regression_losses.similarity_sums(prediction, target, where))

    def bits(self, evidence: dict[str, jax.Array], count: jax.Array) -> jax.Array:
        pairs = jnp.maximum(evidence["pairs"], 1)
        error, square, first = (evidence[name] / pairs for name in ("error", "square", "first"))
        variance = jnp.maximum(square - jnp.square(first), 0.0)
        of_token = evidence["pairs"] / jnp.maximum(count, 1) / 2
        return of_token * information.gaussian_bits(error, variance, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boltzmann(Softmax):
    """InfoNCE over the targets of the whole batch; for dense targets, over the targets at the same
    position of all images.

    `temperature`: None for that of the configuration. `scale` multiplies the loss (MoCo v3: 2 tau,
    and 2 for the sum of both directions).

    >>> z = jnp.eye(3)
    >>> total = Boltzmann(temperature=0.5).cost(z, z, jnp.ones(3), LossInputs()).sum
    >>> print(f"{total / 3:.4f}")  # log(1 + 2 exp(-2))
    0.2395
    """

    temperature: float | None = None
    scale: float = 1.0
    batch_keys: ClassVar[bool] = True

    def cost(
        self, prediction: jax.Array, target: jax.Array, where: jax.Array, given: LossInputs
    ) -> LossSum:
        keys = target if given.keys is None else given.keys
        index = jnp.arange(prediction.shape[0]) if given.index is None else given.index
        tau = given.temperature if self.temperature is None else self.temperature
        if prediction.ndim == 3:
            total, count = contrastive.dense_boltzmann(
                prediction, keys, where, index_B=index, temperature=tau
            )
        else:
            total, count = losses.boltzmann(prediction, keys, index, where, temperature=tau)
        return LossSum(self.scale * total, count, self.evidence(total, count, keys.shape[0]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseCL(Softmax):
    """InfoNCE of dense targets against the mean target of every other image (DenseCL with the batch
    in place of its queue).

    The mean is over the keys, which hold every cell of the view once; the targets may be a
    selection of cells, with repeats.

    >>> z = jnp.eye(2)[:, None]
    >>> total = DenseCL(temperature=0.5).cost(z, z, jnp.ones((2, 1)), LossInputs()).sum
    >>> print(f"{total / 2:.4f}")  # log(1 + exp(-2))
    0.1269
    """

    temperature: float | None = None
    batch_keys: ClassVar[bool] = True

    def cost(
        self, prediction: jax.Array, target: jax.Array, where: jax.Array, given: LossInputs
    ) -> LossSum:
        keys = target if given.keys is None else given.keys
        tau = given.temperature if self.temperature is None else self.temperature
        total, count = contrastive.densecl(
            prediction, target, keys.mean(1), where, index_B=given.index, temperature=tau
        )
        return LossSum(total, count, self.evidence(total, count, keys.shape[0]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NTXent(Softmax):
    """NT-Xent of two views, gradient through both (SimCLR).

    >>> z = jnp.eye(2)
    >>> total = NTXent(temperature=0.5).cost(z, z, jnp.ones(2), LossInputs()).sum
    >>> print(f"{total / 2:.4f}")  # log(1 + 2 exp(-2))
    0.2395
    """

    temperature: float | None = None
    grad_through_target: ClassVar[bool] = True

    def cost(
        self, prediction: jax.Array, target: jax.Array, where: jax.Array, given: LossInputs
    ) -> LossSum:
        tau = given.temperature if self.temperature is None else self.temperature
        total, count = contrastive.nt_xent(prediction, target, where, temperature=tau)
        return LossSum(total, count, self.evidence(total, count, 2 * (where > 0).sum() - 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BarlowTwins(Posterior):
    """Cross-correlation of two views against the identity (Barlow Twins). It is no likelihood and
    has no bits.

    >>> z = jnp.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> print(round(float(BarlowTwins().cost(z, z, jnp.ones(4), LossInputs()).sum), 4))
    0.0
    """

    off_diagonal: float = 0.0051
    grad_through_target: ClassVar[bool] = True

    def cost(
        self, prediction: jax.Array, target: jax.Array, where: jax.Array, given: LossInputs
    ) -> LossSum:
        total, count = contrastive.barlow_twins(
            prediction, target, where, off_diagonal=self.off_diagonal
        )
        return LossSum(total, count, {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prototypes(Categorical):
    """Assignment to trained prototypes, with the entropy of the mean assignment maximised (MSN).
    The marginal of its bits is the mean assignment.

    >>> given = LossInputs(parameters=jnp.eye(2))
    >>> print(Prototypes().cost(jnp.eye(2), jnp.eye(2), jnp.ones(2), given).count)
    2.0
    """

    temperature: float = 0.1
    sharpening: float = 0.25
    sinkhorn: int = 3
    mean_entropy: float = 1.0

    def cost(
        self, prediction: jax.Array, target: jax.Array, where: jax.Array, given: LossInputs
    ) -> LossSum:
        k_KxD = given.parameters
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "sharpening": self.sharpening,
            "sinkhorn": self.sinkhorn,
        }

        def loss(mean_entropy: float) -> tuple[jax.Array, jax.Array]:
            return contrastive.prototypes(
                prediction, target, k_KxD, where, mean_entropy=mean_entropy, **options
            )

        q_BxK = contrastive.assignments(target, k_KxD, where, **options)
        total, count = loss(self.mean_entropy)
        nll = jax.lax.stop_gradient(loss(0.0)[0])
        return LossSum(
            total,
            count,
            {"nll": nll, "counts": jax.lax.stop_gradient((where[:, None] * q_BxK).sum(0))},
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CategorySoftmax(Categorical):
    """Softmax cross-entropy over the classes, with label smoothing (M3I section 3.2).

    >>> logits, label = jnp.zeros((2, 4)), jnp.array([1, -1])
    >>> print(CategorySoftmax().cost(logits, label, jnp.ones(2), LossInputs()).count)
    1.0
    """

    def cost(
        self, prediction: jax.Array, target: jax.Array, where: jax.Array, given: LossInputs
    ) -> LossSum:
        total, count = losses.category(prediction, target, where, smoothing=given.smoothing)
        nll, _ = losses.category(jax.lax.stop_gradient(prediction), target, where, smoothing=0.0)
        present = where * (target >= 0)
        labels = (jax.nn.one_hot(target, prediction.shape[-1]) * present[:, None]).sum(0)
        return LossSum(total, count, {"nll": nll, "counts": labels})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSoftmax(Softmax):
    """Symmetric softmax over the captions and the images of the batch (CLIP; M3I section 3.2).

    >>> given = LossInputs(parameters=jnp.log(2.0))
    >>> total = TextSoftmax().cost(jnp.eye(2), jnp.eye(2), jnp.ones(2), given).sum
    >>> print(f"{total / 2:.4f}")  # log(1 + exp(-2))
    0.1269
    """

    def cost(
        self, prediction: jax.Array, target: jax.Array, where: jax.Array, given: LossInputs
    ) -> LossSum:
        total, count = losses.text(
            prediction, target, given.parameters, where, group_B=given.group, chunk=given.chunk
        )
        return LossSum(total, count, self.evidence_of_pairs(total, count, where, given.group))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquaredError(Regression):
    """Squared error per element of two representations as they are, not normalised, with gradient
    through both. The mean squared distance of two views from their mean is a quarter of it.

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
        return LossSum(total, count, self.evidence_of_pairs(nll, count, where, given.group))
