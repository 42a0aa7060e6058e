"""Decides which records of a source are worth training on: describes each by a pure function of its
bytes, then filters, looks for evaluation images, and chooses one of several copies.

The descriptions take 3.1 KB a record, so one machine with 64 GB compares some ten million."""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from m3i_jax import schema
from m3i_jax.data import decode, near_duplicates, perceptual_hash
from m3i_jax.data.sources import base
from m3i_jax.data.sources.base import DataSource

VERSION = 1  # of the descriptions
CHUNK = 1024  # records of one description file
KEPT = ""
SMALL, ASPECT, CAPTION = "below min_side", "aspect ratio", "caption length"
EVALUATION, EXACT, NEAR, LIKE = (
    "in an evaluation set",
    "equal file",
    "copy or crop",
    "like features",
)
REASONS = (*decode.REASONS, SMALL, ASPECT, CAPTION, EVALUATION, EXACT, NEAR, LIKE)
Mapper = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]


@dataclasses.dataclass(frozen=True)
class RecordDescriber:
    """Describes the records of a chunk: a pure function of (source, number of the chunk)."""

    source: DataSource
    background: int = 255
    missing: str = "stop"

    def chunks(self) -> int:
        """Returns the number of chunks."""
        return -(-len(self.source) // CHUNK)

    def identity(self) -> str:
        """Returns what decides the descriptions."""
        return base.stable_digest(VERSION, self.background, self.source.fingerprint())

    def __call__(self, chunk: int) -> dict[str, np.ndarray]:
        """Returns arrays of n records: "reason" int8 (index of decode.REASONS, -1: usable),
        "height" and "width" int32, "words" int32 (-1: no caption), "content" uint8 [n, 16] (hash of
        the file), "hash" uint64 (perceptual) and "thumbnail" uint8 [n, 32, 32, 3]."""
        rows = range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(self.source)))
        facts: dict[str, list[Any]] = collections.defaultdict(list)
        for start in range(0, len(rows), 64):
            few = list(rows[start : start + 64])
            for record in decode.read_records(self.source, few, self.missing):
                for name, value in self._describe(record).items():
                    facts[name].append(value)
        kinds: dict[str, Any] = {"reason": np.int8, "content": np.uint8, "thumbnail": np.uint8}
        kinds["hash"] = np.uint64
        return {name: np.array(facts[name], kinds.get(name, np.int32)) for name in facts}

    def _describe(self, record: base.Record | decode.BadRecord) -> dict[str, Any]:
        facts: dict[str, Any] = {"reason": -1, "height": 0, "width": 0, "words": -1}
        facts["hash"] = 0
        facts["content"] = np.zeros(16, np.uint8)
        facts["thumbnail"] = np.zeros((perceptual_hash.SIDE,) * 2 + (3,), np.uint8)
        if isinstance(record, decode.BadRecord):
            return {**facts, "reason": decode.REASONS.index(record.reason)}
        image, caption = record.image, decode.clean_caption(record.caption)
        raw = image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes()
        digest = hashlib.blake2b(raw, digest_size=16).digest()
        facts["content"] = np.frombuffer(digest, np.uint8)
        facts["words"] = -1 if caption is None else len(caption.split())
        try:
            opened = decode.open_image(image)
            least = (4.0 * perceptual_hash.SIDE,) * 2
            small = opened.rgb(background=self.background, least=least)
            facts["thumbnail"] = perceptual_hash.make_thumbnail(small)
            facts["hash"] = perceptual_hash.region_hashes(facts["thumbnail"], 1)[0]
            facts["height"], facts["width"] = opened.height, opened.width
        except decode.BadRecord as error:
            facts["reason"] = decode.REASONS.index(error.reason)
        return facts


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """A set of which no copy may be trained on: its name and descriptions."""

    name: str
    facts: dict[str, np.ndarray]


@dataclasses.dataclass
class Decisions:
    """What was decided of n records.

    Attributes:
        reason: int8 [n], index of REASONS, -1: kept.
        of: int64 [n], the record (or the image of the evaluation set) of which it is a copy, -1.
        evaluation: int16 [n], number of that evaluation set, -1.
        difference: float32 [n], to it; NaN.
    """

    reason: np.ndarray
    of: np.ndarray
    evaluation: np.ndarray
    difference: np.ndarray

    def leave_out(self, rows: np.ndarray, reason: str) -> None:
        """Gives records a reason, unless they have one."""
        new = rows[self.reason[rows] < 0]
        self.reason[new] = REASONS.index(reason)

    @property
    def kept(self) -> np.ndarray:
        """int64, the records that are kept."""
        return np.flatnonzero(self.reason < 0)


def decide(
    facts: dict[str, np.ndarray],
    rules: schema.Curate,
    mapper: Mapper,
    *,
    evaluation: Sequence[EvaluationSet] = (),
    features: np.ndarray | None = None,
) -> Decisions:
    """Decides which records are kept. The first reason that applies is given, in the order of
    REASONS; of several copies the one with the most pixels stays, then the first.

    Args:
        facts: see `RecordDescriber`.
        rules: settings.
        mapper: (function, items) -> results in order; see `engines.map_items`.
        evaluation: sets to compare with.
        features: float32 [n, D] of norm 1, rows of zeros where unknown; None for none.

    >>> import types
    >>> shades = np.arange(4)[:, None, None, None] + np.zeros((4, 32, 32, 3))
    >>> facts = dict(reason=np.array([-1, 1, -1, -1]), height=np.array([9, 0, 9, 40]),
    ...              width=np.array([90, 0, 9, 40]), words=np.array([-1, -1, 3, 3]),
    ...              content=np.zeros((4, 16), np.uint8), thumbnail=shades.astype(np.uint8))
    >>> rules = schema.Curate(max_aspect=3.0, duplicates="exact")
    >>> found = decide(facts, rules, lambda function, items: map(function, items))
    >>> [REASONS[i] if i >= 0 else "" for i in found.reason.tolist()]
    ['aspect ratio', 'undecodable', 'equal file', '']
    """
    count = len(facts["reason"])
    done = Decisions(
        facts["reason"].astype(np.int8),
        np.full(count, -1, np.int64),
        np.full(count, -1, np.int16),
        np.full(count, np.nan, np.float32),
    )
    _filter(facts, rules, done)
    for number, each in enumerate(evaluation):
        _leave_out_evaluation(facts, each, number, rules, mapper, done)
    if rules.duplicates == "none":
        return done
    pixels = facts["height"].astype(np.int64) * facts["width"]
    rank = np.lexsort((np.arange(count), -pixels))
    alive = rank[done.reason[rank] < 0]
    _, first, group = np.unique(
        facts["content"][alive], axis=0, return_index=True, return_inverse=True
    )
    best = alive[first[group.ravel()]]
    copies = best != alive
    done.of[alive[copies]] = best[copies]
    done.difference[alive[copies]] = 0
    done.leave_out(alive[copies], EXACT)
    if rules.duplicates != "exact":
        rows = done.kept
        thumbnails = facts["thumbnail"][rows]
        pairs = _near(facts["hash"][rows], thumbnails, thumbnails, rules, mapper)
        _leave_out_pairs(rows, pairs, pixels, NEAR, done)
    if features is not None:
        rows = done.kept
        known = rows[np.abs(features[rows]).max(1, initial=0) > 0]
        search = FeatureSearch(features[known], rules.similarity)
        pairs = np.concatenate([np.zeros((0, 3)), *mapper(search, _ranges(len(known)))])
        _leave_out_pairs(known, pairs, pixels, LIKE, done)
    return done


@dataclasses.dataclass(frozen=True)
class FeatureSearch:
    """`near_duplicates.similar_features` of some rows, for an engine."""

    features: np.ndarray
    least: float

    def __call__(self, rows: range) -> np.ndarray:
        return near_duplicates.similar_features(self.features, rows, self.least)


def _filter(facts: dict[str, np.ndarray], rules: schema.Curate, done: Decisions) -> None:
    short = np.minimum(facts["height"], facts["width"])
    long = np.maximum(facts["height"], facts["width"])
    if rules.min_side:
        done.leave_out(np.flatnonzero(short < rules.min_side), SMALL)
    if rules.max_aspect:
        done.leave_out(np.flatnonzero(long > rules.max_aspect * short), ASPECT)
    words = facts["words"]
    if rules.min_words:
        done.leave_out(np.flatnonzero(words < rules.min_words), CAPTION)
    if rules.max_words:
        done.leave_out(np.flatnonzero(words > rules.max_words), CAPTION)


def _near(
    hashes: np.ndarray,
    found: np.ndarray,
    asked: np.ndarray,
    rules: schema.Curate,
    mapper: Mapper,
) -> np.ndarray:
    finder = near_duplicates.NearFinder(
        hashes,
        found,
        asked,
        found is asked,
        rules.distance,
        rules.difference,
        crops=rules.duplicates == "crops",
    )
    return np.concatenate([np.zeros((0, 7)), *mapper(finder, _ranges(len(asked)))])


def _ranges(count: int, size: int = 256) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _leave_out_evaluation(
    facts: dict[str, np.ndarray],
    evaluation: EvaluationSet,
    number: int,
    rules: schema.Curate,
    mapper: Mapper,
    done: Decisions,
) -> None:
    """Leaves out the copies of evaluation images, their crops, and images of which they are
    crops; with duplicates=exact or none only equal files."""
    rows, usable = done.kept, np.flatnonzero(evaluation.facts["reason"] < 0)
    contents = {bytes(evaluation.facts["content"][i]): i for i in usable.tolist()}
    equal = [(row, contents.get(bytes(facts["content"][row]), -1), 0.0) for row in rows.tolist()]
    matches = [match for match in equal if match[1] >= 0]
    if rules.duplicates in ("near", "crops") and rows.size and usable.size:
        own, others = facts["thumbnail"][rows], evaluation.facts["thumbnail"][usable]
        hashes = evaluation.facts["hash"][usable]
        for pair in _near(hashes, others, own, rules, mapper).tolist():
            matches.append((rows[int(pair[0])], usable[int(pair[1])], pair[2]))
        for pair in _near(facts["hash"][rows], own, others, rules, mapper).tolist():
            matches.append((rows[int(pair[1])], usable[int(pair[0])], pair[2]))
    for row, image, difference in sorted(matches, key=lambda match: -match[2]):  # the nearest last
        done.of[row], done.evaluation[row], done.difference[row] = image, number, difference
    done.leave_out(np.array([match[0] for match in matches], np.int64), EVALUATION)


def _leave_out_pairs(
    rows: np.ndarray, pairs: np.ndarray, pixels: np.ndarray, reason: str, done: Decisions
) -> None:
    rank = np.lexsort((np.arange(len(rows)), -pixels[rows])).tolist()
    chosen = near_duplicates.choose_best(len(rows), pairs, rank)
    values: dict[tuple[int, int], float] = {}
    for a, b, value, *_ in pairs.tolist():
        for pair in ((int(a), int(b)), (int(b), int(a))):
            values[pair] = min(value, values.get(pair, np.inf))
    out = np.flatnonzero(chosen >= 0)
    done.of[rows[out]] = rows[chosen[out]]
    done.difference[rows[out]] = [values[i, int(chosen[i])] for i in out.tolist()]
    done.leave_out(rows[out], reason)
