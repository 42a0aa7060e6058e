"""Non-linearities of other projects' transformers, beside the exact GELU of `layers`: for weights
that were trained with them."""

import jax
import jax.numpy as jnp


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU by its tanh approximation (Google's ViT and BERT), computed in float32; the type of x.

    >>> [round(float(y), 4) for y in gelu_tanh(jnp.array([-1.0, 0.0, 1.0]))]
    [-0.1588, 0.0, 0.8412]
    """
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def quick_gelu(x: jax.Array) -> jax.Array:
    """`x * sigmoid(1.702 x)` (CLIP), computed in float32; the type of x.

    >>> [round(float(y), 4) for y in quick_gelu(jnp.array([-1.0, 0.0, 1.0]))]
    [-0.1542, 0.0, 0.8458]
    """
    wide = x.astype(jnp.float32)
    return (wide * jax.nn.sigmoid(1.702 * wide)).astype(x.dtype)
