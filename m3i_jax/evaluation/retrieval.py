"""Retrieval between images and captions: among all held-out pairs, is the right one within the
first k? R@1, R@5 and R@10, both ways.

Captions that the model reads as the same tokens count as one: any image of an equal caption is a
right answer, and the candidates of a image are the distinct captions. A tie with a wrong answer
counts against the right one, so a collapsed model scores 0, not 100 %."""

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import parallel
from m3i_jax.data import decode
from m3i_jax.data.sources import base
from m3i_jax.data.tokenizer import Tokenizer
from m3i_jax.evaluation.feature_extraction import EvalContext, Metric
from m3i_jax.evaluation.text_embedder import TextEmbedder

TOP = (1, 5, 10)
_LOST = -1  # length of a caption that could not be read any more, between hosts


@jax.jit
def retrieval_ranks(
    queries_QxE: jax.Array, candidates_CxE: jax.Array, right_QxC: jax.Array
) -> jax.Array:
    """How many wrong candidates [Q] are at least as similar to a query as its most similar right
    one: 0 is a hit.

    Args:
      queries_QxE, candidates_CxE: L2-normalised.
      right_QxC: bool, which candidates answer a query; at least one a query.

    >>> retrieval_ranks(jnp.eye(2), jnp.array([[0.6, 0.8], [0.8, 0.6]]), jnp.eye(2, dtype=bool)).tolist()
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
    """("text_to_image/r1", share), ..., ("image_to_text/r10", share).

    Args: images_NxE: L2-normalised embeddings of N images. texts_MxE: those of the M distinct
      captions. caption_N: int, the caption of each image; every caption belongs to an image, and is
      asked once an image. chunk: queries at a time; the last chunk is filled up and cut again.
      poll: called between chunks; may raise.

    >>> dict(recall_at(np.eye(2), np.eye(2), np.array([0, 1])))["text_to_image/r1"]
    1.0
    """
    count = len(texts_MxE)
    images, texts, owner = jax.device_put((images_NxE, texts_MxE, caption_N))
    every = jnp.arange(count)

    def all_of(
        queries: jax.Array, meant: jax.Array, candidates: jax.Array, of: jax.Array
    ) -> np.ndarray:
        found = []
        for at in range(0, len(queries), chunk):
            poll()
            # filled up from the start: one shape, one compilation
            rows = np.arange(at, at + chunk) % len(queries)
            found.append(
                np.asarray(
                    retrieval_ranks(queries[rows], candidates, meant[rows][:, None] == of[None])
                )[: len(queries) - at]
            )
        return np.concatenate(found)

    of_text = all_of(texts, every, images, owner)[caption_N]
    of_image = all_of(images, owner, texts, every)
    for way, found in (("text_to_image", of_text), ("image_to_text", of_image)):
        for top in TOP:
            yield f"{way}/r{top}", float((found < top).mean())


class _Captions:
    """Captions of a source as the model reads them; each is read and cut into tokens once a run, by
    one host. `lost`: the records whose caption could not be read any more, which count as
    without."""

    def __init__(
        self, source: base.DataSource, words: Tokenizer, mesh: jax.sharding.Mesh, missing: str
    ) -> None:
        self._source, self._words, self._mesh, self._missing = source, words, mesh, missing
        self._known: dict[int, tuple[int, ...]] = {}
        self.lost: set[int] = set()

    def __call__(self, wanted: Sequence[int]) -> list[tuple[int, ...]]:
        """Token ids of each record, start and end included; none without a caption."""
        if new := [record for record in dict.fromkeys(wanted) if record not in self._known]:
            unit = self._mesh.shape["replica"] * self._mesh.shape["fsdp"]
            hosts, host = jax.process_count(), jax.process_index()
            mine = -(-len(new) // unit) * unit // hosts
            rows = {
                "tokens": np.zeros((mine, self._words.length), np.int32),
                "length": np.zeros(mine, np.int32),
            }
            for row, record in enumerate(new[host * mine : (host + 1) * mine]):
                try:
                    with decode.replaceable(self._missing):
                        text = decode.clean_caption(base.source_caption(self._source, record))
                except decode.BadRecord:
                    rows["length"][row] = _LOST
                    continue
                if text:
                    rows["tokens"][row], rows["length"][row] = self._words.encode(text)
            whole = parallel.allgather_rows(self._mesh, rows)
            for record, tokens, length in zip(new, whole["tokens"], whole["length"], strict=False):
                self._known[record] = tuple(tokens[: max(length, 0)].tolist())
                self.lost |= {record} if length == _LOST else set()
        return [self._known[record] for record in wanted]


def measure(
    mesh: jax.sharding.Mesh,
    source: base.DataSource,
    embed: TextEmbedder,
    *,
    pictures: str = "queries",
    missing: str = "stop",
) -> Metric:
    """eval/retrieval/text_to_image/r1, ... of the images of a set that have a caption; nothing if
    none has.

    Args: mesh: devices, over whose hosts the reading of captions is shared. source: what the set
      was read from; gives the captions. embed: both sides of the joint space. images: name of the
      set; its features must be those of the pooling that the text term trains. They are normalised,
      which a projection without bias does not mind.
      missing: "replace": a caption that cannot be read any more is left out and counted in
          `Seen.skipped`; see `schema.Data.missing`.

    Raises:
      Unreadable: by the measure, with missing="stop".
    """
    read = _Captions(source, embed.words, mesh, missing)

    def run(seen: EvalContext) -> Iterator[tuple[str, float]]:
        found = seen(pictures)
        texts = read(found.records.tolist())
        seen.skipped[decode.UNREADABLE] += len(read.lost.intersection(found.records.tolist()))
        has = np.array([bool(text) for text in texts], bool)
        if not has.any():
            return
        distinct = {text: number for number, text in enumerate(dict.fromkeys(filter(None, texts)))}
        tokens = np.zeros((len(distinct), embed.words.length), np.int32)
        for text, number in distinct.items():
            tokens[number, : len(text)] = text
        lengths = np.array([len(text) for text in distinct], np.int32)
        images = embed.images(seen.params, found.vectors[has], seen.poll)
        captions = embed.tokens(seen.params, tokens, lengths, seen.poll)
        owner = np.array([distinct[text] for text in texts if text])
        for name, value in recall_at(images, captions, owner, poll=seen.poll):
            yield f"eval/retrieval/{name}", value

    return run
