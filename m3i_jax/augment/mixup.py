"""Random erasing, mixup and CutMix on the device, after normalisation, for fine-tuning (M3I Table
8). Pure, of static shape, keyed by (seed, stream position).

Partners are neighbours of the stream, 2k and 2k + 1. Both of a pair are blended with the same share
and the same box: row r shows `share` of its own image and 1 - share of its partner's. One draw per
pair is between the usual forms, one per batch and one per image.

B images, S pixels a side.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.objective import stream_keys

TRIES = 10
# ranges of an erased box: share of the image, height over width
AREA, ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)


class MixupDraws(NamedTuple):
    """Random choices for the blending of every row.

    Attributes:
      share: [B] float32, weight of the row's own image.
      box: [B, 4] int32, (top, left, bottom, right) of the pixels that show the partner; empty for
        mixup.
      cut: [B] bool, CutMix and not mixup.
    """

    share: jax.Array
    box: jax.Array
    cut: jax.Array


def draw_mixup(
    position_Bx2: jax.Array, *, seed: int, size: int, settings: schema.Augment
) -> MixupDraws:
    """Returns random blending of every row, the same for both of a pair.

    Args:
      position_Bx2: uint32, high and low word of the stream position.
      seed: of the run.
      size: pixels a side, S.
      settings: `mixup` and `cutmix` are the alphas of Beta(alpha, alpha), 0: off. With both, CutMix
        has probability `cutmix_switch`. With probability 1 - `blend_p` nothing is blended.

    >>> pair = jnp.array([[0, 6], [0, 7]], jnp.uint32)
    >>> share = draw_mixup(pair, seed=0, size=8, settings=schema.Augment(mixup=0.8)).share
    >>> bool(share[0] == share[1]), bool((0 <= share[0]) & (share[0] <= 1))
    (True, True)
    """
    a, base = settings, stream_keys.purpose_key(seed, stream_keys.BLEND)

    def one(words_2: jax.Array) -> MixupDraws:
        key = jax.random.fold_in(jax.random.fold_in(base, words_2[0]), words_2[1] >> 1)
        of_uniforms, of_mixup, of_cutmix = jax.random.split(key, 3)
        u = jax.random.uniform(of_uniforms, (4,), jnp.float32)
        cut = jnp.asarray(bool(a.cutmix)) if not (a.mixup and a.cutmix) else u[0] < a.cutmix_switch
        mixed = (
            jax.random.beta(of_mixup, a.mixup, a.mixup, dtype=jnp.float32)
            if a.mixup
            else jnp.ones(())
        )
        kept = (
            jax.random.beta(of_cutmix, a.cutmix, a.cutmix, dtype=jnp.float32)
            if a.cutmix
            else jnp.ones(())
        )
        box = cut_box(kept, u[1], u[2], size)
        left = 1 - (box[2] - box[0]) * (box[3] - box[1]) / size**2
        is_blended = (u[3] < a.blend_p) & bool(a.mixup or a.cutmix)
        share = jnp.where(is_blended, jnp.where(cut, left, mixed), 1.0)
        return MixupDraws(
            share.astype(jnp.float32), jnp.where(cut & is_blended, box, 0), cut & is_blended
        )

    return jax.vmap(one)(jnp.asarray(position_Bx2, jnp.uint32))


def cut_box(share: jax.Array, u_y: jax.Array, u_x: jax.Array, size: int) -> jax.Array:
    """Returns the box [4] of CutMix: sides sqrt(1 - share) of the image's, uniform centre, clipped
    at the border. Sides are even, as in its publication; timm 1.0.31 also makes odd ones.

    >>> cut_box(jnp.array(0.75), jnp.array(0.5), jnp.array(0.0), 8).tolist()
    [2, 0, 6, 2]
    """
    half = (jnp.sqrt(1 - share) * size).astype(jnp.int32) // 2
    y, x = (u_y * size).astype(jnp.int32), (u_x * size).astype(jnp.int32)
    return jnp.clip(jnp.stack([y - half, x - half, y + half, x + half]), 0, size)


def box_mask(box_Bx4: jax.Array, size: int) -> jax.Array:
    """Returns the mask [B, S, S] bool of the pixels in a box (top, left, bottom, right), the last
    two excluded.

    >>> box_mask(jnp.array([[0, 1, 1, 3]]), 3)[0].tolist()
    [[False, True, True], [False, False, False], [False, False, False]]
    """
    at = jnp.arange(size)
    rows = (at >= box_Bx4[:, :1]) & (at < box_Bx4[:, 2:3])
    columns = (at >= box_Bx4[:, 1:2]) & (at < box_Bx4[:, 3:])
    return rows[:, :, None] & columns[:, None, :]


def random_erase(
    images_BxSxSx3: jax.Array, position_Bx2: jax.Array, *, seed: int, probability: float
) -> jax.Array:
    """Erases random boxes: with `probability`, one box of a normalised image becomes N(0, 1) noise,
    one number per pixel and channel.

    Up to ten boxes are drawn, of 2 to 33 % of the image and aspects of 0.3 to 1 / 0.3, log-uniform;
    the first that fits is used.

    >>> images = jnp.zeros((2, 8, 8, 3))
    >>> out = random_erase(images, jnp.array([[0, 0], [0, 1]], jnp.uint32), seed=0, probability=1.0)
    >>> bool((out != 0).any((1, 2, 3)).all()), bool((out == 0).any((1, 2, 3)).all())
    (True, True)
    """
    size, base = images_BxSxSx3.shape[1], stream_keys.purpose_key(seed, stream_keys.ERASE)

    def one(image: jax.Array, words_2: jax.Array) -> jax.Array:
        of_box, of_noise = jax.random.split(stream_keys.position_key(base, words_2))
        u = jax.random.uniform(of_box, (2 * TRIES + 3,), jnp.float32)
        area = size**2 * (AREA[0] + (AREA[1] - AREA[0]) * u[:TRIES])
        low, high = jnp.log(ASPECT[0]), jnp.log(ASPECT[1])
        aspect = jnp.exp(low + (high - low) * u[TRIES : 2 * TRIES])
        height, width = (
            jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32),
            jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32),
        )
        fits = (height < size) & (width < size)
        chosen = fits.argmax()
        h, w = height[chosen], width[chosen]
        top, left = (
            (u[-3 + i] * (size - side + 1)).astype(jnp.int32) for i, side in enumerate((h, w))
        )
        inside = box_mask(jnp.stack([top, left, top + h, left + w])[None], size)[0, ..., None]
        happens = (u[-1] < probability) & fits.any()
        return jnp.where(
            inside & happens, jax.random.normal(of_noise, image.shape, image.dtype), image
        )

    return jax.vmap(one)(images_BxSxSx3, jnp.asarray(position_Bx2, jnp.uint32))
