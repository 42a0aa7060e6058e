"""Colour changes of mmsegmentation on the device: brightness, contrast, saturation and hue, in
whole numbers of 0 to 255 after every step as OpenCV makes them. Pure, of static shape, and keyed by
(seed, stream position), so that sharding, batch size and restarts change no pixel.

Each of the four is applied with probability 1/2; contrast before or after saturation and hue, as a
coin decides. Saturation and hue go through OpenCV's HSV, whose hue has 180 steps and whose way
there and back alone changes pixels: without them it is not taken."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax.objective import stream_keys

BRIGHTNESS = 32.0  # largest change, of 255
FACTORS = (0.5, 1.5)  # of contrast and of saturation
HUE = 18  # steps of 180: -18 to 17
_SHIFT = 12  # bits of OpenCV's fixed-point quotients


class DistortionDraws(NamedTuple):
    """Random choices for every image."""

    # [B, 4] bool: whether brightness, contrast, saturation, hue are changed
    active: jax.Array
    contrast_first: jax.Array  # [B] bool: contrast comes before saturation and hue
    brightness: jax.Array  # [B] float32, added
    contrast: jax.Array  # [B] float32, factor
    saturation: jax.Array  # [B] float32, factor
    hue: jax.Array  # [B] int32, added, of 180


def draw_distortion(position: jax.Array, *, seed: int) -> DistortionDraws:
    """Returns random choices as a function of (seed, stream position), row by row.

    Args:
      position: uint32 [B, 2], high and low word of the sample's position in the stream.
      seed: of the run.

    >>> one, two = jnp.array([[0, 7]], jnp.uint32), jnp.array([[0, 3], [0, 7]], jnp.uint32)
    >>> draws = [draw_distortion(position, seed=0) for position in (one, two)]
    >>> bool((draws[0].contrast[-1] == draws[1].contrast[-1]).all())
    True
    """
    # the part of the key that all samples share is a compile-time constant
    with jax.ensure_compile_time_eval():
        base = stream_keys.purpose_key(seed, stream_keys.DISTORT)

    def uniform(words_2: jax.Array) -> jax.Array:
        key = stream_keys.position_key(base, words_2)
        return jax.random.uniform(key, (9,), jnp.float32)

    u_Bx9 = jax.vmap(uniform)(jnp.asarray(position, jnp.uint32))
    low, high = FACTORS
    return DistortionDraws(
        active=u_Bx9[:, :4] < 0.5,
        contrast_first=u_Bx9[:, 4] < 0.5,
        brightness=BRIGHTNESS * (2 * u_Bx9[:, 5] - 1),
        contrast=low + (high - low) * u_Bx9[:, 6],
        saturation=low + (high - low) * u_Bx9[:, 7],
        hue=jnp.floor(2 * HUE * u_Bx9[:, 8]).astype(jnp.int32) - HUE,
    )


def distort(images_BxHxWx3: jax.Array, draws: DistortionDraws) -> jax.Array:
    """Applies drawn colour changes.

    Args:
      images_BxHxWx3: uint8, RGB.
      draws: `draw_distortion`, or chosen ones.

    Returns:
      uint8 [B, H, W, 3].

    Raises:
      ValueError: images of another type.

    >>> draws = DistortionDraws(
    ...     active=jnp.array([[True, False, False, False]]), contrast_first=jnp.array([False]),
    ...     brightness=jnp.array([20.7]), contrast=jnp.ones(1), saturation=jnp.ones(1),
    ...     hue=jnp.zeros(1, int))
    >>> distort(jnp.array([[[[0, 100, 250]]]], jnp.uint8), draws).tolist()
    [[[[20, 120, 255]]]]
    """
    if images_BxHxWx3.dtype != jnp.uint8:  # fractions of 0..1 would be cut off
        raise ValueError(f"images have the type {images_BxHxWx3.dtype}; pass uint8, 0..255")
    x_BxHxWx3 = images_BxHxWx3.astype(jnp.int32)

    def where(active_B: jax.Array, changed: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.where(active_B[:, None, None, None], changed, x)

    brightness, contrast, saturation, hue = (draws.active[:, i] for i in range(4))
    x_BxHxWx3 = where(brightness, _scale(x_BxHxWx3, 1.0, draws.brightness), x_BxHxWx3)
    before = contrast & draws.contrast_first
    x_BxHxWx3 = where(before, _scale(x_BxHxWx3, draws.contrast, 0.0), x_BxHxWx3)
    h, s, v = jnp.moveaxis(rgb_to_hsv(x_BxHxWx3), -1, 0)
    saturated = hsv_to_rgb(jnp.stack([h, _scale(s, draws.saturation, 0.0), v], -1))
    x_BxHxWx3 = where(saturation, saturated, x_BxHxWx3)
    h, s, v = jnp.moveaxis(rgb_to_hsv(x_BxHxWx3), -1, 0)
    turned = hsv_to_rgb(jnp.stack([(h + draws.hue[:, None, None]) % 180, s, v], -1))
    x_BxHxWx3 = where(hue, turned, x_BxHxWx3)
    after = contrast & ~draws.contrast_first
    x_BxHxWx3 = where(after, _scale(x_BxHxWx3, draws.contrast, 0.0), x_BxHxWx3)
    return x_BxHxWx3.astype(jnp.uint8)


def dense_photometric(images_BxHxWx3: jax.Array, position: jax.Array, *, seed: int) -> jax.Array:
    """Photometric augmentation of segmentation.

    Args:
      images_BxHxWx3: uint8, RGB.
      position: uint32 [B, 2], high and low word of the stream position of every image.
      seed: of the run.

    Returns:
      uint8 [B, H, W, 3].

    Raises:
      ValueError: images of another type.

    >>> image = jnp.full((1, 4, 4, 3), 100, jnp.uint8)
    >>> dense_photometric(image, jnp.array([[0, 5]], jnp.uint32), seed=0).shape
    (1, 4, 4, 3)
    """
    return distort(images_BxHxWx3, draw_distortion(position, seed=seed))


def _scale(x_Bx: jax.Array, factor: jax.Array | float, shift: jax.Array | float) -> jax.Array:
    """Multiplies and shifts numbers of 0..255 by image, clips them and cuts off the fraction."""
    factor, shift = (
        jnp.asarray(v, jnp.float32).reshape((-1,) + (1,) * (x_Bx.ndim - 1)) for v in (factor, shift)
    )
    return jnp.clip(x_Bx.astype(jnp.float32) * factor + shift, 0, 255).astype(jnp.int32)


def rgb_to_hsv(rgb: jax.Array) -> jax.Array:
    """OpenCV's HSV of 8-bit RGB: hue 0..179, saturation and value 0..255.

    Args:
      rgb: int32 [..., 3].

    Returns:
      int32 [..., 3].

    >>> rgb_to_hsv(jnp.array([[255, 0, 0], [10, 200, 20], [7, 7, 7]])).tolist()
    [[0, 255, 255], [62, 242, 200], [0, 0, 7]]
    """
    red, green, blue = jnp.moveaxis(rgb, -1, 0)
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    half = 1 << (_SHIFT - 1)
    saturation = (chroma * _reciprocal(255 << _SHIFT, value) + half) >> _SHIFT
    sixths = jnp.where(
        value == red,
        green - blue,
        jnp.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma),
    )
    hue = (sixths * _reciprocal((180 << _SHIFT) // 6, chroma) + half) >> _SHIFT
    return jnp.stack([jnp.where(hue < 0, hue + 180, hue), saturation, value], -1)


def _reciprocal(numerator: int, x: jax.Array) -> jax.Array:
    """numerator / x, rounded; 0 for 0."""
    quotient = jnp.rint(np.float32(numerator) / jnp.maximum(x, 1).astype(jnp.float32))
    return jnp.where(x == 0, 0, quotient.astype(jnp.int32))


def hsv_to_rgb(hsv: jax.Array) -> jax.Array:
    """Returns the inverse of `rgb_to_hsv`, with fractions cut off.

    OpenCV cuts them off in its vector instructions, which most pixels of an image of hundreds of
    pixels go through, and rounds them at the end of a row.

    >>> hsv_to_rgb(jnp.array([[0, 255, 255], [62, 242, 200], [0, 0, 7]])).tolist()
    [[255, 0, 0], [10, 200, 22], [7, 7, 7]]
    """
    hue, saturation, value = jnp.moveaxis(hsv.astype(jnp.float32), -1, 0)
    sixths = hue * np.float32(6 / 180)
    saturation = saturation * np.float32(1 / 255)

    def channel(start: float) -> jax.Array:
        place = (sixths + start) % 6
        return value * (1 - saturation * jnp.clip(jnp.minimum(place, 4 - place), 0, 1))

    rgb = jnp.stack([channel(5.0), channel(3.0), channel(1.0)], -1)
    return jnp.clip(rgb, 0, 255).astype(jnp.int32)
