"""Frozen features of whole data sets: what every evaluator starts from."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import parallel, schema
from m3i_jax.data import photometric
from m3i_jax.models import m3i, vit


def image_features(config: schema.Config, encoder: Any, views_BxSxSx3: jax.Array) -> jax.Array:
    """L2-normalised mean of the patch tokens, [B, D] float32, of clean uint8 views (no colour augmentation, no masking)."""
    pixels = photometric.normalize(views_BxSxSx3.astype(jnp.float32) / 255, config.data.augment)
    z_BxTxD = m3i.encode(config, encoder, vit.patchify(pixels, config.model.encoder.patch_size).astype(config.model.dtype))
    mean_BxD = z_BxTxD[:, int(config.model.encoder.cls_token) :].astype(jnp.float32).mean(1)
    return mean_BxD * jax.lax.rsqrt(jnp.square(mean_BxD).sum(-1, keepdims=True) + 1e-12)


class Extractor:
    """Features and labels of batches `{views, label, valid}`; compiled once for all calls.

    Args:
      config: the run's settings.
      mesh: batches are split over its data axes; their size must divide by those.
    """

    def __init__(self, config: schema.Config, mesh: jax.sharding.Mesh):
        self._mesh, self._width = mesh, config.model.encoder.width
        self._features = jax.jit(functools.partial(image_features, config), out_shardings=parallel.replicated(mesh))

    def __call__(
        self, encoder: Any, batches: Iterable[dict[str, np.ndarray]], poll: Callable[[], None] = lambda: None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(features [n, D] float32, labels [n] int32) of the valid rows, in order. `poll` is called between batches and may raise."""
        features, labels = [np.zeros((0, self._width), np.float32)], [np.zeros(0, np.int32)]
        for batch in batches:
            poll()
            views = jax.device_put(batch["views"], parallel.data_sharding(self._mesh))
            features.append(np.asarray(self._features(encoder, views))[batch["valid"]])
            labels.append(batch["label"][batch["valid"]])
        return np.concatenate(features), np.concatenate(labels)
