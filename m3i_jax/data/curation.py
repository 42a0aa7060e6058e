"""Decides which records of a source are worth training on: describes each by a pure function of its
bytes, then filters, looks for evaluation images, and chooses one of several copies.

A description takes 3.1 KB a record, and a comparison three of them: all descriptions, those that
are compared, and the file of these that the processes share (`engines`)."""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from m3i_jax import schema
from m3i_jax.data import copy_check, decode, image_quality, near_duplicates, perceptual_hash
from m3i_jax.data.sources import base
from m3i_jax.data.sources.base import DataSource
from m3i_jax.errors import UserError

VERSION = 2  # of the descriptions
CHUNK = 1024  # records of one description file
KEPT = ""
SMALL, ASPECT, CAPTION = "below min_side", "aspect ratio", "caption length"
BLURRED, PLAIN, SCORE = "below min_sharpness", "below min_entropy", "below a score of least"
EVALUATION, EXACT, NEAR, LIKE = (
    "in an evaluation set",
    "equal file",
    "copy or crop",
    "like features",
)
FILTERS = (SMALL, ASPECT, CAPTION, BLURRED, PLAIN, SCORE)
REASONS = (*decode.REASONS, *FILTERS, EVALUATION, EXACT, NEAR, LIKE)
EXACT_FEATURES = 50_000  # images up to which curate.neighbours=auto compares all
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
        the file), "hash" uint64 (perceptual), "sharpness" and "entropy" float32 (`image_quality`)
        and "thumbnail" uint8 [n, 32, 32, 3]."""
        rows = range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(self.source)))
        facts: dict[str, list[Any]] = collections.defaultdict(list)
        for start in range(0, len(rows), 64):
            few = list(rows[start : start + 64])
            for record in decode.read_records(self.source, few, self.missing):
                for name, value in self._describe(record).items():
                    facts[name].append(value)
        kinds: dict[str, Any] = {"reason": np.int8, "content": np.uint8, "thumbnail": np.uint8}
        kinds |= {"hash": np.uint64, "sharpness": np.float32, "entropy": np.float32}
        return {name: np.array(facts[name], kinds.get(name, np.int32)) for name in facts}

    def _describe(self, record: base.Record | decode.BadRecord) -> dict[str, Any]:
        facts: dict[str, Any] = {"reason": -1, "height": 0, "width": 0, "words": -1}
        facts |= {"hash": 0, "sharpness": 0.0, "entropy": 0.0}
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
            gray = image_quality.small_gray(small)
            facts["sharpness"] = image_quality.sharpness(gray)
            facts["entropy"] = image_quality.entropy(gray)
        except decode.BadRecord as error:
            facts["reason"] = decode.REASONS.index(error.reason)
        return facts


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """A set of which no copy may be trained on: its name, descriptions, and the records, to compare
    copies at a higher resolution."""

    name: str
    facts: dict[str, np.ndarray]
    source: DataSource | None = None


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
    scores: dict[str, np.ndarray] | None = None,
    source: DataSource | None = None,
    background: int = 255,
) -> Decisions:
    """Decides which records are kept. The first reason that applies is given, in the order of
    REASONS; of several copies the one with the most pixels stays, then the first.

    Args:
        facts: see `RecordDescriber`.
        rules: settings.
        mapper: (function, items) -> results in order; see `engines.map_items`.
        evaluation: sets to compare with.
        features: float32 [n, D] of norm 1, rows of zeros where unknown; None for none.
        scores: columns of numbers of the records, NaN where unknown, for `rules.least`.
        source: of the records, to compare copies at a higher resolution (`rules.detail`); None not
            to.
        background: gray level 0..255 under transparent pixels of what is compared, as in `facts`.

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
    _filter(facts, scores or {}, rules, done)
    check = functools.partial(_check, rules=rules, mapper=mapper, background=background)
    for number, each in enumerate(evaluation):
        _leave_out_evaluation(facts, each, number, rules, mapper, done, source, check)
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
        crops = rules.duplicates == "crops"
        pairs = _near(facts["hash"][rows], thumbnails, thumbnails, rules, mapper, crops=crops)
        pairs = check(pairs, source, rows, source, rows)
        _leave_out_pairs(rows, pairs, pixels, NEAR, done)
    if features is not None:
        rows = done.kept
        known = rows[np.abs(features[rows]).max(1, initial=0) > 0]
        if not needs_faiss(rules, len(known)):
            search = FeatureSearch(features[known], rules.similarity)
            pairs = np.concatenate([np.zeros((0, 3)), *mapper(search, _ranges(len(known)))])
        else:
            pairs = near_duplicates.approximate_features(features[known], rules.similarity)
        _leave_out_pairs(known, pairs, pixels, LIKE, done)
    return done


def needs_faiss(rules: schema.Curate, count: int) -> bool:
    """Returns whether like features of so many images are searched for by faiss.

    >>> needs_faiss(schema.Curate(), 50_000), needs_faiss(schema.Curate(), 50_001)
    (False, True)
    """
    many = rules.neighbours == "auto" and count > EXACT_FEATURES
    return many or rules.neighbours == "approximate"


@dataclasses.dataclass(frozen=True)
class FeatureSearch:
    """`near_duplicates.similar_features` of some rows, for an engine."""

    features: np.ndarray
    least: float

    def __call__(self, rows: range) -> np.ndarray:
        return near_duplicates.similar_features(self.features, rows, self.least)


def _filter(
    facts: dict[str, np.ndarray],
    scores: dict[str, np.ndarray],
    rules: schema.Curate,
    done: Decisions,
) -> None:
    """Leaves out by single records: by what was measured, and by `scores` for `rules.least`
    alone."""
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
    if rules.min_sharpness:
        done.leave_out(np.flatnonzero(facts["sharpness"] < rules.min_sharpness), BLURRED)
    if rules.min_entropy:
        done.leave_out(np.flatnonzero(facts["entropy"] < rules.min_entropy), PLAIN)
    for name, least in least_scores(rules).items():
        done.leave_out(np.flatnonzero(~(scores[name] >= least)), SCORE)


def least_scores(rules: schema.Curate) -> dict[str, float]:
    """Returns `curate.least` as numbers.

    Raises:
        UserError: an entry is not COLUMN=NUMBER.

    >>> least_scores(schema.Curate(least=("similarity=0.28",)))
    {'similarity': 0.28}
    """
    limits = {}
    for text in rules.least:
        name, _, number = text.rpartition("=")
        try:
            limits[name] = float(number)
        except ValueError:
            limits[name] = np.nan
        if not name or not np.isfinite(limits[name]):
            raise UserError(
                f"curate.least={text[:60]!r}: is not COLUMN=NUMBER, such as similarity=0.28"
            )
    return limits


def _near(
    hashes: np.ndarray,
    found: np.ndarray,
    asked: np.ndarray,
    rules: schema.Curate,
    mapper: Mapper,
    *,
    crops: bool,
) -> np.ndarray:
    finder = near_duplicates.NearFinder(
        hashes,
        found,
        asked,
        found is asked,
        rules.distance,
        rules.difference,
        crops=crops,
    )
    return np.concatenate([np.zeros((0, 7)), *mapper(finder, _ranges(len(asked)))])


@dataclasses.dataclass(frozen=True)
class CopyChecker:
    """Compares pairs of `near_duplicates.NearFinder` at a higher resolution: a pure function of
    some pairs, for an engine."""

    asked: DataSource  # the images of which a region may be shown
    found: DataSource
    background: int = 255

    def __call__(self, pairs: np.ndarray) -> list[float]:
        """Returns `copy_check.detail_difference` of each pair (image, image, difference, region);
        infinity where one of the two cannot be read."""
        images: dict[tuple[int, int], Any] = {}
        for side, source in enumerate((self.asked, self.found)):
            numbers = sorted(set(pairs[:, side].astype(int).tolist()))
            for start in range(0, len(numbers), 64):
                few = numbers[start : start + 64]
                for number, record in zip(
                    few, decode.read_records(source, few, "replace"), strict=True
                ):
                    images[side, number] = self._image(record)
        results = []
        for a, b, _, *region in pairs.tolist():
            whole, part = images[0, int(a)], images[1, int(b)]
            known = whole is not None and part is not None
            results.append(
                copy_check.detail_difference(whole, tuple(region), part) if known else np.inf
            )
        return results

    def _image(self, record: base.Record | decode.BadRecord) -> Any:
        if isinstance(record, decode.BadRecord):
            return None
        try:
            least = (4.0 * copy_check.SIDE,) * 2
            return decode.open_image(record.image).rgb(background=self.background, least=least)
        except decode.BadRecord:
            return None


def _check(
    pairs: np.ndarray,
    asked: DataSource | None,
    asked_rows: np.ndarray,
    found: DataSource | None,
    found_rows: np.ndarray,
    *,
    rules: schema.Curate,
    mapper: Mapper,
    background: int,
) -> np.ndarray:
    """Returns the pairs that are copies also at a higher resolution."""
    if not rules.detail or asked is None or found is None or not len(pairs):
        return pairs
    numbered = pairs.copy()
    numbered[:, 0] = asked_rows[pairs[:, 0].astype(int)]
    numbered[:, 1] = found_rows[pairs[:, 1].astype(int)]
    parts = [numbered[rows.start : rows.stop] for rows in _ranges(len(pairs))]
    differences = np.concatenate([*mapper(CopyChecker(asked, found, background), parts)])
    return pairs[differences <= rules.detail]


def _ranges(count: int, size: int = 256) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _leave_out_evaluation(
    facts: dict[str, np.ndarray],
    evaluation: EvaluationSet,
    number: int,
    rules: schema.Curate,
    mapper: Mapper,
    done: Decisions,
    source: DataSource | None,
    check: Callable[..., np.ndarray],
) -> None:
    """Leaves out the copies of evaluation images, their crops, and images of which they are crops,
    whatever copies among the records themselves `curate.duplicates` leaves out."""
    rows, usable = done.kept, np.flatnonzero(evaluation.facts["reason"] < 0)
    contents = {bytes(evaluation.facts["content"][i]): i for i in usable.tolist()}
    equal = [(row, contents.get(bytes(facts["content"][row]), -1), 0.0) for row in rows.tolist()]
    matches = [match for match in equal if match[1] >= 0]
    if rows.size and usable.size:
        own, others = facts["thumbnail"][rows], evaluation.facts["thumbnail"][usable]
        hashes = evaluation.facts["hash"][usable]
        pairs = _near(hashes, others, own, rules, mapper, crops=True)
        pairs = check(pairs, source, rows, evaluation.source, usable)
        for pair in pairs.tolist():
            matches.append((rows[int(pair[0])], usable[int(pair[1])], pair[2]))
        pairs = _near(facts["hash"][rows], own, others, rules, mapper, crops=True)
        pairs = check(pairs, evaluation.source, usable, source, rows)
        for pair in pairs.tolist():
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
