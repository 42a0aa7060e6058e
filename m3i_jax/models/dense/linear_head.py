"""The linear head of segmentation: one linear layer on every cell of the coarsest map, for a quick
answer about what an encoder's features hold.

B images, H W size of the map, C channels, K categories."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.models.initializers import fill
from m3i_jax.models.intern_image_layer import dense_layer
from m3i_jax.models.layers import Params


def init(
    settings: schema.Segment, channels: Mapping[int, int], classes: int, rng: jax.Array
) -> tuple[Params, Params]:
    """Parameters, N(0, classifier_std^2) with bias 0; there are no statistics. Arguments as of
    `upernet.init`.

    >>> params, statistics = init(schema.Segment(), {16: 8}, 5, jax.random.key(0))
    >>> params["classifier"]["kernel"].shape, statistics
    ((8, 5), {})
    """
    shapes = {"classifier": {"kernel": (channels[max(channels)], classes), "bias": (classes,)}}
    std = settings.classifier_std
    return fill(rng, shapes, lambda path, _: ("normal", std * path.endswith("kernel"))), {}


def apply(
    settings: schema.Segment,
    params: Params,
    statistics: Params,
    maps: Mapping[int, jax.Array],
    *,
    train: bool,
    uniform_BxC: jax.Array | None = None,
) -> tuple[jax.Array, None, Params]:
    """Logits [B, H, W, K] of the cells of the coarsest map, float32; no auxiliary ones; the
    statistics as they are. Arguments as of `upernet.apply`.

    >>> settings = schema.Segment()
    >>> params, _ = init(settings, {16: 8}, 5, jax.random.key(0))
    >>> maps = {8: jnp.zeros((1, 6, 4, 2)), 16: jnp.zeros((1, 3, 2, 8))}
    >>> apply(settings, params, {}, maps, train=False)[0].shape
    (1, 3, 2, 5)
    """
    return dense_layer(params["classifier"], maps[max(maps)], jnp.float32), None, statistics
