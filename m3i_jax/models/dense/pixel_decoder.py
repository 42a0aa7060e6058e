"""The pixel decoder of Mask2Former: deformable attention over all maps but the finest, and one
feature pyramid step from them to the finest, at which masks are made.

B images, H W size of a map, C channels of an encoder's map, D width, L maps that attend.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.models.dense.deformable_layers import (
    deformable_encoder,
    init_deformable_encoder,
    sine_positions,
)
from m3i_jax.models.dense.map_norms import group_norm
from m3i_jax.models.dense.map_sampling import resize_bilinear
from m3i_jax.models.initializers import InitSpec, fill
from m3i_jax.models.intern_image_layer import convolve, dense_layer
from m3i_jax.models.layers import Params

TEMPERATURE = 10_000.0  # of the sine positions


class DecodedPixels(NamedTuple):
    """What the masked decoder reads.

    Attributes:
      maps: [B, H, W, D] of the L strides, coarse to fine.
      places: sine positions [1, H W, D] of their cells.
      features: [B, h, w, D] at the finest stride, whose products with queries are masks.
    """

    maps: list[jax.Array]
    places: list[jax.Array]
    features: jax.Array


def _shapes(
    settings: schema.Segment | schema.Detect, channels: Mapping[int, int]
) -> dict[str, Any]:
    d, (finest, *attending) = settings.width, settings.strides
    norm = {"scale": (d,), "bias": (d,)}
    tree: dict[str, Any] = {"levels": (len(attending), d)}
    for stride in attending:
        tree[f"input_{stride}"] = {"kernel": (channels[stride], d), "bias": (d,)}
        tree[f"input_norm_{stride}"] = norm
    return tree | {
        "lateral": {"kernel": (channels[finest], d)},
        "lateral_norm": norm,
        "output": {"kernel": (3, 3, d, d)},
        "output_norm": norm,
        "features": {"kernel": (d, d), "bias": (d,)},
    }


def _first_values(path: str, shape: tuple[int, ...]) -> InitSpec:
    layer, last = ("/" + path).split("/")[-2:]
    if last == "levels":
        return "normal", 1.0
    if last in ("scale", "bias"):
        return "constant", float(last == "scale")
    inputs = math.prod(shape[:-1])
    if layer.startswith("input"):
        return "uniform", math.sqrt(6 / (inputs + shape[-1]))
    return "uniform", math.sqrt(3 / inputs)


def init_pixel_decoder(
    settings: schema.Segment | schema.Detect, channels: Mapping[int, int], rng: jax.Array
) -> Params:
    """Parameters: input projections Xavier-uniform, other convolutions uniform within sqrt(3 / fan
    in), level embeddings N(0, 1), `encoder` as of `init_deformable_encoder`.

    Args:
      settings: `strides`, `width` and `mask2former` are read.
      channels: {stride: channels} of the encoder's maps.
      rng: key.

    Raises:
      ValueError: attention heads that do not divide the width.
    """
    own = settings.mask2former
    of_encoder, of_rest = jax.random.split(rng)
    return fill(of_rest, _shapes(settings, channels), _first_values) | {
        "encoder": init_deformable_encoder(
            of_encoder,
            settings.width,
            own.heads,
            len(settings.strides) - 1,
            own.sampled,
            own.encoder_hidden,
            own.encoder_depth,
        )
    }


def decode_pixels(
    settings: schema.Segment | schema.Detect, params: Params, maps: Mapping[int, jax.Array]
) -> DecodedPixels:
    """The maps of the pixel decoder, in the type of the encoder's. Padding is not treated apart, as
    published.

    Args:
      settings, params: as of `init_pixel_decoder`.
      maps: {stride: [B, H, W, C]}.

    >>> own = schema.Mask2Former(heads=2, encoder_depth=1, encoder_hidden=4)
    >>> settings = schema.Segment(strides=(4, 8), width=8, mask2former=own)
    >>> def run(key, maps):
    ...     params = init_pixel_decoder(settings, {4: 3, 8: 5}, key)
    ...     return decode_pixels(settings, params, maps)
    >>> maps = {4: jnp.zeros((1, 4, 6, 3)), 8: jnp.zeros((1, 2, 3, 5))}
    >>> out = jax.eval_shape(run, jax.random.key(0), maps)
    >>> [x.shape for x in out.maps], out.features.shape
    ([(1, 2, 3, 8)], (1, 4, 6, 8))
    """
    own, (finest, *attending) = settings.mask2former, settings.strides
    coarse_first = attending[::-1]
    given = [
        group_norm(params[f"input_norm_{s}"], dense_layer(params[f"input_{s}"], maps[s]))
        for s in coarse_first
    ]
    shapes = tuple((x.shape[1], x.shape[2]) for x in given)
    places = [sine_positions(shape, settings.width, TEMPERATURE) for shape in shapes]
    tokens = jnp.concatenate([x.reshape(len(x), -1, settings.width) for x in given], 1)
    positions = [place + level for place, level in zip(places, params["levels"], strict=True)]
    tokens = deformable_encoder(
        params["encoder"],
        tokens,
        jnp.concatenate(positions, 1),
        shapes,
        own.heads,
        remat=own.remat,
    )
    parts = jnp.split(tokens, _ends(shapes)[:-1], 1)
    made = [part.reshape(x.shape) for part, x in zip(parts, given, strict=True)]
    lateral = group_norm(params["lateral_norm"], dense_layer(params["lateral"], maps[finest]))
    below = resize_bilinear(made[-1], (lateral.shape[1], lateral.shape[2]))
    fine = convolve(params["output"], lateral + below, 1)
    fine = jax.nn.relu(group_norm(params["output_norm"], fine))
    return DecodedPixels(made, places, dense_layer(params["features"], fine))


def _ends(shapes: tuple[tuple[int, int], ...]) -> list[int]:
    ends = [0]
    for height, width in shapes:
        ends.append(ends[-1] + height * width)
    return ends[1:]
