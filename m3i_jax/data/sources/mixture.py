"""Joins several sources into one, each with its share of the samples: M3I mixes 427 million
captioned and 15 million labelled images in one stage.

A sample has what its source has: a label, a caption, both or neither. The source and the record at
a position of the stream are a closed form of it (`sampler.sample_mixture_index`)."""

import dataclasses
import fractions
import logging
import math
import os
from collections.abc import Callable, Sequence

import numpy as np

from m3i_jax import schema
from m3i_jax.data import sampler
from m3i_jax.data.sources import base, class_names, registry
from m3i_jax.data.sources.base import DataSource, Record
from m3i_jax.data.sources.captions import source_caption, source_captions
from m3i_jax.data.sources.objects import ObjectTable
from m3i_jax.data.sources.relabelled import relabel_record
from m3i_jax.errors import UserError

CYCLE_LIMIT = 1 << 40  # samples after which the shares are exact
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class MixtureEntry:
    """One entry of `data.mixture`. A weight of None is in proportion to the number of images."""

    kind: str
    path: str
    split: str = ""
    held_out: str = ""
    weight: fractions.Fraction | None = None


def parse_entry(text: str) -> MixtureEntry:
    """Parses `KIND:PATH[@SPLIT[|HELD_OUT]][=WEIGHT]`.

    Raises:
        UserError: the kind of source is unknown, the weight is not positive, or the path is missing
            and the kind needs one (`SourceKind.path`).

    >>> parse_entry("tars:/a/*.tar=427").weight, parse_entry("tfds:food101=size").weight
    (Fraction(427, 1), None)
    >>> parse_entry("folder:/b@train|val").held_out
    'val'
    """
    refusal = (
        f"data.mixture: {text!r} is not KIND:PATH, KIND:PATH=WEIGHT or"
        " KIND:PATH@SPLIT|HELD_OUT=WEIGHT"
    )
    kind, colon, rest = text.strip().partition(":")
    if kind not in registry.source_names() or not colon:
        raise UserError(f"{refusal}: the kind must be one of {', '.join(registry.source_names())}")
    path, equals, number = rest.rpartition("=")
    weight = None
    if not equals or "/" in number:  # the equal sign is part of the path, as in /data/date=7/x
        path = rest
    elif number != "size":
        try:
            weight = fractions.Fraction(number)
        except (ValueError, ZeroDivisionError):
            raise UserError(
                f"{refusal}: the weight {number!r} must be a positive number, or 'size' for the"
                " number of images"
            ) from None
        if weight <= 0:
            raise UserError(
                f"{refusal}: the weight {number!r} must be positive; remove the entry to leave"
                " the source out"
            )
    directory, split, held_out = _split_of_path(kind, path)
    if not directory and (needed := registry.source_kind(kind).path):
        raise UserError(f"{refusal}: the path is missing; give {needed}")
    return MixtureEntry(kind, directory, split, held_out, weight)


def _split_of_path(kind: str, path: str) -> tuple[str, str, str]:
    """Returns (path, split, held-out split) of PATH[@SPLIT[|HELD_OUT]]. With a slash behind it, @
    may be part of the path: it names a split if two are given, if a directory lies before it and
    nothing at the whole, or of a kind whose splits are files of annotations.

    >>> _split_of_path("tars", "/d@train/*.tar|val/*.tar")
    ('/d', 'train/*.tar', 'val/*.tar')
    >>> _split_of_path("tars", "gs://me@b/*.tar"), _split_of_path("coco", "/d@a/train.json")
    (('gs://me@b/*.tar', '', ''), ('/d', 'a/train.json', ''))
    """
    directory, at, split = path.rpartition("@")
    if at and "/" in split and "|" not in split:
        annotated = "annotations" in registry.source_kind(kind).reads
        before, whole = os.path.expanduser(directory), os.path.expanduser(path)
        if os.path.exists(whole) or not (annotated or os.path.isdir(before)):
            at = ""
    if not at:
        return path, "", ""
    train, _, held_out = split.partition("|")
    return directory, train, held_out


def mixture_entries(data: schema.Data) -> list[MixtureEntry]:
    """Returns the sources that the configuration names: those of the mixture, or the single one.

    Raises:
        UserError: `parse_entry` refuses an entry, the mixture is empty, or `data.mixture` is given
            and `data.source` is not "mixture".

    >>> mixture_entries(schema.Data(source="folder", path="/b", holdout_split="val"))
    [MixtureEntry(kind='folder', path='/b', split='', held_out='val', weight=None)]
    """
    if data.source != "mixture":
        if data.mixture:
            raise UserError(
                f"data.mixture is given and data.source={data.source!r} does not read it: "
                "set data.source='mixture', or data.mixture= to nothing"
            )
        split, held_out = data.split, data.holdout_split
        if "annotations" in registry.source_kind(data.source).reads:
            split, held_out = data.annotations, data.holdout_annotations
        return [MixtureEntry(data.source, data.path, split, held_out)]
    if not data.mixture:
        raise UserError(
            "data.source='mixture' needs data.mixture, which is empty: give entries such as"
            " ('tars:/a/*.tar=427', 'folder:/b=15')"
        )
    return [parse_entry(text) for text in data.mixture]


def unread(data: schema.Data, *, counted: bool) -> dict[str, str]:
    """Returns the settings that have no effect with the configured source, and why.

    Args:
        data: the settings.
        counted: the mode opens the source and counts its images, so that `data.size` is their
            number.

    >>> sorted(unread(schema.Data(source="folder"), counted=True))
    ['data.annotations', 'data.class_space', 'data.directory', 'data.holdout_annotations',
    'data.map_unlabelled', 'data.size']
    >>> mixed = schema.Data(source="mixture", mixture=("shapes:9", "tfds:food101"))
    >>> sorted(unread(mixed, counted=False))
    ['data.annotations', 'data.holdout_annotations', 'data.holdout_split', 'data.map_unlabelled',
    'data.path', 'data.split']
    """
    mixed = data.source == "mixture"
    names = [text.strip().partition(":")[0] for text in data.mixture] if mixed else [data.source]
    # `parse_entry` refuses an unknown kind with a better message
    kinds = [registry.source_kind(name) for name in names if name in registry.source_names()]
    read = {setting for kind in kinds for setting in kind.reads}
    reasons: dict[str, str] = {}
    if mixed:
        for name in ("path", "split", "holdout_split"):
            reasons[f"data.{name}"] = (
                "data.source='mixture' reads data.mixture alone; set data.source as well, and"
                " data.mixture= to nothing"
            )
    else:
        reasons["data.class_space"] = (
            f"data.source={data.source!r} is a single source, and only a mixture reads it"
        )
    if "annotations" not in read:
        for name in ("annotations", "holdout_annotations"):
            reasons[f"data.{name}"] = "no source has a file of annotations"
    elif not mixed:
        for name in ("split", "holdout_split"):
            reasons[f"data.{name}"] = (
                f"data.source={data.source!r} is split by its files of annotations:"
                " data.annotations and data.holdout_annotations"
            )
    if "directory" not in read:
        reasons["data.directory"] = "no source is of TFDS; use data.path"
    if "class_names" not in read:
        reasons["data.class_names"] = "the source names its classes itself"
    if "map_unlabelled" not in read:
        reasons["data.map_unlabelled"] = "no source reads files of class maps"
    if counted and "size" not in read:
        reasons["data.size"] = (
            "the images of a source are counted; evaluate.train_limit and evaluate.query_limit take"
            " fewer"
        )
    # a training may have both, as a recipe and a split
    for name in ("holdout_split", "holdout_annotations"):
        if (held_out := getattr(data, name)) and counted and f"data.{name}" not in reasons:
            reasons["data.holdout"] = f"data.{name}={held_out!r} names the held-out part"
    return reasons


def join_sources(
    data: schema.Data, entries: Sequence[MixtureEntry], sources: Sequence[DataSource]
) -> DataSource:
    """Joins the opened sources of `mixture_entries`: their mixture, or the single source.

    >>> join_sources(schema.Data(), mixture_entries(schema.Data()), ["the source"])
    'the source'
    """
    if data.source != "mixture":
        return sources[0]
    weights = [entry.weight for entry in entries]
    return Mixture(sources, weights, shared=data.class_space == "shared")


def warn_shared_numbers(data: schema.Data, sources: Sequence[DataSource]) -> None:
    """Warns where sources of a mixture share classes that have no names but their numbers: those of
    two label sets, such as of ImageNet and of food, would be one class each.

    >>> warn_shared_numbers(schema.Data(), [])
    """
    if data.source != "mixture" or data.class_space != "shared":
        return
    numbered = [source for source in sources if class_names.are_numbers(source.classes)]
    if len(numbered) > 1:
        listed = ", ".join(f"{len(s.classes):,} of {s.name}" for s in numbered)
        _log.warning(
            "classes of %d sources of data.mixture are numbers without names (%s), and"
            " data.class_space='shared' makes equal numbers one class: if they number different"
            " labels, set data.class_space=separate; if the same, data.class_names=FILE names them"
            " and ends this warning",
            len(numbered),
            listed,
        )


def integer_shares(
    weights: Sequence[fractions.Fraction | None], sizes: Sequence[int]
) -> tuple[int, ...]:
    """Scales weights to the smallest whole numbers of the same proportions. Without weights, scales
    the sizes.

    Raises:
        UserError: only some sources have a weight, or the whole numbers are too large.

    >>> F = fractions.Fraction
    >>> integer_shares([F("0.7"), F("0.3")], [5, 5]), integer_shares([None, None], [300, 100])
    ((7, 3), (3, 1))
    """
    given = [w for w in weights if w is not None]
    if given and len(given) < len(weights):
        raise UserError(
            "data.mixture: some sources have a weight and some have none: give all of them one, or"
            " none of them for shares by size"
        )
    exact = given or [fractions.Fraction(size) for size in sizes]
    scale = math.lcm(*(w.denominator for w in exact))
    parts = [int(w * scale) for w in exact]
    parts = [part // (math.gcd(*parts) or 1) for part in parts]
    if sum(parts) > CYCLE_LIMIT:
        raise UserError(
            f"data.mixture: the weights {', '.join(map(str, given))} have too many digits to be"
            " mixed exactly: round them"
        )
    return tuple(parts)


class Mixture:
    """A weighted mixture of sources, itself a source: the records of the first source come first,
    then those of the second, and so on.

    Args:
        sources: to mix.
        weights: share of the samples of each source; all None for shares by size, that of an epoch.
        shared: classes of the same WordNet id, or of the same name where a source has no ids, are
            one class; else the classes of the sources are concatenated.

    Raises:
        UserError: only some sources have a weight.

    >>> class Few:
    ...     name, captions = "few", False
    ...     def __init__(self, *classes): self.classes = classes
    ...     def __len__(self): return len(self.classes)
    ...     def __getitem__(self, i): return Record(str(i), b"", i)
    >>> both = Mixture([Few("cat", "dog"), Few("dog", "bee")], [None, None])
    >>> both.classes, [both[i].label for i in range(4)]
    (('cat', 'dog', 'bee'), [0, 1, 1, 2])
    >>> Mixture([Few("cat", "dog"), Few("dog", "bee")], [None, None], shared=False).classes
    ('cat', 'dog', 'dog', 'bee')
    >>> Mixture([Few("cat", "dog"), Few("dog")], [fractions.Fraction(1)] * 2).epochs(8)
    [2.0, 4.0]
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        weights: Sequence[fractions.Fraction | None],
        *,
        shared: bool = True,
    ) -> None:
        self.sources, self.weights, self.shared = list(sources), list(weights), shared
        self.sizes = [len(source) for source in sources]
        self._epoch_sizes = [sampler.epoch_size(source) for source in sources]
        self.shares = integer_shares(weights, self._epoch_sizes)
        self.epoch_size = sum(self._epoch_sizes)  # see `sampler.epoch_size`
        self._ends = np.cumsum(self.sizes)
        self.classes, self._tables = class_names.join_classes(
            [source.classes for source in sources],
            [getattr(source, "class_ids", ()) for source in sources],
            shared,
        )
        self.captions = any(source.captions for source in sources)
        self.name = "mixture of " + " and ".join(source.name for source in sources)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        number, local_index = self._locate_index(index)
        return self._own_record(self.sources[number][local_index], number)

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        index_array = np.asarray(indices, np.int64)
        numbers = np.searchsorted(self._ends, index_array, side="right")
        records: dict[int, Record] = {}
        for number in np.unique(numbers).tolist():
            rows = np.flatnonzero(numbers == number)
            local_indices = (index_array[rows] - self._start(number)).tolist()
            for row, record in zip(
                rows.tolist(), base.read_items(self.sources[number], local_indices), strict=True
            ):
                records[row] = self._own_record(record, number)
        return [records[row] for row in range(len(index_array))]

    def key(self, index: int) -> str:
        number, local_index = self._locate_index(index)
        return base.source_key(self.sources[number], local_index)

    def key_hashes(self) -> np.ndarray:
        return np.concatenate([base.source_key_hashes(source) for source in self.sources])

    def caption(self, index: int) -> str | bytes | None:
        number, local_index = self._locate_index(index)
        source = self.sources[number]
        return source_caption(source, local_index) if source.captions else None

    def caption_list(self, index: int) -> tuple[str | bytes, ...]:
        number, local_index = self._locate_index(index)
        source = self.sources[number]
        return source_captions(source, local_index) if source.captions else ()

    def object_table(self) -> ObjectTable | None:
        """Returns the objects of all sources, with the classes of the mixture; None unless every
        source annotates objects."""
        tables = [base.object_table(source) for source in self.sources]
        known = [
            table.relabel(names)
            for table, names in zip(tables, self._tables, strict=True)
            if table is not None
        ]
        if len(known) < len(tables):
            return None
        starts = (self._ends - self.sizes).tolist()
        masked = [t.masked for t in known if t.masked is not None]
        return ObjectTable(
            np.concatenate([t.records + start for t, start in zip(known, starts, strict=True)]),
            np.concatenate([t.classes for t in known]),
            np.concatenate([t.crowd for t in known]),
            np.concatenate(masked) if len(masked) == len(known) else None,
        )

    def locate(self, seed: int, positions: np.ndarray, attempt: int = 0) -> np.ndarray:
        """Returns the record at each position of the stream, int64 [R]; see
        `sampler.sample_mixture_index`.

        Raises:
            UserError: a source with a share of the samples has no images.
        """
        for source, share in zip(self.sources, self.shares, strict=True):
            if share and not len(source):
                raise UserError(
                    f"data.mixture: {source.name} has no images to give its share of: leave it out,"
                    " or hold less out"
                )
        numbers, records = sampler.sample_mixture_index(
            seed,
            positions,
            self.sizes,
            self.shares,
            attempt,
            [getattr(source, "cumulative_weights", None) for source in self.sources],
        )
        return records + (self._ends - self.sizes)[numbers]

    def part(self, holdout: float, part: str) -> "Mixture":
        """Returns the mixture of one part of each source; see `base.split_by_hash`."""
        return self.of_parts(lambda source: base.split_by_hash(source, holdout, part))

    def of_parts(self, part: Callable[[DataSource], DataSource]) -> "Mixture":
        """Returns the mixture of a part of each source, with the same weights; shares by size are
        those of the parts."""
        parts = [part(source) for source in self.sources]
        return Mixture(parts, self.weights, shared=self.shared)

    def fingerprint(self) -> str:
        return base.stable_digest(
            "mixture",
            *self.shares,
            *self.classes,
            *(source.fingerprint() for source in self.sources),
        )

    def identity(self) -> list[str]:
        """Describes each source in one line, so that a diff shows how two mixtures differ."""
        total = sum(self.shares)
        return [
            f"{share} of every {total:,} samples from {base.source_identity(source)[0]}"
            for share, source in zip(self.shares, self.sources, strict=True)
        ]

    def epochs(self, samples: int) -> list[float]:
        """Returns the number of epochs of each source in so many samples."""
        total = max(sum(self.shares), 1)
        return [
            samples * share / total / max(size, 1)
            for share, size in zip(self.shares, self._epoch_sizes, strict=True)
        ]

    def description(self) -> str:
        total = max(sum(self.shares), 1)
        parts = [
            f"{share / total:.2%} of the samples ({epochs:.3g} epochs in one pass)"
            f" from {source.description()}"
            for source, share, epochs in zip(
                self.sources, self.shares, self.epochs(self.epoch_size), strict=True
            )
        ]
        count = sum(len(source.classes) for source in self.sources)
        numbered = sum(class_names.are_numbers(source.classes) for source in self.sources) > 1
        shared = (
            f" ({count - len(self.classes):,} of them shared by {'number' if numbered else 'name'})"
            if count > len(self.classes)
            else ""
        )
        classes = f", {len(self.classes):,} classes{shared}" if count else ""
        return (
            f"{len(self):,} images in a mixture of {len(self.sources)} sources{classes}: "
            + "; ".join(parts)
        )

    def _own_record(self, record: Record, number: int) -> Record:
        """A record of source `number` with the classes of the mixture, and without the id of the
        image in its file: another file may have the same, and evaluation knows images by it."""
        if record.objects is not None:
            objects = dataclasses.replace(record.objects, image=-1)
            record = dataclasses.replace(record, objects=objects)
        return relabel_record(record, self._tables[number])

    def _locate_index(self, index: int) -> tuple[int, int]:
        """Returns (number of the source, index of the record in it)."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, int(index) - self._start(number)

    def _start(self, number: int) -> int:
        return int(self._ends[number]) - self.sizes[number]
