"""Retrieval between pictures and captions: among all held-out pairs, is the right one within the first k? R@1, R@5 and R@10, both ways.

Captions that the model reads as the same tokens count as one: any picture of an equal caption is a right answer, and the candidates of a
picture are the distinct captions. A tie with a wrong answer counts against the right one, so a collapsed model scores 0, not 100 %.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import parallel, schema
from m3i_jax.data import records, sources
from m3i_jax.data.tokenizer import Tokenizer
from m3i_jax.evaluation.features import Measure, Seen
from m3i_jax.models import m3i

TOP = (1, 5, 10)


@jax.jit
def ranks(queries_QxE: jax.Array, candidates_CxE: jax.Array, right_QxC: jax.Array) -> jax.Array:
    """How many wrong candidates [Q] are at least as similar to a query as its most similar right one: 0 is a hit.

    Args:
      queries_QxE, candidates_CxE: L2-normalised.
      right_QxC: bool, which candidates answer a query; at least one a query.

    >>> ranks(jnp.eye(2), jnp.array([[0.6, 0.8], [0.8, 0.6]]), jnp.eye(2, dtype=bool)).tolist()
    [1, 1]
    """
    similarity_QxC = jnp.matmul(queries_QxE, candidates_CxE.T, precision=jax.lax.Precision.HIGHEST)
    best_Qx1 = jnp.where(right_QxC, similarity_QxC, -jnp.inf).max(1, keepdims=True)
    return ((similarity_QxC >= best_Qx1) & ~right_QxC).sum(1)


def recall(
    images_NxE: np.ndarray, texts_MxE: np.ndarray, caption_N: np.ndarray, *, chunk: int = 1024, poll: Callable[[], None] = lambda: None
) -> Iterator[tuple[str, float]]:
    """("text_to_image/r1", share), ..., ("image_to_text/r10", share).

    Args:
      images_NxE: L2-normalised embeddings of N pictures.
      texts_MxE: those of the M distinct captions.
      caption_N: int, the caption of each picture; every caption belongs to a picture, and is asked once a picture.
      chunk: queries at a time; the last chunk is filled up and cut again.
      poll: called between chunks; may raise.

    >>> dict(recall(np.eye(2), np.eye(2), np.array([0, 1])))["text_to_image/r1"]
    1.0
    """
    count = len(texts_MxE)
    images, texts, owner = jax.device_put((images_NxE, texts_MxE, caption_N))
    every = jnp.arange(count)

    def all_of(queries: jax.Array, meant: jax.Array, candidates: jax.Array, of: jax.Array) -> np.ndarray:
        found = []
        for at in range(0, len(queries), chunk):
            poll()
            rows = np.arange(at, at + chunk) % len(queries)  # filled up from the start: one shape, one compilation
            found.append(np.asarray(ranks(queries[rows], candidates, meant[rows][:, None] == of[None]))[: len(queries) - at])
        return np.concatenate(found)

    of_text = all_of(texts, every, images, owner)[caption_N]
    of_image = all_of(images, owner, texts, every)
    for way, found in (("text_to_image", of_text), ("image_to_text", of_image)):
        for top in TOP:
            yield f"{way}/r{top}", float((found < top).mean())


def _unit(x_BxE: jax.Array) -> jax.Array:
    return x_BxE * jax.lax.rsqrt(jnp.square(x_BxE).sum(-1, keepdims=True) + 1e-12)


class _Captions:
    """Captions of a source as the model reads them; each is read and cut into tokens once a run."""

    def __init__(self, source: sources.Source, words: Tokenizer) -> None:
        self._source, self._words = source, words
        self._known: dict[int, tuple[int, ...]] = {}

    def __call__(self, record: int) -> tuple[int, ...]:
        """Token ids, start and end included; none without a caption."""
        if record not in self._known:
            text = records.clean_caption(sources.caption_of(self._source, record))
            tokens, length = self._words.encode(text) if text else (np.zeros(0, np.int32), 0)
            self._known[record] = tuple(tokens[:length].tolist())
        return self._known[record]


def measure(
    config: schema.Config, mesh: jax.sharding.Mesh, source: sources.Source, words: Tokenizer, *, pictures: str = "queries", batch: int = 256
) -> Measure:
    """eval/retrieval/text_to_image/r1, ... of the pictures of a set that have a caption; nothing if none has.

    Args:
      config: the run's settings.
      mesh: batches of captions are split over its data axes; `batch` must divide by those.
      source: what the set was read from; gives the captions.
      words: tokenizer.
      pictures: name of the set; its features must be those of the pooling that the text term trains. They are normalised, which a
        projection without bias does not mind.
      batch: captions a device step.
    """
    whole = parallel.replicated(mesh)
    embed_images = jax.jit(lambda params, x: _unit(m3i.image_embedding(config, params, x)), out_shardings=whole)
    embed_texts = jax.jit(lambda params, ids, length: _unit(m3i.text_embedding(config, params, ids, length)), out_shardings=whole)
    read = _Captions(source, words)

    def embedded(function: Any, poll: Callable[[], None], *arrays: np.ndarray) -> np.ndarray:
        out = []
        for at in range(0, len(arrays[0]), batch):
            poll()
            rows = [np.pad(a[at : at + batch], [(0, max(0, at + batch - len(a)))] + [(0, 0)] * (a.ndim - 1)) for a in arrays]
            out.append(np.asarray(function(*jax.device_put(rows, parallel.data_sharding(mesh)))))
        return np.concatenate(out)[: len(arrays[0])]

    def run(seen: Seen) -> Iterator[tuple[str, float]]:
        found = seen(pictures)
        texts = [read(int(record)) for record in found.records]
        has = np.array([bool(text) for text in texts], bool)
        if not has.any():
            return
        distinct = {text: number for number, text in enumerate(dict.fromkeys(filter(None, texts)))}
        tokens = np.zeros((len(distinct), words.length), np.int32)
        for text, number in distinct.items():
            tokens[number, : len(text)] = text
        lengths = np.array([len(text) for text in distinct], np.int32)
        images = embedded(functools.partial(embed_images, seen.params), seen.poll, found.vectors[has])
        captions = embedded(functools.partial(embed_texts, seen.params), seen.poll, tokens, lengths)
        owner = np.array([distinct[text] for text in texts if text])
        for name, value in recall(images, captions, owner, poll=seen.poll):
            yield f"eval/retrieval/{name}", value

    return run
