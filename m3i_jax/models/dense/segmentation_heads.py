"""The heads of semantic segmentation by the name in the settings: upernet and linear. Their
functions have the same arguments and results."""

from collections.abc import Mapping

import jax

from m3i_jax import schema
from m3i_jax.models.dense import linear_head, upernet
from m3i_jax.models.layers import Params

_HEADS = {"upernet": upernet, "linear": linear_head}


def init(
    settings: schema.Segment, channels: Mapping[int, int], classes: int, rng: jax.Array
) -> tuple[Params, Params]:
    """Parameters and running statistics of the head; see `upernet.init`.

    >>> params, _ = init(schema.Segment(head="linear"), {16: 8}, 5, jax.random.key(0))
    >>> sorted(params)
    ['classifier']
    """
    return _HEADS[settings.head].init(settings, channels, classes, rng)


def dropout_width_of(settings: schema.Segment) -> int:
    """How many uniform numbers per image the head reads for dropout; 0: none.

    >>> dropout_width_of(schema.Segment(head="linear"))
    0
    """
    return upernet.dropout_width(settings) if settings.head == "upernet" else 0


def apply(
    settings: schema.Segment,
    params: Params,
    statistics: Params,
    maps: Mapping[int, jax.Array],
    *,
    train: bool,
    uniform_BxC: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None, Params]:
    """Logits, auxiliary logits or None, and the new statistics; see `upernet.apply`.

    >>> import jax.numpy as jnp
    >>> settings = schema.Segment(head="linear")
    >>> params, _ = init(settings, {16: 8}, 5, jax.random.key(0))
    >>> apply(settings, params, {}, {16: jnp.zeros((1, 3, 2, 8))}, train=True)[0].shape
    (1, 3, 2, 5)
    """
    head = _HEADS[settings.head]
    return head.apply(settings, params, statistics, maps, train=train, uniform_BxC=uniform_BxC)
