"""Pooling: one vector of an image's own tokens, the input of the category and text heads (M3I
section 3.4; the released head of InternImage-H).

kind=attention: the query is the mean token, or a learned one (CAE); query, keys and values each
have a layer norm; there is no residual. kind=mean, cls: the mean of the patch tokens, or the cls
token, normalised and mapped (MAE's fine-tuning, DeiT).

B images, K tokens, D encoder width, W output width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from m3i_jax import parallel, schema
from m3i_jax.models.attention import attend, attention_weights, from_heads, to_heads
from m3i_jax.models.initializers import init_params, shapes_of
from m3i_jax.models.layers import Dense, LayerNorm, Params, batch_norm

PROBE_EPS = 1e-6  # of the batch norm of linear probes (MAE, M3I Table 9)


def mean_token(x_BxKxD: jax.Array, mask_BxK: jax.Array | None = None) -> jax.Array:
    """Returns the mean [B, D] float32 of the tokens of the mask; of all without one. Zeros where
    the mask is empty.

    >>> print(mean_token(jnp.array([[[1.0], [3.0], [9.0]]]), jnp.array([[True, True, False]])))
    [[2.]]
    """
    wide_BxKxD = x_BxKxD.astype(jnp.float32)
    if mask_BxK is None:
        return wide_BxKxD.mean(1)
    return (
        jnp.where(mask_BxK[..., None], wide_BxKxD, 0).sum(1)
        / jnp.maximum(mask_BxK.sum(1), 1)[:, None]
    )


class AttentionPool(nn.Module):
    """Multi-head attention of the (masked) mean token, or of a learned one, over the (masked)
    tokens: [B, K, D] -> [B, width]."""

    width: int
    heads: int
    dtype: Any
    query: str = "mean"
    projection: bool = True

    @nn.compact
    def __call__(
        self, x_BxKxD: jax.Array, mask_BxK: jax.Array | None = None, weights: bool = False
    ) -> jax.Array:
        """`weights`: return the attention weights, [B, H, K], instead of the output."""
        width = x_BxKxD.shape[-1]

        def project(name: str, tokens: jax.Array) -> jax.Array:
            y = Dense(width, self.dtype, name=name)(LayerNorm(name=f"norm_{name}")(tokens))
            return to_heads(y, 1, self.heads)[0]

        if self.query == "learned":
            query_1xHx1xE = project(
                "query", self.param("query_token", nn.initializers.zeros, (1, 1, width))
            )
            query_BxHx1xE = jnp.broadcast_to(
                query_1xHx1xE, (x_BxKxD.shape[0], *query_1xHx1xE.shape[1:])
            )
        else:
            query_BxHx1xE = project("query", mean_token(x_BxKxD, mask_BxK)[:, None])
        if weights:
            return attention_weights(query_BxHx1xE, project("key", x_BxKxD), mask_BxK)[:, :, 0]
        pooled = attend(query_BxHx1xE, project("key", x_BxKxD), project("value", x_BxKxD), mask_BxK)
        pooled_BxD = from_heads(pooled)[:, 0]
        return (
            Dense(self.width, self.dtype, name="out")(pooled_BxD) if self.projection else pooled_BxD
        )


class TokenPool(nn.Module):
    """Norm and linear map of one token: [B, D] -> [B, width]; the norm alone without projection.
    Batch norm has no parameters."""

    width: int
    dtype: Any
    norm: str = "layer"
    projection: bool = True

    @nn.compact
    def __call__(self, token_BxD: jax.Array) -> jax.Array:
        if self.norm == "batch":
            ones = jnp.ones(token_BxD.shape[-1])
            normed_BxD = batch_norm(
                token_BxD.astype(jnp.float32), ones, jnp.zeros_like(ones), PROBE_EPS
            )
        else:
            normed_BxD = LayerNorm(name="norm")(token_BxD)
        return (
            Dense(self.width, self.dtype, name="out")(normed_BxD) if self.projection else normed_BxD
        )


def _attention(model: schema.Model) -> AttentionPool:
    p = model.pool
    return AttentionPool(p.width, p.heads, jnp.dtype(model.dtype), p.query, p.projection)


def _token(model: schema.Model) -> TokenPool:
    p = model.pool
    return TokenPool(p.width, jnp.dtype(model.dtype), p.norm, p.projection)


def init(model: schema.Model, rng: jax.Array) -> Params:
    """Returns the initial parameters. Attention: `query`, `key`, `value` [D, D], each with a
    `norm_...` before it, `query_token` [1, 1, D] if it is learned, and `out` [D, W] with a
    projection. Mean and cls: `norm`, if it is a layer norm, and `out`. Matrices N(0, `pool.std`^2),
    or N(0, 1 / D) where that is 0, tokens N(0, 0.02^2), biases 0.

    >>> sorted(jax.eval_shape(lambda key: init(schema.Model(), key), jax.random.key(0)))
    ['key', 'norm_key', 'norm_query', 'norm_value', 'out', 'query', 'value']
    """
    width = model.encoder.width
    shapes = (
        shapes_of(_attention(model), jnp.zeros((1, 1, width)))
        if model.pool.kind == "attention"
        else shapes_of(_token(model), jnp.zeros((1, width)))
    )
    return (
        init_params(rng, shapes, {"kernel": model.pool.std or width**-0.5, "query_token": 0.02})
        if shapes
        else {}
    )


def apply(
    model: schema.Model,
    params: Params,
    x_BxKxD: jax.Array,
    mask_BxK: jax.Array | None = None,
    cls_BxD: jax.Array | None = None,
) -> jax.Array:
    """Returns one vector per image.

    Args:
      model: settings; `model.pool` and `model.dtype` are read.
      params: as of `init`.
      x_BxKxD: encoder features without cls.
      mask_BxK: bool, tokens that belong to the image; the result is that of the gathered tokens.
        None: all. Without any the result is finite and meaningless.
      cls_BxD: the feature of the cls token, which `pool.kind=cls` reads instead of the others.

    Returns:
      [B, W] in `model.dtype`, W = `model.pooled`; without a projection in the precision of the
      features.

    Raises:
      ValueError: kind cls without a cls token.

    >>> model = schema.Model(encoder=schema.Encoder(width=8), pool=schema.Pool(width=6, heads=2))
    >>> shapes = jax.eval_shape(lambda key: init(model, key), jax.random.key(0))
    >>> jax.eval_shape(lambda params: apply(model, params, jnp.ones((3, 5, 8))), shapes).shape
    (3, 6)
    """
    if model.pool.kind == "attention":
        one = _attention(model)

        def run(
            gather: Any, params: Params, x_BxKxD: jax.Array, _: None, mask_BxK: jax.Array | None
        ) -> jax.Array:
            return one.apply({"params": gather(params)}, x_BxKxD, mask_BxK)

        # its four matrices are gathered together
        return parallel.with_fsdp_gather(
            run, params, x_BxKxD, None, mask_BxK, dtype=one.dtype, stacked=False
        )
    token_BxD = cls_BxD if model.pool.kind == "cls" else mean_token(x_BxKxD, mask_BxK)
    if token_BxD is None:
        raise ValueError("model.pool.kind is cls, but no cls token was given")
    return _token(model).apply({"params": params}, token_BxD)


def pooling_weights(model: schema.Model, params: Params, x_BxKxD: jax.Array) -> jax.Array:
    """Returns weights of every head of an attention pooling over the tokens, [B, H, K] float32.

    Args:
      model: settings, `model.pool.kind` attention.
      params: as of `init`.
      x_BxKxD: encoder features without cls.

    >>> model = schema.Model(encoder=schema.Encoder(width=8), pool=schema.Pool(width=6, heads=2))
    >>> params = jax.jit(lambda: init(model, jax.random.key(0)))()
    >>> pooling_weights(model, params, jnp.ones((3, 5, 8))).sum(-1).round(3).tolist()
    [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """
    return _attention(model).apply({"params": params}, x_BxKxD, weights=True)
