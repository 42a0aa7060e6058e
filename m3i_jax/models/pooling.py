"""Attention pooling: one vector of an image's own tokens, before the category and the text projection (M3I section 3.4; the head that
InternImage-H ships). The query is the mean token, not a learned one; query, keys and values have layer norms of their own; no residual.

B images, K tokens, D encoder width, W output width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.models.layers import Dense, LayerNorm, Params, attend, draw, from_heads, shapes_of, to_heads


class AttentionPool(nn.Module):
    """Multi-head attention of the (masked) mean token over the (masked) tokens: [B, K, D] -> [B, width]."""

    width: int
    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BxKxD: jax.Array, mask_BxK: jax.Array | None = None) -> jax.Array:
        width, wide_BxKxD = x_BxKxD.shape[-1], x_BxKxD.astype(jnp.float32)
        if mask_BxK is None:
            mean_Bx1xD = wide_BxKxD.mean(1, keepdims=True)
        else:
            count_Bx1x1 = jnp.maximum(mask_BxK.sum(1), 1)[:, None, None]
            mean_Bx1xD = jnp.where(mask_BxK[..., None], wide_BxKxD, 0).sum(1, keepdims=True) / count_Bx1x1

        def project(name: str, tokens: jax.Array) -> jax.Array:
            y = Dense(width, self.dtype, name=name)(LayerNorm(name=f"norm_{name}")(tokens))
            return to_heads(y, 1, self.heads)[0]

        pooled = attend(project("query", mean_Bx1xD), project("key", x_BxKxD), project("value", x_BxKxD), mask_BxK)
        return Dense(self.width, self.dtype, name="out")(from_heads(pooled)[:, 0])


def _pool(model: schema.Model) -> AttentionPool:
    return AttentionPool(model.pool.width, model.pool.heads, jnp.dtype(model.dtype))


def init(model: schema.Model, rng: jax.Array) -> Params:
    """Parameters: `query`, `key`, `value` [D, D], each with a `norm_...` before it, and `out` [D, W]. Matrices N(0, 0.02^2), biases 0.

    >>> sorted(jax.eval_shape(lambda key: init(schema.Model(), key), jax.random.key(0)))
    ['key', 'norm_key', 'norm_query', 'norm_value', 'out', 'query', 'value']
    """
    return draw(rng, shapes_of(_pool(model), jnp.zeros((1, 1, model.encoder.width))), {"kernel": 0.02})


def apply(model: schema.Model, params: Params, x_BxKxD: jax.Array, mask_BxK: jax.Array | None = None) -> jax.Array:
    """One vector an image.

    Args:
      model: settings; `model.pool` and `model.dtype` are read.
      params: as of `init`.
      x_BxKxD: encoder features without cls.
      mask_BxK: bool, tokens that belong to the image; the result is that of the gathered tokens alone. None: all. Where none belongs the
        result is finite and means nothing.

    Returns:
      [B, W] in `model.dtype`.

    >>> model = schema.Model(encoder=schema.Encoder(width=8), pool=schema.Pool(width=6, heads=2))
    >>> shapes = jax.eval_shape(lambda key: init(model, key), jax.random.key(0))
    >>> jax.eval_shape(lambda params: apply(model, params, jnp.ones((3, 5, 8))), shapes).shape
    (3, 6)
    """
    return _pool(model).apply({"params": params}, x_BxKxD, mask_BxK)
