"""Horizontal flip, colour jitter, grayscale, Gaussian blur, solarization and normalisation on the
device: pure, of static shape, and keyed by (seed, stream position, view), so that sharding, batch
size and restarts change no pixel.

The host delivers uint8 crops; flips and colours are applied here, where they cost a fraction of a
percent of a step instead of most of the host's time. Images are float32 RGB in 0..1, channels last.
The semantics are those of Pillow and torchvision (the augmentations of SiameseIM, MoCo v3 and
BYOL), in floating point instead of rounding to 8 bits after every operation."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import schema
from m3i_jax.objective import stream_keys

RADIUS = 11  # 23 taps
BLOCK = 32
_GRAY = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's mode L


def to_float(images: jax.Array) -> jax.Array:
    """float32 in 0..1 of uint8 in 0..255; floating-point images are 0..1 already.

    Raises:
      ValueError: images of another type, whose range is unknown.
    """
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 255
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images are {images.dtype}; give uint8 in 0..255, or floats in 0..1")
    return images.astype(jnp.float32)


# The operations work on planes, [..., 3, H, W]: separate channels vectorise several times better on
# a CPU than interleaved ones. The public functions take and return the usual [..., H, W, 3].


def _planes(images: jax.Array) -> jax.Array:
    return jnp.moveaxis(to_float(jnp.asarray(images)), -1, -3)


def _pixels(planes: jax.Array) -> jax.Array:
    return jnp.moveaxis(planes, -3, -1)


def _column(scalars: jax.Array | float) -> jax.Array:
    """Scalars, one per image or one for all, shaped to broadcast over height and width."""
    return jnp.asarray(scalars)[..., None, None]


def _gray(x: jax.Array) -> jax.Array:
    return _GRAY[0] * x[..., 0, :, :] + _GRAY[1] * x[..., 1, :, :] + _GRAY[2] * x[..., 2, :, :]


def _mean_gray(x: jax.Array) -> jax.Array:
    """Mean of the gray levels rounded to 8 bits, itself rounded: a sum of integers, which does not
    depend on the order of additions."""
    levels = jnp.floor(_gray(x) * 255 + 0.5).astype(jnp.int32)
    total = levels.sum((-2, -1), keepdims=True).astype(jnp.float32)
    return jnp.floor(total / (x.shape[-2] * x.shape[-1]) + 0.5) / 255


def _blend(x: jax.Array, other: jax.Array | float, factor: jax.Array) -> jax.Array:
    """clip(factor * x + (1 - factor) * other), `other` and `factor` without the channel axis.
    Factor 1 changes no bit."""
    return jnp.clip(
        jnp.expand_dims(factor, -3) * x + jnp.expand_dims((1 - factor) * other, -3), 0, 1
    )


def _hue(x: jax.Array, shift: jax.Array) -> jax.Array:
    red, green, blue = x[..., 0, :, :], x[..., 1, :, :], x[..., 2, :, :]
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    # Channels are compared with each other, not with the maximum: if the compiler computes one of
    # them twice, with different rounding, "equal to the maximum" may be false for all three, and
    # the pixel would be blue. Near ties both branches agree.
    is_red, is_green = (red >= green) & (red >= blue), green >= blue
    sector = jnp.where(is_red, 0.0, jnp.where(is_green, 2.0, 4.0))
    difference = jnp.where(is_red, green - blue, jnp.where(is_green, blue - red, red - green))
    sixths = sector + difference / jnp.maximum(chroma, 1e-7) + 6 * shift

    def channel(start: float) -> jax.Array:
        k = (sixths + start) * (1 / 6)
        k = 6 * (k - jnp.floor(k))
        return value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)

    return jnp.stack([channel(5.0), channel(3.0), channel(1.0)], -3)


def _jitter(x: jax.Array, factors: jax.Array, ranks: jax.Array) -> jax.Array:
    """Colour jitter in any of the 24 orders without branches: brightness and saturation have slots
    before and after contrast, and in each half before and after hue, and are the identity in all
    but one of them. Eight blends, two hues and a single mean, all fusible."""
    factor_b, factor_c, factor_s, shift = (factors[:, i] for i in range(4))
    rank_b, rank_c, rank_s, rank_h = (ranks[:, i] for i in range(4))
    b_first, first, second = (
        rank_b < rank_s,
        jnp.minimum(rank_b, rank_s),
        jnp.maximum(rank_b, rank_s),
    )

    def slot(x: jax.Array, brighten: jax.Array, active: jax.Array) -> jax.Array:
        factor = jnp.where(active, jnp.where(brighten, factor_b, factor_s), 1.0)
        return _blend(x, jnp.where(_column(brighten), 0.0, _gray(x)), _column(factor))

    def half(x: jax.Array, inside: Callable[[jax.Array], jax.Array]) -> jax.Array:
        x = slot(x, b_first, inside(first) & (first < rank_h))
        x = slot(x, ~b_first, inside(second) & (second < rank_h))
        x = jnp.where(_column(inside(rank_h) & (shift != 0))[:, None], _hue(x, _column(shift)), x)
        x = slot(x, b_first, inside(first) & (first > rank_h))
        return slot(x, ~b_first, inside(second) & (second > rank_h))

    x = half(x, lambda rank: rank < rank_c)
    x = _blend(x, _mean_gray(x), _column(factor_c))
    return half(x, lambda rank: rank > rank_c)


def _blur(x: jax.Array, sigma: jax.Array, radius: int) -> jax.Array:
    """Blur of [B, C, H, W], one axis after the other, as products of overlapping blocks with one
    banded matrix per image. A depthwise convolution is slow on CPU and TPU; for a sum of shifted
    images the compilers repeat the operations before it."""
    for _ in range(2):
        size = x.shape[-1]
        block = max(n for n in range(1, min(size, BLOCK) + 1) if size % n == 0)
        distance = np.abs(np.arange(block + 2 * radius)[:, None] - radius - np.arange(block))
        weights = jnp.exp(-0.5 * (jnp.arange(-radius, radius + 1) / sigma[:, None]) ** 2).sum(1)
        band = (
            jnp.where(distance <= radius, jnp.exp(-0.5 * (distance / sigma[:, None, None]) ** 2), 0)
            / weights[:, None, None]
        )
        padded = jnp.pad(x, [(0, 0), (0, 0), (0, 0), (radius, radius)], mode="edge")
        blocks = jnp.stack(
            [padded[..., i : i + block + 2 * radius] for i in range(0, size, block)], -2
        )
        x = (
            jnp.einsum("bchnk,bko->bchno", blocks, band, precision=jax.lax.Precision.HIGHEST)
            .reshape(x.shape)
            .swapaxes(-1, -2)
        )
    return x


def mirror(images: jax.Array, flip: jax.Array) -> jax.Array:
    """Flips horizontally the images [B, H, W, C] for which `flip` [B] is true. M3I Table 7:
    RandomHorizontalFlip.

    >>> mirror(jnp.arange(4).reshape(2, 1, 2, 1), jnp.array([False, True])).ravel().tolist()
    [0, 1, 3, 2]
    """
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def brightness(images: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Blend [..., H, W, 3] with black: 0 is black, 1 the image. `factor` is a scalar or [...]. M3I
    Table 7: ColorJitter.

    >>> brightness(jnp.full([1, 1, 3], 0.5), 1.5)[0, 0].tolist()
    [0.75, 0.75, 0.75]
    """
    return _pixels(_blend(_planes(images), 0.0, _column(factor)))


def contrast(images: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Blend [..., H, W, 3] with its mean gray, rounded to 8 bits: 0 is flat, 1 the image. `factor`
    is a scalar or [...].

    >>> contrast(jnp.array([[[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]]), 0.0)[0, 0, 0].item() * 255
    128.0
    """
    x = _planes(images)
    return _pixels(_blend(x, _mean_gray(x), _column(factor)))


def saturation(images: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Blend [..., H, W, 3] with its own gray: 0 is gray, 1 the image. `factor` is a scalar or
    [...].

    >>> [round(v, 3) for v in saturation(jnp.array([[[1.0, 0.0, 0.0]]]), 0.5)[0, 0].tolist()]
    [0.65, 0.149, 0.149]
    """
    x = _planes(images)
    return _pixels(_blend(x, _gray(x), _column(factor)))


def hue(images: jax.Array, shift: jax.Array | float) -> jax.Array:
    """Shift the hue of [..., H, W, 3] in HSV by `shift` turns, a scalar or [...]; value and
    saturation stay.

    >>> [round(v, 3) for v in hue(jnp.array([[[1.0, 0.0, 0.0]]]), 1 / 3)[0, 0].tolist()]
    [0.0, 1.0, 0.0]
    """
    return _pixels(_hue(_planes(images), _column(shift)))


def grayscale(images: jax.Array) -> jax.Array:
    """Returns [..., H, W, 3] with the three channels replaced by 0.299 R + 0.587 G + 0.114 B.

    >>> [round(v, 3) for v in grayscale(jnp.array([[[1.0, 0.0, 0.0]]]))[0, 0].tolist()]
    [0.299, 0.299, 0.299]
    """
    x = to_float(jnp.asarray(images))
    return jnp.broadcast_to(_gray(_planes(x))[..., None], x.shape)


def solarize(images: jax.Array) -> jax.Array:
    """Invert values of at least one half: x >= 1/2 becomes 1 - x (8-bit levels 0 to 127 stay). Any
    shape.

    >>> (solarize(jnp.array([127, 128, 255]) / 255) * 255).round().tolist()
    [127.0, 127.0, 0.0]
    """
    x = to_float(jnp.asarray(images))
    return jnp.where(x >= 0.5, 1 - x, x)


@functools.partial(jax.jit, static_argnames="radius")
def gaussian_blur(images: jax.Array, sigma: jax.Array | float, radius: int = RADIUS) -> jax.Array:
    """Blurs [B, H, W, C] with `sigma` pixels (a scalar or [B]): separable, 2 radius + 1 taps, edges
    repeated.

    >>> gaussian_blur(jnp.ones([1, 4, 4, 3]), 1.0)[0, 0, 0].tolist()
    [1.0, 1.0, 1.0]
    """
    x = _planes(images)
    return _pixels(_blur(x, jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), x.shape[:1]), radius))


@jax.jit
def color_jitter(images: jax.Array, factors: jax.Array, ranks: jax.Array) -> jax.Array:
    """Brightness, contrast, saturation and hue, in a separate order for every image, clipped after
    each.

    Args:
      images: [B, H, W, 3].
      factors: [B, 4], factors of brightness, contrast and saturation, shift of the hue in turns.
      ranks: [B, 4], position of each of the four in the order, a permutation of 0..3.

    >>> grays = jnp.array([[[[0.4] * 3, [0.8] * 3]]] * 2)
    >>> factors = jnp.array([[2.0, 0.5, 1.0, 0.0]] * 2)
    >>> out = color_jitter(grays, factors, jnp.array([[0, 1, 2, 3], [1, 0, 2, 3]]))
    >>> [[round(v, 2) for v in row] for row in out[:, 0, :, 0].tolist()]
    [[0.85, 0.95], [1.0, 1.0]]
    """
    return _pixels(_jitter(_planes(images), factors, ranks))


class PhotometricDraws(NamedTuple):
    """Random choices for every sample of one view; the booleans are whether an operation is
    applied."""

    # [B, 4] float32: brightness, contrast, saturation; shift of hue in turns. (1, 1, 1, 0) without
    # jitter
    factors: jax.Array
    ranks: jax.Array  # [B, 4] int32: position of each of those four in the order
    gray: jax.Array  # [B]
    blur: jax.Array  # [B]
    sigma: jax.Array  # [B] float32, pixels
    solarize: jax.Array  # [B]


def draw_photometric(
    position: jax.Array, *, seed: int, view: int, settings: schema.Augment
) -> PhotometricDraws:
    """Returns random choices of one view, a function of (seed, view, stream position), row by row.

    `position` uint32 [B, 2]: high and low word of the sample's position in the stream.

    >>> draw = functools.partial(draw_photometric, seed=0, view=0, settings=schema.Augment())
    >>> one, two = jnp.array([[0, 7]], jnp.uint32), jnp.array([[0, 3], [0, 7]], jnp.uint32)
    >>> bool((draw(one).factors[-1] == draw(two).factors[-1]).all())
    True
    """
    # the part of the key that all samples share is a compile-time constant
    with jax.ensure_compile_time_eval():
        base = jax.random.fold_in(stream_keys.purpose_key(seed, stream_keys.PHOTOMETRIC), view)

    def uniform(words: jax.Array) -> jax.Array:
        key = stream_keys.position_key(base, words)
        return jax.random.uniform(key, (13,), jnp.float32)

    u = jax.vmap(uniform)(jnp.asarray(position, jnp.uint32))
    a = settings
    spans = np.array([a.brightness, a.contrast, a.saturation, a.hue], np.float32)
    identity = np.array([1, 1, 1, 0], np.float32)
    low, high = np.maximum(identity - spans, [0, 0, 0, -0.5]).astype(np.float32), identity + spans
    factors = jnp.where(u[:, :1] < a.jitter_p, low + (high - low) * u[:, 1:5], identity)
    return PhotometricDraws(
        factors=factors,
        ranks=jnp.argsort(jnp.argsort(u[:, 5:9], axis=1), axis=1),
        gray=u[:, 9] < a.grayscale_p,
        blur=u[:, 10] < a.blur_p[view],
        sigma=a.blur_sigma[0] + (a.blur_sigma[1] - a.blur_sigma[0]) * u[:, 11],
        solarize=u[:, 12] < a.solarize_p[view],
    )


def augment(
    views: jax.Array, position: jax.Array, *, seed: int, view: int, settings: schema.Augment
) -> jax.Array:
    """Photometric augmentation of one view of every image: jitter, grayscale, blur, solarize, each
    with its probability.

    M3I Table 7 lists the operations; order, ranges and the asymmetry of the views are SiameseIM's.

    Args:
      views: uint8 [B, S, S, 3], or floats in 0..1.
      position: uint32 [B, 2], high and low word of the stream position of every sample; its draws
        depend on it, the seed and the view only.
      seed: of the run.
      view: 0, the input view, 1, the target view, or a small view: selects the entry of the
        settings' probabilities, which has to exist, and the stream of draws.
      settings: probabilities and ranges. An operation of probability 0 costs nothing.

    Returns:
      float32 [B, S, S, 3] in 0..1, before `normalize`.

    Raises:
      ValueError: views that are not RGB images, or positions that do not match them.

    >>> image = np.full([1, 16, 16, 3], 200, np.uint8)
    >>> run = jax.jit(functools.partial(augment, seed=0, view=0, settings=schema.Augment()))
    >>> out = run(image, np.array([[0, 5]], np.uint32))
    >>> out.shape, out.dtype.name
    ((1, 16, 16, 3), 'float32')
    """
    if views.ndim != 4 or views.shape[-1] != 3 or position.shape != (views.shape[0], 2):
        raise ValueError(
            f"views must be [B, S, S, 3] and position [B, 2], not {views.shape} and"
            f" {position.shape}"
        )
    a, draws = settings, draw_photometric(position, seed=seed, view=view, settings=settings)

    def where(active: jax.Array, changed: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.where(active[:, None, None, None], changed, x)

    x = _planes(views)
    if a.jitter_p > 0 and max(a.brightness, a.contrast, a.saturation, a.hue) > 0:
        x = _jitter(x, draws.factors, draws.ranks)
    if a.grayscale_p > 0:
        x = where(draws.gray, jnp.broadcast_to(_gray(x)[:, None], x.shape), x)
    if a.blur_p[view] > 0:
        blurred = _blur(x, draws.sigma, max(RADIUS, math.ceil(4 * a.blur_sigma[1])))
        x = where(draws.blur, jnp.clip(blurred, 0, 1), x)  # taps sum to 1 up to rounding
    if a.solarize_p[view] > 0:
        x = where(draws.solarize, solarize(x), x)
    return _pixels(x)


def normalize(images: jax.Array, settings: schema.Augment) -> jax.Array:
    """Returns (x - mean) / std by channel of [..., 3] images, uint8 or floats in 0..1, in float32.

    >>> x = normalize(jnp.array([[[0.485, 0.456, 0.406]]]), schema.Augment())
    >>> [round(v, 4) for v in x[0, 0].tolist()]
    [0.0, 0.0, 0.0]
    """
    return (to_float(jnp.asarray(images)) - np.asarray(settings.mean, np.float32)) / np.asarray(
        settings.std, np.float32
    )
