"""From a batch of uint8 views to features: mirroring, colour, patches, mixing, dropped cells,
stochastic depth, and the online encoder. Pure functions on the device, keyed by (seed, stream
position), so that neither sharding nor microbatches nor a restart changes a pixel."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.augment import mixup, photometric
from m3i_jax.models import backbones, m3i, vit
from m3i_jax.objective import mixing, stream_keys
from m3i_jax.objective.derived_terms import SMALL
from m3i_jax.objective.terms import Pass

# entries of a batch that terms read row by row
ROW_ARRAYS = (
    *("label", "length", "tokens", "position", "box", "flip"),
    *("regions", "region_length", "region_given"),
)

Batch = dict[str, jax.Array]
Patches = dict[int, jax.Array]  # {view: [B, N, P]}


class PassInputs(NamedTuple):
    """Arrays that one encoder pass and its terms read of a batch beside the patches. `pass_inputs`
    computes it once a step.

    R rows: B, or B / 2 mixed inputs where the batch is in halves.

    mask    bool [R, N], True where a cell shows the row's own image
    own     int32 [R, K], cells of the row's own image, ascending
    other   int32 [R, N - K], the remaining cells, ascending
    keep    [R, L, 2], keep factors of stochastic depth; None where the rate is 0
    blend   mixup and CutMix draws; None unless the pass is blended
    rows    {"own" or "partner": {name: [R, ...]}}, the `ROW_ARRAYS` of either image, and `row`, its
            number in the global batch
    blocks  int32 [R, M, K], the cells of the target blocks; None without multi-block masks
    """

    mask: jax.Array
    own: jax.Array
    other: jax.Array
    keep: jax.Array | None
    blend: mixup.MixupDraws | None
    rows: dict[str, dict[str, jax.Array]]
    blocks: jax.Array | None = None

    def cells(self, image: str) -> jax.Array:
        """Returns the cells [R, ...] that show an image of a mixed or masked pass."""
        return self.own if image == "own" else self.other

    def hidden_cells(self, image: str) -> jax.Array:
        """Returns the cells [R, ...] that do not show an image."""
        return self.other if image == "own" else self.own


Inputs = dict[Pass, PassInputs]


def pass_inputs(config: schema.Config, passes: Iterable[Pass], batch: Batch) -> Inputs:
    """Returns the `PassInputs` of every pass of a global batch. `passes` are all those of a plan,
    in its order: the index of a pass keys its stochastic depth."""
    arrays = {name: batch[name] for name in ROW_ARRAYS if name in batch}
    arrays["row"] = jnp.arange(batch["mask"].shape[0])
    out: Inputs = {}
    for salt, read in enumerate(passes):
        mask = image_rows(config, read, "own", batch["mask"])
        own, other = mixing.split(mask, config.tokens - config.hidden)
        position = image_rows(config, read, "own", batch["position"])
        images = ("own", "partner") if read.mixed or read.blended else ("own",)
        out[read] = PassInputs(
            mask=mask,
            own=own,
            other=other,
            keep=drop_path_factors(config, position, salt),
            blend=_mixup_draws(config, batch) if read.blended else None,
            rows={
                image: {name: image_rows(config, read, image, x) for name, x in arrays.items()}
                for image in images
            },
            blocks=batch.get("blocks") if read.masked else None,
        )
    return out


def image_rows(config: schema.Config, read: Pass, image: str, x_Bx: jax.Array) -> jax.Array:
    """Returns rows [R, ...] of an array of the batch for the own or the partner image of a pass."""
    if read.mixed and config.objective.pairing == "halves":
        return x_Bx.reshape(-1, 2, *x_Bx.shape[1:])[:, int(image == "partner")]
    if read.mixed or read.blended:
        return mixing.partner(x_Bx) if image == "partner" else x_Bx
    return x_Bx


def drop_path_factors(
    config: schema.Config, position_Bx2: jax.Array, salt: int
) -> jax.Array | None:
    """Returns keep factors [B, L, 2] of stochastic depth, 0 or 1 / (1 - p) for both branches of
    every layer; None where the rate is 0."""
    if not config.model.encoder.drop_path:
        return None
    rates_Lx1 = jnp.asarray(backbones.backbone_drop_rates(config.model))[:, None]
    base = jax.random.fold_in(stream_keys.purpose_key(config.seed, stream_keys.DROP_PATH), salt)

    def one(words_2: jax.Array) -> jax.Array:
        key = stream_keys.position_key(base, words_2)
        kept = jax.random.uniform(key, (rates_Lx1.shape[0], 2), jnp.float32) >= rates_Lx1
        return kept / (1 - rates_Lx1)

    return jax.vmap(one)(position_Bx2)


def parallel_captions(
    config: schema.Config, position_Rx2: jax.Array, share: float
) -> jax.Array | None:
    """Returns which captions are predicted at once, bool [R], each with probability `share`; None
    for 0."""
    if not share:
        return None
    base = stream_keys.purpose_key(config.seed, stream_keys.PARALLEL)

    def one(words_2: jax.Array) -> jax.Array:
        key = stream_keys.position_key(base, words_2)
        return jax.random.uniform(key, dtype=jnp.float32) < share

    return jax.vmap(one)(position_Rx2)


def _mixup_draws(config: schema.Config, batch: Batch) -> mixup.MixupDraws:
    return mixup.draw_mixup(
        batch["position"],
        seed=config.seed,
        size=config.data.image_size,
        settings=config.data.augment,
    )


def augmented_patches(
    config: schema.Config, batch: Batch, views: Iterable[int], *, exact: bool = False
) -> Patches:
    """Mirrored, coloured, normalised and patchified views, in the compute precision, or in float32
    where `exact`, as pixel targets are."""
    out = {}
    for view in views:
        x = photometric.mirror(view_pixels(config, batch, view), batch["flip"][:, view])
        settings = config.data.augment if view < 2 else _small_augment(config, view)
        x = photometric.augment(
            x, batch["position"], seed=config.seed, view=view, settings=settings
        )
        x = photometric.normalize(x, config.data.augment)
        if view == 0 and config.data.augment.erase_p:
            x = mixup.random_erase(
                x, batch["position"], seed=config.seed, probability=config.data.augment.erase_p
            )
        out[view] = vit.patchify(x, config.model.encoder.patch_size).astype(
            jnp.float32 if exact else config.model.dtype
        )
    return out


def view_pixels(config: schema.Config, batch: Batch, view: int) -> jax.Array:
    """Returns the uint8 pixels [B, size, size, 3] of a view of a batch."""
    if view < 2:
        return batch["views"][:, view]
    sizes = [group.size for group in config.small_views]
    own = sizes[view - 2]
    return batch[f"views_{own}"][:, sizes[: view - 2].count(own)]


def _small_augment(config: schema.Config, view: int) -> schema.Augment:
    """Photometric settings in which the entries of a small view are at its index: the third ones,
    or those of the target view if there are two."""
    a = config.data.augment
    blur_p, solarize_p = ((*p[:2], *[p[-1]] * (view - 1)) for p in (a.blur_p, a.solarize_p))
    return dataclasses.replace(a, blur_p=blur_p, solarize_p=solarize_p)


def plain_patches(config: schema.Config, pixels_BxSxSx3: jax.Array) -> jax.Array:
    """Returns normalised patches [B, N, P], in the compute precision, of unaugmented images: uint8,
    or floats in 0..1.

    >>> plain_patches(schema.Config(), jnp.zeros((2, 32, 32, 3), jnp.uint8)).shape
    (2, 4, 768)
    """
    normal = photometric.normalize(pixels_BxSxSx3, config.data.augment)
    return vit.patchify(normal, config.model.encoder.patch_size).astype(config.model.dtype)


def encoder_input(
    config: schema.Config, read: Pass, inputs: PassInputs, patches: Patches
) -> jax.Array:
    """Returns the patches [R, N, P] that a pass shows to the encoder: of one image, mixed or
    blended."""
    x = patches[read.view]
    if read.mixed:
        own, partner = (image_rows(config, read, image, x) for image in ("own", "partner"))
        return jnp.where(inputs.mask[..., None], own, partner)
    return x if inputs.blend is None else _blend(config, x, inputs.blend)


def _blend(config: schema.Config, x_BxNxP: jax.Array, draws: mixup.MixupDraws) -> jax.Array:
    """Mixup and CutMix, on patches instead of pixels: both act on every pixel by itself."""
    partner, patch = mixing.partner(x_BxNxP), config.model.encoder.patch_size
    share_Bx1x1 = draws.share[:, None, None]
    mixed = (share_Bx1x1 * x_BxNxP + (1 - share_Bx1x1) * partner).astype(x_BxNxP.dtype)
    inside = mixup.box_mask(draws.box, config.data.image_size)[..., None]
    inside_BxNxP = vit.patchify(jnp.broadcast_to(inside, (*inside.shape[:-1], 3)), patch)
    return jnp.where(draws.cut[:, None, None], jnp.where(inside_BxNxP, partner, x_BxNxP), mixed)


def encode_passes(
    config: schema.Config, inputs: Inputs, patches: Patches, encoder: Any
) -> dict[Pass, jax.Array]:
    """Returns features {pass: [R, T, D]} of the online encoder, cls first, every pass once."""
    out: dict[Pass, jax.Array] = {}
    for reads in encoder_calls(config, inputs):
        read, given = reads[0], inputs[reads[0]]
        if read.view >= SMALL:
            keep = [inputs[each].keep for each in reads]
            z = m3i.encode(
                config,
                encoder,
                stack_rows([patches[each.view] for each in reads]),
                keep=None if keep[0] is None else stack_rows(keep),  # type: ignore[arg-type]
            )
            out |= dict(zip(reads, unstack_rows(z, len(reads)), strict=True))
            continue
        x = encoder_input(config, read, given, patches)
        if read.mixed and config.objective.isolate:
            out[read] = _encode_isolated(config, encoder, x, given)
        else:
            dropped = read.masked and not read.mask_tokens
            out[read] = m3i.encode(
                config,
                encoder,
                x,
                index=given.own if dropped else None,
                hidden=~given.mask if read.mask_tokens else None,
                keep=given.keep,
            )
    return out


def encoder_calls(config: schema.Config, passes: Iterable[Pass]) -> list[list[Pass]]:
    """Returns the passes of each call of the online encoder: small views of one size share one."""
    calls: dict[Any, list[Pass]] = {}
    for read in passes:
        size = config.view_size(read.view) if read.view >= SMALL else read
        calls.setdefault(size, []).append(read)
    return list(calls.values())


def stack_rows(arrays: list[jax.Array]) -> jax.Array:
    """r arrays [B, ...] as one [B * r, ...], those of one row side by side, so that the sharding of
    the batch stays."""
    stacked = jnp.stack(arrays, 1)
    return stacked.reshape(-1, *stacked.shape[2:])


def unstack_rows(x_BRx: jax.Array, count: int) -> list[jax.Array]:
    """Returns the inverse of `stack_rows`."""
    split = x_BRx.reshape(-1, count, *x_BRx.shape[1:])
    return [split[:, r] for r in range(count)]


def _encode_isolated(
    config: schema.Config, encoder: Any, patches: jax.Array, inputs: PassInputs
) -> jax.Array:
    """Features [R, T, D] of mixed inputs whose two images do not attend to each other.

    Each image is a sequence of its own with a cls token of its own: half of the attention FLOPs of
    one masked sequence, and the same numbers. The cls features are averaged."""
    index = jnp.stack([inputs.own, inputs.other], 1)
    rows, both = index.shape[0], index.reshape(-1, index.shape[-1])
    keep = None if inputs.keep is None else jnp.repeat(inputs.keep, 2, 0)
    z_2RxTxD = m3i.encode(config, encoder, jnp.repeat(patches, 2, 0), index=both, keep=keep)
    tokens = z_2RxTxD[:, -index.shape[-1] :].reshape(rows, -1, z_2RxTxD.shape[-1])
    tokens = mixing.gather(tokens, jnp.argsort(index.reshape(rows, -1), 1))
    if not config.model.encoder.cls_token:
        return tokens
    cls = z_2RxTxD[:, :1].reshape(rows, 2, -1).mean(1, keepdims=True)
    return jnp.concatenate([cls, tokens], 1)
