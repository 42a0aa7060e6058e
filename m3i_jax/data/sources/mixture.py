"""Several sources as one, each with its share of the samples: M3I's 427 million captioned and 15
million labelled images in one stage.

A sample has what its source has: a category, a caption, both or neither. Which source and which
record stand at a position of the stream is closed arithmetic (`sampler.sample_mixture_index`), like
everything else in the order."""

import dataclasses
import fractions
import math
from collections.abc import Sequence

import numpy as np

from m3i_jax import schema
from m3i_jax.data import sampler
from m3i_jax.data.sources import base, registry
from m3i_jax.data.sources.base import DataSource, Record
from m3i_jax.errors import UserError

CYCLE_LIMIT = 1 << 40  # samples until the shares are exact


@dataclasses.dataclass(frozen=True, slots=True)
class MixtureEntry:
    """One line of `data.mixture`. `weight` None: in proportion to the number of images."""

    kind: str
    path: str
    split: str = ""
    held_out: str = ""
    weight: fractions.Fraction | None = None


def parse_entry(text: str) -> MixtureEntry:
    """Reads `KIND:PATH[@SPLIT[|HELD_OUT]][=WEIGHT]`.

    Raises:
        UserError: no such kind of source, no path, or a weight that is not positive.

    >>> parse_entry("tars:/a/*.tar=427").weight, parse_entry("folder:/b@train|val").held_out, parse_entry("tfds:food101=size").weight
    (Fraction(427, 1), 'val', None)
    """
    wrong = (
        f"data.mixture: {text!r} is not KIND:PATH, KIND:PATH=WEIGHT or"
        " KIND:PATH@SPLIT|HELD_OUT=WEIGHT"
    )
    kind, colon, rest = text.strip().partition(":")
    if kind not in registry.source_names() or not colon:
        raise UserError(f"{wrong}: the kind must be one of {', '.join(registry.source_names())}")
    path, equals, number = rest.rpartition("=")
    weight = None
    if not equals or "/" in number:  # an equal sign inside the path, as in /data/date=7/x
        path = rest
    elif number != "size":
        try:
            weight = fractions.Fraction(number)
        except (ValueError, ZeroDivisionError):
            raise UserError(
                f"{wrong}: the weight {number!r} must be a positive number, or 'size' for the"
                " number of images"
            ) from None
        if weight <= 0:
            raise UserError(
                f"{wrong}: the weight {number!r} must be positive; leave the source out to give it"
                " none"
            )
    before, at, split = path.rpartition("@")
    if not at or "/" in split:
        before, split = path, ""
    split, _, held_out = split.partition("|")
    if not before:
        raise UserError(f"{wrong}: the path is missing")
    return MixtureEntry(kind, before, split, held_out, weight)


def mixture_entries(data: schema.Data) -> list[MixtureEntry]:
    """The sources that the configuration names: those of the mixture, or the one there is.

    Raises: UserError: an entry that `parse_entry` refuses, a mixture of nothing, or one beside
        another source, which would not read it.

    >>> mixture_entries(schema.Data(source="folder", path="/b", holdout_split="val"))
    [Entry(kind='folder', path='/b', split='', held_out='val', weight=None)]
    """
    if data.source != "mixture":
        if data.mixture:
            raise UserError(
                f"data.mixture is given and data.source={data.source!r} does not read it: "
                "set data.source='mixture', or data.mixture= to nothing"
            )
        return [MixtureEntry(data.source, data.path, data.split, data.holdout_split)]
    if not data.mixture:
        raise UserError(
            "data.source='mixture' mixes nothing: give data.mixture, such as ('tars:/a/*.tar=427',"
            " 'folder:/b=15')"
        )
    return [parse_entry(text) for text in data.mixture]


def unread(data: schema.Data, *, counted: bool) -> dict[str, str]:
    """Settings that do nothing with this kind of source, and why.

    Args: data: the settings. counted: the mode takes the settings of a run, opens the source and
        counts its images, so that `data.size` is what it has.

    >>> sorted(unread(schema.Data(source="folder"), counted=True))
    ['data.class_space', 'data.directory', 'data.size']
    >>> sorted(unread(schema.Data(source="mixture", mixture=("shapes:9", "tfds:food101")), counted=False))
    ['data.holdout_split', 'data.path', 'data.split']
    """
    mixed = data.source == "mixture"
    kinds = {text.strip().partition(":")[0] for text in data.mixture} if mixed else {data.source}
    out: dict[str, str] = {}
    if mixed:
        for name in ("path", "split", "holdout_split"):
            out[f"data.{name}"] = (
                "data.source='mixture' reads data.mixture alone; set data.source as well, and"
                " data.mixture= to nothing"
            )
    else:
        out["data.class_space"] = f"data.source={data.source!r} is one source; it is of mixtures"
    if "tfds" not in kinds:
        out["data.directory"] = "no source is of TFDS; use data.path"
    if kinds == {"shapes"}:
        out["data.class_names"] = "the built-in shapes have names of their own"
    elif counted and "shapes" not in kinds:
        out["data.size"] = (
            "the images of a source are counted; evaluate.train_limit and evaluate.query_limit take"
            " fewer"
        )
    # to give both to a training is usual, as a recipe and a split
    if data.holdout_split and counted:
        out["data.holdout"] = f"data.holdout_split={data.holdout_split!r} is what is held out"
    return out


def join_sources(
    data: schema.Data, entries: Sequence[MixtureEntry], opened: Sequence[DataSource]
) -> DataSource:
    """What was opened for each of the `mixture_entries` as one source: their mixture, or the one
    there is.

    >>> join_sources(schema.Data(), mixture_entries(schema.Data()), ["the source"])
    'the source'
    """
    if data.source != "mixture":
        return opened[0]
    return Mixture(opened, [entry.weight for entry in entries], shared=data.class_space == "shared")


def integer_shares(
    weights: Sequence[fractions.Fraction | None], sizes: Sequence[int]
) -> tuple[int, ...]:
    """Weights as the smallest whole numbers of the same proportions; without weights, the sizes.

    Raises:
        UserError: some have a weight and some have none, or the numbers get too long.

    >>> F = fractions.Fraction
    >>> integer_shares([F("0.7"), F("0.3")], [5, 5]), integer_shares([None, None], [300, 100])
    ((7, 3), (3, 1))
    """
    given = [w for w in weights if w is not None]
    if given and len(given) < len(weights):
        raise UserError(
            "data.mixture: some sources have a weight and some have none: give one to all of them,"
            " or to none for their sizes"
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
    """Sources with weights, as one source: its records are those of the first source, then those of
    the second, and so on.

    Args: parts: the sources. weights: of the samples, one a source; all None: in proportion to
        their sizes. shared: classes of the same name are one class; else every source has its own,
        one behind the other.

    Raises:
        UserError: some sources have a weight and some have none.

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
        parts: Sequence[DataSource],
        weights: Sequence[fractions.Fraction | None],
        *,
        shared: bool = True,
    ) -> None:
        self.sources, self.weights, self.shared = list(parts), list(weights), shared
        self.sizes = [len(source) for source in parts]
        self.parts = integer_shares(weights, self.sizes)
        self._ends = np.cumsum(self.sizes)
        self.classes, self._tables = join_classes([source.classes for source in parts], shared)
        self.captions = any(source.captions for source in parts)
        self.name = "mixture of " + " and ".join(source.name for source in parts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        which, at = self._where(index)
        return relabel_record(self.sources[which][at], self._tables[which])

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        wanted = np.asarray(indices, np.int64)
        which = np.searchsorted(self._ends, wanted, side="right")
        got: dict[int, Record] = {}
        for number in np.unique(which).tolist():
            places = np.flatnonzero(which == number)
            found = base.read_items(
                self.sources[number], (wanted[places] - self._start(number)).tolist()
            )
            got.update(
                zip(
                    places.tolist(),
                    (relabel_record(record, self._tables[number]) for record in found),
                    strict=True,
                )
            )
        return [got[i] for i in range(len(wanted))]

    def key(self, index: int) -> str:
        which, at = self._where(index)
        return base.source_key(self.sources[which], at)

    def key_hashes(self) -> np.ndarray:
        return np.concatenate([base.source_key_hashes(source) for source in self.sources])

    def caption(self, index: int) -> str | bytes | None:
        which, at = self._where(index)
        return (
            base.source_caption(self.sources[which], at) if self.sources[which].captions else None
        )

    def locate(self, seed: int, positions: np.ndarray, attempt: int = 0) -> np.ndarray:
        """The record at each position of the stream, int64 [R]: see `sampler.sample_mixture_index`.

        Raises:
            UserError: a source that should give samples has no images.
        """
        for source, part in zip(self.sources, self.parts, strict=True):
            if part and not len(source):
                raise UserError(
                    f"data.mixture: {source.name} has no images to give its share of: leave it out,"
                    " or hold less out"
                )
        which, record = sampler.sample_mixture_index(
            seed, positions, self.sizes, self.parts, attempt
        )
        return record + (self._ends - self.sizes)[which]

    def part(self, holdout: float, part: str) -> "Mixture":
        """The mixture of one part of each source: see `base.split_by_hash`."""
        return Mixture(
            [base.split_by_hash(source, holdout, part) for source in self.sources],
            self.weights,
            shared=self.shared,
        )

    def fingerprint(self) -> str:
        return base.stable_digest(
            "mixture",
            *self.parts,
            *self.classes,
            *(source.fingerprint() for source in self.sources),
        )

    def identity(self) -> list[str]:
        """One line a source, for a person who has to find out what differs between two mixtures."""
        shares = zip(self.parts, self.sources, strict=True)
        return [
            f"{part} of every {sum(self.parts):,} samples from {base.source_identity(source)[0]}"
            for part, source in shares
        ]

    def epochs(self, samples: int) -> list[float]:
        """How often so many samples go through each source."""
        shares = zip(self.parts, self.sizes, strict=True)
        return [samples * part / max(sum(self.parts), 1) / max(size, 1) for part, size in shares]

    def description(self) -> str:
        parts = [
            f"{part / max(sum(self.parts), 1):.2%} of the samples ({epochs:.3g} epochs in one pass)"
            f" from {source.description()}"
            for source, part, epochs in zip(
                self.sources, self.parts, self.epochs(len(self)), strict=True
            )
        ]
        known = sum(len(source.classes) for source in self.sources)
        same = (
            f" ({known - len(self.classes):,} of them shared by name)"
            if known > len(self.classes)
            else ""
        )
        classes = f", {len(self.classes):,} classes{same}" if known else ""
        return (
            f"{len(self):,} images in a mixture of {len(self.sources)} sources{classes}: "
            + "; ".join(parts)
        )

    def _where(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        which = int(np.searchsorted(self._ends, index, side="right"))
        return which, int(index) - self._start(which)

    def _start(self, which: int) -> int:
        return int(self._ends[which]) - self.sizes[which]


class RelabelledSource:
    """A source whose categories are numbered as in another list of classes; those that are not in
    it become -1.

    >>> class Two:
    ...     name, classes, captions = "two", ("cat", "eel"), False
    ...     def __len__(self): return 2
    ...     def __getitem__(self, i): return Record(str(i), b"", i)
    >>> source = RelabelledSource(Two(), ("ant", "bee", "cat"))
    >>> [source[i].label for i in range(2)]
    [2, -1]
    """

    def __init__(self, source: DataSource, classes: Sequence[str]) -> None:
        number = {name: i for i, name in enumerate(classes)}
        self.source, self.name, self.captions, self.classes = (
            source,
            source.name,
            source.captions,
            tuple(classes),
        )
        self._table = np.array([number.get(name, -1) for name in source.classes], np.int32)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        return relabel_record(self.source[index], self._table)

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        return [
            relabel_record(record, self._table) for record in base.read_items(self.source, indices)
        ]

    def key(self, index: int) -> str:
        return base.source_key(self.source, index)

    def caption(self, index: int) -> str | bytes | None:
        return base.source_caption(self.source, index)

    def fingerprint(self) -> str:
        return base.stable_digest(self.source.fingerprint(), *self.classes)

    def description(self) -> str:
        return self.source.description()


def relabel_record(record: Record, table: np.ndarray) -> Record:
    """The record with its label looked up; what is not in the table becomes -1.

    >>> relabel_record(Record("a", b"", 1), np.array([5, 7])).label, relabel_record(Record("a", b"", 2), np.array([5, 7])).label
    (7, -1)
    """
    label = int(table[record.label]) if 0 <= record.label < len(table) else -1
    return (
        record if label == record.label else Record(record.key, record.image, label, record.caption)
    )


def join_classes(
    spaces: Sequence[Sequence[str]], shared: bool
) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """(all classes, for each source the number in them of each of its own), in the order in which
    they appear.

    >>> join_classes([("a", "b"), ("b", "c")], True)[0], join_classes([("a", "b"), ("b", "c")], False)[0]
    (('a', 'b', 'c'), ('a', 'b', 'b', 'c'))
    """
    tables, count = [], 0
    if not shared:
        for space in spaces:
            tables.append(np.arange(count, count + len(space), dtype=np.int32))
            count += len(space)
        return tuple(name for space in spaces for name in space), tables
    number: dict[str, int] = {}
    for space in spaces:
        tables.append(np.array([number.setdefault(name, len(number)) for name in space], np.int32))
    return tuple(number), tables
