"""Embeddings of texts by the caption side of the model, for retrieval and zero-shot classification.
Every host has all of them; a batch is split over the devices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from m3i_jax import parallel, schema
from m3i_jax.data import decode
from m3i_jax.data.tokenizer import Tokenizer
from m3i_jax.models import m3i
from m3i_jax.models import text as text_tower
from m3i_jax.objective.numerics import l2_normalize


class TextEmbedder:
    """Both sides of the joint space of a model, L2-normalised; compiled once.

    Args:
      config: the run's settings.
      mesh: rows are split over its data axes.
      words: tokenizer.
      batch: rows a device step; must divide by the data axes.
    """

    def __init__(
        self, config: schema.Config, mesh: jax.sharding.Mesh, words: Tokenizer, batch: int
    ) -> None:
        whole = parallel.replicated(mesh)
        self.words, self._mesh, self._batch = words, mesh, batch
        self._images = parallel.Program(
            lambda params, x: l2_normalize(m3i.image_embedding(config, params, x)),
            name="image_embedding",
            out_shardings=whole,
        )
        self._texts = parallel.Program(
            lambda params, ids, length: l2_normalize(
                text_tower.apply(config.model, params["text"], ids, length)
            ),
            name="text_embedding",
            out_shardings=whole,
        )

    def images(self, params: Any, pooled_NxW: np.ndarray, poll: Callable[[], None]) -> np.ndarray:
        """[N, E] of pooled features. Their length does not matter: the projection has no bias."""
        return self._run(functools.partial(self._images, params), poll, pooled_NxW)

    def tokens(
        self, params: Any, ids_MxL: np.ndarray, length_M: np.ndarray, poll: Callable[[], None]
    ) -> np.ndarray:
        """[M, E] of texts in tokens, start and end included."""
        return self._run(functools.partial(self._texts, params), poll, ids_MxL, length_M)

    def texts(self, params: Any, texts: list[str], poll: Callable[[], None]) -> np.ndarray:
        """[M, E] of texts, cleaned as captions are."""
        framed = [self.words.encode(decode.clean_caption(text) or text) for text in texts]
        ids, lengths = (np.stack(x).astype(np.int32) for x in zip(*framed, strict=True))
        return self.tokens(params, ids, lengths, poll)

    def _run(self, function: Any, poll: Callable[[], None], *arrays: np.ndarray) -> np.ndarray:
        out, size = [], self._batch
        for at in range(0, len(arrays[0]), size):
            poll()
            rows = [
                np.pad(
                    a[at : at + size], [(0, max(0, at + size - len(a)))] + [(0, 0)] * (a.ndim - 1)
                )
                for a in arrays
            ]
            out.append(np.asarray(function(*(parallel.split_rows(self._mesh, x) for x in rows))))
        return np.concatenate(out)[: len(arrays[0])]
