"""Retrieval of images by captions and of captions by images: recall at 1, 5 and 10 among all
held-out pairs.

Captions with the same tokens count as one: every image with that caption is a right answer, and the
candidates of an image are the distinct captions. A tie with a wrong candidate counts as wrong, so a
collapsed model scores 0, not 100 %."""

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import parallel
from m3i_jax.data import decode
from m3i_jax.data.sources import base
from m3i_jax.data.tokenizer import Tokenizer
from m3i_jax.evaluation import registry
from m3i_jax.evaluation.feature_extraction import EvalContext, Metric
from m3i_jax.evaluation.text_embedder import TextEmbedder, shared_embedder

TOP = (1, 5, 10)
_UNREADABLE = -1  # length of a caption that cannot be read, in the exchange between hosts


@jax.jit
def retrieval_ranks(
    queries_QxE: jax.Array, candidates_CxE: jax.Array, right_QxC: jax.Array
) -> jax.Array:
    """Returns the number of wrong candidates [Q] at least as similar to a query as its most similar
    right one: 0 is a hit.

    Args:
      queries_QxE, candidates_CxE: L2-normalised.
      right_QxC: bool, the right candidates of a query; at least one a query.

    >>> candidates = jnp.array([[0.6, 0.8], [0.8, 0.6]])
    >>> retrieval_ranks(jnp.eye(2), candidates, jnp.eye(2, dtype=bool)).tolist()
    [1, 1]
    """
    similarity_QxC = jnp.matmul(queries_QxE, candidates_CxE.T, precision=jax.lax.Precision.HIGHEST)
    best_Qx1 = jnp.where(right_QxC, similarity_QxC, -jnp.inf).max(1, keepdims=True)
    return ((similarity_QxC >= best_Qx1) & ~right_QxC).sum(1)


def recall_at(
    images_NxE: np.ndarray,
    texts_MxE: np.ndarray,
    caption_N: np.ndarray,
    *,
    chunk: int = 1024,
    poll: Callable[[], None] = lambda: None,
) -> Iterator[tuple[str, float]]:
    """Yields ("text_to_image/r1", share), ..., ("image_to_text/r10", share).

    Args:
      images_NxE: L2-normalised embeddings of N images.
      texts_MxE: L2-normalised embeddings of the M distinct captions.
      caption_N: int, the caption of each image; a caption of several images counts once an image.
      chunk: queries at a time; the last chunk is padded.
      poll: called between chunks; may raise.

    >>> dict(recall_at(np.eye(2), np.eye(2), np.array([0, 1])))["text_to_image/r1"]
    1.0
    """
    count = len(texts_MxE)
    images, texts, owner = jax.device_put((images_NxE, texts_MxE, caption_N))
    every = jnp.arange(count)

    def all_ranks(
        queries: jax.Array, query_id: jax.Array, candidates: jax.Array, candidate_id: jax.Array
    ) -> np.ndarray:
        ranks = []
        for start in range(0, len(queries), chunk):
            poll()
            # padded with rows from the start: one shape, one compilation
            rows = np.arange(start, start + chunk) % len(queries)
            right = query_id[rows][:, None] == candidate_id[None]
            rank_Q = np.asarray(retrieval_ranks(queries[rows], candidates, right))
            ranks.append(rank_Q[: len(queries) - start])
        return np.concatenate(ranks)

    of_text = all_ranks(texts, every, images, owner)[caption_N]
    of_image = all_ranks(images, owner, texts, every)
    for direction, rank_N in (("text_to_image", of_text), ("image_to_text", of_image)):
        for top in TOP:
            yield f"{direction}/r{top}", float((rank_N < top).mean())


class _Captions:
    """Token ids of the captions of a source; each caption is read and tokenized once a run, by one
    host. `unreadable`: records whose caption cannot be read, which count as without caption."""

    def __init__(
        self, source: base.DataSource, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, missing: str
    ) -> None:
        self._source, self._tokenizer, self._mesh = source, tokenizer, mesh
        self._missing = missing
        self._token_ids: dict[int, tuple[int, ...]] = {}
        self.unreadable: set[int] = set()

    def __call__(self, records: Sequence[int]) -> list[tuple[int, ...]]:
        """Token ids of each record, start and end included; () without a caption."""
        if new := [record for record in dict.fromkeys(records) if record not in self._token_ids]:
            unit = self._mesh.shape["replica"] * self._mesh.shape["fsdp"]
            hosts, host = jax.process_count(), jax.process_index()
            share = -(-len(new) // unit) * unit // hosts
            rows = {
                "tokens": np.zeros((share, self._tokenizer.length), np.int32),
                "length": np.zeros(share, np.int32),
            }
            for row, record in enumerate(new[host * share : (host + 1) * share]):
                try:
                    with decode.replaceable(self._missing):
                        text = decode.clean_caption(base.source_caption(self._source, record))
                except decode.BadRecord:
                    rows["length"][row] = _UNREADABLE
                    continue
                if text:
                    rows["tokens"][row], rows["length"][row] = self._tokenizer.encode(text)
            rows = parallel.allgather_rows(self._mesh, rows)
            for record, tokens, length in zip(new, rows["tokens"], rows["length"], strict=False):
                self._token_ids[record] = tuple(tokens[: max(length, 0)].tolist())
                self.unreadable |= {record} if length == _UNREADABLE else set()
        return [self._token_ids[record] for record in records]


def measure(
    mesh: jax.sharding.Mesh,
    source: base.DataSource,
    embed: TextEmbedder,
    *,
    image_set: str = "queries",
    missing: str = "stop",
) -> Metric:
    """eval/retrieval/text_to_image/r1, ... of the images of a set that have a caption; no metric if
    none has.

    Args:
      mesh: devices; their hosts share the reading of captions.
      source: the source of the set, which gives the captions.
      embed: embeds images and texts.
      image_set: name of the set; its features are those of the pooling that the text term trains.
        That they are normalised changes nothing, since the projection has no bias.
      missing: "replace": a caption that cannot be read is left out and counted in
        `EvalContext.skipped`; see `schema.Data.missing`.

    Raises:
      Unreadable: by the metric, with missing="stop".
    """
    captions = _Captions(source, embed.words, mesh, missing)

    def run(context: EvalContext) -> Iterator[tuple[str, float]]:
        features = context(image_set)
        records = features.records.tolist()
        texts = captions(records)
        context.skipped[decode.UNREADABLE] += len(captions.unreadable.intersection(records))
        captioned = np.array([bool(text) for text in texts], bool)
        if not captioned.any():
            return
        distinct = {text: number for number, text in enumerate(dict.fromkeys(filter(None, texts)))}
        tokens = np.zeros((len(distinct), embed.words.length), np.int32)
        for text, number in distinct.items():
            tokens[number, : len(text)] = text
        lengths = np.array([len(text) for text in distinct], np.int32)
        images = embed.images(context.params, features.vectors[captioned], context.poll)
        embedded = embed.tokens(context.params, tokens, lengths, context.poll)
        owner = np.array([distinct[text] for text in texts if text])
        for name, value in recall_at(images, embedded, owner, poll=context.poll):
            yield f"eval/retrieval/{name}", value

    return run


registry.register_evaluator(
    registry.Evaluator(
        name="retrieval",
        setting="retrieval",
        needs=(registry.TEXT_TOWER, registry.CAPTIONS),
        build=lambda inputs: measure(
            inputs.mesh,
            inputs.held_out,
            shared_embedder(inputs),
            image_set=inputs.pooled_set,
            missing=inputs.config.data.missing,
        ),
    )
)
