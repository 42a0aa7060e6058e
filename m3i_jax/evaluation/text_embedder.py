"""Embeddings of images and texts in the joint space, for retrieval and zero-shot classification.
Batches are split over the devices; every host receives all embeddings."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from m3i_jax import parallel, schema
from m3i_jax.data import decode
from m3i_jax.data.tokenizer import Tokenizer
from m3i_jax.evaluation import registry
from m3i_jax.models import m3i
from m3i_jax.models import text as text_tower
from m3i_jax.objective.numerics import l2_normalize


class TextEmbedder:
    """Embeds images and texts in the joint space, L2-normalised; compiled once.

    Args:
      config: settings of the run.
      mesh: rows are split over its data axes.
      words: tokenizer.
      batch: rows a device step, a multiple of the data shards.
    """

    def __init__(
        self, config: schema.Config, mesh: jax.sharding.Mesh, words: Tokenizer, batch: int
    ) -> None:
        replicated = parallel.replicated(mesh)
        self.words, self._mesh, self._batch = words, mesh, batch
        self._images = parallel.Program(
            lambda params, x: l2_normalize(m3i.image_embedding(config, params, x)),
            name="image_embedding",
            out_shardings=replicated,
        )
        self._texts = parallel.Program(
            lambda params, ids, length: l2_normalize(
                text_tower.apply(config.model, params["text"], ids, length)
            ),
            name="text_embedding",
            out_shardings=replicated,
        )

    def images(self, params: Any, pooled_NxW: np.ndarray, poll: Callable[[], None]) -> np.ndarray:
        """Returns [N, E] of pooled features, normalised or not: the projection has no bias."""
        return self._run(functools.partial(self._images, params), poll, pooled_NxW)

    def tokens(
        self, params: Any, ids_MxL: np.ndarray, length_M: np.ndarray, poll: Callable[[], None]
    ) -> np.ndarray:
        """Returns [M, E] of token ids, start and end included."""
        return self._run(functools.partial(self._texts, params), poll, ids_MxL, length_M)

    def texts(self, params: Any, texts: list[str], poll: Callable[[], None]) -> np.ndarray:
        """Returns [M, E] of texts, which are cleaned as captions are."""
        encoded = [self.words.encode(decode.clean_caption(text) or text) for text in texts]
        ids, lengths = (np.stack(x).astype(np.int32) for x in zip(*encoded, strict=True))
        return self.tokens(params, ids, lengths, poll)

    def _run(self, function: Any, poll: Callable[[], None], *arrays: np.ndarray) -> np.ndarray:
        out, size = [], self._batch
        for start in range(0, len(arrays[0]), size):
            poll()
            rows = [
                np.pad(
                    a[start : start + size],
                    [(0, max(0, start + size - len(a)))] + [(0, 0)] * (a.ndim - 1),
                )
                for a in arrays
            ]
            out.append(np.asarray(function(*(parallel.split_rows(self._mesh, x) for x in rows))))
        return np.concatenate(out)[: len(arrays[0])]


def shared_embedder(inputs: registry.EvalInputs) -> TextEmbedder:
    """Returns the embedder of a run, compiled once for all evaluators that use it."""
    assert inputs.tokenizer is not None
    tokenizer = inputs.tokenizer
    return inputs.once(
        "text embedder",
        lambda: TextEmbedder(inputs.config, inputs.mesh, tokenizer, inputs.batch_size),
    )
