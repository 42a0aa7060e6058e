"""Retrieval of images by captions and of captions by images: recall at 1, 5 and 10 among all
held-out images and their captions.

An image may have several captions, as in COCO and Flickr30k: each of them is a query for its image,
and an image is found if any of its captions is among the first k (CLIP's, big_vision's and
CLIP_benchmark's definition; there, a wrong image of an equal caption is wrong). Captions with the
same tokens count as one candidate here, and every image with that caption is a right answer. A tie
with a wrong candidate counts as wrong, so a collapsed model scores 0, not 100 %."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from m3i_jax import parallel
from m3i_jax.data import decode
from m3i_jax.data.sources import base
from m3i_jax.data.sources.captions import source_captions
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
    right one: 0 is a hit. A similarity that is NaN is never one.

    Args:
      queries_QxE, candidates_CxE: L2-normalised.
      right_QxC: bool, the right candidates of a query; at least one a query.

    >>> candidates = jnp.array([[0.6, 0.8], [0.8, 0.6]])
    >>> retrieval_ranks(jnp.eye(2), candidates, jnp.eye(2, dtype=bool)).tolist()
    [1, 1]
    """
    similarity_QxC = jnp.matmul(queries_QxE, candidates_CxE.T, precision=jax.lax.Precision.HIGHEST)
    best_Qx1 = jnp.where(right_QxC, similarity_QxC, -jnp.inf).max(1, keepdims=True)
    return (~(similarity_QxC < best_Qx1) & ~right_QxC).sum(1)


def recall_at(
    images_NxE: np.ndarray,
    texts_MxE: np.ndarray,
    pairs_Px2: np.ndarray,
    *,
    chunk: int = 1024,
    poll: Callable[[], None] = lambda: None,
) -> Iterator[tuple[str, float]]:
    """Yields ("text_to_image/r1", share), ..., ("image_to_text/r10", share).

    Args:
      images_NxE: L2-normalised embeddings of N images.
      texts_MxE: L2-normalised embeddings of the M distinct captions.
      pairs_Px2: int, (image, caption) of every caption of every image, at least one each; a caption
        of several images counts once an image.
      chunk: queries at a time; the last chunk is padded.
      poll: called between chunks; may raise.

    >>> pairs = np.array([[0, 0], [1, 1], [1, 2]])  # the second image has two captions
    >>> dict(recall_at(np.eye(2), np.eye(2)[[0, 1, 0]], pairs))["text_to_image/r1"]
    0.6666666666666666
    """
    images, texts = jax.device_put((images_NxE, texts_MxE))
    image_P, text_P = pairs_Px2.T

    def all_ranks(
        queries: jax.Array, query_P: np.ndarray, candidates: jax.Array, candidate_P: np.ndarray
    ) -> np.ndarray:
        ranks = []
        for start in range(0, len(queries), chunk):
            poll()
            # padded with rows from the start: one shape, one compilation
            rows = np.arange(start, start + chunk) % len(queries)
            right = np.zeros((chunk, len(candidates)), bool)
            here = (query_P >= start) & (query_P < start + chunk)
            right[query_P[here] - start, candidate_P[here]] = True
            rank_Q = np.asarray(retrieval_ranks(queries[rows], candidates, right))
            ranks.append(rank_Q[: len(queries) - start])
        return np.concatenate(ranks)

    of_text = all_ranks(texts, text_P, images, image_P)[text_P]
    of_image = all_ranks(images, image_P, texts, text_P)
    for direction, rank in (("text_to_image", of_text), ("image_to_text", of_image)):
        for top in TOP:
            yield f"{direction}/r{top}", float((rank < top).mean())


Tokens = tuple[int, ...]


class _Captions:
    """Token ids of the captions of a source; each record is read and tokenized once a run, by one
    host. `unreadable`: records whose captions cannot be read, which count as without any."""

    def __init__(
        self,
        source: base.DataSource,
        tokenizer: Tokenizer,
        mesh: jax.sharding.Mesh,
        missing: str,
        lines: bool,
    ) -> None:
        self._source, self._tokenizer, self._mesh = source, tokenizer, mesh
        self._missing, self._lines = missing, lines
        self._token_ids: dict[int, tuple[Tokens, ...]] = {}
        self.unreadable: set[int] = set()

    def __call__(
        self, records: Sequence[int], poll: Callable[[], None] = lambda: None
    ) -> list[tuple[Tokens, ...]]:
        """Token ids of all captions of each record, start and end included. `poll` is called
        between chunks of records, as often on all hosts; it may raise."""
        if new := [record for record in dict.fromkeys(records) if record not in self._token_ids]:
            unit = self._mesh.shape["replica"] * self._mesh.shape["fsdp"]
            hosts, host = jax.process_count(), jax.process_index()
            share = -(-len(new) // unit) * unit // hosts
            ends = host * share, (host + 1) * share
            own: list[list[str] | None] = []
            for start in range(*ends, decode.CAPTION_CHUNK):
                poll()
                chunk = new[start : min(start + decode.CAPTION_CHUNK, ends[1])]
                own += decode.read_captions(self._read, chunk)
            number = np.zeros(share, np.int32)
            number[: len(own)] = [_UNREADABLE if read is None else len(read) for read in own]
            number = parallel.allgather_rows(self._mesh, {"captions": number})["captions"]
            most = max(1, int(number.max()))
            rows = {
                "tokens": np.zeros((share, most, self._tokenizer.length), np.int32),
                "length": np.zeros((share, most), np.int32),
            }
            for row, texts in enumerate(own):
                for column, text in enumerate(texts or ()):
                    ids, length = self._tokenizer.encode(text)
                    rows["tokens"][row, column], rows["length"][row, column] = ids, length
            rows = parallel.allgather_rows(self._mesh, rows)
            for row, record in enumerate(new):
                self._token_ids[record] = tuple(
                    tuple(tokens[:length].tolist())
                    for tokens, length in zip(
                        rows["tokens"][row], rows["length"][row].tolist(), strict=True
                    )
                    if length
                )
                self.unreadable |= {record} if number[row] == _UNREADABLE else set()
        return [self._token_ids[record] for record in records]

    def _read(self, record: int) -> list[str] | None:
        """The texts of a record; None if they cannot be read."""
        try:
            with decode.replaceable(self._missing):
                texts = source_captions(self._source, record)
        except decode.BadRecord:
            return None
        parts = (part for text in texts for part in (text.splitlines() if self._lines else [text]))
        return [text for part in parts if (text := decode.clean_caption(part))]


def measure(
    mesh: jax.sharding.Mesh,
    source: base.DataSource,
    embed: TextEmbedder,
    *,
    image_set: str = "queries",
    missing: str = "stop",
    lines: bool = False,
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
      lines: whether each line of a text is a caption.

    Raises:
      Unreadable: by the metric, with missing="stop".
    """
    captions = _Captions(source, embed.words, mesh, missing, lines)

    def run(context: EvalContext) -> Iterator[tuple[str, float]]:
        features = context(image_set)
        records = features.records.tolist()
        texts = captions(records, context.poll)
        context.skipped[decode.UNREADABLE] += len(captions.unreadable.intersection(records))
        captioned = np.array([bool(text) for text in texts], bool)
        if not captioned.any():
            return
        kept = [each for each in texts if each]
        distinct = {
            text: number for number, text in enumerate(dict.fromkeys(itertools.chain(*kept)))
        }
        tokens = np.zeros((len(distinct), embed.words.length), np.int32)
        for text, number in distinct.items():
            tokens[number, : len(text)] = text
        lengths = np.array([len(text) for text in distinct], np.int32)
        images = embed.images(context.params, features.vectors[captioned], context.poll)
        embedded = embed.tokens(context.params, tokens, lengths, context.poll)
        pairs = [(image, distinct[text]) for image, each in enumerate(kept) for text in each]
        for name, value in recall_at(images, embedded, np.array(pairs), poll=context.poll):
            yield f"eval/retrieval/{name}", value

    return run


registry.register_evaluator(
    registry.Evaluator(
        name="retrieval",
        setting="retrieval",
        reads=("caption_lines",),
        needs=(registry.TEXT_TOWER, registry.CAPTIONS),
        build=lambda inputs: measure(
            inputs.mesh,
            inputs.held_out,
            shared_embedder(inputs),
            image_set=inputs.pooled_set,
            missing=inputs.config.data.missing,
            lines=inputs.config.evaluate.caption_lines,
        ),
    )
)
