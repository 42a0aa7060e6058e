"""A `Network` as a module of flax NNX; imported when one is made."""

from typing import Any

import jax
from flax import nnx


class NnxNetwork(nnx.Module):
    """A network with its parameters.

    Attributes:
      network: the `networks.Network`.
      parameters: its tree, with an `nnx.Param` at each leaf.

    >>> from m3i_jax.models.networks import DCNv3Layer
    >>> layer = DCNv3Layer(width=4, groups=1).nnx(nnx.Rngs(0))
    >>> nnx.jit(lambda layer, x: layer(x))(layer, jax.numpy.ones((1, 3, 3, 4))).shape
    (1, 3, 3, 4)
    """

    def __init__(self, network: Any, *, rngs: nnx.Rngs) -> None:
        self.network = network
        self.parameters = nnx.data(jax.tree.map(nnx.Param, network.init(rngs.params())))

    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        params = jax.tree.map(
            lambda leaf: leaf[...], self.parameters, is_leaf=lambda x: isinstance(x, nnx.Param)
        )
        return self.network(params, x_BxHxWxC)
