"""`--data SOURCE` of --mode=eval: which source that text names, and how its settings replace those
of the run.

    DIR                          a folder of images, tar files, ArrayRecord shards or a saved
                                 Hugging Face data set
    'DIR/*.tar'                  tar files
    NAME                         an entry of the run's mixture, by the last part of its path
    KIND:PATH[@SPLIT[|HELD_OUT]] as an entry of data.mixture
    shapes, shapes:500, scenes   built-in images
"""

import dataclasses
import os
import re
from collections.abc import Iterable
from typing import Any

import ml_collections

from m3i_jax import schema
from m3i_jax.data.sources import array_record, folder, mixture, registry
from m3i_jax.data.sources.mixture import MixtureEntry
from m3i_jax.errors import UserError, shorten

_ANNOTATED = {"detect": "coco", "segment": "maps"}  # sources of directories for dense tasks
_BUILT_IN_IMAGES = 2000  # of a built-in set whose number is not given
_NAMED_BY_FLAG = ("data.source", "data.path", "data.mixture", "data.annotations")


def use_data(
    config: ml_collections.ConfigDict, text: str, overrides: Iterable[str] = ()
) -> MixtureEntry:
    """Replace the source of a configuration, in place; returns the source as an entry of a mixture.

    Other settings of `data` stay those of the run: images are cut and normalised as there. A share
    is held out, unless the source has splits. A task without views reads held-out images alone: of
    data that the run did not train on, nothing is kept back (`data.holdout` is 0), and `open_setup`
    then holds all of them out. Number of categories, captions and names of classes are then those
    of the source.

    Args:
      config: settings of the run.
      text: value of --data.
      overrides: assignments of the command line, of which none may name the source too.

    Raises:
      UserError: the text names no source, or an override names it too; or the run trained on all
        images of a source of which a share would be held out.
    """
    keys = [assignment.partition("=")[0] for assignment in overrides]
    if twice := [key for key in keys if key in _NAMED_BY_FLAG]:
        raise UserError(
            f"--config.{twice[0]}: --data={text} names the source already; leave one of them out"
        )
    entry = find_source(text, tuple(config.data.mixture), task=config.task)
    kind = registry.source_kind(entry.kind)
    defaults = schema.Data()
    annotated = "annotations" in kind.reads
    share = config.data.holdout or defaults.holdout
    own = _trained_on(entry, config.data)
    if config.task in _ANNOTATED and kind.path and not own:
        share = 0.0
    if not _splits(entry).held_out and "data.holdout" not in keys:
        _refuse_trained_on(text, own, config.data.holdout)
    config.data.update(
        {
            "source": entry.kind,
            "path": entry.path,
            "mixture": (),
            "keep": (),
            "split": "" if annotated else entry.split,
            "holdout_split": "" if annotated else entry.held_out,
            "annotations": entry.split if annotated else "",
            "holdout_annotations": entry.held_out if annotated else "",
            "class_names": "",
            "directory": config.data.directory if "directory" in kind.reads else "",
            "class_space": defaults.class_space,
            "size": _BUILT_IN_IMAGES if "size" in kind.reads and not entry.path else 0,
            "holdout": share,
        }
    )
    return entry


def _trained_on(entry: MixtureEntry, data: Any) -> list[MixtureEntry]:
    """The sources that settings train on which are a source, or share a file or directory with it,
    with the splits that are recognised at their paths."""
    kind = registry.source_kind(entry.kind)
    split = _splits(entry).split or kind.default_split
    owns = [
        dataclasses.replace(own, split=own.split or kind.default_split)
        for own in map(_splits, mixture.mixture_entries(data))
        if own.kind == entry.kind
    ]
    if not kind.path:
        return owns
    if kind.locate:
        place = _real_path(kind.locate(entry.path, split))
        places = [_real_path(kind.locate(own.path, own.split)) for own in owns]
        return [
            own
            for own, other in zip(owns, places, strict=True)
            if os.path.commonpath((place, other)) in (place, other)
        ]
    place = _real_path(entry.path)
    # a kind that reads a split without being given its name may read this one
    return [
        own
        for own in owns
        if _real_path(own.path) == place and (not split or own.split in ("", split))
    ]


def _refuse_trained_on(text: str, owns: list[MixtureEntry], holdout: float) -> None:
    """Refuse a source without a held-out part if the run held no share of it out."""
    split = next((own.held_out for own in owns if own.held_out), "")
    if owns and (split or not holdout):
        why = f"it held out {split!r}" if split else "data.holdout=0"
        raise UserError(
            f"--data={shorten(text)}: the run trained on all of these images ({why}): give images"
            " that it did not train on, or set --config.data.holdout, to evaluate on a share"
        )


def _real_path(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path))


def _splits(entry: MixtureEntry) -> MixtureEntry:
    """An entry with its splits, or with those that its kind recognises at the path."""
    find = registry.source_kind(entry.kind).find_splits
    if not find or entry.split or not (found := find(entry.path)):
        return entry
    held_out = entry.held_out or found.held_out
    return dataclasses.replace(entry, split=found.train, held_out=held_out)


def entry_of(data: schema.Data) -> MixtureEntry:
    """Returns the single source of settings that `use_data` has changed.

    >>> entry_of(schema.Data(source="folder", path="/b", holdout_split="val")).held_out
    'val'
    """
    return mixture.mixture_entries(data)[0]


def find_source(text: str, entries: Iterable[str] = (), *, task: str = "pretrain") -> MixtureEntry:
    """Returns the source that a value of --data names.

    Args:
      text: see the module.
      entries: `data.mixture` of the run.
      task: of the run; a directory holds what this task reads.

    Raises:
      UserError: it names none, or several entries of the mixture.

    >>> find_source("shapes:500"), find_source("sketch", ["folder:/data/sketch=3"]).path
    (MixtureEntry(kind='shapes', path='500', split='', held_out='', weight=None), '/data/sketch')
    >>> find_source("/data/x/*.tar").kind
    'tars'
    """
    parsed = [mixture.parse_entry(entry) for entry in entries]
    named = [entry for entry in parsed if text in _names(entry)]
    if len(named) > 1:
        full = ", ".join(f"{entry.kind}:{entry.path}" for entry in named)
        raise UserError(
            f"--data={shorten(text)}: are {len(named)} entries of data.mixture ({full}); give one"
            " of these"
        )
    if named:
        return dataclasses.replace(named[0], weight=None)
    kind, colon, rest = text.partition(":")
    if kind in registry.source_names() and not os.path.exists(text):
        if not rest and not registry.source_kind(kind).path:
            return MixtureEntry(kind, "")
        if colon and rest:
            try:
                return dataclasses.replace(mixture.parse_entry(text), weight=None)
            except UserError as error:
                raise UserError(str(error).replace("data.mixture", "--data", 1)) from None
    if found := _kind_of_path(text, task):
        return MixtureEntry(found, text)
    choices = [name for entry in parsed for name in _names(entry)[:1]]
    in_mixture = f", an entry of the run's mixture ({', '.join(choices)})" if choices else ""
    raise UserError(
        f"--data={shorten(text)}: names no data; give a directory, a pattern of tar files"
        f"{in_mixture}, or KIND:PATH with one of {', '.join(registry.source_names())}"
    )


def _names(entry: MixtureEntry) -> tuple[str, ...]:
    """The short name of an entry of a mixture, its path, and the path with its kind."""
    splits = "|".join(filter(None, (entry.split, entry.held_out)))
    full = f"{entry.kind}:{entry.path}" + (f"@{splits}" if splits else "")
    return data_name(entry), entry.path, f"{entry.kind}:{entry.path}", full


def _kind_of_path(path: str, task: str) -> str:
    """The kind of source of a path by what lies there, "" if nothing does."""
    expanded = os.path.expanduser(path)
    if path.endswith(".tar"):
        return "tars"
    if not os.path.isdir(expanded):
        return ""
    if task in _ANNOTATED:
        return _ANNOTATED[task]
    names = sorted(os.listdir(expanded))
    if "state.json" in names or "dataset_dict.json" in names:  # written by save_to_disk
        return "hugging_face"
    for ending, kind in ((array_record.ENDING, "array_record"), (".tar", "tars")):
        if file := next((name for name in names if name.endswith(ending)), ""):
            if images := folder.folder_with_images(expanded):
                raise UserError(
                    f"--data={shorten(path)}: holds {file} and a folder of images, {images}/: give"
                    f" {kind}:{path} or folder:{path}"
                )
            return kind
    return "folder"


def data_name(entry: MixtureEntry) -> str:
    """Returns a short name of a source for files and tables: the last part of its path, and its
    split.

    >>> data_name(MixtureEntry("folder", "/data/my sketch/", "val")), data_name(
    ...     MixtureEntry("tars", "/x/cc3m/*.tar"))
    ('my-sketch-val', 'cc3m')
    >>> data_name(MixtureEntry("shapes", "500"))
    'shapes-500'
    """
    parts = [part for part in entry.path.split("/") if part and not set(part) & set("*?[")]
    last = parts[-1] if parts else ""
    if not last or last.isdigit():
        last = f"{entry.kind}-{last}".rstrip("-")
    split = os.path.splitext(os.path.basename(entry.split))[0]
    name = "-".join(filter(None, (last.removesuffix(".tar"), split)))
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[:60] or entry.kind


def chance_of(metric: str, classes: int) -> float | None:
    """Returns what guessing a class at random yields, or None for a metric that is no accuracy of
    classes.

    >>> chance_of("eval/knn/top1", 8), chance_of("eval/zero_shot/7/top5", 4)
    (0.125, 1.0)
    >>> chance_of("eval/retrieval/text_to_image/r1", 8) is None
    True
    """
    if not classes:
        return None
    if top := re.fullmatch(r"eval/.*/top(\d+)", metric):
        return min(1.0, int(top[1]) / classes)
    return 1 / classes if metric.startswith("eval/few_shot/") else None
