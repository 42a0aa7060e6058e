"""The tokens of a caption, one after the other or all at once: the posterior of captioners (Cap and
CapPa, CoCa, LocCa, SigLIP 2's decoder).

    log P^(z_y | z_x) = sum_t log P^(y_t | y_<t, image)        causal, Cap
                     or sum_t log P^(y_t | image)              parallel, CapPa: no token is seen

The cross-entropy of a caption bounds H(text | image) from above, so that H(text) minus it is a
lower bound of the information; of parallel captions it bounds the sum of the entropies of single
tokens.

R rows (captions), L tokens that are predicted, V token ids.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from m3i_jax.objective import information
from m3i_jax.objective.numerics import assert_rank, assert_shape, checked_index, float32
from m3i_jax.objective.posteriors import LossInputs, LossSum, Posterior

# Targets that a decoder of captions predicts: a caption; the box of an object, given its name; box
# and name of an object (LocCa).
CAPTIONS = ("caption", "box", "region")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionHead:
    """Prediction of a caption by a text decoder that reads the tokens of its image."""


def token_costs(logits_RxLxV: ArrayLike, tokens_RxL: ArrayLike) -> jax.Array:
    """-log softmax(logits) at the token of each place, float32 [R, L], in nats; NaN where the token
    is not in 0..V-1.

    Raises:
      ValueError: shapes that do not belong together.

    >>> print(token_costs(jnp.zeros((1, 2, 4)), jnp.array([[3, 0]])) / jnp.log(4))
    [[1. 1.]]
    """
    logits = float32(logits_RxLxV)
    tokens = jnp.asarray(tokens_RxL)
    assert_rank(logits, 3, custom_message="logits must be [R, L, V]")
    if tokens.shape != logits.shape[:2]:
        raise ValueError(f"tokens have shape {tokens.shape}, logits {logits.shape}: [R, L, V]")
    known = (tokens >= 0) & (tokens < logits.shape[-1])
    picked = jnp.take_along_axis(logits, jnp.where(known, tokens, 0)[..., None], -1)[..., 0]
    return jnp.where(known, jax.nn.logsumexp(logits, -1) - picked, math.nan)


def _weighted_costs(
    logits_RxLxV: ArrayLike, tokens_RxL: ArrayLike, where_RxL: jax.Array
) -> jax.Array:
    """Weight * cost of each token [R, L]; 0 where the weight is 0, in the gradient, too."""
    logits = float32(logits_RxLxV)
    assert_shape(where_RxL, logits.shape[:-1], custom_message="where: one weight per token")
    counts_RxL = where_RxL > 0
    tokens_RxL = checked_index(jnp.asarray(tokens_RxL), counts_RxL)
    costs_RxL = token_costs(jnp.where(counts_RxL[..., None], logits, 0.0), tokens_RxL)
    return jnp.where(counts_RxL, costs_RxL, 0.0) * where_RxL


def caption(
    logits_RxLxV: ArrayLike,
    tokens_RxL: ArrayLike,
    where_RxL: ArrayLike | None = None,
    *,
    per_token: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Computes the cross-entropy of the tokens of captions, each given its image and what the
    decoder saw.

    Args:
      logits_RxLxV: of the token at each place: `logits[:, l]` predicts `tokens[:, l]`, and nothing
        is shifted. For a causal decoder that reads the tokens, pass `logits[:, :-1]` and
        `tokens[:, 1:]`.
      tokens_RxL: the tokens, ids in 0..V-1; padding may have any number.
      where_RxL: weight >= 0 of each, 0 for padding; None counts all.
      per_token: False: the mean over the tokens of a caption by their weights, so that every
        caption with a counted token weighs the same (CapPa). True: every token weighs as given
        (CoCa).

    Returns:
      (sum of costs in nats, count of captions or of tokens), float32 scalars; (0, 0) if no token
      counts. The cost of a token of weight 0 has no gradient, even if it is NaN. A counted token
      that is not in 0..V-1 gives NaN, so that the mistake is noticed.

    Raises:
      ValueError: shapes that do not belong together.

    >>> logits = jnp.log(jnp.array([[[1.0, 1.0], [1.0, 3.0]]]))
    >>> total, count = caption(logits, jnp.array([[0, 1]]))
    >>> print(f"{total / count:.4f}")  # (log 2 + log 4/3) / 2
    0.4904
    """
    every = jnp.ones(jnp.shape(logits_RxLxV)[:-1], jnp.float32)
    where = every if where_RxL is None else float32(where_RxL)
    cost_RxL = _weighted_costs(logits_RxLxV, tokens_RxL, where)
    if per_token:
        return cost_RxL.sum(), where.sum()
    length_R = where.sum(1)
    mean_R = cost_RxL.sum(1) / jnp.where(length_R > 0, length_R, 1.0)
    return mean_R.sum(), (length_R > 0).sum().astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionSoftmax(Posterior):
    """`caption` as a posterior.

    The marginal of its bits is that of single tokens, their shares in the batch: what image and, in
    causal captions, the tokens before tell about a caption beyond the frequencies of its tokens, in
    bits a caption. `figures` has the code length, in bits a token and a caption, of all captions,
    and of those whose tokens are predicted at once.

    Attributes:
      parallel: share of the images whose tokens are predicted at once, from mask tokens alone
        (CapPa: 0.75); 0: none (Cap).
      per_token: as of `caption`.

    >>> given, tokens = LossInputs(), jnp.array([[1, 2, 0]])
    >>> where = jnp.array([[1.0, 1, 0]])
    >>> total = CaptionSoftmax().cost(jnp.zeros((1, 3, 4)), tokens, where, given)
    >>> print({k: float(v) for k, v in CaptionSoftmax().figures(total.evidence).items()})
    {'token': 2.0, 'image': 4.0}
    """

    parallel: float = 0.0
    per_token: bool = False

    def cost(
        self, prediction: jax.Array, target: jax.Array, where: jax.Array, given: LossInputs
    ) -> LossSum:
        total, count = caption(prediction, target, where, per_token=self.per_token)
        nll_R = _weighted_costs(jax.lax.stop_gradient(prediction), target, where).sum(1)
        evidence = {
            "nll": nll_R.sum(),
            "tokens": where.sum(),
            "captions": (where.sum(1) > 0).sum().astype(jnp.float32),
            "counts": jnp.zeros(prediction.shape[-1]).at[target].add(where),
        }
        if self.parallel and given.parallel is not None:
            chosen_R = given.parallel.astype(jnp.float32)
            evidence["parallel_nll"] = (chosen_R * nll_R).sum()
            evidence["parallel_tokens"] = (chosen_R * where.sum(1)).sum()
        return LossSum(total, count, evidence)

    def bits(self, evidence: dict[str, jax.Array], count: jax.Array) -> jax.Array:
        tokens = jnp.maximum(evidence["tokens"], 1)
        of_token = information.category_bits(evidence["nll"] / tokens, evidence["counts"])
        return of_token * tokens / jnp.maximum(evidence["captions"], 1)

    def figures(self, evidence: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Code lengths in bits by name: token, image, and parallel_token where some captions are
        predicted at once."""
        bits = evidence["nll"] / math.log(2)
        out = {
            "token": bits / jnp.maximum(evidence["tokens"], 1),
            "image": bits / jnp.maximum(evidence["captions"], 1),
        }
        if "parallel_nll" in evidence:
            count = jnp.maximum(evidence["parallel_tokens"], 1)
            out["parallel_token"] = evidence["parallel_nll"] / math.log(2) / count
        return out


def with_parallel_captions(terms: Sequence[Any], share: float) -> tuple[Any, ...]:
    """Returns the terms with another share of captions that are predicted at once; below 0, the
    method's. Texts of objects are never predicted at once.

    >>> with_parallel_captions((), 0.5)
    ()
    """

    def one(term: Any) -> Any:
        if share < 0 or term.target.of != "caption":
            return term
        return dataclasses.replace(
            term, posterior=dataclasses.replace(term.posterior, parallel=share)
        )

    return tuple(one(term) for term in terms)
