"""The posterior of captions against numpy (float64): both means, gradients, padding, bits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax.objective.caption_posterior import CaptionSoftmax, caption, token_costs
from m3i_jax.objective.posteriors import LossInputs

R = np.random.default_rng(0)
LOGITS = R.normal(size=(4, 5, 7))
TOKENS = R.integers(0, 7, (4, 5))
LENGTH = np.array([5, 2, 0, 3])
WHERE = (np.arange(5) < LENGTH[:, None]).astype(np.float32)


def costs(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    return -np.log(np.take_along_axis(p, TOKENS[..., None], -1)[..., 0])


def mean(logits: np.ndarray, per_token: bool) -> float:
    """Over tokens, or over the tokens of each caption and then over captions."""
    cost = costs(logits)
    if per_token:
        return float(cost[WHERE > 0].mean())
    return float(np.mean([cost[r, :n].mean() for r, n in enumerate(LENGTH) if n]))


@pytest.mark.parametrize("per_token", [False, True])
def test_loss_and_gradient_are_the_formulas(per_token: bool) -> None:
    def loss(logits: jax.Array) -> jax.Array:
        total, count = caption(logits, TOKENS, WHERE, per_token=per_token)
        return total / count

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(LOGITS, jnp.float32))
    assert value == pytest.approx(mean(LOGITS, per_token), rel=1e-6)
    for _ in range(4):
        step = R.normal(size=LOGITS.shape)
        both = [mean(LOGITS + eps * step, per_token) for eps in (1e-5, -1e-5)]
        slope = (both[0] - both[1]) / 2e-5
        assert float(np.vdot(gradient, step)) == pytest.approx(slope, rel=2e-4, abs=1e-6)


def test_padding_counts_nowhere_even_if_it_is_nan() -> None:
    broken = jnp.where(jnp.asarray(WHERE)[..., None] > 0, LOGITS, jnp.nan)
    gradient = jax.jit(jax.grad(lambda x: caption(x, TOKENS, WHERE)[0]))(broken)
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[2].any()
    total, count = caption(jnp.asarray(LOGITS), TOKENS, 0 * WHERE)
    assert (float(total), float(count)) == (0, 0)
    with pytest.raises(ValueError, match=r"tokens have shape \(4, 4\)"):
        token_costs(LOGITS, TOKENS[:, :4])


def test_bits_of_a_token_of_a_caption_and_beyond_the_frequencies_of_tokens() -> None:
    given = LossInputs(parallel=jnp.array([True, False, True, False]))
    posterior = CaptionSoftmax(parallel=0.5)
    out = posterior.cost(jnp.asarray(LOGITS), jnp.asarray(TOKENS), jnp.asarray(WHERE), given)
    figures = {k: float(x) for k, x in posterior.figures(out.evidence).items()}
    bits, seen = costs(LOGITS) / np.log(2), WHERE > 0
    assert figures == pytest.approx(
        {
            "token": bits[seen].mean(),
            "image": bits[seen].sum() / 3,
            "parallel_token": bits[0].mean(),
        },
        rel=1e-5,
    )
    share = np.bincount(TOKENS[seen]) / seen.sum()
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
    expected = (entropy - bits[seen].mean()) * seen.sum() / 3
    assert float(posterior.bits(out.evidence, out.count)) == pytest.approx(expected, rel=1e-4)
    causal = CaptionSoftmax().cost(
        jnp.asarray(LOGITS), jnp.asarray(TOKENS), jnp.asarray(WHERE), LossInputs()
    )
    assert set(CaptionSoftmax().figures(causal.evidence)) == {"token", "image"}


def test_padding_may_be_any_number() -> None:
    @jax.jit
    def every(tokens: jax.Array) -> list[Any]:
        evidence = CaptionSoftmax().cost(
            jnp.asarray(LOGITS), tokens, jnp.asarray(WHERE), LossInputs()
        )
        return [evidence, *(caption(LOGITS, tokens, WHERE, per_token=p) for p in (False, True))]

    expected = every(TOKENS)
    for padding in (-100, -1, 7, 49408):
        got = every(np.where(WHERE > 0, TOKENS, padding))
        jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("token", [-100, -1, 7])
def test_a_counted_token_beyond_the_vocabulary_is_noticed(token: int) -> None:
    assert np.isnan(jax.jit(caption)(LOGITS, np.full_like(TOKENS, token))[0])


def test_weights_of_another_shape_are_named() -> None:
    for where in (WHERE[:, 0], WHERE[:, :1], WHERE[:2]):
        with pytest.raises(ValueError, match="one weight per token"):
            caption(LOGITS, TOKENS, where)
