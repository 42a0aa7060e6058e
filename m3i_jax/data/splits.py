"""Opens the data of a run: as a whole, or as a training part and a held-out part, split by hash or
by the names of two splits."""

import dataclasses
import os
from typing import Any

from m3i_jax import schema
from m3i_jax.data.sources import base, keep_list, mixture, registry, relabelled
from m3i_jax.data.sources.base import DataSource
from m3i_jax.errors import UserError


def open_source(data: schema.Data, *, cache: str = "") -> DataSource:
    """Opens all records of the source that the configuration names, with nothing held out.

    Args:
        data: `source`, `path`, `split`, `mixture` and what else the kind of source reads.
        cache: directory in which an index of the records is kept, so that the next start need not
            read every file again; "" for none.

    Raises:
        UserError: the path is missing or holds nothing that can be read as an image; see also
            `mixture.mixture_entries`; or the configuration holds out a split by its name, which
            `open_splits` opens.

    >>> open_source(schema.Data(source="folder"))
    Traceback (most recent call last):
    m3i_jax.errors.UserError: data.path is empty, and data.source='folder' needs it: ...
    """
    entries = mixture.mixture_entries(data)
    for entry in entries:
        if splits := _find_splits(entry):
            setting, _ = _settings(entry.kind)
            folders = " or data.split=. to read every sub-folder as a category"
            raise UserError(
                f"data.path={entry.path!r} holds splits ({splits.note.partition(': ')[2]}), which"
                f" would be mixed here: set {setting}={splits.train} and read each by"
                f" itself{',' + folders if setting == 'data.split' else ''}"
            )
    if held_out := [entry.held_out for entry in entries if entry.held_out]:
        setting = (
            "the part of data.mixture after '|'"
            if data.source == "mixture"
            else _settings(data.source)[1]
        )
        raise UserError(
            f"{setting} names {held_out[0]!r}, which would be left out here: remove it, and read"
            " that split by itself"
        )
    sources = [
        _open_kept(entry, entry.split, keep, data, cache)
        for entry, keep in zip(entries, keep_paths(data, len(entries)), strict=True)
    ]
    kinds = [entry.kind for entry in entries]
    registry.name_classes(data, list(zip(kinds, sources, strict=True)))
    mixture.warn_shared_numbers(data, sources)
    return mixture.join_sources(data, entries, sources)


def open_splits(data: schema.Data, *, cache: str = "") -> tuple[DataSource, DataSource]:
    """Opens the training part and the held-out part of the data of a run.

    A folder that holds train/ and val/ or test/ is split by them, and the description of the
    training part says so: see `folder.find_split_folders`. With `data.holdout_split`, the held-out
    part is that split, its labels renumbered by class name to those of the training part, and a
    keep-list concerns only the training part. Else it is a share of the records, or of those that
    the keep-list names. An entry of a mixture may name both: `KIND:PATH@TRAIN|HELD_OUT`.

    Args:
        data: source, mixture, splits and hold-out.
        cache: see `open_source`.

    Returns:
        (training part, held-out part), with the same classes. The second may be empty.

    Raises:
        UserError: see `registry.open_kind` and `mixture.mixture_entries`; or the held-out split is
            part of the training split.

    >>> [len(part) for part in open_splits(schema.Data(size=100, holdout=0.2))]
    [71, 29]
    """
    entries = mixture.mixture_entries(data)
    keeps = keep_paths(data, len(entries))
    pairs = [
        _open_pair(entry, keep, data, cache) for entry, keep in zip(entries, keeps, strict=True)
    ]
    opened = zip(entries, pairs, strict=True)
    registry.name_classes(data, [(entry.kind, part) for entry, pair in opened for part in pair])
    mixture.warn_shared_numbers(data, [train for train, _ in pairs])
    pairs = [(train, _with_classes_of(train, held_out)) for train, held_out in pairs]
    train, held_out = (
        mixture.join_sources(data, entries, part) for part in zip(*pairs, strict=True)
    )
    return train, held_out


def _settings(kind: str) -> tuple[str, str]:
    """Returns the settings that name the training part and the held-out part of a kind."""
    if "annotations" in registry.source_kind(kind).reads:
        return "data.annotations", "data.holdout_annotations"
    return "data.split", "data.holdout_split"


def _find_splits(entry: mixture.MixtureEntry) -> registry.SplitFolders | None:
    """Returns the splits that lie at the path of an entry, if it names none itself."""
    find = registry.source_kind(entry.kind).find_splits
    return find(entry.path) if find and not entry.split and not entry.held_out else None


def keep_paths(data: schema.Data, count: int) -> list[str]:
    """Returns the keep-list of each of `count` sources, "" for those that are kept whole.

    Raises:
        UserError: `data.keep` has another number of lists.

    >>> keep_paths(schema.Data(keep=("a.parquet", "all")), 2), keep_paths(schema.Data(), 1)
    (['a.parquet', ''], [''])
    """
    if data.keep and len(data.keep) != count:
        raise UserError(
            f"data.keep names {len(data.keep)} lists, and there are {count} sources: give one per"
            " source in their order, 'all' for a source without"
        )
    return ["" if path == "all" else path for path in data.keep or ("all",) * count]


def _open_kept(
    entry: mixture.MixtureEntry, split: str, keep: str, data: schema.Data, cache: str
) -> DataSource:
    """Opens what a run trains on, or reads as a whole: a single class distinguishes nothing there,
    and is dropped before a keep-list gives labels."""
    source = registry.open_kind(entry.kind, entry.path, split, data, cache=cache)
    if drop := getattr(source, "drop_single_class", None):
        drop()
    return keep_list.keep_records(source, keep, cache=cache) if keep else source


def _with_classes_of(train: DataSource, held_out: DataSource) -> DataSource:
    """Returns the held-out part with its labels renumbered to the classes of the training part."""
    if not train.classes and hasattr(held_out, "drop_single_class"):
        held_out.drop_single_class()
    ids = [getattr(source, "class_ids", ()) for source in (held_out, train)]
    if held_out.classes == train.classes and ids[0] == ids[1]:
        return held_out
    renumbered = relabelled.RelabelledSource(held_out, train.classes, ids if all(ids) else ())
    renumbered.class_ids = tuple(ids[1])  # a mixture joins both parts alike
    return renumbered


def _open_pair(
    entry: mixture.MixtureEntry, keep: str, data: schema.Data, cache: str
) -> tuple[DataSource, DataSource]:
    if splits := _find_splits(entry):
        named = dataclasses.replace(entry, split=splits.train, held_out=splits.held_out)
        train, held_out = _open_pair(named, keep, data, cache)
        source: Any = train
        while hasattr(source, "source"):  # behind the share of a split and a keep-list
            source = source.source
        source.note = splits.note
        return train, held_out
    if not entry.held_out:
        source = _open_kept(entry, entry.split, keep, data, cache)
        train, held_out = (
            base.split_by_hash(source, data.holdout, part) for part in ("train", "held_out")
        )
        return train, held_out
    kind, (train_setting, held_out_setting) = (
        registry.source_kind(entry.kind),
        _settings(entry.kind),
    )
    registry.refuse_split(kind, entry.held_out)  # not as a part of the path
    train_split = entry.split or kind.default_split
    outside = "://" in entry.held_out or entry.held_out.startswith(("/", "~"))
    if not train_split and not outside:
        raise UserError(
            f"{held_out_setting}={entry.held_out!r} is a part of {entry.path!r}, and without"
            f" {train_setting} all of that would be trained on: set {train_setting} as well"
        )
    if train_split == entry.held_out:
        raise UserError(
            f"{held_out_setting}={entry.held_out!r} is also the training split: hold another split"
            " out, or set data.holdout"
        )
    train = _open_kept(entry, train_split, keep, data, cache)
    held_out = registry.open_kind(entry.kind, entry.path, entry.held_out, data, cache=cache)
    if not keep and (shared := _find_shared(train, held_out)):
        raise UserError(
            f"{held_out_setting}={entry.held_out!r} holds out images that {train_setting}="
            f"{train_split!r} trains on, those of {shared!r}: give two splits that share none, or"
            " a keep-list of the images to train on (data.keep)"
        )
    return train, held_out


def _find_shared(train: DataSource, held_out: DataSource) -> str:
    """Returns a file or a directory of which both sources read the same records; "" if there is
    none, or a source does not tell (`DataSource.extents`)."""
    both = [_extents(source) for source in (train, held_out)]
    for extents, others in (both, both[::-1]):
        for path, ranges in extents.items():
            above = path
            while above:
                for first, end in others.get(above, ()):
                    if above != path or any(a < end and first < b for a, b in ranges):
                        return path
                parent = os.path.dirname(above)
                above = "" if parent == above else parent
    return ""


def _extents(source: Any) -> dict[str, list[tuple[int, int]]]:
    """Returns {file or directory: [(first, end) of the records that a source reads of it]}."""
    tell = getattr(source, "extents", None)
    extents: dict[str, list[tuple[int, int]]] = {}
    folders: dict[str, str] = {}  # a link is resolved once for a folder, not for every file
    for path, first, end in tell() if tell else ():
        folder, name = os.path.split(os.path.normpath(path) if "://" not in path else path)
        if folder not in folders:
            folders[folder] = folder if "://" in path else os.path.realpath(folder)
        extents.setdefault(os.path.join(folders[folder], name), []).append((first, end))
    return extents
