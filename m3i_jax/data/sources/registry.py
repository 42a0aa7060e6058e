"""The registry of data sources: every value of `data.source` but "mixture" is a `SourceKind`.

The kinds of this package are the files of this folder: the kind NAME of `schema.SOURCES` is
registered by sources/NAME.py, which is imported when it is first needed. Another package adds its
own with `register_source`, for example in the configuration file of its runs:

    from m3i_jax.data.sources.registry import SourceKind, register_source

    register_source(SourceKind(
        name="lmdb",
        open=lambda path, split, data, cache: LmdbSource(path),
        path="the directory that holds data.mdb",
    ))

Then `--config.data.source=lmdb --config.data.path=DIR` trains on it, and `lmdb:DIR=3` is an entry
of a mixture. Modes that read the configuration of a workdir need the registration too: start them
from a program that imports it and calls `m3i_jax.main.main`. Worker processes unpickle the source,
so its class belongs in an importable module."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from m3i_jax import schema
from m3i_jax.data.sources import class_names
from m3i_jax.data.sources.base import DataSource
from m3i_jax.errors import UserError, path_exists
from m3i_jax.registries import Registry


class Opener(Protocol):
    """Opens a source: (data.path, data.split, all settings of data, directory of the index or
    "")."""

    def __call__(self, path: str, split: str, data: schema.Data, cache: str, /) -> DataSource: ...


@dataclasses.dataclass(frozen=True, slots=True)
class SplitFolders:
    """The splits that a source recognises at a path without being given their names.

    train, held_out: names of splits; `held_out` is empty if a share of `train` is held out. note:
    the decision, for the log."""

    train: str
    held_out: str
    note: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceKind:
    """One kind of data source.

    Attributes:
        name: value of `data.source`, and the prefix of an entry of `data.mixture`.
        open: opens the source. Raises UserError if nothing at the path can be read as an image.
        path: what `data.path` has to be, as the end of "give ..."; "" if it may be empty.
        reads: which of the settings "class_names", "directory", "size", "map_unlabelled" and
            "annotations" (with "holdout_annotations") it reads; an override of the others is
            refused. With "class_names", `classes` of the opened source is assigned
            (`name_classes`), unless its attribute `names_its_classes` is true: then `open` has read
            the file.
        splits: whether the source has parts that `data.split`, `data.holdout_split` and what
            follows @ in an entry of a mixture name; else they are refused.
        default_split: used if `data.split` is empty; "" for all of it.
        find_splits: recognises splits by the layout of a path; None if it has no splits.
        locate: returns the file or directory that says which images a split of a path has, by
            which two entries are compared; None: the path and the name of the split say it.
    """

    name: str
    open: Opener
    path: str = ""
    reads: Sequence[str] = ()
    splits: bool = True
    default_split: str = ""
    find_splits: Callable[[str], SplitFolders | None] | None = None
    locate: Callable[[str, str], str] | None = None


def _unknown(name: str, names: list[str]) -> UserError:
    known = ", ".join(map(repr, names))
    return UserError(f"data.source={name!r} is not a source: use {known} or 'mixture'")


SOURCE_KINDS: Registry[SourceKind] = Registry(
    "source",
    choices=schema.SOURCES,
    reserved=("mixture",),
    home=lambda name: f"{__package__}.{name}",
    made_in=lambda kind: kind.open.__module__,
    replace=True,
    unknown=_unknown,
)


def register_source(kind: SourceKind) -> SourceKind:
    """Adds a kind of source to those that `data.source` and `data.mixture` accept.

    Registering the same name again replaces the kind, so that a module can be reloaded.

    Returns:
        The kind.

    Raises:
        ValueError: the name is "mixture", not an identifier, or of a kind of this package.

    >>> register_source(SourceKind(name="mixture", open=lambda *_: None))
    Traceback (most recent call last):
    ValueError: source 'mixture' exists already: a source cannot be named 'mixture', ...
    """
    return SOURCE_KINDS.register(kind.name, kind)


def source_names() -> list[str]:
    """Names of all kinds, those of this package first.

    >>> source_names()[:2]
    ['shapes', 'folder']
    """
    return list(SOURCE_KINDS)


def source_kind(name: str) -> SourceKind:
    """Returns a kind of source by its name.

    Raises:
        UserError: no kind of that name is registered.

    >>> source_kind("tfds").default_split
    'train'
    """
    return SOURCE_KINDS[name]


def refuse_split(kind: SourceKind, split: str) -> None:
    """Refuses the name of a split where the kind has none: all records would be read instead.

    >>> refuse_split(source_kind("folder"), "train"), refuse_split(source_kind("shapes"), "")
    (None, None)
    """
    if split and not kind.splits:
        raise UserError(
            f"the source {kind.name!r} has no splits, and {split!r} names one: leave it out, of"
            " data.split, data.holdout_split or an entry KIND:PATH@SPLIT; data.holdout holds a"
            " share out"
        )


def open_kind(
    kind: str, path: str, split: str, data: schema.Data, *, cache: str = ""
) -> DataSource:
    """Opens one source.

    Args:
        kind: its name.
        path: see `SourceKind.path`.
        split: part of it; "" for the default of the kind.
        data: the other settings.
        cache: directory in which an index of the records is kept; "" for none.

    Raises:
        UserError: the path is empty or holds nothing that can be read as an image, the kind has no
            splits, or a package is missing.

    >>> open_kind("shapes", "12", "", schema.Data()).description()
    '12 images in shapes (336 x 336 pixels, seed 0), 8 classes, captions for 100%'
    """
    entry = source_kind(kind)
    if entry.path and not path:
        raise UserError(f"data.path is empty, and data.source={kind!r} needs it: give {entry.path}")
    refuse_split(entry, split)
    if data.class_names and data.source == kind and "class_names" not in entry.reads:
        raise UserError(
            f"data.class_names={data.class_names!r} is not read by data.source={kind!r}, which"
            " names its classes itself: leave it empty"
        )
    path_exists(os.path.expanduser(path))  # raises where a disk that may come back does not answer
    return entry.open(path, split or entry.default_split, data, cache)


def name_classes(data: schema.Data, sources: Sequence[tuple[str, DataSource]]) -> None:
    """Assigns the names that `data.class_names` has for the classes of the sources of a run. A
    source of which it names none, such as one without labels, keeps its own.

    Args:
        data: the settings.
        sources: (kind, source), with the labels of their keep-lists.

    Raises:
        UserError: the file cannot be read, or names no class of any source.

    >>> name_classes(schema.Data(), [])
    """
    reading = [source for kind, source in sources if "class_names" in source_kind(kind).reads]
    unnamed: list[Any] = [s for s in reading if not getattr(s, "names_its_classes", False)]
    if not data.class_names or not unnamed:
        return
    # where a source has read the file itself, it need not name another one
    spaces = [getattr(s, "class_ids", ()) or s.classes for s in unnamed]
    named = class_names.name_spaces(data.class_names, spaces, needed=len(unnamed) == len(reading))
    for source, ids, names in zip(unnamed, spaces, named, strict=True):
        if names:
            source.class_ids, source.classes = ids, names
