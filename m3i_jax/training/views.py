"""From a batch of uint8 views to what the encoders read: colour, patches, mixing, dropping, and the stochastic-depth draws. On the device,
pure, and keyed by (seed, stream position), so that neither sharding nor microbatches nor a restart changes a pixel."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from m3i_jax import schema
from m3i_jax.data import photometric
from m3i_jax.models import layers, vit
from m3i_jax.objective import mixing
from m3i_jax.objective.methods import Pass

DROP_PATH = 0x64726F70  # keeps these draws apart from the photometric ones

Batch = dict[str, jax.Array]


def patches(config: schema.Config, batch: Batch, crops: Iterable[int]) -> dict[int, jax.Array]:
    """Coloured, normalised and patchified views, {crop: [B, N, P]} in the compute precision."""
    out = {}
    for crop in crops:
        view = photometric.augment(batch["views"][:, crop], batch["position"], seed=config.seed, view=crop, settings=config.data.augment)
        view = photometric.normalize(view, config.data.augment)
        out[crop] = vit.patchify(view, config.model.encoder.patch_size).astype(config.model.dtype)
    return out


def drop_path(config: schema.Config, position_Bx2: jax.Array, salt: int) -> jax.Array | None:
    """Keep factors [B, L, 2] of stochastic depth, 0 or 1 / (1 - p) for (attention, MLP) of every block; None where the rate is 0."""
    if not config.model.encoder.drop_path:
        return None
    rates_Lx1 = jnp.asarray(layers.drop_rates(config.model.encoder))[:, None]
    base = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), DROP_PATH), salt)

    def one(words_2: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(base, words_2[0]), words_2[1])
        kept = jax.random.uniform(key, (rates_Lx1.shape[0], 2)) >= rates_Lx1
        return kept / (1 - rates_Lx1)

    return jax.vmap(one)(position_Bx2)


def encoder_inputs(
    config: schema.Config, passes: tuple[Pass, ...], batch: Batch, crops: dict[int, jax.Array]
) -> dict[Pass, dict[str, Any]]:
    """Keyword arguments of the encoder for every pass: patches, which of them are read, and the drop-path draws."""
    own_BxK, _ = mixing.split(batch["mask"], config.tokens - config.hidden)
    inputs = {}
    for salt, read in enumerate(passes):
        x_BxNxP = crops[read.crop]
        inputs[read] = dict(
            patches=mixing.mix(x_BxNxP, batch["mask"]) if read.mixed else x_BxNxP,
            index=own_BxK if read.masked else None,
            keep=drop_path(config, batch["position"], salt),
        )
    return inputs
