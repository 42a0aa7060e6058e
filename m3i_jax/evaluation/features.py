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


def image_features(config: schema.Config, attention: bool, params: Any, views_BxSxSx3: jax.Array) -> jax.Array:
    """L2-normalised features [B, D] float32 of clean uint8 views (no colour augmentation, no masking): the attention pooling that the
    objective trains (M3I section 3.4), or the mean of the patch tokens."""
    pixels = photometric.normalize(views_BxSxSx3.astype(jnp.float32) / 255, config.data.augment)
    z_BxTxD = m3i.encode(config, params["encoder"], vit.patchify(pixels, config.model.encoder.patch_size).astype(config.model.dtype))
    x_BxNxD = z_BxTxD[:, int(config.model.encoder.cls_token) :]
    vector_BxD = (m3i.pool(config, params, x_BxNxD) if attention else x_BxNxD.astype(jnp.float32).mean(1)).astype(jnp.float32)
    return vector_BxD * jax.lax.rsqrt(jnp.square(vector_BxD).sum(-1, keepdims=True) + 1e-12)


class Extractor:
    """Features and labels of batches `{views, label, valid}`; compiled once for all calls.

    Args:
      config: the run's settings.
      mesh: batches are split over its data axes; their size must divide by those.
      attention: whether features are attention-pooled, or the mean of the patch tokens.
    """

    def __init__(self, config: schema.Config, mesh: jax.sharding.Mesh, *, attention: bool = False):
        self._mesh, self._width = mesh, config.model.pool.width if attention else config.model.encoder.width
        self._features = jax.jit(functools.partial(image_features, config, attention), out_shardings=parallel.replicated(mesh))

    def __call__(
        self, params: Any, batches: Iterable[dict[str, np.ndarray]], poll: Callable[[], None] = lambda: None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(features [n, D] float32, labels [n] int32) of the valid rows, in order. `params` holds the part "encoder" and, for
        attention pooling, "pool". `poll` is called between batches and may raise."""
        features, labels = [np.zeros((0, self._width), np.float32)], [np.zeros(0, np.int32)]
        for batch in batches:
            poll()
            views = jax.device_put(batch["views"], parallel.data_sharding(self._mesh))
            features.append(np.asarray(self._features(params, views))[batch["valid"]])
            labels.append(batch["label"][batch["valid"]])
        return np.concatenate(features), np.concatenate(labels)
