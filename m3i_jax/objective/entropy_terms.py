"""Entropy terms as values: the second family of terms of an objective, beside the predictions of
`terms`.

    I(z_x; z_y | t) = H(z_y | t_y) - H(z_y | z_x, t)
                      an estimator of `entropy`, of online features    a posterior, of a target

An objective is a tuple of prediction terms and of entropy terms. An entropy term names the pass
and the space of the features that its estimator sees. Passes and spaces are those of prediction
terms, so that it adds no call of an encoder; a row of entropy terms alone (`byol+koleo`) reads the
pass of the objective's first self-supervised term.

R rows of features, D width.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from m3i_jax.objective import entropy
from m3i_jax.objective.derived_terms import SMALL
from m3i_jax.objective.posteriors import LossSum
from m3i_jax.objective.terms import FULL, IMAGE_TARGETS, Pass, ProjectionHead, Term, Terms


class EntropyEstimator(Protocol):
    """An estimator of H(z), a frozen dataclass.

    `cost(features, where, key)` takes float32 features [R, D], weights [R] and a random key that is
    new in every step and equal on all devices. `bits(evidence, count)` is None where the loss is
    no estimate of an entropy; `reference` says what the bits are measured from.
    """

    reference: ClassVar[str]

    def cost(self, features: Any, where: Any, key: Any, /) -> LossSum: ...
    def bits(self, evidence: dict[str, jax.Array], count: jax.Array, /) -> jax.Array | None: ...


class Estimator:
    """Base of estimators. The evidence of a subclass is `entropy_sum` of its estimate, or nothing
    where its loss estimates no entropy.

    >>> print(Estimator().bits(entropy_sum((jnp.zeros(()), jnp.ones(())), math.log(2)).evidence, 1))
    1.0
    """

    reference: ClassVar[str] = ""

    def bits(self, evidence: dict[str, jax.Array], count: Any) -> jax.Array | None:
        if "nats" not in evidence:
            return None
        return evidence["nats"] / jnp.maximum(count, 1) / math.log(2)


def entropy_sum(loss: tuple[jax.Array, jax.Array], nats: Any = None) -> LossSum:
    """Returns a loss with an estimate of the entropy as evidence, which parts of a batch average.

    >>> entropy_sum((jnp.zeros(()), jnp.ones(()))).evidence
    {}
    """
    total, count = loss
    return LossSum(
        total, count, {} if nats is None else {"nats": jax.lax.stop_gradient(nats) * count}
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Koleo(Estimator):
    """`entropy.koleo`. `group`: rows that see each other; 0: the batch.

    >>> z = jnp.eye(2)
    >>> print(round(float(Koleo().cost(z, jnp.ones(2), None).sum), 4))  # -2 log sqrt 2
    -0.6931
    """

    group: int = 0
    reference: ClassVar[str] = (
        "differential, from the uniform law on the sphere; too high in many dimensions"
    )

    def cost(self, features: jax.Array, where: jax.Array, key: Any) -> LossSum:
        total, count = entropy.koleo(features, where, group=self.group)
        rows, width = features.shape
        others = count * min(self.group or rows, rows) / rows
        nats = entropy.nearest_entropy(total / jnp.maximum(count, 1), others, width)
        return entropy_sum((total, count), nats - entropy.sphere_log_area(width))


@dataclasses.dataclass(frozen=True, kw_only=True)
class VarianceCovariance(Estimator):
    """`entropy.variance_covariance` (VICReg).

    >>> print(VarianceCovariance(covariance=0.0).cost(jnp.zeros((2, 3)), jnp.ones(2), None).sum)
    49.5
    """

    variance: float = 25.0
    covariance: float = 2.0
    reference: ClassVar[str] = "of a Gaussian, above a standard normal, to second order"

    def cost(self, features: jax.Array, where: jax.Array, key: Any) -> LossSum:
        total, count, nats = entropy.variance_covariance_sums(
            features, where, variance=self.variance, covariance=self.covariance
        )
        return entropy_sum((total, count), nats)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sigreg(Estimator):
    """`entropy.sigreg` (LeJEPA), a distance to the standard normal; it has no bits.

    >>> print(Sigreg(slices=8).cost(jnp.zeros((2, 3)), jnp.ones(2), jax.random.key(0)).count)
    2.0
    """

    slices: int = 1024
    knots: int = 17
    reach: float = 3.0

    def cost(self, features: jax.Array, where: jax.Array, key: Any) -> LossSum:
        options: dict[str, Any] = {"knots": self.knots, "reach": self.reach}
        return entropy_sum(entropy.sigreg(features, where, key=key, slices=self.slices, **options))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniformity(Estimator):
    """`entropy.uniformity_loss` (Wang and Isola).

    >>> print(Uniformity().cost(jnp.eye(2), jnp.ones(2), None).sum)
    -8.0
    """

    t: float = 2.0
    reference: ClassVar[str] = "Renyi entropy of order 2 of a kernel density, above equal rows"

    def cost(self, features: jax.Array, where: jax.Array, key: Any) -> LossSum:
        total, count = entropy.uniformity_loss(features, where, t=self.t)
        return entropy_sum((total, count), -total / jnp.maximum(count, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodingRate(Estimator):
    """`entropy.coding_rate` (MCR2, SimDINO). `group`: rows of one moment; 0: the batch.

    >>> total = CodingRate(eps=1.0).cost(jnp.eye(4), jnp.ones(4), None).sum
    >>> print(f"{total / 4:.4f}")
    -1.3863
    """

    eps: float = 0.5
    group: int = 0
    scaled: bool = False
    reference: ClassVar[str] = "information of the features with noise of variance eps / D"

    def cost(self, features: jax.Array, where: jax.Array, key: Any) -> LossSum:
        options: dict[str, Any] = {"eps": self.eps, "group": self.group}
        total, count = entropy.coding_rate(features, where, scaled=self.scaled, **options)
        rows, width = features.shape
        counted = count * min(self.group or rows, rows) / rows
        scale = (width + counted) / (width * jnp.maximum(counted, 1)) if self.scaled else 1.0
        return entropy_sum((total, count), -total / jnp.maximum(count, 1) / scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MomentEnergy(Estimator):
    """`entropy.moment_energy` (SiameseIM) of layer-normalised features.

    >>> cost = MomentEnergy().cost(jnp.eye(4), jnp.ones(4), None)
    >>> print(round(2 ** float(MomentEnergy().bits(cost.evidence, cost.count)), 3))  # of 3 axes
    3.0
    """

    reference: ClassVar[str] = "Renyi entropy of order 2 of the spectrum of the second moment"

    def cost(self, features: jax.Array, where: jax.Array, key: Any) -> LossSum:
        # rows that do not count are 0 before the norm, whose gradient at NaN is NaN
        features = jnp.where((where > 0)[:, None], features, 0.0)
        centred = features - features.mean(-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
        total, count = entropy.moment_energy(normal, where)
        energy = total * features.shape[1] * count
        trace = jnp.square((where * jnp.square(normal).sum(-1)).sum())
        # equal numbers in each row leave no direction: the entropy of one
        share = jnp.where(trace > 0, energy / jnp.where(trace > 0, trace, 1.0), 1.0)
        return entropy_sum((total, count), -jnp.log(share))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropyTerm:
    """-H(z) of the online features of one pass in one space.

    Attributes:
      name: name in the log, loss/<name> and entropy/<name>; terms of equal name are averaged there.
      estimator: of H, a value of this module or one with its methods.
      reads: the pass.
      head: the space: mean, cls or every token (`pool`), and the projector, which must be that of a
        prediction term of the same row; without a projector, the encoder's features.
      weight: relative to the weights of the prediction terms of its group; in a row of entropy
        terms alone, to the whole loss that it joins.
      image, group: as of a `Term`.
    """

    name: str
    estimator: EntropyEstimator
    reads: Pass = FULL
    head: ProjectionHead = ProjectionHead(pool="cls")
    weight: float = 1.0
    image: str = "own"
    group: str = "ssp"

    def __post_init__(self) -> None:
        if self.reads.blended or self.head.predictor is not None:
            raise ValueError(
                f"entropy term {self.name}: it reads features of one image, as a projector returns"
                " them; use a pass that is not blended, and a head without a predictor"
            )
        if self.image not in ("own", "partner") or self.group not in ("ssp", "sp"):
            raise ValueError(
                f"entropy term {self.name}: image must be own or partner, group ssp or sp"
            )


EntropyTerms = tuple[EntropyTerm, ...]
# An objective as it is registered: at least one of either kind.
AnyTerms = tuple[Term | EntropyTerm, ...]


def predictions_of(terms: Sequence[Term | EntropyTerm]) -> Terms:
    """Returns the prediction terms of an objective."""
    return tuple(t for t in terms if isinstance(t, Term))


def entropies_of(terms: Sequence[Term | EntropyTerm]) -> EntropyTerms:
    """Returns the entropy terms of an objective."""
    return tuple(t for t in terms if isinstance(t, EntropyTerm))


def join_entropies(
    rows: Mapping[str, AnyTerms], renamed: Mapping[str, Terms], *, small_views: bool = True
) -> EntropyTerms:
    """Returns the entropy terms of rows that are trained together.

    A term follows the space of its row to the name that `derived_terms.uniquify` gave it, and gets
    `_<row>` appended to its own name if an earlier row has another term of that name. A row of
    entropy terms alone reads the pass of the first self-supervised term.

    Args:
      rows: {name of a row: its terms}, in order.
      renamed: the prediction terms of these rows after `derived_terms.uniquify`.
      small_views: whether images have any; without, terms that read them are left out, and a row
        of entropy terms alone has its weight relative to the others.

    Raises:
      ValueError: a projector that no prediction term of the row has, or no term to join.

    >>> row = (EntropyTerm(name="koleo", estimator=Koleo(), weight=0.1),)
    >>> from m3i_jax.objective.terms import FORMS
    >>> join_entropies({"k": FORMS["sim"], "koleo": row}, {"k": FORMS["sim"]})[0].reads.masked
    True
    """
    learned = list(
        dict.fromkeys(
            t for terms in renamed.values() for t in terms if t.target.of in IMAGE_TARGETS
        )
    )
    kinds: dict[str, Any] = {}
    out: list[EntropyTerm] = []
    for row, terms in rows.items():
        before, after = predictions_of(terms), renamed.get(row, ())
        spaces = {
            dataclasses.replace(old.head, predictor=None, match="position"): new.head.name
            for old, new in zip(before, after, strict=True)
            if isinstance(old.head, ProjectionHead) and isinstance(new.head, ProjectionHead)
        }
        same = frozenset((t.name, t.estimator, t.head.projector) for t in entropies_of(terms))
        for t in entropies_of(terms):
            if not before:
                if not learned:
                    raise ValueError(
                        f"{row} has entropy terms alone; join it to an objective that predicts"
                        f" features, such as byol+{row}"
                    )
                left = [each for each in learned if small_views or each.reads.view < SMALL]
                kept = {each.name for each in left}
                weight = t.weight * sum(each.weight for each in learned if each.name in kept)
                reads = (left or learned)[0].reads
                t = dataclasses.replace(t, reads=reads, weight=weight)
            if t.head.projector is not None:
                space = dataclasses.replace(t.head, match="position")
                if space not in spaces:
                    raise ValueError(
                        f"entropy term {t.name} reads the space {t.head.name!r}, which no"
                        f" prediction of {row} has; use the head of one of its terms without the"
                        " predictor"
                    )
                t = dataclasses.replace(t, head=dataclasses.replace(t.head, name=spaces[space]))
            if kinds.setdefault(t.name, same) != same:
                t = dataclasses.replace(t, name=f"{t.name}_{row}")
            if t not in out:
                out.append(t)
    return tuple(out)


def entropies_of_small_views(terms: EntropyTerms, count: int) -> EntropyTerms:
    """Returns entropy terms with one copy for each small view in place of those that read view 2,
    `SMALL`; those of one name among which there are such share its weight equally, as in
    `derived_terms.with_small_views`.

    >>> row = [EntropyTerm(name="a", estimator=Koleo(), reads=Pass(view=v)) for v in (0, 2)]
    >>> [(t.reads.view, t.weight) for t in entropies_of_small_views(tuple(row), 3)]
    [(0, 0.5), (2, 0.5), (3, 0.5), (4, 0.5)]
    """
    spread = {t.name for t in terms if t.reads.view >= SMALL}
    out: list[EntropyTerm] = []
    for t in terms:
        views = range(SMALL, SMALL + count) if t.reads.view >= SMALL else (t.reads.view,)
        reads = [dataclasses.replace(t.reads, view=view) for view in views]
        out += [dataclasses.replace(t, reads=read) for read in reads]

    def weight(name: str) -> float:
        total = sum(t.weight for t in terms if t.name == name)
        return total / sum(t.name == name for t in out)

    return tuple(
        dataclasses.replace(t, weight=weight(t.name)) if t.name in spread else t for t in out
    )


def entropies_with_options(
    terms: EntropyTerms, *, symmetric: bool, second_group: tuple[str, ...], growth: float = 2.0
) -> EntropyTerms:
    """Returns entropy terms with the options of `derived_terms.with_options`.

    Args:
      terms: the entropy terms of the objective.
      symmetric: add every term with its view exchanged, so that both have the same weight.
      second_group: names of the terms that lambda scales.
      growth: with `symmetric`, sum of the weights of all predictions over what it was before theirs
        were added; those here grow as much, and the balance stays. 1 where the predictions had both
        directions already (SimDINO).

    >>> term = EntropyTerm(name="koleo", estimator=Koleo())
    >>> [t.reads.view for t in entropies_with_options((term,), symmetric=True, second_group=())]
    [0, 1]
    """
    out = [dataclasses.replace(t, group="sp" if t.name in second_group else "ssp") for t in terms]
    if not symmetric:
        return tuple(out)
    weights: dict[EntropyTerm, float] = {}
    for t in out:
        view = 1 - t.reads.view if t.reads.view < 2 else t.reads.view
        other = dataclasses.replace(t.reads, view=view)
        for each in (t, dataclasses.replace(t, reads=other)):
            key = dataclasses.replace(each, weight=1.0)
            weights[key] = weights.get(key, 0.0) + each.weight * growth / 2
    return tuple(dataclasses.replace(t, weight=weight) for t, weight in weights.items())
