"""From a batch of uint8 views to what the encoders read: mirroring, colour, patches, mixing,
dropping, and the stochastic-depth draws. On the device, pure, and keyed by (seed, stream position),
so that neither sharding nor microbatches nor a restart changes a pixel."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.augment import mixup, photometric
from m3i_jax.models import backbones, m3i, vit
from m3i_jax.objective import mixing
from m3i_jax.objective.terms import Pass

DROP_PATH = 0x64726F70  # keeps these draws apart from the photometric ones

Batch = dict[str, jax.Array]


def augmented_patches(
    config: schema.Config, batch: Batch, crops: Iterable[int], *, exact: bool = False
) -> dict[int, jax.Array]:
    """Mirrored, coloured, normalised and patchified views, {crop: [B, N, P]} in the compute
    precision; `exact`: in float32, as pixel targets are."""
    out = {}
    for crop in crops:
        view = photometric.mirror(batch["views"][:, crop], batch["flip"][:, crop])
        view = photometric.augment(
            view, batch["position"], seed=config.seed, view=crop, settings=config.data.augment
        )
        view = photometric.normalize(view, config.data.augment)
        if crop == 0 and config.data.augment.erase_p:
            view = mixup.random_erase(
                view, batch["position"], seed=config.seed, probability=config.data.augment.erase_p
            )
        out[crop] = vit.patchify(view, config.model.encoder.patch_size).astype(
            jnp.float32 if exact else config.model.dtype
        )
    return out


def plain_patches(config: schema.Config, pixels_BxSxSx3: jax.Array) -> jax.Array:
    """Normalised patches [B, N, P], in the compute precision, of images as they are: uint8, or
    floats in 0..1.

    >>> plain_patches(schema.Config(), jnp.zeros((2, 32, 32, 3), jnp.uint8)).shape
    (2, 4, 768)
    """
    normal = photometric.normalize(pixels_BxSxSx3, config.data.augment)
    return vit.patchify(normal, config.model.encoder.patch_size).astype(config.model.dtype)


def drop_path_factors(
    config: schema.Config, position_Bx2: jax.Array, salt: int
) -> jax.Array | None:
    """Keep factors [B, L, 2] of stochastic depth, 0 or 1 / (1 - p) for both branches of every
    layer; None where the rate is 0."""
    if not config.model.encoder.drop_path:
        return None
    rates_Lx1 = jnp.asarray(backbones.backbone_drop_rates(config.model))[:, None]
    base = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), DROP_PATH), salt)

    def one(words_2: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(base, words_2[0]), words_2[1])
        kept = jax.random.uniform(key, (rates_Lx1.shape[0], 2)) >= rates_Lx1
        return kept / (1 - rates_Lx1)

    return jax.vmap(one)(position_Bx2)


def image_rows(config: schema.Config, read: Pass, image: str, x_Bx: jax.Array) -> jax.Array:
    """Rows [R, ...] of `x` for one of the images that a pass shows: R = B, or B / 2 mixed inputs of
    a batch in halves."""
    if read.blended:
        return mixing.partner(x_Bx) if image == "partner" else x_Bx
    if not read.mixed:
        return x_Bx
    if config.objective.pairing == "halves":
        return x_Bx.reshape(-1, 2, *x_Bx.shape[1:])[:, int(image == "partner")]
    return mixing.partner(x_Bx) if image == "partner" else x_Bx


def pass_mask(config: schema.Config, read: Pass, batch: Batch) -> jax.Array:
    """Mask [R, N] of a pass: True where a cell shows the row's own image."""
    return image_rows(config, read, "own", batch["mask"])


def visible_cells(config: schema.Config, read: Pass, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(own [R, K], other [R, N - K]) cells of a pass, ascending."""
    return mixing.split(pass_mask(config, read, batch), config.tokens - config.hidden)


def encoder_input(
    config: schema.Config, read: Pass, salt: int, batch: Batch, crops: dict[int, jax.Array]
) -> dict[str, Any]:
    """Arguments of the encoder for a pass: `augmented_patches` [R, N, P], `index` of those that are
    read, `hidden` cells, `keep` of drop path."""
    x_RxNxP, keep = (
        crops[read.crop],
        drop_path_factors(config, image_rows(config, read, "own", batch["position"]), salt),
    )
    if read.mixed:
        x_RxNxP = image_rows(config, read, "own", mixing.mix(x_RxNxP, batch["mask"]))
    if read.blended:
        x_RxNxP = _blended(config, x_RxNxP, mixup_of(config, batch))
    return dict(
        patches=x_RxNxP,
        index=visible_cells(config, read, batch)[0] if read.masked and not read.filled else None,
        hidden=~batch["mask"] if read.filled else None,
        keep=keep,
    )


def mixup_of(config: schema.Config, batch: Batch) -> mixup.MixupDraws:
    """How the images of a batch are blended. The draws are cheap to make and slow to compile: a
    step makes them once, `with_mixup_draws`."""
    if "share" in batch:
        return mixup.MixupDraws(batch["share"], batch["cut_box"], batch["cut"])
    return mixup.draw_mixup(
        batch["position"],
        seed=config.seed,
        size=config.data.image_size,
        settings=config.data.augment,
    )


def with_mixup_draws(config: schema.Config, passes: Iterable[Pass], batch: Batch) -> Batch:
    """The batch, with the draws of its blending if a pass asks for them."""
    if not any(read.blended for read in passes):
        return batch
    made = mixup_of(config, batch)
    return {**batch, "share": made.share, "cut_box": made.box, "cut": made.cut}


def _blended(config: schema.Config, x_BxNxP: jax.Array, how: mixup.MixupDraws) -> jax.Array:
    """Patches of blended images; in patches as in pixels, for both are linear in every pixel."""
    other, patch = mixing.partner(x_BxNxP), config.model.encoder.patch_size
    share_Bx1x1 = how.share[:, None, None]
    mixed = (share_Bx1x1 * x_BxNxP + (1 - share_Bx1x1) * other).astype(x_BxNxP.dtype)
    within = mixup.box_mask(how.box, config.data.image_size)[..., None]
    there_BxNxP = vit.patchify(jnp.broadcast_to(within, (*within.shape[:-1], 3)), patch)
    return jnp.where(how.cut[:, None, None], jnp.where(there_BxNxP, other, x_BxNxP), mixed)


def encode_passes(
    config: schema.Config,
    passes: tuple[Pass, ...],
    batch: Batch,
    crops: dict[int, jax.Array],
    encoder: Any,
) -> dict[Pass, jax.Array]:
    """Features {pass: [R, T, D]}, cls first, every pass once."""
    out = {}
    for salt, read in enumerate(passes):
        arguments = encoder_input(config, read, salt, batch, crops)
        isolate = read.mixed and config.objective.isolate
        run = _isolated if isolate else m3i.encode
        if isolate:
            arguments["index"] = jnp.stack(visible_cells(config, read, batch), 1)
        out[read] = run(config, encoder, arguments.pop("patches"), **arguments)
    return out


def _isolated(
    config: schema.Config,
    encoder: Any,
    patches: jax.Array,
    *,
    index: jax.Array,
    hidden: None,
    keep: jax.Array | None,
) -> jax.Array:
    """A mixed input whose images do not attend to each other: two sequences of half the length,
    each with a cls token of its own, put back in place. Half of the attention of one long sequence
    under a mask, and the same numbers. Returns their mean as the cls token."""
    rows, both = index.shape[0], index.reshape(-1, index.shape[-1])
    twice = None if keep is None else jnp.repeat(keep, 2, 0)
    z_2RxTxD = m3i.encode(config, encoder, jnp.repeat(patches, 2, 0), index=both, keep=twice)
    tokens = z_2RxTxD[:, -index.shape[-1] :].reshape(rows, -1, z_2RxTxD.shape[-1])
    order = jnp.argsort(index.reshape(rows, -1), 1)
    in_place = mixing.gather(tokens, order)
    if not config.model.encoder.cls_token:
        return in_place
    return jnp.concatenate(
        [z_2RxTxD[:, :1].reshape(rows, 2, -1).mean(1, keepdims=True), in_place], 1
    )
