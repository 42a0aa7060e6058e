"""What a run trains on and what it holds out: by a hash of each key, or by the names of two
splits."""

import dataclasses

from m3i_jax import schema
from m3i_jax.data.sources import base, mixture, split_folders
from m3i_jax.data.sources.base import DataSource
from m3i_jax.errors import UserError


def open_splits(data: schema.Data, *, cache: str = "") -> tuple[DataSource, DataSource]:
    """Opens the data of a run.

    A folder that holds train/ and val/ or test/ is split by them, as the description of the
    training part notes: see `split_folders`. With `data.holdout_split` the held-out part is that
    split, its categories numbered like the training part's by their names; else it is a share of
    the records. A source of a mixture may name both splits of its own: `KIND:PATH@TRAIN|HELD_OUT`.

    Args:
        data: source, mixture, splits and hold-out.
        cache: see `base.open_source`.

    Returns:
        (training part, held-out part), with the same classes. The second may be empty.

    Raises: UserError: see `base.open_kind` and `mixture.mixture_entries`; or a held-out split that
        is part of what is trained on.

    >>> [len(part) for part in open_splits(schema.Data(size=100, holdout=0.2))]
    [71, 29]
    """
    entries = mixture.mixture_entries(data)
    pairs = [_open_pair(entry, data, cache) for entry in entries]
    train, held_out = (
        mixture.join_sources(data, entries, part) for part in zip(*pairs, strict=True)
    )
    return train, held_out


def _open_pair(
    entry: mixture.MixtureEntry, data: schema.Data, cache: str
) -> tuple[DataSource, DataSource]:
    found = (
        None
        if entry.split or entry.held_out or entry.kind != "folder"
        else split_folders.find_split_folders(entry.path)
    )
    if found:
        train, held_out = _open_pair(
            dataclasses.replace(entry, split=found.train, held_out=found.held_out), data, cache
        )
        (train if found.held_out else train.source).note = found.note  # type: ignore[attr-defined, union-attr]
        return train, held_out
    if not entry.held_out:
        whole = base.open_kind(entry.kind, entry.path, entry.split, data, cache=cache)
        return base.split_by_hash(whole, data.holdout, "train"), base.split_by_hash(
            whole, data.holdout, "held_out"
        )
    if entry.kind == "shapes":
        raise UserError(
            "the built-in shapes have no splits: leave data.holdout_split empty, data.holdout holds"
            " some out"
        )
    elsewhere = "://" in entry.held_out or entry.held_out.startswith(("/", "~"))
    if not entry.split and entry.kind != "tfds" and not elsewhere:
        raise UserError(
            f"data.holdout_split={entry.held_out!r} is a part of {entry.path!r}, and without"
            " data.split all of that would be trained on: name the part to train on as well"
        )
    if entry.split == entry.held_out or (
        entry.kind == "tfds" and not entry.split and entry.held_out == "train"
    ):
        raise UserError(
            f"data.holdout_split={entry.held_out!r} is also what is trained on: hold another split"
            " out, or set data.holdout"
        )
    train = base.open_kind(entry.kind, entry.path, entry.split, data, cache=cache)
    held_out = base.open_kind(entry.kind, entry.path, entry.held_out, data, cache=cache)
    if held_out.classes != train.classes:
        held_out = mixture.RelabelledSource(held_out, train.classes)
    return train, held_out
