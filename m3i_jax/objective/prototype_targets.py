"""Soft assignments of images or tokens to prototypes as targets, the posterior that predicts them,
and what keeps them from collapse: Sinkhorn-Knopp (SwAV, DINOv2) and centring (DINO, iBOT).

A prototype posterior predicts which of K prototypes the target encoder assigns a row to. Its
prediction term alone is least if every row goes to one prototype. Both functions are constraints on
the marginal of the targets, H(mean assignment), which is at most log K: `sinkhorn` scales the
assignments of a batch until every prototype has an equal share, `centering` subtracts a running
mean of the logits, its first-order approximation, which needs no other row of the batch.

In the published code every sum of both is over the rows of all devices, and so it is here: they see
one global batch, however it is divided.

M rows (images, or tokens of images), K prototypes."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from m3i_jax.objective.numerics import (
    assert_rank,
    assert_shape,
    float32,
    weighted_sum,
    zero_masked_rows,
)
from m3i_jax.objective.posteriors import Categorical, LossInputs, LossSum
from m3i_jax.objective.terms import ClusterHead, ProjectionHead, Term, Terms

CONSTRAINTS = ("centering", "sinkhorn", "position_sinkhorn")


def sinkhorn(
    logits_MxK: ArrayLike,
    where_M: ArrayLike | None = None,
    *,
    temperature: ArrayLike,
    iterations: int = 3,
) -> jax.Array:
    """Assignments of rows to prototypes that share the rows (almost) equally: exp(logits /
    temperature) is scaled in turn to equal sums of the prototypes and to sums 1 of the rows.

    It constrains the entropy of the mean assignment, `H(mean_M q)`, to its largest value, log K
    nats, without any constant left open: no term of the loss has to maximise it.

    The last scaling is that of the rows, so that each row is a distribution, and the prototypes are
    equal only up to what few iterations leave. Computed on logarithms: no logit overflows, and a
    prototype that is far from all rows causes no division by 0.

    Args:
      logits_MxK: similarities of the target encoder.
      where_M: weight of a row in the shares, bool or float >= 0; rows of weight 0 change no other
        row, even if NaN, and their own result has no meaning. None counts every row once.
      temperature: tau > 0.
      iterations: at least 1; 3 as published.

    Returns:
      float32 [M, K], rows that sum to 1. No gradient flows through it.

    Raises:
      ValueError: shapes that do not belong together, or no iteration.

    Source: Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster
    Assignments", section 3.1; DINOv2, dinov2/loss/dino_clstoken_loss.py.

    >>> import jax.numpy as jnp
    >>> logits = jnp.array([[2.0, 0.0], [2.0, 0.0], [2.0, 1.9]])
    >>> q = sinkhorn(logits, temperature=1.0, iterations=50)
    >>> print(*(f"{x:.3f}" for x in q[:, 0]), *(f"{x:.2f}" for x in q.sum(0)))
    0.644 0.644 0.213 1.50 1.50
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; without one, nothing is scaled")
    z_MxK = jax.lax.stop_gradient(float32(logits_MxK))
    assert_rank(z_MxK, 2, custom_message="logits must be [M, K]")
    z_MxK, _, weight_M = zero_masked_rows(z_MxK, z_MxK, where_M)
    # Without any row there is nothing to share; the logarithm of an empty sum would be -inf.
    weight_Mx1 = jnp.where(weight_M.sum() > 0, weight_M, 1.0)[:, None]

    def scale(_: int, log_q_MxK: jax.Array) -> jax.Array:
        shares_1xK = jax.nn.logsumexp(log_q_MxK, axis=0, b=weight_Mx1, keepdims=True)
        return jax.nn.log_softmax(log_q_MxK - shares_1xK)

    # A loop: unrolled, every iteration adds to XLA's compile time.
    return jnp.exp(jax.lax.fori_loop(0, iterations, scale, z_MxK / temperature))


def centering(logits_MxK: ArrayLike, center_K: ArrayLike, *, temperature: ArrayLike) -> jax.Array:
    """Assignments of rows to prototypes, softmax((logits - center) / temperature): a prototype that
    was near to many rows before has to be nearer to be chosen again.

    To first order it constrains the entropy of the mean assignment, `H(mean_M q)`, to its largest
    value, log K nats: with the mean of these logits as center, and a high temperature, `q = 1 / K +
    (logits - center) / (K temperature)` up to a constant of each row, whose mean is uniform.

    Args:
      logits_MxK: similarities of the target encoder, [..., K].
      center_K: running mean of the logits of earlier steps, as `track_centers` keeps it; 0 at the
        first step. It is subtracted before the division by the temperature.
      temperature: tau > 0; less than the prediction's, or the assignments become uniform.

    Returns:
      float32 [..., K], rows that sum to 1. No gradient flows through it.

    Raises:
      ValueError: a center of another width.

    Source: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", section
    3.1; facebookresearch/dino, main_dino.py.

    >>> import jax.numpy as jnp
    >>> print(centering(jnp.array([[3.0, 1.0]]), jnp.array([2.0, 0.0]), temperature=0.1).tolist())
    [[0.5, 0.5]]
    """
    z_MxK, c_K = jax.lax.stop_gradient((float32(logits_MxK), float32(center_K)))
    assert_shape(c_K, z_MxK.shape[-1:], custom_message="center: one number a prototype")
    return jax.nn.softmax((z_MxK - c_K) / temperature)


def soft_cross_entropy(
    logits_MxK: ArrayLike,
    target_MxK: ArrayLike,
    where_M: ArrayLike | None = None,
    *,
    temperature: ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    """Computes the cross-entropy of softmax(logits / temperature) with a distribution as target
    (DINO, iBOT).

    Args:
      logits_MxK: predictions, [..., K].
      target_MxK: distributions such as those of `sinkhorn` or `centering`; constants.
      where_M: weight of a row, bool or float >= 0; rows of weight 0 may be NaN. None counts every
        row once.
      temperature: tau > 0 of the prediction; 0.1 as published.

    Returns:
      (sum over rows of weight * cost in nats, sum of weights), float32 scalars.

    Raises:
      ValueError: shapes that do not belong together.

    >>> import jax.numpy as jnp
    >>> total, count = soft_cross_entropy(jnp.zeros((3, 4)), jnp.full((3, 4), 0.25), temperature=1)
    >>> print(f"{total / count:.4f}")  # log 4
    1.3863
    """
    z_MxK, t_MxK = float32(logits_MxK), jax.lax.stop_gradient(float32(target_MxK))
    assert_shape(t_MxK, z_MxK.shape, custom_message="target: like the logits")
    z_MxK, t_MxK, weight_M = zero_masked_rows(z_MxK, t_MxK, where_M)
    cost_M = -(t_MxK * jax.nn.log_softmax(z_MxK / temperature)).sum(-1)
    return weighted_sum(cost_M, weight_M), weight_M.sum()


class PrototypeState(NamedTuple):
    """count: int32, updates so far. rise: float32 in 0..1, how far the targets' temperature has
    risen. centers: {space: [K]}, running means of the target encoder's logits."""

    count: jax.Array  # type: ignore[assignment]  # optax's name; shadows tuple.count
    rise: jax.Array
    centers: dict[str, jax.Array]


def track_centers(
    widths: Mapping[str, int],
    *,
    momentum: float = 0.9,
    rise: Callable[[Any], Any] = lambda step: 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Returns an optax transform that keeps the centres of `centering` and passes the updates
    through: `center <- momentum * center + (1 - momentum) * mean logits`, from 0.

    The centre of a step thus holds the logits of the steps before it. As optimizer state it is
    saved and restored with the rest.

    Args:
      widths: {name of a space: number of its prototypes K}.
      momentum: in [0, 1); 0.9 as published.
      rise: a schedule of the step in 0..1, kept in the state for temperatures that rise.

    Returns:
      the transform; its state is a `PrototypeState`, and `update` takes
      `mean_logits={space: [K]}`. Without it, or for a space that it lacks, a centre stays; for a
      space without a centre, it raises ValueError.

    Raises:
      ValueError: a momentum outside 0..1, 1 excluded.

    >>> import jax.numpy as jnp
    >>> tx = track_centers({"space": 2}, momentum=0.75)
    >>> state = tx.init({})
    >>> _, state = tx.update({}, state, {}, mean_logits={"space": jnp.array([4.0, 8.0])})
    >>> print(state.centers["space"].tolist())
    [1.0, 2.0]
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}; it must lie in 0..1, 1 excluded")

    def init(params: optax.Params) -> PrototypeState:
        del params
        zero = jnp.zeros([], jnp.int32)
        centers = {name: jnp.zeros(width, jnp.float32) for name, width in widths.items()}
        return PrototypeState(zero, jnp.asarray(rise(zero), jnp.float32), centers)

    def update(
        updates: optax.Updates,
        state: PrototypeState,
        params: optax.Params | None = None,
        *,
        mean_logits: Mapping[str, jax.Array] | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, PrototypeState]:
        del params, extra
        count, means = optax.safe_increment(state.count), mean_logits or {}
        # `optax.chain` gives all of its transformations the same means, of which each keeps its own
        if means and not set(means) & set(state.centers):
            raise ValueError(
                f"mean_logits has {', '.join(map(repr, sorted(means)))}, of which none is among the"
                " widths:"
                f" {', '.join(sorted(state.centers)) or 'none'}"
            )
        centers = {
            name: momentum * center + (1 - momentum) * means[name] if name in means else center
            for name, center in state.centers.items()
        }
        return updates, PrototypeState(count, jnp.asarray(rise(count), jnp.float32), centers)

    return optax.GradientTransformationExtraArgs(init, update)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrototypeSoftmax(Categorical):
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
        total, count = soft_cross_entropy(prediction, target, where, temperature=self.temperature)
        counted = jnp.where((where > 0)[..., None], target, 0.0)
        counts_K = (where[..., None] * counted).reshape(-1, target.shape[-1]).sum(0)
        evidence = {"nll": total, "counts": counts_K}
        return LossSum(total, count, jax.lax.stop_gradient(evidence))

    def assign(
        self, logits_xK: jax.Array, center_K: jax.Array, rise: jax.Array | float
    ) -> jax.Array:
        """Returns the targets of all rows of a batch, of the target encoder's logits.

        Args:
          logits_xK: of the whole batch, of all views of a space: [M, K] of images, [M, N, K] of
            tokens.
          center_K: the running mean of the logits, for `centering`.
          rise: how far the temperature has risen, in 0..1.
        """
        first, last = self.target_temperature
        tau = first + (last - first) * jnp.asarray(rise, jnp.float32)
        if self.constraint == "centering":
            return centering(logits_xK, center_K, temperature=tau)
        balance = functools.partial(sinkhorn, temperature=tau)
        if self.constraint == "position_sinkhorn" and logits_xK.ndim == 3:
            return jax.vmap(balance, in_axes=1, out_axes=1)(logits_xK)
        return balance(logits_xK.reshape(-1, logits_xK.shape[-1])).reshape(logits_xK.shape)


def space_name(space: ProjectionHead | ClusterHead, of: str) -> str:
    """Returns the name under which the assignments of a space are balanced: those of images and
    those of tokens are two sets, also where they share prototypes.

    >>> space_name(ProjectionHead(name="global", prototypes="unit"), "tokens")
    'global_tokens'
    """
    return f"{space.name}_{of}"


def prototype_terms(terms: Terms) -> dict[str, Term]:
    """Returns {name of a space with prototypes: one of the terms that predict in it}.

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
    """Returns the terms with another constraint or temperature of the assignments that they
    predict.

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
